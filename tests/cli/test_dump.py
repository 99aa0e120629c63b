"""What ``dump`` shows of the header, of snapshots, of space, and of other processes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.console import run
from support.images import ONES, ZEROES, Built, Stored, build_image, extension
from support.jsonspec import check_dump
from support.layouts import append, virtual_size, with_snapshots

from qcow2bm.cli.dump_bitmap import _BLOCK_ROWS
from qcow2bm.format.extensions import BACKING_FORMAT, DATA_FILE
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.storage.locks import READER, WRITER, Role, held_locks

CLUSTER = 512
COVERED = 8 * CLUSTER << 9  # bytes of the disk, by a cluster of bits of the finest granularity


def dumped(folder: Path, data: bytes | bytearray, *options: str) -> dict[str, Any]:
    """The document of a dump of an image without serious problems."""
    (folder / "vm.qcow2").write_bytes(data)
    result = run(["dump", "--json", *options, "vm.qcow2"], folder)
    assert (result.status, result.err) == (0, "")
    document: dict[str, Any] = json.loads(result.out)
    check_dump(document)
    return document


def facts(folder: Path, data: bytes | bytearray, *options: str) -> dict[str, str]:
    """The facts about the image in a dump for people, by their labels."""
    (folder / "vm.qcow2").write_bytes(data)
    out = run(["dump", *options, "vm.qcow2"], folder).out
    head = out.partition("\n\n")[0]
    return dict(re.findall(r"^([\w ]+): +(.*)$", head, re.M))


# --- the header -----------------------------------------------------------------------------------


def test_a_plain_image(tmp_path: Path) -> None:
    built = build_image(Stored(b"daily", [b"\x01"]), additional_fields=bytes(8))
    document = dumped(tmp_path, built.data)
    expected = {
        "header-length": 120,
        "compression-type": "zlib",
        "encryption-method": "none",
        "backing-file": None,
        "backing-format": None,
        "data-file": None,
        "data-file-raw": False,
        "l1-table": {"offset": 3 * CLUSTER, "entries": 32},
        "refcount-table": {"offset": CLUSTER, "clusters": 1},
        "snapshots": [],
    }
    assert {key: document[key] for key in expected} == expected
    assert not {"compression", "encryption", "snapshots"} & facts(tmp_path, built.data).keys()


@pytest.mark.parametrize("format_", [None, b"raw", b"odd \xff"])
def test_a_backing_file(tmp_path: Path, format_: bytes | None) -> None:
    extensions = [] if format_ is None else [extension(BACKING_FORMAT, format_)]
    data = build_image(backing_name=b"base \xff", extensions=extensions).data
    document = dumped(tmp_path, data)
    shown = None if format_ is None else format_.decode("utf-8", "replace")
    assert document["backing-file"] == "base \ufffd"
    assert document["backing-format"] == shown
    said = {
        None: "not opened",
        b"raw": "format raw, not opened",
        b"odd \xff": r"format odd \xff, not opened",
    }[format_]
    assert facts(tmp_path, data)["backing file"] == rf'"base \xff" ({said})'


@pytest.mark.parametrize(("autoclear", "is_raw"), [(1, False), (3, True)])
def test_a_data_file(tmp_path: Path, autoclear: int, is_raw: bool) -> None:
    data = build_image(
        Stored(b"daily"),
        header={"incompatible_features": 4, "autoclear_features": autoclear},
        extensions=[extension(DATA_FILE, b"disk.raw")],
    ).data
    document = dumped(tmp_path, data)
    assert (document["data-file"], document["data-file-raw"]) == ("disk.raw", is_raw)
    said = "raw, not opened" if is_raw else "not opened"
    assert facts(tmp_path, data)["data file"] == f'"disk.raw" ({said})'


def test_an_image_of_version_2(tmp_path: Path) -> None:
    document = dumped(tmp_path, build_image(version=2).data)
    assert (document["version"], document["header-length"]) == (2, 72)
    assert document["compression-type"] == "zlib"


@pytest.mark.parametrize(("value", "shown", "said"), [(1, "zstd", "zstd"), (7, 7, "7 (unknown)")])
def test_a_compression_type(tmp_path: Path, value: int, shown: object, said: str) -> None:
    built = build_image(header={"incompatible_features": 8})
    built.data[FIELD_OFFSETS["compression_type"]] = value
    (tmp_path / "vm.qcow2").write_bytes(built.data)
    document = json.loads(run(["dump", "--json", "vm.qcow2"], tmp_path).out)
    check_dump(document)
    assert document["compression-type"] == shown
    assert facts(tmp_path, built.data)["compression"] == said


@pytest.mark.parametrize(
    ("value", "shown", "said"), [(1, "aes", "aes"), (2, "luks", "luks"), (9, 9, "9 (unknown)")]
)
def test_an_encryption_method(tmp_path: Path, value: int, shown: object, said: str) -> None:
    built = build_image(header={"crypt_method": value})
    (tmp_path / "vm.qcow2").write_bytes(built.data)
    document = json.loads(run(["dump", "--json", "vm.qcow2"], tmp_path).out)
    check_dump(document)
    assert document["encryption-method"] == shown
    assert facts(tmp_path, built.data)["encryption"] == said


def test_snapshots(tmp_path: Path) -> None:
    data = with_snapshots()
    document = dumped(tmp_path, data)
    assert document["snapshots"] == [
        {
            "id": str(number),
            "name": "s",
            "offset": len(data) - 4096 + 72 * number,
            "size": 72,
            "l1-table": {"offset": len(data) - (3 - number) * 4096, "entries": 21},
            "date-sec": 0,
            "date-nsec": 0,
            "vm-clock-nsec": 0,
            "vm-state-size": 0,
            "virtual-size": virtual_size(12),
            "icount": 0,
        }
        for number in range(2)
    ]
    assert facts(tmp_path, data)["snapshots"] == '2 ("s", "s")'


def test_a_snapshot_table_that_is_cut_off_is_not_known(tmp_path: Path) -> None:
    data = with_snapshots()[: -4096 + 80]
    (tmp_path / "vm.qcow2").write_bytes(data)
    document = json.loads(run(["dump", "--json", "vm.qcow2"], tmp_path).out)
    check_dump(document)
    assert document["snapshots"] is None
    assert facts(tmp_path, data)["snapshots"] == "not known: the snapshot table is damaged"


# --- space ----------------------------------------------------------------------------------------


def test_space_in_the_image_file(tmp_path: Path) -> None:
    data = build_image(Stored(b"a", [b"\x01"]), Stored(b"b")).data
    end = len(data)
    for _ in range(3):
        append(data, b"free", 0)
    append(data, b"in use")
    append(data, b"free", 0)
    bitmaps = {"directory": CLUSTER, "tables": 2 * CLUSTER, "data": CLUSTER, "total": 4 * CLUSTER}
    for options in ([], ["--bitmap", "b"]):
        document = dumped(tmp_path, data, *options)
        assert document["image-end-offset"] == end + 4 * CLUSTER
        assert document["bitmap-space"] == bitmaps
        assert "free-bytes" not in document
    assert document["bitmaps"][0]["space"] == {
        "directory": 32,
        "tables": CLUSTER,
        "data": 0,
        "total": CLUSTER + 32,
    }
    assert dumped(tmp_path, data, "--space")["free-bytes"] == 3 * CLUSTER
    said = facts(tmp_path, data, "--space")
    assert said["free"] == "1.5 KiB (1536 bytes), before the image end"
    assert said["bitmap space"] == "2 KiB: directory 512 bytes, tables 1 KiB, data 512 bytes"
    assert "free" not in facts(tmp_path, data)


def test_space_that_is_not_known(tmp_path: Path) -> None:
    built = build_image(Stored(b"a", [b"\x01"]))
    built.plant(0x401, "refcount-table", 0, 0)
    document = dumped(tmp_path, built.data, "--space")
    assert (document["image-end-offset"], document["free-bytes"]) == (None, None)
    said = facts(tmp_path, built.data, "--space")
    assert (said["image end"], said["free"]) == ("not known", "not known, before the image end")


# --- table entries --------------------------------------------------------------------------------


def alternating(entries: int) -> Built:
    """A bitmap whose table entries are all-ones and all-zeroes in turn."""
    words = ([ONES, ZEROES] * entries)[:entries]
    return build_image(Stored(b"daily", words, granularity_bits=9), size=entries * COVERED)


@pytest.mark.parametrize("entries", [1, _BLOCK_ROWS, _BLOCK_ROWS + 1])
def test_all_entries_are_listed(tmp_path: Path, entries: int) -> None:
    data = alternating(entries).data
    (bitmap,) = dumped(tmp_path, data, "--entries", "--no-count")["bitmaps"]
    kinds = ("all-ones", "all-zeroes")
    assert bitmap["entries"] == [
        {"first": number, "entries": 1, "kind": kinds[number % 2], "offset": None, "word": None}
        for number in range(entries)
    ]
    out = run(["dump", "--entries", "--no-count", "vm.qcow2"], tmp_path).out
    listed = re.findall(r"^ +(\d+) +1  (all-\w+)$", out, re.M)
    assert listed == [(str(number), kinds[number % 2]) for number in range(entries)]


def test_entries_stand_before_extents(tmp_path: Path) -> None:
    (bitmap,) = dumped(tmp_path, alternating(2).data, "--entries", "--extents")["bitmaps"]
    assert list(bitmap)[-2:] == ["entries", "extents"]
    assert bitmap["extents"] == [{"start": 0, "length": COVERED}]


# --- other processes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "answer", "said"),
    [
        (READER, "reader", "by another process, which reads the image"),
        (
            WRITER,
            "writer",
            "by another process, which writes to the image: what follows may be outdated",
        ),
        (None, "no", None),
    ],
)
def test_another_process(tmp_path: Path, role: Role | None, answer: str, said: str | None) -> None:
    data = alternating(1).data
    path = tmp_path / "vm.qcow2"
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        if role:
            locks = held_locks(file, "vm.qcow2", role)
            locks.__enter__()
        shared = json.loads(run(["dump", "--json", "-U", "vm.qcow2"], tmp_path).out)
        check_dump(shared)
        assert shared["in-use-by-another-process"] == answer
        out = run(["dump", "-U", "vm.qcow2"], tmp_path).out
        assert re.findall(r"^in use: +(.*)$", out, re.M) == ([said] if said else [])
        plain = run(["dump", "--json", "vm.qcow2"], tmp_path)
        assert plain.status == (1 if answer == "writer" else 0)
        if answer != "writer":
            assert json.loads(plain.out) == shared
        if role:
            locks.__exit__(None, None, None)
