"""Turns the records of a dirty-bitmap section into events, and checks that they follow each other.

*Spec*: spec/stream.md, "Records of bitmaps" and "Bits".
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from qcow2bm.bitmaps.directory import MAX_BITMAPS
from qcow2bm.bits.pure_python import fill
from qcow2bm.errors import FormatError, LimitError
from qcow2bm.format import stream_bitmap
from qcow2bm.format.stream_bitmap import Bits, Record, Start
from qcow2bm.units import align_up, ceil_div, decode_name

SECTOR_SIZE = 512
_WORD_BITS = 64
PADDING = 32
"""The bits in a record may be padded to a multiple of this many bytes."""


class BitmapStart(NamedTuple):
    """The start of a bitmap; ``number`` is its place in the stream, counted from 0.

    Bytes of a name that are not UTF-8 are kept as surrogates (PEP 383). The granularity is in
    bytes.
    """

    number: int
    node_alias: str
    bitmap_alias: str
    granularity: int
    enabled: bool
    persistent: bool


class BitmapChunk(NamedTuple):
    """The next bits of a bitmap: those of ``length`` guest bytes from ``start`` on.

    ``bits`` are packed, least significant bit first, and clear past the end; None where no bit is
    set. The chunks of a bitmap come in order and without gaps, from 0 on. The length of each chunk
    is a multiple of 64 granules, except for the last chunk, which ends with the disk.
    """

    number: int
    start: int
    length: int
    bits: bytes | None


class BitmapEnd(NamedTuple):
    """The end of a bitmap: all its bits have come, and the last chunk ended with the disk."""

    number: int


class StreamEnd(NamedTuple):
    """The end of the bitmaps: all are complete. The rest of the stream is not parsed."""


Event = BitmapStart | BitmapChunk | BitmapEnd | StreamEnd


class _BitmapProgress:
    """The state of a bitmap whose bits are coming."""

    def __init__(self, number: int, granularity: int) -> None:
        self.number = number
        self.granularity = granularity
        self.next_sector = 0
        self.is_cut = False  # whether the last chunk ended within a word
        self.is_complete = False


class BitmapRecords:
    """Turns the records of all sections into events, and checks each against those before it."""

    def __init__(self) -> None:
        self._node_alias: bytes | None = None
        self._bitmap_alias: bytes | None = None
        self._bitmaps: dict[tuple[bytes, bytes], _BitmapProgress] = {}
        self._offset = 0

    @property
    def incomplete(self) -> str | None:
        """The name of a bitmap that is not complete; None if all are."""
        for (_, name), bitmap in self._bitmaps.items():
            if not bitmap.is_complete:
                return decode_name(name)
        return None

    def take(self, record: Record, offset: int) -> Event:
        """Returns the event in a record that has more than EOS.

        Args:
            record: the record.
            offset: its place in the stream.

        Raises:
            FormatError: the record must not follow those before it.
            LimitError: there are too many bitmaps.
        """
        flags, node_alias, bitmap_alias, body = record
        self._offset = offset
        if node_alias:
            self._node_alias = node_alias
        if bitmap_alias:
            self._bitmap_alias = bitmap_alias
        if self._node_alias is None or self._bitmap_alias is None:
            self._reject("dirty-bitmap record", "flags", f"is {flags:#x}: no names came yet")
        key = self._node_alias, self._bitmap_alias
        if isinstance(body, Start):
            return self._start(key, body)
        bitmap = self._bitmaps.get(key)
        if not bitmap:
            self._reject("dirty-bitmap record", "names", "are of no bitmap that began")
        if bitmap.is_complete:
            self._reject("dirty-bitmap record", "names", "are of a bitmap that is complete")
        if body:
            return self._bits(bitmap, body)
        if not flags & stream_bitmap.COMPLETE:
            self._reject("dirty-bitmap record", "flags", f"is {flags:#x}: says nothing")
        return self._complete(bitmap)

    def _start(self, key: tuple[bytes, bytes], start: Start) -> BitmapStart:
        if key in self._bitmaps:
            self._reject("START record", "names", "are of a bitmap that began before")
        number = len(self._bitmaps)
        if number == MAX_BITMAPS:  # or a small stream could take much memory
            raise LimitError("the number of bitmaps in the stream", number + 1, MAX_BITMAPS)
        self._bitmaps[key] = _BitmapProgress(number, start.granularity)
        enabled = bool(start.bitmap_flags & stream_bitmap.ENABLED)
        persistent = bool(start.bitmap_flags & stream_bitmap.PERSISTENT)
        node_alias, bitmap_alias = map(decode_name, key)
        return BitmapStart(number, node_alias, bitmap_alias, start.granularity, enabled, persistent)

    def _bits(self, bitmap: _BitmapProgress, record: Bits) -> BitmapChunk:
        start_sector, nr_sectors, data = record
        if start_sector != bitmap.next_sector:
            reason = f"is {start_sector}, but {bitmap.next_sector} is next"
            self._reject("BITS record", "start_sector", reason)
        if bitmap.is_cut:
            self._reject("BITS record", "start_sector", f"is {start_sector}, within a word of bits")
        if not nr_sectors:
            self._reject("BITS record", "nr_sectors", "is 0")
        length = nr_sectors * SECTOR_SIZE
        bits = ceil_div(length, bitmap.granularity)
        if data is not None:
            needed = 8 * ceil_div(bits, _WORD_BITS)
            if not needed <= len(data) <= align_up(needed, PADDING):
                reason = f"is {len(data)}, but {needed} are needed, padded to {PADDING} at most"
                self._reject("BITS record", "size", reason)
            data = first_bits(data, bits)
        bitmap.next_sector += nr_sectors
        bitmap.is_cut = length % (_WORD_BITS * bitmap.granularity) != 0
        start = start_sector * SECTOR_SIZE
        return BitmapChunk(bitmap.number, start, length, data)

    def _complete(self, bitmap: _BitmapProgress) -> BitmapEnd:
        if not bitmap.next_sector:
            self._reject("COMPLETE record", "names", "are of a bitmap without bits")
        bitmap.is_complete = True
        return BitmapEnd(bitmap.number)

    def _reject(self, structure: str, field: str, reason: str) -> NoReturn:
        raise FormatError(structure, field, self._offset, reason)


def first_bits(data: bytes, bits: int) -> bytes:
    """Returns the first ``bits`` bits of ``data``: no padding, clear past the last (INV-TAIL)."""
    if 8 * len(data) == bits:
        return data
    octets = bytearray(data[: ceil_div(bits, 8)])
    fill(octets, bits, 8 * len(octets), is_set=False)
    return bytes(octets)
