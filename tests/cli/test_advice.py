"""What is advised can be run as it is, loses only what it names, and comes to an end."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from support.broken_images import broken_images
from support.console import run
from support.following import advised, follow, names_in
from support.images import Stored, build_image
from support.spec_image import image, in_header, patched
from support.verdict_images import image_of

import qcow2bm
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

MOST_COMMANDS = 4
CRASHED = Stored(b"crashed", flags=FLAG_AUTO | FLAG_IN_USE)
SOUND = Stored(b"sound")


@pytest.mark.spec("CLI-41", "CLI-42", "CLI-43", "CLI-44", "CLI-45")
@pytest.mark.parametrize("part", range(10))
def test_the_advice_for_broken_images_ends(part: int, tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    for what, data in itertools.islice(broken_images(), part, None, 60):
        path.write_bytes(data)
        try:
            before = names_in(path)
        except qcow2bm.Qcow2BmError:
            continue  # it is no image at all
        followed = follow(tmp_path)
        assert len(followed.commands) <= MOST_COMMANDS, what
        # A fault can hide a name; what repair reads otherwise, it names as it reads it.
        lost = (before & {"daily", "weekly", "crashed"}) - names_in(path)
        assert all(f'"{name}"' in followed.costs for name in lost), (what, lost, followed)
        for undo in tmp_path.glob("vm.qcow2.undo*"):
            undo.unlink()


@pytest.mark.spec("CLI-41")
def test_a_path_is_quoted_for_the_shell(tmp_path: Path) -> None:
    name = "my vm's; disk.qcow2"
    (tmp_path / name).write_bytes(image_of(CRASHED).data)
    ((command, cost),) = advised(run(["check", name], tmp_path).out)
    assert command == "qcow2bm salvage 'my vm'\"'\"'s; disk.qcow2' --all --all-dirty"
    assert cost == "the next incremental backup saves the whole disk"


@pytest.mark.spec("CLI-42")
@pytest.mark.parametrize("name", ["vm\x1b[31m.qcow2", "-vm\n.qcow2"])
def test_a_path_that_cannot_be_printed_is_not_advised(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(image_of(CRASHED).data)
    done = run(["check", "--", name], tmp_path)
    assert 'writes may be missing from "crashed"' in done.out
    assert advised(done.out) == []
    assert "\x1b" not in done.out


@pytest.mark.spec("CLI-42")
@pytest.mark.parametrize("autoclear", [True, False])
def test_if_there_is_no_room_nothing_is_advised_but_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autoclear: bool
) -> None:
    """Above all not what drops bitmaps that could be salvaged."""

    class Full:
        f_bavail, f_frsize = 1, 512

    data = image_of(CRASHED, autoclear=autoclear).data
    (tmp_path / "vm.qcow2").write_bytes(data)
    assert advised(run(["check", "vm.qcow2"], tmp_path).out)
    monkeypatch.setattr("os.statvfs", lambda path: Full)
    for command in (["check", "vm.qcow2"], ["dump", "vm.qcow2"]):
        done = run(command, tmp_path)
        assert advised(done.out) == []
        assert "the image is to be changed: free " in done.out
    assert json.loads(run(["verdict", "--json", "vm.qcow2", "crashed"], tmp_path).out)["next"] == []


def test_an_image_that_is_moved_away_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vm.qcow2").write_bytes(image_of(CRASHED).data)

    def move(path: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr("os.statvfs", move)
    done = run(["check", "vm.qcow2"], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert "the image is not at this path any more" in done.out


@pytest.mark.spec("CLI-42")
def test_a_verdict_says_why_no_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vm.qcow2").write_bytes(image_of(CRASHED).data)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    done = run(["verdict", "vm.qcow2", "crashed"], tmp_path)
    assert done.status == 4
    assert done.out.endswith("; the image is to be changed, but it cannot be written to\n")


@pytest.mark.spec("CLI-42")
def test_the_undo_file_of_a_long_name_lies_beside_the_image(tmp_path: Path) -> None:
    name = "v" * 245 + ".qcow2"
    (tmp_path / "images").mkdir()
    data = image_of(Stored(b"broken", type=2), SOUND).data
    (tmp_path / "images" / name).write_bytes(data)
    ((command, _),) = advised(run(["check", f"images/{name}"], tmp_path).out)
    assert command.endswith("--undo images/image.undo")
    assert run(shlex.split(command)[1:], tmp_path).status == 0


@pytest.mark.spec("CLI-44")
def test_a_bitmap_that_cannot_be_made_anew_is_only_named_as_dropped(tmp_path: Path) -> None:
    long = Stored(b"n" * 1024)
    built = build_image(SOUND, long, autoclear=False, header={"incompatible_features": 1})
    (tmp_path / "vm.qcow2").write_bytes(built.data)
    (first, *others) = advised(run(["check", "vm.qcow2"], tmp_path).out)
    assert "n" * 1024 in first[1]
    assert [command for command, _ in others] == [
        "qcow2bm add vm.qcow2 sound -g 65536",
        "qcow2bm set vm.qcow2 sound 0:",
    ]


@pytest.mark.spec("CLI-42")
def test_what_this_user_cannot_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vm.qcow2").write_bytes(image_of(CRASHED).data)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    done = run(["check", "vm.qcow2"], tmp_path)
    assert advised(done.out) == []
    assert "it cannot be written to" in done.out


@pytest.mark.spec("CLI-41", "CLI-42")
@pytest.mark.parametrize("name", ["-r.qcow2", "a:b.qcow2"])
@pytest.mark.parametrize("fault", ["type", "corrupt bit"])
def test_a_path_is_not_taken_for_an_option_or_a_protocol(
    tmp_path: Path, name: str, fault: str
) -> None:
    if fault == "type":
        data = image_of(Stored(b"broken", type=2), SOUND).data
    else:
        data = build_image(SOUND, header={"incompatible_features": 2}).data
    (tmp_path / name).write_bytes(data)
    ((command, _),) = advised(run(["check", "--", name], tmp_path).out)
    assert f" ./{name}" in command
    if fault == "type":
        done = run(shlex.split(command)[1:], tmp_path)
        assert done.status == 0
        (undo,) = re.findall("^to take it back: qcow2bm (.*)$", done.out, re.MULTILINE)
        assert run(shlex.split(undo), tmp_path).status == 0
        assert (tmp_path / name).read_bytes() == data


@pytest.mark.spec("CLI-41")
def test_each_bitmap_that_is_dropped_is_named(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(7)]
    bitmaps = (Stored(name.encode(), type=2) for name in names)
    (tmp_path / "vm.qcow2").write_bytes(build_image(*bitmaps).data)
    ((_, cost),) = advised(run(["check", "vm.qcow2"], tmp_path).out)
    assert re.findall('"(n[0-9])"', cost) == names


@pytest.mark.spec("CLI-42")
def test_a_file_that_the_image_names_must_be_there_for_qemu(tmp_path: Path) -> None:
    built = build_image(SOUND, header={"incompatible_features": 2}, backing_name=b"base.img")
    (tmp_path / "vm.qcow2").write_bytes(built.data)
    done = run(["check", "vm.qcow2"], tmp_path)
    assert advised(done.out) == []
    assert 'put the file "base.img" back first' in " ".join(done.out.split())
    (tmp_path / "base.img").touch()
    assert advised(run(["check", "vm.qcow2"], tmp_path).out)


def test_with_the_corrupt_bit_no_vm_can_be_started(tmp_path: Path) -> None:
    broken = Stored(b"broken", type=2)
    built = build_image(broken, SOUND, header={"incompatible_features": 2})
    (tmp_path / "vm.qcow2").write_bytes(built.data)
    done = run(["repair", "vm.qcow2", "--no-undo"], tmp_path)
    assert "can be started" not in done.out
    assert [command for command, _ in advised(done.out)] == ["qemu-img check -r all vm.qcow2"]


@pytest.mark.spec("CLI-41")
@pytest.mark.parametrize("command", ["dump", "check"])
def test_json_has_the_same_commands(tmp_path: Path, command: str) -> None:
    (tmp_path / "vm.qcow2").write_bytes(image_of(CRASHED, SOUND).data)
    document = json.loads(run([command, "--json", "vm.qcow2"], tmp_path).out)
    assert document["next"] == [["qcow2bm", "salvage", "vm.qcow2", "--all", "--all-dirty"]]
    assert advised(run([command, "vm.qcow2"], tmp_path).out)


@pytest.mark.spec("CLI-44")
@pytest.mark.parametrize(
    ("what", "first"),
    [
        ("dirty", "qemu-img check -r all vm.qcow2"),
        ("version 2", "qemu-img amend -o compat=1.1 vm.qcow2"),
    ],
)
def test_what_qemu_drops_is_made_anew(tmp_path: Path, what: str, first: str) -> None:
    off = Stored(b"@off", flags=0, granularity_bits=12)
    if what == "dirty":
        built = build_image(SOUND, off, autoclear=False, header={"incompatible_features": 1})
    else:
        built = build_image(SOUND, off, version=2)
    (tmp_path / "vm.qcow2").write_bytes(built.data)
    commands = [command for command, _ in advised(run(["check", "vm.qcow2"], tmp_path).out)]
    assert commands == [
        first,
        "qcow2bm add vm.qcow2 sound -g 65536",
        "qcow2bm set vm.qcow2 sound 0:",
        "qcow2bm add vm.qcow2 @@off -g 4096",
        "qcow2bm set vm.qcow2 @@off 0:",
        "qcow2bm disable vm.qcow2 @@off",
    ]


@pytest.mark.spec("CLI-43")
def test_a_header_that_nothing_here_repairs(tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").write_bytes(patched(image(), *in_header(l1_size=0)))
    done = run(["check", "vm.qcow2"], tmp_path)
    assert advised(done.out) == []
    assert "restore the header or the file from a copy" in " ".join(done.out.split())


def test_after_a_repair_the_user_knows_how_to_go_on(tmp_path: Path) -> None:
    broken = Stored(b"broken", type=2)
    (tmp_path / "vm.qcow2").write_bytes(image_of(broken, CRASHED).data)
    done = run(["repair", "vm.qcow2", "--undo", "vm.undo"], tmp_path)
    assert done.status == 0
    text = " ".join(done.out.split())
    assert "QEMU does not refuse the metadata any more, so the VM can be started" in text
    assert 'a full backup is due instead of the next incremental one by "broken"' in text
    assert "to take it back: qcow2bm undo vm.qcow2 vm.undo" in text
    assert [command for command, _ in advised(done.out)] == [
        "qcow2bm salvage vm.qcow2 --all --all-dirty"
    ]


@pytest.mark.spec("CLI-49")
def test_a_sentinel_is_not_salvaged(tmp_path: Path) -> None:
    name = "qcow2bm-sentinel-00000000-0000-4000-8000-000000000000"
    sentinel = Stored(name.encode(), flags=FLAG_AUTO | FLAG_IN_USE)
    (tmp_path / "vm.qcow2").write_bytes(image_of(SOUND, sentinel).data)
    for command in (["verdict"], ["map"], ["clear"], ["set"]):
        ranges = ["0:64k"] if command == ["set"] else []
        done = run([*command, "vm.qcow2", name, *ranges], tmp_path)
        assert done.status != 0
        assert "next:" not in done.out + done.err


@pytest.mark.spec("CLI-49")
@pytest.mark.parametrize("command", ["check", "dump", "map daily", "verdict daily"])
def test_an_interrupted_rescue_is_finished_before_anything_is_salvaged(
    command: str, tmp_path: Path
) -> None:
    daily = Stored(b"daily", flags=FLAG_AUTO | FLAG_IN_USE)
    copy = Stored(b"qcow2bm-rescue-daily", [b"\x05"])
    (tmp_path / "vm.qcow2").write_bytes(build_image(daily, copy, size=64 << 20).data)
    word, *names = command.split()
    done = run([word, "vm.qcow2", *names], tmp_path)
    found = re.findall(r"next: ([^;\n]*)", done.out + done.err)
    assert found == ["qcow2bm rescue finish vm.qcow2"]
    assert run(shlex.split(found[0])[1:], tmp_path).status == 0
    with qcow2bm.open(tmp_path / "vm.qcow2") as opened:
        assert list(opened.bitmaps) == ["daily"]
        assert opened.bitmaps["daily"].count() == 2 << 16


@pytest.mark.spec("STAT-7")
def test_bits_far_behind_the_disk_are_not_just_cut_off(tmp_path: Path) -> None:
    octets = bytearray(512)
    octets[60] = 1
    built = build_image(Stored(b"daily", [bytes(octets)]), size=160 * 65536, cluster_bits=9)
    (tmp_path / "vm.qcow2").write_bytes(built.data)
    done = run(["verdict", "vm.qcow2", "daily"], tmp_path)
    assert done.status == 6
    assert "fit" not in done.out
    assert 'cost: drops "daily"' in done.out
