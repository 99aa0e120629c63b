"""Bitmaps that QEMU left in use, or a program without bitmaps stale, are valid to QEMU again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support import qemu
from support.console import environment, run
from support.qemu import Disk
from support.specreader import page

import qcow2bm
from qcow2bm import compare as comparing

GRANULE = 65536
SIZE = 64 << 20
AUTOCLEAR = 88


def tool(*arguments: str | Path) -> None:
    done = qemu.run(*arguments)
    assert done.returncode == 0, (arguments, done.stderr)


def make(folder: Path, name: str = "vm.qcow2", *options: str) -> Path:
    path = folder / name
    tool("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(SIZE))
    return path


def write(path: Path, *commands: str, crash: bool = False) -> None:
    """The guest writes, and QEMU is killed where it is to ``crash``."""
    listed = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-d", "unmap", *listed, *(("-c", "abort") if crash else ()), str(path)],
        capture_output=True,
        check=False,
    )
    assert (done.returncode != 0) == crash, done.stderr


def granules(path: Path, name: str) -> list[int]:
    """The ranges that QEMU itself reports as dirty."""
    return sorted(
        {
            number
            for start, length in Disk(path).extents(name)
            for number in range(start // GRANULE, -(-(start + length) // GRANULE))
        }
    )


def content(path: Path, folder: Path) -> bytes:
    raw = folder / "content"
    tool("qemu-img", "convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def differing(old: bytes, new: bytes) -> list[int]:
    return [
        n
        for n in range(SIZE // GRANULE)
        if old[n * GRANULE : (n + 1) * GRANULE] != new[n * GRANULE : (n + 1) * GRANULE]
    ]


KINDS = "raw", "qcow2", "overlay", "compressed", "other cluster size"


@pytest.mark.spec("SALVAGE-5", "SALVAGE-7", "SALVAGE-8")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_backing_file", [False, True])
def test_after_a_crash_the_next_backup_has_exactly_what_differs(
    kind: str, has_backing_file: bool, tmp_path: Path
) -> None:
    base = make(tmp_path, "base,1.qcow2")
    write(base, "write -P 7 1M 3M")
    options = ("-F", "qcow2", "-b", str(base)) if has_backing_file else ()
    path = make(tmp_path, "vm.qcow2", *options)
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write -P 1 10M 3M", "write -P 2 40M 64k", "write -P 3 63M 1M")
    old, kinds = tmp_path / "old, really", {"raw": "raw"}
    before = content(path, tmp_path)
    if kind == "overlay":
        under = make(tmp_path, "under")
        write(under, "write -P 1 10M 2M")
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", under, old)
        (tmp_path / "raw").write_bytes(before)
        tool("qemu-img", "convert", "-n", "-O", "qcow2", tmp_path / "raw", old)
    else:
        more = {"compressed": ["-c"], "other cluster size": ["-o", "cluster_size=512"]}
        words = more.get(kind, [])
        tool("qemu-img", "convert", *words, "-O", kinds.get(kind, "qcow2"), path, old)
    write(
        path,
        *("write -P 1 11M 1M", "write -P 9 12M 512", "write -z 40M 64k", "discard 63M 128k"),
        *("write -P 5 30M 70k", "write -P 7 2M 64k"),
        crash=True,
    )
    arguments = ["salvage", "vm.qcow2", "daily", "--compare", str(old), "vm.qcow2"]
    formats = [] if kind == "raw" else ["--old-format=qcow2"]
    if formats:
        assert run(arguments, tmp_path).status == 1
    done = run([*arguments, *formats], tmp_path)
    assert done.status == 0, done.err
    tool("qemu-img", "check", path)
    expected = differing(before, content(path, tmp_path))
    assert granules(path, "daily") == expected
    assert len(expected) > 5


@pytest.mark.spec("SALVAGE-7")
def test_who_writes_to_a_backing_file_or_a_backup_is_noticed(tmp_path: Path) -> None:
    base = make(tmp_path, "base")
    path = make(tmp_path, "vm.qcow2", "-F", "qcow2", "-b", str(base))
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write 0 64k", crash=True)
    old = make(tmp_path, "old")
    arguments = ["salvage", "vm.qcow2", "daily", "--compare", "old", "vm.qcow2"]
    arguments += ["--old-format=qcow2"]
    for written in (base, old):
        with qcow2bm.open(written, "r+"):  # which holds the locks of a writer
            done = run(arguments, tmp_path)
            assert (done.status, done.out) == (1, "")
            message = "lock Is another process" if written == base else "in use by this process"
            assert message in done.err
            assert len(done.err.splitlines()) == 2
    assert run(arguments, tmp_path).status == 0
    assert granules(path, "daily") == [0]


@pytest.mark.spec("SALVAGE-7")
@pytest.mark.parametrize("what", ["raw backing file", "data file", "qcow2 file"])
def test_nobody_writes_meanwhile_to_what_belongs_to_a_disk(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU lets others write to raw files below its exports; a writer without locks is noticed."""
    raw, old = tmp_path / "raw", tmp_path / "old"
    raw.write_bytes(b"\1" * SIZE)
    if what == "data file":
        path = make(tmp_path, "vm.qcow2", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
        write(path, f"write -P 1 0 {SIZE}")
    else:
        path = make(tmp_path)
        write(path, f"write -P 1 0 {SIZE}")
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write -P 1 0 64k", crash=True)
    if what == "raw backing file":
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw, old)
    elif what == "qcow2 file":
        tool("qemu-img", "convert", "-O", "qcow2", raw, old)
    else:
        old.write_bytes(raw.read_bytes())
    compare = comparing.find_differences_at

    def compare_and_write(*arguments: object, **options: object) -> object:
        found = compare(*arguments, **options)  # type: ignore[arg-type]
        if what == "qcow2 file":
            with old.open("r+b") as file:
                file.seek(-512, os.SEEK_END)
                file.write(b"x")
            os.utime(old, ns=(1, 1))
            arguments[0].require_unchanged()  # type: ignore[attr-defined]
        else:
            victim = raw if what == "raw backing file" else tmp_path / "data"
            done = qemu.run("qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", victim)
            assert 'Failed to get "write" lock' in done.stderr
        return found

    monkeypatch.setattr(comparing, "find_differences_at", compare_and_write)
    arguments = ["salvage", "vm.qcow2", "daily", "--compare", "old", "vm.qcow2"]
    arguments += [] if what == "data file" else ["--old-format=qcow2"]
    done = run(arguments, tmp_path)
    assert done.status == (what == "qcow2 file"), done.err
    if done.status:
        assert "changed" in done.err


