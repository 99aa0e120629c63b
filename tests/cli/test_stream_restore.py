"""The command ``stream restore``: bitmaps need a proof, or the caller's assertion."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
from support.console import Result, run
from support.images import Stored, build_image

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.migration.stream_bitmaps import read_stream
from qcow2bm.migration.stream_writer import OutgoingBitmap, write_stream

DATA = Path(__file__).parents[1] / "data"
SIZE = 64 << 20
FOREIGN = "g64k-tmp"
NODE = ["--node", "drive0"]
RESTORE = ["stream", "restore", "stream", "vm.qcow2"]
NAMES = {"allzero", "g4k-pers-dis", FOREIGN, "g512-pers"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stream with bitmaps of two nodes, and an image of the disk of one."""
    (tmp_path / "stream").write_bytes(lzma.decompress((DATA / "stream.bin.xz").read_bytes()))
    (tmp_path / "vm.qcow2").write_bytes(build_image(size=SIZE).data)
    return tmp_path


def content(folder: Path) -> bytes:
    return (folder / "vm.qcow2").read_bytes()


def refused(folder: Path, *arguments: str, status: int = 1) -> str:
    """The one line on standard error of a command that fails and changes nothing."""
    before = content(folder)
    done: Result = run([*RESTORE, *arguments], folder)
    assert (done.status, done.out, content(folder)) == (status, "", before)
    (line,) = done.err.splitlines()
    return line


def restored(folder: Path, *arguments: str) -> dict[str, str]:
    """The digests of the valid bitmaps in the image afterwards."""
    done = run([*RESTORE, *NODE, *arguments], folder)
    assert (done.status, done.out, done.err) == (0, "", "")
    with qcow2bm.open(folder / "vm.qcow2", strict=True) as image:
        return {name: b.sha256() for name, b in image.bitmaps.items() if b.status == "valid"}


def truth(folder: Path) -> dict[str, str]:
    found = read_stream([(folder / "stream").read_bytes()]).complete
    ours = (b for b in found if b.node_alias == "drive0" and not is_sentinel(b.bitmap_alias))
    return {b.bitmap_alias: b.sha256() for b in ours}


@pytest.mark.spec("CLI-26")
def test_without_evidence_nothing_is_restored(folder: Path) -> None:
    line = refused(folder, *NODE)
    assert "no sentinel was saved with the bitmaps" in line
    assert "--assert-unchanged" in line
    assert "--as-dirty-ranges-unknown" in line


@pytest.mark.spec("CLI-26")
def test_by_the_word_of_the_caller(folder: Path) -> None:
    assert restored(folder, "--assert-unchanged") == truth(folder)
    assert truth(folder).keys() == NAMES


@pytest.mark.spec("CLI-26")
def test_all_dirty_instead(folder: Path) -> None:
    restored(folder, "--as-dirty-ranges-unknown")
    with qcow2bm.open(folder / "vm.qcow2") as image:
        assert {bitmap.count() for bitmap in image.bitmaps.values()} == {SIZE}
        assert {name for name, b in image.bitmaps.items() if b.auto} == {FOREIGN, "g512-pers"}


def give_away(folder: Path) -> str:
    """Leaves a sentinel in the image, and a bitmap that a migration carried; the sentinel's name.

    The stream gets the sentinel, too, and its canary.
    """
    path = folder / "vm.qcow2"
    path.write_bytes(build_image(Stored(FOREIGN.encode()), size=SIZE).data)
    with qcow2bm.open(path, "r+") as image, image.track() as tracker:
        tracker.begin_migration(carried=[FOREIGN])
        tracker.inactivate()
    with qcow2bm.open(path) as image:
        (name,) = (n for n, b in image.bitmaps.items() if b.auto and b.status == "valid")
        sent = [image.bitmaps[name], image.bitmaps[f"{name}-canary"]]
        outgoing = [
            OutgoingBitmap("drive0", b.name, b.granularity, b.auto, True, b.packed().data, SIZE)
            for b in sent
        ]
    found = read_stream([(folder / "stream").read_bytes()]).complete
    outgoing += [
        OutgoingBitmap(
            "drive0", b.bitmap_alias, b.granularity, b.enabled, True, b.packed().data, SIZE
        )
        for b in found
        if b.node_alias == "drive0"
    ]
    (folder / "stream").write_bytes(b"".join(write_stream(outgoing, None)))
    return name


@pytest.mark.spec("CLI-26")
def test_a_sentinel_that_was_not_touched_is_evidence_and_goes(folder: Path) -> None:
    give_away(folder)
    assert restored(folder) == truth(folder)


