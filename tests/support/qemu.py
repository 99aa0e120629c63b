"""The real QEMU tools, thin: disks, their bitmaps as QEMU sees them, and a storage daemon.

Nothing here listens on a port or leaves a socket behind: nbdinfo starts qemu-nbd itself on a
socket of its own, and the storage daemon is spoken to over one end of a socket pair.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "nbdinfo")

LEAKS = 3  # exit code of qemu-img check

_SECRET = ("--object", "secret,id=key,data=secret")
_TIMEOUT = 60  # seconds: so that a hanging tool fails a test and not the whole run


class ToolError(Exception):
    """A tool did not exit with 0."""


class QmpError(Exception):
    """The storage daemon answered with an error; its text is the message."""


def missing_tools() -> list[str]:
    """The tools that are not installed."""
    return [tool for tool in TOOLS if not shutil.which(tool)]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a tool to its end, whatever its exit code. Bytes that are not UTF-8 pass through."""
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        stdin=subprocess.DEVNULL,
        timeout=_TIMEOUT,
        check=False,
    )


def run_ok(*command: str | Path) -> str:
    """The standard output of a tool that must succeed."""
    done = run(*command)
    if done.returncode:
        raise ToolError(f"{command} exits with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


@dataclass(frozen=True)
class Disk:
    """A qcow2 image as the QEMU tools handle it."""

    path: Path
    encryption: str = ""  # or "luks", "aes"

    @classmethod
    def create(cls, path: Path, size: int, *arguments: str, **options: object) -> Self:
        """A new image; ``options`` are those of ``qemu-img create -o``."""
        encryption = str(options.get("encrypt.format", ""))
        if encryption:
            options = options | {"encrypt.key-secret": "key", "encrypt.iter-time": 10}
        for key, value in options.items():
            arguments += ("-o", f"{key}={value}")
        command: tuple[str | Path, ...] = ("qemu-img", "create", "-q", *_SECRET, *arguments)
        command += ("-f", "qcow2", path, str(size))
        for _ in range(20):
            done = run(*command)
            # QEMU times its key derivation, and now and then cannot.
            if "Unable to get accurate CPU usage" not in done.stderr:
                break
        if done.returncode:
            raise ToolError(f"{command}: {done.stderr}")
        return cls(path, encryption)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments with which any of the tools opens the disk."""
        options = f"driver=qcow2,file.driver=file,file.filename={str(self.path).replace(',', ',,')}"
        key = ",encrypt.key-secret=key" if self.encryption else ""
        return (*_SECRET, "--image-opts", options + key)

    def bitmap(self, name: str, *actions: str) -> None:
        """qemu-img bitmap, with actions and options as on the command line."""
        run_ok("qemu-img", "bitmap", *actions, *self.arguments, name)

    def add(self, name: str, granularity: int) -> None:
        """Adds an enabled bitmap."""
        self.bitmap(name, "--add", "-g", str(granularity))

    def io(self, *commands: str, read_only: bool = False) -> str:
        """Runs qemu-io commands in one go: opened once, closed at the end."""
        return run_ok(*self._io(commands, read_only))

    def crash(self, *commands: str) -> None:
        """Runs qemu-io commands, then the process dies as by kill -9."""
        done = run(*self._io((*commands, "flush", "sigraise 9"), read_only=False))
        assert done.returncode == -9, done

    def _io(self, commands: tuple[str, ...], read_only: bool) -> list[str]:
        switches = [switch for command in commands for switch in ("-c", command)]
        return ["qemu-io", *(["-r"] if read_only else []), *switches, *self.arguments]

    def info(self) -> dict[str, Any]:
        """The output of qemu-img info."""
        info: dict[str, Any] = json.loads(
            run_ok("qemu-img", "info", "--output", "json", *self.arguments)
        )
        return info

    def listed(self) -> list[dict[str, Any]]:
        """The bitmaps in qemu-img info: each with flags, name and granularity."""
        listed: list[dict[str, Any]] = self.info()["format-specific"]["data"].get("bitmaps", [])
        return listed

    def check(self) -> subprocess.CompletedProcess[str]:
        """qemu-img check: exit code 0 if all is well."""
        return run("qemu-img", "check", *self.arguments)

    def extents(self, name: str) -> list[tuple[int, int]]:
        """The dirty extents of a bitmap as an NBD client sees them: (start, length)."""
        context = f"qemu:dirty-bitmap:{name}"
        server = ("[", "qemu-nbd", "-r", "-B", name, *self.arguments, "]")
        extents = json.loads(run_ok("nbdinfo", f"--map={context}", "--json", "--", *server))
        assert {extent["type"] for extent in extents} <= {0, 1}
        return [(extent["offset"], extent["length"]) for extent in extents if extent["type"]]

    @contextmanager
    def held_by_qemu_io(self, *, read_only: bool = False) -> Iterator[None]:
        """A qemu-io process has the image open meanwhile."""
        with subprocess.Popen(
            self._io((), read_only),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin
            assert process.stdout
            process.stdin.write("length\n")
            process.stdin.flush()
            line = process.stdout.readline()  # it answers once the image is open
            if not line:
                raise ToolError(process.communicate()[1])
            try:
                yield
            finally:
                process.communicate("quit\n", timeout=_TIMEOUT)


class StorageDaemon:
    """A qemu-storage-daemon and the QMP connection to it; a context manager."""

    def __enter__(self) -> Self:
        self._socket, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            self._process = subprocess.Popen(
                [
                    "qemu-storage-daemon",
                    *_SECRET,
                    *("--chardev", f"socket,id=qmp,fd={descriptor}", "--monitor", "qmp"),
                ],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
            )
        self._socket.settimeout(_TIMEOUT)
        self._stream = self._socket.makefile("rw", encoding="utf-8")
        assert "QMP" in json.loads(self._stream.readline())
        self.execute("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._process.poll() is None:
                self.execute("quit")
                assert self._process.wait(_TIMEOUT) == 0
        finally:
            self.kill()
            self._stream.close()
            self._socket.close()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Executes a QMP command and returns its result; raises `QmpError`."""
        self._stream.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
        self._stream.flush()
        while True:
            answer = json.loads(self._stream.readline())
            if "error" in answer:
                raise QmpError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def open(self, disk: Disk, *, read_only: bool = True, active: bool = True) -> None:
        """Opens a disk as the node "disk", without its backing file.

        Only a QEMU that has blockdev-set-active can open a disk that is not ``active``.
        """
        node: dict[str, object] = {
            "node-name": "disk",
            "driver": "qcow2",
            "read-only": read_only,
            "file": {"driver": "file", "filename": str(disk.path)},
            "backing": None,
        }
        if disk.encryption:
            node["encrypt"] = {"format": disk.encryption, "key-secret": "key"}
        if not active:
            node["active"] = False
        self.execute("blockdev-add", node)

    def close(self) -> None:
        """Closes the disk; bitmaps that changed are stored."""
        self.execute("blockdev-del", {"node-name": "disk"})

    def bitmaps(self) -> dict[str, dict[str, Any]]:
        """The bitmaps of the disk in memory, by name."""
        for node in self.execute("query-named-block-nodes", {"flat": True}):
            if node["node-name"] == "disk":
                return {bitmap["name"]: bitmap for bitmap in node.get("dirty-bitmaps", [])}
        raise QmpError("no disk is open")

    def add(self, name: str, granularity: int, *, disabled: bool = False) -> None:
        """Adds a persistent bitmap, which is stored when the disk is closed."""
        arguments = {
            "node": "disk",
            "name": name,
            "granularity": granularity,
            "persistent": True,
            "disabled": disabled,
        }
        self.execute("block-dirty-bitmap-add", arguments)

    def sha256(self, name: str) -> str:
        """The hash of a bitmap's bits in memory."""
        arguments = {"node": "disk", "name": name}
        digest: str = self.execute("x-debug-block-dirty-bitmap-sha256", arguments)["sha256"]
        return digest

    def kill(self) -> None:
        """Ends the daemon as kill -9 does."""
        self._process.kill()
        self._process.wait(_TIMEOUT)


@contextmanager
def held_by_storage_daemon(disk: Disk) -> Iterator[None]:
    """A qemu-storage-daemon has the image open for writing meanwhile."""
    with StorageDaemon() as daemon:
        daemon.open(disk, read_only=False)
        yield
