"""Set operations on packed bits, rescaling to another granularity, and masks of ranges, with numpy.

*Spec*: spec/edit.md, "Set algebra".
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from qcow2bm.bits.operations import Op

Octets = NDArray[np.uint8]
"""Packed bits, uint8[n], least significant bit first."""


def combine(op: Op, target: Octets, dirty: Octets, clean: Octets | None) -> Octets:
    """Returns the bits of ``target`` after an operation with a source: uint8[n] like ``target``.

    ``dirty`` and ``clean`` describe the source at the granularity of ``target``. A bit is set in
    ``dirty`` if any part of its granule is dirty in the source, and in ``clean`` if any part of the
    granule is clean in the source. If the granularity of the source is the same or coarser, each is
    the complement of the other, and ``clean`` may be None.

    *Guarantees*: if the operation at the finer granularity of the two would leave any part of a
    granule dirty, the bit of that granule is set in the result (INV-COARSE).
    """
    if op == "or":
        return target | dirty
    if op == "and":
        return target & dirty
    clean = ~dirty if clean is None else clean
    if op == "subtract":
        return target & clean
    return (target & clean) | (dirty & ~target)


def coarsen(bits: Octets, factor: int) -> Octets:
    """Replaces every ``factor`` bits by one bit that is set if any of them is set (INV-COARSE).

    ``factor`` is a power of two. The result is uint8[ceil(n / factor)]. Bits that are missing at
    the end count as clear.
    """
    if factor == 1 or not len(bits):
        return bits
    factor = min(factor, 8 << (len(bits) - 1).bit_length())  # at most one bit for all
    length = -(-len(bits) // factor)
    whole = max(factor, 8)
    if len(bits) % whole:
        bits = np.concatenate((bits, np.zeros(-len(bits) % whole, np.uint8)))
    if factor < 8:
        halves = _halved_words().take(bits.view("<u2"), mode="wrap")  # "raise" is slower
        return coarsen(halves, factor // 2)[:length]
    step = factor // 8
    word = min(step, 8)
    any_set = bits.view(f"u{word}") != 0
    if step > word:
        any_set = any_set.reshape(-1, step // word).any(axis=1)
    return np.packbits(any_set, bitorder="little")[:length]


def refine(bits: Octets, factor: int, length: int) -> Octets:
    """Repeats every bit ``factor`` times; returns the first ``length`` bytes: uint8[length].

    ``factor`` is a power of two, and ``bits`` must have enough bits for ``length`` bytes.
    """
    if factor == 1:
        return bits[:length]
    bits = bits[: -(-length // factor)]
    if factor <= 8:
        words = _fine_words(factor)[bits]
        return words.view(np.uint8)[:length]
    octets = np.unpackbits(bits, bitorder="little") * np.uint8(255)
    step = max(1, min(factor // 8, length))
    return np.repeat(octets[: -(-length // step)], step)[:length]


@cache
def _halved_words() -> Octets:
    """The result of `coarsen` by the factor 2 for each of the 65,536 values of two bytes."""
    words = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    bits = np.unpackbits(words, axis=1, bitorder="little")
    coarse = bits.reshape(-1, 8, 2).any(axis=2)
    return np.packbits(coarse, axis=1, bitorder="little")[:, 0]


@cache
def _fine_words(factor: int) -> NDArray[np.unsignedinteger]:
    """The result of `refine` for each of the 256 byte values; ``factor`` is 2, 4 or 8."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    fine = np.packbits(np.repeat(bits, factor, axis=1), axis=1, bitorder="little")
    words: NDArray[np.unsignedinteger] = np.ascontiguousarray(fine).view(f"u{factor}")[:, 0]
    return words


def merged(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sorts ranges and joins ranges that touch or overlap: int64[m, 2] of (first, stop).

    ``ranges`` is int64[n, 2] of (first, stop). Empty ranges are left out.
    """
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    if not len(ranges):
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])
    is_first = np.ones(len(ranges), np.bool_)
    is_first[1:] = ranges[1:, 0] > reach[:-1]
    firsts = np.flatnonzero(is_first)
    last = np.append(firsts[1:], len(ranges)) - 1
    return np.stack((ranges[firsts, 0], reach[last]), axis=1)


def mask_of(ranges: NDArray[np.int64], length: int) -> Octets:
    """Returns packed bits, uint8[length], in which exactly the bits in ``ranges`` are set.

    ``ranges`` is int64[n, 2] of (first, stop), as `merged` returns it.
    """
    steps = np.zeros(8 * length + 1, np.int8)
    steps[ranges[:, 0]] = 1
    steps[ranges[:, 1]] = -1
    return np.packbits(np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_), bitorder="little")
