"""The content of a qcow2 image, with its backing chain, as qemu-nbd serves it.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO

from qcow2bm.compare.nbd import NbdReader
from qcow2bm.errors import StorageError, UnsupportedError
from qcow2bm.units import escape

_PROGRAM = "qemu-nbd"
_LOOK_AGAIN_SECONDS = 0.01


class ServedContent:
    """What qemu-nbd serves, which keeps others from writing to it by QEMU's locks."""

    def __init__(self, socket: str, name: str, size: int) -> None:
        """``size`` is that of the disk."""
        self.name = name
        self.size = size
        self._socket = socket

    def reader(self) -> AbstractContextManager[NbdReader]:
        """See `qcow2bm.compare.content.Content`."""
        try:
            return NbdReader(self._socket, self.name)
        except OSError as error:
            raise StorageError.from_os(error, self.name, 0, 0) from error

    def require_unchanged(self) -> None:
        """See `qcow2bm.compare.content.Content`: nobody could write to it."""


@contextmanager
def served(path: str, connections: int, *, is_locked: bool = False) -> Iterator[ServedContent]:
    """The content of a qcow2 image, as long as the block runs.

    Args:
        path: a regular file or a block device; what it names is opened, too, as QEMU does.
        connections: how many readers there can be.
        is_locked: whether the caller holds a lock of a writer on the image. QEMU takes none on it
            then, only on its backing files.

    Raises:
        UnsupportedError: there is no qemu-nbd.
        StorageError: it cannot serve the image.
    """
    with (
        tempfile.TemporaryDirectory(prefix="qcow2bm-") as folder,
        tempfile.TemporaryFile() as said,
    ):
        socket = os.path.join(folder, "nbd")
        options = _options(path, is_locked=is_locked)
        count = str(connections + 1)  # it ends with the last one, so one is kept
        command = [_PROGRAM, "--read-only", "--socket", socket, "--shared", count]
        try:
            process = subprocess.Popen(
                [*command, "--image-opts", options],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            what = f"comparing a qcow2 image without {_PROGRAM} (Debian: qemu-utils)"
            raise UnsupportedError(what) from error
        try:
            with _connected(process, socket, path, said) as first:
                yield ServedContent(socket, path, first.size)
        finally:
            process.terminate()
            process.wait()


def _options(path: str, *, is_locked: bool) -> str:
    try:
        driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error
    name = path.replace(",", ",,")  # which is how a value has a comma
    options = f"driver=qcow2,file.driver={driver},file.filename={name}"
    return options + (",file.locking=off" if is_locked else "")


def _connected(
    process: subprocess.Popen[bytes], socket: str, path: str, said: IO[bytes]
) -> NbdReader:
    """The first connection, once there is somebody to connect to."""
    while True:
        try:
            return NbdReader(socket, path)
        except (FileNotFoundError, ConnectionRefusedError):
            if process.poll() is not None:
                said.seek(0)
                lines = said.read().decode("utf-8", "replace").strip().splitlines()
                reason = escape(" ".join(lines)).removeprefix(f"{_PROGRAM}: ") or "no reason given"
                raise StorageError(path, 0, 0, f"cannot be served: {reason}") from None
        except OSError as error:  # a path that is too long, say
            raise StorageError.from_os(error, socket, 0, 0) from error
        time.sleep(_LOOK_AGAIN_SECONDS)
