"""Writes a migration stream that has dirty bitmaps and nothing else, as QEMU accepts it.

*Spec*: spec/stream.md, "Writing".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qcow2bm.errors import BitmapError
from qcow2bm.format import stream, stream_bitmap
from qcow2bm.format.stream import Section, build_section
from qcow2bm.format.stream_bitmap import Bits, Record, Start, build_record
from qcow2bm.migration.stream_records import PADDING, SECTOR_SIZE, first_bits
from qcow2bm.units import align_up, ceil_div, encode_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK_BYTES = 1024
"""The number of bytes of bits in a record; QEMU sends as many."""

_SECTION_ID = 1
_SECTORS_LIMIT = 1 << 32  # a record counts its sectors in 32 bits
_ZEROES = bytes(CHUNK_BYTES)


class OutgoingBitmap(NamedTuple):
    """A bitmap to be sent.

    Attributes:
        node_alias: the receiver's name for the disk. Bytes of a name that are not UTF-8 are
            surrogates (PEP 383).
        name: of the bitmap.
        granularity: how many guest bytes one bit stands for.
        enabled: whether the bitmap goes on recording writes.
        persistent: whether the receiver is to store the bitmap in its image.
        packed: the bits, least significant bit first, at least ceil(bits / 8) bytes. Bits past the
            disk are not sent.
        disk_size: in bytes.
    """

    node_alias: str
    name: str
    granularity: int
    enabled: bool
    persistent: bool
    packed: Buffer
    disk_size: int

    @property
    def key(self) -> tuple[bytes, bytes]:
        """Both names, encoded as they are sent."""
        return encode_name(self.node_alias), encode_name(self.name)


def write_stream(bitmaps: Sequence[OutgoingBitmap], machine: str | None) -> Iterator[bytes]:
    """Returns the bytes of a stream, piece by piece; memory does not grow with the bitmaps.

    A machine that is started with ``-incoming`` and this stream gets no memory and no device state:
    it boots cold, with the bitmaps in memory. If its image has a valid bitmap of the same name,
    QEMU gives up the disk.

    Args:
        bitmaps: the bitmaps, in the order in which they are sent.
        machine: QEMU's full name of the receiver's machine type, such as ``pc-i440fx-7.2``: the
            receiver refuses a stream of another type. None writes the sections of the bitmaps
            alone, which QEMU does not accept.

    Raises:
        BitmapError: a name or a granularity cannot be sent, or two bitmaps have the same names.
        ValueError: another value cannot be sent.
    """
    for bitmap in bitmaps:
        _check(bitmap)
    _check_names(bitmaps)
    if machine is not None and not 1 <= len(encode_name(machine)) <= stream.MAX_NAME:
        raise ValueError(f"the name of a machine has 1 to {stream.MAX_NAME} bytes")
    return _stream(bitmaps, machine)


def _check(bitmap: OutgoingBitmap) -> None:
    granularity, size = bitmap.granularity, bitmap.disk_size
    if not 1 <= len(encode_name(bitmap.node_alias)) <= stream.MAX_NAME:
        raise ValueError(f"a node alias has 1 to {stream.MAX_NAME} bytes")
    if granularity.bit_count() != 1 or not stream_bitmap.MIN_GRANULARITY <= granularity < 1 << 32:
        reason = (
            f"has a granularity of {granularity}, but a stream takes powers of two, 512 to 2^31"
        )
        raise BitmapError(bitmap.name, reason)
    if size <= 0 or size % SECTOR_SIZE:
        raise ValueError(f"the disk has {size} bytes, must be whole sectors, at least one")
    needed = ceil_div(ceil_div(size, granularity), 8)
    if memoryview(bitmap.packed).nbytes < needed:
        raise ValueError(f"there are fewer than {needed} bytes of bits")


def _check_names(bitmaps: Iterable[OutgoingBitmap]) -> None:
    keys = set()
    for bitmap in bitmaps:
        length = len(encode_name(bitmap.name))
        if not 1 <= length <= stream.MAX_NAME:
            reason = f"has a name of {length} bytes, but a stream takes 1 to {stream.MAX_NAME}"
            raise BitmapError(bitmap.name, reason)
        if bitmap.key in keys:
            raise BitmapError(bitmap.name, "is there twice for the same node")
        keys.add(bitmap.key)


def _stream(bitmaps: Sequence[OutgoingBitmap], machine: str | None) -> Iterator[bytes]:
    if machine is not None:
        yield stream.build_envelope() + stream.build_configuration(encode_name(machine))
    idstr, version = stream_bitmap.DIRTY_BITMAP, stream_bitmap.DIRTY_BITMAP_VERSION
    end = build_record(Record(stream_bitmap.EOS)) + build_section(
        Section(stream.FOOTER, _SECTION_ID)
    )
    named = _Names()

    yield build_section(Section(stream.SECTION_START, _SECTION_ID, idstr, 0, version))
    for bitmap in bitmaps:
        flags = (
            bitmap.enabled * stream_bitmap.ENABLED | bitmap.persistent * stream_bitmap.PERSISTENT
        )
        yield named.record(bitmap, stream_bitmap.START, Start(bitmap.granularity, flags))
    yield end
    yield build_section(Section(stream.SECTION_END, _SECTION_ID))
    for bitmap in bitmaps:
        for bits in _chunks(bitmap):
            flags = stream_bitmap.BITS | (stream_bitmap.ZEROES if bits.data is None else 0)
            yield named.record(bitmap, flags, bits)
    for bitmap in bitmaps:
        yield named.record(bitmap, stream_bitmap.COMPLETE)
    yield end
    if machine is not None:
        yield stream.U8.pack(stream.EOF)


class _Names:
    """Builds records that have names only where the names change."""

    def __init__(self) -> None:
        self._last: OutgoingBitmap | None = None

    def record(self, bitmap: OutgoingBitmap, flags: int, body: Start | Bits | None = None) -> bytes:
        last, self._last = self._last, bitmap
        if bitmap is last:
            return build_record(Record(flags, None, None, body))
        node_alias, name = bitmap.key
        flags |= stream_bitmap.BITMAP_NAME
        if last and last.node_alias == bitmap.node_alias:
            return build_record(Record(flags, None, name, body))
        return build_record(Record(flags | stream_bitmap.DEVICE_NAME, node_alias, name, body))


def _chunks(bitmap: OutgoingBitmap) -> Iterator[Bits]:
    """Yields all bits in order; only the last chunk needs padding."""
    sectors = bitmap.disk_size // SECTOR_SIZE
    per_bit = bitmap.granularity // SECTOR_SIZE
    length = (_SECTORS_LIMIT - 1) // (per_bit * 8 * PADDING) * PADDING
    length = min(CHUNK_BYTES, length)
    octets = memoryview(bitmap.packed).cast("B")
    for place, start in enumerate(range(0, sectors, 8 * length * per_bit)):
        count = min(sectors - start, 8 * length * per_bit)
        data = bytes(octets[place * length : place * length + length])
        bits = ceil_div(count, per_bit)
        if bits < 8 * length:
            data = _padded(data, bits)
        is_clear = data == _ZEROES[: len(data)]
        yield Bits(start, count, None if is_clear else data)


def _padded(data: bytes, bits: int) -> bytes:
    """Returns the first bits, clear past the last one, padded as QEMU pads them."""
    octets = first_bits(data, bits)
    return octets.ljust(align_up(len(octets), PADDING), b"\0")
