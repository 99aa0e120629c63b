"""Checking, repairing and salvaging an image in one call each, and undoing a repair.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from qcow2bm.api.image import open
from qcow2bm.checking import repair as repairs
from qcow2bm.checking import undo as undoing
from qcow2bm.checking.repair import Repair
from qcow2bm.clusters.plan import Plan, execute
from qcow2bm.errors import StorageError
from qcow2bm.format.undo_file import UndoLog
from qcow2bm.storage.sources import open_source, open_writable
from qcow2bm.storage.write_guard import WriteGuard

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.checking.check import Check
    from qcow2bm.storage.interface import Storage, WritableStorage
    from qcow2bm.storage.sources import Source


def check(source: Source, *, force_share: bool = False, lock_timeout: float = 0) -> Check:
    """Finds everything that is wrong with an image: `Image.problems` and `Image.check` together.

    Args:
        source: as for ``qcow2bm.open(source)``.
        force_share: read even while another process writes to the image.
        lock_timeout: how many seconds to wait while another process writes to the image.

    Raises:
        FormatError: it is no qcow2 image.
        UnsupportedError: the version of qcow2 is neither 2 nor 3.
        ImageLockedError: another process writes to the image.
        ChangedWhileReadingError: the image changed meanwhile.
        StorageError: reading failed.
    """
    with open(source, force_share=force_share, lock_timeout=lock_timeout) as image:
        problems = image.problems
        found = image.check()
        return found._replace(problems=(*problems, *found.problems))


def plan_repair(
    source: Source,
    *,
    lossless: bool = False,
    only: Collection[str] | None = None,
    lock_timeout: float = 0,
) -> Repair:
    """Returns what `repair` would do; nothing is written. Raises what `repair` does."""
    with _opened_to_read(source, lock_timeout) as storage:
        return repairs.plan_repair(storage, lossless=lossless, only=only)


def repair(
    source: Source,
    keep: Callable[[UndoLog], Callable[[int], None]] | None = None,
    *,
    lossless: bool = False,
    only: Collection[str] | None = None,
    lock_timeout: float = 0,
    locking: bool = True,
) -> Repair:
    """Repairs the metadata of an image's bitmaps; drops the bitmaps that cannot be proved right.

    Args:
        source: as for ``qcow2bm.open(source, "r+")``.
        keep: called with an `UndoLog` before anything is written; it returns once the `UndoLog` is
            stored safely, see `build_undo`. After the last write, the function that it returned
            is called with the time of that write in nanoseconds, see `build_seal`.
        lossless: do only what drops no bitmap.
        only: which repairs to do: "directory", "tails", "refcounts", "stale"; by default all
            but "stale". `Problem.repair` says which of them concerns a problem.
        lock_timeout: how many seconds to wait while another process uses the image.
        locking: False where the file system has no locks.

    Raises:
        FormatError: it is no qcow2 image, or its refcounts are too damaged to allocate clusters.
        UnsupportedError: it has incompatible features that are unknown here.
        ImageLockedError: another process uses the image.
        CommitError: writing failed.
        StorageError: reading failed, or there is no room.
    """
    with _opened_to_write(source, lock_timeout, locking=locking) as storage:
        capacity = storage.capacity()
        done = repairs.plan_repair(storage, lossless=lossless, only=only, capacity=capacity)
        if not done.plan.steps:
            return done
        seal = keep(undoing.undo_of(storage, done.plan)) if keep else None
        execute(done.plan, storage, storage.size())
        if seal:
            with suppress(StorageError):  # without the time, `undo` needs is_asserted
                token = storage.change_token()
                if isinstance(token, tuple):
                    seal(token[0])
        return done


def plan_undo(
    source: Source, what: UndoLog, *, is_asserted: bool = False, lock_timeout: float = 0
) -> Plan:
    """Returns what `undo` would write; nothing is written. Raises what `undo` does."""
    with _opened_to_read(source, lock_timeout) as storage:
        return undoing.plan_undo(storage, what, is_asserted=is_asserted)


def undo(
    source: Source,
    what: UndoLog,
    *,
    is_asserted: bool = False,
    lock_timeout: float = 0,
    locking: bool = True,
) -> bool:
    """Puts everything back that a repair changed.

    Args:
        source: as for ``qcow2bm.open(source, "r+")``.
        what: what `repair` gave to its ``keep``.
        is_asserted: True if the caller asserts that nothing was written to the disk since the
            repair. It is needed where the image itself cannot prove that.
        lock_timeout: how many seconds to wait while another process uses the image.
        locking: False where the file system has no locks.

    Returns:
        Whether there was anything to put back.

    Raises:
        StateError: the image is not as the repair left it.
        ImageLockedError: another process uses the image.
        CommitError: writing failed; call `undo` again.
        StorageError: reading failed.
    """
    with _opened_to_write(source, lock_timeout, locking=locking) as storage:
        plan = undoing.plan_undo(storage, what, is_asserted=is_asserted)
        if not plan.steps:
            return False
        execute(plan, storage, None)
        storage.truncate(what.file_size)
        storage.barrier()
        return True


def salvage(
    source: Source,
    name: str,
    packed: NDArray[np.uint8] | bytes | bytearray | memoryview | None = None,
    *,
    trust_stored: bool = False,
    lock_timeout: float = 0,
    locking: bool = True,
) -> None:
    """Makes a bitmap valid that is in_use or stale, in an edit of its own: `Edit.salvage`.

    Args:
        source: as for ``qcow2bm.open(source, "r+")``.
        name: the bitmap.
        packed: the bits it is to have, as for `Edit.salvage`; by default everything is dirty.
        trust_stored: keep the bits that are stored, as for `Edit.salvage`.
        lock_timeout: how many seconds to wait while another process uses the image.
        locking: False where the file system has no locks.

    Raises:
        ImageLockedError: another process uses the image.
        CommitError: writing failed.
        Qcow2BmError, ValueError: as `open` and `Edit.salvage` raise them.
    """
    image = open(source, "r+", lock_timeout=lock_timeout, locking=locking)
    with image, image.edit() as edit:
        edit.salvage(name, packed, trust_stored=trust_stored)


@contextmanager
def _opened_to_read(source: Source, lock_timeout: float) -> Iterator[Storage]:
    with ExitStack() as stack:
        storage = open_source(source, lock_timeout)
        if storage is not source:
            stack.callback(storage.close)
        stack.enter_context(storage.read_lock())
        yield storage


@contextmanager
def _opened_to_write(
    source: Source, lock_timeout: float, *, locking: bool
) -> Iterator[WritableStorage]:
    with ExitStack() as stack:
        storage = open_writable(source, locking=locking)
        if storage is not source:
            stack.callback(storage.close)
        guard = WriteGuard(storage)
        stack.callback(guard.release)
        guard.acquire(lock_timeout)
        yield guard
