"""What the records of a dirty-bitmap section say, in order, as events.

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
"""A buffer may be padded to a multiple of so many bytes."""


class BitmapBegins(NamedTuple):
    """A bitmap is announced; ``number`` counts them from 0.

    Names that are not UTF-8 are kept as surrogates (PEP 383); granularity is in bytes.
    """

    number: int
    node_alias: str
    bitmap_alias: str
    granularity: int
    enabled: bool
    persistent: bool


class BitmapBits(NamedTuple):
    """The next bits of a bitmap: of ``length`` guest bytes from ``start`` on.

    ``bits`` are packed, the least significant first, and clear past the end; None where none is
    set. Those of a bitmap come in order and without gaps, from 0 on. Only the last may be of a
    length that is not a multiple of 64 granules: it ends with the disk.
    """

    number: int
    start: int
    length: int
    bits: bytes | None


class BitmapComplete(NamedTuple):
    """The bitmap has come as a whole: what came last was the end of the disk."""

    number: int


class StreamEnds(NamedTuple):
    """All bitmaps are complete, and none can follow. What does follow is not looked at."""


Event = BitmapBegins | BitmapBits | BitmapComplete | StreamEnds


class _Incoming:
    """How far a bitmap has come."""

    def __init__(self, number: int, granularity: int) -> None:
        self.number = number
        self.granularity = granularity
        self.next_sector = 0
        self.is_cut = False  # the last chunk ended within a word
        self.is_complete = False


class BitmapRecords:
    """Follows the records of the bitmaps through all sections, and judges each by those before."""

    def __init__(self) -> None:
        self._node_alias: bytes | None = None
        self._bitmap_alias: bytes | None = None
        self._bitmaps: dict[tuple[bytes, bytes], _Incoming] = {}
        self._offset = 0

    @property
    def incomplete(self) -> str | None:
        """The name of a bitmap that is not complete, if there is any."""
        for (_, name), bitmap in self._bitmaps.items():
            if not bitmap.is_complete:
                return decode_name(name)
        return None

    def take(self, record: Record, offset: int) -> Event:
        """What a record says that is more than EOS; ``offset`` is its place in the stream.

        Raises:
            FormatError: it does not follow from those before.
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

    def _start(self, key: tuple[bytes, bytes], start: Start) -> BitmapBegins:
        if key in self._bitmaps:
            self._reject("START record", "names", "are of a bitmap that began before")
        number = len(self._bitmaps)
        if number == MAX_BITMAPS:  # a stream has to say little to make each of them
            raise LimitError("the number of bitmaps in the stream", number + 1, MAX_BITMAPS)
        self._bitmaps[key] = _Incoming(number, start.granularity)
        enabled = bool(start.bitmap_flags & stream_bitmap.ENABLED)
        persistent = bool(start.bitmap_flags & stream_bitmap.PERSISTENT)
        node_alias, bitmap_alias = map(decode_name, key)
        return BitmapBegins(
            number, node_alias, bitmap_alias, start.granularity, enabled, persistent
        )

    def _bits(self, bitmap: _Incoming, record: Bits) -> BitmapBits:
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
        return BitmapBits(bitmap.number, start, length, data)

    def _complete(self, bitmap: _Incoming) -> BitmapComplete:
        if not bitmap.next_sector:
            self._reject("COMPLETE record", "names", "are of a bitmap without bits")
        bitmap.is_complete = True
        return BitmapComplete(bitmap.number)

    def _reject(self, structure: str, field: str, reason: str) -> NoReturn:
        raise FormatError(structure, field, self._offset, reason)


def first_bits(data: bytes, bits: int) -> bytes:
    """So many bits, without padding and clear past the last one (INV-TAIL)."""
    if 8 * len(data) == bits:
        return data
    octets = bytearray(data[: ceil_div(bits, 8)])
    fill(octets, bits, 8 * len(octets), is_set=False)
    return bytes(octets)
