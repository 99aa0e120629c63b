"""What QEMU recorded is proved; what it did not record is found."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest
from support import qemu
from support.console import Result, run
from support.jsonspec import check_verify
from support.qemu import Disk

import qcow2bm

GRANULE = 65536
SIZE = 64 << 20
NAMES = {"daily": 16, "coarse": 20, "fine": 12}


def tool(*arguments: str | Path) -> None:
    done = qemu.run(*arguments)
    assert done.returncode == 0, (arguments, done.stderr)


def write(path: Path, seed: int, *, crash: bool = False) -> None:
    """The guest writes at random; QEMU is killed afterwards where it is to ``crash``."""
    chosen = random.Random(seed)
    commands = []
    for number in range(40):
        start = chosen.randrange(SIZE >> 9) << 9
        length = min(chosen.choice((512, 4096, GRANULE, 3 * GRANULE)), SIZE - start)
        what = chosen.choice((f"write -P {number % 250 + 1}", "write -z", "discard"))
        commands += ["-c", f"{what} {start} {length}"]
    crashing = ["-c", "abort"] if crash else []
    done = subprocess.run(
        ["qemu-io", "-d", "unmap", *commands, *crashing, str(path)],
        capture_output=True,
        check=False,
    )
    assert (done.returncode != 0) == crash, done.stderr


def make(folder: Path, kind: str) -> Path:
    """An image with data and three bitmaps, and its backup in ``old``."""
    path, options = folder / "vm.qcow2", ["-o", "cluster_size=4k"]
    if kind == "overlay":
        tool("qemu-img", "create", "-q", "-f", "qcow2", folder / "base", str(SIZE))
        write(folder / "base", 1)
        options = ["-F", "qcow2", "-b", str(folder / "base")]
    if kind == "data file":
        options = ["-o", f"data_file={folder / 'data'},data_file_raw=on"]
    tool("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(SIZE))
    write(path, 2)
    kinds = {"plain": "qcow2"}
    tool("qemu-img", "convert", "-O", kinds.get(kind, "raw"), path, folder / "old")
    for name, bits in NAMES.items():
        tool("qemu-img", "bitmap", "--add", "-g", str(1 << bits), path, name)
    return path


def options_of(kind: str) -> list[str]:
    return ["--backup-format=qcow2"] if kind == "plain" else []


def verify(folder: Path, name: str, *options: str) -> Result:
    return run(["verify", "vm.qcow2", name, "old", *options], folder)


def differing(folder: Path, granularity: int) -> set[int]:
    """The granules that differ, as the content is when QEMU converts both."""
    contents = []
    for name in ("old", "vm.qcow2"):
        tool("qemu-img", "convert", "-O", "raw", folder / name, folder / "content")
        contents.append((folder / "content").read_bytes())
    old, new = contents
    return {
        start // granularity
        for start in range(0, SIZE, granularity)
        if old[start : start + granularity] != new[start : start + granularity]
    }


def granules(path: Path, name: str, granularity: int) -> set[int]:
    return {
        number
        for start, length in Disk(path).extents(name)
        for number in range(start // granularity, -(-(start + length) // granularity))
    }


@pytest.mark.spec("VERIFY-1", "VERIFY-2", "VERIFY-3")
@pytest.mark.parametrize("kind", ["plain", "overlay", "data file"])
def test_what_qemu_recorded_is_proved_and_one_bit_less_is_found(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path, kind)
    write(path, 3)
    options = options_of(kind)
    for name, bits in NAMES.items():
        done = verify(tmp_path, name, *options)
        assert done.status == 0, (done.out, done.err)
        granularity = 1 << bits
        changed = differing(tmp_path, granularity)
        assert changed <= granules(path, name, granularity)
        number = random.Random(bits).choice(sorted(changed))
        missing = {"start": number * granularity, "length": granularity}
        with qcow2bm.open(path, "r+") as image, image.edit() as edit:
            edit.reset(name, number * granularity, granularity)
        done = verify(tmp_path, name, "--json", *options)
        document = json.loads(done.out)
        check_verify(document)
        assert (done.status, document["missing"]) == (2, [missing])
        if kind == "data file":
            more = verify(tmp_path, name, "--json", "--new", "data")
            assert (more.status, more.out) == (2, done.out)


@pytest.mark.spec("SALVAGE-10")
@pytest.mark.parametrize("kind", ["plain", "overlay", "data file"])
def test_a_lost_bitmap_is_made_again(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path, kind)
    write(path, 4)
    formats = ["--old-format=qcow2"] if kind == "plain" else []
    for name, bits in NAMES.items():
        granularity = 1 << bits
        tool("qemu-img", "bitmap", "--remove", path, name)
        words = ["add", "vm.qcow2", name, "-g", str(granularity)]
        done = run([*words, "--compare", "old", "vm.qcow2", *formats], tmp_path)
        assert (done.status, done.out) == (0, ""), done.err
        assert granules(path, name, granularity) == differing(tmp_path, granularity)
        assert verify(tmp_path, name, *options_of(kind)).status == 0
    tool("qemu-img", "check", path)
    write(path, 5)  # they record
    for name in NAMES:
        assert verify(tmp_path, name, *options_of(kind)).status == 0


@pytest.mark.spec("SALVAGE-9")
@pytest.mark.parametrize("kind", ["plain", "overlay", "data file"])
def test_a_salvage_of_three_is_three_salvages(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path, kind)
    write(path, 6, crash=True)
    crashed = path.read_bytes()
    compare = ["--compare", "old", "vm.qcow2"]
    compare += ["--old-format=qcow2"] if kind == "plain" else []
    assert run(["salvage", "vm.qcow2", *NAMES, *compare], tmp_path).status == 0
    tool("qemu-img", "check", path)
    together = {name: granules(path, name, 1 << bits) for name, bits in NAMES.items()}
    path.write_bytes(crashed)
    for name, bits in NAMES.items():
        assert run(["salvage", "vm.qcow2", name, *compare], tmp_path).status == 0
        assert granules(path, name, 1 << bits) == together[name]
        assert together[name] == differing(tmp_path, 1 << bits)


@pytest.mark.spec("VERIFY-6")
def test_what_is_stored_of_a_bitmap_that_qemu_left_in_use_misses_writes(tmp_path: Path) -> None:
    path = make(tmp_path, "plain")
    write(path, 7, crash=True)
    options = options_of("plain")
    done = verify(tmp_path, "daily", *options)
    assert (done.status, done.out) == (1, "")
    assert 'bitmap "daily" is in use (inconsistent)' in done.err
    done = verify(tmp_path, "daily", "--stale", "--json", *options)
    document = json.loads(done.out)
    assert (done.status, document["dirty-bytes"]) == (2, 0)
    found = {
        number
        for extent in document["missing"]
        for number in range(extent["start"] >> 16, -(-sum(extent.values()) >> 16))
    }
    assert found == differing(tmp_path, GRANULE)


@pytest.mark.spec("VERIFY-4")
@pytest.mark.parametrize("which", ["vm.qcow2", "base", "old"])
def test_who_writes_to_one_of_the_files_is_noticed(which: str, tmp_path: Path) -> None:
    make(tmp_path, "overlay")
    tool("qemu-img", "convert", "-O", "qcow2", tmp_path / "old", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "old")
    before = (tmp_path / "vm.qcow2").read_bytes()
    with qcow2bm.open(tmp_path / which, "r+"):  # which holds the locks of a writer
        done = verify(tmp_path, "daily", "--backup-format=qcow2")
    assert (done.status, done.out) == (1, "")
    assert "in use by" in done.err or "lock Is another process" in done.err
    assert len(done.err.splitlines()) == 1
    assert verify(tmp_path, "daily", "--backup-format=qcow2").status == 0
    assert (tmp_path / "vm.qcow2").read_bytes() == before
