"""The undo file, which a repair leaves so that the repair can be undone: parsing and building.

*Spec*: spec/repair.md, "Undo file".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from construct import Bytes, Int8ub, Int32ub, Int64ub, Struct

from qcow2bm.errors import FormatError, LimitError, UnsupportedError
from qcow2bm.format.piece_source import PieceSource
from qcow2bm.format.schema import build, field_offsets, parse

MAGIC = b"\x89qbmundo"
VERSION = 1
DIGEST_BYTES = 32

WRITE, BARRIER = 1, 0

MAX_STEPS = 1 << 18
"""The most steps of an undo file: more than any repair takes that was seen."""

MAX_BYTES = 1 << 30
"""The greatest length of an undo file without its seal."""

_LONGEST_FILE = (1 << 63) - 1  # what systems can have at most

_HEAD = Struct(
    "magic" / Bytes(8),
    "version" / Int32ub,
    "nb_steps" / Int32ub,
    "file_size" / Int64ub,
    "state" / Bytes(DIGEST_BYTES),
)
_SEAL = Struct("magic" / Bytes(8), "mtime_ns" / Int64ub, "sha256" / Bytes(DIGEST_BYTES))
SEAL_MAGIC = b"\x89qbmseal"
_STEP = Struct("type" / Int8ub, "length" / Int32ub, "offset" / Int64ub)
_OFFSETS = field_offsets(_HEAD)
HEAD_BYTES, STEP_BYTES, SEAL_BYTES = _HEAD.sizeof(), _STEP.sizeof(), _SEAL.sizeof()


class UndoStep(NamedTuple):
    """A write or a barrier of a repair.

    A write replaced the ``old`` bytes at ``offset`` by the ``new`` ones. A barrier has neither.
    """

    offset: int
    old: bytes
    new: bytes

    @property
    def is_barrier(self) -> bool:
        """Whether the step is a barrier."""
        return not self.new


BARRIER_STEP = UndoStep(0, b"", b"")


class UndoLog(NamedTuple):
    """The content of an undo file: all that a repair did.

    Attributes:
        file_size: the size of the image file in bytes before the repair.
        state: the digest of the metadata of the image after the repair.
        steps: the writes and barriers of the repair, in order.
        mtime_ns: the time of the last write of the repair. None if the repair did not reach its
            end, or if the storage does not know times.
    """

    file_size: int
    state: bytes
    steps: tuple[UndoStep, ...]
    mtime_ns: int | None = None


def build_seal(mtime_ns: int) -> bytes:
    """Builds the seal, which is appended to an undo file when the repair is done."""
    values = {"magic": SEAL_MAGIC, "mtime_ns": mtime_ns}
    data = build(_SEAL, {**values, "sha256": bytes(DIGEST_BYTES)}, "seal")[:-DIGEST_BYTES]
    return data + hashlib.sha256(data).digest()


def build_undo(undo: UndoLog) -> Iterator[bytes]:
    """Builds the bytes of an undo file, piece by piece, without its seal.

    Raises:
        LimitError: the repair has too many steps, or writes too many bytes.
    """
    _require_steps(len(undo.steps))
    lengths = (STEP_BYTES + len(step.old) + len(step.new) for step in undo.steps)
    _require_bytes(HEAD_BYTES + sum(lengths) + DIGEST_BYTES)
    digest = hashlib.sha256()
    for piece in _pieces(undo.file_size, undo.state, undo.steps):
        digest.update(piece)
        yield piece
    yield digest.digest()


def _pieces(file_size: int, state: bytes, steps: Sequence[UndoStep]) -> Iterator[bytes]:
    head = {"magic": MAGIC, "version": VERSION, "nb_steps": len(steps)}
    yield build(_HEAD, {**head, "file_size": file_size, "state": state}, "undo file")
    for step in steps:
        type = BARRIER if step.is_barrier else WRITE
        values = {"type": type, "length": len(step.new), "offset": step.offset}
        yield build(_STEP, values, "step")
        yield step.old
        yield step.new


def parse_undo(data: bytes | bytearray | memoryview | Iterable[bytes]) -> UndoLog:
    """Parses an undo file.

    Args:
        data: the whole file, or the file in pieces of any size.

    Raises:
        FormatError: ``data`` is not an undo file, or is damaged, or is cut off.
        UnsupportedError: this library does not know the version of the undo file.
        LimitError: there are more steps or bytes than `build_undo` writes.
    """
    pieces = (bytes(data),) if isinstance(data, bytes | bytearray | memoryview) else data
    source = PieceSource("undo file", pieces)
    found = parse(_HEAD, source.take(HEAD_BYTES), "undo file", 0, _OFFSETS)
    if found.magic != MAGIC:
        raise FormatError("undo file", "magic", 0, "is not the magic of an undo file")
    if found.version != VERSION:
        raise UnsupportedError(f"version {found.version} of undo files, only version {VERSION}")
    _require_steps(found.nb_steps)
    steps = [_parse_step(source, number) for number in range(found.nb_steps)]
    source.take_digest()
    mtime_ns = _sealed(source.rest(SEAL_BYTES))
    return UndoLog(found.file_size, found.state, tuple(steps), mtime_ns)


def _parse_step(source: PieceSource, number: int) -> UndoStep:
    place = source.offset
    step = parse(_STEP, source.take(STEP_BYTES), f"step {number}", place)
    is_wrong = (step.type == WRITE) != bool(step.length) or step.type not in (WRITE, BARRIER)
    if is_wrong or step.offset + step.length > _LONGEST_FILE:
        raise FormatError(f"step {number}", "", place, "is invalid")
    _require_bytes(source.offset + 2 * step.length)
    if step.type == BARRIER:
        return BARRIER_STEP
    return UndoStep(step.offset, source.take(step.length), source.take(step.length))


def _require_steps(count: int) -> None:
    if count > MAX_STEPS:
        raise LimitError("the number of steps of an undo file", count, MAX_STEPS)


def _require_bytes(length: int) -> None:
    if length > MAX_BYTES:
        raise LimitError("the length of an undo file in bytes", length, MAX_BYTES)


def _sealed(seal: bytes) -> int | None:
    """The time in a seal; None if the seal is missing or cut off."""
    is_whole = len(seal) == SEAL_BYTES and seal.startswith(SEAL_MAGIC)
    if not is_whole or hashlib.sha256(seal[:-DIGEST_BYTES]).digest() != seal[-DIGEST_BYTES:]:
        return None
    return int(parse(_SEAL, seal, "seal", 0).mtime_ns)
