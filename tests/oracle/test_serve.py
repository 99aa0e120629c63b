"""The nbdkit plugin as a process: what clients write is in the bitmaps that QEMU reads."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.nbdkit import (
    SCRIPT,
    RawDisk,
    command,
    environment,
    missing,
    refusal,
    serving,
)
from support.qemu import LEAKS, Disk, run, run_ok

import qcow2bm

MiB = 1 << 20
SIZE = 8 * MiB + 512
GRANULARITY = 4096


@pytest.fixture(scope="module", autouse=True)
def nbdkit_is_there() -> None:
    reason = missing()
    if reason and os.environ.get("QCOW2BM_REQUIRE_QEMU"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def disk(tmp_path: Path) -> RawDisk:
    disk = RawDisk.create(tmp_path, SIZE)
    disk.image.add("daily", GRANULARITY)
    return disk


def flags(disk: RawDisk) -> dict[str, list[str]]:
    return {bitmap["name"]: bitmap["flags"] for bitmap in disk.image.listed()}


def is_in_use(disk: RawDisk) -> bool:
    """Whether the bitmap is being tracked at present, by what stands in the image."""
    while True:  # nothing is locked, so the reader may meet the server's own write
        with (
            contextlib.suppress(qcow2bm.ChangedWhileReadingError),
            qcow2bm.open(disk.image.path, force_share=True) as image,
        ):
            return image.bitmaps["daily"].in_use


def dirty(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The extents of a bitmap in which these ranges were recorded."""
    bits = {
        bit
        for start, length in ranges
        for bit in range(start // GRANULARITY, (start + length - 1) // GRANULARITY + 1)
    }
    extents: list[tuple[int, int]] = []
    for start in (bit * GRANULARITY for bit in sorted(bits)):
        length = min(GRANULARITY, SIZE - start)
        if extents and sum(extents[-1]) == start:
            extents[-1] = extents[-1][0], extents[-1][1] + length
        else:
            extents.append((start, length))
    return extents


def as_qemu_reads(disk: RawDisk) -> bytes:
    """The disk as a guest sees it, through the image."""
    copy = disk.data.with_name("copy")
    run_ok("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk.image.path, copy)
    return copy.read_bytes()


def restored(disk: RawDisk, old: bytes, name: str) -> bytes:
    """A copy of the old disk with what the bitmap calls dirty copied onto it from the new one."""
    new, backup = as_qemu_reads(disk), bytearray(old)
    for start, length in disk.image.extents(name):
        backup[start : start + length] = new[start : start + length]
    return bytes(backup)


def test_as_the_help_says(disk: RawDisk) -> None:
    done = subprocess.run(
        [
            *command("-f", "-U-", *disk.parameters),
            *("--run", 'qemu-io -f raw -c "write -P 7 5000 9000" "$uri" && nbdinfo --json "$uri"'),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=True,
    )
    (export,) = json.loads(done.stdout[done.stdout.index("{") :])["exports"]
    assert export["export-size"] == SIZE
    abilities = ("multi_conn", "flush", "fua", "trim", "zero", "fast_zero")
    assert all(export[f"can_{ability}"] for ability in abilities), export
    assert flags(disk) == {"daily": ["auto"]}
    assert disk.image.extents("daily") == [(4096, 12288)]
    assert as_qemu_reads(disk) == bytes(5000) + b"\7" * 9000 + bytes(SIZE - 14000)


@pytest.mark.spec("TRACK-21")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("flush_interval", ["0", "0.01"])
def test_a_server_that_is_ended_leaves_valid_bitmaps(
    disk: RawDisk, background: bool, flush_interval: str
) -> None:
    parameter = f"flush-interval={flush_interval}"
    with serving(disk, parameter, background=background) as server:
        assert is_in_use(disk)
        server.io("write -P 1 0 1", "write -f -P 2 1M 64k", f"write -P 3 {SIZE - 512} 512")
        server.io("write -z 2M 5000", "write -z -u 3M 12345", "discard 4M 100k", "flush")
        server.end()
    assert flags(disk) == {"daily": ["auto"]}
    ranges = [(0, 1), (MiB, 65536), (SIZE - 512, 512), (2 * MiB, 5000), (3 * MiB, 12345)]
    assert disk.image.extents("daily") == dirty([*ranges, (4 * MiB, 102400)])
    assert disk.image.check().returncode == 0


@pytest.mark.parametrize("seed", range(2))
def test_an_incremental_backup_restores_byte_for_byte(disk: RawDisk, seed: int) -> None:
    chance = random.Random(seed)
    old = chance.randbytes(SIZE)
    disk.data.write_bytes(old + disk.data.read_bytes()[SIZE:])
    disk.image.add("coarse", 65536)
    written: list[tuple[int, int]] = []
    with serving(disk, "flush-interval=0.05", background=bool(seed)) as server:
        loads = [load(chance, written) for _ in range(4)]
        with ThreadPoolExecutor(len(loads)) as clients:
            list(clients.map(lambda commands: server.io(*commands), loads))
        server.end()
    assert flags(disk) == {"daily": ["auto"], "coarse": ["auto"]}
    assert disk.image.extents("daily") == dirty(written)
    new = as_qemu_reads(disk)
    assert new == disk.data.read_bytes()[:SIZE]
    assert new != old
    assert restored(disk, old, "daily") == new
    assert restored(disk, old, "coarse") == new


def load(chance: random.Random, written: list[tuple[int, int]]) -> list[str]:
    """qemu-io commands of every kind, all over the disk."""
    kinds = ("write -P 17", "write -f -P 18", "write -z", "write -z -u", "discard")
    commands = []
    for _ in range(60):
        length = min(int(chance.lognormvariate(9, 1.5)) + 1, MiB)
        start = chance.randrange(SIZE - length)
        written.append((start, length))
        commands.append(f"{chance.choice(kinds)} {start} {length}")
        commands += chance.choices(("flush", f"read {start} {length}"), k=chance.randrange(2))
    return commands


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ended_in_the_middle_of_everything(disk: RawDisk, number: signal.Signals) -> None:
    chance = random.Random(number)
    old = chance.randbytes(SIZE)
    disk.data.write_bytes(old + disk.data.read_bytes()[SIZE:])
    with serving(disk, "flush-interval=0.01") as server, ThreadPoolExecutor() as clients:
        for _ in range(3):
            switches = [part for line in load(chance, []) * 20 for part in ("-c", line)]
            clients.submit(run, "qemu-io", "-f", "raw", *switches, server.uri)
        while disk.data.read_bytes()[:SIZE] == old:
            assert server.is_running
        server.end(number)
    if number == signal.SIGKILL:
        assert flags(disk) == {"daily": ["in-use", "auto"]}
        return
    assert flags(disk) == {"daily": ["auto"]}
    assert restored(disk, old, "daily") == as_qemu_reads(disk) != old


def test_a_second_period_records_only_what_is_new(disk: RawDisk) -> None:
    with serving(disk) as server:
        server.io("write -P 1 1M 64k")
        server.end()
    middle = as_qemu_reads(disk)
    with qcow2bm.open(disk.image.path, "r+") as image, image.edit() as edit:
        edit.clear("daily")
    with serving(disk) as server:
        server.io("write -P 2 3M 64k", "write -P 2 1M 512")
        server.end()
    assert disk.image.extents("daily") == [(MiB, 4096), (3 * MiB, 65536)]
    assert restored(disk, middle, "daily") == as_qemu_reads(disk)


def test_nbdcopy_over_several_connections(disk: RawDisk, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(SIZE - 3 * MiB)
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(content[:MiB] + bytes(3 * MiB) + content[MiB:])
    with serving(disk) as server:
        run_ok("nbdcopy", "--connections=4", "--flush", source, server.uri)
        run_ok("nbdcopy", "--connections=4", server.uri, back)
        server.end()
    assert back.read_bytes() == source.read_bytes() == as_qemu_reads(disk)
    assert disk.image.extents("daily") == [(0, SIZE)]


@pytest.mark.spec("TRACK-21")
def test_a_client_that_stays_connected_does_not_keep_it_from_storing(disk: RawDisk) -> None:
    with (
        serving(disk) as server,
        subprocess.Popen(
            ["qemu-io", "-f", "raw", server.uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as client,
    ):
        assert client.stdin
        assert client.stdout
        client.stdin.write("write -P 1 1M 4k\n")
        client.stdin.flush()
        while "wrote" not in client.stdout.readline():
            assert client.poll() is None
        server.send(signal.SIGTERM)
        while is_in_use(disk):  # nbdkit itself waits for the client
            assert server.is_running
        client.kill()
        server.wait()
    assert flags(disk) == {"daily": ["auto"]}
    assert disk.image.extents("daily") == [(MiB, 4096)]


@pytest.mark.spec("TRACK-21")
@pytest.mark.parametrize("background", [False, True])
def test_after_a_kill_the_bitmaps_are_in_use(disk: RawDisk, background: bool) -> None:
    with serving(disk, "flush-interval=0.01", background=background) as server:
        server.io("write -P 1 1M 64k", "flush")
        server.end(signal.SIGKILL)
    assert flags(disk) == {"daily": ["in-use", "auto"]}
    assert disk.image.check().returncode in (0, LEAKS)
    with qcow2bm.open(disk.image.path) as image:
        assert image.bitmaps["daily"].status == "inconsistent"
    before = disk.image.path.read_bytes()
    assert "no bitmap of the image is valid and enabled" in refusal(*disk.parameters)
    assert disk.image.path.read_bytes() == before


@pytest.mark.spec("INTENT-1", "INTENT-5")
@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.deep)])
def test_killed_at_any_moment_with_intent(disk: RawDisk, kills: int) -> None:
    """The incremental backup after a recovery restores the disk byte for byte."""
    chance = random.Random(kills)
    disk.image.add("coarse", 65536)
    for number in range(kills):
        old = as_qemu_reads(disk)
        with (
            serving(disk, "flush-interval=0.02", "intent=yes") as server,
            ThreadPoolExecutor() as clients,
        ):
            for _ in range(4):
                switches = [part for line in load(chance, []) * 20 for part in ("-c", line)]
                clients.submit(run, "qemu-io", "-f", "raw", *switches, server.uri)
            time.sleep(chance.uniform(0.05, 0.3))
            server.end(signal.SIGKILL)
        with qcow2bm.open(disk.image.path, "r+") as image:
            assert {*image.recover().names} == {"daily", "coarse"}
        assert disk.image.check().returncode in (0, LEAKS)
        new = as_qemu_reads(disk)
        assert restored(disk, old, "daily") == new, number
        assert restored(disk, old, "coarse") == new, number
        for name in ("daily", "coarse"):
            disk.image.bitmap(name, "--clear")
    print(f"{kills} kills of a server under load, every backup restores the disk")


@pytest.mark.spec("INTENT-7")
def test_a_server_that_was_killed_recovers_when_it_begins_again(disk: RawDisk) -> None:
    with serving(disk, "intent=yes") as server:
        server.io("write -P 1 1M 64k")
        server.end(signal.SIGKILL)
    with serving(disk) as server:
        server.end()
    assert flags(disk) == {"daily": ["auto"]}
    extents = disk.image.extents("daily")
    assert any(start <= MiB and MiB + 65536 <= start + length for start, length in extents)


def test_only_the_bitmaps_that_are_named(disk: RawDisk) -> None:
    disk.image.add("weekly, monthly", GRANULARITY)
    disk.image.add("other", GRANULARITY)
    names = ("bitmaps=daily", "bitmap=weekly, monthly")
    with serving(disk, *names, "others=mark-in-use") as server:
        server.io("write -P 1 1M 4k")
        server.end()
    expected = {"daily": ["auto"], "weekly, monthly": ["auto"], "other": ["in-use", "auto"]}
    assert flags(disk) == expected
    assert disk.image.extents("weekly, monthly") == [(MiB, 4096)]


class TestLocks:
    def test_nobody_else_uses_the_two_files_meanwhile(self, disk: RawDisk) -> None:
        other = RawDisk(disk.image, disk.data.with_name("other.raw"))
        shutil.copyfile(disk.data, other.data)
        with serving(disk) as server:
            for done in (
                run("qemu-img", "info", disk.image.path),
                run("qemu-io", "-f", "raw", "-c", "write 0 512", disk.data),
            ):
                assert "Failed to get" in done.stderr
                assert '"write" lock' in done.stderr
                assert done.returncode == 1
            with pytest.raises(qcow2bm.ImageLockedError):
                qcow2bm.open(disk.image.path)
            assert "vm.qcow2: in use by another process" in refusal(*other.parameters)
            twin = disk.image.path.with_name("twin.qcow2")
            shutil.copyfile(disk.image.path, twin)
            line = refusal(f"image={twin}", f"data={disk.data}")
            assert "vm.raw: in use by another process" in line
            server.end()
        assert run("qemu-img", "info", disk.image.path).returncode == 0

    def test_it_does_not_serve_what_somebody_else_uses(self, disk: RawDisk) -> None:
        with disk.image.held_by_qemu_io():
            assert "in use by another process" in refusal(*disk.parameters)


def no_data_file(folder: Path) -> RawDisk:
    return RawDisk(Disk.create(folder / "vm.qcow2", SIZE), folder / "vm.qcow2")


def not_raw(folder: Path) -> RawDisk:
    return RawDisk.create(folder, SIZE, data_file_raw="off")


def no_subclusters(folder: Path) -> RawDisk:
    return RawDisk.create(folder, SIZE, extended_l2="on")


def after(command: str) -> Callable[[Path], RawDisk]:
    def make(folder: Path) -> RawDisk:
        disk = RawDisk.create(folder, SIZE)
        disk.image.io(command)
        return disk

    return make


def another_length(change: int) -> Callable[[Path], RawDisk]:
    def make(folder: Path) -> RawDisk:
        disk = RawDisk.create(folder, SIZE)
        os.truncate(disk.data, disk.data.stat().st_size + change)
        return disk

    return make


@pytest.mark.spec("TRACK-18")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (no_data_file, "without a raw external data file"),
        (not_raw, "without a raw external data file"),
        (no_subclusters, "guest offset 0x0 has subclusters that are not"),
        (after("write -z 1M 64k"), "guest offset 0x100000 reads as zeros"),
        (after("discard 64k 128k"), "guest offset 0x10000 reads as zeros"),
        (another_length(512), "vm.raw: has 8454656 bytes, and the disk has 8389120"),
        (another_length(-131072), "vm.raw: has 8323072 bytes, and the disk has 8389120"),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_qemu_would_see_otherwise_is_refused(
    tmp_path: Path, make: Callable[[Path], RawDisk], reason: str, background: bool
) -> None:
    disk = make(tmp_path)
    disk.image.add("daily", GRANULARITY)
    before = disk.image.path.read_bytes()
    if background:
        pidfile = tmp_path / "pid"
        options = [f"-P{pidfile}", f"-U{tmp_path / 'socket'}"]
        done = subprocess.run(
            command(*options, *disk.parameters),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=60,
            check=False,
        )
        if pidfile.exists():
            os.kill(int(pidfile.read_text()), signal.SIGKILL)
            pytest.fail("it is served")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        line = done.stderr
    else:
        line = refusal(*disk.parameters)
    assert reason in line
    assert disk.image.path.read_bytes() == before


def test_subclusters_that_are_all_written_are_served(tmp_path: Path) -> None:
    disk = RawDisk.create(tmp_path, SIZE, extended_l2="on")
    disk.image.io(f"write -P 9 0 {SIZE}")
    disk.image.add("daily", GRANULARITY)
    with serving(disk) as server:
        server.io("write -P 1 1M 512")
        server.end()
    assert disk.image.extents("daily") == [(MiB, 4096)]


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ([], "the parameter image=PATH is missing"),
        (["image=vm.qcow2"], "the parameter data=PATH is missing"),
        (["colour=blue"], "unknown parameter colour"),
        (["flush-interval=soon"], "flush-interval=soon is no number of seconds"),
        (["intent=perhaps"], "intent=perhaps must be yes or no"),
        (["others=ignore"], "others=ignore must be refuse or mark-in-use"),
        (["image=/nowhere/vm.qcow2", "data=/nowhere/vm.raw"], "No such file or directory"),
    ],
)
def test_wrong_parameters(parameters: list[str], reason: str) -> None:
    assert reason in refusal(*parameters)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["bitmaps=daily,nightly"], 'bitmap "nightly" not found'),
        (["bitmaps=old"], 'bitmap "old" is disabled'),
        (["bitmaps=daily"], 'bitmap "weekly" would miss writes'),
    ],
)
def test_wrong_bitmaps(disk: RawDisk, names: list[str], reason: str) -> None:
    disk.image.add("weekly", GRANULARITY)
    disk.image.bitmap("old", "--add", "--disable")
    assert reason in refusal(*disk.parameters, *names)
    assert flags(disk) == {"daily": ["auto"], "weekly": ["auto"], "old": []}


