"""The command ``add --compare``: a bitmap that was lost is made again by comparing two disks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.console import run
from support.contents import GRANULE, write_raw
from support.images import Stored, build_image

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

SIZE = 160 * GRANULE
SOUND = Stored(b"sound", [b"\3"])
CRASHED = Stored(b"crashed", [b"\5"], flags=FLAG_AUTO | FLAG_IN_USE)
COMPARE = ["--compare", "old", "new", "--assert-current"]
ADD = ["add", "vm.qcow2", "daily", *COMPARE]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image, its last backup ``old``, and what its disk holds now, ``new``."""
    write_raw(tmp_path / "old", 3, 7, 159, size=SIZE)
    write_raw(tmp_path / "new", 3, 8, size=SIZE)
    data = build_image(SOUND, CRASHED, size=SIZE).data
    (tmp_path / "vm.qcow2").write_bytes(data)
    return tmp_path


def ranges(folder: Path, name: str = "daily") -> list[list[int]]:
    with qcow2bm.open(folder / "vm.qcow2") as image:
        assert image.check().problems == ()
        return [r for array in image.bitmaps[name].extents() for r in array.tolist()]


@pytest.mark.spec("SALVAGE-10")
def test_what_differs_is_dirty_and_the_new_bitmap_records(folder: Path) -> None:
    done = run([*ADD, "-g", "64k"], folder)
    assert (done.status, done.out) == (0, "")
    assert done.err.startswith("qcow2bm: note: old must have exactly the content")
    assert len(done.err.splitlines()) == 1
    assert ranges(folder) == [[7 * GRANULE, 2 * GRANULE], [159 * GRANULE, GRANULE]]
    assert ranges(folder, "sound") == [[0, 2 * GRANULE]]
    with qcow2bm.open(folder / "vm.qcow2") as image:
        assert list(image.bitmaps) == ["sound", "crashed", "daily"]
        assert image.bitmaps["daily"].auto
    verified = run(["verify", "vm.qcow2", "daily", "old", "--new=new", "--assert-current"], folder)
    assert verified.status == 0


@pytest.mark.spec("SALVAGE-10")
@pytest.mark.parametrize("granularity", [None, 512, 1 << 20])
@pytest.mark.parametrize("enabled", [True, False])
def test_granularity_and_flag_are_those_of_add(
    granularity: int | None, enabled: bool, folder: Path
) -> None:
    options = [] if granularity is None else ["-g", str(granularity)]
    options += [] if enabled else ["--disabled"]
    assert run(["add", "vm.qcow2", "clean", *options], folder).status == 0
    assert run([*ADD, *options], folder).status == 0
    with qcow2bm.open(folder / "vm.qcow2") as image:
        clean, daily = image.bitmaps["clean"], image.bitmaps["daily"]
        assert (daily.granularity, daily.flags) == (clean.granularity, clean.flags)
        assert daily.count() == len({n * GRANULE // clean.granularity for n in (7, 8, 159)}) * (
            clean.granularity
        )


@pytest.mark.spec("SALVAGE-10")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sound", *COMPARE], 'bitmap "sound" already exists'),
        (["crashed", *COMPARE], 'bitmap "crashed" already exists, and is inconsistent'),
        (["daily", *COMPARE, "-g", "1000"], "granularity is 1000"),
        (["daily", "--compare", "old", "new"], "new: is neither the image nor its data file"),
        (["daily", "--compare", "new", "new"], "new: is neither the image nor its data file"),
        (["daily", "--compare", "vm.qcow2", "new", "--assert-current"], "is not the last backup"),
        (["daily", "--compare", "none", "new"], "none: No such file"),
    ],
)
def test_what_is_refused_changes_nothing(words: list[str], message: str, folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    done = run(["add", "vm.qcow2", *words], folder)
    assert (done.status, done.out) == (1, "")
    assert message in done.err
    assert ("note: " in done.err) == (words[0] == "daily" and "-g" not in words)
    assert (folder / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("SALVAGE-10")
def test_it_is_one_edit(folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    done = run([*ADD, "--dry-run"], folder)
    assert done.status == 0
    assert done.out.count("<- commit") == 1
    assert (folder / "vm.qcow2").read_bytes() == before


@pytest.mark.parametrize("option", ["--old-format=raw", "--new-format=raw", "--assert-current"])
def test_the_options_of_a_comparison_need_one(option: str, folder: Path) -> None:
    done = run(["add", "vm.qcow2", "daily", option], folder)
    assert (done.status, done.out) == (64, "")
