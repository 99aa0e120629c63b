"""Plans for changes of the header area that keep the image valid after a loss of power at any time.

A sector is written whole or not at all; larger writes can be torn. The bytes behind the end marker
of the header extensions, except for the backing file name, mean nothing. So new content can be
prepared there.

*Spec*: spec/edit.md, "Header area".
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.header_cluster import AUTOCLEAR, BACKING_OFFSET, HeaderCluster
from qcow2bm.clusters.plan import (
    SECTOR_SIZE,
    Barrier,
    Step,
    Write,
    is_in_one_sector,
    write_in_sectors,
)
from qcow2bm.errors import UnsupportedError
from qcow2bm.format.extensions import (
    BITMAPS,
    BITMAPS_LENGTH,
    FEATURE_NAMES,
    GENERATION,
    HEAD_LENGTH,
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
from qcow2bm.units import align_up

_BITMAPS_BIT = "autoclear bit of the bitmaps"
_GENERATION_BIT = "autoclear bit of the generation"


class Switch(NamedTuple):
    """The writes and barriers of one change of the bitmaps extension.

    Attributes:
        commit: the write that makes the change take effect. A barrier must follow.
        before: writes that have no effect yet. They become durable together with everything else
            that is prepared.
        steps: what must be done after ``before`` is durable, and before ``commit``.
        after: what must be done after the barrier behind ``commit``.
    """

    commit: Write
    before: tuple[Write, ...] = ()
    steps: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()


class HeaderDraft:
    """The header area as it will be, and the steps that lead there.

    Every method plans one change on top of the changes planned before. So the steps must be done in
    the order in which the methods were called.

    Attributes:
        generation: the generation that the header will record; None if it will record none.
    """

    def __init__(self, file: ClusterFile) -> None:
        """Begins with the stored header area; raises `StorageError` if it cannot be read."""
        self._cluster = HeaderCluster(file)
        self._known_autoclear = file.known_autoclear
        self.generation = file.generation

    def apply(self, steps: Sequence[Step]) -> None:
        """Takes over the writes of other plans to the first cluster."""
        for step in steps:
            if isinstance(step, Write) and step.offset < len(self._cluster.data):
                self._cluster.put(step.offset, b"".join(step.parts))

    def clear_unknown_autoclear(self) -> list[Step]:
        """Clears the autoclear bits of unknown features, which a change would make untrue.

        These steps come before every other write to the image (INV-UNKNOWN).
        """
        cluster = self._cluster
        if not cluster.autoclear & ~self._known_autoclear:
            return []
        cluster.autoclear &= self._known_autoclear
        write = cluster.autoclear_write("autoclear bits of unknown features")
        return [write, Barrier("cleared autoclear bits")]

    def renew_generation(self, token: bytes | None = None) -> tuple[Write, ...]:
        """Writes a new generation token, if the image records one.

        ``token`` is the token to write; None draws a fresh one. The write must be durable before or
        together with the first write that changes a bitmap. A torn write is a new token as well.
        """
        if not self.generation:
            return ()
        self.generation = _next(self.generation, token)
        payload = build_generation(self.generation)
        what = "token of the generation"
        return (self._cluster.replace_payload(GENERATION, payload, what),)

    def begin_generation(self) -> list[Step]:
        """Makes the header record a generation; the steps, if any, end with a barrier.

        Raises:
            LimitError: the first cluster has no room for the generation extension.
            UnsupportedError: the layout of the header cannot be changed safely.
        """
        if self.generation:
            return []
        cluster = self._cluster
        self.generation = _next(Generation(b"", 0))
        mine = HeaderExtension(GENERATION, build_generation(self.generation), b"")
        tables = [e.data for e in cluster.extensions if e.type == FEATURE_NAMES]
        names = with_generation_name(tables[-1] if tables else b"")
        named = HeaderExtension(FEATURE_NAMES, names, bytes(-len(names) % 8))
        others = [e for e in cluster.extensions if e.type not in (FEATURE_NAMES, GENERATION)]
        steps = cluster.rearrange(cluster.order_in_one_sector([*others, named, mine]))
        cluster.autoclear |= AUTOCLEAR_GENERATION
        self._known_autoclear |= AUTOCLEAR_GENERATION
        return [*steps, cluster.autoclear_write(_GENERATION_BIT), Barrier(_GENERATION_BIT)]

    def end_generation(self) -> list[Step]:
        """Makes the header record no generation; raises as `begin_generation` does."""
        if not self.generation:
            return []
        cluster = self._cluster
        self.generation = None
        cluster.autoclear &= ~AUTOCLEAR_GENERATION
        write = cluster.autoclear_write(_GENERATION_BIT)
        others = [e for e in cluster.extensions if e.type != GENERATION]
        steps = cluster.rearrange(cluster.order_in_one_sector(others))
        return [write, Barrier(_GENERATION_BIT), *steps]

    def straighten(self) -> list[Step]:
        """Moves the bitmaps extension so that its payload lies within one sector.

        In most images nothing has to be done. QEMU may move the extension back.

        Raises:
            LimitError: the first cluster has no room for the move.
            UnsupportedError: no order of the extensions has the payload in one sector.
        """
        if is_in_one_sector(self._payload_offset(), BITMAPS_LENGTH):
            return []
        cluster = self._cluster
        return cluster.rearrange(cluster.order_in_one_sector(cluster.extensions))

    def replace(self, payload: bytes) -> Switch:
        """Gives the bitmaps extension another payload; the caller calls `straighten` before."""
        return Switch(self._cluster.replace_payload(BITMAPS, payload, "bitmaps extension"))

    def revive(self, payload: bytes) -> Switch:
        """Gives a stale bitmaps extension a new payload, and sets its autoclear bit.

        Until the new directory is whole, the stale extension leads to the old directory, which is
        the last trace of the old bitmaps. If `straighten` was called before, the extension leads to
        one of these two directories at any time.
        """
        write = self.replace(payload).commit
        self._cluster.autoclear |= AUTOCLEAR_BITMAPS
        written = write_in_sectors(write.offset, payload, write.what)
        commit = self._cluster.autoclear_write(_BITMAPS_BIT)
        return Switch(commit, (), (*written, Barrier(write.what)))

    def insert(self, payload: bytes) -> Switch:
        """Adds a bitmaps extension with this payload behind the others, and sets its autoclear bit.

        Raises:
            LimitError: the first cluster has no room for the extension.
            UnsupportedError: the extensions have no end marker, or it lies in two sectors.
        """
        cluster = self._cluster
        extension = HeaderExtension(BITMAPS, payload, b"")
        body = build_extensions(HeaderExtensions((extension,), bytes(HEAD_LENGTH)))
        head, end = cluster.end, cluster.end + len(body)
        cluster.extensions.append(extension)
        is_in_the_way = 0 < cluster.name_offset < end
        if end + cluster.name_size * is_in_the_way <= SECTOR_SIZE:
            return self._insert_at_once(head, body, is_in_the_way)
        if not cluster.has_end_marker or not is_in_one_sector(head, HEAD_LENGTH):
            raise UnsupportedError("adding a header extension where the others have no end marker")
        if not is_in_the_way:
            cluster.require_room(end)
            content = self._insert_content(head, body)
            steps, commit = self._insert_head(head, body)
            return Switch(commit, content, steps)
        copied, moved = self._move_name(end)
        ready = Barrier("content of the bitmaps extension")
        content = self._insert_content(head, body)
        steps, commit = self._insert_head(head, body)
        return Switch(commit, copied, (*moved, *content, ready, *steps))

    def _insert_at_once(self, head: int, body: bytes, moves_name: bool) -> Switch:
        """Inserts the extension and moves the backing file name in one write of one sector."""
        cluster = self._cluster
        start, stop = AUTOCLEAR, head + len(body)
        name = cluster.name
        cluster.put(head, body)
        if moves_name:
            cluster.name_offset = stop
            cluster.put(stop, name)
            start, stop = BACKING_OFFSET, stop + len(name)
        cluster.autoclear |= AUTOCLEAR_BITMAPS
        return Switch(cluster.write(start, stop, "header with a bitmaps extension"))

    def _move_name(self, end: int) -> tuple[tuple[Write, ...], tuple[Step, ...]]:
        """Plans a copy of the backing file name behind ``end``, and the switch to the copy."""
        cluster = self._cluster
        name, size = cluster.name, cluster.name_size
        place = align_up(max(end, cluster.name_offset + size), 8)
        cluster.require_room(place + size)
        cluster.put(place, name)
        cluster.name_offset = place
        copied = write_in_sectors(place, name, "copy of the backing file name")
        return copied, tuple(cluster.name_switch())

    def _insert_content(self, head: int, body: bytes) -> tuple[Write, ...]:
        """Writes all of ``body`` but its head behind the old end marker, where it has no effect."""
        start, content = head + HEAD_LENGTH, body[HEAD_LENGTH:]
        self._cluster.put(start, content)
        return write_in_sectors(start, content, "content of the bitmaps extension")

    def _insert_head(self, head: int, body: bytes) -> tuple[tuple[Step, ...], Write]:
        """Writes the head of ``body`` over the old end marker, and sets the autoclear bit.

        The last write sets the autoclear bit; if both lie in the first sector, it writes both.
        """
        cluster = self._cluster
        stop = head + HEAD_LENGTH
        cluster.put(head, body[:HEAD_LENGTH])
        steps: tuple[Step, ...] = ()
        if stop > SECTOR_SIZE:
            write = cluster.write(head, stop, "head of the bitmaps extension")
            steps, stop = (write, Barrier("bitmaps extension")), AUTOCLEAR + 8
        cluster.autoclear |= AUTOCLEAR_BITMAPS
        return steps, cluster.write(AUTOCLEAR, stop, _BITMAPS_BIT)

    def clear_bitmaps_bit(self) -> Switch:
        """Clears the autoclear bit of the bitmaps in an image without bitmaps extension."""
        self._cluster.autoclear &= ~AUTOCLEAR_BITMAPS
        return Switch(self._cluster.autoclear_write(_BITMAPS_BIT))

    def remove(self) -> Switch:
        """Clears the autoclear bit of the bitmaps, and then removes the bitmaps extension.

        Raises:
            LimitError: the first cluster has no room for the change.
            UnsupportedError: the layout of the header cannot be changed safely.
        """
        cluster = self._cluster
        kept = [e for e in cluster.extensions if e.type != BITMAPS]
        head = self._payload_offset() - HEAD_LENGTH
        tail = build_extensions(HeaderExtensions(self._behind(head), bytes(HEAD_LENGTH)))
        cluster.autoclear &= ~AUTOCLEAR_BITMAPS
        if head + len(tail) <= SECTOR_SIZE:
            cluster.put(head, tail)
            cluster.extensions = kept
            stop = head + len(tail)
            return Switch(cluster.write(AUTOCLEAR, stop, "header without bitmaps extension"))
        commit = cluster.autoclear_write(_BITMAPS_BIT)
        if len(tail) == HEAD_LENGTH and is_in_one_sector(head, HEAD_LENGTH):
            cluster.put(head, tail)
            cluster.extensions = kept
            after = cluster.write(head, head + HEAD_LENGTH, "end of the header extensions")
            return Switch(commit, after=(after,))
        return Switch(commit, after=tuple(cluster.rearrange(kept)[:-1]))

    def _payload_offset(self) -> int:
        """The host offset of the payload of the bitmaps extension, which exists."""
        place = self._cluster.payload_offset(BITMAPS)
        assert place is not None, "the caller knows that there is one"
        return place

    def _behind(self, head: int) -> tuple[HeaderExtension, ...]:
        """The extensions behind the extension whose head is at ``head``."""
        place = self._cluster.start
        for number, extension in enumerate(self._cluster.extensions):
            if place == head:
                return tuple(self._cluster.extensions[number + 1 :])
            place += extension.size
        return ()


def _next(generation: Generation, token: bytes | None = None) -> Generation:
    return Generation(token or fresh_token(), (generation.counter + 1) % (1 << 64))


def fresh_token() -> bytes:
    """Draws a token of the generation that was never used before."""
    return secrets.token_bytes(TOKEN_LENGTH)
