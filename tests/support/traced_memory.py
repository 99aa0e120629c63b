"""The memory that Python takes while a block runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Memory:
    """Bytes that a block took: those that were in use at its end, and the most at once."""

    kept: int = 0
    peak: int = 0


@contextmanager
def traced_memory() -> Iterator[Memory]:
    """Measures the block; the values are those of its end, unless it raises."""
    memory = Memory()
    tracemalloc.start()
    try:
        yield memory
        memory.kept, memory.peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
