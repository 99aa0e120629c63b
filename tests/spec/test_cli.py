"""The requirements of spec/cli.md and spec/json.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.jsonspec import check_dry_run, check_dump, check_map, failure_in
from support.kinds import FITTABLE
from support.problem_images import IDS, broken
from support.spec_image import DAILY, image, in_table, patched
from support.specreader import ROOT, page

import qcow2bm
from qcow2bm.cli import main
from qcow2bm.problem_kinds import KINDS

USAGE = 64


class Done(NamedTuple):
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Runs commands on an image of its own."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capsys = capsys
        self.write(image())

    def write(self, data: bytes) -> None:
        self.path.write_bytes(data)

    def run(self, *arguments: str) -> Done:
        """``IMAGE`` among the arguments is the image's path."""
        try:
            status = main([str(self.path) if text == "IMAGE" else text for text in arguments])
        except SystemExit as end:
            status = int(str(end.code))
        return Done(status, *self._capsys.readouterr())


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path / "image.qcow2", capsys)


def failed(done: Done, *, in_json: bool = False) -> bool:
    """Whether a command ended as a command that failed must end."""
    line, *more = done.err.splitlines()
    if in_json:
        return done.status == 1 and bool(failure_in(done.out, done.err))
    assert all(one.startswith("  ") for one in more)
    return done.status == 1 and line.startswith("qcow2bm: ") and done.out == ""


@pytest.mark.spec("CLI-1")
def test_what_every_reading_command_has() -> None:
    rows = page("cli.md").table("Options").rows
    of = {row["option"]: row["of"] for row in rows}
    assert (of["--output"], of["-U, --force-share"]) == (
        "dump, map, check, measure, verdict, verify, backup, prune, repair, undo, recover, "
        "salvage, stream dump, stream restore, sidecar load, sidecar dump, edits, live offload, "
        "live restore, live record, live collect, live status, live remove, rescues",
        "dump, map, check, measure, stream write, sidecar save",
    )
    assert of["--dry-run"] == (
        "backup, prune, repair, undo, recover, salvage, edits, stream restore, sidecar load, "
        "live offload, live restore, rescue start, rescue finish"
    )
    assert {of["--wait"], of["--no-lock"]} == {
        "backup, prune, repair, undo, recover, salvage, edits, stream restore, sidecar load, "
        "live restore, rescue finish"
    }


@pytest.mark.spec("CLI-2")
def test_where_options_may_stand(cli: Cli) -> None:
    plain = cli.run("map", "IMAGE", "daily", "--totals")
    assert plain.status == 0
    assert cli.run("map", "--totals", "IMAGE", "daily") == plain
    assert cli.run("map", "IMAGE", "--totals", "--", "daily") == plain
    assert cli.run("map", "IMAGE", "daily", "--total").status == USAGE


@pytest.mark.spec("CLI-3")
def test_version(cli: Cli) -> None:
    assert cli.run("--version") == (0, f"qcow2bm {qcow2bm.__version__}\n", "")


@pytest.mark.parametrize(
    "wrong", [["nonsense"], ["dump"], ["map", "IMAGE"], ["dump", "-x", "IMAGE"]]
)
def test_wrong_usage(cli: Cli, wrong: list[str]) -> None:
    done = cli.run(*wrong)
    assert (done.status, done.out) == (USAGE, "")
    assert len(done.err.splitlines()) == 1


def renamed(daily: bytes, crashed: bytes = b"crashed") -> bytes:
    """The image with two of its bitmaps renamed, of the same lengths."""
    return image().replace(b"daily", daily).replace(b"crashed", crashed)


@pytest.mark.spec("CLI-4")
@pytest.mark.parametrize(
    ("name", "argument"),
    [("@rose", "@@rose"), ("@@pin", "@@@pin"), ("-json", "-json"), ("--all", "--all")],
)
def test_odd_names(cli: Cli, name: str, argument: str) -> None:
    cli.write(renamed(name.encode()))
    expected = cli.run("map", "IMAGE", "@0")
    assert expected.status == 0
    assert cli.run("map", "IMAGE", "--", argument) == expected
    if argument.startswith("@"):
        assert failed(cli.run("map", "IMAGE", name))


