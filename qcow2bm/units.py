"""Sizes in bytes, alignment, and names: encoding them, and escaping them for printing."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(0x[0-9a-fA-F]{1,16})|([0-9]{1,20})(?:([kKMGTPE])(?:iB)?)?")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def ceil_div(dividend: int, divisor: int) -> int:
    """Returns the quotient, rounded up."""
    return -(-dividend // divisor)


def align_up(value: int, alignment: int) -> int:
    """Returns the smallest multiple of ``alignment`` that is not below ``value``."""
    return -(-value // alignment) * alignment


def format_size(size_bytes: int) -> str:
    """Formats a size for people: ``64 KiB``, ``1.5 MiB``, ``512 bytes``."""
    exponent = max(0, min((size_bytes.bit_length() - 1) // 10, len(_UNITS) - 1))
    scaled = size_bytes / (1 << (10 * exponent))
    text = f"{scaled:.1f}".removesuffix(".0") if scaled < 1000 else f"{scaled:.0f}"
    return f"{text} {'byte' if size_bytes == 1 else _UNITS[exponent]}"


def parse_size(text: str) -> int:
    """Parses a number of bytes: ``65536``, ``0x10000``, ``64k``, ``1M``, ``2GiB``.

    Raises:
        ValueError: ``text`` is not a size.
    """
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f'"{escape(text)}" is not a size: write 65536, 64k, 1M, 2G or 1T')
    if found[1]:
        return int(found[1], 16)
    exponent = " KMGTPE".index((found[3] or " ").upper())
    return int(found[2]) << 10 * exponent


def decode_name(data: bytes) -> str:
    """Decodes a stored name; bytes that are not UTF-8 become surrogates (PEP 383)."""
    return data.decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    """Encodes a name as it is stored, the reverse of `decode_name`.

    Raises:
        TypeError: ``name`` is not a str.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name must be str, not {type(name).__name__}")
    return name.encode("utf-8", "surrogateescape")


def escape(text: str) -> str:
    r"""Escapes text from an image or a file name, so that it is safe to print.

    Control characters, characters that a terminal would not show, the quote and the backslash are
    escaped: ``\n``, ``\x1b``, ``\"``. A byte that is not UTF-8 (a surrogate in ``text``) becomes
    ``\xNN``.
    """
    if text.isprintable() and '"' not in text and "\\" not in text:
        return text
    return "".join(_escape_character(character) for character in text)


def _escape_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    if 0x80 <= code <= 0xFF:  # "\x85" would stand for a byte that is not UTF-8
        return f"\\u{code:04x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
