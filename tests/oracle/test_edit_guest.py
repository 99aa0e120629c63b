"""Edits of images in which clusters with guest data have the refcount 0: QEMU reads the same disk.

Some versions of QEMU left such images behind. QEMU itself takes these clusters as free.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random

import pytest
from support.layouts import set_refcount
from support.qemu import run_ok

import qcow2bm

KiB, MiB = 1 << 10, 1 << 20
SIZE = 8 * MiB
UNIT = 64 * KiB
UNITS = SIZE // UNIT
SHAPES = {
    "plain": ("-o", "cluster_size=4096"),
    "clusters of 512": ("-o", "cluster_size=512"),
    "refcounts of 1 bit": ("-o", "cluster_size=4096,refcount_bits=1"),
    "refcounts of 64 bits": ("-o", "cluster_size=4096,refcount_bits=64"),
    "extended L2": ("-o", "cluster_size=16384,extended_l2=on"),
    "compressed": ("-o", "cluster_size=4096"),
    "snapshot": ("-o", "cluster_size=4096"),
}


def content(path: Path) -> str:
    """The digest of the disk, as QEMU reads it."""
    raw = path.with_suffix(".raw")
    run_ok("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    return hashlib.sha256(raw.read_bytes()).hexdigest()


def write(path: Path, random: Random, count: int, *, compressed: bool = False) -> None:
    """Lets QEMU write ``count`` random ranges: compressed ones at the end of the disk."""
    border = UNITS * 3 // 4
    words = []
    for unit in random.sample(range(border, UNITS) if compressed else range(border), count):
        length = UNIT if compressed else random.choice([4 * KiB, 20 * KiB, UNIT])
        kind = "-c -P" if compressed else "-P"
        words += ["-c", f"write {kind} {random.randrange(1, 256)} {unit * UNIT} {length}"]
    run_ok("qemu-io", "-f", "qcow2", *words, path)


def guest_clusters(path: Path) -> list[int]:
    """The clusters with plain guest data of the active disk, as `qemu-img map` shows them."""
    (size,) = {json.loads(run_ok("qemu-img", "info", "--output=json", path))["cluster-size"]}
    found = json.loads(run_ok("qemu-img", "map", "-f", "qcow2", "--output=json", path))
    return [
        cluster
        for part in found
        if part["data"] and "offset" in part
        for cluster in range(part["offset"] // size, (part["offset"] + part["length"]) // size)
    ]


def forget_refcounts(path: Path, random: Random) -> int:
    """Sets the refcounts of some clusters with guest data to 0; returns of how many."""
    clusters = guest_clusters(path)
    data = bytearray(path.read_bytes())
    chosen = random.sample(clusters, max(1, len(clusters) // 3)) if clusters else []
    for cluster in chosen:
        set_refcount(data, cluster, 0)
    path.write_bytes(data)
    return len(chosen)


def edit(image: qcow2bm.Image, random: Random, number: int) -> None:
    """Makes one random edit of several kinds, which needs clusters."""
    with image.edit() as edit:
        names = list(image.bitmaps)
        if len(names) > 6:
            edit.remove(names[0])
        edit.add(f"b{number}", random.choice([512, 4096, 65536]))
        for _ in range(40):
            edit.set(f"b{number}", random.randrange(SIZE // 512) * 512, 512)
        if names:
            edit.merge(f"b{number}", names[-1])
            edit.set(names[-1], 0, random.randrange(1, SIZE))


@pytest.mark.spec("REF-8")
@pytest.mark.parametrize("shape", SHAPES)
def test_no_edit_changes_the_disk(tmp_path: Path, shape: str) -> None:
    total = 0
    for seed in range(4):
        random = Random(f"{shape} {seed}")
        path = tmp_path / f"{seed}.qcow2"
        run_ok("qemu-img", "create", "-q", "-f", "qcow2", *SHAPES[shape], path, str(SIZE))
        write(path, random, 12)
        if shape == "snapshot":
            run_ok("qemu-img", "snapshot", "-c", "one", path)
        write(path, random, 12, compressed=shape == "compressed")
        total += forget_refcounts(path, random)
        before = content(path)
        for number in range(8):
            with qcow2bm.open(path, "r+") as image:
                edit(image, random, number)
            assert content(path) == before
    assert total, "no refcount was forgotten"
    print(f"{shape}: {total} clusters without a refcount")


@pytest.mark.spec("REF-8")
def test_no_tracker_changes_the_disk(tmp_path: Path) -> None:
    random = Random(7)
    path = tmp_path / "disk.qcow2"
    run_ok("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, str(SIZE))
    write(path, random, 30)
    with qcow2bm.open(path, "r+") as image, image.edit() as edit:
        for number in range(4):
            edit.add(f"b{number}", 512)
    assert forget_refcounts(path, random)
    before = content(path)
    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        for _ in range(300):
            tracker.mark(random.randrange(SIZE // 512) * 512, 512)
        tracker.flush()
        tracker.rotate("b0", "fresh")
        tracker.stop()
    assert content(path) == before
