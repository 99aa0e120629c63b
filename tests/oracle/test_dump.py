"""``dump`` says of an image what ``qemu-img info`` and ``qemu-img check`` say."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.console import run
from support.jsonspec import check_dump, failure_in
from support.layouts import FAMILIES, LAYOUTS, build
from support.problem_images import IDS, broken
from support.qemu import Disk, held_by_storage_daemon, run_ok
from support.qemu import run as run_tool

import qcow2bm

MiB = 1 << 20


class Shape(NamedTuple):
    """An image as ``qemu-img create`` makes it."""

    options: dict[str, object] = {}  # noqa: RUF012  # nothing changes it
    size: int = 64 * MiB
    has_backing: bool = False


SHAPES = {
    "plain": Shape(),
    "clusters of 512 bytes": Shape({"cluster_size": 512}),
    "clusters of 2 MiB": Shape({"cluster_size": 2 * MiB}),
    "refcounts of 1 bit": Shape({"refcount_bits": 1}),
    "refcounts of 64 bits": Shape({"refcount_bits": 64, "cluster_size": 4096}),
    "preallocated": Shape({"preallocation": "metadata"}),
    "version 2": Shape({"compat": "0.10"}),
    "extended L2 entries": Shape({"extended_l2": "on", "cluster_size": 65536}),
    "zstd": Shape({"compression_type": "zstd"}),
    "data file": Shape({"data_file": "disk.data"}),
    "raw data file": Shape({"data_file": "disk.raw", "data_file_raw": "on"}),
    "backing file": Shape(has_backing=True),
    "luks": Shape({"encrypt.format": "luks"}),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder: Path, name: str) -> Disk:
    """An image of a shape, with data, a hole where data were, and bitmaps if it can have some."""
    shape = SHAPES[name]
    path = folder / "vm.qcow2"
    arguments: tuple[str, ...] = ()
    if shape.has_backing:
        run_ok("qemu-img", "create", "-q", "-f", "raw", "base.raw", str(shape.size))
        arguments = ("-b", "base.raw", "-F", "raw")
    disk = Disk.create(path, shape.size, *arguments, **shape.options)
    disk.io("write 0 4M", "write 20M 4M")
    if "compat" not in shape.options:
        for bitmap in ("daily", "weekly"):
            disk.add(bitmap, 65536)
    disk.io("write 8M 4M", "write 40M 1M")
    disk.io("discard 0 2M", "discard 21M 1M")
    return disk


def dumped(path: Path, *options: str) -> dict[str, Any]:
    result = run(["dump", "--json", "--space", *options, path.name], path.parent)
    document: dict[str, Any] = json.loads(result.out)
    check_dump(document)
    assert result.err == ""
    return document


def used_clusters(data: bytes) -> list[int]:
    """The numbers of the clusters of a file whose refcount is not 0."""
    version, cluster_bits = struct.unpack_from(">4xI12xI", data)
    table, table_clusters = struct.unpack_from(">QI", data, 48)
    width = 1 << struct.unpack_from(">I", data, 96)[0] if version == 3 else 16
    size = 1 << cluster_bits
    used = []
    for number, (block,) in enumerate(
        struct.iter_unpack(">Q", data[table : table + table_clusters * size])
    ):
        if not block:
            continue
        # The first refcount of a byte is in its lowest bits; in larger ones the order is the same
        # if all bytes of a refcount are looked at together.
        bits = int.from_bytes(data[block : block + size], "little")
        for entry in range(8 * size // width):
            if bits >> entry * width & ((1 << width) - 1):
                used.append(number * (8 * size // width) + entry)
    return used


def end_by_qemu(disk: Disk) -> int | None:
    done = run_tool("qemu-img", "check", "--output=json", *disk.arguments)
    return json.loads(done.stdout).get("image-end-offset") if done.stdout else None


@pytest.mark.parametrize("name", SHAPES)
def test_the_image_ends_where_qemu_says(folder: Path, name: str) -> None:
    disk = made(folder, name)
    for bitmap in ("weekly", "daily"):
        document = dumped(disk.path)
        assert document["image-end-offset"] == end_by_qemu(disk)
        end = document["image-end-offset"] // document["cluster-size"]
        used = used_clusters(disk.path.read_bytes())
        assert max(used) + 1 == end
        assert document["free-bytes"] == (end - len(used)) * document["cluster-size"]
        if "compat" not in SHAPES[name].options:
            disk.bitmap(bitmap, "--remove")
        disk.io("write 60M 1M", "discard 8M 4M")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_images_end_where_qemu_says(folder: Path, family: str) -> None:
    path = folder / "vm.qcow2"
    names = [name for name, layout in LAYOUTS.items() if layout.family == family]
    compared = 0
    for name in names[:: max(1, len(names) // 8)]:
        path.write_bytes(build(name))
        expected = end_by_qemu(Disk(path))
        if expected is not None:
            compared += 1
            assert dumped(path)["image-end-offset"] == expected, name
    assert compared


def test_broken_images_end_where_qemu_says_unless_refcounts_are_too_low(folder: Path) -> None:
    path, compared = folder / "vm.qcow2", 0
    for id in IDS:
        path.write_bytes(broken(id))
        expected = end_by_qemu(Disk(path))
        if expected is not None:
            compared += 1
            ours = dumped(path)["image-end-offset"]
            problems = {found.id for found in qcow2bm.check(path).problems}
            is_low = "cluster.refcount.too-low" in problems
            assert ours == expected or (is_low and (ours is None or ours < expected)), id
    assert compared > 20


@pytest.mark.parametrize("name", SHAPES)
def test_the_header_is_as_qemu_says(folder: Path, name: str) -> None:
    disk = made(folder, name)
    info, ours = disk.info(), dumped(disk.path)
    data = info["format-specific"]["data"]
    assert ours["virtual-size"] == info["virtual-size"]
    assert ours["cluster-size"] == info["cluster-size"]
    assert ours["refcount-bits"] == data["refcount-bits"] if ours["version"] == 3 else True
    assert ours["backing-file"] == info.get("backing-filename")
    assert ours["backing-format"] == info.get("backing-filename-format")
    assert ours["data-file"] == data.get("data-file")
    assert ours["data-file-raw"] == data.get("data-file-raw", False)
    assert ours["compression-type"] == data["compression-type"]
    assert ours["encryption-method"] == data.get("encrypt", {}).get("format", "none")
    assert [b["name"] for b in ours["bitmaps"]] == [b["name"] for b in data.get("bitmaps", [])]


def test_snapshots_are_as_qemu_says(folder: Path) -> None:
    disk = made(folder, "plain")
    for name in ("first", "zweitér"):
        run_ok("qemu-img", "snapshot", "-c", name, disk.path)
        disk.io("write 30M 1M")
    ours = dumped(disk.path)
    assert len(ours["snapshots"]) == 2
    expected = [
        {
            "id": snapshot["id"],
            "name": snapshot["name"],
            "date-sec": snapshot["date-sec"],
            "date-nsec": snapshot["date-nsec"],
            "vm-clock-nsec": snapshot["vm-clock-sec"] * 10**9 + snapshot["vm-clock-nsec"],
            "vm-state-size": snapshot["vm-state-size"],
            "icount": snapshot.get("icount"),
        }
        for snapshot in disk.info()["snapshots"]
    ]
    assert [{key: s[key] for key in expected[0]} for s in ours["snapshots"]] == expected
    assert {s["virtual-size"] for s in ours["snapshots"]} == {64 * MiB}
    assert ours["image-end-offset"] == end_by_qemu(disk)
    run_ok("qemu-img", "snapshot", "-d", "first", disk.path)
    assert [s["name"] for s in dumped(disk.path)["snapshots"]] == ["zweitér"]


def test_a_qemu_that_has_the_image_is_seen(folder: Path) -> None:
    disk = made(folder, "plain")
    assert dumped(disk.path)["in-use-by-another-process"] == "no"
    with disk.held_by_qemu_io(read_only=True):
        assert dumped(disk.path)["in-use-by-another-process"] == "reader"
    with held_by_storage_daemon(disk):
        assert dumped(disk.path, "-U")["in-use-by-another-process"] == "writer"
        refused = run(["dump", "--json", "vm.qcow2"], folder)
        error = failure_in(refused.out, refused.err)["error"]
        assert (refused.status, error["id"]) == (1, "image-locked")
    assert dumped(disk.path)["in-use-by-another-process"] == "no"
