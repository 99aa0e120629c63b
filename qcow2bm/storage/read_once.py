"""A storage of which no place is read twice during one operation.

*Spec*: spec/tracking.md, "Rotation and edits".
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from qcow2bm.storage.interface import WritableStorage, as_sparse

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ReadOnceStorage:
    """Another storage, of which it remembers what is read and written inside `remembering`.

    Remembered bytes are served from memory until `forget` is called. Every write, wherever it is
    made, changes the remembered bytes as well.

    *Guarantees*: a read returns what the storage has, provided that from the first remembered
    byte until `forget` nothing is written to the storage except through this object, and that the
    caller does not change a buffer that it has written: buffers are remembered without a copy.
    """

    def __init__(self, storage: WritableStorage, *, is_watched: bool = True) -> None:
        """Nothing is remembered yet.

        Unless the storage ``is_watched``, it has no change token.
        """
        self.name = storage.name
        self._storage = storage
        self._holes = as_sparse(storage)
        self._is_watched = is_watched
        self._is_remembering = False
        self._known: dict[int, Buffer] = {}  # by host offset
        self._starts: list[int] = []  # the keys of _known, ascending
        self._longest = 0  # the length of the longest value of _known

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Remembers what is read and written while the block runs."""
        before = self._is_remembering
        try:
            self._is_remembering = True
            yield
        finally:
            self._is_remembering = before

    def forget(self) -> None:
        """Forgets all remembered bytes: the next reads are reads of the storage."""
        self._known, self._starts, self._longest = {}, [], 0

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from host ``offset`` on and returns how many bytes that were."""
        known = self._known.get(offset)
        if known is not None:
            view = memoryview(known)
            if len(view) >= len(buffer):
                buffer[:] = view[: len(buffer)]
                return len(buffer)
        count = self._storage.read_into(offset, buffer)
        if self._is_remembering:
            self._remember(offset, bytes(buffer[:count]))
        return count

    def _remember(self, offset: int, data: Buffer) -> None:
        """Remembers bytes, unless longer ones are remembered from the same offset on."""
        length = len(memoryview(data))
        known = self._known.get(offset)
        if known is not None and len(memoryview(known)) >= length:
            return
        if known is None:
            insort(self._starts, offset)
        self._known[offset] = data
        self._longest = max(self._longest, length)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes ``parts``, one behind the other, from host ``offset`` on."""
        try:
            self._storage.write(offset, parts)
            for part in parts:
                data = memoryview(part).cast("B")
                self._overwrite(offset, data)
                if self._is_remembering:
                    self._remember(offset, data)
                offset += len(data)
        except BaseException:
            self.forget()  # what the storage has now is not known
            raise

    def _overwrite(self, offset: int, data: memoryview) -> None:
        """Changes what is remembered of the bytes from ``offset`` on."""
        end = offset + len(data)
        first = bisect_left(self._starts, offset - self._longest)
        stop = bisect_left(self._starts, end)
        for start in self._starts[first:stop]:
            known = memoryview(self._known[start])
            low, high = max(start, offset), min(start + len(known), end)
            if low < high:
                own = self._known[start]
                if not isinstance(own, bytearray):  # the caller's buffers are kept as views
                    own = self._known[start] = bytearray(own)
                own[low - start : high - start] = data[low - offset : high - offset]

    def truncate(self, size: int) -> None:
        """Shortens the storage to ``size`` bytes."""
        self.forget()
        self._storage.truncate(size)

    def refresh(self) -> None:
        """Forgets what is remembered here, and what the storage has cached."""
        self.forget()
        self._storage.refresh()

    def barrier(self) -> None:
        """Returns once everything written so far is durable."""
        self._storage.barrier()

    @property
    def excludes_other_hosts(self) -> bool:
        """Whether the storage's `write_lock` keeps other hosts away as well."""
        return self._storage.excludes_other_hosts

    def size(self) -> int:
        """The length of the storage in bytes."""
        return self._storage.size()

    def next_data(self, offset: int) -> int:
        """The first byte of the storage at or after ``offset`` that is in no hole."""
        return self._holes.next_data(offset)

    def next_hole(self, offset: int) -> int:
        """The first byte of the storage at or after ``offset`` that is in a hole."""
        return self._holes.next_hole(offset)

    def capacity(self) -> int | None:
        """The length in bytes that the storage cannot outgrow, if there is one."""
        return self._storage.capacity()

    def change_token(self) -> object:
        """The storage's change token, if it is watched."""
        return self._storage.change_token() if self._is_watched else None

    def read_lock(self) -> AbstractContextManager[None]:
        """The storage's lock of a reader."""
        return self._storage.read_lock()

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """The storage's lock of a writer."""
        return self._storage.write_lock(timeout)

    def close(self) -> None:
        """Closes the storage."""
        self._storage.close()