@pytest.mark.spec("CLI-4")
@pytest.mark.parametrize("argument", ["@3", "@-1", "@x", "@", "@1.0", "nope", ""])
def test_names_of_no_bitmap(cli: Cli, argument: str) -> None:
    assert failed(cli.run("map", "IMAGE", argument))
    assert failed(cli.run("dump", "IMAGE", "--bitmap", argument))


@pytest.mark.spec("CLI-5")
def test_a_name_of_several_entries(cli: Cli) -> None:
    cli.write(broken("directory-entry.name.duplicate"))
    done = cli.run("dump", "IMAGE", "--bitmap", "daily")
    assert failed(done)
    assert "@0, @1" in done.err


@pytest.mark.spec("CLI-6")
def test_names_are_escaped_in_text(cli: Cli) -> None:
    cli.write(renamed(b'\x1b\n\xff"\\'))
    done = cli.run("dump", "IMAGE")
    assert done.status == 0
    assert r'"\x1b\n\xff\"\\"' in done.out
    assert "\x1b" not in done.out


@pytest.mark.spec("CLI-7")
@pytest.mark.parametrize("content", [b"", b"not an image" * 100])
def test_what_cannot_be_opened(cli: Cli, content: bytes) -> None:
    cli.write(content)
    assert failed(cli.run("dump", "IMAGE"))
    assert failed(cli.run("dump", "IMAGE", "--output=json"), in_json=True)
    assert failed(cli.run("map", "IMAGE", "daily", "--output=json"), in_json=True)
    cli.path.unlink()
    assert failed(cli.run("dump", "IMAGE"))
    assert failed(cli.run("dump", "IMAGE", "--output=json"), in_json=True)


@pytest.mark.spec("CLI-8")
def test_the_status_of_inconsistent_bitmaps(cli: Cli) -> None:
    assert cli.run("dump", "IMAGE").status == 0
    assert failed(cli.run("map", "IMAGE", "crashed", "--output=json"), in_json=True)


@pytest.mark.spec("CLI-9")
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_reader_that_goes_away(cli: Cli) -> None:
    import signal

    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qcow2bm", "dump", str(cli.path)],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


@pytest.mark.spec("CLI-10")
def test_warnings_of_map(cli: Cli) -> None:
    cli.write(broken("bitmaps-extension.nb_bitmaps.less"))
    loud = cli.run("map", "IMAGE", "daily")
    quiet = cli.run("map", "IMAGE", "daily", "-q")
    assert (loud.status, quiet.status) == (2, 2)
    assert loud.out == quiet.out
    assert "nb_bitmaps" in loud.err
    assert quiet.err == ""


@pytest.mark.spec("CLI-14")
def test_bitmap_limits_what_is_shown_and_not_the_status(cli: Cli) -> None:
    cli.write(broken("directory-entry.type.unknown"))
    whole = cli.run("dump", "IMAGE", "--output=json").json
    one = cli.run("dump", "IMAGE", "--output=json", "--bitmap", "weekly")
    assert one.status == 2
    assert one.json == whole | {"bitmaps": whole["bitmaps"][1:2]}
    text = cli.run("dump", "IMAGE", "--bitmap", "weekly")
    assert (text.status, text.err) == (2, "")
    assert "no problems found" in text.out
    assert "1 problem more in other bitmaps\n" in text.out
    assert 'bitmap 0: "daily"' not in text.out
    assert cli.run("dump", "IMAGE", "--bitmap", "weekly", "--no-count").status == 2


def usable_part(done: Done) -> list[str]:
    """The lines of a dump from the line on that says what is usable for a backup."""
    lines = done.out.splitlines()
    return lines[
        next((n for n, text in enumerate(lines) if text.startswith("usable")), len(lines)) :
    ]


