"""The content of a qcow2 image, with its backing chain, as qemu-nbd serves it.

*Spec*: spec/repair.md, "Comparing".
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from queue import SimpleQueue
from typing import IO

from qcow2bm.compare.content import Identity, RawContent, identity
from qcow2bm.compare.nbd import NbdReader
from qcow2bm.errors import StorageError, UnsupportedError
from qcow2bm.storage.file import FileStorage
from qcow2bm.units import escape

_PROGRAM = "qemu-nbd"
_LOOK_AGAIN_SECONDS = 0.01
_END_SECONDS = 10  # which a qemu-nbd that hangs up has to end


class ServedContent:
    """What qemu-nbd serves, and the files it has opened for that.

    Attributes:
        name: the path.
        size: of the disk, in bytes.
        identities: of all files, each as `qcow2bm.compare.content.identity` has it.
    """

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        readers: Sequence[NbdReader],
        files: Sequence[RawContent],
        identities: set[Identity],
    ) -> None:
        """There can be so many readers at a time. The caller holds the locks of the files."""
        self.name = name
        self._process = process
        self.size = readers[0].size
        self.identities = identities
        self._files = files
        self._idle: SimpleQueue[NbdReader] = SimpleQueue()
        for reader in readers:
            self._idle.put(reader)

    @contextmanager
    def reader(self) -> Iterator[NbdReader]:
        """See `qcow2bm.compare.content.Content`."""
        reader = self._idle.get()
        try:
            yield reader
        finally:
            self._idle.put(reader)

    def interrupt(self) -> None:
        """See `qcow2bm.compare.content.Content`."""
        self._process.kill()

    def require_unchanged(self) -> None:
        """See `qcow2bm.compare.content.Content`."""
        for file in self._files:
            file.require_unchanged()


@contextmanager
def served(
    path: str, connections: int, *, is_locked: bool = False, locking: bool = True, wait: float = 0
) -> Iterator[ServedContent]:
    """The content of a qcow2 image, as long as the block runs.

    Everything that QEMU opens for it is locked as a reader locks it: QEMU itself lets others write
    to a raw backing file or data file of what it exports.

    Args:
        path: a regular file or a block device; what it names is opened, too, as QEMU does.
        connections: how many readers there can be at a time.
        is_locked: whether the caller holds a lock of a writer on the image.
        locking: False where there are no locks.
        wait: how many seconds to wait for a lock.

    Raises:
        UnsupportedError: there is no qemu-nbd.
        ImageLockedError: somebody writes to one of the files.
        StorageError: it cannot be served.
    """
    with ExitStack() as opened:
        folder = tempfile.TemporaryDirectory(prefix="qcow2bm-")
        opened.enter_context(folder)
        socket = os.path.join(folder.name, "nbd")
        said = opened.enter_context(tempfile.TemporaryFile())
        options = _options(path, is_locked=is_locked or not locking)
        process = _start(options, socket, connections, path, said)
        opened.callback(process.wait)
        opened.callback(process.kill)  # it has nothing to save, and may not listen to less yet
        readers = [
            opened.enter_context(closing(_connected(process, socket, path, said)))
            for _ in range(connections)
        ]
        folder.cleanup()  # nobody else is to connect
        own = identity(os.stat(path)) if is_locked else None
        contents, identities = [], set()
        for name, status in _opened_files(process.pid).items():
            identities.add(identity(status))
            if identity(status) != own:
                storage = FileStorage(name, locking=locking, lock_timeout=wait)
                opened.callback(storage.close)
                opened.enter_context(storage.read_lock())
                contents.append(RawContent(storage))
        yield ServedContent(path, process, readers, contents, identities)


def _opened_files(process_id: int) -> dict[str, os.stat_result]:
    """The regular files and block devices that a process has open, by their paths."""
    folder = f"/proc/{process_id}/fd"
    found = {}
    for number in os.listdir(folder):
        with suppress(FileNotFoundError):  # it was closed meanwhile
            place = os.path.join(folder, number)
            status = os.stat(place)
            is_file = stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)
            if is_file and status.st_nlink:  # our own temporary file has no name
                found[os.readlink(place)] = status
    return found


def _options(path: str, *, is_locked: bool) -> str:
    try:
        driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error
    name = path.replace(",", ",,")  # which is how a value has a comma
    options = f"driver=qcow2,file.driver={driver},file.filename={name}"
    return options + (",file.locking=off" if is_locked else "")


def _start(
    options: str, socket: str, connections: int, path: str, said: IO[bytes]
) -> subprocess.Popen[bytes]:
    command = [_PROGRAM, "--read-only", "--socket", socket, "--shared", str(connections)]
    if shutil.which("setpriv"):  # it ends when we are killed
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    if not shutil.which(_PROGRAM):
        raise UnsupportedError(f"comparing a qcow2 image without {_PROGRAM} (Debian: qemu-utils)")
    try:
        return subprocess.Popen(
            [*command, "--image-opts", options],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error


def _connected(
    process: subprocess.Popen[bytes], socket: str, path: str, said: IO[bytes]
) -> NbdReader:
    """A connection, once there is somebody to connect to."""
    while True:
        try:
            return NbdReader(socket, path)
        except (FileNotFoundError, ConnectionRefusedError):
            if process.poll() is not None:
                raise _why_not(path, said) from None
        except StorageError:  # it listens before it opens the image, and may fail then
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
                raise _why_not(path, said) from None
            raise
        except OSError as error:  # a path that is too long, say
            raise StorageError.from_os(error, socket, 0, 0) from error
        time.sleep(_LOOK_AGAIN_SECONDS)


def _why_not(path: str, said: IO[bytes]) -> StorageError:
    said.seek(0)
    text = " ".join(said.read().decode("utf-8", "replace").split())
    reason = escape(text).removeprefix(f"{_PROGRAM}: ") or "no reason given"
    return StorageError(path, 0, 0, f"cannot be served: {reason}")
