"""Bitmaps in QEMU's migration stream: reading them out of one, and writing one with bitmaps.

>>> from qcow2bm import stream
>>> with open("state.bin", "rb") as file:                        # doctest: +SKIP
...     for bitmap in stream.read([file.read()]).complete:
...         print(bitmap.bitmap_alias, bitmap.dirty_bytes)

A bitmap from a stream gets into an image by way of `saved` and `qcow2bm.sidecar.restore`.

*Spec*: spec/stream.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.migration.stream_bitmaps import MAX_BYTES, StreamBitmap, StreamBitmaps, read_stream
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream

if TYPE_CHECKING:
    from qcow2bm.api.bitmap import Bitmap

__all__ = [
    "MAX_BYTES",
    "OutgoingBitmap",
    "SavedBitmap",
    "StreamBitmap",
    "StreamBitmaps",
    "outgoing",
    "read",
    "saved",
    "write",
]


def read(pieces: Iterable[bytes], limit_bytes: int = MAX_BYTES) -> StreamBitmaps:
    """Reads the bitmaps of a migration stream.

    Args:
        pieces: the bytes of the stream, in order, in pieces of any size. All pieces are taken,
            unless the stream has a fault.
        limit_bytes: how many bytes of bits the bitmaps may have together.

    Returns:
        All bitmaps, complete or not. If the stream breaks the format or ends early,
        `StreamBitmaps.fault` says where.

    Raises:
        FormatError: the bytes do not begin like a migration stream.
        UnsupportedError: what precedes the bitmaps is legal, but cannot be parsed.
        LimitError: there are too many bitmaps, or too many bits.
    """
    return read_stream(pieces, limit_bytes)


def outgoing(bitmap: Bitmap, node_alias: str, *, persistent: bool = True) -> OutgoingBitmap:
    """Returns a bitmap of an image as `write` takes it.

    Args:
        bitmap: a bitmap that is valid.
        node_alias: the name of the disk in the stream, by which the receiver finds its node.
        persistent: whether the receiver is to store the bitmap in its image.

    Raises:
        As `Bitmap.packed` does.
    """
    bits = bitmap.packed().data
    return OutgoingBitmap(
        node_alias, bitmap.name, bitmap.granularity, bitmap.auto, persistent, bits, bitmap.disk_size
    )


def write(bitmaps: Iterable[OutgoingBitmap], machine: str | None) -> Iterator[bytes]:
    """Returns the bytes of a migration stream that carries these bitmaps and nothing else.

    A machine that takes in the stream with ``-incoming`` gets no memory and no device state: the
    machine boots cold, with the bitmaps in memory.

    Args:
        bitmaps: the bitmaps, in order.
        machine: the machine type as QEMU calls it in full, such as ``pc-i440fx-7.2``; the
            receiver refuses another one. None for the sections of the bitmaps alone, which QEMU
            does not take.

    Returns:
        The stream in pieces; memory does not grow with the bitmaps.

    Raises:
        BitmapError: a name or a granularity cannot be sent, or two bitmaps have one name.
        ValueError: another value cannot be sent.
    """
    return write_stream(tuple(bitmaps), machine)


def saved(bitmap: StreamBitmap, name: str | None = None) -> SavedBitmap:
    """Returns a complete bitmap of a stream as `qcow2bm.sidecar.restore` takes it.

    Args:
        bitmap: a bitmap that is complete.
        name: the name it is to have; by default its alias in the stream.

    Raises:
        StateError: the bitmap is not complete.
    """
    name = bitmap.bitmap_alias if name is None else name
    bits = bitmap.packed().data
    return SavedBitmap(name, bitmap.granularity, bitmap.enabled, bitmap.disk_size, bits)