@pytest.mark.spec("SALVAGE-5")
def test_the_data_file_of_the_image_is_no_backup(tmp_path: Path) -> None:
    options = ("-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
    path = make(tmp_path, "vm.qcow2", *options)
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write -P 2 5M 64k", crash=True)
    os.link(tmp_path / "data", tmp_path / "old")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "data", tmp_path / "overlay")
    for new in ("vm.qcow2", "data"):
        for old in (["old"], ["overlay", "--old-format=qcow2"]):
            arguments = ["salvage", "vm.qcow2", "daily", "--compare", old[0], new, *old[1:]]
            done = run(arguments, tmp_path)
            assert (done.status, done.out) == (1, "")
            assert "is not the last backup, but the disk" in done.err


def processes_with(text: str) -> list[str]:
    """The processes that have a text on their command lines, but this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if text.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return [name for name in found if int(name) != os.getpid()]


@pytest.mark.spec("SALVAGE-5")
def test_a_data_file_that_is_not_raw_is_no_backup_either(tmp_path: Path) -> None:
    path = make(tmp_path, "vm.qcow2", "-o", f"data_file={tmp_path / 'data'}")
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write -P 2 5M 64k", crash=True)
    for old, new in (("data", "vm.qcow2"), ("vm.qcow2", "data")):
        done = run(["salvage", "vm.qcow2", "daily", "--compare", old, new], tmp_path)
        assert (done.status, done.out) == (1, "")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write 0 64k", crash=True)
    (tmp_path / "old").write_bytes(bytes(SIZE))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    command: list[str | Path] = [sys.executable, "-m", "qcow2bm", "salvage", path, "daily"]
    for number in range(12):
        process = subprocess.Popen(
            [*command, "--compare", tmp_path / "old", path],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment() | {"TMPDIR": str(tmp_path / "tmp")},
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1 + number * 0.02)
        process.send_signal(signal.SIGINT if number % 2 else signal.SIGKILL)
        process.wait(20)
        with qcow2bm.open(path, "r+", lock_timeout=5):  # no process holds a lock any more
            pass
        with qcow2bm.open(tmp_path / "vm.qcow2"):
            pass
        assert processes_with(str(tmp_path / "tmp")) == []


def test_what_qemu_nbd_cannot_open_is_said_in_a_line(tmp_path: Path) -> None:
    path = make(tmp_path)
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write 0 64k", crash=True)
    (tmp_path / "old").write_bytes(b"QFI\xfb" + bytes(1000))
    arguments = ["salvage", "vm.qcow2", "daily", "--compare", "old", "vm.qcow2"]
    done = run([*arguments, "--old-format=qcow2"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "old: cannot be served: " in done.err
    assert len(done.err.splitlines()) == 2


def test_an_encrypted_disk_is_compared_once_it_is_decrypted(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "vm.qcow2", SIZE, **{"encrypt.format": "luks"})
    disk.io("write -P 1 0 4M")
    disk.add("daily", GRANULE)
    convert = ("qemu-img", "convert", *disk.arguments, "-O", "raw")
    tool(*convert, tmp_path / "old")
    disk.crash(f"write -P 2 {8 * GRANULE} {GRANULE}")
    words = ["salvage", "vm.qcow2", "daily", "--compare", "old"]
    done = run([*words, "vm.qcow2"], tmp_path)
    assert done.status == 1
    assert "decrypt the disk into a raw file with qemu-img convert" in done.err
    tool(*convert, tmp_path / "new")
    assert run([*words, "new", "--assert-current"], tmp_path).status == 0
    assert disk.extents("daily") == [(8 * GRANULE, GRANULE)]


def test_without_qemu_nbd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write 0 64k", crash=True)
    (tmp_path / "old").write_bytes(bytes(SIZE))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(["salvage", "vm.qcow2", "daily", "--compare", "old", "vm.qcow2"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "without qemu-nbd (Debian: qemu-utils)" in done.err


@pytest.mark.spec("SALVAGE-3")
@pytest.mark.parametrize("were_leaks_repaired", [False, True])
def test_after_a_program_without_bitmaps_the_names_are_valid_again(
    were_leaks_repaired: bool, tmp_path: Path
) -> None:
    path = make(tmp_path)
    for name in ("a", "b", "c"):
        tool("qemu-img", "bitmap", "--add", path, name)
    write(path, "write -P 1 3M 64k")
    with path.open("r+b") as file:  # what any such program does
        file.seek(AUTOCLEAR)
        file.write(bytes(8))
    if were_leaks_repaired:
        tool("qemu-img", "check", "-r", "leaks", path)
        write(path, "write -P 2 20M 1M")
    done = run(["salvage", "vm.qcow2", "a", "--all-dirty"], tmp_path)
    if done.status:  # QEMU took the extension away, or gave its clusters to others
        assert were_leaks_repaired, done.err
        return
    flags = {b["name"]: b["flags"] for b in Disk(path).listed()}
    assert flags == {"a": ["auto"], "b": ["in-use", "auto"], "c": ["in-use", "auto"]}
    assert granules(path, "a") == list(range(SIZE // GRANULE))
    tool("qemu-img", "bitmap", "--remove", path, "b")
    done = run(["salvage", "vm.qcow2", "c", "--trust-stale"], tmp_path)
    assert granules(path, "c") == [48]
    run(["repair", "vm.qcow2", "--no-undo"], tmp_path)
    tool("qemu-img", "check", path)
    write(path, "write 5M 64k")
    assert granules(path, "c") == [48, 80]


def test_the_data_file_of_an_image_is_compared_raw(tmp_path: Path) -> None:
    options = ("-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
    path = make(tmp_path, "vm.qcow2", *options)
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write -P 1 3M 64k")
    (tmp_path / "old").write_bytes((tmp_path / "data").read_bytes())
    write(path, "write -P 2 5M 64k", crash=True)
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(path.read_bytes())
    for name, new in (("copy.qcow2", "data"), ("vm.qcow2", "vm.qcow2")):
        done = run(["salvage", name, "daily", "--compare", "old", new], tmp_path)
        assert done.status == 0, done.err
        assert granules(tmp_path / name, "daily") == [80]
    assert os.path.getsize(tmp_path / "data") == SIZE


@pytest.mark.parametrize("row", page("troubleshooting.md").table("A bitmap cannot be used").rows)
def test_what_qemu_says_of_a_bitmap_that_cannot_be_used(
    row: dict[str, str], tmp_path: Path
) -> None:
    path = make(tmp_path)
    tool("qemu-img", "bitmap", "--add", path, "daily")
    write(path, "write 0 64k", crash=True)
    bitmap = ("qemu-img", "bitmap")
    commands: dict[str, list[tuple[str | Path, ...]]] = {
        "is inconsistent and cannot be used": [
            (*bitmap, "--clear", path, "daily"),
            (*bitmap, "--enable", path, "daily"),
            (*bitmap, "--merge", "daily", path, "new"),
            ("qemu-img", "resize", path, "128M"),
            ("qemu-nbd", "-r", "-B", "daily", "-k", tmp_path / "socket", path),
        ],
        "Cannot copy inconsistent bitmap": [
            ("qemu-img", "convert", "--bitmaps", "-O", "qcow2", path, tmp_path / "copy")
        ],
        "Bitmap already exists": [(*bitmap, "--add", path, "daily")],
        "not found": [(*bitmap, "--clear", path, "nobody")],
    }
    for command in commands[row["QEMU says"]]:
        before = path.read_bytes()
        if "new" in command:
            tool(*bitmap, "--add", path, "new")
        done = qemu.run(*command)
        assert done.returncode != 0
        assert row["QEMU says"] in done.stderr, command
        path.write_bytes(before)
    assert run(["salvage", "vm.qcow2", "daily", "--all-dirty"], tmp_path).status == 0
    for command in commands[row["QEMU says"]][:2]:
        if row["QEMU says"] not in ("Bitmap already exists", "not found"):
            tool(*command)
