"""A bitmap whose bits are in memory, and which of them are not stored yet.

*Spec*: spec/tracking.md, "Marking" and "Flushing".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.bitmaps.stored_bits import read_bits
from qcow2bm.bitmaps.tables import read_words
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format.directory import (
    FLAG_AUTO,
    FLAG_IN_USE,
    TYPE_DIRTY_TRACKING,
    DirectoryEntry,
)
from qcow2bm.units import ceil_div, encode_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

PIECE_BYTES = 4096
"""The length of a piece: how many bytes of bits are flushed together or not at all."""

Changes = Mapping[int, "Buffer"]
"""Pieces of a bitmap's bits by their number, as they are to be stored."""


class Bits(NamedTuple):
    """Bits that only ever get set, and the meta-bitmap: which pieces of them were touched.

    ``touched`` has one byte for each piece of ``octets``, 1 if a bit in the piece was set. A
    thread that clears the byte before it reads the piece misses nothing: a bit that another
    thread sets meanwhile shows in the piece, in ``touched``, or in both.
    """

    octets: bytearray
    touched: bytearray

    @classmethod
    def of(cls, octets: bytearray) -> Bits:
        """Returns these bits with no piece touched."""
        return cls(octets, bytearray(ceil_div(len(octets), PIECE_BYTES)))


class TrackedBitmap:
    """A bitmap of an image whose bits are changed in memory.

    Attributes:
        entry: its directory entry as it is stored now.
        words: its bitmap table as it is stored now, uint64[n].
        bits: its bits, in whole clusters, clear past the disk, and the pieces not stored yet. No
            other object owns these bytes.
    """

    def __init__(self, entry: DirectoryEntry, words: array[int], octets: bytearray) -> None:
        """``octets`` are what is stored: no piece is touched."""
        self.entry = entry
        self.words = words
        self.bits = Bits.of(octets)

    @classmethod
    def load(cls, file: ClusterFile, entry: DirectoryEntry) -> TrackedBitmap:
        """A bitmap of the image with all its bits in memory.

        Raises:
            StorageError: reading failed.
        """
        words = read_words(file, entry)
        octets = bytearray(len(words) * file.cluster_size)
        count = ceil_div(file.virtual_size, entry.granularity)
        read_bits(file, words, count, memoryview(octets))
        return cls(entry, words, octets)

    @classmethod
    def unplaced(cls, name: str, granularity: int, length: int) -> TrackedBitmap:
        """A clean bitmap of ``length`` bytes, which cannot be stored yet.

        `TrackedStore.commit` finds its entry and its table, once they are on disk.
        """
        key = encode_name(name)
        granularity_bits = granularity.bit_length() - 1
        flags = FLAG_AUTO | FLAG_IN_USE
        tail = len(key), 0, b"", key, bytes(-len(key) % 8)
        entry = DirectoryEntry(0, 0, 0, 0, flags, TYPE_DIRTY_TRACKING, granularity_bits, *tail)
        return cls(entry, array("Q"), bytearray(length))

    @property
    def name(self) -> str:
        """The name; bytes that are not UTF-8 are kept as surrogates."""
        return self.entry.name or ""

    @property
    def granularity(self) -> int:
        """The number of guest bytes that a bit stands for."""
        return self.entry.granularity

    def due(self) -> NDArray[np.int64]:
        """The numbers of the pieces that are to be stored, int64[n], ascending."""
        import numpy as np

        # A copy, because numpy minds if the bytes change meanwhile.
        return np.flatnonzero(np.frombuffer(bytes(self.bits.touched), np.uint8))

    def take(self, pieces: Iterable[int], *, is_quiet: bool = False) -> Changes:
        """Returns pieces as they are to be stored; from now on the pieces count as stored.

        They are copies, unless ``is_quiet``: no thread marks any more.
        """
        octets, touched = self.bits
        view = memoryview(octets)
        changes: dict[int, Buffer] = {}
        for piece in pieces:
            touched[piece] = 0  # before the copy: what is marked meanwhile counts anew (INV-META)
            part = view[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES]
            changes[piece] = part if is_quiet else bytes(part)
        return changes

    def give_back(self, pieces: Iterable[int]) -> None:
        """Makes pieces count as not stored again: `take` took them, and storing failed."""
        for piece in pieces:
            self.bits.touched[piece] = 1  # INV-META