@pytest.mark.spec("CLI-15")
def test_a_dump_says_what_is_usable(cli: Cli) -> None:
    def salvage(*names: str) -> list[str]:
        quoted = ", ".join(f'"{name}"' for name in names)
        return [
            f"writes may be missing from {quoted}",
            f"  next: qcow2bm salvage {cli.path} --all --all-dirty",
            "        cost: the next incremental backup saves the whole disk"
            + ", by each of them" * (len(names) > 1),
        ]

    assert usable_part(cli.run("dump", "IMAGE")) == [
        "usable for a backup: 1 of 3 bitmaps (1 disabled, 1 inconsistent)",
        *salvage("crashed"),
    ]
    assert usable_part(cli.run("dump", "IMAGE", "--bitmap=weekly")) == [
        "usable for a backup: 0 of 1 bitmap (1 disabled)",
        *salvage("crashed"),
    ]
    assert usable_part(cli.run("dump", "IMAGE", "--bitmap=daily")) == []
    assert usable_part(cli.run("dump", "IMAGE", "--bitmap=crashed")) == [
        "usable for a backup: 0 of 1 bitmap (1 inconsistent)",
        *salvage("crashed"),
    ]
    cli.write(patched(image(), in_table(DAILY, 1 << 60)))
    first, second, *_ = usable_part(cli.run("dump", "IMAGE"))
    assert first == "usable for a backup: 0 of 3 bitmaps (1 broken, 1 disabled, 1 inconsistent)"
    assert second == "QEMU will not open this image"
    cli.write(broken("bitmaps-extension.autoclear.off"))
    assert usable_part(cli.run("dump", "IMAGE")) == [
        "usable for a backup: 0 of 3 bitmaps (3 stale)",
        *salvage("daily", "weekly", "crashed"),
    ]


@pytest.mark.spec("CLI-16")
@pytest.mark.parametrize("id", [id for id in IDS if KINDS[id].severity == "refused"])
def test_a_dump_says_how_to_mend_the_image_where_that_helps(cli: Cli, id: str) -> None:
    cli.write(broken(id))
    lines = cli.run("dump", "IMAGE").out.splitlines()
    said = lines[lines.index("QEMU will not open this image") + 1 :]
    if KINDS[id].structure in ("header", "header extension", "snapshot table"):
        if id == "header-extension.bitmaps.length":
            assert "next: qcow2bm repair" in said[1]
        elif id == "header.incompatible_features.unknown":
            assert "use a newer program" in said[0]
        else:
            assert "from a copy" in said[0]
    elif id in FITTABLE:
        assert said[1] == f"  next: qcow2bm fit {cli.path} --all"
    else:
        undo = f"{cli.path}.undo"
        assert said[1] == f"  next: qcow2bm repair {cli.path} --undo {undo}"


@pytest.mark.spec("CLI-15")
@pytest.mark.parametrize("id", [None, *IDS])
def test_a_dump_counts_as_usable_what_the_verdict_says(cli: Cli, id: str | None) -> None:
    if id:
        cli.write(broken(id))
    with qcow2bm.open(cli.path) as opened:
        reasons = [opened.bitmap(entry.index).verdict().reason for entry in opened.directory]
    found = usable_part(cli.run("dump", "IMAGE"))
    if set(reasons) <= {"usable"}:
        assert found == []
        return
    usable = reasons.count("usable")
    of = f"{len(reasons)} bitmap{'s' * (len(reasons) > 1)}"
    assert found[0].startswith(f"usable for a backup: {usable} of {of} (")
    for reason in set(reasons) - {"usable"}:
        assert f"{reasons.count(reason)} {reason}" in found[0]


