"""Reads an offload file, and appends to it.

A record counts once it is durable. The next record overwrites what an interruption left of a
record.

*Spec*: spec/live.md, "Offload file".
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from qcow2bm.api import sidecar
from qcow2bm.errors import FormatError, StorageError
from qcow2bm.format import offload_file
from qcow2bm.format.offload_file import (
    COLLECTED,
    COPY,
    DIGEST_BYTES,
    PLAN,
    RECORD_BYTES,
    RECORDED,
    RESTORED,
    ROLLED,
    TOKEN_BYTES,
    OffloadPlan,
    RecordHead,
)
from qcow2bm.live.tail import Tail
from qcow2bm.migration.sidecar import SavedBitmap, Sidecar
from qcow2bm.qmp.names import arrival_of
from qcow2bm.storage import new_file
from qcow2bm.units import escape

_PIECE = 1 << 20


class _Place(NamedTuple):
    """Where a payload is in the file, in bytes."""

    offset: int
    size: int


class OffloadFile:
    """An offload file: the plan of an offload, the copies of bitmaps, and what was put back.

    Attributes:
        path: of the file.
        plan: what is to be taken out of the machine.
        bitmaps: those of the plan, each with its node, by their numbers.
    """

    def __init__(
        self, path: str, plan: OffloadPlan, records: Iterable[tuple[RecordHead, _Place]] = ()
    ) -> None:
        """Use `create` or `read`; without ``records`` the file need not be there.

        Raises:
            FormatError: a record does not belong to the plan.
        """
        self.path = path
        self.plan = plan
        self.bitmaps = plan.bitmaps
        self._copies: dict[int, _Place] = {}
        self._restored: set[int] = set()
        self._rolled: dict[int, list[_Place]] = {}
        self._collected: dict[int, list[_Place]] = {}
        self._recorded: dict[int, _Place] = {}
        self._end = 0  # of the last whole record, in bytes
        for head, place in records:
            self._note(head, place)

    @classmethod
    def create(cls, path: str, plan: OffloadPlan) -> Self:
        """Makes a new file that has the plan alone.

        Raises:
            StorageError: the file exists already, or writing failed.
            FormatError: the plan does not fit into the file.
        """
        head, payload = offload_file.build_head(), offload_file.build_plan(plan)
        new_file.write_new(path, [head, _record(PLAN, 0, payload)])
        place = _Place(len(head) + RECORD_BYTES, len(payload))
        return cls(path, plan, [(RecordHead(PLAN, 0, len(payload)), place)])

    @classmethod
    def read(cls, path: str) -> Self:
        """Reads a file, and compares each record with its digest.

        Raises:
            StorageError: reading failed.
            FormatError: it is no offload file, or is damaged.
            UnsupportedError: this library does not know its version.
        """
        try:
            with _named(path), open(path, "rb") as file:
                head = file.read(offload_file.HEAD_BYTES)
                if not head:
                    raise FormatError(
                        "offload file", "", 0, "is empty: remove it, or choose another"
                    )
                offload_file.parse_head(head)
                records = list(_whole_records(file))
                if not records:
                    raise FormatError("offload file", "", 0, "has no plan: it is damaged")
                plan = _read_plan(file, *records[0])
        except OSError as error:
            raise StorageError.from_os(error, path, 0, 0) from error
        return cls(path, plan, records)

    def _note(self, head: RecordHead, place: _Place) -> None:
        nodes = len(self.plan.nodes)
        limits = {PLAN: 1, COPY: len(self.bitmaps)}
        limits |= dict.fromkeys((RESTORED, ROLLED, COLLECTED, RECORDED), nodes)
        if head.number >= limits.get(head.type, 0) or (head.type == PLAN and self._end):
            reason = f"is {head.type}, with the number {head.number}, which cannot be here"
            raise FormatError("record", "type", place.offset - RECORD_BYTES, reason)
        if head.type == COPY:
            self._copies[head.number] = place
        if head.type == RESTORED:
            self._restored.add(head.number)
        if head.type == ROLLED:
            self._rolled.setdefault(head.number, []).append(place)
        if head.type == COLLECTED:
            self._collected.setdefault(head.number, []).append(place)
        if head.type == RECORDED:  # what was collected before is of another migration
            self._recorded[head.number] = place
            self._collected.pop(head.number, None)
        self._end = place.offset + place.size + DIGEST_BYTES

    @property
    def has_copies(self) -> bool:
        """Whether the file has the bits of any bitmap."""
        return bool(self._copies)

    @property
    def is_restored(self) -> bool:
        """Whether the bitmaps of all nodes were put back."""
        return len(self._restored) == len(self.plan.nodes)

    def was_restored(self, number: int) -> bool:
        """Returns whether all bitmaps of the node that has this number were put back."""
        return number in self._restored

    def has_copy(self, number: int) -> bool:
        """Returns whether the file has the bits of the bitmap that has this number in the plan."""
        return number in self._copies

    def has_copies_of(self, number: int) -> bool:
        """Returns whether the file has the bits of any bitmap of the node that has this number."""
        return any(place in self._copies for place in self.plan.numbers_of(number))

    def has_collected(self, number: int) -> bool:
        """Returns whether the file has what the recorder of the node recorded at the source.

        What was collected before the last `append_recorded` is of another migration.
        """
        return number in self._collected

    def tail(self, number: int) -> Tail:
        """Returns the tail of the node that has this number, as it must be now."""
        rolls = len(self._rolled.get(number, ()))
        return Tail(self.plan.nodes[number], self.plan.tail_granularity, rolls)

    @property
    def tails(self) -> list[Tail]:
        """The tails of all nodes, as a new list."""
        return [self.tail(number) for number in range(len(self.plan.nodes))]

    def read_copy(self, number: int, disk_size: int) -> SavedBitmap:
        """Returns the bitmap that has this number in the plan.

        The disk may have grown since, to ``disk_size`` bytes.

        Raises:
            StorageError: reading failed.
            FormatError: the copy is damaged, or is not the one that was planned.
        """
        node, planned = self.bitmaps[number]
        wanted = SavedBitmap(*planned, node.disk_size, b"")
        return self._read(self._copies[number], wanted, disk_size)

    def read_collected(self, number: int, disk_size: int) -> SavedBitmap:
        """Returns what the recorder of the node that has this number recorded at the source.

        Where several machines were asked, the recorder of one may have travelled from another. The
        disk may have grown since, to ``disk_size`` bytes.

        Raises as `read_copy` does.
        """
        tail = self.tail(number)
        node = tail.planned
        name, granularity = tail.recorder_name, node.recorder_granularity
        wanted = SavedBitmap(name, granularity, True, node.disk_size, b"")
        places = self._collected[number]
        return union([self._read(place, wanted, disk_size) for place in places])

    def read_former_tails(self, number: int, disk_size: int) -> SavedBitmap | None:
        """Returns what the former tails of a node have together; None if there are none.

        The disk may have grown since, to ``disk_size`` bytes.

        Raises as `read_copy` does.
        """
        tail = self.tail(number)._replace(number=0)
        found = []
        for place in self._rolled.get(number, ()):
            wanted = SavedBitmap(tail.name, tail.granularity, True, tail.planned.disk_size, b"")
            found.append(self._read(place, wanted, disk_size))
            tail = tail.next
        return union(found) if found else None

    def arrival_name(self, number: int) -> str:
        """Returns the name of the recorder at the destination of the last migration.

        It is "" if the node that has this number has none. Raises as `read_copy` does.
        """
        if number not in self._recorded:
            return ""
        place = self._recorded[number]
        with self._payload(place) as file:
            token = file.read(place.size)
            if len(token) != TOKEN_BYTES:
                reason = f"has {len(token)} bytes, must have {TOKEN_BYTES}"
                raise FormatError("record", "payload", place.offset, reason)
        return arrival_of(self.plan.nodes[number].uuid, token)

    @contextmanager
    def _payload(self, place: _Place) -> Iterator[BinaryIO]:
        """Has the file open at a payload; names it in errors about its format."""
        try:
            with _named(self.path), open(self.path, "rb") as file:
                file.seek(place.offset)
                yield file
        except OSError as error:
            raise StorageError.from_os(error, self.path, place.offset, place.size) from error

    def _read(self, place: _Place, wanted: SavedBitmap, disk_size: int) -> SavedBitmap:
        """Returns the bitmap that is in a record, as it is in a disk of ``disk_size`` bytes.

        It must have the properties of ``wanted``, or have been saved when the disk had grown.
        """
        with self._payload(place) as file:
            bitmaps = sidecar.read(_pieces(file, place.size)).bitmaps
            is_wanted = [bitmap[:3] for bitmap in bitmaps] == [wanted[:3]]
            if not is_wanted or bitmaps[0].disk_size < wanted.disk_size:
                reason = f'is not that of the bitmap "{escape(wanted.name)}" that was planned'
                raise FormatError("record", "payload", place.offset, reason)
        return bitmaps[0].resized(disk_size)

    def append_copy(self, number: int, bitmap: SavedBitmap) -> None:
        """Appends the bits of the bitmap that has this number, and makes them durable.

        Raises:
            StorageError: writing failed; what the file had before is still there.
        """
        self._append(COPY, number, _as_sidecar(bitmap))

    def append_rolled(self, number: int, tail: SavedBitmap) -> None:
        """Appends the tail of the node that has this number: from now on the next one counts.

        Raises:
            StorageError: writing failed; what the file had before is still there.
        """
        self._append(ROLLED, number, _as_sidecar(tail))

    def append_recorded(self, number: int, token: bytes) -> None:
        """Appends that the destination of a migration has the recorder with this token.

        Raises:
            StorageError: writing failed; what the file had before is still there.
        """
        self._append(RECORDED, number, token)

    def append_collected(self, number: int, recorder: SavedBitmap) -> None:
        """Appends what the recorder of the node that has this number recorded at the source.

        Raises:
            StorageError: writing failed; what the file had before is still there.
        """
        self._append(COLLECTED, number, _as_sidecar(recorder))

    def append_restored(self, number: int) -> None:
        """Appends that all bitmaps of the node that has this number were put back.

        Raises:
            StorageError: writing failed; what the file had before is still there.
        """
        self._append(RESTORED, number, b"")

    def _append(self, type: int, number: int, payload: bytes) -> None:
        new_file.append(self.path, _record(type, number, payload), self._end)
        place = _Place(self._end + RECORD_BYTES, len(payload))
        self._note(RecordHead(type, number, len(payload)), place)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Names the file in errors about its format: a command has other files, too."""
    try:
        yield
    except FormatError as error:
        structure = f"{escape(path)}: {error.structure}"
        raise FormatError(structure, error.field, error.offset, error.reason) from error


