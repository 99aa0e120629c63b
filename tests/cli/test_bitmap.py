"""The command ``bitmap``: how it reads its arguments, and what it says if it fails.

tests/oracle compares the same with the real ``qemu-img bitmap``.
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest
from support.console import Result, run
from support.images import Stored, build_image
from support.specreader import page

import qcow2bm
from qcow2bm.cli.qemu_values import granularity
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

SIZE = 160 << 16
STORED = (
    Stored(b"daily", [b"\5"]),
    Stored(b"@1", [b"\6"]),
    Stored(b"weekly", [b"\x18"], flags=0),
    Stored(b"hourly", [b"\x40"], granularity_bits=18),
)
CRASHED = Stored(b"crashed", [b"\5"], flags=FLAG_AUTO | FLAG_IN_USE)

BEFORE = {
    "daily": (65536, True, [(0, 65536), (131072, 65536)]),
    "@1": (65536, True, [(65536, 131072)]),
    "weekly": (65536, False, [(196608, 131072)]),
    "hourly": (262144, True, [(1572864, 262144)]),
}
"""The granularity of each bitmap, whether it is enabled, and what is dirty."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.qcow2").write_bytes(build_image(*STORED, size=SIZE).data)
    (tmp_path / "old.qcow2").write_bytes(
        build_image(Stored(b"daily", [b"\x80"]), CRASHED, size=SIZE).data
    )
    (tmp_path / "a,b:c").write_bytes((tmp_path / "vm.qcow2").read_bytes())
    return tmp_path


def bitmaps(folder: Path, name: str = "vm.qcow2") -> dict[str, Any]:
    done = run(["dump", "--output=json", "--extents", name], folder)
    return {
        bitmap["name"]: (
            bitmap["granularity"],
            "auto" in bitmap["flags"],
            [(extent["start"], extent["length"]) for extent in bitmap["extents"] or ()],
        )
        for bitmap in json.loads(done.out)["bitmaps"]
    }


def failed(folder: Path, arguments: list[str]) -> str:
    """What the command says if it fails; it leaves the image as it was."""
    before = (folder / "vm.qcow2").read_bytes()
    done = run(["bitmap", *arguments], folder)
    assert (done.status, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert (folder / "vm.qcow2").read_bytes() == before
    return line


# --- the translation of each call ---------------------------------------------------------------

ROWS = page("from-qemu-img.md").table("Translation").rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["with qemu-img"])
def test_the_native_commands_do_the_same(folder: Path, row: dict[str, str]) -> None:
    assert bitmaps(folder) == BEFORE
    original = (folder / "vm.qcow2").read_bytes()
    program, *arguments = row["with qemu-img"].split(" ")
    assert program == "qemu-img"
    assert run(arguments, folder) == Result(0, "", "")
    expected = bitmaps(folder)
    assert expected != BEFORE
    (folder / "vm.qcow2").write_bytes(original)
    for command in row["with qcow2bm"].split(" && "):
        program, *arguments = command.split(" ")
        assert program == "qcow2bm"
        assert run(arguments, folder).status == 0
    assert bitmaps(folder) == expected
    assert list(bitmaps(folder)) == list(expected)


# --- reading arguments --------------------------------------------------------------------------


@pytest.mark.spec("IMG-1", "IMG-2")
@pytest.mark.parametrize(
    "arguments",
    [
        "--add --disable -g 4k vm.qcow2 new",
        "vm.qcow2 new --add --disable -g 4k",
        "--add vm.qcow2 -g4k new --disable",
        "--add vm.qcow2 -g4k --dis -- new",
        "--ad --d --gran=4k vm.qcow2 new",
        "--add --disable --granularity 4096 vm.qcow2 -- new",
        "--add -g 1M -g 0x1000 --disable -f qcow2 -- vm.qcow2 new",
        "--add --disable -g 4.0k -fqcow2 file:vm.qcow2 new",
        "--add --remove --add --enable --disable -g 4K --format=qcow2 ./vm.qcow2 new",
        '--add --disable -g4k json:{"file.filename":"vm.qcow2"} new',
        '--add --disable -g4k json:{"driver":"qcow2","file":{"filename":"vm.qcow2"}} new',
        "--add --disable -g4k --im file.driver=file,driver=qcow2,file.filename=vm.qcow2 new",
        "--image-opts --add --disable -g4k file.filename=vm.qcow2, new",
        "--color never --color=auto --add --disable -g4k vm.qcow2 new",
    ],
)
def test_spellings_of_one_call(folder: Path, arguments: str) -> None:
    assert run(["bitmap", *arguments.split(" ")], folder) == Result(0, "", "")
    assert bitmaps(folder) == BEFORE | {"new": (4096, False, [])}


