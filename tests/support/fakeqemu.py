"""A QMP server in this process that has bitmaps, and a veto on storing them, as QEMU has.

It can refuse, hang up after any command, and answer nonsense. What real QEMUs do is for the
oracle; this is for what they do not do when they are asked to.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qcow2bm
from qcow2bm import Qcow2BmError

SIZE = 64 << 20

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""},
                    "capabilities": []}}  # fmt: skip

CHANGES = {"transaction", "migrate-set-parameters", "blockdev-add", "blockdev-del", "add-fd",
           "remove-fd", "block-dirty-bitmap-add", "human-monitor-command"}  # fmt: skip

EVENT = {"event": "BLOCK_IO_ERROR", "data": {"reason": 1000 * "x"},
         "timestamp": {"seconds": 1, "microseconds": 2}}  # fmt: skip

Arguments = dict[str, Any]


def _requests(client: socket.socket, descriptors: list[int]) -> Iterator[Arguments]:
    """The requests of a client, which need not end in a newline, and the files sent along."""
    text, decoder = "", json.JSONDecoder()
    while (received := socket.recv_fds(client, 1 << 16, 1))[0]:
        text += received[0].decode()
        descriptors += received[1]
        while text := text.lstrip():
            try:
                request, end = decoder.raw_decode(text)
            except ValueError:
                break  # there is more to come
            yield request
            text = text[end:]


def _changes(command: str, arguments: Arguments) -> bool:
    """Whether it changes something; an empty write is a question."""
    return command in CHANGES and " 0 0" not in arguments.get("command-line", "")


class RefusedError(Exception):
    """The answer to a command."""


@dataclass
class FakeBitmap:
    """A bitmap in memory; its bits are the numbers of dirty granules."""

    granularity: int = 65536
    bits: set[int] = field(default_factory=set)
    persistent: bool = True
    recording: bool = True
    busy: bool = False
    inconsistent: bool = False
    vetoed: bool = False
    """Whether QEMU would drop it when it quits, which it does not show."""

    def digest(self, size: int) -> str:
        """The hash that QEMU reports, for a disk of this size."""
        packed = sum(1 << bit for bit in self.bits)
        words = max(1, -(-size // self.granularity // 64))
        return hashlib.sha256(packed.to_bytes(8 * words, "little")).hexdigest()

    def described(self, name: str) -> Arguments:
        """The bitmap as QEMU lists it."""
        found: Arguments = {
            "name": name,
            "granularity": self.granularity,
            "count": self.granularity * len(self.bits),
            "recording": self.recording and not self.inconsistent,
            "persistent": self.persistent,
            "busy": self.busy,
        }
        return found | ({"inconsistent": True} if self.inconsistent else {})


@dataclass
class FakeNode:
    """A block node."""

    bitmaps: dict[str, FakeBitmap] = field(default_factory=dict)
    size: int = SIZE
    read_only: bool = False
    driver: str = "qcow2"
    active: bool | None = None
    file: int | None = None
    """The file in which the node stores its bitmaps when it is closed; None if it stores none."""

    def close(self) -> None:
        """Stores what is persistent."""
        if self.file is None:
            return
        path = f"/proc/self/fd/{self.file}"
        with qcow2bm.open(path, "r+", locking=False) as image, image.edit() as edit:
            for name, bitmap in self.bitmaps.items():
                edit.add(name, bitmap.granularity, enabled=bitmap.recording)
                edit.set_many(name, [(bit * bitmap.granularity, 1) for bit in bitmap.bits])
        os.close(self.file)


class FakeQemu:
    """A machine that runs; its attributes may be set at any time.

    Attributes:
        nodes: the block nodes by name.
        devices: device name by node name.
        commands: every command that came, and its arguments.
        hang_up_after: how many more commands are done before the connection breaks off without
            an answer to the last one; only those that change something count.
        inactive: nodes that are not active, and do not say so.
        below: the node below a node, and what the edge to it is called.
        refuse: asked for each command and each action of a transaction; a text refuses it.
        after: called after each command.
        alter: gets each command and the answer to it, and returns the answer that is sent.
        silent_at: the command that is never answered, as no later command is.
        floods_at: the command that is answered by events without end.
        deaf: whether nothing is read once the client has chosen its capabilities.
        during: called before each action of a transaction, which works on what there is then.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, FakeNode] = {"disk": FakeNode()}
        self.devices: dict[str, str] = {}
        self.status = "running"
        self.migration = "cancelled"
        self.mapping: list[Arguments] | None = None
        self.greeting: object = GREETING
        self.commands: list[tuple[str, Arguments]] = []
        self.descriptors: list[int] = []
        self.inactive: set[str] = set()
        self.below: dict[str, tuple[str, str]] = {}
        self.hang_up_after: int | None = None
        self.refuse: Callable[[str, Arguments], str | None] = lambda command, arguments: None
        self.answers: dict[str, object] = {}
        self.after: Callable[[str], None] = lambda command: None
        self.alter: Callable[[str, object], object] = lambda command, answer: answer
        self.silent_at = self.floods_at = ""
        self.deaf = False
        self.during: Callable[[str, Arguments], None] | None = None

    @property
    def bitmaps(self) -> dict[str, FakeBitmap]:
        """The bitmaps of the one disk there is by default."""
        return self.nodes["disk"].bitmaps

    def changes(self) -> list[str]:
        """The commands so far that change something."""
        return [command for command, arguments in self.commands if _changes(command, arguments)]

    @contextmanager
    def serving(self, path: Path) -> Iterator[str]:
        """Serves one client after the other at this path for the duration of the block."""
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            thread = threading.Thread(target=self._serve, args=[server], daemon=True)
            thread.start()
            try:
                yield str(path)
            finally:
                path.unlink(missing_ok=True)
                self.deaf = False
                server.shutdown(socket.SHUT_RDWR)
                thread.join(10)
                for descriptor in self.descriptors:
                    os.close(descriptor)

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client, suppress(OSError):
                self._talk(client)

    def _talk(self, client: socket.socket) -> None:
        def send(message: object) -> None:
            client.sendall(json.dumps(message).encode() + b"\r\n")

        send(self.greeting)
        for request in _requests(client, self.descriptors):
            command, arguments = request["execute"], request.get("arguments") or {}
            answer: dict[str, object] = {"id": request["id"]} if "id" in request else {}
            try:
                answer["return"] = self.alter(command, self._do(command, arguments))
            except (RefusedError, LookupError, TypeError, ValueError, Qcow2BmError) as error:
                answer["error"] = {"class": "GenericError", "desc": str(error)}
            if _changes(command, arguments) and self.hang_up_after is not None:
                self.hang_up_after -= 1
                if self.hang_up_after < 0:
                    self.hang_up_after = None
                    return
            while command == self.floods_at:
                send(EVENT)
            if command == self.silent_at:
                client.recv(1)
                return
            send(answer)
            while self.deaf:
                time.sleep(0.01)

    def _do(self, command: str, arguments: Arguments) -> object:
        if command == "qmp_capabilities":
            return {}
        self.commands.append((command, arguments))
        if reason := self.refuse(command, arguments):
            raise RefusedError(reason)
        if command in self.answers:
            return self.answers[command]
        method = getattr(self, "_" + command.replace("-", "_"), None)
        if not method:
            raise RefusedError(f"The command {command} has not been found")
        try:
            return method(**{key.replace("-", "_"): value for key, value in arguments.items()})
        finally:
            self.after(command)

    def _query_status(self) -> object:
        return {"status": self.status, "running": self.status == "running"}

    def _query_migrate(self) -> object:
        return {"status": self.migration} if self.migration else {}

    def _query_migrate_parameters(self) -> object:
        return {} if self.mapping is None else {"block-bitmap-mapping": self.mapping}

    def _x_debug_query_block_graph(self) -> object:
        numbers = {name: number for number, name in enumerate(self.nodes)}
        return {
            "nodes": [{"id": number, "name": name} for name, number in numbers.items()],
            "edges": [
                {"parent": numbers[name], "child": numbers[below], "name": edge}
                for name, (below, edge) in self.below.items()
            ],
        }

    def _migrate_set_parameters(self, block_bitmap_mapping: list[Arguments]) -> object:
        self.mapping = block_bitmap_mapping
        return {}

    def _query_block(self) -> object:
        return [
            {"device": self.devices.get(name, ""), "inserted": {"node-name": name}}
            for name in self.nodes
        ] + [{"device": "empty"}]

    def _query_named_block_nodes(self, flat: bool) -> object:
        assert flat
        return [
            {"node-name": name, "ro": node.read_only, "drv": node.driver,
             "image": {"virtual-size": node.size, "cluster-size": 65536}}
            | ({} if node.active is None else {"active": node.active})
            | ({"dirty-bitmaps": [b.described(n) for n, b in node.bitmaps.items()]}
               if node.bitmaps else {})
            for name, node in self.nodes.items()
        ]  # fmt: skip

    def _x_debug_block_dirty_bitmap_sha256(self, node: str, name: str) -> object:
        return {"sha256": self._find(self.nodes, node, name).digest(self.nodes[node].size)}

    def _query_fdsets(self) -> object:
        return [
            {"fdset-id": fd, "fds": [{"fd": fd, "opaque": "qcow2bm-scratch"}]}
            for fd in self.descriptors
        ]

    def _add_fd(self, opaque: str) -> object:
        assert opaque == "qcow2bm-scratch"
        return {"fdset-id": self.descriptors[-1], "fd": self.descriptors[-1]}

    def _remove_fd(self, fdset_id: int) -> object:
        self.descriptors.remove(fdset_id)
        os.close(fdset_id)
        return {}

    def _blockdev_add(
        self, driver: str, node_name: str, size: int = SIZE, file: Arguments | None = None
    ) -> object:
        if node_name in self.nodes:
            raise RefusedError("Duplicate nodes with node-name")
        descriptor = os.dup(int(file["filename"].rpartition("/")[2])) if file else None
        self.nodes[node_name] = FakeNode(size=size, driver=driver, file=descriptor)
        return {}

    def _blockdev_del(self, node_name: str) -> object:
        if node_name not in self.nodes:
            raise RefusedError(f"Failed to find node with node-name='{node_name}'")
        self.nodes.pop(node_name).close()
        return {}

    def _block_dirty_bitmap_add(self, node: str, name: str, granularity: int) -> object:
        self.nodes[node].bitmaps[name] = FakeBitmap(granularity, persistent=False)
        return {}

    def _human_monitor_command(self, command_line: str) -> object:
        program, node, _, *options, start, length = command_line.replace('"', "").split()
        assert program == "qemu-io"
        if length == "0":  # to find out whether it is active
            return "Block node is read-only" if node in self.inactive else "Permission conflict"
        assert options == ["-q"]
        for bitmap in self.nodes[node].bitmaps.values():
            bitmap.bits.add(int(start) // bitmap.granularity)
        return ""

    def _transaction(self, actions: list[Arguments]) -> object:
        after = copy.deepcopy(self.nodes)
        touched = []
        try:
            for action in actions:
                kind, data = action["type"], action["data"]
                if self.during:
                    self.during(kind, data)
                    self._take_over(after)
                if reason := self.refuse(kind, data):
                    raise RefusedError(reason)
                if kind == "block-dirty-bitmap-remove":
                    touched.append((data["node"], data["name"]))
                self._act(after, kind, data)
        except RefusedError:
            for node, name in touched:  # which is what the rescue lives on
                self.nodes[node].bitmaps[name].vetoed = False
            raise
        self.nodes = after
        return {}

    def _take_over(self, nodes: dict[str, FakeNode]) -> None:
        """Lets a transaction see what was written since it began."""
        for name, node in self.nodes.items():
            for key, bitmap in node.bitmaps.items():
                if key in nodes[name].bitmaps and bitmap.recording:
                    nodes[name].bitmaps[key].bits |= bitmap.bits

    def _act(self, nodes: dict[str, FakeNode], kind: str, data: Arguments) -> None:
        if kind == "abort":
            raise RefusedError("Transaction aborted using Abort action")
        verb = kind.removeprefix("block-dirty-bitmap-")
        bitmaps = nodes[data["node"]].bitmaps
        if verb == "add":
            if data["name"] in bitmaps:
                raise RefusedError(f"Bitmap already exists: {data['name']}")
            recording, persistent = not data["disabled"], data["persistent"]
            bitmaps[data["name"]] = FakeBitmap(
                data["granularity"], persistent=persistent, recording=recording
            )
            return
        found = self._find(nodes, data["node"], data.get("target") or data["name"])
        if found.busy or (found.inconsistent and verb != "remove"):
            raise RefusedError("Bitmap is in use by another operation, or inconsistent")
        if verb == "remove":
            del bitmaps[data["name"]]
        elif verb == "disable":
            found.recording = False
        else:
            for source in data["bitmaps"]:
                self._merge(nodes, found, source, nodes[data["node"]].size)

    def _merge(
        self, nodes: dict[str, FakeNode], target: FakeBitmap, where: Arguments, size: int
    ) -> None:
        source = self._find(nodes, where["node"], where["name"])
        if nodes[where["node"]].size != size:
            raise RefusedError("Bitmaps are of different sizes and can't be merged")
        for bit in source.bits:
            start, end = bit * source.granularity, min(size, (bit + 1) * source.granularity)
            last = (end - 1) // target.granularity
            target.bits.update(range(start // target.granularity, last + 1))

    def _find(self, nodes: dict[str, FakeNode], node: str, name: str) -> FakeBitmap:
        if node not in nodes:
            raise RefusedError(f"Cannot find device={node} nor node_name={node}")
        if name not in nodes[node].bitmaps:
            raise RefusedError(f"Dirty bitmap '{name}' not found")
        return nodes[node].bitmaps[name]
