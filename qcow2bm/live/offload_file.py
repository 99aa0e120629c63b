"""Reads an offload file, and appends to it.

A record counts once it is durable. The next record overwrites what an interruption left of a
record.

*Spec*: spec/live.md, "Offload file".
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Self

from qcow2bm.api import sidecar
from qcow2bm.errors import FormatError, StorageError
from qcow2bm.format import offload_file
from qcow2bm.format.offload_file import (
    COPY,
    DIGEST_BYTES,
    PLAN,
    RECORD_BYTES,
    OffloadPlan,
    RecordHead,
)
from qcow2bm.migration.sidecar import SavedBitmap, Sidecar
from qcow2bm.storage import new_file

_PIECE = 1 << 20


class _Place(NamedTuple):
    """Where a payload is in the file, in bytes."""

    offset: int
    size: int


class OffloadFile:
    """An offload file: the plan of an offload, and the copies of bitmaps that were made by now.

    Attributes:
        path: of the file.
        plan: what is to be taken out of the machine.
    """

    def __init__(self, path: str, plan: OffloadPlan, copies: dict[int, _Place], end: int) -> None:
        """Use `create` or `read`. ``end`` is where the last whole record ends, in bytes."""
        self.path = path
        self.plan = plan
        self._copies = copies
        self._end = end

    @classmethod
    def create(cls, path: str, plan: OffloadPlan) -> Self:
        """Makes a new file that has the plan alone.

        Raises:
            StorageError: the file exists already, or writing failed.
            FormatError: the plan does not fit into the file.
        """
        data = offload_file.build_head() + _record(PLAN, 0, offload_file.build_plan(plan))
        new_file.write_new(path, [data])
        return cls(path, plan, {}, len(data))

    @classmethod
    def read(cls, path: str) -> Self:
        """Reads a file, and compares each record with its digest.

        Raises:
            StorageError: reading failed.
            FormatError: it is no offload file, or is damaged.
            UnsupportedError: this library does not know its version.
        """
        copies: dict[int, _Place] = {}
        plan = None
        try:
            with open(path, "rb") as file:
                offload_file.parse_head(file.read(offload_file.HEAD_BYTES))
                end = file.tell()
                for head, place in _whole_records(file):
                    if plan is None:
                        plan = _read_plan(file, head, place)
                    elif head.type != COPY or head.number >= len(plan.bitmaps):
                        reason = f"{head.type}, {head.number} is not known"
                        raise FormatError("record", "type", place.offset - RECORD_BYTES, reason)
                    else:
                        copies[head.number] = place
                    end = place.offset + place.size + DIGEST_BYTES
        except OSError as error:
            raise StorageError.from_os(error, path, 0, 0) from error
        if plan is None:
            raise FormatError("offload file", "", end, "has no plan: it is damaged")
        return cls(path, plan, copies, end)

    def has_copy(self, number: int) -> bool:
        """Returns whether the file has the bits of the bitmap that has this number in the plan."""
        return number in self._copies

    def read_copy(self, number: int) -> SavedBitmap:
        """Returns the bitmap that has this number in the plan.

        Raises:
            StorageError: reading failed.
            FormatError: the copy is damaged, or is not the one that was planned.
        """
        node, planned = self.plan.bitmaps[number]
        place = self._copies[number]
        try:
            with open(self.path, "rb") as file:
                file.seek(place.offset)
                bitmaps = sidecar.read(_pieces(file, place.size)).bitmaps
        except OSError as error:
            raise StorageError.from_os(error, self.path, place.offset, place.size) from error
        if [bitmap[:4] for bitmap in bitmaps] != [(*planned, node.disk_size)]:
            raise FormatError(f"copy {number}", "", place.offset, "is not the one that was planned")
        return bitmaps[0]

    def append_copy(self, number: int, bitmap: SavedBitmap) -> None:
        """Appends the bits of the bitmap that has this number, and makes them durable.

        Raises:
            StorageError: writing failed; what the file had before is still there.
        """
        content = b"".join(sidecar.write(Sidecar(bitmap.disk_size, b"", (bitmap,))))
        record = _record(COPY, number, content)
        new_file.append(self.path, record, self._end)
        self._copies[number] = _Place(self._end + RECORD_BYTES, len(content))
        self._end += len(record)


def _record(type: int, number: int, payload: bytes) -> bytes:
    data = offload_file.build_record_head(RecordHead(type, number, len(payload))) + payload
    return data + hashlib.sha256(data).digest()


def _whole_records(file: BinaryIO) -> Iterator[tuple[RecordHead, _Place]]:
    """Yields the records of a file that is at its first one.

    The last record may be a part of one, with zeros after it: appending it was interrupted.

    Raises:
        FormatError: a record that another one follows is damaged.
    """
    while len(start := file.read(RECORD_BYTES)) == RECORD_BYTES:
        place = file.tell()
        head = offload_file.parse_record_head(start, place - RECORD_BYTES)
        digest = hashlib.sha256(start)
        for piece in _pieces(file, head.size):
            digest.update(piece)
        stored = file.read(DIGEST_BYTES)
        after = file.tell()
        if stored != digest.digest():
            if any(any(piece) for piece in _pieces(file, sys.maxsize)):
                reason = "does not match: the file is damaged"
                raise FormatError("record", "sha256", place + head.size, reason)
            return
        yield head, _Place(place, head.size)
        file.seek(after)


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields the next ``size`` bytes, or fewer if the file ends before."""
    while size and (piece := file.read(min(size, _PIECE))):
        size -= len(piece)
        yield piece


def _read_plan(file: BinaryIO, head: RecordHead, place: _Place) -> OffloadPlan:
    if head.type != PLAN or head.size > offload_file.MAX_PLAN_BYTES:
        raise FormatError("record", "type", place.offset - RECORD_BYTES, "is not that of a plan")
    file.seek(place.offset)
    return offload_file.parse_plan(file.read(head.size), place.offset)
