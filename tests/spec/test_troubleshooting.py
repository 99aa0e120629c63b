"""spec/troubleshooting.md has every message of QEMU that a problem has, and what belongs to it."""

from __future__ import annotations

import re
from collections import defaultdict

from support.kinds import CHECKED_KINDS
from support.specreader import SPEC, page

from qcow2bm.cli.commands import COMMANDS
from qcow2bm.problem_kinds import KINDS

TABLES = [table for table in page("troubleshooting.md").tables if "problems" in table.columns]


def test_every_message_leads_to_all_its_problems() -> None:
    expected = defaultdict(list)
    for id, kind in KINDS.items():
        if kind.qemu_message:
            expected[kind.qemu_message].append(id)
    found = {row["QEMU says"]: row["problems"] for table in TABLES for row in table.rows}
    assert len(found) == sum(len(table.rows) for table in TABLES)
    assert {message: ids.split(", ") for message, ids in found.items()} == expected


def test_what_is_under_a_heading_belongs_there() -> None:
    of = {
        table.heading: [id for row in table.rows for id in row["problems"].split(", ")]
        for table in TABLES
    }
    assert set(of["qemu-img check complains"]) <= CHECKED_KINDS.keys()
    assert {KINDS[id].severity for id in of["It starts, with a warning"]} == {"leak"}
    for id in of["It does not start, and the header is at fault"]:
        assert KINDS[id].structure in ("header", "header extension", "snapshot table")
    for id in of["It does not start, and bitmaps are at fault"]:
        assert "bitmap" in KINDS[id].structure or "bitmaps" in id


def test_the_commands_it_names_are_there() -> None:
    text = (SPEC / "troubleshooting.md").read_text("utf-8")
    for command in ("check", "repair", "salvage", "fit"):
        assert f"`{command} " in text or f"qcow2bm {command} " in text
        assert command in COMMANDS
    assert set(re.findall(r"qcow2bm ([a-z-]+) ", text)) <= COMMANDS.keys()
