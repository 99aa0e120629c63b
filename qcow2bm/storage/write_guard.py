"""A storage that is written to only while its lock is held.

*Spec*: spec/lifecycle.md, "Letting go and taking back".
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

from qcow2bm.errors import StateError
from qcow2bm.storage.interface import WritableStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer


class WriteGuard:
    """Another storage, whose lock can be let go and taken again.

    *Guarantees*: while the lock is not held, nothing is written and no barrier is tried, whoever
    asks for it: that is a `StateError` (INV-INACTIVE).
    """

    def __init__(self, storage: WritableStorage) -> None:
        """The lock is not held yet."""
        self.name = storage.name
        self._storage = storage
        self._lock: ExitStack | None = None

    @property
    def is_held(self) -> bool:
        """Whether the lock is held, so that there can be writes."""
        return self._lock is not None

    def acquire(self, timeout: float) -> None:
        """Takes the lock, unless it is held; raises what ``write_lock`` of the storage does.

        Where other hosts may have written without our knowing, what is cached here is forgotten.
        """
        if self._lock:
            return
        lock = ExitStack()
        try:
            lock.enter_context(self._storage.write_lock(timeout))
            if not self.excludes_other_hosts:
                self._storage.refresh()
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    def release(self) -> None:
        """Lets the lock go. May be called twice."""
        lock, self._lock = self._lock, None  # first: from now on nobody writes
        if lock:
            lock.close()

    def _require_held(self) -> None:
        if self._lock is None:
            raise StateError("inactive", "activated before anything is written", "the storage")

    @property
    def excludes_other_hosts(self) -> bool:
        """Whether the lock keeps everybody away, on other hosts too, as far as can be known."""
        return self._storage.excludes_other_hosts

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes; raises `StateError` while the lock is not held."""
        self._require_held()
        self._storage.write(offset, parts)

    def barrier(self) -> None:
        """Makes durable; raises `StateError` while the lock is not held."""
        self._require_held()
        self._storage.barrier()

    def truncate(self, size: int) -> None:
        """Shortens; raises `StateError` while the lock is not held."""
        self._require_held()
        self._storage.truncate(size)

    def refresh(self) -> None:
        """Forgets what is cached; raises `StateError` while the lock is not held."""
        self._require_held()
        self._storage.refresh()

    def size(self) -> int:
        """That of the storage."""
        return self._storage.size()

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Reads, at any time."""
        return self._storage.read_into(offset, buffer)

    def change_token(self) -> object:
        """That of the storage."""
        return self._storage.change_token()

    def capacity(self) -> int | None:
        """That of the storage."""
        return self._storage.capacity()

    def read_lock(self) -> AbstractContextManager[None]:
        """That of the storage."""
        return self._storage.read_lock()

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """That of the storage; `acquire` is the way to get to write here."""
        return self._storage.write_lock(timeout)

    def close(self) -> None:
        """Lets the lock go, and closes the storage."""
        self.release()
        self._storage.close()
