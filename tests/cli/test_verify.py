"""The command ``verify``, without QEMU: the disks that are compared are raw files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.console import run
from support.contents import GRANULE, write_raw
from support.images import Stored, build_image
from support.jsonspec import check_verify, failure_in

from qcow2bm.compare import RawContent
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

SIZE = 160 * GRANULE
DAILY = Stored(b"daily", [b"\x80\1"])  # granules 7 and 8
SHORT = Stored(b"short", [b"\x80"])  # granule 7
CRASHED = Stored(b"crashed", [b"\x80\1"], flags=FLAG_AUTO | FLAG_IN_USE)
DISABLED = Stored(b"disabled", [b"\x80\1"], flags=0)
WORDS = ["backup", "--new", "disk", "--assert-current"]
COMPARED = "9.9 MiB (10354688 bytes) compared, 128 KiB (131072 bytes) dirty\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image, a backup, and what the disk holds now."""
    write_raw(tmp_path / "backup", 3, 7, size=SIZE)
    write_raw(tmp_path / "disk", 3, 8, size=SIZE)
    data = build_image(DAILY, SHORT, CRASHED, DISABLED, size=SIZE).data
    (tmp_path / "vm.qcow2").write_bytes(data)
    return tmp_path


@pytest.mark.spec("VERIFY-1", "VERIFY-4", "CLI-53")
@pytest.mark.parametrize("name", ["daily", "@0", "disabled"])
def test_a_bitmap_that_misses_nothing_is_proved(name: str, folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    done = run(["verify", "vm.qcow2", name, *WORDS], folder)
    answer = f'vm.qcow2: yes: bitmap "{name}" and the backup together make up the disk; '
    assert done == (0, f"{answer}{COMPARED}", "")
    assert (folder / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("VERIFY-1", "VERIFY-2", "CLI-53")
def test_what_is_missing_is_named_and_can_be_set(folder: Path) -> None:
    done = run(["verify", "vm.qcow2", "short", *WORDS], folder)
    assert (done.status, done.err) == (2, "")
    assert done.out.splitlines() == [
        "        524288           65536  missing",
        'vm.qcow2: no: writes are missing from bitmap "short": 64 KiB (65536 bytes) in 1 range '
        "differ from the backup, and are clean; 9.9 MiB (10420224 bytes) compared, 64 KiB "
        "(65536 bytes) dirty",
    ]
    assert run(["set", "vm.qcow2", "short", "524288:65536"], folder).status == 0
    assert run(["verify", "vm.qcow2", "short", *WORDS], folder).status == 0


@pytest.mark.spec("VERIFY-2")
def test_json_has_all_that_text_only_counts(folder: Path) -> None:
    write_raw(folder / "disk", *range(9, 160, 2), size=SIZE)
    done = run(["verify", "vm.qcow2", "daily", *WORDS], folder)
    lines = done.out.splitlines()
    assert (done.status, len(lines), lines[20]) == (2, 22, "and 57 more ranges")
    done = run(["verify", "vm.qcow2", "daily", *WORDS, "--json"], folder)
    document = json.loads(done.out)
    check_verify(document)
    missing = [3, *range(9, 160, 2)]
    assert document["missing"] == [{"start": n * GRANULE, "length": GRANULE} for n in missing]
    assert document["proved"] is False
    assert document["missing-bytes"] == len(missing) * GRANULE
    assert document["dirty-bytes"] == 2 * GRANULE
    assert document["compared-bytes"] == SIZE - 2 * GRANULE
    assert (document["bitmap"], document["backup"]) == ("daily", "backup")


def test_json_of_what_is_proved(folder: Path) -> None:
    done = run(["verify", "vm.qcow2", "daily", *WORDS, "--json"], folder)
    document = json.loads(done.out)
    check_verify(document)
    assert (done.status, document["proved"], document["missing"]) == (0, True, [])


@pytest.mark.spec("VERIFY-6")
@pytest.mark.parametrize("autoclear", [True, False])
def test_a_bitmap_that_is_not_valid_is_only_compared_as_stored_with_stale(
    autoclear: bool, folder: Path
) -> None:
    data = build_image(CRASHED, size=SIZE, autoclear=autoclear).data
    (folder / "vm.qcow2").write_bytes(data)
    done = run(["verify", "vm.qcow2", "crashed", *WORDS, "--json"], folder)
    document = failure_in(done.out, done.err)
    kind = "inconsistent" if autoclear else "stale"
    assert (done.status, document["error"]["id"]) == (1, f"bitmap-{kind}")
    assert document["next"]
    done = run(["verify", "vm.qcow2", "crashed", *WORDS, "--stale"], folder)
    answer = 'yes: the stored bits of bitmap "crashed" and the backup together make up the disk'
    assert done == (0, f"vm.qcow2: {answer}; {COMPARED}", "")
    write_raw(folder / "disk", 100, size=SIZE)
    assert run(["verify", "vm.qcow2", "crashed", *WORDS, "--stale"], folder).status == 2
    assert run(["salvage", "vm.qcow2", "crashed", "--trust-stale"], folder).status == 0
    assert run(["verify", "vm.qcow2", "crashed", *WORDS, "--stale"], folder).status == 2


@pytest.mark.spec("VERIFY-3")
def test_what_a_shorter_backup_lacks_is_missing(folder: Path) -> None:
    write_raw(folder / "backup", 3, size=150 * GRANULE)
    done = run(["verify", "vm.qcow2", "daily", *WORDS], folder)
    assert done.status == 2
    assert done.out.startswith(f"{150 * GRANULE:>14}  {10 * GRANULE:>14}  missing\n")
    assert done.err == (
        "qcow2bm: warning: backup has 9830400 bytes, the disk 10485760: was it resized since?\n"
    )


@pytest.mark.spec("VERIFY-1", "VERIFY-3")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["short", "backup", "--new", "disk"], "disk: is neither the image nor its data file"),
        (["short", "none"], "none: No such file or directory"),
        (["short", "vm.qcow2", *WORDS[1:]], "vm.qcow2: is not the last backup, but the disk"),
        (["short", "disk", *WORDS[1:]], "disk: is not the last backup, but the disk"),
        (["short", "vhdx", *WORDS[1:]], "vhdx: begins like a file of VHDX: make it raw or qcow2"),
        (["short", "fake", *WORDS[1:]], "fake: begins like a file of qcow2: say --backup-format"),
        (["short", "backup", "--new=small", "--assert-current"], "small: has 512 bytes, but"),
        (["nobody", *WORDS], 'vm.qcow2: bitmap "nobody" not found'),
    ],
)
def test_what_cannot_be_found_out_is_a_failure(
    words: list[str], message: str, folder: Path
) -> None:
    (folder / "vhdx").write_bytes(b"vhdxfile".ljust(SIZE, b"\0"))
    (folder / "fake").write_bytes(b"QFI\xfb".ljust(SIZE, b"\0"))
    (folder / "small").write_bytes(bytes(512))
    done = run(["verify", "vm.qcow2", *words], folder)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"qcow2bm: {message}")
    assert len(done.err.splitlines()) == 1


@pytest.mark.spec("VERIFY-2")
@pytest.mark.parametrize("output", ["json", "human"])
def test_a_disk_that_is_written_to_meanwhile_proves_nothing(
    output: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RawContent.read_into

    def read_and_write(self: RawContent, start: int, buffer: memoryview) -> None:
        read(self, start, buffer)
        os.utime(folder / "disk", ns=(1, 1))

    monkeypatch.setattr(RawContent, "read_into", read_and_write)
    done = run(["verify", "vm.qcow2", "daily", *WORDS, "--output", output], folder)
    assert done.status == 1
    assert "disk: " in done.err
    assert ("error" in done.out) == (output == "json")
