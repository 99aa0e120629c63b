"""The tables of spec/ against the schemas and constants of the library."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from support.specreader import Table, page, pages

from qcow2bm import errors, problems
from qcow2bm.bitmaps import backup_verdict, status, table_entries
from qcow2bm.cli import check, commands, failure, messages, output, parser, verdict
from qcow2bm.format import (
    bitmap_table,
    directory,
    extensions,
    features,
    header,
    offload_file,
    refcounts,
    sidecar,
    snapshots,
    stream,
    stream_bitmap,
    stream_ram,
    undo_file,
)
from qcow2bm.format.schema import bit_masks
from qcow2bm.problem_kinds import KINDS
from qcow2bm.storage import interface, locks

FIELD_TABLES: dict[tuple[str, str], Any] = {
    ("header.md", "Fixed fields"): header._V3,
    ("header.md", "Feature name table"): features._ENTRY,
    ("header.md", "Header extensions"): extensions.EXTENSION,
    ("header.md", "Crypto header"): extensions._CRYPTO,
    ("lifecycle.md", "Generation"): extensions._GENERATION,
    ("bitmaps.md", "Bitmaps extension"): extensions._BITMAPS,
    ("bitmaps.md", "Bitmap directory"): directory.ENTRY,
    ("refcounts.md", "Snapshot table"): snapshots.SNAPSHOT,
    ("refcounts.md", "Snapshot extra data"): snapshots.EXTRA_DATA,
    ("repair.md", "Undo file"): undo_file._HEAD,
    ("repair.md", "Step"): undo_file._STEP,
    ("repair.md", "Seal"): undo_file._SEAL,
    ("live.md", "Offload file"): offload_file._HEAD,
    ("live.md", "Record"): offload_file._RECORD,
    ("sidecar.md", "Head"): sidecar._HEAD,
    ("sidecar.md", "Bitmap"): sidecar._BITMAP,
    ("stream.md", "Envelope"): stream._ENVELOPE,
    ("stream.md", "Configuration"): stream._CONFIGURATION,
    ("stream.md", "Sections"): stream._SECTION,
    ("stream.md", "Parts and footers"): stream._PART,
    ("stream.md", "Commands"): stream._COMMAND,
    ("stream.md", "Mapped block"): stream_ram._MAPPED_BLOCK,
    ("stream.md", "Names"): stream_bitmap._NAME,
    ("stream.md", "Start"): stream_bitmap._START,
    ("stream.md", "Bits"): stream_bitmap._BITS,
    ("stream.md", "Buffer"): stream_bitmap._BUFFER,
}
BIT_TABLES = {
    ("bitmaps.md", "Bitmap table"): bitmap_table.ENTRY,
    ("refcounts.md", "Refcount table"): refcounts.TABLE_ENTRY,
}
LENGTHS = {"header_length": (112, 120, 200)}  # of which the formulas speak; else these:
ANY_LENGTH = (0, 1, 7, 8, 19)


def evaluated(cell: str, values: dict[str, int]) -> int:
    """The number a cell stands for; formulas are Python's."""
    return int(eval(cell, {"__builtins__": {}, "min": min}, dict(values)))


def variables(found: Table) -> list[str]:
    """The fields that formulas in a field table speak of."""
    cells = found.column("offset") + found.column("length")
    names = {
        node.id
        for cell in cells
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.Name)
    }
    return sorted(names - {"min"})


def layouts(found: Table, schema: Any) -> Iterator[tuple[list[object], list[object]]]:
    """Rows of (field, offset, length) by the table and by the schema, for some field values."""
    names = variables(found)
    for lengths in itertools.product(*(LENGTHS.get(name, ANY_LENGTH) for name in names)):
        values = dict(zip(names, lengths, strict=True))
        stated: list[object] = [
            (row["field"], evaluated(row["offset"], values), evaluated(row["length"], values))
            for row in found.rows
        ]
        real: list[object] = []
        position = 0
        for field in schema.subcons:
            size = field.sizeof(**values)
            real.append((field.name, position, size))
            position += size
        yield stated, real


@pytest.mark.parametrize("place", FIELD_TABLES, ids=" ".join)
def test_a_field_table_says_what_the_schema_says(place: tuple[str, str]) -> None:
    found = page(place[0]).table(place[1])
    compared = list(layouts(found, FIELD_TABLES[place]))
    assert compared
    for stated, real in compared:
        assert stated == real


