"""A shared block device: what is given to another host is not read from, nor spoilt by, the cache.

Two loop devices of one file are two hosts: each goes on seeing what it has once read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.hosts import Host, host
from support.qemu import Disk, run_ok

import qcow2bm

MiB = 1 << 20
SIZE = 64 * MiB


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Both have an image with a bitmap on the device, and both have read all of it."""
    path = tmp_path / "disk"
    disk = Disk.create(tmp_path / "image.qcow2", SIZE, cluster_size=4096)
    disk.bitmap("daily", "--add")
    path.write_bytes(disk.path.read_bytes().ljust(4 * MiB, b"\0"))
    with ExitStack() as stack:
        here, there = (stack.enter_context(host(path, 512)) for _ in range(2))
        for each in (here, there):
            each.read(0, 4 * MiB)
        yield here, there


def dirty(path: Path) -> set[int]:
    """The dirty MiB of the bitmap, which must be valid."""
    with qcow2bm.open(path) as image:
        found = list(image.bitmaps["daily"].extents())
    return {start // MiB for extents in found for start in extents[:, 0].tolist()}


@pytest.mark.parametrize("carried", [(), ("daily",)])
def test_what_the_other_host_wrote_is_seen(hosts: tuple[Host, Host], carried: list[str]) -> None:
    here, there = hosts
    with qcow2bm.open(here.path, "r+") as image, image.track() as tracker:
        tracker.mark(MiB, 1)
        tracker.begin_migration(carried=carried)
        tracker.inactivate()
        with qcow2bm.open(there.path, "r+") as other:
            (sentinel,) = (n for n, b in other.bitmaps.items() if b.auto and n != "daily")
            with other.edit() as edit:  # as a program does that keeps bitmaps
                edit.set(sentinel, 5 * MiB, 1)
                if not carried:
                    edit.set("daily", 5 * MiB, 1)
        there.read(0, 4 * MiB)
        with pytest.raises(qcow2bm.StateError, match="other_side_has_stopped"):
            tracker.activate()
        found = tracker.activate("merge", other_side_has_stopped=True)
        assert found.outcome == "changed"
        assert found.bitmaps["daily"].kind == ("kept" if carried else "reloaded")
        tracker.mark(9 * MiB, 1)
        tracker.stop()
    assert {1, 5, 9} <= dirty(there.path)
    assert run_ok("qemu-img", "check", "-f", "qcow2", there.path)


def test_nothing_of_the_other_host_is_lost_by_taking_it_back(hosts: tuple[Host, Host]) -> None:
    """A buffered write would write back the whole page as it was before."""
    here, there = hosts
    with qcow2bm.open(here.path, "r+") as image, image.track() as tracker:
        tracker.mark(MiB, 1)
        tracker.inactivate()
        with qcow2bm.open(there.path, "r+") as other, other.edit() as edit:
            edit.add("theirs", enabled=False)
        assert tracker.activate(other_side_has_stopped=True).outcome == "unchanged"
        tracker.stop()
    with qcow2bm.open(there.path) as image:
        assert {name: bitmap.status for name, bitmap in image.bitmaps.items()} == {
            "daily": "valid",
            "theirs": "valid",
        }
    assert run_ok("qemu-img", "check", "-f", "qcow2", there.path)
