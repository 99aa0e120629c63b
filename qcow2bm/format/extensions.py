"""The header extensions: their area, and the data of the extensions with a fixed length.

The data of the feature name table is parsed in ``features``.

*Spec*: spec/header.md, "Header extensions", and spec/bitmaps.md, "Bitmaps extension".
"""

from typing import Any, NamedTuple

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
"""An extension of this library: it identifies the last writer, see spec/lifecycle.md."""
PADDING = 0x51424D50
"""An extension of this library: meaningless bytes, left by an interrupted change of the header."""

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

# The largest cluster has room for 262,144 empty extensions. construct would need seconds for them.
_READ_HEAD = flat_struct(_HEAD)
HEAD_LENGTH = _READ_HEAD.size
BITMAPS_LENGTH = _BITMAPS.sizeof()
CRYPTO_LENGTH = _CRYPTO.sizeof()
GENERATION_LENGTH = _GENERATION.sizeof()


class HeaderExtension(NamedTuple):
    """One header extension.

    ``padding`` is the bytes between the end of the data and the next multiple of 8. In a correct
    image the padding is zero. Text in an extension does not end with a NUL byte.
    """

    type: int
    data: bytes
    padding: bytes

    @property
    def name(self) -> str | None:
        """The name of the type in the specification; None for an unknown type."""
        return NAMES.get(self.type)

    @property
    def size(self) -> int:
        """The number of bytes that the extension occupies, with its head (8 bytes) and padding."""
        return HEAD_LENGTH + len(self.data) + len(self.padding)


class HeaderExtensions(NamedTuple):
    """The header extension area.

    ``end`` is the end marker as it stands in the file, 8 bytes; it is empty if the area ends
    without an end marker. ``fault`` is the error that ended parsing before the end of the area, or
    None.
    """

    extensions: tuple[HeaderExtension, ...]
    end: bytes
    fault: FormatError | None = None

    def offsets(self, start: int) -> tuple[int, ...]:
        """The host offset of the head of each extension; ``start`` is that of the area."""
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

    Every writer that knows the extension stores a new random ``token`` that was never used before.
    ``counter`` is the number of tokens stored so far; it is for people who look at the image.
    """

    token: bytes
    counter: int


class CryptoHeader(NamedTuple):
    """The data of the crypto header extension: host offset and length of the encryption header."""

    offset: int
    length: int


def parse_extensions(data: bytes, start: int = 0) -> HeaderExtensions:
    """Parses the header extensions in ``data``, which ends where their area ends.

    ``start`` is the host offset of ``data``. Bytes after the end marker are ignored. A fault is not
    raised: it becomes the ``fault`` of the result, which has the extensions before the fault.
    """
    extensions: list[HeaderExtension] = []
    position = 0
    while position < len(data):
        left = len(data) - position - HEAD_LENGTH
        if left < 0:
            fault = _fault(start + position, f"is missing: {len(data) - position} bytes are left")
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
    """Builds the bytes of the extension area up to and including its end marker.

    Raises:
        FormatError: a type does not fit its field, or `parse_extensions` would not find the same
            ``padding`` or ``end``.
    """
    parts = [
        build(EXTENSION, extension._asdict(), "header extension") + extension.padding
        for extension in area.extensions
    ]
    data = b"".join(parts)
    is_end = not area.end or (len(area.end) == HEAD_LENGTH and area.end[:4] == bytes(4))
    if not is_end or parse_extensions(data) != HeaderExtensions(area.extensions, b""):
        raise FormatError(
            "header extension", "", 0, "area has padding or an end marker in the wrong place"
        )
    return data + area.end


def _parse_exactly(schema: Any, data: bytes, structure: str, offset: int) -> Any:  # noqa: ANN401
    length = schema.sizeof()
    if len(data) != length:
        reason = f"is {len(data)}, must be {length}"
        raise FormatError(structure, "length", offset - 4, reason)
    return parse(schema, data, structure, offset)


def parse_bitmaps_extension(data: bytes, offset: int = 0) -> BitmapsExtension:
    """Parses the 24 bytes of data of the bitmaps extension; ``offset`` is their host offset.

    Raises:
        FormatError: ``data`` has another length.
    """
    fields = _parse_exactly(_BITMAPS, data, "bitmaps extension", offset)
    return BitmapsExtension(*(fields[name] for name in BitmapsExtension._fields))


def build_bitmaps_extension(extension: BitmapsExtension) -> bytes:
    """Builds the 24 bytes of data of the bitmaps extension.

    Raises:
        FormatError: a value does not fit its field.
    """
    return build(_BITMAPS, extension._asdict(), "bitmaps extension")


def parse_crypto_header(data: bytes, offset: int = 0) -> CryptoHeader:
    """Parses the 16 bytes of data of the crypto header extension; ``offset`` is their host offset.

    Raises:
        FormatError: ``data`` has another length.
    """
    fields = _parse_exactly(_CRYPTO, data, "crypto header extension", offset)
    return CryptoHeader(fields.offset, fields.length)


def build_crypto_header(header: CryptoHeader) -> bytes:
    """Builds the 16 bytes of data of the crypto header extension.

    Raises:
        FormatError: a value does not fit its field.
    """
    return build(_CRYPTO, header._asdict(), "crypto header extension")


def parse_generation(data: bytes, offset: int = 0) -> Generation:
    """Parses the 24 bytes of data of the generation extension; ``offset`` is their host offset.

    Raises:
        FormatError: ``data`` has another length.
    """
    fields = _parse_exactly(_GENERATION, data, "generation extension", offset)
    return Generation(fields.token, fields.counter)


def build_generation(generation: Generation) -> bytes:
    """Builds the 24 bytes of data of the generation extension.

    Raises:
        FormatError: a value does not fit its field.
    """
    return build(_GENERATION, generation._asdict(), "generation extension")