@pytest.mark.parametrize("place", BIT_TABLES, ids=" ".join)
def test_a_bit_table_says_what_the_schema_says(place: tuple[str, str]) -> None:
    stated = {}
    for row in page(place[0]).table(place[1]).rows:
        first, _, last = row["bits"].partition("-")
        stated[row["field"]] = (1 << int(last or first) + 1) - (1 << int(first))
    assert stated == bit_masks(BIT_TABLES[place])
    assert sum(stated.values()) == (1 << 64) - 1


def test_no_field_or_bit_table_is_left_out() -> None:
    by_columns = {
        (found.page, found.heading)
        for each in pages()
        for found in each.tables
        if "field" in found.columns and "id" not in found.columns
    }
    assert by_columns == FIELD_TABLES.keys() | BIT_TABLES.keys()


def test_feature_bits() -> None:
    rows = page("header.md").table("Feature bits").rows
    stated = {(row["kind"], int(row["bit"])): row["name"] for row in rows}
    assert stated == features._KNOWN_NAMES
    for kind, known in (
        ("incompatible", features.KNOWN_INCOMPATIBLE),
        ("autoclear", features.KNOWN_AUTOCLEAR),
    ):
        assert sum(1 << bit for of, bit in stated if of == kind) == known


def test_extension_types() -> None:
    rows = page("header.md").table("Types").rows
    stated = {int(row["type"], 16): row["name"] for row in rows}
    assert stated == {extensions.END: "end", **extensions.NAMES}


def test_directory_entry_flags() -> None:
    rows = page("bitmaps.md").table("Flags").rows
    stated = {row["flag"]: 1 << int(row["bit"]) for row in rows}
    prefix = "FLAG_"
    assert stated == {
        name.removeprefix(prefix).lower(): value
        for name, value in vars(directory).items()
        if name.startswith(prefix) and isinstance(value, int)
    }
    assert sum(stated.values()) == directory.KNOWN_FLAGS


def test_record_types_of_a_stream() -> None:
    rows = page("stream.md").table("Record types").rows
    assert {int(row["type"], 16): row["name"] for row in rows} == stream.RECORD_TYPES
    assert all(getattr(stream, name) == type for type, name in stream.RECORD_TYPES.items())


@pytest.mark.parametrize(
    ("heading", "home"),
    [
        ("Records of bitmaps", stream_bitmap),
        ("Flags of a bitmap", stream_bitmap),
        ("RAM", stream_ram),
    ],
)
def test_flags_of_a_stream(heading: str, home: object) -> None:
    rows = page("stream.md").table(heading).rows
    assert rows
    for row in rows:
        assert getattr(home, row["flag"]) == 1 << int(row["bit"])


def test_reserved_flags_of_a_stream() -> None:
    rows = page("stream.md").table("Flags of a bitmap").rows
    assert sum(1 << int(row["bit"]) for row in rows) == 0xFF & ~stream_bitmap.RESERVED_FLAGS


def test_statuses() -> None:
    assert set(page("bitmaps.md").table("Status").column("status")) == set(get_args(status.Status))
    assert alternatives("Bitmap", "status") == set(get_args(status.Status))


def test_severities() -> None:
    stated = page("problems.md").table("Severities").column("severity")
    assert stated == list(problems.SEVERITIES)
    assert alternatives("Problem", "severity") == set(problems.SEVERITIES)


def alternatives(heading: str, key: str) -> set[str]:
    """The literals a key of the JSON may have."""
    rows = page("json.md").table(heading).rows
    (row,) = (row for row in rows if row["key"].removesuffix(", optional") == key)
    return {text.strip('"') for text in row["value"].split(" or ")}


