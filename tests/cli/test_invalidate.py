"""The command ``invalidate``, and what ``enable`` says of a bitmap that was disabled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.console import run
from support.images import Stored, build_image
from support.jsonspec import check_dry_run

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

SIZE = 160 << 16
BITMAPS = (
    Stored(b"a", [b"\5"]),
    Stored(b"b", [b"\5"], flags=0),
    Stored(b"c", [b"\5"], flags=FLAG_AUTO | FLAG_IN_USE),
)
FLAGS = {"a": ("auto",), "b": (), "c": ("in-use", "auto")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.qcow2").write_bytes(build_image(*BITMAPS, size=SIZE).data)
    return tmp_path


def flags(folder: Path) -> dict[str, tuple[str, ...]]:
    with qcow2bm.open(folder / "vm.qcow2") as image:
        assert image.problems == ()
        return {name: bitmap.flags for name, bitmap in image.bitmaps.items()}


@pytest.mark.spec("EDIT-21")
@pytest.mark.parametrize(
    ("names", "marked"),
    [(["a"], "a"), (["b", "@0"], "ab"), (["a", "c"], "a"), (["--all"], "ab"), (["a", "a"], "a")],
)
def test_bitmaps_become_inconsistent(folder: Path, names: list[str], marked: str) -> None:
    assert run(["invalidate", "vm.qcow2", *names], folder) == (0, "", "")
    assert flags(folder) == FLAGS | {name: ("in-use", *FLAGS[name]) for name in marked}
    for name in marked:
        assert run(["verdict", "vm.qcow2", name], folder).status == 4


@pytest.mark.spec("CLI-40")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_is_inconsistent_already_is_said_to_be(folder: Path, dry: list[str]) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    done = run(["invalidate", "vm.qcow2", "c", *dry], folder)
    assert done.status == 0
    assert done.err == 'qcow2bm: note: vm.qcow2: nothing to do: no program trusts "c"\n'
    assert bool(done.out) == bool(dry)
    assert (folder / "vm.qcow2").read_bytes() == before
    run(["invalidate", "vm.qcow2", "--all"], folder)
    before = (folder / "vm.qcow2").read_bytes()
    done = run(["invalidate", "vm.qcow2", "--all", *dry], folder)
    assert done.status == 0
    assert "no program trusts any bitmap of the image" in done.err
    assert (folder / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("CLI-40")
@pytest.mark.parametrize("names", [["--all"], ["a", "c"]])
def test_stale_bitmaps_stay_as_they_are(tmp_path: Path, names: list[str]) -> None:
    data = bytes(build_image(*BITMAPS, size=SIZE, autoclear=False).data)
    (tmp_path / "vm.qcow2").write_bytes(data)
    done = run(["invalidate", "vm.qcow2", *names], tmp_path)
    assert (done.status, done.out) == (0, "")
    assert "nothing to do: no program trusts" in done.err
    assert (tmp_path / "vm.qcow2").read_bytes() == data


def test_an_image_without_bitmaps(tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(build_image(size=SIZE).data)
    done = run(["invalidate", "vm.qcow2", "--all"], tmp_path)
    assert (done.status, len(done.err.splitlines())) == (0, 1)
    assert run(["invalidate", "vm.qcow2", "a"], tmp_path).status == 1


def test_the_options_of_an_edit(folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    dry = run(["invalidate", "vm.qcow2", "--all", "--dry-run", "--output=json"], folder)
    assert (dry.status, dry.err) == (0, "")
    document = json.loads(dry.out)
    check_dry_run(document)
    assert sum(step["commit"] for step in document["steps"]) == 1
    assert not any("bitmap data" in step["what"] for step in document["steps"] if step["offset"])
    with qcow2bm.open(folder / "vm.qcow2", "r+"):
        refused = run(["invalidate", "vm.qcow2", "a", "--wait", "0.01"], folder)
        assert refused.status == 1
        assert "in use by this process itself" in refused.err
    assert (folder / "vm.qcow2").read_bytes() == before
    for wrong in (["vm.qcow2"], ["vm.qcow2", "a", "--all"], []):
        assert run(["invalidate", *wrong], folder).status == 64
    assert run(["invalidate", "vm.qcow2", "a", "d"], folder).status == 1
    assert flags(folder) == FLAGS


@pytest.mark.spec("CLI-40")
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["b"], '"b" was disabled: all that was written meanwhile is missing from it'),
        (["a", "b"], '"b" was disabled: all that was written meanwhile is missing from it'),
        (["--all"], '"b" was disabled: all that was written meanwhile is missing from it'),
        (["a"], ""),
    ],
)
def test_enable_says_what_a_bitmap_misses(folder: Path, names: list[str], said: str) -> None:
    done = run(["enable", "vm.qcow2", *names], folder)
    assert (done.status, done.out) == (0, "")
    assert done.err == (f"qcow2bm: note: vm.qcow2: {said}\n" if said else "")
    assert run(["enable", "vm.qcow2", *names], folder) == (0, "", "")


def test_enable_says_it_of_many_bitmaps_in_one_line(tmp_path: Path) -> None:
    many = [Stored(f"b{n}\n".encode(), flags=0) for n in range(9)]
    (tmp_path / "vm.qcow2").write_bytes(build_image(*many, size=SIZE).data)
    (line,) = run(["enable", "vm.qcow2", "--all"], tmp_path).err.splitlines()
    assert line.endswith(
        '"b4\\n" and 4 more were disabled: all that was written meanwhile is missing from them'
    )


def test_an_enabling_that_fails_says_nothing_of_the_bitmap(folder: Path) -> None:
    done = run(["enable", "vm.qcow2", "b", "c"], folder)
    assert done.status == 1
    assert "meanwhile" not in done.err
    assert flags(folder) == FLAGS
