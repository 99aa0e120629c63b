"""Repairing an image, and undoing that.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from qcow2bm.checking.repair import Repair, plan_repair
from qcow2bm.checking.undo import plan_undo, undo_of
from qcow2bm.clusters.plan import Plan, execute
from qcow2bm.errors import StorageError
from qcow2bm.format.undo_file import UndoLog
from qcow2bm.storage.sources import open_source, open_writable
from qcow2bm.storage.write_guard import WriteGuard

if TYPE_CHECKING:
    from qcow2bm.storage.interface import Storage, WritableStorage
    from qcow2bm.storage.sources import Source


def look(
    source: Source,
    *,
    lossless: bool = False,
    only: Collection[str] | None = None,
    lock_timeout: float = 0,
) -> Repair:
    """What a repair would do; nothing is written.

    Raises:
        As `repair` does.
    """
    with _looked_at(source, lock_timeout) as storage:
        return plan_repair(storage, lossless=lossless, only=only)


def repair(
    source: Source,
    keep: Callable[[UndoLog], Callable[[int], None]] | None = None,
    *,
    lossless: bool = False,
    only: Collection[str] | None = None,
    lock_timeout: float = 0,
    locking: bool = True,
) -> Repair:
    """Mends what is wrong with the bitmaps of an image; what cannot be proved is dropped.

    Args:
        source: as for ``qcow2bm.open(source, "r+")``.
        keep: called before anything is written, with what it takes to undo the repair; it
            returns once that is safe. What it returns is called with the time of the last write
            when all is done.
        lossless: do only what loses no bitmap.
        only: which of `qcow2bm.checking.repair.REPAIRS` to do; by default all but "stale".
        lock_timeout: how many seconds to wait while somebody else uses the image.
        locking: False where the file system has no locks.

    Raises:
        FormatError: it is no image, or its refcounts are too damaged to put anything anywhere.
        UnsupportedError: it has incompatible features that are unknown here.
        ImageLockedError: somebody uses it.
        CommitError: writing failed.
        StorageError: reading failed, or there is no room.
    """
    with _held(source, lock_timeout, locking=locking) as storage:
        capacity = storage.capacity()
        done = plan_repair(storage, lossless=lossless, only=only, capacity=capacity)
        if not done.plan.steps:
            return done
        sealed = keep(undo_of(storage, done.plan)) if keep else None
        execute(done.plan, storage, storage.size())
        if sealed:
            with suppress(StorageError):  # without the time undoing asks for somebody's word
                token = storage.change_token()
                if isinstance(token, tuple):
                    sealed(token[0])
        return done


def look_back(
    source: Source, what: UndoLog, *, is_asserted: bool = False, lock_timeout: float = 0
) -> Plan:
    """What undoing a repair would do; nothing is written. Raises as `undo` does."""
    with _looked_at(source, lock_timeout) as storage:
        return plan_undo(storage, what, is_asserted=is_asserted)


def undo(
    source: Source,
    what: UndoLog,
    *,
    is_asserted: bool = False,
    lock_timeout: float = 0,
    locking: bool = True,
) -> bool:
    """Puts everything back that a repair changed; whether there was anything to put back.

    ``is_asserted``: somebody says that nobody wrote to the disk since, if that is not proved.

    Raises:
        StateError: the image is not as the repair left it.
        ImageLockedError: somebody uses it.
        CommitError: writing failed; undo it again.
        StorageError: reading failed.
    """
    with _held(source, lock_timeout, locking=locking) as storage:
        plan = plan_undo(storage, what, is_asserted=is_asserted)
        if not plan.steps:
            return False
        execute(plan, storage, None)
        storage.truncate(what.file_size)
        storage.barrier()
        return True


@contextmanager
def _looked_at(source: Source, lock_timeout: float) -> Iterator[Storage]:
    with ExitStack() as stack:
        storage = open_source(source, lock_timeout)
        if storage is not source:
            stack.callback(storage.close)
        stack.enter_context(storage.read_lock())
        yield storage


@contextmanager
def _held(source: Source, lock_timeout: float, *, locking: bool) -> Iterator[WritableStorage]:
    with ExitStack() as stack:
        storage = open_writable(source, locking=locking)
        if storage is not source:
            stack.callback(storage.close)
        held = WriteGuard(storage)
        stack.callback(held.release)
        held.acquire(lock_timeout)
        yield held
