"""Collects the bitmaps of a migration stream from the events of a `StreamReader`.

*Spec*: spec/stream.md, "Bitmaps that came".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qcow2bm.bitmaps.entries import MAX_BITMAP_BYTES
from qcow2bm.bits.pure_python import dirty_bytes
from qcow2bm.errors import FormatError, LimitError, StateError
from qcow2bm.migration.stream_reader import StreamReader
from qcow2bm.migration.stream_records import BitmapChunk, BitmapEnd, BitmapStart, Event
from qcow2bm.units import ceil_div, escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 4 << 30
"""The default limit: how many bytes of bits all bitmaps of a stream may have together."""


class StreamBitmap:
    """One bitmap of a migration stream, as far as it has come.

    Attributes:
        node_alias, bitmap_alias: the source's names for the node and the bitmap in the stream.
            Bytes that are not UTF-8 are kept as surrogates (PEP 383).
        granularity: how many guest bytes one bit stands for.
        enabled: whether the bitmap goes on recording writes.
        persistent: whether the bitmap is to be stored in the image.
        disk_size: for how many guest bytes bits have come; once the bitmap is complete, the size
            of the disk.
        is_complete: whether all bits have come.
    """

    def __init__(self, begins: BitmapStart) -> None:
        self.node_alias = begins.node_alias
        self.bitmap_alias = begins.bitmap_alias
        self.granularity = begins.granularity
        self.enabled = begins.enabled
        self.persistent = begins.persistent
        self.disk_size = 0
        self.is_complete = False
        self._octets = bytearray()  # up to the last chunk that is not clear

    def __repr__(self) -> str:
        return f"<qcow2bm.StreamBitmap {self.bitmap_alias!r} of {self.node_alias!r}>"

    @property
    def bits(self) -> int:
        """The number of bits that have come so far."""
        return ceil_div(self.disk_size, self.granularity)

    def add(self, event: BitmapChunk) -> None:
        """Adds the next bits.

        Raises:
            LimitError: the bitmap has more bits than QEMU can have in one.
        """
        self.disk_size = event.start + event.length
        length = ceil_div(self.bits, 8)
        if length > MAX_BITMAP_BYTES:
            raise LimitError("the length of a bitmap in bytes", length, MAX_BITMAP_BYTES)
        if event.bits is not None:
            clear = event.start // self.granularity // 8 - len(self._octets)
            if clear:
                self._octets += bytes(clear)
            self._octets += event.bits

    @property
    def dirty_bytes(self) -> int:
        """The number of dirty guest bytes so far, clipped to the disk."""
        return dirty_bytes(self._octets, self.granularity, self.disk_size)

    def packed(self) -> NDArray[np.uint8]:
        """Returns all bits: uint8[ceil(bits / 8)], least significant bit first, zero past the disk.

        The array is a read-only view of the bitmap's own bytes.

        Raises:
            StateError: the bitmap is not complete.
        """
        import numpy as np

        self._require_complete()
        clear = ceil_div(self.bits, 8) - len(self._octets)
        if clear:
            self._octets += bytes(clear)
        array = np.frombuffer(self._octets, np.uint8)
        array.flags.writeable = False
        return array

    def sha256(self) -> str:
        """Returns the digest of QEMU's x-debug-block-dirty-bitmap-sha256 for the bitmap, in hex.

        Raises:
            StateError: the bitmap is not complete.
        """
        from qcow2bm.bits.digest import sha256

        self._require_complete()
        return sha256([self._octets], self.bits)

    def _require_complete(self) -> None:
        if not self.is_complete:
            subject = f'the bitmap "{escape(self.bitmap_alias)}" of the stream'
            raise StateError("incomplete", "complete", subject)


class StreamBitmaps:
    """All bitmaps of a migration stream, as far as it has come.

    *Guarantees*: memory grows only with the bits of each bitmap, up to the last set bit.

    Attributes:
        all: the bitmaps in the order of their starts, complete or not.
        is_complete: whether the end of the bitmaps came; then every bitmap is complete.
        fault: the rule that the stream breaks, or its early end; None if the stream is sound.
    """

    def __init__(self, limit_bytes: int = MAX_BYTES) -> None:
        """``limit_bytes``: how many bytes of bits may come in all, clear bits included."""
        self.all: list[StreamBitmap] = []
        self.is_complete = False
        self.fault: FormatError | None = None
        self._limit_bytes = limit_bytes
        self._length = 0

    @property
    def complete(self) -> list[StreamBitmap]:
        """The bitmaps that are complete. The bits of the others are not given out."""
        return [bitmap for bitmap in self.all if bitmap.is_complete]

    def add(self, events: Iterable[Event]) -> None:
        """Adds the events that a `StreamReader` returns.

        Raises:
            LimitError: there are too many bits.
        """
        for event in events:
            if isinstance(event, BitmapChunk):
                bitmap = self.all[event.number]
                self._length += ceil_div(event.length, 8 * bitmap.granularity)
                if self._length > self._limit_bytes:
                    what = "the length of all bitmaps of the stream in bytes"
                    raise LimitError(what, self._length, self._limit_bytes)
                bitmap.add(event)
            elif isinstance(event, BitmapStart):
                self.all.append(StreamBitmap(event))
            elif isinstance(event, BitmapEnd):
                self.all[event.number].is_complete = True
            else:
                self.is_complete = True


def read_stream(pieces: Iterable[bytes], limit_bytes: int = MAX_BYTES) -> StreamBitmaps:
    """Reads the bitmaps of a migration stream.

    If the stream breaks a rule of the format or ends early, `StreamBitmaps.fault` tells where,
    the bitmaps that were complete by then are good, and no further piece is taken.

    Args:
        pieces: the stream, in pieces of any size. Those after the last bitmap are taken as well:
            the writer at the other end of a pipe would fail if they were not.
        limit_bytes: how many bytes of bits may come for all bitmaps together.

    Raises:
        FormatError: the bytes do not begin like a migration stream.
        UnsupportedError: a legal record before the bitmaps cannot be parsed.
        LimitError: there are too many bits, or too many bitmaps.
    """
    bitmaps, reader = StreamBitmaps(limit_bytes), StreamReader()
    try:
        for piece in pieces:
            bitmaps.add(reader.feed(piece))
        bitmaps.add(reader.finish())
    except FormatError as error:
        if not reader.is_stream:
            raise
        bitmaps.fault = error
    return bitmaps
