"""Changing the header area of an image so that it is valid after a loss of power at any time.

A sector is written whole or not at all, and nothing larger is. What lies behind the end marker
of the header extensions, and is not the name of the backing file, is free for preparations.

*Spec*: spec/edit.md, "Header area".
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

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
    FEATURE_NAMES,
    GENERATION,
    HEAD_LENGTH,
    PADDING,
    TOKEN_LENGTH,
    Generation,
    HeaderExtension,
    HeaderExtensions,
    build_extensions,
    build_generation,
)
from qcow2bm.format.features import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_GENERATION,
    with_generation_name,
)
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.units import align_up

_BACKING_OFFSET = FIELD_OFFSETS["backing_file_offset"]
_AUTOCLEAR = FIELD_OFFSETS["autoclear_features"]


class Switch(NamedTuple):
    """How a change of the bitmaps extension takes effect.

    ``before`` are writes without effect that become durable together with whatever else is
    being prepared, ``steps`` come after that, and ``commit`` is the write that counts. It has to
    be followed by a barrier, and then by ``after``.
    """

    commit: Write
    before: tuple[Write, ...] = ()
    steps: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()


class HeaderDraft:
    """The first cluster of an image as it will be, and the steps that lead there.

    Every method plans one change on top of those planned before, so their steps must be done in
    the order in which they were asked for.

    Attributes:
        generation: what the header will say of it; None where it is not recorded.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Begins with what is stored; raises `StorageError` if that cannot be read."""
        self._data = bytearray(file.read(0, file.cluster_size))
        self._start = file.extensions_offset
        self._extensions = list(file.area.extensions)
        self._has_end = len(file.area.end) == HEAD_LENGTH
        self._name_size = file.header.backing_file_size if self._name_offset else 0
        self._known_autoclear = file.known_autoclear
        self.generation = file.generation

    @property
    def _name_offset(self) -> int:
        return self._number(_BACKING_OFFSET)

    def _number(self, offset: int) -> int:
        return int.from_bytes(self._data[offset : offset + 8], "big")

    def _set_number(self, offset: int, value: int) -> None:
        self._data[offset : offset + 8] = value.to_bytes(8, "big")

    def _set_autoclear(self, bit: int = AUTOCLEAR_BITMAPS, *, is_set: bool) -> None:
        bits = self._number(_AUTOCLEAR) & ~bit
        self._set_number(_AUTOCLEAR, bits | (bit if is_set else 0))

    def _write(self, start: int, stop: int, what: str) -> Write:
        return Write(start, (bytes(self._data[start:stop]),), what)

    def _require_room(self, end: int) -> None:
        if end > len(self._data):
            raise LimitError(
                "the size of the header area and the copies that keep it safe, in bytes,",
                end,
                len(self._data),
            )

    @property
    def _end(self) -> int:
        """Where the end marker stands."""
        return self._start + sum(extension.size for extension in self._extensions)

    def apply(self, writes: Sequence[Step]) -> None:
        """Takes account of what others write to the first cluster."""
        for write in writes:
            if isinstance(write, Write) and write.offset < len(self._data):
                data = b"".join(write.parts)
                self._data[write.offset : write.offset + len(data)] = data

    def clear_unknown_autoclear(self) -> list[Step]:
        """Clears the autoclear bits of features unknown here, which a change makes untrue."""
        bits = self._number(_AUTOCLEAR)
        if not bits & ~self._known_autoclear:
            return []
        self._set_number(_AUTOCLEAR, bits & self._known_autoclear)
        write = self._write(_AUTOCLEAR, _AUTOCLEAR + 8, "autoclear bits of unknown features")
        return [write, Barrier("their clearing")]

    def renew_generation(self, token: bytes | None = None) -> tuple[Write, ...]:
        """Says that somebody else writes now, where that is recorded: by a fresh token or this one.

        The write must be durable before, or together with, the first change that counts. If it
        is torn, that is another token, too.
        """
        if not self.generation:
            return ()
        self.generation = _next(self.generation, token)
        payload = build_generation(self.generation)
        place = self._payload_offset(self._extensions, GENERATION)
        self._data[place : place + len(payload)] = payload
        self._extensions = [
            e._replace(data=payload) if e.type == GENERATION else e for e in self._extensions
        ]
        return (Write(place, (payload,), "token of the generation"),)

    def begin_generation(self) -> list[Step]:
        """Makes the generation recorded from now on; the steps end with a barrier, if any.

        Raises:
            LimitError: the first cluster has no room for it.
            UnsupportedError: the header is laid out in a way that cannot be changed safely.
        """
        if self.generation:
            return []
        self.generation = _next(Generation(b"", 0))
        mine = HeaderExtension(GENERATION, build_generation(self.generation), b"")
        tables = [e.data for e in self._extensions if e.type == FEATURE_NAMES]
        names = with_generation_name(tables[-1] if tables else b"")
        named = HeaderExtension(FEATURE_NAMES, names, bytes(-len(names) % 8))
        others = [e for e in self._extensions if e.type not in (FEATURE_NAMES, GENERATION)]
        steps = self._rewrite(self._straight([*others, named, mine]))
        self._set_autoclear(AUTOCLEAR_GENERATION, is_set=True)
        self._known_autoclear |= AUTOCLEAR_GENERATION
        what = "autoclear bit of the generation"
        return [*steps, self._write(_AUTOCLEAR, _AUTOCLEAR + 8, what), Barrier(what)]

    def end_generation(self) -> list[Step]:
        """Lets the generation be recorded no more; raises as `begin_generation` does."""
        if not self.generation:
            return []
        self.generation = None
        self._set_autoclear(AUTOCLEAR_GENERATION, is_set=False)
        what = "autoclear bit of the generation"
        cleared: list[Step] = [self._write(_AUTOCLEAR, _AUTOCLEAR + 8, what), Barrier(what)]
        others = [e for e in self._extensions if e.type != GENERATION]
        return cleared + self._rewrite(self._straight(others))

    def _payload_offset(self, extensions: Sequence[HeaderExtension], type: int = BITMAPS) -> int:
        """Where the data of the last extension of that type begin, which is the one that counts."""
        place = HeaderExtensions(tuple(extensions), b"").payload_offset(type, self._start)
        assert place is not None, "the caller knows that there is one"
        return place

    def straighten(self) -> list[Step]:
        """Moves the bitmaps extension to where its payload lies within one sector.

        Nothing to do in most images. QEMU may move it back.

        Raises:
            LimitError: the first cluster has no room for the move.
            UnsupportedError: there is no such place.
        """
        if is_in_one_sector(self._payload_offset(self._extensions), BITMAPS_LENGTH):
            return []
        return self._rewrite(self._straight(self._extensions))

    def _straight(self, extensions: Sequence[HeaderExtension]) -> list[HeaderExtension]:
        """An order in which the payload of the bitmaps extension lies within one sector."""
        others = [e for e in extensions if e.type not in (BITMAPS, PADDING)]
        mine = [e for e in extensions if e.type == BITMAPS]
        for number in range(len(others), -1, -1):
            order = [*others[:number], *mine, *others[number:]]
            if not mine or is_in_one_sector(self._payload_offset(order), BITMAPS_LENGTH):
                return order
        raise UnsupportedError("a bitmaps extension that has no place within one sector")

    def replace(self, payload: bytes) -> Switch:
        """Gives the bitmaps extension another payload; `straighten` comes first."""
        place = self._payload_offset(self._extensions)
        self._data[place : place + len(payload)] = payload
        self._extensions = [
            e._replace(data=payload) if e.type == BITMAPS else e for e in self._extensions
        ]
        return Switch(self._write(place, place + len(payload), "bitmaps extension"))

    def revive(self, payload: bytes) -> Switch:
        """Gives a stale bitmaps extension a new payload, and the autoclear bit.

        It leads to the old directory, the last trace of what it names, until the new one is
        whole; if `straighten` comes first it never leads anywhere else.
        """
        write = self.replace(payload).commit
        self._set_autoclear(is_set=True)
        written = write_in_sectors(write.offset, payload, write.what)
        commit = self._write(_AUTOCLEAR, _AUTOCLEAR + 8, "autoclear bit of the bitmaps")
        return Switch(commit, (), (*written, Barrier(write.what)))

    def insert(self, payload: bytes) -> Switch:
        """Makes a bitmaps extension with this payload behind the others, and its autoclear bit.

        Raises:
            LimitError: the first cluster has no room for it.
            UnsupportedError: the header is laid out in a way no program is known to use.
        """
        extension = HeaderExtension(BITMAPS, payload, b"")
        body = build_extensions(HeaderExtensions((extension,), bytes(HEAD_LENGTH)))
        head, end = self._end, self._end + len(body)
        self._extensions.append(extension)
        is_in_the_way = 0 < self._name_offset < end
        if end + self._name_size * is_in_the_way <= SECTOR_SIZE:
            return self._insert_at_once(head, body, is_in_the_way)
        if not self._has_end or not is_in_one_sector(head, HEAD_LENGTH):
            raise UnsupportedError("adding a header extension where the others end without a mark")
        if not is_in_the_way:
            self._require_room(end)
            content = self._insert_content(head, body)
            steps, commit = self._insert_head(head, body)
            return Switch(commit, content, steps)
        copied, moved = self._move_name(end)
        ready = Barrier("content of the bitmaps extension")
        content = self._insert_content(head, body)
        steps, commit = self._insert_head(head, body)
        return Switch(commit, copied, (*moved, *content, ready, *steps))

    def _insert_at_once(self, head: int, body: bytes, moves_name: bool) -> Switch:
        """All of it, and the backing file name behind it, in one write of the first sector."""
        start, stop = _AUTOCLEAR, head + len(body)
        name = bytes(self._data[self._name_offset :][: self._name_size])
        self._data[head:stop] = body
        if moves_name:
            self._set_number(_BACKING_OFFSET, stop)
            self._data[stop : stop + len(name)] = name
            start, stop = _BACKING_OFFSET, stop + len(name)
        self._set_autoclear(is_set=True)
        return Switch(self._write(start, stop, "header with a bitmaps extension"))

    def _move_name(self, end: int) -> tuple[tuple[Write, ...], tuple[Step, ...]]:
        """Writes a copy of the backing file name behind ``end``, and then what leads to it."""
        old, size = self._name_offset, self._name_size
        place = align_up(max(end, old + size), 8)
        self._require_room(place + size)
        name = bytes(self._data[old : old + size])
        self._data[place : place + size] = name
        self._set_number(_BACKING_OFFSET, place)
        switch = self._write(_BACKING_OFFSET, _BACKING_OFFSET + 8, "place of that name")
        copied = write_in_sectors(place, name, "copy of the backing file name")
        return copied, (switch, Barrier("place of the backing file name"))

    def _insert_content(self, head: int, body: bytes) -> tuple[Write, ...]:
        """All but the head, behind the old end marker, where it means nothing yet."""
        start, content = head + HEAD_LENGTH, body[HEAD_LENGTH:]
        self._data[start : start + len(content)] = content
        return write_in_sectors(start, content, "content of the bitmaps extension")

    def _insert_head(self, head: int, body: bytes) -> tuple[tuple[Step, ...], Write]:
        """The head instead of the old end marker, and the autoclear bit: together, or last."""
        stop = head + HEAD_LENGTH
        self._data[head:stop] = body[:HEAD_LENGTH]
        steps: tuple[Step, ...] = ()
        if stop > SECTOR_SIZE:
            write = self._write(head, stop, "head of the bitmaps extension")
            steps, stop = (write, Barrier("bitmaps extension")), _AUTOCLEAR + 8
        self._set_autoclear(is_set=True)
        return steps, self._write(_AUTOCLEAR, stop, "autoclear bit of the bitmaps")

    def clear_bitmaps_bit(self) -> Switch:
        """Clears the autoclear bit of bitmaps that are not there."""
        self._set_autoclear(is_set=False)
        return Switch(self._write(_AUTOCLEAR, _AUTOCLEAR + 8, "autoclear bit of the bitmaps"))

    def remove(self) -> Switch:
        """Takes away the bitmaps extension and its autoclear bit, which goes first.

        Raises:
            LimitError: the first cluster has no room for the change.
        """
        kept = [e for e in self._extensions if e.type != BITMAPS]
        head = self._payload_offset(self._extensions) - HEAD_LENGTH
        tail = build_extensions(HeaderExtensions(self._behind(head), bytes(HEAD_LENGTH)))
        self._set_autoclear(is_set=False)
        if head + len(tail) <= SECTOR_SIZE:
            self._data[head : head + len(tail)] = tail
            self._extensions = kept
            stop = head + len(tail)
            return Switch(self._write(_AUTOCLEAR, stop, "header without bitmaps extension"))
        commit = self._write(_AUTOCLEAR, _AUTOCLEAR + 8, "autoclear bit of the bitmaps")
        if len(tail) == HEAD_LENGTH and is_in_one_sector(head, HEAD_LENGTH):
            self._data[head : head + HEAD_LENGTH] = tail
            self._extensions = kept
            after = [self._write(head, head + HEAD_LENGTH, "end of the header extensions")]
            return Switch(commit, after=tuple(after))
        return Switch(commit, after=tuple(self._rewrite(kept)[:-1]))

    def _behind(self, head: int) -> tuple[HeaderExtension, ...]:
        """The extensions that follow the bitmaps extension."""
        place = self._start
        for number, extension in enumerate(self._extensions):
            if place == head:
                return tuple(self._extensions[number + 1 :])
            place += extension.size
        return ()

    def _rewrite(self, extensions: Sequence[HeaderExtension]) -> list[Step]:
        """Any other order or choice of extensions, the backing file name behind them.

        A second copy of the new area is written behind everything. A head at the start of the
        old area then makes all of that the data of a `PADDING` extension, behind which the copy
        follows; so the old place can be written at leisure, until its first sector takes the
        padding away again. The steps end with a barrier.
        """
        extensions = [e for e in extensions if e.type != PADDING]
        area = build_extensions(HeaderExtensions(tuple(extensions), bytes(HEAD_LENGTH)))
        start, size = self._start, self._name_size
        name = bytes(self._data[self._name_offset : self._name_offset + size])
        final_name = align_up(start + len(area), 8) if self._name_offset else 0
        old_end = max(self._end + HEAD_LENGTH, self._name_offset + size)
        copy = align_up(max(old_end, final_name + size, start + len(area)), 8)
        copy_name = align_up(copy + len(area), 8) if self._name_offset else 0
        self._require_room(max(copy + len(area), copy_name + size))
        if not is_in_one_sector(start, HEAD_LENGTH):
            raise UnsupportedError("changing header extensions that do not begin at 8 bytes")

        steps: list[Step] = []
        self._data[copy : copy + len(area)] = area
        self._data[copy_name : copy_name + size] = name if copy_name else b""
        end = max(copy + len(area), copy_name + size)
        data = bytes(self._data[copy:end])
        steps += write_in_sectors(copy, data, "copy of the header extensions")
        steps.append(Barrier("copy of the header extensions"))

        padding = PADDING.to_bytes(4, "big") + (copy - start - HEAD_LENGTH).to_bytes(4, "big")
        self._data[start : start + HEAD_LENGTH] = padding
        steps += self._point_at(start, start + HEAD_LENGTH, copy_name, "use of the copy", False)

        stop = max(start + len(area), final_name + size)
        first_stop = min(stop, align_up(start + 1, SECTOR_SIZE))
        self._data[start + HEAD_LENGTH : start + len(area)] = area[HEAD_LENGTH:]
        if final_name:
            self._data[final_name : final_name + size] = name
        if first_stop < stop:
            data = bytes(self._data[first_stop:stop])
            steps += write_in_sectors(first_stop, data, "rearranged header extensions")
            steps.append(Barrier("rearranged header extensions"))
        self._data[start : start + HEAD_LENGTH] = area[:HEAD_LENGTH]
        self._extensions = list(extensions)
        steps += self._point_at(start, first_stop, final_name, "use of the rearranged ones", True)
        return steps

    def _point_at(
        self, start: int, stop: int, name: int, what: str, list_first: bool
    ) -> list[Step]:
        """Writes a stretch within one sector together with the place of the backing file name.

        In two steps if they do not lie in one sector: then the name must be reachable both ways,
        and ``list_first`` says which goes first.
        """
        if name:
            self._set_number(_BACKING_OFFSET, name)
        if name and stop <= SECTOR_SIZE:
            return [self._write(_BACKING_OFFSET, stop, what), Barrier(what)]
        stretch: list[Step] = [self._write(start, stop, what), Barrier(what)]
        if not name:
            return stretch
        place = "place of the backing file name"
        write = self._write(_BACKING_OFFSET, _BACKING_OFFSET + 8, place)
        moved: list[Step] = [write, Barrier(place)]
        return stretch + moved if list_first else moved + stretch


def _next(generation: Generation, token: bytes | None = None) -> Generation:
    return Generation(token or fresh_token(), (generation.counter + 1) % (1 << 64))


def fresh_token() -> bytes:
    """A token of the generation that was never used before."""
    return secrets.token_bytes(TOKEN_LENGTH)
