"""Writing new files: after a crash, the name has the whole file or no file."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from qcow2bm.errors import StorageError

if sys.platform == "linux":
    import fcntl


def require_new(path: str) -> None:
    """Checks that `write_new` can write to ``path``: no such file exists, or ``path`` is a pipe.

    Raises:
        StorageError: the file exists already, or ``path`` cannot be looked up.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            reason = "is a link to a file that does not exist: choose another name"
            raise StorageError(path, 0, 0, reason) from None
        return
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0, "writing") from error
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        reason = "exists already and is not overwritten: choose another name"
        raise StorageError(path, 0, 0, reason)


def write_new(path: str, pieces: Iterable[bytes]) -> None:
    """Writes a new file, or writes into a pipe.

    The file gets its name when it is whole and durable. A failure leaves no file. If the process is
    killed, a file with ``.part`` in its name may be left.

    Raises:
        StorageError: the file exists already, or writing failed.
    """
    require_new(path)
    try:
        if os.path.exists(path):
            _write_through(path, pieces)
        else:
            _write_whole(path, pieces)
    except FileExistsError:
        require_new(path)
        raise
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError.from_os(error, path, 0, 0, "writing") from error


@contextmanager
def held(path: str) -> Iterator[None]:
    """Holds a file that was made here for the duration of the block: no other process does.

    Raises:
        StorageError: another process holds the file, or the file cannot be opened.
    """
    with ExitStack() as stack:
        try:  # not around the block, whose errors are none of this file
            file = stack.enter_context(open(path, "rb"))
            if sys.platform == "linux":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(path, 0, 0, "is in use by another process") from error
        except OSError as error:
            raise StorageError.from_os(error, path, 0, 0) from error
        yield


def append(path: str, data: bytes, end: int | None = None) -> None:
    """Appends ``data`` to a file and makes it durable.

    Args:
        path: of a file that is there.
        data: what follows the file's content.
        end: where the content ends, if an earlier call may have written a part of its data.

    Raises:
        StorageError: writing failed. A part of ``data`` may be in the file.
    """
    try:
        with open(path, "r+b") as file:
            if end is None:
                file.seek(0, os.SEEK_END)
            else:
                file.truncate(file.seek(end))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0, "writing") from error


def _write_through(path: str, pieces: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        if file.isatty():
            raise StorageError(path, 0, 0, "is a terminal, and the data are not text")
        file.writelines(pieces)


def _write_whole(path: str, pieces: Iterable[bytes]) -> None:
    with new_file(path) as part, open(part, "wb") as file:
        file.writelines(pieces)


@contextmanager
def new_file(path: str) -> Iterator[str]:
    """Yields the path of an empty file in the same folder, to be filled inside the block.

    When the block ends, the content is made durable, and the file gets the name ``path``. If the
    block raises, no file is left. If the process is killed, a file with ``.part`` in its name may
    be left.

    Raises:
        FileExistsError: ``path`` exists by now; it is not overwritten.
        OSError: the system could not do it.
    """
    folder, name = os.path.split(path)
    descriptor, part = tempfile.mkstemp(".part", f".{_shortened(name)}.", folder or ".")
    with _becoming(path, descriptor, part):
        yield part


INCOMPLETE = ".incomplete"
"""What stands behind the name of a file that `incomplete_file` is making."""


@contextmanager
def incomplete_file(path: str) -> Iterator[str]:
    """Does as `new_file`, but the file is called ``path`` with `INCOMPLETE` behind it meanwhile.

    If the process is killed, that file is left, and its name says what it is.

    Raises:
        StorageError: one of the two files exists, or the system could not do it.
    """
    part = path + INCOMPLETE
    require_absent(path)
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, part, 0, 0, "writing") from error
    try:
        with _becoming(path, descriptor, part):
            yield part
    except StorageError:
        raise
    except FileExistsError:
        require_absent(path)  # which says so
        raise
    except OSError as error:
        raise StorageError.from_os(error, path, 0, 0, "writing") from error


def require_absent(path: str) -> None:
    """Checks that `incomplete_file` can make ``path``.

    Raises:
        StorageError: there is such a file, or one that an earlier call left incomplete.
    """
    if os.path.lexists(path):
        reason = "exists already and is not overwritten: choose another name"
        raise StorageError(path, 0, 0, reason, action="writing")
    if os.path.lexists(path + INCOMPLETE):
        reason = (
            "is being written by another process, or is left from one that was killed: if no "
            "process writes it, remove it"
        )
        raise StorageError(path + INCOMPLETE, 0, 0, reason, action="writing")


@contextmanager
def _becoming(path: str, descriptor: int, part: str) -> Iterator[None]:
    """Gives the file ``part`` the name ``path`` when the block ends; see `new_file`."""
    try:
        try:
            yield
            os.fchmod(descriptor, 0o666 & ~_umask())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(part, path)  # a rename could replace another file
    finally:
        os.unlink(part)
    _sync_folder(os.path.dirname(path) or ".")


def _shortened(name: str) -> str:
    """Returns whole characters from the beginning of a name, which take at most 100 bytes.

    A file system allows 255 bytes for a name, and the temporary name is longer than this.
    """
    beginning = name[:100]
    while len(os.fsencode(beginning)) > 100:
        beginning = beginning[:-1]
    return beginning


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
