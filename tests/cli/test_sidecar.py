"""The commands ``sidecar save``, ``sidecar load`` and ``sidecar dump``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.console import run
from support.golden_images import crashed, empty, names, sound
from support.images import Stored, build_image, extension
from support.jsonspec import check_sidecar_dump

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.extensions import DATA_FILE
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.migration.sidecar import read_sidecar, write_sidecar

SAVE = ["sidecar", "save", "vm.qcow2", "saved"]
LOAD = ["sidecar", "load", "saved", "vm.qcow2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.qcow2").write_bytes(sound().data)
    return tmp_path


def done(folder: Path, *arguments: str) -> None:
    assert run(arguments, folder) == (0, "", "")


def digests(folder: Path) -> dict[str, tuple[str, bool]]:
    """The digests of all bitmaps, which must be valid, and whether the bitmaps record writes."""
    with qcow2bm.open(folder / "vm.qcow2", strict=True) as image:
        return {name: (b.sha256(), b.auto) for name, b in image.bitmaps.items()}


def remove_all_but_sentinels(folder: Path) -> None:
    with qcow2bm.open(folder / "vm.qcow2", "r+") as image, image.edit() as edit:
        for name in edit.names:
            if not is_sentinel(name):
                edit.remove(name)


def refused(folder: Path, *arguments: str) -> str:
    """The one line on standard error of a command that fails and changes nothing."""
    before = (folder / "vm.qcow2").read_bytes()
    result = run([*LOAD, *arguments], folder)
    assert (result.status, result.out) == (1, "")
    assert (folder / "vm.qcow2").read_bytes() == before
    (line,) = result.err.splitlines()
    assert line.startswith("qcow2bm: ")
    return line


@pytest.mark.spec("CLI-28")
@pytest.mark.spec("SIDECAR-7")
def test_what_is_saved_is_loaded_by_the_word_of_the_caller(folder: Path) -> None:
    before = digests(folder)
    done(folder, *SAVE)
    remove_all_but_sentinels(folder)
    assert "no sentinel was saved" in refused(folder)
    done(folder, *LOAD, "--assert-unchanged")
    assert digests(folder) == before


@pytest.mark.spec("SIDECAR-4")
def test_a_sentinel_is_evidence(folder: Path) -> None:
    before = digests(folder)
    done(folder, *SAVE, "--sentinel")
    assert sum(map(is_sentinel, digests(folder))) == 2
    remove_all_but_sentinels(folder)
    done(folder, *LOAD)
    assert digests(folder) == before


@pytest.mark.spec("SIDECAR-4")
def test_a_sentinel_that_has_served_is_used_again(folder: Path) -> None:
    done(folder, *SAVE, "--sentinel")
    sentinels = set(filter(is_sentinel, digests(folder)))
    done(folder, "sidecar", "save", "vm.qcow2", "again", "--sentinel")
    assert set(filter(is_sentinel, digests(folder))) == sentinels
    name = next(name for name in sentinels if not name.endswith("-canary"))
    done(folder, "set", "vm.qcow2", name, "0:1")
    done(folder, "sidecar", "save", "vm.qcow2", "anew", "--sentinel")
    assert sentinels.isdisjoint(digests(folder))
    remove_all_but_sentinels(folder)
    assert "sentinel is gone" in refused(folder)  # of the first file
    done(folder, "sidecar", "load", "anew", "vm.qcow2")


@pytest.mark.spec("SIDECAR-4")
@pytest.mark.parametrize(
    ("commands", "said"),
    [
        (["set vm.qcow2 SENTINEL 0:1"], "the sentinel has ranges that were written"),
        (["clear vm.qcow2 SENTINEL-canary"], "the canary too"),
        (["remove vm.qcow2 SENTINEL-canary"], "the canary is gone"),
        (["remove vm.qcow2 SENTINEL"], "the sentinel is gone"),
        (["disable vm.qcow2 SENTINEL"], "the sentinel was disabled"),
    ],
)
def test_what_is_no_evidence(folder: Path, commands: list[str], said: str) -> None:
    done(folder, *SAVE, "--sentinel")
    name = next(n for n in digests(folder) if is_sentinel(n) and not n.endswith("-canary"))
    for command in commands:
        done(folder, *command.replace("SENTINEL", name).split())
    remove_all_but_sentinels(folder)
    assert said in refused(folder)
    assert "--assert-unchanged" in refused(folder)


@pytest.mark.spec("SIDECAR-4")
def test_a_sentinel_that_was_touched_when_it_was_saved_proves_nothing(folder: Path) -> None:
    """The image may be an older state of the disk, in which the sentinel has no write."""
    done(folder, *SAVE, "--sentinel")
    before = (folder / "vm.qcow2").read_bytes()
    name = next(n for n in digests(folder) if is_sentinel(n) and not n.endswith("-canary"))
    done(folder, "set", "vm.qcow2", name, "0:1")
    done(folder, "sidecar", "save", "vm.qcow2", "later")
    (folder / "vm.qcow2").write_bytes(before)
    remove_all_but_sentinels(folder)
    (folder / "saved").unlink()
    (folder / "later").rename(folder / "saved")
    assert "ranges that were written when it was saved" in refused(folder)


@pytest.mark.spec("SIDECAR-4")
def test_without_a_header_nothing_is_known_of_a_backing_file(folder: Path) -> None:
    bitmap = Stored(b"daily", [b"\x05"])
    built = build_image(bitmap, backing_name=b"base.qcow2")
    (folder / "vm.qcow2").write_bytes(built.data)
    done(folder, *SAVE, "--sentinel")
    remove_all_but_sentinels(folder)
    found = read_sidecar([(folder / "saved").read_bytes()])
    (folder / "saved").write_bytes(b"".join(write_sidecar(*found._replace(header=b""))))
    assert "nothing is known of the backing file" in refused(folder)
    (folder / "saved").write_bytes(b"".join(write_sidecar(*found)))
    done(folder, *LOAD)


@pytest.mark.spec("CLI-28")
def test_nothing_is_left_in_an_image_of_which_nothing_is_saved(folder: Path) -> None:
    (folder / "there").write_bytes(b"")
    before = (folder / "vm.qcow2").read_bytes()
    assert run(["sidecar", "save", "--sentinel", "vm.qcow2", "there"], folder).status == 1
    assert (folder / "vm.qcow2").read_bytes() == before
    (folder / "vm.qcow2").write_bytes(empty().data)
    assert run([*SAVE, "--sentinel"], folder).status == 1
    assert (folder / "vm.qcow2").read_bytes() == empty().data


@pytest.mark.spec("CLI-28")
def test_a_file_gets_its_name_when_it_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*arguments: object) -> Iterator[bytes]:
        yield b"half of it"
        assert not (folder / "saved").exists()
        assert len(list(folder.glob(".saved.*.part"))) == 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcow2bm.api.sidecar.write_sidecar", cut)
    result = run(SAVE, folder)
    assert (result.status, result.err) == (1, "qcow2bm: saved: No space left on device\n")
    assert [path.name for path in folder.iterdir()] == ["vm.qcow2"]


@pytest.mark.spec("SIDECAR-4")
def test_another_disk_with_the_same_sentinel_is_no_evidence(folder: Path) -> None:
    done(folder, *SAVE, "--sentinel")
    remove_all_but_sentinels(folder)
    data = bytearray((folder / "vm.qcow2").read_bytes())
    data[40 + 6] ^= 2  # l1_table_offset
    (folder / "vm.qcow2").write_bytes(data)
    assert "the header has another l1_table_offset" in refused(folder)


@pytest.mark.spec("SIDECAR-4")
def test_the_generation_is_compared_where_it_is_recorded(folder: Path) -> None:
    path = folder / "vm.qcow2"
    with qcow2bm.open(path, "r+") as image, image.track(generation=True):
        pass
    done(folder, *SAVE, "--sentinel")
    document = json.loads(run(["sidecar", "dump", "saved", "--output=json"], folder).out)
    assert len(document["generation"]) == 32
    remove_all_but_sentinels(folder)  # an edit is a program that opened it for writing, too
    assert "the generation is another" in refused(folder)


@pytest.mark.spec("SIDECAR-5")
def test_all_dirty_without_evidence(folder: Path) -> None:
    before = digests(folder)
    done(folder, *SAVE)
    remove_all_but_sentinels(folder)
    done(folder, *LOAD, "--as-dirty-ranges-unknown")
    with qcow2bm.open(folder / "vm.qcow2", strict=True) as image:
        assert {b.count() for b in image.bitmaps.values()} == {image.virtual_size}
        assert {n: b.auto for n, b in image.bitmaps.items()} == {
            n: a for n, (_, a) in before.items()
        }


@pytest.mark.spec("SIDECAR-7")
def test_bitmaps_in_use_are_replaced_and_others_are_not(folder: Path) -> None:
    done(folder, *SAVE)
    before = digests(folder)
    assert "already exists" in refused(folder, "--assert-unchanged")
    image = qcow2bm.open(folder / "vm.qcow2", "r+")
    with image, image.track() as tracker:
        image.close()  # as if it died
    assert tracker
    with qcow2bm.open(folder / "vm.qcow2") as found:
        remaining = [n for n, b in found.bitmaps.items() if b.status == "valid"]
    done(folder, "remove", "vm.qcow2", *remaining)
    done(folder, *LOAD, "--assert-unchanged")
    assert digests(folder) == before


@pytest.mark.spec("SIDECAR-7")
def test_a_disk_of_another_size(folder: Path) -> None:
    done(folder, *SAVE)
    (folder / "vm.qcow2").write_bytes(build_image(size=512).data)
    for option in ("--assert-unchanged", "--as-dirty-ranges-unknown"):
        assert "but this one has 512" in refused(folder, option)


@pytest.mark.spec("CLI-1")
def test_a_dry_run_writes_nothing(folder: Path) -> None:
    done(folder, *SAVE)
    remove_all_but_sentinels(folder)
    before = (folder / "vm.qcow2").read_bytes()
    result = run([*LOAD, "--assert-unchanged", "--dry-run"], folder)
    assert (result.status, result.err) == (0, "")
    assert "<- commit" in result.out
    assert (folder / "vm.qcow2").read_bytes() == before


@pytest.mark.spec("CLI-28")
@pytest.mark.spec("SIDECAR-3")
def test_bitmaps_that_are_not_valid_are_left_out(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(crashed().data)
    result = run(SAVE, folder)
    assert (result.status, result.out) == (2, "")
    warning = 'qcow2bm: warning: vm.qcow2: bitmap "daily" is inconsistent, and left out\n'
    assert result.err == warning
    assert [b.name for b in read_sidecar([(folder / "saved").read_bytes()]).bitmaps] == ["base"]
    assert run(["sidecar", "save", "-q", "vm.qcow2", "other"], folder) == (2, "", "")
    (folder / "vm.qcow2").write_bytes(empty().data)
    result = run(["sidecar", "save", "vm.qcow2", "third"], folder)
    assert (result.status, result.err) == (1, "qcow2bm: vm.qcow2: no bitmap is valid\n")
    assert not (folder / "third").exists()


@pytest.mark.spec("CLI-28")
def test_a_sentinel_for_a_data_file_is_refused(folder: Path) -> None:
    built = build_image(
        Stored(b"daily"),
        header={"incompatible_features": 1 << 2},
        extensions=[extension(DATA_FILE, b"disk.raw")],
    )
    (folder / "vm.qcow2").write_bytes(built.data)
    result = run(["sidecar", "save", "--sentinel", "vm.qcow2", "saved"], folder)
    assert (result.status, result.out) == (1, "")
    assert "leave out --sentinel" in result.err
    assert (folder / "vm.qcow2").read_bytes() == built.data
    assert not (folder / "saved").exists()
    assert run(SAVE, folder) == (0, "", "")


@pytest.mark.spec("CLI-28")
def test_nothing_is_overwritten(folder: Path) -> None:
    before = (folder / "vm.qcow2").read_bytes()
    for name in ("vm.qcow2", "."):
        result = run(["sidecar", "save", "vm.qcow2", name], folder)
        assert result.status == 1
        assert "exists already and is not overwritten" in result.err
    assert (folder / "vm.qcow2").read_bytes() == before
    assert run(["sidecar", "save", "vm.qcow2", "no/folder"], folder).status == 1


@pytest.mark.spec("CLI-29")
@pytest.mark.parametrize("command", ["load", "dump"])
def test_a_file_that_is_damaged_is_refused(folder: Path, command: str) -> None:
    done(folder, *SAVE)
    remove_all_but_sentinels(folder)
    data = (folder / "saved").read_bytes()
    image = (folder / "vm.qcow2").read_bytes()
    arguments = ["sidecar", command, "saved"]
    arguments += ["vm.qcow2", "--assert-unchanged"] if command == "load" else []
    for content, said in (
        (data[:-1], "is cut off"),
        (data[:-1] + bytes([data[-1] ^ 1]), "the file is damaged"),
        (b"", "is cut off"),
        (image, "is not the magic of a sidecar"),
    ):
        (folder / "saved").write_bytes(content)
        result = run(arguments, folder)
        assert (result.status, result.out) == (1, "")
        (line,) = result.err.splitlines()
        assert line.startswith("qcow2bm: saved: sidecar")
        assert said in line
    assert run(["sidecar", command, "missing", *arguments[3:]], folder).status == 1
    assert (folder / "vm.qcow2").read_bytes() == image


TEXT = """\
sidecar:          saved
virtual size:     1 MiB (1048576 bytes)
bitmaps:          1
header:           {header} bytes
generation:       not recorded
sentinel:         no (nothing can prove that the disk is unchanged)

