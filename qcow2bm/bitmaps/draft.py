"""What an edit does to the bitmaps of an image, in memory, and the rules it keeps.

*Spec*: spec/edit.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, cast

from qcow2bm.bitmaps.directory import MAX_BITMAPS, MAX_DIRECTORY_SIZE
from qcow2bm.bitmaps.draft_bits import MANY_RANGES, DraftBits, Source
from qcow2bm.bitmaps.entries import (
    MAX_BITMAP_BYTES,
    MAX_GRANULARITY_BITS,
    MAX_NAME_SIZE,
    MIN_GRANULARITY_BITS,
    required_table_size,
    why_not_found,
)
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.tables import read_words
from qcow2bm.bits.ranges import checked, outside
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapError,
    BitmapExistsError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    BitmapStaleError,
    LimitError,
    UnsupportedError,
)
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE, HEAD_LENGTH, DirectoryEntry
from qcow2bm.units import align_up, ceil_div, decode_name, encode_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.bits.operations import Op

    Ranges = NDArray[np.int64] | Iterable[tuple[int, int]]
    """Guest bytes: (start, length), as int64[n, 2] where there are many."""

MIN_DEFAULT_GRANULARITY, MAX_DEFAULT_GRANULARITY = 4 << 10, 64 << 10


@dataclass
class DraftBitmap:
    """One bitmap as the edit leaves it; ``entry`` is the stored one, None if it is new."""

    name_bytes: bytes
    flags: int
    granularity_bits: int
    extra_data: bytes
    entry: DirectoryEntry | None
    place: int  # bitmaps stand in the directory in the order of these
    bits: DraftBits | None = None  # None as long as nobody looks at them
    is_in_use: bool = False  # by whoever wrote it, so it is removed or salvaged, and nothing else

    @property
    def size(self) -> int:
        """The length of its directory entry in bytes."""
        return HEAD_LENGTH + align_up(len(self.extra_data) + len(self.name_bytes), 8)


class Draft:
    """The bitmaps of an image as an edit leaves them; nothing is written here.

    Attributes:
        bitmaps: by name, in no order.
        removed: the stored entries that go.
        drops_extension: whether a stale bitmaps extension goes as well.
    """

    def __init__(self, metadata: Metadata, owned: Collection[str] = ()) -> None:
        """Begins with the stored bitmaps, which `require_editable` has found sound.

        Those of the names ``owned`` are in_use by whoever makes this edit.
        """
        directory = metadata.directory
        self._file = metadata.file
        self._directory = directory
        self._owned = owned
        self._is_stale = directory.extension is not None and not directory.is_consistent
        self.bitmaps: dict[bytes, DraftBitmap] = {}
        self._next_place = 0
        self._cut_names: set[bytes] = set()
        if not self._is_stale:
            self._begin(directory.entries)
        self.removed: list[DirectoryEntry] = []
        self.drops_extension = False

    def _begin(self, entries: Collection[DirectoryEntry]) -> None:
        """Begins with stored bitmaps."""
        self.bitmaps = {
            entry.name_bytes: DraftBitmap(
                entry.name_bytes,
                entry.flags,
                entry.granularity_bits,
                entry.extra_data,
                entry,
                entry.number,
                is_in_use=entry.in_use,
            )
            for entry in entries
            if entry.name_bytes is not None
        }
        self._cut_names = {name.partition(b"\0")[0] for name in self.bitmaps if b"\0" in name}
        self._next_place = len(entries)

    def find(self, name: str) -> DraftBitmap:
        """The bitmap of that name, for any use but removing it.

        Raises:
            BitmapNotFoundError: there is none.
            BitmapStaleError: the bitmaps of this image are outdated.
            BitmapInconsistentError: it is in_use.
        """
        found = self._known(name)
        if found.is_in_use and name not in self._owned:
            raise BitmapInconsistentError(
                name,
                "is inconsistent (in_use is set) and cannot be used: writes may be missing from "
                "it; remove it, or salvage it",
            )
        return found

    def _known(self, name: str) -> DraftBitmap:
        if self._is_stale:
            raise BitmapStaleError(
                name,
                "is stale, so writes are missing from it",
                "salvage-or-remove-all",
            )
        found = self.bitmaps.get(encode_name(name))
        if not found:
            raise BitmapNotFoundError(name, why_not_found(self.names))
        return found

    @property
    def names(self) -> list[str]:
        """The names of all bitmaps, in the order of the directory."""
        return [decode_name(bitmap.name_bytes) for bitmap in self.in_order]

    @property
    def in_order(self) -> list[DraftBitmap]:
        """All bitmaps, in the order of the directory."""
        return sorted(self.bitmaps.values(), key=lambda bitmap: bitmap.place)

    def bits(self, name: str) -> DraftBits:
        """The bits of a bitmap; raises as `find` does.

        Raises:
            BitmapBrokenError: its table does not fit the disk.
        """
        found = self.find(name)
        if found.bits is None:
            entry = found.entry
            assert entry is not None, "a new bitmap has bits from the beginning"
            if entry.bitmap_table_size != self._table_size(entry.granularity):
                raise BitmapBrokenError(
                    name, "has a table that does not fit the disk: fit it first"
                )
            found.bits = DraftBits(self._file, entry.granularity, read_words(self._file, entry))
        return found.bits

    def _table_size(self, granularity: int) -> int:
        return required_table_size(granularity, self._file.virtual_size, self._file.cluster_size)

    def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """A new bitmap with nothing dirty; by default of QEMU's default granularity.

        Raises:
            BitmapExistsError: there is one of that name.
            BitmapStaleError: the image has outdated bitmaps, which have to be dropped first.
            LimitError: there are as many as can be, or it would be too large.
            ValueError: QEMU could not use such a name or granularity.
        """
        if granularity is None:
            limits = MIN_DEFAULT_GRANULARITY, MAX_DEFAULT_GRANULARITY
            granularity = max(limits[0], min(self._file.cluster_size, limits[1]))
        self.require_granularity(granularity)
        self.require_free(name)
        if len(self.bitmaps) >= MAX_BITMAPS:
            raise LimitError("the number of bitmaps", len(self.bitmaps) + 1, MAX_BITMAPS)
        key = encode_name(name)
        bits = DraftBits(self._file, granularity, None)
        flags = FLAG_AUTO if enabled else 0
        granularity_bits = granularity.bit_length() - 1
        place, self._next_place = self._next_place, self._next_place + 1
        self.bitmaps[key] = DraftBitmap(key, flags, granularity_bits, b"", None, place, bits)

    def replace(self, name: str, granularity: int, *, enabled: bool) -> None:
        """`add`, instead of one of that name that is in_use and not ours, if there is one."""
        old = self.bitmaps.get(encode_name(name))
        if old and old.is_in_use and name not in self._owned:
            self.require_granularity(granularity)  # before anything is taken away
            self.remove(name)
        self.add(name, granularity, enabled=enabled)

    def require_granularity(self, granularity: int) -> None:
        """Raises what `add` does for a granularity that QEMU could not use."""
        low, high = 1 << MIN_GRANULARITY_BITS, 1 << MAX_GRANULARITY_BITS
        granularity = index(granularity)
        if granularity & (granularity - 1) or not low <= granularity <= high:
            raise ValueError(
                f"granularity is {granularity}, must be a power of two from {low} to {high}"
            )
        size = self._file.virtual_size
        if not size:
            raise UnsupportedError("a bitmap of a disk of 0 bytes")
        length = ceil_div(ceil_div(size, granularity), 8)
        if length > MAX_BITMAP_BYTES:
            what = f"the size of a bitmap of granularity {granularity} in bytes"
            raise LimitError(what, length, MAX_BITMAP_BYTES)

    def require_free(self, name: str) -> None:
        """Raises what `add` does if QEMU, to which a NUL byte ends a name, finds one like it."""
        key = encode_name(name)
        if not 0 < len(key) <= MAX_NAME_SIZE:
            raise ValueError(f"a name has 1 to {MAX_NAME_SIZE} bytes, not {len(key)}")
        if b"\0" in key:
            raise ValueError("a name has no NUL character")
        if self._is_stale:
            raise BitmapStaleError(
                name,
                "cannot be added: the image has stale bitmaps, which a program without bitmap "
                "support left behind",
                "salvage-or-remove-all",
            )
        known = self.bitmaps.get(key)
        if known and known.is_in_use:
            raise BitmapExistsError(name, "already exists, and is inconsistent: remove it first")
        if known or key in self._cut_names:
            raise BitmapExistsError(name)

    def remove(self, name: str) -> None:
        """Takes a bitmap away, also one that is in_use.

        Raises:
            BitmapNotFoundError: there is none of that name.
            BitmapStaleError: the bitmaps of this image are outdated.
        """
        self._drop(self._known(name))

    def remove_all(self) -> None:
        """Takes all bitmaps away; stale ones too, whose clusters stay leaked."""
        for found in list(self.bitmaps.values()):
            self._drop(found)
        self.drops_extension |= self._is_stale
        self._is_stale = False

    def _drop(self, found: DraftBitmap) -> None:
        del self.bitmaps[found.name_bytes]
        if found.entry:
            self.removed.append(found.entry)

    def enable(self, name: str, *, enabled: bool) -> None:
        """Whether the bitmap is to record writes from now on; raises as `find` does."""
        found = self.find(name)
        found.flags = found.flags & ~FLAG_AUTO | (FLAG_AUTO if enabled else 0)

    def rename(self, name: str, new_name: str) -> None:
        """Gives a bitmap another name, in the same place of the directory.

        Raises:
            As `find` does.
            BitmapExistsError: the new name is taken.
            ValueError: QEMU could not use the new name.
        """
        found = self.find(name)
        if name == new_name:
            return
        self.require_free(new_name)
        del self.bitmaps[found.name_bytes]
        found.name_bytes = encode_name(new_name)
        self.bitmaps[found.name_bytes] = found

    def copy(
        self, name: str, new_name: str, granularity: int | None, *, enabled: bool | None
    ) -> None:
        """A new bitmap with what another one has, if need be of another granularity.

        A coarser one has a bit set wherever anything it covers is dirty (INV-COARSE). It records
        writes if the other does, unless ``enabled`` says otherwise.

        Raises:
            As `bits` and `add` do.
        """
        bits = self.bits(name)
        granularity = bits.granularity if granularity is None else granularity
        if enabled is None:
            enabled = bool(self.find(name).flags & FLAG_AUTO)
        self.add(new_name, granularity, enabled=enabled)
        try:
            self.bits(new_name).combine("or", bits)
        except BaseException:
            self.remove(new_name)
            raise

    def clear(self, name: str) -> None:
        """Makes everything clean; raises as `bits` does."""
        bits = self.bits(name)
        with bits.all_or_nothing():
            bits.fill(0, bits.bits, is_set=False)

    def invert(self, name: str) -> None:
        """Makes clean what is dirty, and dirty what is clean; raises as `bits` does."""
        bits = self.bits(name)
        with bits.all_or_nothing():
            bits.invert()

    def merge(self, target: str, source: str | Source, op: Op) -> None:
        """Combines the bits of ``target`` with others.

        Raises:
            As `bits` does.
            LimitError: the granularities are further apart than QEMU's can be.
        """
        bits = self.bits(target)
        other = self.bits(source) if isinstance(source, str) else source
        with bits.all_or_nothing():
            bits.combine(op, other)

    def fill(self, name: str, ranges: Ranges, *, is_set: bool) -> None:
        """Makes ranges dirty or clean.

        What is set is widened to whole granules, and what is reset narrowed to them: a dirty byte
        outside the ranges is never lost.

        Raises:
            As `bits` does.
            ValueError: a range reaches beyond the disk. Nothing is changed then.
        """
        bits, size = self.bits(name), self._file.virtual_size
        granularity = min(bits.granularity, 1 << 62)  # which is more than any disk
        if hasattr(ranges, "dtype"):
            import numpy as np

            pairs = checked(cast("NDArray[np.int64]", ranges), size)
            starts, lengths = pairs.T
            ends = starts + lengths
            rounded = np.empty(pairs.shape, np.int64)
            if is_set:
                rounded[:, 0] = starts // granularity
                rounded[:, 1] = np.where(lengths > 0, -(-ends // granularity), 0)
            else:
                rounded[:, 0] = -(-starts // granularity)
                rounded[:, 1] = np.where(ends == size, bits.bits, ends // granularity)
            with bits.all_or_nothing():
                bits.fill_many(rounded, is_set=is_set)
            return
        listed = [(index(start), index(length)) for start, length in ranges]
        for start, length in listed:
            if not 0 <= start <= start + length <= size:
                raise outside(start, length, size)
        if len(listed) >= MANY_RANGES:
            import numpy as np

            self.fill(name, np.array(listed, np.int64), is_set=is_set)
            return
        with bits.all_or_nothing():
            for start, length in listed:
                end = start + length
                if is_set and length:
                    bits.fill(start // granularity, ceil_div(end, granularity), is_set=True)
                elif length:
                    stop = bits.bits if end == size else end // granularity
                    bits.fill(ceil_div(start, granularity), stop, is_set=False)

    def fit(self, name: str) -> None:
        """Makes a table that is too long or too short fit the disk as it is now.

        Bits past the disk are dropped. What the table does not cover is dirty, and so is all that
        its last cluster covers: where in it the disk ended is not stored anywhere (INV-COARSE).

        Raises:
            As `find` does.
            LimitError: the disk has become too large for a bitmap of this granularity.
        """
        found = self.find(name)
        if found.bits or not found.entry:
            return
        granularity, size = found.entry.granularity, found.entry.bitmap_table_size
        if size != self._table_size(granularity):
            self.require_granularity(granularity)
        bits = DraftBits(self._file, granularity, read_words(self._file, found.entry))
        bits.fit()
        found.bits = bits

    @property
    def is_stale(self) -> bool:
        """Whether the bitmaps are outdated, and nobody has taken them up again."""
        return self._is_stale

    def salvageable(self, name: str) -> int:
        """The granularity of a bitmap that is in_use or stale.

        Raises:
            BitmapNotFoundError: there is none of that name.
            BitmapError: it is neither.
        """
        if self._is_stale:
            entries = {entry.name: entry for entry in self._directory.entries}
            if name not in entries:
                names = (known for known in entries if known is not None)
                raise BitmapNotFoundError(name, why_not_found(names))
            return entries[name].granularity
        found = self._known(name)
        if not found.is_in_use:
            raise BitmapError(name, "is neither in_use nor stale: there is nothing to salvage")
        return 1 << found.granularity_bits

    def revive(self, intact: Collection[int]) -> None:
        """Takes up stale bitmaps again, all of them in_use.

        Those that are not ``intact``, by the indexes of their entries, get a table of their own
        in which everything is dirty: what theirs leads to is somebody else's by now.

        Raises:
            BitmapError: such a table would be larger than QEMU allows.
        """
        lost = [entry for entry in self._directory.entries if entry.index not in intact]
        for entry in lost:
            self._require_usable(entry.name or "", entry.granularity)
        self._is_stale = False
        self._begin(self._directory.entries)
        for found in self.bitmaps.values():
            found.flags, found.is_in_use = found.flags | FLAG_IN_USE, True
            if found.entry in lost:
                found.entry, found.bits = None, self._all_dirty(1 << found.granularity_bits)

    def _require_usable(self, name: str, granularity: int) -> None:
        try:
            self.require_granularity(granularity)
        except (LimitError, ValueError) as error:
            raise BitmapError(name, f"cannot be made valid: {error}") from error

    def _all_dirty(self, granularity: int) -> DraftBits:
        bits = DraftBits(self._file, granularity, None)
        bits.fill(0, bits.bits, is_set=True)
        return bits

    def salvage(self, name: str, *, trusts_stored: bool) -> None:
        """Makes a bitmap that is in_use valid: all dirty, or with the bits that are stored.

        Raises:
            As `salvageable` does.
            BitmapError: QEMU could not use it.
        """
        granularity = self.salvageable(name)
        self._require_usable(name, granularity)
        found = self._known(name)
        flags = found.flags & ~FLAG_IN_USE
        if trusts_stored:
            found.flags, found.is_in_use = flags, False
            self.fit(name)
            return
        self._drop(found)
        key, bits = found.name_bytes, self._all_dirty(granularity)
        self.bitmaps[key] = DraftBitmap(
            key, flags, found.granularity_bits, b"", None, found.place, bits
        )

    @property
    def directory_size(self) -> int:
        """The length of the directory in bytes.

        Raises:
            LimitError: it would be longer than QEMU takes.
        """
        size = sum(bitmap.size for bitmap in self.bitmaps.values())
        if size > MAX_DIRECTORY_SIZE:
            raise LimitError("the size of the bitmap directory", size, MAX_DIRECTORY_SIZE)
        return size
