"""How far a long command is, on standard error, where somebody looks at that.

*Spec*: spec/cli.md, "Exit status".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None] | None]:
    """What is to be told of so many more bytes done: tqdm's bar where it is installed."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        yield _Percentage(total).add
        print(file=sys.stderr)
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update


class _Percentage:
    """A number that counts up to 100."""

    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._done = 0
        self._shown = -1

    def add(self, count: int) -> None:
        """So many more bytes are done."""
        self._done += count
        percentage = 100 * self._done // self._total
        if percentage > self._shown:
            self._shown = percentage
            print(f"\rcompared: {percentage} %", end="", file=sys.stderr, flush=True)
