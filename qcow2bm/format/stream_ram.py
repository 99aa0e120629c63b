"""The pages of the section ``ram``, which has no length: to get past it, it must be parsed.

*Spec*: spec/stream.md, "RAM".
"""

from __future__ import annotations

from typing import NamedTuple

from construct import Int8ub, Int16ub, Int32ub, Struct

from qcow2bm.format.schema import flat_struct
from qcow2bm.format.stream import U64, parse_string
from qcow2bm.format.stream_buffer import StreamBuffer

RAM = b"ram"
RAM_VERSION = 4

ZERO = 0x002
MEM_SIZE = 0x004
PAGE = 0x008
EOS = 0x010
CONTINUE = 0x020
XBZRLE = 0x040
HOOK = 0x080
COMPRESS = 0x100
MULTIFD_FLUSH = 0x200

_XBZRLE_ENCODING = 1

_XBZRLE = flat_struct(Struct("encoding" / Int8ub, "length" / Int16ub))
_COMPRESSED = flat_struct(Struct("length" / Int32ub))

PAGE_SIZE = 4096
PAGE_BITS = range(10, 17)  # below are the flags


class PageHeader(NamedTuple):
    """An address in a block of memory, or with MEM_SIZE how large all blocks are, and flags."""

    address: int
    flags: int


class Options(NamedTuple):
    """What changes the layout of pages and blocks, as the stream itself says.

    ``has_block_page_size``: huge pages are announced; ``has_block_address``: blocks on shared
    memory are.
    """

    page_size: int = PAGE_SIZE
    has_block_page_size: bool = False
    has_block_address: bool = False


def parse_page(window: StreamBuffer, page_size: int) -> PageHeader:
    """The header of a page, after which comes the next one: its content is passed over.

    Raises:
        FormatError: the flags are none that QEMU sends, or a length is too large.
    """
    (word,) = window.read(U64)
    flags = word & (page_size - 1)  # an address is that of a page
    kind = flags & ~CONTINUE
    if kind in (ZERO, PAGE, XBZRLE, COMPRESS):
        if not flags & CONTINUE:
            parse_string(window)
        _skip_page(window, kind, page_size)
    elif kind not in (MEM_SIZE, EOS, MULTIFD_FLUSH) and not kind & HOOK:
        window.reject("ram page", "flags", f"is {flags:#x}, which is unknown", 8)
    return PageHeader(word - flags, kind)


def _skip_page(window: StreamBuffer, kind: int, page_size: int) -> None:
    if kind == ZERO:
        window.skip(1)
    elif kind == PAGE:
        window.skip(page_size)
    elif kind == XBZRLE:
        encoding, length = window.read(_XBZRLE)
        if encoding != _XBZRLE_ENCODING or length > page_size:
            window.reject("ram page", "xbzrle header", f"is {encoding}, {length}", 3)
        window.skip(length)
    else:
        (length,) = window.read(_COMPRESSED)
        if length > 2 * page_size:  # zlib's own limit lies a little above one page
            window.reject("ram page", "compressed length", f"is {length}", 4)
        window.skip(length)


def parse_block(window: StreamBuffer, options: Options) -> int:
    """How many bytes a block of memory has, from the list that follows MEM_SIZE."""
    parse_string(window)
    (length,) = window.read(U64)
    # Only blocks of huge pages have this: what else may follow begins with a name's length,
    # which is not 0, or is a page header with flags.
    if options.has_block_page_size and window.peek() == 0:
        (word,) = window.read(U64)
        if word & (options.page_size - 1):
            window.position -= U64.size
    if options.has_block_address:
        window.read(U64)
    return length
