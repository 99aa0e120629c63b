"""The pages and blocks of the section ``ram`` in a migration stream, parsed to be skipped.

The section does not state its length, so a reader must parse the section to find its end.

*Spec*: spec/stream.md, "RAM".
"""

from __future__ import annotations

from typing import NamedTuple

from construct import Int8ub, Int16ub, Int32ub, Int64ub, Struct

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

_MAPPED_BLOCK = Struct(
    "version" / Int32ub,
    "page_size" / Int64ub,
    "bitmap_offset" / Int64ub,
    "pages_offset" / Int64ub,
)
_MAPPED = flat_struct(_MAPPED_BLOCK)
_MAPPED_VERSION = 1

PAGE_SIZE = 4096
PAGE_BITS = range(10, 17)  # the bits below the page size hold the flags


class PageHeader(NamedTuple):
    """The address and flags of a page; with MEM_SIZE, ``address`` is the size of all blocks."""

    address: int
    flags: int


class Options(NamedTuple):
    """The facts in a stream that change the layout of pages and blocks.

    If ``has_block_page_size``, blocks of huge pages state their page size. If
    ``has_block_address``, every block states its address. If ``is_mapped``, the pages of a block
    are not in records, but follow the block, after a bitmap and a gap.
    """

    page_size: int = PAGE_SIZE
    has_block_page_size: bool = False
    has_block_address: bool = False
    is_mapped: bool = False


def parse_page(buffer: StreamBuffer, page_size: int) -> PageHeader:
    """Parses the header of a page and skips the content of the page.

    Raises:
        FormatError: QEMU does not send such flags, or a length is too large.
    """
    (word,) = buffer.read(U64)
    flags = word & (page_size - 1)  # an address is a multiple of the page size
    kind = flags & ~CONTINUE
    if kind in (ZERO, PAGE, XBZRLE, COMPRESS):
        if not flags & CONTINUE:
            parse_string(buffer)
        _skip_page(buffer, kind, page_size)
    elif kind not in (MEM_SIZE, EOS, MULTIFD_FLUSH) and not kind & HOOK:
        buffer.reject("ram page", "flags", f"is {flags:#x}, which is unknown", 8)
    return PageHeader(word - flags, kind)


def _skip_page(buffer: StreamBuffer, kind: int, page_size: int) -> None:
    if kind == ZERO:
        buffer.skip(1)
    elif kind == PAGE:
        buffer.skip(page_size)
    elif kind == XBZRLE:
        encoding, length = buffer.read(_XBZRLE)
        if encoding != _XBZRLE_ENCODING or length > page_size:
            buffer.reject("ram page", "xbzrle header", f"is {encoding}, {length}", 3)
        buffer.skip(length)
    else:
        (length,) = buffer.read(_COMPRESSED)
        if length > 2 * page_size:  # zlib makes a page a little larger at most
            buffer.reject("ram page", "compressed length", f"is {length}", 4)
        buffer.skip(length)


def parse_block(buffer: StreamBuffer, options: Options) -> int:
    """Parses one block of the list that follows MEM_SIZE; returns its size in bytes."""
    parse_string(buffer)
    (length,) = buffer.read(U64)
    # Only a block of huge pages states its page size. Otherwise the length of a name follows, which
    # is not 0, or a page header, whose flags are not 0.
    if options.has_block_page_size and buffer.peek() == 0:
        (word,) = buffer.read(U64)
        if word & (options.page_size - 1):
            buffer.position -= U64.size
    if options.has_block_address:
        buffer.read(U64)
    return length


def parse_mapped_block(buffer: StreamBuffer, length: int) -> int:
    """Parses the header between a block of so many bytes and its pages.

    Returns:
        The offset in the stream of the first byte behind the pages.

    Raises:
        FormatError: the version is unknown, or the bitmap or the pages are not behind the header.
    """
    version, _, bitmap_offset, pages_offset = buffer.read(_MAPPED)
    if version != _MAPPED_VERSION:
        reason = f"is {version}, must be {_MAPPED_VERSION}"
        buffer.reject("mapped ram block", "version", reason, _MAPPED.size)
    if not buffer.offset <= bitmap_offset <= pages_offset:
        reason = f"is {pages_offset}, not behind the bitmap at {bitmap_offset}"
        buffer.reject("mapped ram block", "pages_offset", reason, U64.size)
    return pages_offset + length
