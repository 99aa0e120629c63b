"""What a dirty bitmap means, said as simply as can be: a text of "0" and "1"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import NamedTuple

from support.images import ZEROES, Word

from qcow2bm.units import ceil_div


@cache
def _text(cluster: bytes) -> str:
    return "".join(f"{byte:08b}"[::-1] for byte in cluster)


class Model(NamedTuple):
    """The bits of a bitmap, one character each, the first one first."""

    bits: str
    granularity: int
    virtual_size: int

    @classmethod
    def of_table(
        cls, table: Sequence[Word], cluster_size: int, granularity: int, virtual_size: int
    ) -> Model:
        """The bitmap that is stored as ``table``; any other raw word is unknown, so dirty."""
        bits = ceil_div(virtual_size, granularity)
        text = ""
        for word in table:
            room = min(bits - len(text), 8 * cluster_size)
            if isinstance(word, bytes):
                text += _text(word[: ceil_div(room, 8)])[:room].ljust(room, "0")
            else:
                text += "01"[word != ZEROES] * room
        return cls(text.ljust(bits, "1"), granularity, virtual_size)

    @classmethod
    def of_packed(cls, packed: bytes, granularity: int, virtual_size: int) -> Model:
        """The bitmap whose packed bits these are."""
        return cls(_text(packed)[: ceil_div(virtual_size, granularity)], granularity, virtual_size)

    @property
    def extents(self) -> list[list[int]]:
        """Start and length of each run of dirty bits in guest bytes, cut at the disk's end."""
        found = (match.span() for match in re.finditer("1+", self.bits))
        ranges = (
            (start * self.granularity, min(stop * self.granularity, self.virtual_size))
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
        return int(self.bits[::-1] or "0", 2).to_bytes(ceil_div(len(self.bits), 8), "little")

    @property
    def sha256(self) -> str:
        """The hash of the bits as QEMU keeps them: in 64-bit words, at least one."""
        words = max(1, ceil_div(len(self.bits), 64))
        return sha256(self.packed.ljust(8 * words, b"\0")).hexdigest()
