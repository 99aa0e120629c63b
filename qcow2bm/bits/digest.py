"""The digest with which QEMU and this library compare bitmaps.

*Spec*: spec/bitmaps.md, "Bitmap data".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qcow2bm.units import ceil_div

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ZEROES = bytes(1 << 16)


def sha256(pieces: Iterable[Buffer], bits: int) -> str:
    """Returns the SHA-256 of ``bits`` bits as whole 64-bit little-endian words, in hex.

    There is at least one word, and the last word is filled up with clear bits. ``pieces`` are the
    packed bits in order, the least significant bit first. Bits after the last piece count as clear.
    """
    digest = hashlib.sha256()
    left = 8 * max(1, ceil_div(bits, 64))
    for piece in pieces:
        digest.update(piece)
        left -= memoryview(piece).nbytes
    for start in range(0, left, len(_ZEROES)):
        digest.update(_ZEROES[: left - start])
    return digest.hexdigest()
