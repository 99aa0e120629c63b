"""Takes a file of this library apart, which arrives in pieces and ends in its digest.

*Spec*: spec/sidecar.md; spec/repair.md, "Undo file".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from qcow2bm.errors import FormatError

DIGEST_BYTES = hashlib.sha256().digest_size

_PIECE = 1 << 20


class PieceSource:
    """Takes bytes in order, and computes the SHA-256 of those that were taken.

    *Guarantees*: beside the bytes that a method returns, memory holds one piece.

    Attributes:
        offset: how many bytes were taken.
    """

    def __init__(self, structure: str, pieces: Iterable[bytes]) -> None:
        """``structure`` names the file in errors; ``pieces`` are of any size."""
        self.offset = 0
        self._structure = structure
        self._pieces = iter(pieces)
        self._waiting = bytearray()
        self._digest = hashlib.sha256()

    def take(self, length: int) -> bytes:
        """Returns the next ``length`` bytes.

        Raises:
            FormatError: the file ends before.
        """
        data = self._take(length)
        self._digest.update(data)
        return data

    def pieces(self, length: int) -> Iterator[bytes]:
        """Yields the next ``length`` bytes, piece by piece; the caller has to take all."""
        while length:
            piece = self.take(min(length, _PIECE))
            length -= len(piece)
            yield piece

    def take_digest(self) -> None:
        """Takes the digest of all that was taken before.

        Raises:
            FormatError: the digest is another, or the file ends before.
        """
        place, expected = self.offset, self._digest.digest()
        if self._take(DIGEST_BYTES) != expected:
            reason = "does not match: the file is damaged"
            raise FormatError(self._structure, "sha256", place, reason)

    def rest(self, limit: int) -> bytes:
        """Returns all that follows, but at most ``limit`` bytes and one."""
        self._fill(limit + 1)
        return bytes(self._waiting[: limit + 1])

    def _take(self, length: int) -> bytes:
        if not self._fill(length):
            end = self.offset + len(self._waiting)
            raise FormatError(self._structure, "", end, "is cut off: copy it again")
        data = bytes(self._waiting[:length])
        del self._waiting[:length]
        self.offset += length
        return data

    def _fill(self, length: int) -> bool:
        """Receives bytes until ``length`` of them wait; returns whether there are so many."""
        while len(self._waiting) < length:
            piece = next(self._pieces, None)
            if piece is None:
                return False
            self._waiting += piece
        return True
