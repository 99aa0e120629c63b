"""The bitmaps of a migration stream, put together from the events of a `StreamReader`.

*Spec*: spec/stream.md, "Bitmaps that came".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qcow2bm.bitmaps.entries import MAX_BITMAP_BYTES
from qcow2bm.bits.pure_python import dirty_bytes
from qcow2bm.errors import FormatError, LimitError, StateError
from qcow2bm.migration.stream_reader import StreamReader
from qcow2bm.migration.stream_records import BitmapBegins, BitmapBits, BitmapComplete, Event
from qcow2bm.units import ceil_div, escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 4 << 30
"""How many bytes of bits all bitmaps of a stream may have, unless the caller says otherwise."""


class StreamBitmap:
    """One bitmap of a migration stream, as far as it has come.

    Attributes:
        node_alias, bitmap_alias: what the source calls node and bitmap in the stream. Names that
            are not UTF-8 are kept as surrogates (PEP 383).
        granularity: how many guest bytes one bit stands for.
        enabled: whether it goes on recording writes.
        persistent: whether it is to be stored in the image.
        disk_size: of how many guest bytes it has told; of the whole disk once it is complete.
        is_complete: whether all of it has come.
    """

    def __init__(self, begins: BitmapBegins) -> None:
        self.node_alias = begins.node_alias
        self.bitmap_alias = begins.bitmap_alias
        self.granularity = begins.granularity
        self.enabled = begins.enabled
        self.persistent = begins.persistent
        self.disk_size = 0
        self.is_complete = False
        self._octets = bytearray()  # up to the last bits that are not clear

    def __repr__(self) -> str:
        return f"<qcow2bm.StreamBitmap {self.bitmap_alias!r} of {self.node_alias!r}>"

    @property
    def bits(self) -> int:
        """How many bits there are so far."""
        return ceil_div(self.disk_size, self.granularity)

    def add(self, event: BitmapBits) -> None:
        """Takes the next bits.

        Raises:
            LimitError: QEMU has no bitmap of so many.
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
        """How many guest bytes are dirty, clipped to the disk; so far, while it is not complete."""
        return dirty_bytes(self._octets, self.granularity, self.disk_size)

    def packed(self) -> NDArray[np.uint8]:
        """All bits, uint8[ceil(bits / 8)], least significant bit first, zero past the disk.

        It is a view of what the bitmap holds, and cannot be written to.

        Raises:
            StateError: it is not complete.
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
        """What QEMU's x-debug-block-dirty-bitmap-sha256 gives for the bitmap, in hex.

        Raises:
            StateError: it is not complete.
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

    Memory grows with their bits, up to the last that is set, and with nothing else.

    Attributes:
        all: the bitmaps in the order in which they began, complete or not.
        is_complete: whether the stream came to its end; then every bitmap is complete.
        fault: why nothing more was taken, None if the stream was sound.
    """

    def __init__(self, limit_bytes: int = MAX_BYTES) -> None:
        """``limit_bytes``: how many bytes of bits may come for all bitmaps, clear ones included."""
        self.all: list[StreamBitmap] = []
        self.is_complete = False
        self.fault: FormatError | None = None
        self._limit_bytes = limit_bytes
        self._length = 0

    @property
    def complete(self) -> list[StreamBitmap]:
        """The bitmaps that are complete, and the only ones whose bits can be had."""
        return [bitmap for bitmap in self.all if bitmap.is_complete]

    def add(self, events: Iterable[Event]) -> None:
        """Takes what a `StreamReader` gives.

        Raises:
            LimitError: the bits are too many.
        """
        for event in events:
            if isinstance(event, BitmapBits):
                bitmap = self.all[event.number]
                self._length += ceil_div(event.length, 8 * bitmap.granularity)
                if self._length > self._limit_bytes:
                    what = "the length of all bitmaps of the stream in bytes"
                    raise LimitError(what, self._length, self._limit_bytes)
                bitmap.add(event)
            elif isinstance(event, BitmapBegins):
                self.all.append(StreamBitmap(event))
            elif isinstance(event, BitmapComplete):
                self.all[event.number].is_complete = True
            else:
                self.is_complete = True


def read_stream(pieces: Iterable[bytes], limit_bytes: int = MAX_BYTES) -> StreamBitmaps:
    """The bitmaps of a migration stream that comes in pieces of any size.

    A fault in it, or its early end, does not raise: what was complete before stays, and
    `StreamBitmaps.fault` says what it is. No piece is taken after it.

    Args:
        pieces: the stream. All are taken, also those after the last bitmap: whoever writes
            to the other end of a pipe would fail if nobody read them.
        limit_bytes: how many bytes of bits may come for all bitmaps.

    Raises:
        FormatError: it does not even begin like a migration stream.
        UnsupportedError: what comes before the bitmaps is legal, but cannot be parsed.
        LimitError: the bits, or the bitmaps, are too many.
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
