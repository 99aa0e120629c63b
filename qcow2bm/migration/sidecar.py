"""Reads and writes sidecars: files that carry bitmaps without their disk. No I/O.

*Spec*: spec/sidecar.md.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

from qcow2bm.bitmaps.entries import MAX_BITMAP_BYTES
from qcow2bm.bits.digest import sha256
from qcow2bm.bits.pure_python import dirty_bytes
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import BitmapError, FormatError, LimitError
from qcow2bm.format import sidecar
from qcow2bm.format.piece_source import PieceSource
from qcow2bm.format.sidecar import Head
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.units import ceil_div, decode_name, encode_name

MAX_BYTES = 4 << 30
"""The default limit: how many bytes of bits all bitmaps of a sidecar may have together."""

_LEVEL = 1  # of compression: a higher level hardly makes bits smaller
_PIECE = 1 << 20


class SavedBitmap(NamedTuple):
    """A bitmap that was saved outside of an image.

    Attributes:
        name: of the bitmap. Bytes that are not UTF-8 are kept as surrogates (PEP 383).
        granularity: how many guest bytes one bit stands for.
        enabled: whether the bitmap goes on recording writes.
        disk_size: of the disk that the bitmap belongs to, in bytes.
        octets: the packed bits, least significant bit first, ceil(bits / 8) bytes.
    """

    name: str
    granularity: int
    enabled: bool
    disk_size: int
    octets: bytes | bytearray | memoryview

    @property
    def dirty_bytes(self) -> int:
        """The number of dirty guest bytes, clipped to the disk."""
        return dirty_bytes(self.octets, self.granularity, self.disk_size)

    def sha256(self) -> str:
        """Returns the digest of QEMU's x-debug-block-dirty-bitmap-sha256 for the bitmap, in hex."""
        return sha256([self.octets], ceil_div(self.disk_size, self.granularity))

    def resized(self, disk_size: int) -> Self:
        """Returns the bitmap as QEMU has it after the disk was resized: what was added is clean."""
        bits = ceil_div(disk_size, self.granularity)
        length = ceil_div(bits, 8)
        octets = bytearray(self.octets[:length]).ljust(length, b"\0")
        if bits % 8:
            octets[-1] &= (1 << bits % 8) - 1
        return self._replace(disk_size=disk_size, octets=octets)


class Sidecar(NamedTuple):
    """The content of a sidecar.

    Attributes:
        disk_size: of the disk that all bitmaps belong to, in bytes.
        header: the header of the image that the bitmaps were saved from, with its extensions and
            the name of its backing file; empty if the header is not known.
        bitmaps: the bitmaps. Sentinels among them only serve to prove that the disk is unchanged.
    """

    disk_size: int
    header: bytes
    bitmaps: tuple[SavedBitmap, ...]

    @property
    def generation(self) -> bytes | None:
        """The generation token that the header records; None if it records none."""
        found = parse_saved_header(self.header).generation if self.header else None
        return found.token if found else None


def parse_saved_header(header: bytes) -> ClusterFile:
    """Parses the header of an image that was saved without the image.

    Raises:
        FormatError: it is no header of an image.
        UnsupportedError: the header has a version or a feature that is not supported.
    """
    return ClusterFile(MemoryStorage(header), force_share=True)


def write_sidecar(disk_size: int, header: bytes, bitmaps: Sequence[SavedBitmap]) -> Iterator[bytes]:
    """Returns the bytes of a sidecar, piece by piece.

    Memory grows with the largest compressed bitmap.

    Raises:
        BitmapError: two bitmaps have the same name, or a bitmap is of a disk of another size.
        LimitError: the bits or the header are too long.
        FormatError: a value does not fit its field.
    """
    names = Counter(bitmap.name for bitmap in bitmaps)
    for bitmap in bitmaps:
        if names[bitmap.name] > 1:
            raise BitmapError(bitmap.name, "is there twice")
        if bitmap.disk_size != disk_size:
            raise BitmapError(bitmap.name, "belongs to a disk of another size")
    length = sum(len(bitmap.octets) for bitmap in bitmaps)
    if length > MAX_BYTES:
        raise LimitError("the length of the bits of all bitmaps", length, MAX_BYTES)
    if len(header) > sidecar.MAX_HEADER_BYTES:
        raise LimitError("the length of the header", len(header), sidecar.MAX_HEADER_BYTES)
    return _with_digest(_pieces(disk_size, header, bitmaps))


