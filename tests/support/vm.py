"""Real QEMU system emulators without a guest, to migrate between.

Nothing here listens on a port: QMP and migration streams go over socket pairs, one end of which is
handed to QEMU. Only for a second QMP server, if a test asks for it, is there a socket with a path.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

from support.qemu import QmpError, ToolError

TOOL = "qemu-system-x86_64"

NOWHERE = "exec:cat >/dev/null"
"""A migration to here succeeds, and there is no destination."""

_TIMEOUT = 60  # seconds: so that a hanging machine fails a test and not the whole run
_ENDED = ("completed", "failed", "cancelled")  # states a migration does not leave by itself
_SLOW = 4096  # bytes per second: the BIOS alone takes minutes


def missing_tools() -> list[str]:
    """The names of the tools that are not installed."""
    return [] if shutil.which(TOOL) else [TOOL]


def until_deadline(subject: str) -> Iterator[None]:
    """Yields again and again, at short intervals, and raises when it takes too long."""
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        yield
        time.sleep(0.005)
    raise TimeoutError(subject)


def _node(name: str, image: Path, failing_write: int | None = None) -> dict[str, object]:
    below: dict[str, object] = {"driver": "file", "filename": str(image)}
    if failing_write is not None:
        below = {"driver": "blkdebug", "image": below, **_fault(failing_write)}
    return {"node-name": name, "driver": "qcow2", "file": below}


def _fault(number: int) -> dict[str, object]:
    """Options of blkdebug: the write of that number fails with EIO, and no other."""
    event = "pwritev"
    counted = [
        {"event": event, "state": state, "new_state": state + 1} for state in range(1, number)
    ]
    error = {"event": event, "state": number, "errno": 5, "once": True, "iotype": "write"}
    fault: dict[str, object] = {"inject-error": [error]}
    return {**fault, "set-state": counted} if counted else fault


class Machine:
    """A QEMU process with a qcow2 image on a disk; a context manager.

    It runs the BIOS, which finds nothing to boot, and so writes nothing by itself. What is still
    running at the end is killed: whether a machine quits or dies is for a test to say.
    """

    def __init__(
        self,
        image: Path,
        *,
        incoming: bool = False,
        paused: bool = False,
        monitor: Path | None = None,
        second_monitor: Path | None = None,
        second_disk: Path | None = None,
        failing_write: int | None = None,
    ) -> None:
        """``incoming``: it waits for `receive`. ``paused``: it does not run until told to.

        ``monitor`` and ``second_monitor`` are where sockets of QMP servers are made for others.
        ``second_disk`` is an image that the machine has as the node "second", in an iothread.
        ``failing_write`` is the number of the write to the image file that fails with EIO.
        """
        self._node = _node("disk", image, failing_write)
        second = _node("second", second_disk) if second_disk else None
        self._options = (
            *(["-object", "iothread,id=io", "-blockdev", json.dumps(second)] if second else []),
            *(["-device", "virtio-blk-pci,drive=second,iothread=io"] if second else []),
            *(["-incoming", "defer"] if incoming else []),
            *(["-S"] if paused else []),
            *(
                word
                for path in (monitor, second_monitor)
                if path
                for word in ("-qmp", f"unix:{path},server=on,wait=off")
            ),
        )

    def __enter__(self) -> Self:
        self._output = TemporaryFile()  # closed in __exit__
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    TOOL,
                    *("-nodefaults", "-no-user-config", "-display", "none"),
                    *("-machine", "pc", "-accel", "tcg", "-m", "16"),
                    *("-blockdev", json.dumps(self._node), "-device", "ide-hd,id=disk,drive=disk"),
                    *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                    *("-mon", "chardev=qmp,mode=control"),
                    *self._options,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
        self._socket.settimeout(_TIMEOUT)
        self._stream = self._socket.makefile("r", encoding="utf-8")
        try:
            assert "QMP" in self._message()
            self.execute("qmp_capabilities")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._stream.close()
        self._socket.close()
        self._output.close()

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def quit(self) -> None:
        """Ends it cleanly: bitmaps are stored if QEMU thinks they should be."""
        self.execute("quit")
        assert self._process.wait(_TIMEOUT) == 0

    def kill(self) -> None:
        """Ends it as kill -9 does, unless it has ended."""
        self._process.kill()
        self._process.wait(_TIMEOUT)

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        descriptor: int | None = None,
    ) -> Any:
        """Executes a QMP command, sends a descriptor along if given, and returns the result.

        Raises:
            QmpError: QEMU refuses the command.
        """
        line = json.dumps({"execute": command, "arguments": arguments or {}}).encode()
        if descriptor is None:
            self._socket.sendall(line)
        else:
            assert socket.send_fds(self._socket, [line], [descriptor]) == len(line)
        while True:
            answer = self._message()
            if "error" in answer:
                raise QmpError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def _message(self) -> dict[str, Any]:
        line = ""
        with suppress(ConnectionError):
            line = self._stream.readline()
        if not line:
            raise ToolError(f"{TOOL} is gone: {self.printed}")
        message: dict[str, Any] = json.loads(line)
        return message

    @property
    def printed(self) -> str:
        """The text that the process has printed up to now."""
        descriptor = self._output.fileno()  # seeking would move where the process prints
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()

    def limit_files(self, length: int | None) -> None:
        """Lets no file grow beyond a length, as if no space were left; None ends that."""
        _, most = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
        limit = most if length is None else length
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (limit, most))

    # The disk

    def io(self, command: str) -> str:
        """Runs a qemu-io command on the drive, as if the guest did it, and returns its output."""
        start = self._output.seek(0, 2)
        line = f'qemu-io -d disk "{command}"'
        complaint = self.execute("human-monitor-command", {"command-line": line})
        self._output.seek(start)  # qemu-io prints to standard output, not to the monitor
        text: str = complaint + self._output.read().decode()
        return text

    def write(self, start: int, length: int) -> None:
        """Writes to the disk; the bitmaps record it."""
        said = self.io(f"write {start} {length}")
        if f"wrote {length}/{length} bytes" not in said:
            raise ToolError(said)

    def add(self, name: str, granularity: int) -> None:
        """Adds an enabled persistent bitmap, which is stored when the machine quits."""
        bitmap = {"node": "disk", "name": name, "granularity": granularity, "persistent": True}
        self.execute("block-dirty-bitmap-add", bitmap)

    def bitmaps(self) -> dict[str, dict[str, Any]]:
        """The bitmaps in memory, by name: count, recording, busy, persistent and so on."""
        for node in self.execute("query-named-block-nodes", {"flat": True}):
            if node["node-name"] == "disk":
                return {bitmap["name"]: bitmap for bitmap in node.get("dirty-bitmaps", [])}
        raise QmpError("there is no disk")

    def sha256(self, name: str) -> str:
        """The hash of a bitmap's bits in memory."""
        arguments = {"node": "disk", "name": name}
        digest: str = self.execute("x-debug-block-dirty-bitmap-sha256", arguments)["sha256"]
        return digest

    # Migration

    def enable(self, *capabilities: str) -> None:
        """Turns migration capabilities on."""
        states = [{"capability": name, "state": True} for name in capabilities]
        self.execute("migrate-set-capabilities", {"capabilities": states})

    def migrate(self, target: socket.socket | str, *, slowly: bool = False) -> None:
        """Begins to migrate to a socket or URI; ``slowly`` so that it stays in the RAM phase.

        A socket is closed here: from then on the machine alone has that end.
        """
        if slowly:
            self.execute("migrate-set-parameters", {"max-bandwidth": _SLOW})
        self.execute("migrate", {"uri": self._uri(target)})

    def receive(self, origin: socket.socket | str) -> None:
        """Waits for a migration from a socket, which is closed here, or a URI."""
        self.execute("migrate-incoming", {"uri": self._uri(origin)})

    def _uri(self, peer: socket.socket | str) -> str:
        if isinstance(peer, str):
            return peer
        with peer:
            self.execute("getfd", {"fdname": "migration"}, descriptor=peer.fileno())
        return "fd:migration"

    def wait_for_migration(self, status: str) -> None:
        """Returns once query-migrate gives this status; raises if it gives another last one."""
        for _ in until_deadline(f"migration is not {status}"):
            found = self.execute("query-migrate")
            if found.get("status") == status:
                return
            if found.get("status") in _ENDED:
                raise ToolError(f"migration is not {status}: {found}")

    def wait_for_job(self, name: str, status: str | None) -> None:
        """Returns once a job has this status, or is gone."""
        for _ in until_deadline(f"job {name} is not {status}"):
            found = {job["id"]: job["status"] for job in self.execute("query-jobs")}
            if found.get(name) == status:
                return

    def wait_for(self, status: str) -> None:
        """Returns once query-status gives this: running, postmigrate and so on.

        A migration has its last status before the machine has its state: only then is it over.
        """
        for _ in until_deadline(f"machine is not {status}"):
            if self.execute("query-status")["status"] == status:
                return
