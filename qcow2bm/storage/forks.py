"""Telling objects that keep state in memory when their process was forked.

After a fork, the child has a copy of the memory, and the threads of the parent do not run there.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Disownable(Protocol):
    """An object whose copy in a forked process must not be used."""

    def disown(self) -> None:
        """Ends the copy. Called in the child; a lock may be held by a thread of the parent."""


_watching: WeakSet[Disownable] = WeakSet()


def disown_in_forks(watching: Disownable) -> None:
    """Lets ``disown`` be called in every process that is forked while the object lives."""
    _watching.add(watching)


def _disown_all() -> None:
    for watching in list(_watching):
        watching.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
