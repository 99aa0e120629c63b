"""Counting set bits and edges in packed bits, with numpy."""

from __future__ import annotations

import numpy as np


def count_bits(data: bytes | bytearray | memoryview) -> int:
    """Counts the bits that are set.

    *Twin*: `qcow2bm.bits.pure_python.count_bits`.
    """
    bits = np.frombuffer(data, np.uint8)
    whole = len(bits) // 8 * 8
    words = np.bitwise_count(bits[:whole].view(np.uint64)).sum(dtype=np.int64)
    return int(words) + int(np.bitwise_count(bits[whole:]).sum(dtype=np.int64))


def count_edges(data: bytes | bytearray | memoryview, carry: int) -> int:
    """Counts the bits that differ from the bit before them; ``carry``, 0 or 1, comes before bit 0.

    *Twin*: `qcow2bm.bits.pure_python.count_edges`.
    """
    octets = np.frombuffer(data, np.uint8)
    whole = len(octets) // 8 * 8
    words = octets[:whole].view("<u8").astype(np.uint64, copy=False)
    changes = words << np.uint64(1)
    changes[1:] |= words[:-1] >> np.uint64(63)
    changes[:1] |= np.uint64(carry)
    changes ^= words
    edges = int(np.bitwise_count(changes).sum(dtype=np.int64))
    if whole:
        carry = int(words[-1] >> np.uint64(63))
    for octet in octets[whole:].tolist():
        edges += ((octet << 1 | carry) & 0xFF ^ octet).bit_count()
        carry = octet >> 7
    return edges
