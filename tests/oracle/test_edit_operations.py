"""Each operation on each kind of image QEMU makes, with QEMU's own changes between and after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.model import OPERATORS
from support.qemu import StorageDaemon, run, run_ok
from support.qemu_facts import fact
from support.twin import KINDS, SECTOR, KiB, Kind, Step, Twin

import qcow2bm


@pytest.fixture(scope="module")
def daemon() -> Iterator[StorageDaemon]:
    with StorageDaemon() as daemon:
        yield daemon


def steps(size: int) -> list[Step]:
    """Every operation, on a fine and a coarse bitmap that QEMU made, daily and weekly.

    The ranges end inside granules, span clusters of bits, and reach the disk's last sector.
    """
    third = size // 3 // SECTOR * SECTOR
    scattered = [(third + 3 * SECTOR * n, SECTOR) for n in range(0, 300, 3)]
    return [
        ("add", ("new",)),
        ("add", ("off", 4 * KiB, False)),
        ("set", ("new", 5 * SECTOR, third)),
        ("set", ("off", size - 1, 1)),
        ("set_many", ("daily", scattered)),
        ("set_many", ("weekly", [(0, 1), (third + 1, 1), (third, third)])),
        ("reset", ("new", 7 * SECTOR, third // 2)),
        ("reset_many", ("daily", [*scattered[::2], (size - 2 * SECTOR, 2 * SECTOR)])),
        ("copy", ("daily", "same")),
        ("copy", ("daily", "coarser", 64 * KiB)),
        ("copy", ("weekly", "finer", 512)),
        ("invert", ("new",)),
        ("invert", ("weekly",)),
        *[
            step
            for op in OPERATORS
            for step in (
                ("copy", ("daily", f"{op} coarse")),
                ("merge", (f"{op} coarse", "weekly", op)),
                ("copy", ("weekly", f"{op} fine")),
                ("merge", (f"{op} fine", "daily", op)),
                ("remove", (f"{op} coarse",)),
            )
        ],
        ("set", ("daily", 0, size)),  # all ones, which is stored in the table
        ("reset", ("daily", third, SECTOR)),
        ("disable", ("daily",)),
        ("enable", ("weekly",)),
        ("rename", ("daily", "a longer name than it has had: " + "n" * 700)),
        ("rename", ("weekly", "w")),
        ("clear", ("new",)),
        ("remove", ("same",)),
        ("remove_all", ()),
        ("add", ("the first again",)),
        ("remove", ("the first again",)),
        ("add", ("and again", 512)),
    ]


def with_bitmaps(kind: Kind, folder: Path) -> Twin:
    twin = Twin.create(kind, folder)
    twin.qemu_add("daily", 512)
    twin.write((0, 300 * KiB), (twin.size - 3 * SECTOR, SECTOR))
    twin.qemu_add("weekly", 64 * KiB)
    twin.write((twin.size // 2 // SECTOR * SECTOR, 64 * KiB))
    twin.qemu("disable", "weekly")
    return twin


SAMPLED = ("cluster-512", "cluster-64k", "refcount-64", "overlay-512", "data-file-raw", "snapshot")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in SAMPLED else pytest.param(kind, marks=pytest.mark.deep) for kind in KINDS],
)
def test_each_operation(tmp_path: Path, daemon: StorageDaemon, kind: str) -> None:
    """After each: nothing leaks, the bits are right, and the guest's data have not moved."""
    twin = with_bitmaps(KINDS[kind], tmp_path)
    twin.verify(daemon)
    for number, step in enumerate(steps(twin.size)):
        places = twin.map()
        twin.edit(step)
        twin.verify(daemon)
        assert twin.map() == places, step
        if number % 4 == 0:  # QEMU stores all bitmaps anew then
            twin.write((number * 70 * KiB, SECTOR), (twin.size - SECTOR, SECTOR))
            twin.verify(daemon)
    twin.edit(("set", ("and again", 1024, 1)))
    twin.qemu_add("by QEMU", 4 * KiB)
    twin.qemu("merge", "by QEMU", "and again")
    twin.verify(daemon)
    twin.qemu("remove", "and again")
    twin.qemu("disable", "by QEMU")
    twin.write((70 * KiB, 2 * SECTOR))
    twin.verify(daemon)
    twin.qemu("remove", "by QEMU")
    twin.verify(daemon)


