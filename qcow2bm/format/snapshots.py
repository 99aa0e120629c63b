"""The entries of the snapshot table: parsing, building, and measuring without parsing.

*Spec*: spec/refcounts.md, "Snapshot table".
"""

from typing import Any, NamedTuple

from construct import Bytes, Int16ub, Int32ub, Int64ub, Rebuild, Struct, len_, this

from qcow2bm.errors import FormatError
from qcow2bm.format.schema import build, field_offsets, flat_struct
from qcow2bm.format.words import parse_words
from qcow2bm.units import align_up

MIN_EXTRA_DATA_SIZE, MAX_EXTRA_DATA_SIZE = 16, 1024
MAX_TABLE_SIZE = 64 << 20

_HEAD = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_str_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)
_SIZES = {
    "id_str_size": "id_str_size" / Rebuild(Int16ub, len_(this.id_str)),
    "name_size": "name_size" / Rebuild(Int16ub, len_(this.name)),
    "extra_data_size": "extra_data_size" / Rebuild(Int32ub, len_(this.extra_data)),
}
SNAPSHOT = Struct(
    *(_SIZES.get(str(field.name), field) for field in _HEAD.subcons),
    "extra_data" / Bytes(this.extra_data_size),
    "id_str" / Bytes(this.id_str_size),
    "name" / Bytes(this.name_size),
    "padding" / Bytes(lambda this: -(this.extra_data_size + this.id_str_size + this.name_size) % 8),
)

# Extra data may end before any of these fields, or have more behind them.
EXTRA_DATA = Struct("vm_state_size" / Int64ub, "disk_size" / Int64ub, "icount" / Int64ub)
_EXTRA_FIELDS = tuple(field_offsets(EXTRA_DATA))
NO_ICOUNT = (1 << 64) - 1

FIELD_OFFSETS = field_offsets(_HEAD)
# A table may have 65,536 entries. construct would need seconds to parse that many.
_READ_HEAD = flat_struct(_HEAD)
HEAD_LENGTH = _READ_HEAD.size


class SnapshotHeader(NamedTuple):
    """One snapshot table entry. Fields have their names in the specification."""

    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    extra_data: bytes
    id_str: bytes
    name: bytes
    padding: bytes

    @property
    def size(self) -> int:
        """The number of bytes that the entry occupies in the snapshot table."""
        tail = len(self.extra_data) + len(self.id_str) + len(self.name) + len(self.padding)
        return HEAD_LENGTH + tail

    @property
    def extra_fields(self) -> dict[str, int]:
        """The fields that the extra data have, by their names in the specification."""
        whole = len(self.extra_data) // 8 * 8
        return dict(zip(_EXTRA_FIELDS, parse_words(self.extra_data[:whole]), strict=False))


class SnapshotMeasure(NamedTuple):
    """The sizes in bytes of an entry, its padding and its extra data; the place of its L1 table.

    The padding is a part of the entry. QEMU does not write the padding of the last entry.
    """

    size: int
    padding_size: int
    extra_data_size: int
    l1_table_offset: int
    l1_size: int


def measure_entry(head: bytes) -> SnapshotMeasure:
    """Measures an entry by its first 40 bytes, ``head``."""
    fields = dict(zip(FIELD_OFFSETS, _READ_HEAD.unpack(head), strict=True))
    extra = fields["extra_data_size"]
    tail = extra + fields["id_str_size"] + fields["name_size"]
    size = HEAD_LENGTH + align_up(tail, 8)
    return SnapshotMeasure(size, -tail % 8, extra, fields["l1_table_offset"], fields["l1_size"])


def parse_snapshot_table(data: bytes, nb_snapshots: int, offset: int) -> tuple[SnapshotHeader, ...]:
    """Parses the first ``nb_snapshots`` entries in ``data``; ``offset`` is its host offset.

    Raises:
        FormatError: an entry is cut off, or has more than 1024 bytes of extra data.
    """
    snapshots = []
    position = 0
    for number in range(nb_snapshots):
        head = data[position : position + HEAD_LENGTH]
        size = measure_entry(head).size if len(head) == HEAD_LENGTH else HEAD_LENGTH
        structure, place = f"snapshot table entry {number}", offset + position
        if position + size > len(data):
            raise FormatError(structure, "", place, "is cut off")
        snapshot = _parse_entry(head, data[position + HEAD_LENGTH : position + size])
        if len(snapshot.extra_data) > MAX_EXTRA_DATA_SIZE:
            place += FIELD_OFFSETS["extra_data_size"]
            raise FormatError(structure, "extra_data_size", place, "is more than 1024")
        snapshots.append(snapshot)
        position += size
    return tuple(snapshots)


def _parse_entry(head: bytes, tail: bytes) -> SnapshotHeader:
    """Parses an entry that is whole: what construct would return, but faster."""
    fields: dict[str, Any] = dict(zip(FIELD_OFFSETS, _READ_HEAD.unpack(head), strict=True))
    position = 0
    for name in ("extra_data", "id_str", "name"):
        size = fields.pop(f"{name}_size")
        fields[name] = tail[position : position + size]
        position += size
    return SnapshotHeader(**fields, padding=tail[position:])


def build_snapshot_table(snapshots: tuple[SnapshotHeader, ...]) -> bytes:
    """Builds the bytes of a snapshot table.

    Raises:
        FormatError: a value does not fit its field.
    """
    return b"".join(build(SNAPSHOT, s._asdict(), "snapshot table entry") for s in snapshots)
