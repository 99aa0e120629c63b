"""Many mutants of something sound, each different one judged once.

A mutation is often made twice. The mutants of a seed are dealt out to the parts of a test, so that
no part judges what another one has judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from random import Random


def different(
    make: Callable[[Random], bytes | bytearray],
    seed: int,
    count: int,
    part: int = 0,
    parts: int = 1,
) -> Iterator[tuple[int, bytes]]:
    """The different ones of ``count`` mutants with their numbers, as far as they fall to a part.

    Args:
        make: makes one mutant.
        seed: all parts take the same one, and so make the same mutants.
        count: how many mutants are made by each part.
        part: the number of the part, below ``parts``.
        parts: how many parts there are; together they have every different mutant once.
    """
    random, seen = Random(seed), set[bytes]()
    for number in range(count):
        mutant = bytes(make(random))
        digest = sha256(mutant).digest()
        if digest not in seen:
            if len(seen) % parts == part:
                yield number, mutant
            seen.add(digest)
