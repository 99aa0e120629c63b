"""The guard that lets writes reach a storage only while its write lock is held.

*Spec*: spec/lifecycle.md, "Letting go and taking back".
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from threading import Lock
from typing import TYPE_CHECKING

from qcow2bm.errors import StateError, StorageError
from qcow2bm.storage.interface import (
    OtherUse,
    WritableStorage,
    as_sparse,
    use_by_another_process,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


class WriteGuard:
    """A storage whose write lock can be released and acquired again.

    *Guarantees*: while the lock is not held, no write and no barrier reaches the storage; the call
    raises `StateError` instead (INV-INACTIVE).
    """

    def __init__(self, storage: WritableStorage) -> None:
        """Wraps ``storage`` without taking its lock."""
        self.name = storage.name
        self._storage = storage
        self._holes = as_sparse(storage)
        self._is_held = False
        self._barriers = Lock()
        self._failure: StorageError | None = None
        self._lock = ExitStack()  # may still have the lock of a release that was interrupted

    @property
    def is_held(self) -> bool:
        """Whether the lock is held, so that writes are possible."""
        return self._is_held

    def acquire(self, timeout: float) -> None:
        """Takes the lock, unless it is held; raises as ``write_lock`` of the storage does.

        If other hosts may have written to the storage unnoticed, its cached data are dropped.
        """
        if self._is_held:
            return
        self.release()  # completes a release that was interrupted
        try:
            self._lock.enter_context(self._storage.write_lock(timeout))
            if not self.excludes_other_hosts:
                self._storage.refresh()
            self._is_held, self._failure = True, None
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Releases the lock. May be called twice; the second call completes an interrupted one."""
        self._is_held = False  # before anything else, so that no write comes after the release
        self._lock.close()

    def _require_held(self) -> None:
        if not self._is_held:
            raise StateError("inactive", "activated before anything is written", "the storage")

    @property
    def excludes_other_hosts(self) -> bool:
        """Whether the lock of the storage excludes all other users, on other hosts as well."""
        return self._storage.excludes_other_hosts

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes to the storage; raises `StateError` while the lock is not held."""
        self._require_held()
        self._storage.write(offset, parts)

    def barrier(self) -> None:
        """Makes all earlier writes durable; raises `StateError` while the lock is not held.

        If several threads ask for barriers, these come one after the other, and after one that
        failed none succeeds: the system reports a failure to one of them alone, and then takes
        what was lost for durable.

        Raises:
            StorageError: this barrier failed, or an earlier one.
        """
        self._require_held()
        with self._barriers:
            if self._failure:
                raise self._failure
            try:
                self._storage.barrier()
            except StorageError as error:
                self._failure = error
                raise

    def barrier_anew(self) -> None:
        """`barrier` for what was written since a barrier failed; it says nothing of the rest.

        Raises:
            StateError: the lock is not held.
            StorageError: this barrier failed.
        """
        self._require_held()
        with self._barriers:
            self._storage.barrier()

    def truncate(self, size: int) -> None:
        """Shortens the storage; raises `StateError` while the lock is not held."""
        self._require_held()
        self._storage.truncate(size)

    def refresh(self) -> None:
        """Drops the cached data of the storage; raises `StateError` while the lock is not held."""
        self._require_held()
        self._storage.refresh()

    def size(self) -> int:
        """The length of the storage in bytes."""
        return self._storage.size()

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Reads from the storage, also while the lock is not held."""
        return self._storage.read_into(offset, buffer)

    def next_data(self, offset: int) -> int:
        """The first byte of the storage at or after ``offset`` that is in no hole."""
        return self._holes.next_data(offset)

    def next_hole(self, offset: int) -> int:
        """The first byte of the storage at or after ``offset`` that is in a hole."""
        return self._holes.next_hole(offset)

    def change_token(self) -> object:
        """The change token of the storage."""
        return self._storage.change_token()

    def capacity(self) -> int | None:
        """The capacity of the storage in bytes, or None."""
        return self._storage.capacity()

    def read_lock(self) -> AbstractContextManager[None]:
        """Returns the read lock of the storage."""
        return self._storage.read_lock()

    def use_by_another_process(self) -> OtherUse | None:
        """How another process uses the storage; None if the storage cannot tell."""
        return use_by_another_process(self._storage)

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """Returns the write lock of the storage; to write through the guard, use `acquire`."""
        return self._storage.write_lock(timeout)

    def close(self) -> None:
        """Releases the lock, and closes the storage."""
        self.release()
        self._storage.close()
