"""Reading the bits that a bitmap table leads to.

*Spec*: spec/bitmaps.md, "Bitmap table" and "Bitmap data".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qcow2bm.bitmaps.tables import table_runs
from qcow2bm.bits import pure_python
from qcow2bm.bits.runs import ALL_ONES, ALL_ZEROES, ALLOCATED, INVALID
from qcow2bm.clusters.file import ClusterFile

ZERO_BYTES = bytes(64 << 10)
ONE_BYTES = b"\xff" * len(ZERO_BYTES)


class Piece(NamedTuple):
    """Bytes ``start`` to ``end`` of the bits of a bitmap.

    If ``kind`` is ALLOCATED, they are stored from host ``offset`` on. Otherwise all of them have
    one value.
    """

    kind: int
    start: int
    end: int
    offset: int

    def cut(self, start: int) -> Piece:
        """Returns the rest of the piece, from byte ``start`` of the bits on."""
        return self._replace(start=start, offset=self.offset + start - self.start)


def pieces(
    file: ClusterFile,
    words: array[int],
    length_bytes: int,
    *,
    dirty_where_unknown: bool = False,
    vectorize: bool = False,
) -> Iterator[Piece]:
    """Yields the first ``length_bytes`` of the bits in order, without a gap.

    Bits that the table does not cover are set (INV-COARSE). With ``dirty_where_unknown``, bits
    are also set where a table entry is invalid or leads out of the file; without it, the caller
    vouches that there is no such entry. For ``vectorize`` see `table_runs`.
    """
    cluster_size = file.cluster_size
    end = 0
    for run in table_runs(words, cluster_size, vectorize=vectorize):
        start = run.first * cluster_size
        if start >= length_bytes:
            break
        end = min(start + run.entries * cluster_size, length_bytes)
        piece = Piece(run.kind, start, end, run.offset)
        if not dirty_where_unknown:
            yield piece
        elif run.kind == INVALID:
            yield piece._replace(kind=ALL_ONES)
        elif run.kind == ALLOCATED:
            known = max(0, min(end - start, file.file_size - run.offset))
            known = known // cluster_size * cluster_size if known < end - start else known
            if known:
                yield piece._replace(end=start + known)
            if start + known < end:
                yield Piece(ALL_ONES, start + known, end, 0)
        else:
            yield piece
    if end < length_bytes:
        yield Piece(ALL_ONES, end, length_bytes, 0)


def fill(file: ClusterFile, pieces: Iterable[Piece], buffer: memoryview, origin: int) -> None:
    """Writes pieces into ``buffer``, whose first byte is byte ``origin`` of the bits.

    Raises:
        StorageError: reading failed.
    """
    for piece in pieces:
        part = buffer[piece.start - origin : piece.end - origin]
        if piece.kind == ALLOCATED:
            file.read_into(piece.offset, part)
            continue
        constant = ONE_BYTES if piece.kind == ALL_ONES else ZERO_BYTES
        for start in range(0, len(part), len(constant)):
            rest = part[start : start + len(constant)]
            rest[:] = constant[: len(rest)]


def clear_tail(octets: bytearray | memoryview, bits: int) -> None:
    """Clears everything behind the first ``bits`` bits, of which there may be none (INV-TAIL)."""
    pure_python.fill(octets, max(0, bits), 8 * len(octets), is_set=False)


def read_bits(
    file: ClusterFile,
    words: array[int],
    bits: int,
    out: memoryview,
    *,
    dirty_where_unknown: bool = False,
    vectorize: bool = False,
) -> None:
    """Fills ``out``, which is all zeros, with the stored bits; all behind ``bits`` are zeros.

    For the options see `pieces`.

    Raises:
        StorageError: reading failed.
    """
    found = pieces(
        file, words, len(out), dirty_where_unknown=dirty_where_unknown, vectorize=vectorize
    )
    fill(file, (piece for piece in found if piece.kind != ALL_ZEROES), out, 0)
    clear_tail(out, bits)
