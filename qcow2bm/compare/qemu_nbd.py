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

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.compare.content import Identity, RawContent, Reader, identity
from qcow2bm.compare.direct import DirectReader
from qcow2bm.compare.nbd import NbdReader
from qcow2bm.compare.tied_process import opened_files, tied
from qcow2bm.errors import FormatError, StorageError, UnsupportedError
from qcow2bm.storage.file import FileStorage
from qcow2bm.units import escape

_PROGRAM = "qemu-nbd"
_RETRY_SECONDS = 0.01
_END_SECONDS = 10  # after closing a connection, a qemu-nbd that fails ends within this time


class ServedContent:
    """A content that qemu-nbd serves, and the files that qemu-nbd has opened for it.

    Attributes:
        name: the path.
        size: of the disk, in bytes.
        identities: of all files that qemu-nbd has opened, see `qcow2bm.compare.content.identity`.
    """

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        size: int,
        readers: Sequence[Reader],
        files: Sequence[RawContent],
        identities: set[Identity],
    ) -> None:
        """Takes one reader for each thread that may read at a time.

        The caller has locked the files, and ends process and readers afterwards.
        """
        self.name = name
        self._process = process
        self.size = size
        self.identities = identities
        self._files = files
        self._idle: SimpleQueue[Reader] = SimpleQueue()
        for reader in readers:
            self._idle.put(reader)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
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
    """Serves the content of a qcow2 image for the duration of the block.

    Each file that qemu-nbd opens for the image gets the lock of a reader. qemu-nbd's own locks are
    not enough: it lets other processes write to a raw backing file or data file.

    Args:
        path: a regular file or a block device. qemu-nbd also opens the files
            that the image names.
        connections: how many readers there can be at a time.
        is_locked: whether the caller holds the lock of a writer on the image.
        locking: False to take no locks.
        wait: how many seconds to wait for a lock.

    Raises:
        UnsupportedError: qemu-nbd is not installed.
        ImageLockedError: another process may write to one of the files.
        StorageError: qemu-nbd cannot serve the image.
    """
    with ExitStack() as opened:
        folder = tempfile.TemporaryDirectory(prefix="qcow2bm-")
        opened.enter_context(folder)
        socket = os.path.join(folder.name, "nbd")
        said = opened.enter_context(tempfile.TemporaryFile())
        options = _options(path, is_locked=is_locked or not locking)
        process = _start(options, socket, connections, path, said)
        opened.callback(process.wait)
        opened.callback(process.kill)  # nothing is lost, and SIGTERM may be ignored at the start
        connected = [
            opened.enter_context(closing(_connect(process, socket, path, said)))
            for _ in range(connections)
        ]
        folder.cleanup()  # so that no other process can connect
        own = identity(os.stat(path))
        readers: Sequence[Reader] = connected
        contents, identities = [], set()
        for name, status in dict(opened_files(process.pid).values()).items():
            identities.add(identity(status))
            is_own = identity(status) == own
            needs_lock = not (is_own and is_locked)
            storage = FileStorage(name, locking=locking and needs_lock, lock_timeout=wait)
            opened.callback(storage.close)
            opened.enter_context(storage.read_lock())
            if needs_lock:
                contents.append(RawContent(storage))
            if is_own:
                readers = _direct(connected, storage)
        yield ServedContent(path, process, connected[0].size, readers, contents, identities)


def _direct(connected: Sequence[NbdReader], storage: FileStorage) -> Sequence[Reader]:
    """Returns for each connection a reader that reads from the image file what it can."""
    try:
        file = ClusterFile(storage, force_share=True)
    except (FormatError, UnsupportedError):  # of no harm: qemu-nbd can open the file
        return connected
    return [DirectReader(each, file) for each in connected]


def _options(path: str, *, is_locked: bool) -> str:
    try:
        driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error
    # In a relative path, QEMU would take a colon for the end of a protocol.
    name = os.path.abspath(path).replace(",", ",,")  # QEMU's way to write a comma in a value
    options = f"driver=qcow2,file.driver={driver},file.filename={name}"
    return options + (",file.locking=off" if is_locked else "")


def _start(
    options: str, socket: str, connections: int, path: str, said: IO[bytes]
) -> subprocess.Popen[bytes]:
    command = [_PROGRAM, "--read-only", "--socket", socket, "--shared", str(connections)]
    if not shutil.which(_PROGRAM):
        raise UnsupportedError(f"comparing a qcow2 image without {_PROGRAM} (Debian: qemu-utils)")
    try:
        return subprocess.Popen(
            tied([*command, "--image-opts", options]),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0) from error


def _connect(
    process: subprocess.Popen[bytes], socket: str, path: str, said: IO[bytes]
) -> NbdReader:
    """Waits until the process listens, and returns a connection."""
    while True:
        try:
            return NbdReader(socket, path)
        except (FileNotFoundError, ConnectionRefusedError):
            if process.poll() is not None:
                raise _failure(path, said) from None
        except StorageError:  # qemu-nbd listens before it opens the image, which can fail
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
                raise _failure(path, said) from None
            raise
        except OSError as error:  # for instance, a path that is too long
            raise StorageError.from_os(error, socket, 0, 0) from error
        time.sleep(_RETRY_SECONDS)


def _failure(path: str, said: IO[bytes]) -> StorageError:
    said.seek(0)
    text = " ".join(said.read().decode("utf-8", "replace").split())
    reason = escape(text).removeprefix(f"{_PROGRAM}: ") or "no reason given"
    if "encrypt." in text:  # QEMU names the option by which it would get the secret
        reason = (
            "it is encrypted, or its backing file is, and no secret can be given here: decrypt the "
            "disk into a raw file with qemu-img convert, and compare that file"
        )
    return StorageError(path, 0, 0, f"cannot be served: {reason}")
