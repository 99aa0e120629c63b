"""Hundreds of broken images: check finds what is wrong with each, where it is, and takes little."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator

import pytest
from support.broken_images import broken_images, faults
from support.spec_image import CLUSTER, DIRECTORY, EXTENSION, Patch, image, patched

import qcow2bm
from qcow2bm.checking.repair import plan_repair
from qcow2bm.errors import Qcow2BmError
from qcow2bm.problems import Problem
from qcow2bm.storage.memory import MemoryStorage

SINGLE = dict(faults())
HARMLESS = ("flags", "granularity_bits", "name")  # values that another image might well have

Place = tuple[int, int]


def checked(data: bytes) -> list[Problem]:
    with qcow2bm.open(data) as opened:
        return [*opened.problems, *opened.check().problems]


def places(what: str, patches: list[Patch]) -> Iterator[Place]:
    """Yields the places where a fault shows: its own bytes, and what is misread because of it."""
    for offset, content in patches:
        yield offset, offset + len(content)
    kind, *words = what.split()
    if kind == "refcount":
        cluster = int(words[2])
        yield cluster * CLUSTER, cluster * CLUSTER + 1
    elif kind == "table":  # where its entry leads, or led
        for data in (image(), patched(image(), *patches)):
            offset = word(data, patches[0][0])
            yield offset, offset + CLUSTER
    elif kind == "entry":  # it may be longer or shorter, and lead elsewhere
        place = DIRECTORY + 32 * int(words[0][0])
        yield place, DIRECTORY + CLUSTER
        table = word(patched(image(), *patches), place)
        for offset in (table, word(image(), table)):
            yield offset, offset + CLUSTER
    else:  # the extension, and the directory to which it leads
        yield EXTENSION, EXTENSION + 32
        yield DIRECTORY, DIRECTORY + CLUSTER
        yield 88, 96


def word(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 8], "big")


@pytest.mark.parametrize("what", SINGLE)
def test_what_is_planted_is_found_where_it_is(what: str) -> None:
    patches = SINGLE[what]
    found = checked(patched(image(), *patches))
    if not found:
        assert any(f".{field} = " in what or f": {field} " in what for field in HARMLESS)
        return
    wanted = list(places(what, patches))
    assert any(low <= p.offset < high for p in found for low, high in wanted), found


def test_few_of_them_are_harmless() -> None:
    sound = [what for what, patches in SINGLE.items() if not checked(patched(image(), *patches))]
    print(len(SINGLE), "images with one fault, of which harmless:", sound)
    assert len(sound) <= 16
    assert len(SINGLE) >= 300


@pytest.mark.deep
def test_nothing_takes_long_or_much() -> None:
    slowest = most = 0.0
    tracemalloc.start()
    try:
        checked(image())  # loads all there is to load
        plan_repair(MemoryStorage(image()))
        for what, data in broken_images():
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            begun = time.perf_counter()
            try:
                checked(data)
                plan_repair(MemoryStorage(data))
            except Qcow2BmError:
                pass
            slowest = max(slowest, time.perf_counter() - begun)
            _, peak = tracemalloc.get_traced_memory()
            most = max(most, peak - before)
            assert peak - before < 64 << 20, what
    finally:
        tracemalloc.stop()
    print(f"check and repair, slowest: {slowest:.3f} s, most memory: {most / 2**20:.1f} MiB")
