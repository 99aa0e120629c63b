"""``map`` of several bitmaps, and what ``set`` and ``reset`` read from standard input."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import golden_images
from support.console import Result, environment, run
from support.hostile_bytes import hostile
from support.images import Stored, build_image
from support.model import OPERATORS, Model
from support.traced_memory import traced_memory

import qcow2bm
from qcow2bm.cli import range_input

SIZE = (100 << 12) - 1536  # ends within a granule
GRANULARITY_BITS = {"fine": 9, "middle": 12, "coarse": 16}
TABLES = {
    "fine": bytes(range(1, 101)),
    "middle": bytes([0b01010101, 0b00000001, 0b10000000, 0b11111110] * 3) + b"\x0f",
    "coarse": b"\x49",
}
FORMS = ((), ("--dirty",), ("--json",), ("--json", "--dirty"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stored = [
        Stored(name.encode(), (table,), granularity_bits=GRANULARITY_BITS[name])
        for name, table in TABLES.items()
    ]
    clean = [
        Stored(f"clean {name}".encode(), granularity_bits=bits)
        for name, bits in GRANULARITY_BITS.items()
    ]
    data = build_image(*stored, *clean, size=SIZE).data
    (tmp_path / "vm.qcow2").write_bytes(data)
    return tmp_path


def succeeded(arguments: Sequence[str], folder: Path, standard_input: bytes | str = b"") -> str:
    data = standard_input.encode() if isinstance(standard_input, str) else standard_input
    result = run(arguments, folder, data)
    assert (result.status, result.err) == (0, "")
    return result.out


def model(name: str) -> set[int]:
    """The numbers of the dirty bytes, in units of 512."""
    found = Model.of_packed(TABLES[name], 1 << GRANULARITY_BITS[name], SIZE)
    return {
        number
        for start, length in found.extents
        for number in range(start // 512, (start + length) // 512)
    }


@pytest.mark.spec("ALG-6")
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("names", [("fine", "coarse"), ("coarse", "middle", "fine"), ("fine",)])
def test_the_map_of_several_bitmaps_is_that_of_their_combination(
    folder: Path, op: str, names: tuple[str, ...]
) -> None:
    expected, *others = map(model, names)
    for other in others:
        expected = OPERATORS[op](expected, other)
    before = (folder / "vm.qcow2").read_bytes()
    arguments = ["map", "vm.qcow2", *names, "--op", op]
    full = json.loads(succeeded([*arguments, "--json"], folder))
    assert expected == {
        number
        for row in full
        if row["type"]
        for number in range(row["offset"] // 512, (row["offset"] + row["length"]) // 512)
    }
    assert sum(row["length"] for row in full) == SIZE
    assert json.loads(succeeded([*arguments, "--json", "--dirty"], folder)) == [
        row for row in full if row["type"]
    ]
    lines = succeeded(arguments, folder).splitlines()
    assert [line.split() for line in lines] == [[str(v) for v in row.values()] for row in full]
    totals = json.loads(succeeded([*arguments, "--json", "--totals"], folder))
    assert totals[1]["size"] == 512 * len(expected) == SIZE - totals[0]["size"]
    assert (folder / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("ALG-7")
@pytest.mark.parametrize(
    "form", [*FORMS, ("--data",), ("--data", "--json", "--dirty")], ids=" ".join
)
@pytest.mark.parametrize("name", TABLES)
def test_what_map_prints_can_be_set_and_reset(
    folder: Path, form: tuple[str, ...], name: str
) -> None:
    mapped = succeeded(["map", "vm.qcow2", name, *form], folder)
    assert succeeded(["set", "vm.qcow2", f"clean {name}", "-"], folder, mapped) == ""
    with qcow2bm.open(folder / "vm.qcow2") as image:
        assert image.bitmaps[f"clean {name}"].sha256() == image.bitmaps[name].sha256()
    succeeded(["reset", "vm.qcow2", name, "-"], folder, mapped)
    with qcow2bm.open(folder / "vm.qcow2") as image:
        assert image.bitmaps[name].count() == 0
    succeeded(["check", "vm.qcow2"], folder)


@pytest.mark.spec("ALG-7")
def test_ranges_need_no_order_and_are_widened_as_any_range(folder: Path) -> None:
    lines = "8192 1 1 dirty\n0 3000 0 clean\n4095 2 1 dirty\r\n4096 1 1\tdirty"
    succeeded(["set", "vm.qcow2", "clean middle", "-", "20k:1"], folder, lines)
    with qcow2bm.open(folder / "vm.qcow2") as image:
        (extents,) = image.bitmaps["clean middle"].extents()
    assert extents.tolist() == [[0, 3 << 12], [5 << 12, 1 << 12]]


@pytest.mark.spec("ALG-7")
def test_an_empty_input_has_no_ranges(folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    for nothing in ("", "[\n]\n"):
        succeeded(["set", "vm.qcow2", "fine", "-"], folder, nothing)
    assert (folder / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("ALG-8")
def test_the_other_command_can_read_the_same_image(folder: Path) -> None:
    command = f"{sys.executable} -m qcow2bm"
    names = "fine middle coarse"
    subprocess.run(
        f"{command} map vm.qcow2 {names} | {command} set vm.qcow2 'clean fine' -",
        shell=True,
        cwd=folder,
        env=environment(),
        check=True,
    )
    with qcow2bm.open(folder / "vm.qcow2") as image:
        union = qcow2bm.union(*(image.bitmaps[name] for name in TABLES))
        assert (union ^ image.bitmaps["clean fine"]).count() == 0
        assert union.count() > 0


def memory_of_a_long_input(folder: Path, lines: int) -> int:
    """The memory that an edit takes that reads so many lines."""
    text = b"".join(b"%d 512 1 dirty\n" % (1024 * (n % 300)) for n in range(lines))
    with traced_memory() as memory:
        run(["set", "vm.qcow2", "fine", "-"], folder, text)
    return memory.peak


@pytest.mark.spec("ALG-8")
def test_memory_does_not_grow_with_the_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_input, "_LONGEST_IN_MEMORY", 1 << 16)
    monkeypatch.setattr(range_input, "_ROWS_AT_ONCE", 1 << 9)
    assert memory_of_a_long_input(folder, 14_000) < 1.2 * memory_of_a_long_input(folder, 7_000)


@pytest.mark.parametrize("call", ["write", "seek", "read"])
def test_a_temporary_file_that_fails_is_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, call, fail)
    assert refused(folder, LINE).err == "qcow2bm: temporary file: No space left on device\n"


ROW = '{ "offset": 0, "length": 512, "type": 1, "description": "dirty"}'
LINE = "0 512 1 dirty\n"


def refused(folder: Path, text: bytes | str) -> Result:
    """The result of a command that failed with one line, and changed nothing."""
    before = (folder / "vm.qcow2").read_bytes()
    data = text.encode() if isinstance(text, str) else text
    result = run(["set", "vm.qcow2", "clean fine", "4k:4k", "-"], folder, data)
    assert (result.status, result.out, len(result.err.splitlines())) == (1, "", 1)
    assert (folder / "vm.qcow2").read_bytes() == before
    return result


@pytest.mark.spec("ALG-9")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (LINE + "0 512 1 clean\n", 2),
        (LINE + "0 512 0 dirty\n", 2),
        (LINE + "0 512 1 dirty more\n", 2),
        (LINE + "0 -512 1 dirty\n", 2),
        (LINE + "0 9999999999999999999 1 dirty\n", 2),
        (LINE + "0 512 1 di", 2),
        (LINE * 20_000 + "\n" + LINE, 20_001),
        (LINE + "x" * 5000 + "\n", 2),
        (LINE + "1" * 500_000, 2),
        (LINE + "\0\x1b[31m\n", 2),
        (f"[\n{ROW},\n{LINE}]\n", 3),
        (f"[\n{ROW},\n{ROW} {ROW}\n]\n", 3),
        (f"[{ROW}]\n", 1),
        (f"[\n{ROW}]\n", 2),
        (f"[\n{ROW}\n]\n]\n", 4),
        (f"[\n{ROW}\n]\n{LINE}", 4),
        (f"[\n]\n{LINE * 20_000}", 3),
        (LINE + f"[\n{ROW}\n]\n", 2),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(folder: Path, text: str, line: int) -> None:
    assert refused(folder, text).err.startswith(f"qcow2bm: standard input: line {line}: ")


@pytest.mark.spec("ALG-9")
@pytest.mark.parametrize("range_", [(0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (1, 8 * 10**18)])
def test_a_range_beyond_the_disk_is_named(folder: Path, range_: tuple[int, int]) -> None:
    start, length = range_
    good, bad = LINE * 9000, f"{start} {length} 1 dirty\n"
    said = f"line 9002 of standard input: range {start}:{length} does not lie on the disk"
    for text in (good + "0 9 0 clean\n" + bad, good + "0 9 0 clean\n" + bad + LINE):
        assert said in refused(folder, text).err
    clean = f"{start} {length} 0 clean\n"
    succeeded(["set", "vm.qcow2", "fine", "-"], folder, clean)


@pytest.mark.spec("ALG-10")
def test_json_that_is_cut_off_is_refused(folder: Path) -> None:
    whole = succeeded(["map", "vm.qcow2", "fine", "--json"], folder)
    for end in (1, 2, 50, len(whole) // 2, len(whole) - 3, len(whole) - 2):
        refused(folder, whole[:end])
    lines = whole.splitlines()
    for count in (1, 2, len(lines) - 1):
        said = refused(folder, "\n".join(lines[:count])).err
        assert f"line {count + 1}: the list does not end" in said


_SOUND = st.lists(st.sampled_from([LINE, "512 1024 0 clean\n", "[\n", f"{ROW},\n", "]\n"])).map(
    lambda lines: "".join(lines).encode()
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=hostile(_SOUND))
def test_any_bytes_are_ranges_or_a_failure_of_one_line(folder: Path, data: bytes) -> None:
    path = folder / "golden.qcow2"
    before = golden_images.sound().data
    path.write_bytes(before)
    result = run(["set", "golden.qcow2", "daily", "-"], folder, data)
    if result.status:
        assert (result.status, len(result.err.splitlines())) == (1, 1)
        assert path.read_bytes() == before
    else:
        assert (result.out, result.err) == ("", "")