def test_problem_ids() -> None:
    stated, meanings = {}, {}
    for found in page("problems.md").tables:
        if found.heading == "Severities":
            continue
        for row in found.rows:
            severity, _, kept = row["severity"].partition(", ")
            assert kept in ("", "status kept")
            assert row["id"] not in stated
            text = row["what it means, and what to do"]
            meanings[row["id"]] = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)
            assert meanings[row["id"]].endswith(".")
            stated[row["id"]] = (
                found.heading.lower(),
                row["field"],
                severity,
                row["QEMU says"] or None,
                bool(kept),
            )
    expected = {
        id: (
            kind.structure.lower(),
            kind.field,
            kind.severity,
            kind.qemu_message,
            kind.keeps_status,
        )
        for id, kind in KINDS.items()
    }
    assert stated == expected
    assert meanings == {id: kind.meaning for id, kind in KINDS.items()}


def test_error_ids() -> None:
    rows = page("json.md").table("Error ids").rows
    stated = {row["id"]: (row["error"], row["facts"]) for row in rows}
    assert len(stated) == len(rows)
    assert stated == {
        row.id: (kind.__name__, ", ".join(fact.replace("_", "-") for fact in row.facts))
        for kind, row in failure.ERRORS.items()
    }
    facts = {fact for row in rows for fact in row["facts"].split(", ") if fact}
    keys = page("json.md").table("Error").column("key")
    assert keys == ["id", "message", "hint", *sorted(f"{fact}, optional" for fact in facts)]


def test_hints() -> None:
    assert page("json.md").table("Hints").column("hint") == list(get_args(errors.Hint))


@pytest.mark.parametrize(
    ("heading", "key", "literal"),
    [
        ("Table entries", "kind", table_entries.EntryKind),
        ("dump", "in-use-by-another-process", interface.OtherUse),
        ("Error", "outcome", errors.CommitOutcome),
    ],
)
def test_literals(heading: str, key: str, literal: object) -> None:
    assert alternatives(heading, key) - {"null"} == set(get_args(literal))


def test_lock_bytes() -> None:
    rows = page("locking.md").table("Lock bytes").rows
    assert {row["permission"]: int(row["n"]) for row in rows} == {
        row["permission"]: getattr(locks, row["permission"]) for row in rows
    }
    assert [int(row["n"]) for row in rows] == list(range(4))
    assert (locks.HELD, locks.NOT_SHARED) == (100, 200)
    for heading, who, role in (
        ("Readers", "reader", locks.READER),
        ("Writers", "writer", locks.WRITER),
    ):
        rows = page("locking.md").table(heading).rows
        stated = {
            word: {int(row["byte"]) for row in rows if word in row[who].split(" and ")}
            for word in ("holds", "probes")
        }
        assert stated == {"holds": set(role.locks), "probes": set(role.probes)}


def test_exit_statuses() -> None:
    cells = page("cli.md").table("Exit status").column("status")
    stated = {int(text) for cell in cells for text in cell.split(", ")}
    others = {0, messages.FAILED, output.PROBLEMS_FOUND, check.LEAKS, parser.USAGE}
    assert stated == others | set(verdict.STATUSES.values())
    assert check.ERRORS == output.PROBLEMS_FOUND


def test_reasons_of_a_verdict() -> None:
    rows = page("cli.md").table("Verdict").rows
    assert {row["reason"]: int(row["status"]) for row in rows} == verdict.STATUSES
    reasons = set(get_args(backup_verdict.BackupReason))
    assert alternatives("verdict", "reason") == verdict.STATUSES.keys() == reasons
    cells = page("bitmaps.md").table("Use for a backup").column("reason")
    stated = [reason for cell in cells for reason in cell.split(", ")]
    assert {*stated, "running"} == reasons
    assert len(set(verdict.STATUSES.values())) == len(verdict.STATUSES)
    assert not {messages.FAILED, output.PROBLEMS_FOUND} & set(verdict.STATUSES.values())


def test_options() -> None:
    parsers = {" ".join(parser.path): parser for parser in commands.parsers()}
    groups = {
        "all": list(parsers),
        "edits": [word for word, row in commands.COMMANDS.items() if row.module == "edit"],
        "rescues": [command for command in parsers if command.startswith("rescue ")],
    }
    stated = {
        (command, option)
        for row in page("cli.md").table("Options").rows
        for group in row["of"].split(", ")
        for command in groups.get(group, [group])
        for option in row["option"].split(", ")
    }
    assert stated == {
        (command, option)
        for command, parser in parsers.items()
        for action in parser.options
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
    assert page("cli.md").table("Commands").column("command") == list(parsers)
