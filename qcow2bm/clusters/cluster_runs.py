"""Runs of clusters: joining them, and placing requested runs in free clusters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

Run = tuple[int, int]
"""A run of clusters by their numbers: (first, stop)."""


def join_runs(runs: Iterable[Run]) -> list[Run]:
    """Sorts runs, and joins runs that touch or overlap."""
    merged: list[Run] = []
    for first, stop in sorted(run for run in runs if run[0] < run[1]):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((first, stop))
    return merged


def subtract_runs(runs: Iterable[Run], others: Sequence[Run]) -> list[Run]:
    """Returns the parts of ``runs`` that are in none of the ``others``, which are joined."""
    left: list[Run] = []
    for first, stop in runs:
        number = bisect_left(others, (first, first))
        if number and others[number - 1][1] > first:
            number -= 1
        while number < len(others) and others[number][0] < stop:
            left.append((first, others[number][0]))
            first = others[number][1]
            number += 1
        left.append((first, stop))
    return [run for run in left if run[0] < run[1]]


def place_runs(
    free: list[Run], runs: Sequence[int], loose: int
) -> tuple[list[Run | None], list[Run], int]:
    """Places runs and loose clusters in the free clusters, as far as they fit.

    ``runs`` are lengths, and ``loose`` is a number of clusters that may lie anywhere. The function
    shortens the runs in ``free`` in which it places runs.

    Returns:
        The place of each run, None if it does not fit; the places of loose clusters; and the
        number of clusters that are missing.
    """
    placed: list[Run | None] = []
    left = 0
    fits: dict[int, int] = {}  # by length: the first free run that may be long enough
    for length in runs:
        number = fits.get(length, 0)
        while number < len(free) and free[number][1] - free[number][0] < length:
            number += 1
        fits[length] = number
        if number == len(free):
            placed.append(None)
            left += length
            continue
        first, stop = free[number]
        placed.append((first, first + length))
        free[number] = first + length, stop
    pieces = []
    for first, stop in free:
        count = min(loose, stop - first)
        if count:
            pieces.append((first, first + count))
            loose -= count
    return placed, pieces, left + loose