@pytest.mark.spec("SIDECAR-4")
def test_a_sentinel_that_did_not_come_with_the_bitmaps_is_no_evidence(folder: Path) -> None:
    stream = (folder / "stream").read_bytes()
    give_away(folder)
    (folder / "stream").write_bytes(stream)  # which may be of long before
    assert "no sentinel was saved" in refused(folder, *NODE)


@pytest.mark.spec("SIDECAR-6")
def test_what_a_sentinel_has_is_added_whatever_is_asserted(folder: Path) -> None:
    name, path = give_away(folder), folder / "vm.qcow2"
    with qcow2bm.open(path, "r+") as image, image.edit() as edit:
        edit.set(name, SIZE - 1, 1)
    restored(folder, "--assert-unchanged")
    with qcow2bm.open(path) as image:
        ends = {n: int(list(b.extents())[-1][-1].sum()) for n, b in image.bitmaps.items() if b.auto}
        assert set(ends.values()) == {SIZE}
        assert not any(map(is_sentinel, image.bitmaps))


@pytest.mark.spec("SIDECAR-4")
@pytest.mark.parametrize("what", ["written", "cleared", "in use", "canary removed", "stale"])
def test_a_sentinel_that_is_no_evidence(folder: Path, what: str) -> None:
    name, path = give_away(folder), folder / "vm.qcow2"
    with qcow2bm.open(path, "r+") as image:
        entry = image.bitmaps[name].entry
        with image.edit() as edit:
            if what == "written":
                edit.set(name, SIZE - 1, 1)
            elif what == "cleared":
                edit.clear(f"{name}-canary")
            elif what == "canary removed":
                edit.remove(f"{name}-canary")
    data = bytearray(path.read_bytes())
    with qcow2bm.open(path) as image:
        entry = image.bitmaps[name].entry
    if what == "in use":
        data[entry.offset + 15] = FLAG_AUTO | FLAG_IN_USE
    elif what == "stale":
        data[95] = 0  # the autoclear bits
    path.write_bytes(data)
    assert "may have been written to" in refused(folder, *NODE)


def test_two_names_for_one_bitmap(folder: Path) -> None:
    arguments = ["--map", "allzero=a", "--map", "allzero=b", "--assert-unchanged"]
    assert "two names for one bitmap" in refused(folder, *NODE, *arguments)


@pytest.mark.parametrize("swapped", [False, True])
def test_an_error_names_the_file_that_it_is_about(folder: Path, swapped: bool) -> None:
    files = ["vm.qcow2", "stream"] if swapped else ["other", "vm.qcow2"]
    (folder / "other").write_bytes(b"no stream")
    done = run(["stream", "restore", *files, "--assert-unchanged"], folder)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"qcow2bm: {files[0]}: migration stream: magic at 0x0")


@pytest.mark.spec("CLI-26")
def test_a_bitmap_that_is_valid_is_not_replaced(folder: Path) -> None:
    restored(folder, "--assert-unchanged")
    assert "already exists" in refused(folder, *NODE, "--assert-unchanged")


@pytest.mark.spec("CLI-26")
def test_a_disk_of_another_size(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(build_image(size=SIZE + 512).data)
    assert "but this one has" in refused(folder, *NODE, "--assert-unchanged")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "several nodes"),
        (["--node", "disk"], 'no bitmaps of the node "disk"'),
        ([*NODE, "--map", "nothing=x"], 'no complete bitmap "nothing"'),
        ([*NODE, "--map", f"allzero={FOREIGN}"], "two bitmaps of one name"),
    ],
)
def test_what_is_not_in_the_stream(folder: Path, arguments: list[str], reason: str) -> None:
    assert reason in refused(folder, *arguments, "--assert-unchanged")


def test_another_name_and_a_dry_run(folder: Path) -> None:
    before = content(folder)
    done = run([*RESTORE, *NODE, "--assert-unchanged", "--dry-run"], folder)
    assert "<- commit" in done.out
    assert content(folder) == before
    assert "zeroes" in restored(folder, "--assert-unchanged", "--map", "allzero=zeroes")


@pytest.mark.spec("CLI-26")
def test_what_is_not_complete_is_left_out(folder: Path) -> None:
    """If a stream is cut off anywhere, only the bitmaps that came whole are restored."""
    data = (folder / "stream").read_bytes()
    whole = truth(folder)
    end = data.rindex(b"g512-pers")  # where the last of that node is complete
    (folder / "stream").write_bytes(data[:end])
    done = run([*RESTORE, *NODE, "--assert-unchanged"], folder)
    assert done.status == 2
    assert '"g512-pers" is not complete' in done.err
    with qcow2bm.open(folder / "vm.qcow2") as image:
        found = {name: bitmap.sha256() for name, bitmap in image.bitmaps.items()}
    assert found == {name: whole[name] for name in NAMES - {"g512-pers"}}
