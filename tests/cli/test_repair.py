"""The commands ``repair`` and ``undo``."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from support.console import Result, run
from support.images import Stored, build_image
from support.jsonspec import check_dry_run, check_repair, failure_in
from support.problem_images import HUGE, IDS, broken
from support.spec_image import image
from support.traced_memory import traced_memory

from qcow2bm.format.undo_file import DIGEST_BYTES, MAGIC, MAX_STEPS, VERSION

REPAIR = ["repair", "vm.qcow2"]
UNDO = ["undo", "vm.qcow2", "way back"]
LOST = "directory-entry.type.unknown"
REPAIRED = "bitmaps-extension.nb_bitmaps.less"


def written(folder: Path, id: str) -> bytes:
    data = broken(id)
    (folder / "vm.qcow2").write_bytes(data)
    return data


def content(folder: Path) -> bytes:
    return (folder / "vm.qcow2").read_bytes()


@pytest.mark.spec("REPAIR-8")
def test_what_is_said_of_a_repair_and_of_its_undoing(tmp_path: Path) -> None:
    before = written(tmp_path, LOST)
    lost = (
        'lost: "daily" (bitmap directory entry 0: type at 0xc10 is 2, must be 1 (dirty tracking))'
    )
    dry = run([*REPAIR, "--dry-run"], tmp_path)
    assert (dry.status, dry.err) == (2, "")
    assert dry.out.startswith(
        f"{lost}\nto free: 1 KiB (1024 bytes) in leaked clusters\n"
        "1560 bytes in 4 writes, 3 barriers; nothing was written\n"
    )
    assert content(tmp_path) == before
    done = run([*REPAIR, "--undo", "way back"], tmp_path)
    salvage = (
        'writes may be missing from "crashed"\n'
        "  next: qcow2bm salvage vm.qcow2 --all --all-dirty\n"
        "        cost: the next incremental backup saves the whole disk\n"
    )
    assert done == Result(
        0,
        f"{lost}\nfreed: 1 KiB (1024 bytes) in leaked clusters\nrepaired\n"
        "to take it back: qcow2bm undo vm.qcow2 'way back'\n"
        "QEMU does not refuse the metadata any more, so the VM can be started\n"
        'a full backup is due instead of the next incremental one by "daily"\n'
        f"{salvage}",
        "",
    )
    repaired = content(tmp_path)
    assert run(["check", "vm.qcow2"], tmp_path) == (0, f"no errors\n{salvage}", "")
    assert run([*REPAIR, "--no-undo"], tmp_path) == (0, f"nothing to repair\n{salvage}", "")
    shown = run([*UNDO, "--dry-run"], tmp_path)
    assert (shown.status, content(tmp_path)) == (0, repaired)
    assert run(UNDO, tmp_path) == (0, "all is as before the repair\n", "")
    assert content(tmp_path) == before
    assert run(UNDO, tmp_path) == (0, "nothing to take back\n", "")


@pytest.mark.spec("REPAIR-8")
@pytest.mark.parametrize("id", [id for id in IDS if id != HUGE])
def test_the_document(id: str, tmp_path: Path) -> None:
    before = written(tmp_path, id)
    done = run([*REPAIR, "--dry-run", "--output=json"], tmp_path)
    if id == "header.incompatible_features.unknown":
        assert done.status == 1
        assert failure_in(done.out, done.err)["error"]["id"] == "unsupported"
        return
    document = json.loads(done.out)
    check_repair(document)
    is_something = bool(document["left"] or document["plan"]["steps"])
    assert (done.status, done.err) == (2 if is_something else 0, "")
    really = run([*REPAIR, "--no-undo", "--output=json"], tmp_path)
    done_document = json.loads(really.out)
    assert {**done_document, "next": []} == {**document, "dry-run": False}
    assert really.status == (2 if document["left"] else 0)
    assert (content(tmp_path) == before) == (not document["plan"]["steps"])


@pytest.mark.spec("REPAIR-3")
def test_lossless(tmp_path: Path) -> None:
    before = written(tmp_path, LOST)
    done = run([*REPAIR, "--no-undo", "--lossless"], tmp_path)
    assert (done.status, done.err) == (2, "")
    assert "(directory-entry.type.unknown)\n    The bitmap " in done.out
    assert "\nnothing was changed\n" in done.out
    assert content(tmp_path) == before
    written(tmp_path, REPAIRED)
    dry = run([*REPAIR, "--dry-run", "--lossless"], tmp_path)
    done = run([*REPAIR, "--no-undo", "--lossless"], tmp_path)
    problem = "bitmaps extension: nb_bitmaps at 0x78 is 2, but the directory holds 3"
    said = f"repaired: {problem} (bitmaps-extension.nb_bitmaps.less)\n"
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(said)
    assert "(directory-entry.surplus)\nrepaired\n" in done.out
    assert dry.out.startswith(said.replace("repaired", "to repair", 1))
    assert content(tmp_path) == image()


def test_the_way_back_is_not_overwritten_and_nothing_else_either(tmp_path: Path) -> None:
    before = written(tmp_path, LOST)
    (tmp_path / "there").write_bytes(b"precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in ("there", "vm.qcow2", ".", "no/folder", "dangling", "/dev/null", "/dev/full"):
        done = run([*REPAIR, "--undo", path], tmp_path)
        assert (done.status, done.out) == (1, "")
        (line,) = done.err.splitlines()
        assert line.startswith(f"qcow2bm: {path}: ")
    assert content(tmp_path) == before
    assert (tmp_path / "there").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "there", "vm.qcow2"]


def test_the_longest_name_of_an_undo_file(tmp_path: Path) -> None:
    before = written(tmp_path, LOST)
    for name in (255 * "n", 63 * "\U0001f4be", 85 * "\N{CLOUD}"):
        assert run([*REPAIR, "--undo", name], tmp_path).status == 0
        assert run(["undo", "vm.qcow2", name], tmp_path).status == 0
        assert content(tmp_path) == before


@pytest.mark.spec("REPAIR-6")
@pytest.mark.parametrize("how", ["written to", "damaged file", "another image", "no undo file"])
def test_what_cannot_be_undone(how: str, tmp_path: Path) -> None:
    written(tmp_path, LOST)
    assert run([*REPAIR, "--undo", "way back"], tmp_path).status == 0
    path = tmp_path / "way back"
    if how == "written to":
        os.utime(tmp_path / "vm.qcow2", ns=(1, 1))
    elif how == "damaged file":
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    elif how == "another image":
        (tmp_path / "vm.qcow2").write_bytes(build_image(Stored(b"b"), size=1 << 30).data)
    else:
        path.write_bytes(image())
    before = content(tmp_path)
    done = run(UNDO, tmp_path)
    assert (done.status, done.out, content(tmp_path)) == (1, "", before)
    (line,) = done.err.splitlines()
    subject = "vm.qcow2" if how in ("written to", "another image") else "way back"
    assert line.startswith(f"qcow2bm: {subject}: ")


@pytest.mark.parametrize(
    "arguments",
    [
        REPAIR,
        [*REPAIR, "--undo", "x", "--no-undo"],
        [*REPAIR, "--undo", "x", "--dry-run"],
        ["repair", "--no-undo"],
        ["undo", "vm.qcow2"],
    ],
)
def test_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    written(tmp_path, LOST)
    done = run(arguments, tmp_path)
    assert (done.status, done.out) == (64, "")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("command", [[*REPAIR, "--no-undo"], [*REPAIR, "--dry-run"]])
def test_what_is_no_image(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(b"no image")
    done = run(command, tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("qcow2bm: vm.qcow2: ")


def test_the_dry_run_of_undo_for_programs(tmp_path: Path) -> None:
    written(tmp_path, LOST)
    assert run([*REPAIR, "--undo", "way back"], tmp_path).status == 0
    done = run([*UNDO, "--dry-run", "--output=json"], tmp_path)
    check_dry_run(json.loads(done.out))


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/urandom", "."])
def test_an_endless_undo_file_is_not_read_to_its_end(path: str, tmp_path: Path) -> None:
    written(tmp_path, LOST)
    done = run(["undo", "vm.qcow2", path], tmp_path)
    assert (done.status, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"qcow2bm: {path}: ")


def forged_undo(steps: int, each: bytes) -> bytes:
    """An undo file without a sound digest, all of whose steps are alike."""
    head = MAGIC + struct.pack(">IIQ", VERSION, steps, 1 << 20) + bytes(DIGEST_BYTES)
    return head + steps * each + bytes(DIGEST_BYTES)


BARRIER_STEP, WRITE_STEP = struct.pack(">BIQ", 0, 0, 0), struct.pack(">BIQ2s", 1, 1, 65536, b"ab")


@pytest.mark.spec("REPAIR-6")
@pytest.mark.parametrize(
    ("steps", "each", "message"),
    [
        (1 << 13, WRITE_STEP, "does not match"),
        (1 << 13, BARRIER_STEP, "does not match"),
        pytest.param(MAX_STEPS, BARRIER_STEP, "does not match", marks=pytest.mark.deep),
        (MAX_STEPS + 1, BARRIER_STEP, "more than the limit of 262144"),
        (1, struct.pack(">BIQ", 1, (1 << 32) - 1, 0), "more than the limit of 1073741824"),
        (1, struct.pack(">BIQ", 1, 1 << 28, 0), "is cut off"),
    ],
)
def test_a_forged_undo_file_takes_little_memory(
    steps: int, each: bytes, message: str, tmp_path: Path
) -> None:
    written(tmp_path, LOST)
    (tmp_path / "small").write_bytes(forged_undo(1, each))
    run(["undo", "vm.qcow2", "small"], tmp_path)  # what is loaded once is not counted
    (tmp_path / "forged").write_bytes(forged_undo(steps, each))
    with traced_memory() as memory:
        done = run(["undo", "vm.qcow2", "forged"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert message in done.err
    assert memory.peak < (64 << 20 if steps >= MAX_STEPS else 4 << 20)
