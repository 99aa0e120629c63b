"""A buffer of received bytes of a stream, from which whole records are parsed.

The records themselves are in ``stream``, ``stream_bitmap`` and ``stream_ram``.
"""

from __future__ import annotations

import struct
from typing import NoReturn

from qcow2bm.errors import FormatError


class NeedDataError(Exception):
    """The record goes on beyond the bytes received so far: parse it again when more have come."""


class StreamBuffer:
    """The received bytes of a stream that are not parsed yet.

    The parse functions advance ``position``. If a record goes on beyond the received bytes, they
    raise `NeedDataError`.

    Attributes:
        data: the received bytes.
        position: the index in ``data`` of the next byte to parse.
    """

    __slots__ = ("_base", "_mark", "data", "position")

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.position = self._mark = self._base = 0

    def feed(self, data: bytes) -> None:
        """Appends received bytes, and drops the bytes that are parsed already."""
        self._base += self.position
        rest = self.data[self.position :]
        self.data = rest + data if rest else data
        self.position = self._mark = 0

    def commit(self) -> None:
        """Marks the position, to which `rewind` goes back: all before it is parsed for good."""
        self._mark = self.position

    def rewind(self) -> None:
        """Goes back to the position of the last `commit`."""
        self.position = self._mark

    @property
    def offset(self) -> int:
        """The position as an offset in the stream."""
        return self._base + self.position

    @property
    def start(self) -> int:
        """The offset in the stream of the last `commit`, where the present record begins."""
        return self._base + self._mark

    @property
    def length(self) -> int:
        """The number of received bytes that are not parsed yet."""
        return len(self.data) - self.position

    def peek(self) -> int:
        """Returns the next byte without advancing."""
        if self.position >= len(self.data):
            raise NeedDataError
        return self.data[self.position]

    def read(self, layout: struct.Struct) -> tuple[int, ...]:
        """Parses the next integers, as many as ``layout`` has."""
        try:
            values = layout.unpack_from(self.data, self.position)
        except struct.error:
            raise NeedDataError from None
        self.position += layout.size
        return values

    def take(self, length: int) -> bytes:
        """Returns the next ``length`` bytes and advances past them."""
        stop = self.position + length
        if stop > len(self.data):
            raise NeedDataError
        data = self.data[self.position : stop]
        self.position = stop
        return data

    def skip(self, length: int) -> None:
        """Advances past the next ``length`` bytes."""
        if length > len(self.data) - self.position:
            raise NeedDataError
        self.position += length

    def reject(self, structure: str, field: str, reason: str, back: int = 0) -> NoReturn:
        """Raises `FormatError` for a field that begins ``back`` bytes before the position."""
        raise FormatError(structure, field, self.offset - back, reason)