@pytest.fixture
def site_packages(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """The package as it is installed for a version of Python; what it needs lies beside it."""

    def install(version: str) -> Path:
        folder = tmp_path / "venv" / "lib" / f"python{version}" / "site-packages"
        folder.mkdir(parents=True)
        shutil.copytree(SCRIPT.parent.parent, folder / "qcow2bm")
        for path in Path(environment()["PYTHONPATH"]).iterdir():
            if path.name.startswith(("numpy", "construct")):
                (folder / path.name).symlink_to(path)
        return folder / "qcow2bm" / "serve" / SCRIPT.name

    return install  # type: ignore[return-value]


OURS = ".".join(map(str, sys.version_info[:2]))


def test_it_finds_what_it_was_installed_with(
    disk: RawDisk, site_packages: Callable[[str], Path]
) -> None:
    script = site_packages(OURS)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [
            *command("-f", "-U-", *disk.parameters, script=script),
            *("--run", 'qemu-io -f raw -c "write 1M 4k" "$uri"'),
        ],
        env=clean,
        stdout=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
    assert disk.image.extents("daily") == [(MiB, 4096)]


def test_it_refuses_another_python_than_it_was_installed_for(
    disk: RawDisk, site_packages: Callable[[str], Path]
) -> None:
    line = refusal(*disk.parameters, script=site_packages("3.99"))
    assert f"installed for Python 3.99, but nbdkit runs Python {OURS}" in line
