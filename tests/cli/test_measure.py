"""The commands `measure` and `prune`: what they print, and which arguments go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.console import Result, run
from support.images import ONES, Stored, build_image
from support.jsonspec import check_measure, check_prune
from support.problem_images import IDS, broken

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.migration.sentinel import Sentinel

SIZE = 64 << 20
CLUSTER = 4096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bitmaps = (
        Stored(b"daily", [b"\x11\x01"]),
        Stored(b"old", [ONES], flags=0),
        Stored(b"crashed", flags=FLAG_AUTO | FLAG_IN_USE),
        Stored(Sentinel.fresh(SIZE, CLUSTER).name.encode(), granularity_bits=16),
    )
    built = build_image(*bitmaps, cluster_bits=12, size=SIZE)
    (tmp_path / "vm.qcow2").write_bytes(built.data)
    return tmp_path


def document(result: Result, status: int = 0) -> Any:
    assert (result.status, result.err) == (status, "")
    found = json.loads(result.out)
    (check_prune if "removed" in found else check_measure)(found)
    return found


@pytest.mark.spec("MEASURE-1")
@pytest.mark.spec("MEASURE-3")
def test_the_document_of_the_bitmaps_that_are_there(folder: Path) -> None:
    found = document(run(["measure", "vm.qcow2", "--json"], folder))
    daily, old, crashed, sentinel = found["bitmaps"]
    backup = daily["next-backup"]
    assert (backup["dirty-bytes"], backup["extents"]) == (3 << 16, 3)
    assert backup["coarser"][0] == {"granularity": 1 << 17, "dirty-bytes": 3 << 17, "extents": 3}
    assert backup["coarser"][-1]["dirty-bytes"] == SIZE
    assert [old["next-backup"], crashed["next-backup"], sentinel["next-backup"]] == [None] * 3
    assert [old["enabled"], crashed["status"]] == [False, "inconsistent"]
    assert daily["space"]["now"]["total"] == 2 * CLUSTER + 32
    assert old["space"]["now"]["data"] == 0
    assert old["space"]["full"]["data"] == CLUSTER
    assert found["together"]["full"]["total"] == 9 * CLUSTER
    assert found["together"]["resized"] is None
    assert found["addition"] is None


@pytest.mark.spec("MEASURE-3")
def test_a_name_measures_the_backup_of_any_valid_bitmap(folder: Path) -> None:
    found = document(run(["measure", "vm.qcow2", "--json", "old", "@2"], folder))
    assert [bitmap["name"] for bitmap in found["bitmaps"]] == ["old", "crashed"]
    old, crashed = found["bitmaps"]
    assert old["next-backup"] == {
        "granularity": 1 << 16, "dirty-bytes": SIZE, "extents": 1, "coarser": []
    }  # fmt: skip
    assert crashed["next-backup"] is None


@pytest.mark.spec("MEASURE-2")
def test_a_resize_is_rounded_up_to_sectors(folder: Path) -> None:
    beyond = 3 * (8 * CLUSTER << 16)
    found = document(run(["measure", "vm.qcow2", "--json", "--resize", str(beyond + 1)], folder))
    assert found["resized-virtual-size"] == beyond + 512
    assert found["virtual-size"] == SIZE
    daily = found["bitmaps"][0]["space"]
    assert daily["resized"]["data"] == CLUSTER
    assert daily["full"]["data"] == 4 * CLUSTER
    assert found["together"]["resized"]["tables"] == 4 * CLUSTER


@pytest.mark.spec("MEASURE-2")
def test_an_image_without_bitmaps_takes_nothing(folder: Path) -> None:
    (folder / "empty").write_bytes(build_image().data)
    nothing = {"directory": 0, "tables": 0, "data": 0, "total": 0}
    found = document(run(["measure", "empty", "--json"], folder))
    assert found["together"] == {"now": nothing, "resized": None, "full": nothing}
    found = document(run(["measure", "empty", "--json", "--resize", "1G"], folder))
    assert found["together"] == {"now": nothing, "resized": nothing, "full": nothing}


@pytest.mark.spec("MEASURE-5")
@pytest.mark.spec("MEASURE-6")
def test_what_is_to_be_added_is_measured_as_the_library_does(folder: Path) -> None:
    arguments = "measure vm.qcow2 --add --json -g 512 --count 3 --name-size 1000 --resize 1G"
    found = document(run(arguments.split(), folder))["addition"]
    with qcow2bm.open(folder / "vm.qcow2") as image:
        addition = image.measure_addition(3, granularity=512, name_size=1000, virtual_size=1 << 30)
    assert (found["count"], found["granularity"]) == (3, 512)
    for key, growth in (("empty", addition.empty), ("full", addition.full)):
        assert found[key] == {**growth._asdict(), "total": growth.total}


@pytest.mark.spec("MEASURE-7")
def test_a_new_image_needs_no_file(tmp_path: Path) -> None:
    arguments = "measure --size 16T --granularity 64K --cluster-size 64K --count 2"
    found = document(run([*arguments.split(), "--json"], tmp_path))
    assert found["filename"] is None
    assert found["addition"]["full"]["data"] == 64 << 20
    assert found["addition"]["empty"]["total"] == 3 << 16
    assert "2 bitmaps of granularity 64 KiB" in run(arguments.split(), tmp_path).out
    odd = document(run(["measure", "--size", "1000", "--refcount-bits", "1", "--json"], tmp_path))
    assert odd["virtual-size"] == 1024


@pytest.mark.spec("MEASURE-8")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--size 16T -g 512", "size of a bitmap of granularity 512 in bytes is 4294967296"),
        ("--size 1T --cluster-size 512", "a new image: the size of the L1 table"),
        ("--size 1T --cluster-size 1000", "a new image: cluster_size is 1000"),
        ("--size 1T --refcount-bits 0", "a new image: refcount_bits is 0"),
        ("--size 0", "a bitmap of a disk of 0 bytes"),
        ("vm.qcow2 --resize 1E", "the size of a bitmap of granularity 65536"),
        ("vm.qcow2 --add -g 1000", "vm.qcow2: granularity is 1000"),
        ("missing", "missing: "),
    ],
)
def test_what_cannot_be_measured_fails(folder: Path, arguments: str, reason: str) -> None:
    result = run(["measure", *arguments.split()], folder)
    assert (result.status, result.out) == (1, "")
    assert reason in result.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "give IMAGE, or --size"),
        ("--add", "give IMAGE, or --size"),
        ("--size 1G --resize 2G", "--resize is for an IMAGE"),
        ("vm.qcow2 --size 1G", "IMAGE has its own size"),
        ("vm.qcow2 --add --cluster-size 4k", "IMAGE has its own size"),
        ("vm.qcow2 --add daily", "with --add, NAME is not known yet"),
        ("vm.qcow2 -g 4k", "need --add"),
        ("vm.qcow2 --count 2", "need --add"),
        ("vm.qcow2 --add --count 0", '"0" is no number of bitmaps'),
        ("vm.qcow2 --add --count x", '"x" is no number of bitmaps'),
        ("vm.qcow2 --add --count 9999999999", '"9999999999" is no number of bitmaps'),
    ],
)
def test_arguments_that_do_not_go_together(folder: Path, arguments: str, reason: str) -> None:
    result = run(["measure", *arguments.split()], folder)
    assert (result.status, result.out) == (64, "")
    assert reason in result.err


@pytest.mark.parametrize("id", [id for id in IDS if id != "bitmap-table.limit"])  # takes long
def test_a_broken_image_is_measured_or_refused(id: str, tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(broken(id))
    for arguments in (["--resize", "1G"], ["--add"]):
        result = run(["measure", "vm.qcow2", "--json", "-q", *arguments], tmp_path)
        if result.status == 1:
            assert result.err.startswith("qcow2bm: vm.qcow2: ")
        else:
            document(result, result.status)
            assert result.status in (0, 2)


# prune


@pytest.mark.spec("PRUNE-5")
def test_a_dry_run_says_what_would_be_removed_and_changes_nothing(folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    found = document(run(["prune", "vm.qcow2", "--keep", "@0", "--dry-run", "--json"], folder))
    assert found["dry-run"]
    assert found["removed"] == ["old", "crashed"]
    assert [kept["reason"] for kept in found["kept"]] == ["named", "reserved"]
    assert found["freed-bytes"] == 2 * CLUSTER
    assert found["plan"]["steps"]
    text = run(["prune", "vm.qcow2", "--keep", "daily", "--dry-run"], folder).out
    assert 'would remove "old", "crashed"\n8 KiB (8192 bytes) would be free' in text
    assert "<- commit" in text
    assert (folder / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("PRUNE-5")
@pytest.mark.spec("PRUNE-6")
def test_prune_removes_and_says_what(folder: Path) -> None:
    result = run(["prune", "vm.qcow2", "--disabled", "--inconsistent"], folder)
    assert (result.status, result.err) == (0, "")
    removed, free, daily, sentinel = result.out.splitlines()
    assert removed == 'removed "old", "crashed"'
    assert free == "8 KiB (8192 bytes) are free now in the image file"
    assert daily == 'kept "daily"'
    assert sentinel.endswith(": qcow2bm added it for itself")
    with qcow2bm.open(folder / "vm.qcow2", strict=True) as image:
        assert len(image.bitmaps) == 2
        assert qcow2bm.check(folder / "vm.qcow2").problems == ()
    found = document(run(["prune", "vm.qcow2", "--disabled", "--json"], folder))
    assert (found["removed"], found["freed-bytes"], found["plan"]) == ([], 0, None)
    assert run(["prune", "vm.qcow2", "--disabled"], folder).out.startswith("no bitmap to remove\n")


@pytest.mark.spec("PRUNE-1")
def test_prune_needs_a_rule(folder: Path) -> None:
    result = run(["prune", "vm.qcow2"], folder)
    assert (result.status, result.out) == (64, "")
    assert "give --keep, --keep-pattern, --inconsistent or --disabled" in result.err


@pytest.mark.spec("PRUNE-2")
def test_prune_removes_nothing_if_a_rule_may_be_misspelt(folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    for rule in (["--keep", "dialy"], ["--keep-pattern", "dialy*"]):
        result = run(["prune", "vm.qcow2", *rule], folder)
        assert (result.status, result.out) == (1, "")
    assert (folder / "vm.qcow2").read_bytes() == before