def union(bitmaps: Sequence[SavedBitmap]) -> SavedBitmap:
    """Returns the first of the bitmaps, with what is set in any of them; all are alike."""
    octets = np.bitwise_or.reduce([np.frombuffer(b.octets, np.uint8) for b in bitmaps])
    return bitmaps[0]._replace(octets=octets.tobytes())


def _as_sidecar(bitmap: SavedBitmap) -> bytes:
    return b"".join(sidecar.write(Sidecar(bitmap.disk_size, b"", (bitmap,))))


def _record(type: int, number: int, payload: bytes) -> bytes:
    data = offload_file.build_record_head(RecordHead(type, number, len(payload))) + payload
    return data + hashlib.sha256(data).digest()


def _whole_records(file: BinaryIO) -> Iterator[tuple[RecordHead, _Place]]:
    """Yields the records of a file that is at its first one.

    The last record may be a part of one, with zeros after it: appending it was interrupted.

    Raises:
        FormatError: a record that something follows is damaged.
    """
    while len(start := file.read(RECORD_BYTES)) == RECORD_BYTES:
        place = file.tell()
        try:
            head = offload_file.parse_record_head(start, place - RECORD_BYTES)
        except FormatError:
            if any(any(piece) for piece in _pieces(file, sys.maxsize)):
                raise
            return
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