KEYS_OF_SCHEMA_1 = {
    "dump": "schema filename version virtual-size cluster-size file-size refcount-bits features "
    "extensions bitmap-directory bitmaps problems",
    "Features": "incompatible compatible autoclear",
    "Feature": "bit name",
    "Extension": "type name offset length",
    "Directory": "nb-bitmaps offset size consistent",
    "Bitmap": "index name granularity flags type status bitmap-table-offset bitmap-table-size "
    "clusters dirty-bytes",
    "Clusters": "all-zeroes all-ones allocated",
    "Extent": "start length",
    "verdict": "schema filename bitmap usable reason message dirty-bytes next",
    "verify": "schema filename bitmap backup missing proved missing-bytes dirty-bytes "
    "compared-bytes",
    "Problem": "id severity structure field offset message bitmap bitmap-index",
    "map": "offset length type description",
    "map totals": "size percent type description",
    "stream dump": "schema complete bitmaps problems",
    "Stream bitmap": "node-alias bitmap-alias granularity enabled persistent complete dirty-bytes "
    "sha256",
    "Stream problem": "structure field offset message",
    "live offload": "schema qmp filename dry-run tail-granularity stop-bytes-before stop-bytes "
    "exact limit bitmaps left",
    "Limit": "fits rounds fitting-granularity",
    "Written": "exact dirty-bytes reason",
    "live record": "schema qmp filename recorders",
    "live collect": "schema qmp filename recorders",
    "Recorder": "node granularity dirty-bytes",
    "Offloaded bitmap": "node name granularity enabled",
    "Bitmap that stays": "node name reason",
    "live restore": "schema filename qmp image bitmaps",
    "Returned bitmap": "node name outcome reason written",
    "live status": "schema qmp filename status migration stop-bytes bitmaps nodes next",
    "Live bitmap": "node name granularity dirty-bytes recording persistent busy inconsistent "
    "stop-bytes",
    "live remove": "schema qmp removed",
    "Removed bitmap": "node name",
    "Offloaded node": "node step reason bitmaps",
    "Place of a bitmap": "name where",
    "rescue start": "schema qmp dry-run migration bitmaps",
    "Rescued bitmap": "node name granularity dirty-bytes outcome verified-by sha256 reason",
    "rescue arm": "schema qmp nodes block-bitmap-mapping set obstacles",
    "Armed node": "node sentinel granularity new",
    "rescue verdict": "schema qmp nodes",
    "Judged node": "node verdict reason armed bitmaps",
    "Judged bitmap": "name outcome reason",
    "rescue finish": "schema filename dry-run bitmaps",
    "Finished bitmap": "copy name outcome reason",
}
"""The keys that a reader of schema 1 may rely on; not to be changed."""


@pytest.mark.spec("JSON-1")
def test_no_key_is_gone_in_schema_1() -> None:
    assert page("json.md").table("dump").rows[0]["value"] == "1"
    for heading, keys in KEYS_OF_SCHEMA_1.items():
        assert set(keys.split()) <= set(page("json.md").table(heading).column("key")), heading


@pytest.mark.spec("JSON-2")
@pytest.mark.parametrize(
    "options",
    [[], ["--extents"], ["--sha256", "--no-count"], ["--stale"], ["--extents", "--entries"],
     ["--entries", "--space"]],
)  # fmt: skip
def test_a_dump_is_as_stated(cli: Cli, options: list[str]) -> None:
    done = cli.run("dump", "IMAGE", "--output=json", *options)
    assert (done.status, done.err) == (0, "")
    check_dump(done.json)
    assert ("free-bytes" in done.json) == ("--space" in options)
    for bitmap in done.json["bitmaps"]:
        assert ("extents" in bitmap) == ("--extents" in options)
        assert ("entries" in bitmap) == ("--entries" in options)
        assert ("sha256" in bitmap) == (options[:1] in (["--extents"], ["--sha256"]))
        assert (bitmap["dirty-bytes"] is None) == (
            "--no-count" in options or (bitmap["status"] != "valid" and "--stale" not in options)
        )