@pytest.mark.spec("IMG-1")
def test_actions_are_done_in_the_order_given(folder: Path) -> None:
    assert run(
        ["bitmap", "--merge=@1", "--clear", "--merge", "daily", "vm.qcow2", "weekly"], folder
    )
    assert bitmaps(folder)["weekly"][2] == BEFORE["daily"][2]
    assert run(["bitmap", "--disable", "--enable", "vm.qcow2", "weekly"], folder).status == 0
    assert bitmaps(folder)["weekly"][1]
    assert run(["bitmap", "--remove", "--add", "vm.qcow2", "weekly"], folder).status == 0
    assert list(bitmaps(folder)) == ["daily", "@1", "hourly", "weekly"]


@pytest.mark.spec("IMG-1")
def test_an_option_takes_any_argument_as_its_value(folder: Path) -> None:
    assert run(["bitmap", "--add", "vm.qcow2", "--", "--add"], folder).status == 0
    assert run(["bitmap", "--merge", "--add", "vm.qcow2", "daily"], folder).status == 0
    assert "'--' not found" in failed(folder, ["--merge", "--", "vm.qcow2", "daily"])
    assert "'' not found" in failed(folder, ["--merge=", "vm.qcow2", "daily"])
    assert "'--clear'" in failed(folder, ["--merge", "daily", "-b", "--clear", "vm.qcow2", "daily"])


@pytest.mark.spec("IMG-5")
@pytest.mark.parametrize(
    "filename",
    ["./a,b:c", "file:a,b:c", 'json:{"file":{"filename":"a,b:c"}}', "--im file.filename=a,,b:c"],
)
def test_odd_paths(folder: Path, filename: str) -> None:
    assert run(["bitmap", "--remove", *filename.split(" "), "daily"], folder).status == 0
    assert "daily" not in bitmaps(folder, "a,b:c")


@pytest.mark.spec("IMG-1")
@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64k", 65536),
        ("64K", 65536),
        ("  +64k", 65536),
        ("0x10000", 65536),
        ("0x1b", 27),
        ("0x10k", 16384),
        ("512b", 512),
        ("1.", 1),
        ("0.5M", 1 << 19),
        ("1.5k", 1536),
        ("7e", 7 << 60),
        ("1p", 1 << 50),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert granularity(text) == size


@pytest.mark.spec("IMG-1")
@pytest.mark.parametrize(
    "text",
    ["", "k", "-1", "1.5", ".5k", "64KiB", "64kk", "64 k", "64k ", "1e3", "0x", "0x.8", "inf",
     "8E", "9223372036854775808", "9" * 5000, "\u0661"],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^Invalid granularity specified: "):
        granularity(text)


def test_help(folder: Path) -> None:
    text = run(["bitmap", "--help"], folder)
    assert (text.status, text.err) == (0, "")
    for arguments in (["-h"], ["--he"], ["--add", "-h", "--bogus"], ["-hx"]):
        assert run(["bitmap", *arguments], folder) == text


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.spec("IMG-2", "IMG-3")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"),
        ("vm.qcow2 daily", "Need at least one of --add, "),
        ("-- --add vm.qcow2 new", "Need at least one of --add, "),
        ("--add", "Expecting filename and bitmap name"),
        ("--add vm.qcow2", "Expecting filename and bitmap name"),
        ("--add vm.qcow2 a b", "Expecting filename and bitmap name"),
        ("--bogus --help", "unrecognized option '--bogus'"),
        ("--add=1 vm.qcow2 new", "unrecognized option '--add=1'"),
        ("--add -x vm.qcow2 new", "unrecognized option '-x'"),
        ("--s old.qcow2", "unrecognized option '--s'"),
        ("--form qcow2", "unrecognized option '--form'"),
        ("--remove-a vm.qcow2", "unrecognized option '--remove-a'"),
        ("-g", "missing argument for option '-g'"),
        ("--add vm.qcow2 new --gran", "missing argument for option '--gran'"),
        ("--color=pink --add vm.qcow2 new", "invalid choice: 'pink'"),
        ("-g foo --bogus", 'Invalid granularity specified: "foo"'),
        ("--clear -g 4k -F qcow2 vm.qcow2", "granularity only supported with --add"),
        ("--clear -F qcow2 vm.qcow2", "-F only supported with -b"),
        ("--clear -b x vm.qcow2", "Merge bitmap source file only supported with --merge"),
        ("--add --im -f qcow2 file.filename=vm.qcow2 new",
         "--image-opts and --format are mutually exclusive"),
        ("--add --object secret,id=key vm.qcow2 new", "--object is not supported: "),
    ],
)  # fmt: skip
def test_wrong_usage(folder: Path, arguments: str, said: str) -> None:
    line = failed(folder, arguments.split())
    assert line.startswith(f"qcow2bm: error: {said}")
    assert line.endswith("; see qcow2bm bitmap --help")


