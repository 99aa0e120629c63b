"""The plainest model of dirty bitmaps: a bitmap is one number, and bit n stands for granule n.

`Model` is one bitmap. `Bitmaps` are the bitmaps of an image, with the operations of `qcow2bm.Edit`:
a test does the same to an edit and to the model, and compares. The model uses no algorithm of the
library: a range is a mask, and rescaling and extents go through a text of "0" and "1".
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, Self

from support.audit import Audit
from support.images import ZEROES, Word

from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "or": operator.or_,
    "and": operator.and_,
    "xor": operator.xor,
    "subtract": lambda mine, theirs: mine ^ (mine & theirs),
}
"""The operations of a merge, for numbers as well as for sets of numbers."""

Status = Literal["valid", "inconsistent", "stale", "broken"]


@dataclass
class Model:
    """One bitmap of a disk.

    Attributes:
        size: guest bytes of the disk.
        granularity: guest bytes a bit.
        bits: all bits as one number.
        enabled: whether guest writes are recorded, the flag ``auto``.
        status: what `qcow2bm.Bitmap.status` is to be.
    """

    size: int
    granularity: int
    bits: int = 0
    enabled: bool = True
    status: str = "valid"

    @classmethod
    def of_packed(cls, packed: bytes, granularity: int, size: int) -> Self:
        """The bitmap with these packed bits; bits past the disk do not count."""
        model = cls(size, granularity)
        model.bits = int.from_bytes(packed, "little") & model.mask
        return model

    @classmethod
    def of_table(
        cls, table: Sequence[Word], cluster_size: int, granularity: int, size: int
    ) -> Self:
        """The bitmap that is stored as ``table``.

        A raw word other than zeroes is unknown coverage, and that is dirty; so is all that the
        table is too short for.
        """
        ones = b"\xff" * cluster_size
        packed = b"".join(
            word[:cluster_size].ljust(cluster_size, b"\0")
            if isinstance(word, bytes)
            else (ones if word != ZEROES else bytes(cluster_size))
            for word in table
        )
        length = -(-cls(size, granularity).count // 8)
        return cls.of_packed(packed.ljust(length, b"\xff"), granularity, size)

    @classmethod
    def of_numbers(cls, dirty: Iterable[int], granularity: int, size: int) -> Self:
        """The bitmap with these granules dirty, given by their numbers."""
        model = cls(size, granularity)
        for number in dirty:
            model.bits |= 1 << number
        return model

    # --- what the bitmap has ----------------------------------------------------------------------

    @property
    def count(self) -> int:
        """The number of bits of the bitmap."""
        return -(-self.size // self.granularity)

    @property
    def mask(self) -> int:
        """All bits set."""
        return (1 << self.count) - 1

    @property
    def flags(self) -> int:
        """The flags of the directory entry."""
        return FLAG_AUTO * self.enabled | FLAG_IN_USE * (self.status == "inconsistent")

    @property
    def text(self) -> str:
        """The bits, one character each, the first one first."""
        return f"{self.bits:0{self.count}b}"[::-1] if self.count else ""

    @property
    def numbers(self) -> set[int]:
        """The numbers of the dirty granules."""
        return {match.start() for match in re.finditer("1", self.text)}

    @property
    def extents(self) -> list[list[int]]:
        """Start and length of each run of dirty bits in guest bytes, cut at the disk's end."""
        found = (match.span() for match in re.finditer("1+", self.text))
        ranges = (
            (start * self.granularity, min(stop * self.granularity, self.size))
            for start, stop in found
        )
        return [[start, stop - start] for start, stop in ranges]

    @property
    def dirty_bytes(self) -> int:
        """Dirty guest bytes."""
        return sum(length for _, length in self.extents)

    @property
    def packed(self) -> bytes:
        """The bits as on disk, zero past the last one."""
        return self.bits.to_bytes(-(-self.count // 8), "little")

    @property
    def sha256(self) -> str:
        """The hash of the bits as QEMU keeps them: in 64-bit words, at least one."""
        words = max(1, -(-self.count // 64))
        return sha256(self.bits.to_bytes(8 * words, "little")).hexdigest()

    # --- what can be done to the bitmap -----------------------------------------------------------

    def set(self, start: int, length: int) -> None:
        """Makes each granule dirty that a range of guest bytes touches."""
        if length:
            stop = -(-(start + length) // self.granularity)
            self.bits |= (1 << stop) - (1 << start // self.granularity)

    def reset(self, start: int, length: int) -> None:
        """Makes each granule clean whose bytes on the disk all lie in a range of guest bytes."""
        first, end = -(-start // self.granularity), start + length
        stop = self.count if end == self.size else end // self.granularity
        if length and stop > first:
            self.bits &= ~((1 << stop) - (1 << first))

    def clear(self) -> None:
        """Makes all clean."""
        self.bits = 0

    def invert(self) -> None:
        """Makes dirty what is clean, and clean what is dirty."""
        self.bits ^= self.mask

    def merge(self, other: Model, op: str = "or") -> None:
        """Combines with another bitmap, at the finer granularity of the two."""
        finer = min(self.granularity, other.granularity)
        bits = OPERATORS[op](self.at(finer).bits, other.at(finer).bits)
        self.bits = Model(self.size, finer, bits).at(self.granularity).bits

    def at(self, granularity: int) -> Model:
        """A copy at another granularity: a granule is dirty if one of its bytes is."""
        twin = copy(self)
        twin.granularity = granularity
        if granularity < self.granularity:
            factor = self.granularity // granularity
            text = self.text.replace("0", "0" * factor).replace("1", "1" * factor)
            twin.bits = int(text[::-1] or "0", 2) & twin.mask
        elif granularity > self.granularity:
            text, factor = self.text, granularity // self.granularity
            groups = (text[place : place + factor] for place in range(0, len(text), factor))
            twin.bits = int("".join("01"["1" in group] for group in groups)[::-1] or "0", 2)
        return twin

    def resize(self, size: int) -> None:
        """Resizes the disk as QEMU does: what is new is clean."""
        self.size = size
        self.bits &= self.mask


class Bitmaps:
    """The bitmaps of an image by name, in the order of the directory.

    The methods are the operations of `qcow2bm.Edit`, with the same arguments.
    """

    def __init__(self, size: int, default_granularity: int = 1 << 16) -> None:
        self.size = size
        self._default = default_granularity
        self.by_name: dict[str, Model] = {}

    @classmethod
    def of_image(cls, data: bytes | bytearray) -> Self:
        """The bitmaps as they stand in an image."""
        audit = Audit(data)
        bitmaps = cls(audit.size)
        for found in audit.bitmaps:
            model = Model.of_numbers(audit.dirty(found), 1 << found.granularity_bits, audit.size)
            model.bits &= model.mask
            model.enabled = bool(found.flags & FLAG_AUTO)
            model.status = "inconsistent" if found.flags & FLAG_IN_USE else "valid"
            bitmaps.by_name[found.name.decode("utf-8", "surrogateescape")] = model
        return bitmaps

    def __getitem__(self, name: str) -> Model:
        return self.by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def __len__(self) -> int:
        return len(self.by_name)

    @property
    def names(self) -> list[str]:
        """The names in the order of the directory."""
        return list(self.by_name)

    def add(self, name: str, granularity: int | None = None, enabled: bool = True) -> None:
        assert name not in self.by_name
        self.by_name[name] = Model(self.size, granularity or self._default, enabled=enabled)

    def remove(self, name: str) -> None:
        del self.by_name[name]

    def remove_all(self) -> None:
        self.by_name.clear()

    def clear(self, name: str) -> None:
        self[name].clear()

    def enable(self, name: str) -> None:
        self[name].enabled = True

    def disable(self, name: str) -> None:
        self[name].enabled = False

    def invalidate(self, name: str) -> None:
        self[name].status = "inconsistent"

    def rename(self, name: str, new_name: str) -> None:
        self.by_name = {new_name if n == name else n: b for n, b in self.by_name.items()}

    def copy(self, name: str, new_name: str, granularity: int | None = None) -> None:
        source = self[name]
        self.by_name[new_name] = source.at(granularity or source.granularity)

    def set(self, name: str, start: int, length: int) -> None:
        self[name].set(start, length)

    def reset(self, name: str, start: int, length: int) -> None:
        self[name].reset(start, length)

    def set_many(self, name: str, ranges: Iterable[tuple[int, int]]) -> None:
        for start, length in ranges:
            self.set(name, int(start), int(length))

    def reset_many(self, name: str, ranges: Iterable[tuple[int, int]]) -> None:
        for start, length in ranges:
            self.reset(name, int(start), int(length))

    def invert(self, name: str) -> None:
        self[name].invert()

    def merge(self, target: str, source: str, op: str = "or") -> None:
        self[target].merge(self[source], op)

    def guest_writes(self, start: int, length: int) -> None:
        """Records a write of the guest in all enabled bitmaps."""
        for bitmap in self.by_name.values():
            if bitmap.enabled:
                bitmap.set(start, length)

    def resize(self, size: int) -> None:
        """Resizes all bitmaps as QEMU does when the disk is resized."""
        self.size = size
        for bitmap in self.by_name.values():
            bitmap.resize(size)

    @property
    def listed(self) -> list[dict[str, object]]:
        """The list that qemu-img info must print, in the order of the directory."""
        return [
            {"flags": ["auto"] * b.enabled, "name": name, "granularity": b.granularity}
            for name, b in self.by_name.items()
        ]
