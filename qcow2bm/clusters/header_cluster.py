"""The first cluster of an image as it will be, and the rearrangement of its header extensions.

Which changes an edit makes to the header is decided in ``header_draft``.

*Spec*: spec/edit.md, "Header area".
"""

from __future__ import annotations

from collections.abc import Sequence

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plan import (
    SECTOR_SIZE,
    Barrier,
    Step,
    Write,
    is_in_one_sector,
    write_in_sectors,
)
from qcow2bm.errors import LimitError, UnsupportedError
from qcow2bm.format.extensions import (
    BITMAPS,
    BITMAPS_LENGTH,
    HEAD_LENGTH,
    PADDING,
    HeaderExtension,
    HeaderExtensions,
    build_extensions,
)
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.units import align_up

BACKING_OFFSET = FIELD_OFFSETS["backing_file_offset"]
AUTOCLEAR = FIELD_OFFSETS["autoclear_features"]


class HeaderCluster:
    """The bytes of the first cluster, and the header extensions in it.

    Methods that plan a rearrangement change the bytes as their steps do, so the steps must be done
    in the order in which they were planned.

    Attributes:
        data: the bytes of the cluster.
        start: the host offset of the header extensions.
        extensions: the header extensions, in order.
        has_end_marker: whether the stored extensions end with an end marker.
        name_size: the length of the backing file name in bytes; 0 without a backing file.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Reads the first cluster; raises `StorageError` if that fails."""
        self.data = bytearray(file.read(0, file.cluster_size))
        self.start = file.extensions_offset
        self.extensions = list(file.area.extensions)
        self.has_end_marker = len(file.area.end) == HEAD_LENGTH
        self.name_size = file.header.backing_file_size if self.name_offset else 0

    @property
    def end(self) -> int:
        """The host offset of the end marker."""
        return self.start + sum(extension.size for extension in self.extensions)

    @property
    def name_offset(self) -> int:
        """The host offset of the backing file name; 0 without a backing file."""
        return self._number(BACKING_OFFSET)

    @name_offset.setter
    def name_offset(self, offset: int) -> None:
        self._set_number(BACKING_OFFSET, offset)

    @property
    def name(self) -> bytes:
        """The backing file name."""
        return bytes(self.data[self.name_offset :][: self.name_size])

    @property
    def autoclear(self) -> int:
        """The autoclear feature bits."""
        return self._number(AUTOCLEAR)

    @autoclear.setter
    def autoclear(self, bits: int) -> None:
        self._set_number(AUTOCLEAR, bits)

    def _number(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 8], "big")

    def _set_number(self, offset: int, value: int) -> None:
        self.data[offset : offset + 8] = value.to_bytes(8, "big")

    def put(self, offset: int, data: bytes) -> None:
        """Replaces the bytes from ``offset`` on."""
        self.data[offset : offset + len(data)] = data

    def write(self, start: int, stop: int, what: str) -> Write:
        """The Write of the present bytes from ``start`` to ``stop``."""
        return Write(start, (bytes(self.data[start:stop]),), what)

    def autoclear_write(self, what: str) -> Write:
        """The Write of the present autoclear bits."""
        return self.write(AUTOCLEAR, AUTOCLEAR + 8, what)

    def require_room(self, end: int) -> None:
        """Raises `LimitError` if ``end`` lies beyond the cluster."""
        if end > len(self.data):
            raise LimitError(
                "the size of the header area and the copies that keep it safe, in bytes,",
                end,
                len(self.data),
            )

    def payload_offset(
        self, type: int, extensions: Sequence[HeaderExtension] | None = None
    ) -> int | None:
        """The host offset of the data of the last extension of a type; None if there is none.

        ``extensions`` are other extensions to look at instead of the present ones.
        """
        listed = tuple(self.extensions if extensions is None else extensions)
        return HeaderExtensions(listed, b"").payload_offset(type, self.start)

    def replace_payload(self, type: int, payload: bytes, what: str) -> Write:
        """Replaces the data of the last extension of a type, which exists, by data of that length.

        Returns the Write that does so.
        """
        place = self.payload_offset(type)
        assert place is not None, "the caller knows that there is one"
        self.put(place, payload)
        self.extensions = [
            e._replace(data=payload) if e.type == type else e for e in self.extensions
        ]
        return self.write(place, place + len(payload), what)

    def order_in_one_sector(self, extensions: Sequence[HeaderExtension]) -> list[HeaderExtension]:
        """An order of ``extensions`` with the payload of the bitmaps extension in one sector.

        Raises:
            UnsupportedError: there is no such order.
        """
        others = [e for e in extensions if e.type not in (BITMAPS, PADDING)]
        mine = [e for e in extensions if e.type == BITMAPS]
        for number in range(len(others), -1, -1):
            order = [*others[:number], *mine, *others[number:]]
            place = self.payload_offset(BITMAPS, order)
            if place is None or is_in_one_sector(place, BITMAPS_LENGTH):
                return order
        raise UnsupportedError("a bitmaps extension that has no place within one sector")

    def rearrange(self, extensions: Sequence[HeaderExtension]) -> list[Step]:
        """Plans any other order or choice of extensions, followed by the backing file name.

        First, a copy of the new area is written behind everything else. Then the first 8 bytes of
        the old area become the head of a `PADDING` extension, whose data reach up to the copy. Now
        the extensions in the copy count, and the old area can be written in any order except for
        its first sector. The write of the first sector removes the padding again, and then the
        extensions in the old area count. The steps end with a barrier.

        Raises:
            LimitError: the cluster has no room for the copy.
            UnsupportedError: the head of the first extension lies in two sectors.
        """
        extensions = [e for e in extensions if e.type != PADDING]
        area = build_extensions(HeaderExtensions(tuple(extensions), bytes(HEAD_LENGTH)))
        start, name, size = self.start, self.name, self.name_size
        final_name = align_up(start + len(area), 8) if self.name_offset else 0
        old_end = max(self.end + HEAD_LENGTH, self.name_offset + size)
        copy = align_up(max(old_end, final_name + size, start + len(area)), 8)
        copy_name = align_up(copy + len(area), 8) if self.name_offset else 0
        copy_end = max(copy + len(area), copy_name + size)
        self.require_room(copy_end)
        if not is_in_one_sector(start, HEAD_LENGTH):
            raise UnsupportedError("header extensions that do not begin at a multiple of 8 bytes")

        self.put(copy, area)
        if copy_name:
            self.put(copy_name, name)
        data = bytes(self.data[copy:copy_end])
        what = "copy of the header extensions"
        steps: list[Step] = [*write_in_sectors(copy, data, what), Barrier(what)]

        padding = PADDING.to_bytes(4, "big") + (copy - start - HEAD_LENGTH).to_bytes(4, "big")
        self.put(start, padding)
        what = "use of the copy of the header extensions"
        steps += self._switch(start, start + HEAD_LENGTH, copy_name, what, is_name_last=False)

        stop = max(start + len(area), final_name + size)
        first_stop = min(stop, align_up(start + 1, SECTOR_SIZE))
        self.put(start + HEAD_LENGTH, area[HEAD_LENGTH:])
        if final_name:
            self.put(final_name, name)
        if first_stop < stop:
            data = bytes(self.data[first_stop:stop])
            what = "rearranged header extensions"
            steps += [*write_in_sectors(first_stop, data, what), Barrier(what)]
        self.put(start, area[:HEAD_LENGTH])
        self.extensions = list(extensions)
        what = "use of the rearranged header extensions"
        steps += self._switch(start, first_stop, final_name, what, is_name_last=True)
        return steps

    def _switch(
        self, start: int, stop: int, name: int, what: str, *, is_name_last: bool
    ) -> list[Step]:
        """Writes the bytes from ``start`` to ``stop``, in one sector, and the place of the name.

        ``name`` is the new host offset of the backing file name; with 0 there is no name. If the
        bytes and ``backing_file_offset`` do not lie in one sector, two writes are needed.
        ``is_name_last`` is their order. Between the two writes, both places must have the name.
        """
        if name:
            self.name_offset = name
        if name and stop <= SECTOR_SIZE:
            return [self.write(BACKING_OFFSET, stop, what), Barrier(what)]
        switched: list[Step] = [self.write(start, stop, what), Barrier(what)]
        if not name:
            return switched
        moved = self.name_switch()
        return switched + moved if is_name_last else moved + switched

    def name_switch(self) -> list[Step]:
        """Writes ``backing_file_offset`` as it is now, with a barrier."""
        what = "place of the backing file name"
        return [self.write(BACKING_OFFSET, BACKING_OFFSET + 8, what), Barrier(what)]