@pytest.mark.spec("IMG-3", "IMG-5")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--add none new", "Could not open 'none': No such file or directory"),
        ("--add . new", "Could not open '.': is a directory"),
        ("--add a,b:c new", "Could not open 'a,b:c': Unknown protocol 'a,b'"),
        ("--add -f raw vm.qcow2 new", "Could not open 'vm.qcow2': the format is not qcow2"),
        ("--add json:{} new", "Could not open 'json:{}': The 'file' block driver requires a file"),
        ("--add json:[] new", "Could not open 'json:[]': Invalid JSON object given"),
        ("--add json:{ new", "Could not open 'json:{': Could not parse the JSON options: "),
        ('--add json:{"file":{"filename":"a"},"file.filename":"b"} new',
         "Could not open 'json:{\\\"file\\\":{\\\"filename\\\":\\\"a\\\"},"),
        ("--add --im file.filename=vm.qcow2,file.driver=nbd new",
         "Could not open 'file.filename=vm.qcow2,file.driver=nbd': file.driver is not file"),
        ("--add --im file.filename=vm.qcow2,x=1 new",
         "Could not open 'file.filename=vm.qcow2,x=1': option \"x\" is not supported"),
        ("--add vm.qcow2 daily", "Operation add on bitmap daily failed: Bitmap already exists: "
         "daily"),
        ("--add -g 511 vm.qcow2 new",
         "Operation add on bitmap new failed: Granularity must be power of 2 and at least 512"),
        ("--add -g 4G vm.qcow2 new", "Operation add on bitmap new failed: Granularity must be "),
        ("--clear vm.qcow2 new", "Operation clear on bitmap new failed: Dirty bitmap 'new' not "
         'found; the image has "daily", '),
        ("--merge none vm.qcow2 daily",
         "Operation merge on bitmap daily failed: Dirty bitmap 'none' not found"),
        ("--merge crashed -b old.qcow2 vm.qcow2 daily",
         "Operation merge on bitmap daily failed: Bitmap 'crashed' is inconsistent and cannot be "
         "used"),
        ("--merge daily -b none vm.qcow2 daily", "Could not open 'none': No such file"),
        ("--merge daily -b vm.qcow2 vm.qcow2 daily",
         "Could not open 'vm.qcow2': Failed to get shared \"write\" lock: in use by this "),
    ],
)  # fmt: skip
def test_failures_have_the_words_of_qemu_img(folder: Path, arguments: str, said: str) -> None:
    assert failed(folder, arguments.split(" ")).startswith(f"qcow2bm: {said}")


@pytest.mark.spec("IMG-3")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "Bitmap name cannot be empty"),
        ("n" * 1024, f"Can't make bitmap '{'n' * 1024}' persistent: a name has 1 to 1023 bytes"),
    ],
)
def test_names_that_cannot_be(folder: Path, name: str, said: str) -> None:
    line = failed(folder, ["--add", "vm.qcow2", name])
    assert line.startswith(f"qcow2bm: Operation add on bitmap {name} failed: {said}")


