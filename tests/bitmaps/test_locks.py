"""A reader holds its locks for a short time: a VM that starts meanwhile has to wait, or fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.images import ZEROES, Built, Stored, build_image
from support.scripted_storage import ScriptedStorage

import qcow2bm
from qcow2bm.bitmaps import tables

MIB = 1 << 20
ENTRIES = MIB // 8
"""The entries of a table of the largest size that is read at once."""


class Recorder(ScriptedStorage):
    """Lists for each time the lock was held how many bytes of tables were read."""

    def __init__(self, image: Built) -> None:
        super().__init__(image.data)
        self.first = image.offset("bitmap-table", 0)
        self.end = image.offset("bitmap-directory")
        self.held: list[int] = []
        self.is_held = False

    def change_token(self) -> object:
        return "nobody writes"

    @contextmanager
    def read_lock(self) -> Iterator[None]:
        assert not self.is_held
        begin = len(self.reads)
        self.is_held = True
        yield
        self.is_held = False
        reads = self.reads[begin:]
        inside = [stop - start for start, stop in reads if self.first <= start < self.end]
        self.held.append(sum(inside))


def image_of(*entries: int) -> Built:
    """An image of bitmaps with tables of so many entries, each of the right size."""
    # An L1 table for such a disk would be larger than all the rest.
    size = 1 << 40
    return build_image(
        *(
            Stored(b"%d" % n, [ZEROES] * count, (size // count // 4096).bit_length() - 1)
            for n, count in enumerate(entries)
        ),
        header={"size": size},
    )


@pytest.mark.spec("LOCK-2")
@pytest.mark.parametrize(
    ("entries", "held"),
    [
        ([512], [512 * 8]),
        ([ENTRIES // 2] * 5, [MIB, MIB, MIB // 2]),
        ([ENTRIES, 512, ENTRIES], [MIB, 512 * 8, MIB]),
        ([512, 2 * ENTRIES, 512], [512 * 8, 2 * MIB, 512 * 8]),
    ],
)
def test_locks_are_held_for_a_few_tables_at_a_time(
    monkeypatch: pytest.MonkeyPatch, entries: list[int], held: list[int]
) -> None:
    storage = Recorder(image_of(*entries))
    looked: list[str] = []

    def outside(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: object) -> Any:
            assert not storage.is_held
            looked.append(function.__name__)
            return function(*arguments)

        return checked

    opened = qcow2bm.open(storage)
    assert storage.held == [0]
    for name in ("table_runs", "fingerprint", "_entry_faults"):
        monkeypatch.setattr(tables, name, outside(getattr(tables, name)))
    statuses = [bitmap.status for bitmap in opened.bitmaps.values()]
    assert statuses == ["valid"] * len(entries)
    # Before the tables what else lies in the file is read, after them the directory again.
    assert storage.held == [0, 0, *held, 0]
    assert len(looked) == 3 * len(entries)


@pytest.mark.spec("TAB-4")
@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_tables_beyond_the_limit_are_not_read(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(tables, "MAX_TABLES_BYTES", limit * MIB)
    storage = Recorder(image_of(*[ENTRIES] * 3))
    opened = qcow2bm.open(storage)
    statuses = [bitmap.status for bitmap in opened.bitmaps.values()]
    assert statuses == ["valid"] * limit + ["broken"] * (3 - limit)
    found = [problem for problem in opened.problems if problem.id == "bitmap-table.limit"]
    assert [problem.bitmap_index for problem in found] == list(range(limit, 3))
    for problem in found:
        reason = f"is not read: the tables before it have {limit} MiB together"
        assert problem.message.endswith(reason)
    assert sum(storage.held) == limit * MIB
