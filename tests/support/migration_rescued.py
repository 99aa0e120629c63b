"""Plays migrations in which this library helps QEMU over QMP to keep persistent bitmaps.

`rescued` plays the cases of `alone` with the capability dirty-bitmaps, and more bitmaps: besides
p0 and s0, which record, d0 is persistent and disabled, and n0 is transient. What is there in the
end is compared with what QEMU had in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import pytest
from support.migration_alone import (
    BEFORE,
    CASES,
    GRANULARITY,
    OLD,
    SIZE,
    Scene,
    UnusableError,
    misses,
)
from support.qemu import LEAKS, Disk
from support.rescue import verdict
from support.twin import KiB
from support.vm import Machine

import qcow2bm
from qcow2bm.qmp.arm import arm
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import is_evidence
from qcow2bm.qmp.settlement import Remedy, Settlement
from qcow2bm.qmp.veto import lift_vetoes

Way = Literal["alone", "start", "remove", "all-dirty"]

PERSISTENT = "p0", "d0", "s0"
NEVER = 1000  # more than are ever written: d0 records none of them


class Result(NamedTuple):
    """The result of a case: the word of `alone`, and that of the verdict, if one was asked for."""

    word: str
    verdict: str


def rescued(case: str, way: Way, folder: Path) -> Result:
    """Plays a case: QEMU alone; with ``rescue start``; or armed, with a remedy, and started."""
    disk = Disk.create(folder / "disk.qcow2", SIZE)
    disk.io(f"write {OLD[0]} {OLD[1]}")
    disk.add("d0", 4 * KiB)
    disk.add("p0", GRANULARITY)
    disk.io(f"write {BEFORE[0]} {BEFORE[1]}")
    disk.bitmap("d0", "--disable")
    address = folder / "qmp"
    with Machine(disk.path, monitor=address) as source:
        scene = Scene(disk, source, capability=True)
        scene.missing["d0"] = NEVER
        scene.begin()
        transient = {"node": "disk", "name": "n0", "granularity": GRANULARITY}
        source.execute("block-dirty-bitmap-add", transient)
        remedy: Remedy | None = next((r for r in get_args(Remedy) if r == way), None)
        if remedy:
            _arm(address)
        try:
            CASES[case](scene)
        except UnusableError:
            return _started_anew(scene, way, address)
        found = _verdict(scene, address, remedy) if remedy else None
        if way != "alone":
            _start(source, address)
        if way == "all-dirty" and found and found.verdict.word != "untouched":
            counts = {n: b["count"] for n, b in source.bitmaps().items()}
            assert {name: counts[name] for name in ("p0", "s0", "n0")} == dict.fromkeys(
                ("p0", "s0", "n0"), SIZE
            )
        hashes = {name: source.sha256(name) for name in source.bitmaps()}
        source.quit()
    _check(disk, hashes, LEAKS if case == "unaware program wrote" else 0)
    return Result(scene.outcome(), found.verdict.word if found else "")


def _arm(address: Path) -> None:
    """Arms twice; the second time there is nothing to do."""
    with Monitor(str(address)) as monitor:
        armed = arm(monitor, ["disk"], set_mapping=True)
        again = arm(monitor, ["disk"], set_mapping=True)
    (node,) = armed.nodes
    assert node.is_new
    assert again == armed._replace(nodes=(node._replace(is_new=False),))


def _verdict(scene: Scene, address: Path, remedy: Remedy) -> Settlement:
    """Judges without a remedy, which changes nothing, then with it, then once more for nothing."""
    source = scene.source
    with Monitor(str(address)) as monitor:
        (first,) = verdict(monitor)
        if first.is_armed:
            assert set(PERSISTENT) | {"n0"} <= source.bitmaps().keys()
            (found,) = verdict(monitor, remedy=remedy)
            assert found.verdict.word == first.verdict.word
        else:
            assert first.verdict.word == "untouched"
            found = first
        assert not found.is_armed
        assert not any(map(is_evidence, source.bitmaps()))
        assert verdict(monitor) == []
    return found


def _start(source: Machine, address: Path) -> None:
    """Lifts the vetoes twice; neither time may a bit or a bitmap change."""
    before = source.bitmaps()
    hashes = {name: source.sha256(name) for name in before}
    persistent = sorted(name for name, bitmap in before.items() if bitmap["persistent"])
    with Monitor(str(address)) as monitor:
        for _ in range(2):
            done = lift_vetoes(monitor)
            assert [(b.bitmap.name, b.outcome, b.proof) for b in done.bitmaps] == [
                (name, "rescued", "sha256") for name in persistent
            ]
            assert source.bitmaps() == before
            assert {name: source.sha256(name) for name in before} == hashes


def _started_anew(scene: Scene, way: Way, address: Path) -> Result:
    """The source has lost its disk; the image is good, and another machine goes on with it."""
    source, word = scene.source, ""
    if way != "alone":
        with Monitor(str(address)) as monitor:
            for command in (lift_vetoes, verdict):
                asked: Callable[[Monitor], object] = command
                with pytest.raises(qcow2bm.StateError, match="is ejected"):
                    asked(monitor)
    source.quit()
    if way == "alone":
        return Result("unusable", "")
    address.unlink(missing_ok=True)
    with Machine(scene.disk.path, monitor=address) as again:
        with Monitor(str(address)) as monitor:
            word = "".join(found.verdict.word for found in verdict(monitor))
        hashes = {name: again.sha256(name) for name in again.bitmaps()}
        again.quit()
    _check(scene.disk, hashes, 0)
    assert scene.outcome() == "stored"
    return Result("unusable", word)


def _check(disk: Disk, hashes: dict[str, str], checked: int) -> None:
    """Asserts that the image is sound, and each valid bitmap persistent and with QEMU's bits."""
    assert disk.check().returncode == checked
    with qcow2bm.open(disk.path) as image:
        for name, bitmap in image.bitmaps.items():
            if bitmap.status == "valid":
                assert name in PERSISTENT
                assert bitmap.sha256() == hashes[name]
                assert bitmap.auto == (name != "d0")
        if "d0" in image.bitmaps and image.bitmaps["d0"].status == "valid":
            extents = [tuple(row) for part in image.bitmaps["d0"].extents() for row in part]
            assert not misses(extents, BEFORE)
