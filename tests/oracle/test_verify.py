"""What QEMU recorded is proved; what it did not record is found."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from support import qemu
from support.console import Result, run
from support.jsonspec import check_verify
from support.qemu import Disk

import qcow2bm
from qcow2bm import compare
from qcow2bm.compare.nbd import NbdReader

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


@pytest.mark.spec("SALVAGE-7")
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize("kind", ["plain", "compressed", "overlay", "extended", "cut off"])
def test_a_served_image_has_the_content_that_qemu_converts(
    kind: str, cluster_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = tmp_path / "vm.qcow2", 8 << 20
    options = [f"cluster_size={cluster_size}"]
    if kind == "extended":
        if cluster_size < 16384:
            return
        options.append("extended_l2=on")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(options)]
    if kind == "overlay":
        tool(*create, tmp_path / "base", str(size))
        tool("qemu-io", "-c", f"write -P 3 0 {size}", tmp_path / "base")
        create += ["-F", "qcow2", "-b", str(tmp_path / "base")]
    tool(*create, path, str(size))
    compressed = "-c" if kind == "compressed" else ""
    at = 2 << 20
    for command in (
        f"write -P 1 0 {at}",
        f"write {compressed} -P 2 {at} {at}",
        f"write -P 4 {2 * at + 512} 70000" if kind != "compressed" else f"write -P 4 {2 * at} {at}",
        f"write -z {at // 2} {at // 4}",
    ):
        tool("qemu-io", "-c", command, path)
    if kind == "cut off":  # QEMU reads zeros behind the end
        os.truncate(path, path.stat().st_size - 300)
    tool("qemu-img", "convert", "-O", "raw", path, tmp_path / "raw")
    expected = (tmp_path / "raw").read_bytes()
    asked: list[int] = []
    read = NbdReader.read_into

    def read_into(self: NbdReader, start: int, buffer: memoryview) -> None:
        asked.append(start)
        read(self, start, buffer)

    monkeypatch.setattr(NbdReader, "read_into", read_into)
    step = 512 << 10
    with compare.served(str(path), 1) as content, content.reader() as reader:
        buffer = memoryview(bytearray(step))
        for start in range(0, size, step):
            reader.read_into(start, buffer)
            assert bytes(buffer) == expected[start : start + step], start
    if kind in ("plain", "overlay") and cluster_size >= 4096:
        assert 0 not in asked
    assert asked