@pytest.mark.spec("JSON-2")
@pytest.mark.parametrize("id", IDS)
def test_a_dump_of_a_broken_image_is_as_stated(cli: Cli, id: str) -> None:
    cli.write(broken(id))
    done = cli.run("dump", "IMAGE", "--output=json", "--extents", "--entries", "--space")
    check_dump(done.json)
    found = done.json["problems"]
    assert id in [problem["id"] for problem in found]
    serious = any(problem["severity"] in ("refused", "unusable", "leak") for problem in found)
    assert done.status == (2 if serious else 0)


@pytest.mark.spec("JSON-3")
def test_extents_and_maps_agree(cli: Cli) -> None:
    for bitmap in cli.run("dump", "IMAGE", "--output=json", "--extents").json["bitmaps"][:2]:
        name = bitmap["name"]
        full = cli.run("map", "IMAGE", name, "--output=json").json
        dirty = cli.run("map", "IMAGE", name, "--output=json", "--dirty").json
        totals = cli.run("map", "IMAGE", name, "--output=json", "--totals").json
        for found in (full, dirty, totals):
            check_map(found)
        ends = [0, *(row["offset"] + row["length"] for row in full)]
        assert [row["offset"] for row in full] == ends[:-1]
        assert ends[-1] == 5242368
        assert all(a["type"] != b["type"] for a, b in pairwise(full))
        assert dirty == [row for row in full if row["type"] == 1]
        assert [{"start": row["offset"], "length": row["length"]} for row in dirty] == bitmap[
            "extents"
        ]
        assert [(row["type"], row["description"]) for row in totals] == [(0, "clean"), (1, "dirty")]
        assert totals[1]["size"] == bitmap["dirty-bytes"] == sum(row["length"] for row in dirty)
        assert sum(row["size"] for row in totals) == 5242368


@pytest.mark.spec("JSON-4")
def test_names_that_are_not_utf8(cli: Cli) -> None:
    cli.write(renamed(b"d\xff\xc3\xa4y", "päckle".encode()))
    done = cli.run("dump", "IMAGE", "--output=json")
    check_dump(done.json)
    first, _, third = done.json["bitmaps"]
    assert (first["name"], first["name-hex"]) == ("d\ufffdäy", "64ffc3a479")
    assert third["name"] == "päckle"
    assert "name-hex" not in third


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": 2}, "dump.schema"),
        ({"version": "3"}, "dump.version"),
        ({"version": True}, "dump.version"),
        ({"new": 1}, "unknown {'new'}"),
        ({"features": {}}, "dump.features: without"),
        ({"bitmaps": {}}, "dump.bitmaps"),
        ({"bitmaps": [{}]}, r"dump.bitmaps\[0\]: without"),
        ({"problems": None}, "dump.problems"),
    ],
)
def test_the_checker_of_documents_finds_faults(
    cli: Cli, change: dict[str, object], complaint: str
) -> None:
    document = cli.run("dump", "IMAGE", "--output=json").json
    with pytest.raises(AssertionError, match=complaint):
        check_dump(document | change)
    del document["problems"]
    with pytest.raises(AssertionError, match=r"without \{'problems'\}"):
        check_dump(document)


def test_the_checker_of_maps_finds_faults() -> None:
    row = {"offset": 0, "length": 512, "type": 1, "description": "dirty"}
    check_map([row])
    for wrong in ({"type": 2}, {"description": "zero"}, {"offset": None}, {"more": 1}):
        with pytest.raises(AssertionError, match=r"map\[0\]"):
            check_map([row | wrong])
    with pytest.raises(AssertionError, match="not a list"):
        check_map(row)


def bitmaps(cli: Cli) -> list[tuple[str, int, bool]]:
    with qcow2bm.open(cli.path) as opened:
        return [(n, b.granularity, b.auto) for n, b in opened.bitmaps.items()]


