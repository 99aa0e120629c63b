"""The command ``salvage``, without QEMU: the disks that are compared are raw files."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from uuid import UUID

import pytest
from support import contents
from support.console import run
from support.images import Stored, build_image
from support.jsonspec import check_salvage
from support.plans import after
from support.problem_images import broken

import qcow2bm
from qcow2bm import compare as comparing
from qcow2bm.clusters.plan import Barrier, Write
from qcow2bm.compare import RawContent
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.migration.sentinel import PREFIX

GRANULE = 65536
SIZE = 160 * GRANULE
CRASHED = Stored(b"crashed", [b"\5"], flags=FLAG_AUTO | FLAG_IN_USE)
DISABLED = Stored(b"disabled", [b"\5"], flags=FLAG_IN_USE)
SOUND = Stored(b"sound", [b"\3"])
SENTINEL = Stored(f"{PREFIX}{UUID(int=7)}".encode(), flags=FLAG_AUTO | FLAG_IN_USE)
NOTE = (
    "qcow2bm: note: old must have exactly the content to which the last backup restores, with all "
    "increments: the next backup will not save what is equal in new\n"
)


def write(folder: Path, *bitmaps: Stored, autoclear: bool = True) -> bytes:
    data = bytes(build_image(*bitmaps, size=SIZE, autoclear=autoclear).data)
    (folder / "vm.qcow2").write_bytes(data)
    return data


def dirty(folder: Path) -> dict[str, list[int] | str]:
    """The dirty granules of the valid bitmaps, and the status of the others."""
    found: dict[str, list[int] | str] = {}
    with qcow2bm.open(folder / "vm.qcow2") as image:
        assert not [p for p in image.check().problems if p.severity != "leak"]
        for name, bitmap in image.bitmaps.items():
            found[name] = bitmap.status
            if bitmap.status == "valid":
                ranges = [r for part in bitmap.extents() for r in part.tolist()]
                found[name] = [
                    n
                    for start, length in ranges
                    for n in range(start // GRANULE, -(-(start + length) // GRANULE))
                ]
    return found


ALL = list(range(160))


@pytest.mark.spec("SALVAGE-1", "SALVAGE-3")
@pytest.mark.parametrize("autoclear", [True, False])
def test_all_at_once(tmp_path: Path, autoclear: bool) -> None:
    """A sentinel is left: it must never become valid by an order that was given for backups."""
    write(tmp_path, CRASHED, SOUND, DISABLED, SENTINEL, autoclear=autoclear)
    done = run(["salvage", "vm.qcow2", "--all", "--all-dirty"], tmp_path)
    assert (done.status, done.err) == (0, "")
    found = dirty(tmp_path)
    assert found.pop(SENTINEL.name.decode()) == "inconsistent"
    sound = [0, 1] if autoclear else ALL
    assert found == {"crashed": ALL, "sound": sound, "disabled": ALL}
    before = (tmp_path / "vm.qcow2").read_bytes()
    done = run(["salvage", "vm.qcow2", "--all", "--all-dirty"], tmp_path)
    assert done.out.startswith("nothing to salvage: no bitmap is inconsistent or stale\n")
    assert (tmp_path / "vm.qcow2").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--all-dirty"],
        ["--all", "crashed", "--all-dirty"],
        ["--all", "--compare", "old", "new"],
        ["crashed", "disabled", "--old-format", "raw", "--all-dirty"],
    ],
)
def test_which_bitmaps_are_meant_must_be_clear(tmp_path: Path, arguments: list[str]) -> None:
    before = write(tmp_path, CRASHED, DISABLED)
    assert run(["salvage", "vm.qcow2", *arguments], tmp_path).status == 64
    assert (tmp_path / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("SALVAGE-1", "SALVAGE-2")
def test_all_dirty(tmp_path: Path) -> None:
    write(tmp_path, CRASHED, SOUND, DISABLED)
    done = run(["salvage", "vm.qcow2", "crashed", "--all-dirty"], tmp_path)
    size = "10 MiB (10485760 bytes)"
    assert done.status == 0
    assert done.out == (
        f'"crashed" is valid: {size} of {size} dirty\n'
        'writes may be missing from "disabled"\n'
        "  next: qcow2bm salvage vm.qcow2 --all --all-dirty\n"
        "        cost: the next incremental backup saves the whole disk\n"
    )
    assert done.err == ""
    assert dirty(tmp_path) == {"crashed": ALL, "sound": [0, 1], "disabled": "inconsistent"}
    done = run(["salvage", "vm.qcow2", "@2", "--all-dirty", "--output=json"], tmp_path)
    document = json.loads(done.out)
    check_salvage(document)
    assert document["salvaged"] == [{"name": "disabled", "dirty-bytes": SIZE}]
    assert document["inconsistent"] == []
    with qcow2bm.open(tmp_path / "vm.qcow2") as image:
        assert list(image.bitmaps) == ["crashed", "sound", "disabled"]
        assert [b.auto for b in image.bitmaps.values()] == [True, True, False]
        assert image.check().problems == ()


@pytest.mark.spec("SALVAGE-2")
def test_what_is_not_salvaged(tmp_path: Path) -> None:
    before = write(tmp_path, CRASHED, SOUND)
    for name, message in (
        ("sound", 'bitmap "sound" is neither in_use nor stale: there is nothing to salvage'),
        ("nobody", 'bitmap "nobody" not found; the image has "crashed", "sound"'),
    ):
        done = run(["salvage", "vm.qcow2", name, "--all-dirty"], tmp_path)
        assert done == (1, "", f"qcow2bm: vm.qcow2: {message}\n")
    assert (tmp_path / "vm.qcow2").read_bytes() == before
    (tmp_path / "vm.qcow2").write_bytes(broken("directory-entry.type.unknown"))
    done = run(["salvage", "vm.qcow2", "crashed", "--all-dirty"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "an image with such a fault is not edited" in done.err


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    before = write(tmp_path, CRASHED)
    done = run(["salvage", "vm.qcow2", "crashed", "--all-dirty", "--dry-run"], tmp_path)
    assert done.status == 0
    assert "nothing was written" in done.out
    arguments = ["salvage", "vm.qcow2", "crashed", "--trust-stale", "--dry-run", "--output=json"]
    document = json.loads(run(arguments, tmp_path).out)
    check_salvage(document)
    assert document["plan"]["steps"]
    assert document["salvaged"][0]["dirty-bytes"] is None
    assert (tmp_path / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("SALVAGE-4")
def test_as_it_is_stored_it_may_miss_writes_which_is_said(tmp_path: Path) -> None:
    write(tmp_path, CRASHED)
    done = run(["salvage", "vm.qcow2", "crashed", "--trust-stale"], tmp_path)
    assert (done.status, done.err) == (
        0,
        'qcow2bm: warning: writes since "crashed" was last stored are missing from it, and so '
        "from all backups that rely on it\n",
    )
    assert dirty(tmp_path) == {"crashed": [0, 2]}


# --- stale bitmaps ------------------------------------------------------------------------------

STALE = Stored(b"a", [b"\1"]), Stored(b"b", [b"\2"]), Stored(b"c", [b"\4"], flags=0)


@pytest.mark.spec("SALVAGE-3")
def test_stale_bitmaps_are_salvaged_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path, *STALE, autoclear=False)
    assert run(["salvage", "vm.qcow2", "b", "--all-dirty"], tmp_path).status == 0
    assert dirty(tmp_path) == {"a": "inconsistent", "b": ALL, "c": "inconsistent"}
    assert run(["salvage", "vm.qcow2", "c", "--trust-stale"], tmp_path).status == 0
    assert run(["salvage", "vm.qcow2", "a", "--trust-stale"], tmp_path).status == 0
    assert dirty(tmp_path) == {"a": [0], "b": ALL, "c": [2]}
    run(["repair", "vm.qcow2", "--no-undo"], tmp_path)
    with qcow2bm.open(tmp_path / "vm.qcow2") as image:
        assert image.check().problems == ()
        assert [b.auto for b in image.bitmaps.values()] == [True, True, False]


@pytest.mark.spec("SALVAGE-3")
def test_of_stale_bitmaps_whose_clusters_are_not_counted_only_the_names_are_left(
    tmp_path: Path,
) -> None:
    """`qemu-img check -r leaks` freed the clusters of the bitmaps."""
    data = bytearray(write(tmp_path, *STALE, autoclear=False))
    with qcow2bm.open(bytes(data)) as image:
        counts = [
            (p.offset, p.message) for p in image.check().problems if p.id.endswith("refcount.leak")
        ]
        block = int.from_bytes(data[image.header.refcount_table_offset :][:8], "big")
        size = image.cluster_size
    assert len(counts) == 1
    first = counts[0][0] // size
    data[block + 2 * first : block + 2 * (len(data) // size)] = bytes(
        2 * (len(data) // size - first)
    )
    (tmp_path / "vm.qcow2").write_bytes(data)
    refused = run(["salvage", "vm.qcow2", "a", "--trust-stale"], tmp_path)
    assert refused.status == 1
    assert "clusters that are lost or belong to something else" in refused.err
    assert (tmp_path / "vm.qcow2").read_bytes() == data
    assert run(["salvage", "vm.qcow2", "a", "--all-dirty"], tmp_path).status == 0
    assert dirty(tmp_path) == {"a": ALL, "b": "inconsistent", "c": "inconsistent"}
    assert run(["salvage", "vm.qcow2", "b", "--trust-stale"], tmp_path).status == 0
    assert dirty(tmp_path) == {"a": ALL, "b": ALL, "c": "inconsistent"}


@pytest.mark.spec("SALVAGE-3")
@pytest.mark.parametrize("what", ["type", "disk", "count"])
def test_a_stale_directory_that_is_damaged_is_not_taken_up(what: str, tmp_path: Path) -> None:
    data = bytearray(write(tmp_path, *STALE, autoclear=False))
    with qcow2bm.open(bytes(data)) as image:
        entry, extension = image.directory[1], image.bitmaps_extension
        l1 = image.header.l1_table_offset
    assert extension
    if what == "type":
        data[entry.offset_of("type")] = 9
    elif what == "count":
        place = data.index(extension.bitmap_directory_offset.to_bytes(8, "big"))
        data[place - 13] += 1
    else:  # a program gave the cluster to the disk, as an L2 table: all zeros but for ours
        data[l1 : l1 + 8] = (1 << 63 | extension.bitmap_directory_offset).to_bytes(8, "big")
    (tmp_path / "vm.qcow2").write_bytes(data)
    done = run(["salvage", "vm.qcow2", "a", "--all-dirty"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "remove --all" in done.err
    assert (tmp_path / "vm.qcow2").read_bytes() == data


@pytest.mark.spec("SALVAGE-3")
def test_a_stale_table_that_the_disk_has_overwritten(tmp_path: Path) -> None:
    """The disk uses a cluster of one bitmap; the other bitmaps are intact."""
    data = bytearray(write(tmp_path, *STALE, autoclear=False))
    with qcow2bm.open(bytes(data)) as image:
        table, l1 = image.directory[1].bitmap_table_offset, image.header.l1_table_offset
    data[table : table + 512] = bytes(512)
    data[l1 : l1 + 8] = (1 << 63 | table).to_bytes(8, "big")
    (tmp_path / "vm.qcow2").write_bytes(data)
    assert run(["salvage", "vm.qcow2", "a", "--trust-stale"], tmp_path).status == 0
    assert run(["salvage", "vm.qcow2", "c", "--trust-stale"], tmp_path).status == 0
    assert run(["salvage", "vm.qcow2", "b", "--trust-stale"], tmp_path).status == 0
    assert dirty(tmp_path) == {"a": [0], "b": ALL, "c": [2]}


def test_an_edit_goes_on_after_a_salvage_that_failed() -> None:
    data = bytearray(build_image(*STALE, size=SIZE, autoclear=False).data)
    before = bytes(data)
    with qcow2bm.open(data, "r+") as image:
        with image.edit() as edit:
            for _ in range(2):
                with pytest.raises(qcow2bm.BitmapNotFoundError, match="the image has"):
                    edit.salvage("nobody")
                with pytest.raises(ValueError, match="must have 20"):
                    edit.salvage("a", b"\0" * 19)
                with pytest.raises(ValueError, match="exclude each other"):
                    edit.salvage("a", b"\0" * 20, trust_stored=True)
        assert data == before
        with image.edit(dry_run=True) as edit:
            edit.salvage("a", b"\3".ljust(20, b"\0"))
            edit.set("a", SIZE - 1, 1)
            plan = edit.plan()
    with qcow2bm.open(after(before, plan.steps)) as image:
        assert image.bitmaps["a"].packed().tolist() == [3, *18 * [0], 128]
        assert image.bitmaps["b"].status == "inconsistent"


# --- comparing ----------------------------------------------------------------------------------


def write_raw(folder: Path, name: str, *granules: int, size: int = SIZE) -> None:
    contents.write_raw(folder / name, *granules, size=size)


COMPARE = ["salvage", "vm.qcow2", "crashed", "--compare", "old", "new", "--assert-current"]


@pytest.mark.spec("SALVAGE-5")
def test_what_differs_is_dirty(tmp_path: Path) -> None:
    write(tmp_path, CRASHED)
    write_raw(tmp_path, "old", 3, 7, 159)
    write_raw(tmp_path, "new", 3, 8)
    done = run(COMPARE, tmp_path)
    assert (done.status, done.err) == (0, NOTE)
    assert done.out.startswith('"crashed" is valid: 192 KiB (196608 bytes) of 10 MiB ')
    assert dirty(tmp_path) == {"crashed": [7, 8, 159]}


COARSE = Stored(b"coarse", [b"\1"], granularity_bits=20, flags=FLAG_AUTO | FLAG_IN_USE)
FINE = Stored(b"fine", granularity_bits=9, flags=FLAG_AUTO | FLAG_IN_USE)
SEVERAL = ("crashed", "coarse", "fine")


def bits(folder: Path) -> dict[str, list[int]]:
    with qcow2bm.open(folder / "vm.qcow2") as image:
        return {name: image.bitmaps[name].packed().tolist() for name in SEVERAL}


@pytest.mark.spec("SALVAGE-1", "SALVAGE-9")
@pytest.mark.parametrize("autoclear", [True, False])
def test_several_bitmaps_get_what_each_would_get_alone(
    autoclear: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(tmp_path, "old", 3, 7, 159, size=SIZE - GRANULE)
    write_raw(tmp_path, "new", 3, 8, 40)
    write(tmp_path, CRASHED, COARSE, FINE, autoclear=autoclear)
    for name in SEVERAL:
        words = [name if word == "crashed" else word for word in COMPARE]
        assert run(words, tmp_path).status == 0
    alone = bits(tmp_path)
    assert dirty(tmp_path)["crashed"] == [7, 8, 40, 159]
    write(tmp_path, CRASHED, COARSE, FINE, autoclear=autoclear)
    read: list[str] = []

    def reader(content: RawContent) -> AbstractContextManager[RawContent]:
        read.append(content.name)
        return nullcontext(content)

    monkeypatch.setattr(RawContent, "reader", reader)
    names = [word for word in COMPARE if word != "crashed"]
    done = run([*names[:2], *SEVERAL, *names[2:], "--json"], tmp_path)
    assert done.status == 0
    assert bits(tmp_path) == alone
    assert sorted(read) == ["new"] * comparing.WORKERS + ["old"] * comparing.WORKERS
    document = json.loads(done.out)
    check_salvage(document)
    sizes = [("crashed", 4 * GRANULE), ("coarse", 3 << 20), ("fine", 3 * 512 + GRANULE)]
    assert document["salvaged"] == [{"name": name, "dirty-bytes": length} for name, length in sizes]
    assert (document["schema"], document["inconsistent"]) == (1, [])


@pytest.mark.spec("SALVAGE-9")
def test_if_one_of_several_cannot_be_salvaged_none_is_and_nothing_is_compared(
    tmp_path: Path,
) -> None:
    before = write(tmp_path, CRASHED, SOUND, COARSE)
    for way in (["--compare", "old", "new"], ["--all-dirty"], ["--trust-stale"]):
        done = run(["salvage", "vm.qcow2", "crashed", "sound", "coarse", *way], tmp_path)
        assert (done.status, done.out) == (1, "")
        assert '"sound" is neither in_use nor stale' in done.err
        assert "note: " not in done.err
    assert (tmp_path / "vm.qcow2").read_bytes() == before


@pytest.mark.parametrize("way", ["--all-dirty", "--trust-stale"])
def test_several_names_are_salvaged_in_one_edit(way: str, tmp_path: Path) -> None:
    write(tmp_path, CRASHED, SOUND, DISABLED, COARSE)
    plan = run(["salvage", "vm.qcow2", "crashed", "coarse", way, "--dry-run"], tmp_path).out
    assert plan.count("<- commit") <= 1
    assert run(["salvage", "vm.qcow2", "crashed", "coarse", way], tmp_path).status == 0
    found = dirty(tmp_path)
    assert found["disabled"] == "inconsistent"
    assert (found["crashed"], found["coarse"]) == (
        (ALL, ALL) if way == "--all-dirty" else ([0, 2], list(range(16)))
    )


@pytest.mark.spec("SALVAGE-5")
def test_what_an_old_one_that_is_shorter_lacks_is_dirty(tmp_path: Path) -> None:
    write(tmp_path, CRASHED)
    write_raw(tmp_path, "old", 1, size=150 * GRANULE + 512)
    write_raw(tmp_path, "new")
    done = run(COMPARE, tmp_path)
    assert done.status == 0
    assert "warning: old has 9830912 bytes, the disk 10485760: was it resized since?" in done.err
    assert dirty(tmp_path) == {"crashed": [1, *range(150, 160)]}


@pytest.mark.spec("SALVAGE-5", "SALVAGE-6")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("size", f"new: has {SIZE - 512} bytes, but the disk has {SIZE}"),
        ("same", "old: is not the last backup, but the disk that is compared with it"),
        ("image", "old: is not the last backup, but the disk that is compared with it"),
        ("missing", "old: No such file or directory"),
        ("qcow2", "old: begins like a file of qcow2: say --old-format qcow2 if it is one"),
        ("vhdx", "old: begins like a file of VHDX: make it raw or qcow2 if it is one"),
        ("folder", "old: is a directory; an image is a regular file or a block device"),
    ],
)
def test_what_is_not_compared(what: str, message: str, tmp_path: Path) -> None:
    before = write(tmp_path, CRASHED)
    write_raw(tmp_path, "old")
    write_raw(tmp_path, "new", size=SIZE - 512 if what == "size" else SIZE)
    if what != "size":
        os.unlink(tmp_path / "old")
    if what == "same":
        os.link(tmp_path / "new", tmp_path / "old")
    if what == "image":
        os.link(tmp_path / "vm.qcow2", tmp_path / "old")
    if what in ("qcow2", "vhdx"):
        magic = b"QFI\xfb" if what == "qcow2" else b"vhdxfile"
        (tmp_path / "old").write_bytes(magic.ljust(SIZE, b"\0"))
    if what == "folder":
        (tmp_path / "old").mkdir()
    done = run(COMPARE, tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"{NOTE}qcow2bm: {message}")
    assert len(done.err.splitlines()) == 2
    assert (tmp_path / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("SALVAGE-5")
def test_that_new_is_the_disk_is_proved_or_said(tmp_path: Path) -> None:
    before = write(tmp_path, CRASHED)
    write_raw(tmp_path, "old", 1)
    write_raw(tmp_path, "new")
    done = run(COMPARE[:-1], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "qcow2bm: new: is neither the image nor its data file: if you know" in done.err
    assert (tmp_path / "vm.qcow2").read_bytes() == before
    wrong = run(["salvage", "vm.qcow2", "crashed", "--all-dirty", "--assert-current"], tmp_path)
    assert (wrong.status, wrong.out) == (64, "")


@pytest.mark.spec("SALVAGE-2")
@pytest.mark.parametrize("bits", [5, 33, 63, 64, 255])
@pytest.mark.parametrize("is_stale", [False, True])
def test_a_granularity_that_qemu_cannot_have(bits: int, is_stale: bool, tmp_path: Path) -> None:
    data = bytearray(write(tmp_path, CRASHED, autoclear=not is_stale))
    with qcow2bm.open(bytes(data)) as image:
        data[image.directory[0].offset_of("granularity_bits")] = bits
    (tmp_path / "vm.qcow2").write_bytes(data)
    done = run(["salvage", "vm.qcow2", "crashed", "--all-dirty"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert [line[:8] for line in done.err.splitlines() if line[:2] != "  "] == ["qcow2bm:"]
    assert (tmp_path / "vm.qcow2").read_bytes() == data


@pytest.mark.spec("SALVAGE-2")
@pytest.mark.parametrize("way", ["--all-dirty", "--trust-stale"])
def test_one_that_uses_clusters_of_the_disk_is_not_salvaged(way: str, tmp_path: Path) -> None:
    data = bytearray(write(tmp_path, CRASHED))
    with qcow2bm.open(bytes(data)) as image:
        table, l1 = image.directory[0].bitmap_table_offset, image.header.l1_table_offset
    data[l1 : l1 + 8] = (1 << 63).to_bytes(8, "big")[:1] + data[table + 1 : table + 8]
    (tmp_path / "vm.qcow2").write_bytes(data)
    done = run(["salvage", "vm.qcow2", "crashed", way], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert (tmp_path / "vm.qcow2").read_bytes() == data


@pytest.mark.spec("SALVAGE-2")
@pytest.mark.parametrize("is_stale", [False, True])
@pytest.mark.parametrize("what", ["compressed", "past the end", "behind what is counted"])
def test_nothing_is_put_where_the_disk_may_have_data(
    what: str, is_stale: bool, tmp_path: Path
) -> None:
    """Clusters that the disk uses have refcount 0, so they look free."""
    data = bytearray(write(tmp_path, CRASHED, autoclear=not is_stale))
    with qcow2bm.open(bytes(data)) as image:
        l1 = image.header.l1_table_offset
        block = int.from_bytes(data[image.header.refcount_table_offset :][:8], "big")
    table = len(data)
    place = {"compressed": table + 512, "past the end": table + 4096}.get(what, table + 1024)
    data += bytes(512)
    data[l1 : l1 + 8] = (1 << 63 | table).to_bytes(8, "big")
    data[block + 2 * (table // 512) + 1] = 1
    bits = 1 << 62 if what == "compressed" else 1 << 63
    data[table : table + 8] = (bits | place).to_bytes(8, "big")
    if what != "past the end":
        data += b"g" * 1024
    (tmp_path / "vm.qcow2").write_bytes(data)
    done = run(["salvage", "vm.qcow2", "crashed", "--all-dirty"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "repair that first; check says how" in done.err
    assert (tmp_path / "vm.qcow2").read_bytes() == data


def test_several_stale_bitmaps_are_salvaged_in_one_edit() -> None:
    """One bitmap is no longer intact."""
    data = bytearray(build_image(*STALE, size=SIZE, autoclear=False).data)
    with qcow2bm.open(bytes(data)) as image:
        data[image.directory[1].offset_of("bitmap_table_size") + 3] = 2
    with qcow2bm.open(data, "r+") as image, image.edit() as edit:
        edit.salvage("a", trust_stored=True)
        edit.salvage("b")
        edit.salvage("c")
    with qcow2bm.open(data) as image:
        counts = [bitmap.count() for bitmap in image.bitmaps.values()]
        assert counts == [GRANULE, SIZE, SIZE]


@pytest.mark.spec("SALVAGE-3")
def test_a_stale_bitmap_that_could_not_be_as_large_is_said(tmp_path: Path) -> None:
    """A program without bitmap support made the disk much larger."""
    fine = Stored(b"fine", granularity_bits=9)
    data = bytearray(write(tmp_path, STALE[0], fine, autoclear=False))
    data[24:32] = (1 << 42).to_bytes(8, "big")
    (tmp_path / "vm.qcow2").write_bytes(data)
    done = run(["salvage", "vm.qcow2", "a", "--all-dirty"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert (tmp_path / "vm.qcow2").read_bytes() == data


@pytest.mark.spec("SALVAGE-1")
@pytest.mark.parametrize("is_counted", [False, True])
def test_what_is_stale_is_not_overwritten_before_the_new_directory_is_whole(
    is_counted: bool,
) -> None:
    data = bytearray(build_image(*STALE, size=SIZE, autoclear=False).data)
    with qcow2bm.open(bytes(data)) as image:
        extension = image.bitmaps_extension
        assert extension
        low = extension.bitmap_directory_offset
        block = int.from_bytes(data[image.header.refcount_table_offset :][:8], "big")
    if not is_counted:
        first, end = low // 512, len(data) // 512
        data[block + 2 * first : block + 2 * end] = bytes(2 * (end - first))
    with qcow2bm.open(data) as image, image.edit(dry_run=True) as edit:
        edit.salvage("a")
        steps = edit.plan().steps
    place = next(n for n, s in enumerate(steps) if s.what == "bitmaps extension")
    assert isinstance(steps[place - 1], Barrier)
    assert isinstance(steps[place + 1], Barrier)
    for step in steps[:place]:
        if isinstance(step, Write):
            assert step.offset >= len(data) or step.what.startswith("refcounts")


@pytest.mark.spec("SALVAGE-6")
def test_a_raw_disk_on_which_a_guest_wrote_a_header_is_raw_if_the_caller_says_so(
    tmp_path: Path,
) -> None:
    write(tmp_path, CRASHED)
    write_raw(tmp_path, "new")
    (tmp_path / "old").write_bytes(b"QFI\xfb" + bytes(SIZE - 4))
    assert run([*COMPARE, "--old-format=raw"], tmp_path).status == 0
    assert dirty(tmp_path) == {"crashed": [0]}


@pytest.mark.spec("SALVAGE-1")
def test_no_other_process_gets_the_image_while_disks_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, CRASHED)
    write_raw(tmp_path, "old", 1)
    write_raw(tmp_path, "new")
    compare, tried = comparing.find_differences_at, []

    def compare_and_try(*arguments: object, **options: object) -> object:
        with pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.open(tmp_path / "vm.qcow2", "r+")
        tried.append(True)
        return compare(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(comparing, "find_differences_at", compare_and_try)
    assert run(COMPARE, tmp_path).status == 0
    assert tried
    assert dirty(tmp_path) == {"crashed": [1]}
