"""An invalidated bitmap is inconsistent for QEMU, too, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.console import run
from support.qemu import Disk, StorageDaemon
from support.qemu import run as run_tool
from support.twin import KINDS, SECTOR, KiB, MiB, Twin

import qcow2bm

GRANULE = 64 * KiB


@pytest.fixture(scope="module")
def daemon() -> Iterator[StorageDaemon]:
    with StorageDaemon() as daemon:
        yield daemon


def flags(disk: Disk) -> dict[str, list[str]]:
    return {bitmap["name"]: bitmap["flags"] for bitmap in disk.listed()}


def in_memory(disk: Disk, daemon: StorageDaemon) -> dict[str, dict[str, Any]]:
    daemon.open(disk)
    try:
        return daemon.bitmaps()
    finally:
        daemon.close()


def twin_with_bitmaps(kind: str, folder: Path) -> Twin:
    twin = Twin.create(KINDS[kind], folder)
    for name in ("daily", "weekly", "other"):
        twin.qemu_add(name, GRANULE)
    twin.write((0, 300 * KiB), (twin.size - 3 * SECTOR, SECTOR))
    twin.qemu("disable", "weekly")
    return twin


SAMPLED = ("cluster-512", "cluster-64k", "refcount-64", "overlay-512", "data-file-raw", "snapshot")


@pytest.mark.spec("EDIT-21")
@pytest.mark.parametrize(
    "kind",
    [kind if kind in SAMPLED else pytest.param(kind, marks=pytest.mark.deep) for kind in KINDS],
)
def test_an_invalidated_bitmap_is_inconsistent_for_qemu(
    tmp_path: Path, daemon: StorageDaemon, kind: str
) -> None:
    twin = twin_with_bitmaps(kind, tmp_path)
    disk = twin.disk
    places, content = twin.map(), disk.extents("other")
    with qcow2bm.open(disk.path, "r+") as image, image.edit() as edit:
        edit.invalidate("daily")
        edit.invalidate("weekly")
    assert flags(disk) == {
        "daily": ["in-use", "auto"],
        "weekly": ["in-use"],
        "other": ["auto"],
    }
    assert disk.check().returncode == 0
    assert (twin.map(), disk.extents("other")) == (places, content)
    if not disk.encryption:
        found = in_memory(disk, daemon)
        assert {name for name, bitmap in found.items() if bitmap.get("inconsistent")} == {
            "daily",
            "weekly",
        }

    disk.io(f"write 1M {SECTOR}")  # QEMU opens the image for writing, and stores the bitmaps
    assert flags(disk)["daily"] == ["in-use", "auto"]
    with qcow2bm.open(disk.path) as image:
        assert image.verdict("daily").reason == image.verdict("weekly").reason == "inconsistent"
        assert image.verdict("other").usable

    refused = run_tool("qemu-img", "bitmap", "--enable", *disk.arguments, "weekly")
    assert refused.returncode != 0
    assert "inconsistent" in refused.stderr
    disk.bitmap("daily", "--remove")
    assert set(flags(disk)) == {"weekly", "other"}
    with qcow2bm.open(disk.path, "r+") as image, image.edit() as edit:
        edit.salvage("weekly")
    assert flags(disk) == {"weekly": [], "other": ["auto"]}
    assert disk.extents("weekly") == [(0, twin.size)]
    assert disk.check().returncode == 0


def header_of(path: Path) -> bytes:
    with qcow2bm.open(path) as image, path.open("rb") as file:
        return file.read(image.cluster_size)


def restore(path: Path, header: bytes) -> None:
    with path.open("r+b") as file:
        file.write(header)


@pytest.fixture
def restored(tmp_path: Path) -> Disk:
    """The header was restored from a copy from before a backup; the guest wrote after the backup.

    The bitmap is valid and misses what the guest wrote, and its clusters have the refcount 0.
    """
    disk = Disk.create(tmp_path / "disk", 64 * MiB, cluster_size=4096)
    disk.io("write -P 1 0 64M")  # so that later writes need no cluster
    disk.add("daily", GRANULE)
    disk.add("weekly", GRANULE)
    header = header_of(disk.path)
    with qcow2bm.open(disk.path, "r+") as image, image.edit() as edit:
        edit.set("daily", 0, GRANULE)  # as if the guest had written that
        edit.set("weekly", 0, GRANULE)
    restore(disk.path, header)
    return disk


@pytest.mark.spec("EDIT-21")
def test_no_bitmap_of_a_restored_header_is_trusted_any_more(restored: Disk, tmp_path: Path) -> None:
    folder, name = restored.path.parent, restored.path.name
    before = run(["verdict", name, "daily"], folder)
    assert (before.status, "0 bytes dirty" in before.out) == (0, True)  # which is not true
    assert restored.check().returncode == 2  # the refcounts are wrong, too
    assert run(["disable", name, "daily"], folder).status == 1

    assert run(["invalidate", name, "--all"], folder) == (0, "", "")
    assert flags(restored) == {"daily": ["in-use", "auto"], "weekly": ["in-use", "auto"]}
    assert run(["verdict", name, "daily"], folder).status == 4
    guest = tmp_path / "guest"
    run_tool("qemu-img", "convert", "-O", "raw", restored.path, guest)
    assert guest.read_bytes() == b"\1" * (64 * MiB)

    mended = run_tool("qemu-img", "check", "-r", "all", *restored.arguments)
    assert mended.returncode == 0
    assert run(["salvage", name, "daily", "--all-dirty"], folder).status == 0
    restored.bitmap("weekly", "--remove")
    assert restored.extents("daily") == [(0, 64 * MiB)]
    assert restored.check().returncode == 0


@pytest.mark.parametrize("names", [["daily"], ["--all"]])
def test_an_image_that_qemu_uses_is_not_invalidated(tmp_path: Path, names: list[str]) -> None:
    disk = Disk.create(tmp_path / "disk", 64 * MiB)
    disk.add("daily", GRANULE)
    with disk.held_by_qemu_io():
        done = run(["invalidate", "disk", *names], tmp_path)
        assert (done.status, done.out) == (1, "")
        assert "lock byte" in done.err
    assert run(["invalidate", "disk", *names], tmp_path).status == 0