@pytest.mark.spec("CLI-17")
@pytest.mark.parametrize("size", ["65536", "64k", "64K", "64KiB", "0x10000"])
def test_sizes(cli: Cli, size: str) -> None:
    assert cli.run("add", "IMAGE", "new", "-g", size).status == 0
    assert bitmaps(cli)[-1] == ("new", 65536, True)
    assert cli.run("set", "IMAGE", "new", f"{size}:{size}").status == 0
    with qcow2bm.open(cli.path) as opened:
        assert next(opened.bitmaps["new"].extents()).tolist() == [[65536, 65536]]


@pytest.mark.spec("CLI-17")
@pytest.mark.parametrize("text", ["k", "1x", "1.5M", "-1", "1 k", "0x", "0xk", "1kib"])
def test_what_is_no_size(cli: Cli, text: str) -> None:
    assert cli.run("add", "IMAGE", "new", f"--granularity={text}").status == USAGE
    assert cli.run("set", "IMAGE", "daily", "--", f"0:{text}").status == USAGE
    assert cli.run("set", "IMAGE", "daily", "--", f"{text}:1").status == USAGE


@pytest.mark.spec("CLI-18")
def test_one_command_is_one_edit(cli: Cli) -> None:
    before = cli.path.read_bytes()
    assert failed(cli.run("disable", "IMAGE", "daily", "never there"))
    assert failed(cli.run("set", "IMAGE", "daily", "0:512", "1E:1"))
    assert cli.path.read_bytes() == before
    names = [name for name, _, _ in bitmaps(cli)]
    assert cli.run("remove", "IMAGE", "@1", "@0").status == 0
    assert [name for name, _, _ in bitmaps(cli)] == names[2:]


@pytest.mark.spec("CLI-19")
@pytest.mark.parametrize(
    "command",
    ["add IMAGE new", "remove IMAGE --all", "clear IMAGE daily", "enable IMAGE weekly",
     "disable IMAGE daily", "invalidate IMAGE --all", "rename IMAGE daily new",
     "copy IMAGE daily new -g 1M", "set IMAGE daily 0:1M", "reset IMAGE daily 0:1M",
     "invert IMAGE daily", "fit IMAGE daily", "merge IMAGE daily weekly --op xor"],
)  # fmt: skip
def test_edits_are_silent_and_dry_runs_are_dry(cli: Cli, command: str) -> None:
    said = (
        f'qcow2bm: note: {cli.path}: "weekly" was disabled: all that was written meanwhile is '
        "missing from it\n"
        if command.startswith("enable ")
        else ""
    )
    before = cli.path.read_bytes()
    cli.path.chmod(0o400)
    dry = cli.run(*command.split(), "--dry-run", "--output=json")
    assert (dry.status, dry.err) == (0, said)
    check_dry_run(dry.json)
    steps = dry.json["steps"]
    assert dry.json["bytes"] == sum(step["length"] or 0 for step in steps)
    assert dry.json["barriers"] == sum(step["type"] == "barrier" for step in steps)
    assert sum(step["commit"] for step in steps) == bool(steps)
    text = cli.run(*command.split(), "--dry-run")
    assert text.status == 0
    assert str(dry.json["bytes"]) in text.out or "nothing to write" in text.out
    assert cli.path.read_bytes() == before
    cli.path.chmod(0o600)
    assert cli.run(*command.split()) == Done(0, "", said)
    assert (cli.path.read_bytes() != before) == bool(steps)


@pytest.mark.spec("CLI-20")
def test_a_failed_edit_says_what_is_left(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    real = os.fdatasync
    outcomes = []
    for number in range(3):
        before = bitmaps(cli)
        left = [number]

        def fail_later(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
            real(descriptor)

        monkeypatch.setattr(os, "fdatasync", fail_later)
        done = cli.run("add", "IMAGE", f"new{number}")
        assert failed(done)
        outcomes.append(
            "unknown"
            if "unknown" in done.err
            else "new"
            if "took effect, but" in done.err
            else "old"
        )
        assert (bitmaps(cli) == before) == (outcomes[-1] == "old")
    assert outcomes == ["old", "unknown", "new"]
