"""The fixed fields of the header, in versions 2 and 3: parsing and building.

The header extensions are in ``extensions``.

*Spec*: spec/header.md.
"""

from typing import NamedTuple

from construct import Bytes, Const, If, Int8ub, Int32ub, Int64ub, Struct, this

from qcow2bm.errors import FormatError, UnsupportedError
from qcow2bm.format.schema import build, field_offsets, parse

MAGIC = b"QFI\xfb"
V2_LENGTH = 72
V3_LENGTH = 104  # without compression_type
MAX_REFCOUNT_ORDER = 6
MAX_SNAPSHOTS = 65536

_V2 = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
_V3_FIXED = Struct(
    *_V2.subcons,
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
_V3 = Struct(
    *_V3_FIXED.subcons,
    "compression_type" / If(this.header_length > 104, Int8ub),
    "padding" / Bytes(lambda this: max(0, min(this.header_length, 112) - 105)),
    "additional_fields" / Bytes(lambda this: max(0, this.header_length - 112)),
)


FIELD_OFFSETS = field_offsets(_V3_FIXED) | {"compression_type": 104, "padding": 105}
"""The byte offset of each header field, by its name in the specification."""


class Header(NamedTuple):
    """Every field of the header. Fields have their names in the specification.

    In version 2 the fields of version 3 have the values that the specification implies: no
    features, refcount_order 4, header_length 72. If the header is too short for
    ``compression_type`` (0 deflate, 1 zstd), that field is None. ``padding`` is the bytes after
    ``compression_type`` up to byte 112. ``additional_fields`` is the bytes from byte 112 on, which
    are unknown to this library.
    """

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V2_LENGTH
    compression_type: int | None = None
    padding: bytes = b""
    additional_fields: bytes = b""

    @property
    def cluster_size(self) -> int:
        """The size of a cluster in bytes."""
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """The width of a refcount in bits."""
        return 1 << self.refcount_order


def parse_header(data: bytes) -> Header:
    """Parses the header at the start of ``data``, which may be longer than the header.

    If ``header_length`` is below 104 or beyond the end of ``data``, the end of the header is
    unknown. Then the header keeps that ``header_length``, and the fields after it have their
    defaults.

    Raises:
        FormatError: ``data`` has no qcow2 magic, or ends inside the fixed fields.
        UnsupportedError: the version is neither 2 nor 3.
    """
    if not data:
        raise FormatError("header", "magic", 0, "is missing: the file is empty", "copy-again")
    if data[:4] != MAGIC:
        raise FormatError("header", "magic", 0, 'is not "QFI\\xfb": not a qcow2 image')
    fields = parse(_V2, data, "header", 0, FIELD_OFFSETS)
    if fields.version not in (2, 3):
        raise UnsupportedError(f"qcow2 version {fields.version}")
    if fields.version == 3:
        fields = parse(_V3_FIXED, data, "header", 0, FIELD_OFFSETS)
        if V3_LENGTH <= fields.header_length <= len(data):
            fields = parse(_V3, data, "header", 0)
    return Header(**{name: fields[name] for name in Header._fields if name in fields})


def build_header(header: Header) -> bytes:
    """Builds the bytes of the header, which are ``header_length`` bytes.

    Raises:
        FormatError: a value does not fit its field, or its field does not exist in a header of
            this version and length.
    """
    data = build(_V2 if header.version == 2 else _V3, header._asdict(), "header")
    if parse_header(data) != header:
        raise FormatError("header", "", 0, "has values for fields that its length leaves out")
    return data
