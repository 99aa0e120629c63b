"""The header extensions: the area they lie in, and the small ones' contents.

*Spec*: spec/header.md, "Header extensions", and spec/bitmaps.md, "Bitmaps extension".
"""

from typing import NamedTuple

from construct import Bytes, Int32ub, Int64ub, Rebuild, Struct, len_, this

from qcow2bm.errors import FormatError
from qcow2bm.format.schema import build, flat_struct, parse

END = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
CRYPTO = 0x0537BE77
DATA_FILE = 0x44415441
GENERATION = 0x51424D47
"""This library's own: who wrote to the image last, see spec/lifecycle.md."""
PADDING = 0x51424D50
"""This library's own: data without meaning, there only while an interrupted change waits."""

NAMES = {
    BACKING_FORMAT: "backing format",
    FEATURE_NAMES: "feature name table",
    BITMAPS: "bitmaps",
    CRYPTO: "crypto header",
    DATA_FILE: "external data file name",
    GENERATION: "generation of qcow2bm",
    PADDING: "padding of qcow2bm",
}

_HEAD = Struct("type" / Int32ub, "length" / Int32ub)
EXTENSION = Struct(
    "type" / Int32ub,
    "length" / Rebuild(Int32ub, len_(this.data)),
    "data" / Bytes(this.length),
)
_BITMAPS = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "bitmap_directory_size" / Int64ub,
    "bitmap_directory_offset" / Int64ub,
)
_CRYPTO = Struct("offset" / Int64ub, "length" / Int64ub)
TOKEN_LENGTH = 16
_GENERATION = Struct("token" / Bytes(TOKEN_LENGTH), "counter" / Int64ub)

# Into the largest cluster go 262,144 empty ones; construct would need seconds for them.
_READ_HEAD = flat_struct(_HEAD)
HEAD_LENGTH = _READ_HEAD.size
BITMAPS_LENGTH = _BITMAPS.sizeof()
CRYPTO_LENGTH = _CRYPTO.sizeof()
GENERATION_LENGTH = _GENERATION.sizeof()


class HeaderExtension(NamedTuple):
    """One header extension.

    ``padding`` is what stands between the data and the next multiple of 8, zero unless
    something is odd. The data of a string extension is not NUL-terminated.
    """

    type: int
    data: bytes
    padding: bytes

    @property
    def name(self) -> str | None:
        """What the specification calls it, None for an unknown type."""
        return NAMES.get(self.type)

    @property
    def size(self) -> int:
        """How many bytes it occupies, with its head of 8 bytes and its padding."""
        return HEAD_LENGTH + len(self.data) + len(self.padding)


class HeaderExtensions(NamedTuple):
    """The header extension area.

    ``end`` is the end marker as it stands in the file, 8 bytes, or empty where the area ends
    without one. ``fault`` says why reading stopped before, None if it did not.
    """

    extensions: tuple[HeaderExtension, ...]
    end: bytes
    fault: FormatError | None = None

    def offsets(self, start: int) -> tuple[int, ...]:
        """The host offset of each extension's head; ``start`` is where the area begins."""
        offsets = []
        for extension in self.extensions:
            offsets.append(start)
            start += extension.size
        return tuple(offsets)

    def payload_offset(self, type: int, start: int) -> int | None:
        """The host offset of the data of the last extension of a type; None if there is none.

        QEMU uses the last extension of a type. ``start`` is the host offset of the area.
        """
        found = None
        for extension, offset in zip(self.extensions, self.offsets(start), strict=True):
            if extension.type == type:
                found = offset + HEAD_LENGTH
        return found


class BitmapsExtension(NamedTuple):
    """The data of the bitmaps extension, 24 bytes."""

    nb_bitmaps: int
    reserved: int
    bitmap_directory_size: int
    bitmap_directory_offset: int


class Generation(NamedTuple):
    """The data of the generation extension, 24 bytes.

    ``token`` is drawn anew by every writer that knows it, and never comes again; ``counter`` says
    how often, for people to look at.
    """

    token: bytes
    counter: int


class CryptoHeader(NamedTuple):
    """The data of the crypto header extension: where the encryption header lies."""

    offset: int
    length: int


