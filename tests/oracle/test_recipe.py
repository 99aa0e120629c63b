"""The commands that `dump` advises for an image QEMU refuses: exactly as printed, they help."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from support.console import run
from support.following import advised
from support.kinds import FITTABLE
from support.problem_images import IDS, broken
from support.qemu import Disk
from support.spec_image import in_entry, patched

from qcow2bm.problem_kinds import EXTENSION_LENGTH, KINDS
from qcow2bm.problems import BITMAPS_EXTENSION, DIRECTORY, ENTRY, REFUSED, TABLE

REFUSED_IDS = [id for id in IDS if KINDS[id].severity == REFUSED]
OF_BITMAPS = [
    id
    for id in REFUSED_IDS
    if KINDS[id].structure in (BITMAPS_EXTENSION, DIRECTORY, ENTRY, TABLE)
    or KINDS[id] == EXTENSION_LENGTH
]
WITHOUT_LOSS = [id for id in OF_BITMAPS if id in FITTABLE]
OTHERWISE_BROKEN = ("bitmap-table.entry.unaligned",)
"""Its clusters are of another size than those its refcounts count."""


def recipe(data: bytes, folder: Path) -> list[list[str]]:
    """The commands that the dump of an image advises; the image is then in the folder."""
    (folder / "vm.qcow2").write_bytes(data)
    result = run(["dump", "vm.qcow2"], folder)
    assert (result.status, result.err) == (2, "")
    assert "QEMU will not open this image\n" in result.out
    return [shlex.split(command) for command, _ in advised(result.out)]


@pytest.mark.spec("CLI-16")
@pytest.mark.parametrize("id", WITHOUT_LOSS)
def test_bitmaps_that_do_not_fit_are_made_to(id: str, tmp_path: Path) -> None:
    data = broken(id)
    ((program, *arguments),) = recipe(data, tmp_path)
    assert program == "qcow2bm"
    assert run(arguments, tmp_path) == (0, "", "")
    disk = Disk(tmp_path / "vm.qcow2")
    assert len(disk.listed()) > 1
    assert disk.check().returncode == 0


@pytest.mark.spec("CLI-16")
@pytest.mark.parametrize("id", [id for id in OF_BITMAPS if id not in WITHOUT_LOSS])
def test_what_is_repaired_opens_and_is_sound(id: str, tmp_path: Path) -> None:
    ((program, *arguments),) = recipe(broken(id), tmp_path)
    assert program == "qcow2bm"
    done = run(arguments, tmp_path)
    assert (done.status, done.err) == (2 if id in OTHERWISE_BROKEN else 0, "")
    disk = Disk(tmp_path / "vm.qcow2")
    disk.info()
    if id in OTHERWISE_BROKEN:
        return
    assert disk.check().returncode == 0
    disk.io("write -P 1 0 64k")
    assert disk.check().returncode == 0


@pytest.mark.parametrize("id", [id for id in REFUSED_IDS if id not in OF_BITMAPS])
def test_what_lies_elsewhere_has_no_such_recipe(id: str, tmp_path: Path) -> None:
    assert recipe(broken(id), tmp_path) == []


def test_faults_of_both_kinds_have_no_recipe_either(tmp_path: Path) -> None:
    both = patched(broken("header.crypt_method.unknown"), *in_entry(0, type=9))
    assert recipe(both, tmp_path) == []


@pytest.mark.spec("CLI-16")
def test_other_autoclear_bits_survive(tmp_path: Path) -> None:
    """The raw data file's bit says that the file can be read without the image."""
    disk = Disk.create(
        tmp_path / "vm.qcow2", 1 << 20, data_file=tmp_path / "raw", data_file_raw="on"
    )
    disk.add("daily", 65536)
    data = bytearray(disk.path.read_bytes())
    assert data[95] == 0b11
    entry = int.from_bytes(data[data.index(b"\x23\x85\x28\x75") + 24 :][:8], "big")
    data[entry + 16] = 9  # its type
    ((_, *arguments),) = recipe(bytes(data), tmp_path)
    assert run(arguments, tmp_path).status == 0
    assert disk.path.read_bytes()[95] == 0b10
    assert disk.info()["format-specific"]["data"]["data-file-raw"] is True
    assert disk.check().returncode == 0