@pytest.mark.parametrize("kind", KINDS)
def test_all_operations_in_one_edit(tmp_path: Path, daemon: StorageDaemon, kind: str) -> None:
    twin = with_bitmaps(KINDS[kind], tmp_path)
    places = twin.map()
    all_steps = steps(twin.size)
    last = next(n for n, step in enumerate(all_steps) if step[0] == "remove_all")

    twin.edit(*all_steps[:last])
    assert len(twin.bitmaps.by_name) > 8
    twin.verify(daemon)
    assert twin.map() == places
    twin.write((KiB, SECTOR))
    twin.verify(daemon)
    twin.edit(*all_steps[last:])
    twin.verify(daemon)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_and_the_last_bitmap(tmp_path: Path, daemon: StorageDaemon, kind: str) -> None:
    """The header extension comes and goes, and what stands behind it in the header with it."""
    twin = Twin.create(KINDS[kind], tmp_path)
    before = twin.disk.info()
    for round in range(3):
        twin.edit(("add", ("first", 512)), ("set", ("first", 0, twin.size - 1)))
        twin.verify(daemon)
        if round % 2:  # QEMU writes the header in its own order
            twin.write((0, SECTOR))
            twin.verify(daemon)
        twin.edit(("remove", ("first",)))
        twin.verify(daemon)
    after = twin.disk.info()
    sizes = [info.pop("actual-size") for info in (before, after)]  # of the file, with its holes
    for info in (before, after):
        assert ("children" in info) == (fact("info-children") == "yes")
        info.pop("children", None)  # has the length of the file
    assert sizes[1] < 2 * sizes[0] + 64 * KiB, "what is freed is used again"
    assert after == before


def test_internal_snapshots_survive(tmp_path: Path, daemon: StorageDaemon) -> None:
    twin = with_bitmaps(KINDS["snapshot"], tmp_path)

    def content() -> bytes:
        target = tmp_path / "content"
        run_ok("qemu-img", "convert", "-l", "before", "-O", "raw", twin.disk.path, target)
        return target.read_bytes()

    before = content()
    assert before != twin.guest.read_bytes()
    for step in steps(twin.size):
        twin.edit(step)
    assert content() == before
    refused = run("qemu-img", "snapshot", "-a", "before", twin.disk.path)
    assert "has active dirty bitmaps" in refused.stderr
    twin.edit(("remove_all", ()))
    run_ok("qemu-img", "snapshot", "-a", "before", twin.disk.path)
    twin.guest.write_bytes(before)
    twin.verify(daemon)


def test_no_change_writes_nothing(tmp_path: Path) -> None:
    twin = with_bitmaps(KINDS["cluster-4k"], tmp_path)
    before = twin.disk.path.read_bytes(), twin.disk.path.stat().st_mtime_ns
    twin.edit(("add", ("short-lived",)), ("set", ("daily", 0, 1)), ("remove", ("short-lived",)))
    twin.edit(("disable", ("weekly",)), ("merge", ("daily", "daily")))
    assert (twin.disk.path.read_bytes(), twin.disk.path.stat().st_mtime_ns) == before


@pytest.mark.spec("INV-NOPATH")
@pytest.mark.parametrize("kind", ["cluster-4k", "overlay", "data-file-raw"])
def test_no_file_that_the_image_names_is_needed(
    tmp_path: Path, daemon: StorageDaemon, kind: str
) -> None:
    """INV-NOPATH, also for editing: an image is edited where its other files are not."""
    twin = with_bitmaps(KINDS[kind], tmp_path)
    others = [path for path in (tmp_path / "base", tmp_path / "data") if path.exists()]
    for path in others:
        path.rename(path.with_suffix(".away"))
    twin.edit(("add", ("new",)), ("invert", ("daily",)))
    for path in others:
        path.with_suffix(".away").rename(path)
    twin.verify(daemon)


def test_bits_of_another_image(tmp_path: Path, daemon: StorageDaemon) -> None:
    """A source may be of another cluster size, and open while the target is edited."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    twin = with_bitmaps(KINDS["cluster-4k"], tmp_path / "a")
    other = with_bitmaps(KINDS["cluster-64k"]._replace(size=twin.size), tmp_path / "b")
    other.edit(("set_many", ("daily", [(5 * KiB * n, 1) for n in range(3000)])))
    with qcow2bm.open(other.disk.path) as source:
        for op in ("or", "and", "xor", "subtract"):
            for target, name in (("daily", "weekly"), ("weekly", "daily"), ("daily", "daily")):
                with qcow2bm.open(twin.disk.path, "r+") as image, image.edit() as edit:
                    edit.merge(target, source.bitmaps[name], op)
                twin.bitmaps[target].merge(other.bitmaps[name], op)
                twin.verify(daemon)
            twin.edit(("set_many", ("daily", [(7 * KiB * n, 1) for n in range(2000)])))
    other.verify(daemon)