bitmap 0: "b"
  granularity:    64 KiB (65536 bytes)
  enabled:        yes
  dirty:          128 KiB (131072 bytes), 12.5 % of the disk
  sha256:         {digest}
"""


def test_the_dump_for_people(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(build_image(Stored(b"b", [b"\x05"]), size=1 << 20).data)
    done(folder, *SAVE)
    digest, _ = digests(folder)["b"]
    header = len(read_sidecar([(folder / "saved").read_bytes()]).header)
    shown = run(["sidecar", "dump", "saved"], folder)
    assert shown == (0, TEXT.format(header=header, digest=digest), "")


def test_the_dump_for_programs(folder: Path) -> None:
    done(folder, *SAVE, "--sentinel")
    result = run(["sidecar", "dump", "saved", "--output=json"], folder)
    document = json.loads(result.out)
    check_sidecar_dump(document)
    found = digests(folder)
    assert {b["name"]: (b["sha256"], b["enabled"]) for b in document["bitmaps"]} == found
    assert sum(b["sentinel"] for b in document["bitmaps"]) == 2
    assert document["generation"] is None


def test_names_are_escaped(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(names().data)
    warning = "qcow2bm: warning: vm.qcow2: bitmap @0 has no name, and is left out\n"
    assert run(SAVE, folder) == (2, "", warning)
    text = run(["sidecar", "dump", "saved"], folder).out
    assert r'"a\x1b[31mred\nb"' in text
    check_sidecar_dump(json.loads(run(["sidecar", "dump", "saved", "--output=json"], folder).out))


@pytest.mark.spec("CLI-30")
def test_a_dump_of_an_image_with_sentinels(folder: Path) -> None:
    usable = "usable for a backup: 2 of 3 bitmaps (1 disabled)"  # sentinel and canary do not count
    assert run(["dump", "vm.qcow2"], folder).out.splitlines()[-1] == usable
    done(folder, *SAVE, "--sentinel")
    assert run(["dump", "vm.qcow2"], folder).out.splitlines()[-1] == usable
    name = next(n for n in digests(folder) if is_sentinel(n) and not n.endswith("-canary"))
    stored = [Stored(name.encode(), flags=FLAG_AUTO | FLAG_IN_USE), Stored(b"daily")]
    (folder / "vm.qcow2").write_bytes(build_image(*stored).data)
    said = "a sentinel is inconsistent: a VM has the disk, or did not end properly"
    assert run(["dump", "vm.qcow2"], folder).out.splitlines()[-1] == said


@pytest.mark.parametrize(
    "arguments",
    [
        ["sidecar", "frobnicate"],
        ["sidecar", "save"],
        ["sidecar", "save", "vm.qcow2"],
        ["sidecar", "save", "vm.qcow2", "saved", "more"],
        ["sidecar", "save", "--qmp", "socket"],
        ["sidecar", "save", "--qmp", "socket", "vm.qcow2", "saved"],
        ["sidecar", "save", "--qmp", "socket", "--sentinel", "saved"],
        ["sidecar", "save", "--qmp", "socket", "-U", "saved"],
        ["sidecar", "save", "vm.qcow2", "-"],
        ["sidecar", "save", "--sentinel", "-U", "vm.qcow2", "saved"],
        ["sidecar", "save", "--node", "disk", "vm.qcow2", "saved"],
        ["sidecar", "load", "saved"],
        [*LOAD, "--assert-unchanged", "--as-dirty-ranges-unknown"],
        ["sidecar", "dump"],
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str]) -> None:
    result = run(arguments, folder)
    assert (result.status, result.out) == (64, "")
    assert "; see qcow2bm sidecar" in result.err


def test_options_between_the_arguments(folder: Path) -> None:
    done(folder, "sidecar", "save", "vm.qcow2", "-U", "saved")
    done(folder, "sidecar", "save", "vm.qcow2", "--", "-x")
    assert (folder / "-x").read_bytes() == (folder / "saved").read_bytes()
