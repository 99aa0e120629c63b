"""QEMU opens the states that a loss of power can leave, and reads what this library reads."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from support import qemu
from support.crash_judge import Facts
from support.crash_states import intervals
from support.edit_operations import operations, planned
from support.layouts import BACKING_NAME, DATA_FILE_NAME, LAYOUTS, build
from support.qemu import LEAKS, Disk

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

pytestmark = [pytest.mark.qemu, pytest.mark.deep]

PER_INTERVAL = 2
LAYOUTS_PER_TEST = 10
NAMES = list(LAYOUTS)


@pytest.fixture(scope="module", autouse=True)
def qemu_tools() -> None:
    missing = qemu.missing_tools()
    if missing and os.environ.get("QCOW2BM_REQUIRE_QEMU"):
        pytest.fail(f"not installed: {missing}")
    if missing:
        pytest.skip(f"not installed: {missing}")


def flags_as_qemu_says(flags: int) -> list[str]:
    return ["in-use"] * bool(flags & FLAG_IN_USE) + ["auto"] * bool(flags & FLAG_AUTO)


def errors_of(disk: Disk) -> set[str]:
    """The errors that qemu-img check finds, a line each."""
    check = disk.check()
    lines = (check.stdout + check.stderr).splitlines()
    errors = {line for line in lines if line.startswith("ERROR")}
    assert check.returncode in (0, LEAKS) or errors, check
    return errors


def assert_qemu_agrees(disk: Disk, facts: Facts, errors_before: set[str]) -> None:
    assert errors_of(disk) <= errors_before
    info = disk.info()
    assert info.get("backing-filename") == facts.fixed[1]
    assert info["virtual-size"] == facts.fixed[0].size
    assert info["format-specific"]["data"].get("bitmaps", []) == [
        {"name": b.name, "granularity": b.granularity, "flags": flags_as_qemu_says(b.flags)}
        for b in facts.bitmaps
    ]


def assert_qemu_reads_the_same(disk: Disk) -> None:
    with qcow2bm.open(disk.path) as image:
        for name, bitmap in list(image.bitmaps.items())[:3]:
            if bitmap.status == "valid":
                found = [tuple(row) for part in bitmap.extents() for row in part.tolist()]
                assert found == disk.extents(name)


@pytest.mark.parametrize("first", range(0, len(NAMES), LAYOUTS_PER_TEST))
def test_states_in_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.chdir(tmp_path)  # where the name of a data file begins
    disk = Disk(tmp_path / "disk.qcow2")
    count = 0
    for name in NAMES[first : first + LAYOUTS_PER_TEST]:
        random = Random(name)
        found = operations(LAYOUTS[name])
        for operation in random.sample(found, min(len(found), 1)):
            judge, plan = planned(build(name), operation)
            size = judge.old.fixed[0].size
            (tmp_path / DATA_FILE_NAME.decode()).write_bytes(bytes(512))
            os.truncate(tmp_path / DATA_FILE_NAME.decode(), size)
            Disk.create(tmp_path / BACKING_NAME.decode(), size)
            disk.path.write_bytes(judge.image)
            errors_before = set() if judge.old.faults else errors_of(disk)
            for interval in intervals(judge.image, plan):
                choices = interval.choices(random)
                for choice in random.sample(choices, min(len(choices), PER_INTERVAL)):
                    facts = judge.judge_state(interval, choice, plan)
                    if not facts.faults:  # for which it refuses the image as it was before
                        disk.path.write_bytes(interval.image(choice))
                        assert_qemu_agrees(disk, facts, errors_before)
                        count += 1
            disk.path.write_bytes(interval.after)
            if not facts.faults:
                assert_qemu_agrees(disk, judge.judge(interval.after, "new"), errors_before)
                assert_qemu_reads_the_same(disk)
            count += 1
    print(f"crash states opened by QEMU: {count}")
    assert count >= LAYOUTS_PER_TEST