@pytest.mark.spec("IMG-3")
def test_a_message_is_one_line_whatever_the_name(folder: Path) -> None:
    line = failed(folder, ["--remove", "vm.qcow2", 'a\n"\x1b'])
    assert r"on bitmap a\n\"\x1b failed: Dirty bitmap 'a\n\"\x1b' not found" in line


@pytest.mark.spec("IMG-3")
def test_an_image_in_use(folder: Path) -> None:
    with qcow2bm.open(folder / "vm.qcow2", "r+"):
        line = failed(folder, ["--add", "vm.qcow2", "new"])
    assert line.startswith("qcow2bm: Could not open 'vm.qcow2': Failed to get \"write\" lock: in u")
    assert "lock byte 10" in line


def test_disks_of_different_sizes(folder: Path) -> None:
    (folder / "big.qcow2").write_bytes(build_image(STORED[0], size=2 * SIZE).data)
    line = failed(folder, ["--merge", "daily", "-b", "big.qcow2", "vm.qcow2", "daily"])
    assert "Bitmaps are of different sizes (destination size is 10485760, source size is " in line


@pytest.mark.spec("IMG-4")
@pytest.mark.parametrize(
    "actions", ["--add --add", "--add --merge=none", "--add --remove --clear", "--add --bogus"]
)
def test_if_an_action_fails_none_is_done(folder: Path, actions: str) -> None:
    failed(folder, [*actions.split(), "vm.qcow2", "new"])
    assert bitmaps(folder) == BEFORE


# --- names, and all bitmaps ---------------------------------------------------------------------


@pytest.mark.spec("IMG-6")
def test_names_are_literal(folder: Path) -> None:
    assert run(["bitmap", "--merge", "@1", "vm.qcow2", "daily"], folder).status == 0
    assert bitmaps(folder)["daily"][2] == [(0, 3 * 65536)]
    assert run(["bitmap", "--remove", "vm.qcow2", "@1"], folder).status == 0
    assert list(bitmaps(folder)) == ["daily", "weekly", "hourly"]
    assert "'@0' not found" in failed(folder, ["--remove", "vm.qcow2", "@0"])
    assert run(["bitmap", "--add", "vm.qcow2", "@0"], folder).status == 0
    assert list(bitmaps(folder)) == ["daily", "weekly", "hourly", "@0"]


@pytest.mark.spec("IMG-7")
@pytest.mark.parametrize("autoclear", [True, False])
def test_all_bitmaps_are_removed(folder: Path, autoclear: bool) -> None:
    image = build_image(*STORED, CRASHED, size=SIZE, autoclear=autoclear)
    (folder / "vm.qcow2").write_bytes(image.data)
    assert run(["bitmap", "--remove-all", "vm.qcow2"], folder) == Result(0, "", "")
    assert bitmaps(folder) == {}


@pytest.mark.spec("IMG-7")
@pytest.mark.parametrize(
    "arguments",
    ["--remove-all", "--remove-all vm.qcow2 daily", "--remove-all --add vm.qcow2",
     "--add --remove-all vm.qcow2 daily"],
)  # fmt: skip
def test_remove_all_stands_alone(folder: Path, arguments: str) -> None:
    assert "--remove-all stands alone" in failed(folder, arguments.split())


def test_stale_bitmaps_are_kept(folder: Path) -> None:
    (folder / "vm.qcow2").write_bytes(build_image(*STORED, size=SIZE, autoclear=False).data)
    for action, name in (("--add", "new"), ("--clear", "daily"), ("--remove", "daily")):
        line = failed(folder, [action, "vm.qcow2", name])
        assert "stale" in line
        assert line.startswith(f"qcow2bm: Operation {action[2:]} on bitmap {name} failed: ")


def test_an_image_with_a_fault_is_not_edited(folder: Path) -> None:
    image = build_image(*STORED, size=SIZE)
    image.plant(1, "header", 0, "incompatible_features")
    (folder / "vm.qcow2").write_bytes(image.data)
    line = failed(folder, ["--add", "vm.qcow2", "new"])
    assert line.startswith("qcow2bm: Could not open 'vm.qcow2': header: ")
