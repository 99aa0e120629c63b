"""What has come of a stream: records are parsed from it, or wait for more to come."""

from __future__ import annotations

import struct
from typing import NoReturn

from qcow2bm.errors import FormatError


class NeedDataError(Exception):
    """The rest of the record has not come yet."""


class StreamBuffer:
    """What has come of a stream and is not parsed yet.

    The parse functions advance it, and raise `NeedDataError` where a record goes on beyond it.

    Attributes:
        position: of what is to be parsed next, in ``data``.
    """

    __slots__ = ("_base", "_mark", "data", "position")

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.position = self._mark = self._base = 0

    def feed(self, data: bytes) -> None:
        """Adds what has come; forgets what is parsed."""
        self._base += self.position
        rest = self.data[self.position :]
        self.data = rest + data if rest else data
        self.position = self._mark = 0

    def commit(self) -> None:
        """What is parsed so far will not be parsed again."""
        self._mark = self.position

    def rewind(self) -> None:
        """Goes back to where `commit` was called last."""
        self.position = self._mark

    @property
    def offset(self) -> int:
        """The position as an offset in the stream."""
        return self._base + self.position

    @property
    def start(self) -> int:
        """The offset in the stream of the last `commit`: where the record begins."""
        return self._base + self._mark

    @property
    def length(self) -> int:
        """How many bytes are there."""
        return len(self.data) - self.position

    def peek(self) -> int:
        """The next byte, which stays."""
        if self.position >= len(self.data):
            raise NeedDataError
        return self.data[self.position]

    def read(self, layout: struct.Struct) -> tuple[int, ...]:
        """The next integers."""
        try:
            values = layout.unpack_from(self.data, self.position)
        except struct.error:
            raise NeedDataError from None
        self.position += layout.size
        return values

    def take(self, length: int) -> bytes:
        """The next bytes."""
        stop = self.position + length
        if stop > len(self.data):
            raise NeedDataError
        data = self.data[self.position : stop]
        self.position = stop
        return data

    def skip(self, length: int) -> None:
        """Passes over the next bytes, all of which must have come."""
        if length > len(self.data) - self.position:
            raise NeedDataError
        self.position += length

    def reject(self, structure: str, field: str, reason: str, back: int = 0) -> NoReturn:
        """Raises `FormatError` about a field that begins ``back`` bytes before the position."""
        raise FormatError(structure, field, self.offset - back, reason)
