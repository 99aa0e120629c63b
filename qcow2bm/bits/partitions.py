"""Disks cut into ranges that have labels, as streams of arrays.

A partition of a disk is a stream of pieces in order. Each range begins where the one before it
ends, the first at byte 0, and the last range ends where the disk ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class Piece(NamedTuple):
    """Some ranges in a row: the guest byte behind each, and its label; int64[n] each."""

    ends: Numbers
    labels: Numbers

    def cut(self, place: int) -> Piece:
        """Returns the ranges up to a guest byte, which lies in the piece; the last one is cut."""
        count = int(np.searchsorted(self.ends, place)) + 1
        ends = self.ends[:count].copy()
        ends[-1] = place
        return Piece(ends, self.labels[:count])

    def behind(self, place: int) -> Piece:
        """Returns the ranges behind a guest byte, perhaps none; the first one is cut."""
        first = int(np.searchsorted(self.ends, place, "right"))
        return Piece(self.ends[first:], self.labels[first:])


class Ranges(NamedTuple):
    """Ranges with labels and gaps between them: starts, ends and labels, int64[n] each."""

    starts: Numbers
    ends: Numbers
    labels: Numbers


def partition(found: Iterator[Ranges], size: int) -> Iterator[Piece]:
    """Yields the partition of a disk of ``size`` bytes whose ranges are ``found``, in order.

    The gaps between the ranges have the label 0. No two neighbours have the same label.
    """
    return _joined(_without_gaps(found, size))


def _without_gaps(found: Iterator[Ranges], size: int) -> Iterator[Piece]:
    end = 0
    for starts, ends, labels in found:
        bounds = np.column_stack((starts, ends)).ravel()
        names = np.column_stack((np.zeros_like(labels), labels)).ravel()
        is_some = np.diff(bounds, prepend=end) > 0
        end = int(bounds[-1]) if len(bounds) else end
        yield Piece(bounds[is_some], names[is_some])
    if end < size:
        yield Piece(np.array([size]), np.array([0]))


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Yields a partition whose neighbours of one label have become one range."""
    held = Piece(np.zeros(0, np.int64), np.zeros(0, np.int64))  # the next range may belong to it
    for piece in pieces:
        ends = np.concatenate((held.ends, piece.ends))
        labels = np.concatenate((held.labels, piece.labels))
        lasts = np.flatnonzero(np.append(np.diff(labels) != 0, True)[: len(labels)])
        ends, labels = ends[lasts], labels[lasts]
        if len(ends) > 1:
            yield Piece(ends[:-1], labels[:-1])
        held = Piece(ends[-1:], labels[-1:])
    if len(held.ends):
        yield held


class Refined(NamedTuple):
    """Ranges that two partitions have in common: the guest byte behind each, and both labels."""

    ends: Numbers
    labels: Numbers
    others: Numbers


def refine(ours: Iterator[Piece], theirs: Iterator[Piece]) -> Iterator[Refined]:
    """Yields the ranges into which two partitions of one disk cut it together, int64[n] each.

    If no neighbours in a partition have the same label, no neighbours here have the same labels.
    """
    one, other = next(ours, None), next(theirs, None)
    while one and other:
        if not len(one.ends):
            one = next(ours, None)
        elif not len(other.ends):
            other = next(theirs, None)
        else:
            place = int(min(one.ends[-1], other.ends[-1]))
            left, right = one.cut(place), other.cut(place)
            ends = np.sort(np.concatenate((left.ends, right.ends)), kind="stable")
            ends = ends[np.append(np.diff(ends) > 0, True)]
            yield Refined(
                ends,
                left.labels[np.searchsorted(left.ends, ends)],
                right.labels[np.searchsorted(right.ends, ends)],
            )
            one, other = one.behind(place), other.behind(place)
