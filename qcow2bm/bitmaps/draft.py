"""The bitmaps of an image as an edit leaves them, in memory, and the operations on them.

*Spec*: spec/edit.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcow2bm.bitmaps.directory import MAX_BITMAPS, MAX_DIRECTORY_SIZE
from qcow2bm.bitmaps.draft_bits import DraftBits, Source
from qcow2bm.bitmaps.entries import (
    required_table_size,
    why_not_found,
)
from qcow2bm.bitmaps.granules import Granules
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.rules import default_granularity, require_granularity, require_name
from qcow2bm.bitmaps.tables import read_words
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapError,
    BitmapExistsError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    BitmapStaleError,
    LimitError,
)
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE, HEAD_LENGTH, DirectoryEntry
from qcow2bm.units import align_up, decode_name, encode_name, escape

if TYPE_CHECKING:
    from qcow2bm.bitmaps.granules import Ranges
    from qcow2bm.bits.operations import Op


@dataclass
class DraftBitmap:
    """One bitmap as the edit leaves it.

    Attributes:
        name_bytes: the stored form of the name.
        flags: the flags of the directory entry.
        granularity_bits: the base-2 logarithm of the granularity.
        extra_data: the extra data of the directory entry.
        entry: the stored entry; None if the bitmap is new, or gets a new table in any case.
        place: a number by which the bitmaps are ordered in the directory.
        bits: the bits; None until an operation needs them.
        is_in_use: whether another program or `Draft.invalidate` set in_use. Such a bitmap can only
            be removed or salvaged.
    """

    name_bytes: bytes
    flags: int
    granularity_bits: int
    extra_data: bytes
    entry: DirectoryEntry | None
    place: int
    bits: DraftBits | None = None
    is_in_use: bool = False

    @property
    def size(self) -> int:
        """The length of the directory entry in bytes."""
        return HEAD_LENGTH + align_up(len(self.extra_data) + len(self.name_bytes), 8)


class Draft:
    """The bitmaps of an image as an edit leaves them; nothing is written here.

    Attributes:
        bitmaps: the bitmaps by the stored form of their names, in no order.
        removed: the stored entries of the bitmaps that are removed.
        drops_extension: whether a stale bitmaps extension is removed.
    """

    def __init__(self, metadata: Metadata, owned: Collection[str] = ()) -> None:
        """Begins with the stored bitmaps, which `require_editable` has found sound.

        The bitmaps with the names ``owned`` are in_use by the caller, and can be used like others.
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
        """Returns the bitmap of this name, for any use except removing it.

        Raises:
            BitmapNotFoundError: there is no bitmap of this name.
            BitmapStaleError: the bitmaps of this image are stale.
            BitmapInconsistentError: the bitmap is in_use, and not by the caller.
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
        """Returns the bits of a bitmap.

        Raises:
            As `find` does.
            BitmapBrokenError: the table of the bitmap does not fit the disk.
        """
        found = self.find(name)
        if found.bits is None:
            entry = found.entry
            assert entry is not None, "a new bitmap has bits from the beginning"
            if entry.bitmap_table_size != self._table_size(entry.granularity):
                advice = f'fit bitmap "{escape(name)}" first'
                raise BitmapBrokenError(name, f"has a table that does not fit the disk: {advice}")
            found.bits = DraftBits(self._file, entry.granularity, read_words(self._file, entry))
        return found.bits

    def _table_size(self, granularity: int) -> int:
        return required_table_size(granularity, self._file.virtual_size, self._file.cluster_size)

    def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """Adds a clean bitmap; without a granularity, of QEMU's default granularity.

        Raises:
            BitmapExistsError: there is a bitmap of this name.
            BitmapStaleError: the image has stale bitmaps, which have to be salvaged or removed.
            LimitError: the image has 65,535 bitmaps, or the bitmap would be too large.
            UnsupportedError: the disk has 0 bytes.
            ValueError: QEMU could not use such a name or granularity.
        """
        if granularity is None:
            granularity = default_granularity(self._file.cluster_size)
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
        """Does what `add` does, and removes a bitmap of this name first if another has it in_use.

        Raises:
            As `add` does.
        """
        old = self.bitmaps.get(encode_name(name))
        if old and old.is_in_use and name not in self._owned:
            self.require_granularity(granularity)  # before anything is removed
            self.remove(name)
        self.add(name, granularity, enabled=enabled)

    def require_granularity(self, granularity: int) -> None:
        """Returns if the image can have a bitmap of this granularity; raises as `add` does."""
        require_granularity(granularity, self._file.virtual_size)

    def require_free(self, name: str) -> None:
        """Returns if a bitmap of this name can be added; raises as `add` does.

        A name ends at a NUL byte for QEMU: a name is taken if QEMU would find a bitmap with it.
        """
        key = require_name(name)
        if self._is_stale:
            raise BitmapStaleError(
                name,
                "cannot be added: the image has stale bitmaps, which a program without bitmap "
                "support left behind",
                "salvage-or-remove-all",
            )
        known = self.bitmaps.get(key)
        if known and known.is_in_use:
            advice = f'remove bitmap "{escape(name)}" first'
            raise BitmapExistsError(name, f"already exists, and is inconsistent: {advice}")
        if known or key in self._cut_names:
            raise BitmapExistsError(name)

    def remove(self, name: str) -> None:
        """Removes a bitmap, also one that is in_use.

        Raises:
            BitmapNotFoundError: there is no bitmap of this name.
            BitmapStaleError: the bitmaps of this image are stale.
        """
        self._drop(self._known(name))

    def remove_all(self) -> None:
        """Removes all bitmaps, also stale ones; the clusters of stale bitmaps stay leaked."""
        for found in list(self.bitmaps.values()):
            self._drop(found)
        self.drops_extension |= self._is_stale
        self._is_stale = False

    def _drop(self, found: DraftBitmap) -> None:
        del self.bitmaps[found.name_bytes]
        if found.entry:
            self.removed.append(found.entry)

    def enable(self, name: str, *, enabled: bool) -> None:
        """Sets or clears the flag `auto`; raises as `find` does."""
        found = self.find(name)
        found.flags = found.flags & ~FLAG_AUTO | (FLAG_AUTO if enabled else 0)

    def invalidate(self, name: str) -> None:
        """Marks a bitmap in_use, so that no program trusts it. Its bits and other flags stay.

        Nothing is changed if the bitmap is in_use or stale: no program trusts it already.

        Raises:
            BitmapNotFoundError: there is no bitmap of this name.
        """
        if self._is_stale:
            self._require_stale(name)
            return
        found = self._known(name)
        found.flags, found.is_in_use = found.flags | FLAG_IN_USE, True

    def _require_stale(self, name: str) -> DirectoryEntry:
        """Returns the entry of the stale bitmap of this name; raises `BitmapNotFoundError`."""
        entries = {entry.name: entry for entry in self._directory.entries}
        if name not in entries:
            names = (known for known in entries if known is not None)
            raise BitmapNotFoundError(name, why_not_found(names))
        return entries[name]

    def rename(self, name: str, new_name: str) -> None:
        """Gives a bitmap another name; its place in the directory stays.

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
        """Adds a bitmap with the bits of another one, perhaps of another granularity.

        If the new granularity is coarser, a bit is set if anything that it covers is dirty
        (INV-COARSE). The flag `auto` is that of the other bitmap, unless ``enabled`` is given.

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
        """Makes the whole disk clean; raises as `bits` does."""
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
            LimitError: one granularity is more than 2^22 times the other.
        """
        bits = self.bits(target)
        other = self.bits(source) if isinstance(source, str) else source
        with bits.all_or_nothing():
            bits.combine(op, other)

    def fill(self, name: str, ranges: Ranges, *, is_set: bool) -> None:
        """Makes ranges dirty or clean.

        Ranges are widened to whole granules if they are set, and narrowed if they are reset, so
        that a dirty byte outside the ranges never becomes clean.

        Raises:
            As `bits` does.
            ValueError: a range reaches beyond the disk. Nothing is changed then.
        """
        bits, size = self.bits(name), self._file.virtual_size
        granules = Granules(min(bits.granularity, 1 << 62), bits.bits, size)
        rounded = granules.of(ranges, is_set=is_set)
        with bits.all_or_nothing():
            if isinstance(rounded, list):
                for first, stop in rounded:
                    bits.fill(first, stop, is_set=is_set)
            else:
                bits.fill_many(rounded, is_set=is_set)

    def fit(self, name: str) -> None:
        """Makes a table that is too long or too short fit the disk as it is now.

        Bits behind the disk are dropped. What the table does not cover becomes dirty. Everything
        that the last cluster of the table covers becomes dirty as well: the disk ended somewhere
        there, but nothing says where (INV-COARSE).

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
        """Whether the bitmaps are stale, and `revive` was not called."""
        return self._is_stale

    def stored_index(self, name: str) -> int | None:
        """Returns the number of the stored entry of a bitmap; None if the bitmap is new.

        Raises:
            BitmapNotFoundError: there is no bitmap of this name.
            BitmapStaleError: the bitmaps of this image are stale.
        """
        entry = self._known(name).entry
        return entry.index if entry else None

    def salvageable(self, name: str) -> int:
        """Returns the granularity of a bitmap that can be salvaged.

        Raises:
            BitmapNotFoundError: there is no bitmap of this name.
            BitmapError: the bitmap is neither in_use nor stale.
        """
        if self._is_stale:
            return self._require_stale(name).granularity
        found = self._known(name)
        if not found.is_in_use:
            raise BitmapError(name, "is neither in_use nor stale: there is nothing to salvage")
        return 1 << found.granularity_bits

    def revive(self, intact: Collection[int]) -> None:
        """Takes up stale bitmaps again, all of them in_use.

        ``intact`` are the indexes of the bitmaps whose clusters nothing else uses. The other
        bitmaps get a new table in which everything is dirty.

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
        """Makes a bitmap that is in_use valid: all dirty, or with the stored bits.

        Raises:
            As `salvageable` does.
            BitmapError: QEMU could not use the bitmap.
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
            LimitError: the directory would be longer than QEMU allows.
        """
        size = sum(bitmap.size for bitmap in self.bitmaps.values())
        if size > MAX_DIRECTORY_SIZE:
            raise LimitError("the size of the bitmap directory", size, MAX_DIRECTORY_SIZE)
        return size
