"""Arrays of big-endian unsigned integers, the form of all tables in an image."""

from __future__ import annotations

import sys
from array import array


def parse_words(data: bytes, typecode: str = "Q") -> array[int]:
    """Parses ``data`` as big-endian integers of the size that ``typecode`` has in ``array``.

    Raises:
        ValueError: ``data`` is not a whole number of integers.
    """
    words = array(typecode, data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def build_words(words: array[int]) -> bytes:
    """Builds the bytes of ``words`` as big-endian integers."""
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()