def _with_digest(pieces: Iterable[bytes]) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    yield digest.digest()


def _pieces(disk_size: int, header: bytes, bitmaps: Sequence[SavedBitmap]) -> Iterator[bytes]:
    yield sidecar.build_head(Head(len(header), disk_size, len(bitmaps)))
    yield header
    for bitmap in bitmaps:
        data = _compressed(bitmap.octets)
        flags = sidecar.AUTO if bitmap.enabled else 0
        bits = bitmap.granularity.bit_length() - 1
        yield sidecar.build_bitmap(sum(map(len, data)), flags, bits, encode_name(bitmap.name))
        yield from data


def _compressed(octets: bytes | bytearray | memoryview) -> list[bytes]:
    compressor, view = zlib.compressobj(_LEVEL), memoryview(octets)
    starts = range(0, len(view), _PIECE)
    pieces = [compressor.compress(view[start : start + _PIECE]) for start in starts]
    return [*filter(None, pieces), compressor.flush()]


def read_sidecar(pieces: Iterable[bytes], limit_bytes: int = MAX_BYTES) -> Sidecar:
    """Reads a sidecar.

    Args:
        pieces: the whole file, in pieces of any size.
        limit_bytes: how many bytes of bits all bitmaps may have together.

    Raises:
        FormatError: it is no sidecar, or the file is damaged or cut off.
        UnsupportedError: the sidecar, or the header in it, has a version that is not supported.
        LimitError: there are too many bits.
    """
    source = PieceSource("sidecar", pieces)
    head = sidecar.parse_head(source.take(sidecar.HEAD_BYTES))
    header = source.take(head.header_size)
    bitmaps: dict[str, SavedBitmap] = {}
    length = 0
    for number in range(head.nb_bitmaps):
        place = source.offset
        bitmap = _read_bitmap(source, number, head.disk_size, limit_bytes - length)
        if bitmap.name in bitmaps:
            raise FormatError(f"bitmap {number}", "name", place, "is there twice")
        bitmaps[bitmap.name] = bitmap
        length += len(bitmap.octets)
    source.take_digest()
    if source.rest(0):
        raise FormatError("sidecar", "", source.offset, "has bytes after its end")
    if header:
        parse_saved_header(header)
    return Sidecar(head.disk_size, header, tuple(bitmaps.values()))


def _read_bitmap(source: PieceSource, number: int, disk_size: int, limit_bytes: int) -> SavedBitmap:
    structure, place = f"bitmap {number}", source.offset
    record = sidecar.parse_bitmap(source.take(sidecar.BITMAP_BYTES), place, number)
    name = decode_name(source.take(record.name_size))
    granularity = 1 << record.granularity_bits
    bits = ceil_div(disk_size, granularity)
    length = ceil_div(bits, 8)
    if length > MAX_BITMAP_BYTES:
        raise LimitError("the length of a bitmap in bytes", length, MAX_BITMAP_BYTES)
    if length > limit_bytes:
        raise LimitError("the length of the bits that are left in bytes", length, limit_bytes)
    if record.data_size > length + length // 512 + 64:  # the most that zlib makes of random bits
        reason = f"is {record.data_size}, more than {length} bytes of bits can take"
        raise FormatError(structure, "data_size", place, reason)
    data_offset = source.offset
    octets = _decompressed(source.pieces(record.data_size), length)
    if octets is None:
        raise FormatError(structure, "data", data_offset, "is damaged: save the bitmaps again")
    if bits % 8 and octets[-1] >> bits % 8:
        raise FormatError(structure, "data", data_offset, "has bits past the end of the disk")
    return SavedBitmap(name, granularity, bool(record.flags & sidecar.AUTO), disk_size, octets)


def _decompressed(pieces: Iterable[bytes], length: int) -> bytearray | None:
    """Returns ``length`` decompressed bytes; None if there are more or fewer, or on a fault.

    Memory is bounded by ``length``, whatever the data are.
    """
    decompressor, octets, end = zlib.decompressobj(), bytearray(length), 0
    try:
        for piece in pieces:
            while piece:
                part = decompressor.decompress(piece, _PIECE)
                if end + len(part) > length or decompressor.unused_data:
                    return None
                octets[end : end + len(part)] = part
                end += len(part)
                piece = decompressor.unconsumed_tail
    except zlib.error:
        return None
    return octets if decompressor.eof and end == length else None
