"""Migration streams of real QEMUs are read, and streams written here are taken in by them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.console import run
from support.qemu import Disk, QmpError
from support.qemu_facts import fact
from support.twin import KiB, MiB
from support.vm import Machine

import qcow2bm
from qcow2bm.migration.stream_bitmaps import StreamBitmaps, read_stream
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream

pytestmark = pytest.mark.usefixtures("system_emulator")

SIZE = 10 * MiB + 512  # no multiple of most granularities


def packaged() -> bytes:
    """A command right after the memory, in a stream of a postcopy migration."""
    return bytes([0x7E, 0, 0, 0, int(fact("postcopy-section")), 8, 0, 7, 0, 4])


FOREVER = 2_000_000  # ms that a migration may stop the machine: it counts bits as bytes


class Made(NamedTuple):
    """A bitmap to be made: how it is added, and what is written once it is there."""

    name: str
    granularity: int
    persistent: bool = True
    enabled: bool = True
    writes: tuple[tuple[int, int], ...] = ()


MADE = [
    Made("clean", 512, enabled=False),
    Made("one", 512, writes=((0, 512), (SIZE - 512, 512))),
    Made("fine", 512, writes=((MiB, 4 * MiB), (7 * MiB, 512))),
    Made("transient", 4 * KiB, persistent=False, writes=((64 * KiB, 1536),)),
    Made("disabled", 64 * KiB, enabled=False),
    Made("größe \N{SNOWMAN}", MiB, writes=((3 * MiB, 512),)),
    Made("huge bits", 2 << 30),
    Made("n" * 255, 256 * KiB, writes=((5 * MiB, MiB),)),
]


def add(machine: Machine, made: Made) -> None:
    arguments: dict[str, object] = {
        "node": "disk",
        "name": made.name,
        "granularity": made.granularity,
        "persistent": made.persistent,
    }
    machine.execute("block-dirty-bitmap-add", arguments)
    for start, length in made.writes:
        machine.write(start, length)
    if not made.enabled:
        machine.execute("block-dirty-bitmap-disable", {"node": "disk", "name": made.name})


class Truth(NamedTuple):
    """The facts that QEMU reports about a bitmap before it sends the bitmap."""

    granularity: int
    enabled: bool
    persistent: bool
    granules: int
    sha256: str


def truth(machine: Machine) -> dict[str, Truth]:
    return {
        name: Truth(
            found["granularity"],
            found["recording"],
            found["persistent"],
            found["count"] // found["granularity"],
            machine.sha256(name),
        )
        for name, found in machine.bitmaps().items()
    }


def came(bitmaps: StreamBitmaps) -> dict[str, Truth]:
    """The same facts about a bitmap that was read from the stream."""
    assert bitmaps.is_complete
    assert bitmaps.fault is None
    assert all(bitmap.disk_size == SIZE for bitmap in bitmaps.all)
    return {
        b.bitmap_alias: Truth(
            b.granularity,
            b.enabled,
            b.persistent,
            -(-b.dirty_bytes // b.granularity),  # QEMU does not clip the last granule
            b.sha256(),
        )
        for b in bitmaps.complete
    }


def pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(5000):  # no multiple of anything
            yield piece


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk.create(tmp_path / "disk.qcow2", SIZE)


def send(machine: Machine, path: Path, *, postcopy: bool = False) -> None:
    """Migrates into a file.

    Postcopy begins once the rest of the memory fits into the time the machine may stop. The bits
    must not, or it stays a precopy.
    """
    machine.execute("migrate-set-parameters", {"downtime-limit": 1 if postcopy else FOREVER})
    machine.migrate(f"exec:cat >{shlex.quote(str(path))}", slowly=postcopy)
    if postcopy:
        machine.wait_for_migration("active")
        machine.execute("migrate-start-postcopy")
        machine.execute("migrate-set-parameters", {"max-bandwidth": 8 * MiB})
    machine.wait_for_migration("completed")


@pytest.mark.parametrize(
    "how",
    ["running", "paused", "postcopy", "xbzrle", "compress", "x-ignore-shared"],
)
def test_a_stream_of_qemu(disk: Disk, tmp_path: Path, how: str) -> None:
    """Most ways are capabilities that change how the pages look that come before the bitmaps."""
    path = tmp_path / "stream"
    with Machine(disk.path, paused=how == "paused") as machine:
        for made in MADE:
            add(machine, made)
        expected = truth(machine)
        capabilities = [] if how in ("running", "paused", "postcopy") else [how]
        if how == "compress" and fact("compress") == "no":
            with pytest.raises(QmpError, match="does not accept value 'compress'"):
                machine.enable("dirty-bitmaps", *capabilities)
            return
        machine.enable("dirty-bitmaps", *capabilities)
        send(machine, path, postcopy=how == "postcopy")
    assert len(expected) == len(MADE)
    assert (packaged() in path.read_bytes()) == (how == "postcopy")
    bitmaps = read_stream(pieces(path))
    assert came(bitmaps) == expected
    assert {bitmap.node_alias for bitmap in bitmaps.all} == {"disk"}


@pytest.mark.spec("STREAM-3")
@pytest.mark.parametrize(
    "capabilities", [(), ("multifd",), ("mapped-ram",), ("mapped-ram", "multifd")]
)
def test_a_file_of_qemu(disk: Disk, tmp_path: Path, capabilities: tuple[str, ...]) -> None:
    """QEMU writes to the file itself; with mapped-ram each page has its place in the file."""
    path = tmp_path / "stream"
    with Machine(disk.path) as machine:
        for made in MADE:
            add(machine, made)
        expected = truth(machine)
        if fact("mapped-ram") == "no" and "mapped-ram" in capabilities:
            with pytest.raises(QmpError, match="mapped-ram"):
                machine.enable("dirty-bitmaps", *capabilities)
            return
        machine.enable("dirty-bitmaps", *capabilities)
        if fact("mapped-ram") == "no" or capabilities == ("multifd",):
            with pytest.raises(QmpError):  # no file: yet; or it needs mapped-ram
                machine.migrate(f"file:{path}")
            return
        machine.execute("migrate-set-parameters", {"downtime-limit": FOREVER})
        machine.migrate(f"file:{path}")
        machine.wait_for_migration("completed")
    assert came(read_stream(pieces(path))) == expected


def test_aliases_and_a_changed_persistence(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    aliases = {"fine": ("a", None), "transient": ("ü" * 127, True), "one": ("c", False)}
    if fact("transform") == "no":
        aliases = {name: (alias, None) for name, (alias, _) in aliases.items()}
    with Machine(disk.path) as machine:
        for made in MADE:
            add(machine, made)
        expected = truth(machine)
        machine.enable("dirty-bitmaps")
        mapped: list[dict[str, Any]] = [
            {"name": name, "alias": alias}
            | ({} if persistent is None else {"transform": {"persistent": persistent}})
            for name, (alias, persistent) in aliases.items()
        ]
        mapping = [{"node-name": "disk", "alias": "elsewhere", "bitmaps": mapped}]
        machine.execute("migrate-set-parameters", {"block-bitmap-mapping": mapping})
        send(machine, path)
    bitmaps = read_stream(pieces(path))
    assert {bitmap.node_alias for bitmap in bitmaps.all} == {"elsewhere"}
    assert came(bitmaps) == {
        alias: expected[name]._replace(
            persistent=expected[name].persistent if persistent is None else persistent
        )
        for name, (alias, persistent) in aliases.items()
    }


@pytest.mark.parametrize("capability", [True, False])
def test_a_stream_without_bitmaps(disk: Disk, tmp_path: Path, capability: bool) -> None:
    path = tmp_path / "stream"
    with Machine(disk.path) as machine:
        if capability:
            machine.enable("dirty-bitmaps")
        send(machine, path)
    bitmaps = read_stream(pieces(path))
    assert (bitmaps.is_complete, bitmaps.fault, bitmaps.all) == (True, None, [])


def machine_type(machine: Machine) -> str:
    """The machine that the alias "pc" stands for."""
    found = machine.execute("query-machines")
    (name,) = (each["name"] for each in found if each.get("alias") == "pc")
    return str(name)


def outgoing() -> list[OutgoingBitmap]:
    """Bitmaps of every kind, whose bits are random, clear, and set."""
    bits = {512: -(-SIZE // 512), 4 * KiB: -(-SIZE // (4 * KiB)), 2 << 30: 1}
    names = iter(["a", "b ü", "c" * 255, "d", "e", "f", "g", "h", "i", "j", "k", "l"])
    made = []
    for granularity, count in bits.items():
        length = -(-count // 8)
        seed = sha256(bytes([granularity.bit_length()])).digest()
        for number, packed in enumerate(
            (bytes(length), b"\xff" * length, seed * (length // 32 + 1))
        ):
            enabled, persistent = number != 1, number != 2
            made.append(
                OutgoingBitmap("disk", next(names), granularity, enabled, persistent, packed, SIZE)
            )
    return made


def test_qemu_takes_a_stream_in(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    bitmaps = outgoing()
    with Machine(disk.path, incoming=True, paused=True) as machine:
        path.write_bytes(b"".join(write_stream(bitmaps, machine_type(machine))))
        expected = came(read_stream(pieces(path)))
        machine.receive(f"exec:cat {shlex.quote(str(path))}")
        machine.wait_for_migration("completed")
        assert truth(machine) == expected
        machine.execute("cont")
        machine.quit()
    with qcow2bm.open(disk.path, strict=True) as image:
        stored = {
            name: (b.granularity, b.auto, b.sha256(), b.status) for name, b in image.bitmaps.items()
        }
    assert stored == {
        name: (found.granularity, found.enabled, found.sha256, "valid")
        for name, found in expected.items()
        if found.persistent
    }
    assert disk.check().returncode == 0


def test_qemu_sends_on_what_it_took_in(disk: Disk, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with Machine(disk.path, incoming=True) as machine:
        first.write_bytes(b"".join(write_stream(outgoing(), machine_type(machine))))
        machine.receive(f"exec:cat {shlex.quote(str(first))}")
        machine.wait_for_migration("completed")
        machine.wait_for("running")
        machine.enable("dirty-bitmaps")
        send(machine, second)
    assert came(read_stream(pieces(second))) == came(read_stream(pieces(first)))


def test_the_commands_carry_bitmaps_to_another_image(disk: Disk, tmp_path: Path) -> None:
    """The commands of the help must carry bitmaps to a machine that has another image."""
    with Machine(disk.path) as machine:
        for made in MADE:
            add(machine, made)
        machine.quit()
    other = Disk.create(tmp_path / "other.qcow2", SIZE)
    with Machine(other.path, incoming=True, paused=True) as machine:
        name = machine_type(machine)
        command = ["stream", "write", "disk.qcow2", "--node-alias=disk", f"--machine={name}"]
        assert run([*command, "-o", "stream"], tmp_path) == (0, "", "")
        machine.receive(f"exec:cat {shlex.quote(str(tmp_path / 'stream'))}")
        machine.wait_for_migration("completed")
        machine.execute("cont")
        machine.quit()
    with qcow2bm.open(disk.path) as before, qcow2bm.open(other.path, strict=True) as after:
        expected = {name: (b.auto, b.sha256()) for name, b in before.bitmaps.items()}
        assert {name: (b.auto, b.sha256()) for name, b in after.bitmaps.items()} == expected
    assert len(expected) == sum(made.persistent for made in MADE)