def parse_extensions(data: bytes, start: int = 0) -> HeaderExtensions:
    """The header extensions in ``data``: all bytes from the header's end to the area's end.

    ``start`` is the host offset of ``data``. What follows the end marker is not looked at.
    A fault does not raise: what was read before it is kept.
    """
    extensions: list[HeaderExtension] = []
    position = 0
    while position < len(data):
        left = len(data) - position - HEAD_LENGTH
        if left < 0:
            fault = _fault(start + position, f"is not there: {len(data) - position} bytes are left")
            return HeaderExtensions(tuple(extensions), b"", fault)
        type, length = _READ_HEAD.unpack_from(data, position)
        if length > left:
            reason = f"is {length}, but only {left} bytes follow"
            return HeaderExtensions(tuple(extensions), b"", _fault(start + position + 4, reason))
        place = position + HEAD_LENGTH
        if type == END:
            return HeaderExtensions(tuple(extensions), data[position:place])
        stop = place + length
        position = min(stop + -length % 8, len(data))
        extensions.append(HeaderExtension(type, data[place:stop], data[stop:position]))
    return HeaderExtensions(tuple(extensions), b"")


def _fault(offset: int, reason: str) -> FormatError:
    return FormatError("header extension", "length", offset, reason)


def build_extensions(area: HeaderExtensions) -> bytes:
    """The bytes of the extension area up to and including its end marker.

    Raises:
        FormatError: a type does not fit its field, or padding or ``end`` are not what
            `parse_extensions` would find there.
    """
    parts = [
        build(EXTENSION, extension._asdict(), "header extension") + extension.padding
        for extension in area.extensions
    ]
    data = b"".join(parts)
    is_end = not area.end or (len(area.end) == HEAD_LENGTH and area.end[:4] == bytes(4))
    if not is_end or parse_extensions(data) != HeaderExtensions(area.extensions, b""):
        raise FormatError("header extension", "", 0, "area has padding or an end out of place")
    return data + area.end


def parse_bitmaps_extension(data: bytes, offset: int = 0) -> BitmapsExtension:
    """The bitmaps extension in its 24 bytes of data; ``offset`` is their host offset.

    Raises:
        FormatError: ``data`` has another length.
    """
    if len(data) != BITMAPS_LENGTH:
        raise FormatError(
            "bitmaps extension", "length", offset - 4, f"is {len(data)}, must be {BITMAPS_LENGTH}"
        )
    fields = parse(_BITMAPS, data, "bitmaps extension", offset)
    return BitmapsExtension(*(fields[name] for name in BitmapsExtension._fields))


def build_bitmaps_extension(extension: BitmapsExtension) -> bytes:
    """The 24 bytes of data of the bitmaps extension.

    Raises:
        FormatError: a value does not fit its field.
    """
    return build(_BITMAPS, extension._asdict(), "bitmaps extension")


def parse_crypto_header(data: bytes, offset: int = 0) -> CryptoHeader:
    """The crypto header extension in its 16 bytes of data; ``offset`` is their host offset.

    Raises:
        FormatError: ``data`` has another length.
    """
    if len(data) != CRYPTO_LENGTH:
        reason = f"is {len(data)}, must be {CRYPTO_LENGTH}"
        raise FormatError("crypto header extension", "length", offset - 4, reason)
    fields = parse(_CRYPTO, data, "crypto header extension", offset)
    return CryptoHeader(fields.offset, fields.length)


def build_crypto_header(header: CryptoHeader) -> bytes:
    """The 16 bytes of data of the crypto header extension.

    Raises:
        FormatError: a value does not fit its field.
    """
    return build(_CRYPTO, header._asdict(), "crypto header extension")


def parse_generation(data: bytes, offset: int = 0) -> Generation:
    """The generation in the 24 bytes of its extension; ``offset`` is their host offset.

    Raises:
        FormatError: ``data`` has another length.
    """
    if len(data) != GENERATION_LENGTH:
        reason = f"is {len(data)}, must be {GENERATION_LENGTH}"
        raise FormatError("generation extension", "length", offset - 4, reason)
    fields = parse(_GENERATION, data, "generation extension", offset)
    return Generation(fields.token, fields.counter)


def build_generation(generation: Generation) -> bytes:
    """The 24 bytes of data of the generation extension.

    Raises:
        FormatError: a value does not fit its field.
    """
    return build(_GENERATION, generation._asdict(), "generation extension")
