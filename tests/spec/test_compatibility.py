"""The tables of spec/compatibility.md: their columns, and that each row has its test."""

from __future__ import annotations

import re

import pytest
from support.qemu_facts import VERSIONS
from support.specreader import ROOT, page

PAGE = page("compatibility.md")
DIFFERENCES = PAGE.table("Differences")
SUPPORT = PAGE.table("Support")
STORAGE = PAGE.table("Storage")


def test_the_columns_are_the_versions() -> None:
    assert DIFFERENCES.columns == ("id", "what", *VERSIONS)
    assert SUPPORT.columns == ("what", *VERSIONS, "tests")
    assert PAGE.table("Versions of QEMU and Python").column("QEMU") == list(VERSIONS)


def test_each_id_is_there_once() -> None:
    assert len(set(DIFFERENCES.column("id"))) == len(DIFFERENCES.rows)


@pytest.mark.parametrize("row", DIFFERENCES.rows, ids=lambda row: row["id"])
def test_a_difference_differs_and_is_used_by_a_test(row: dict[str, str]) -> None:
    assert len({row[version] for version in VERSIONS}) > 1
    texts = (path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert any(re.search(rf'(fact|Changed)\("{row["id"]}"', text) for text in texts)


@pytest.mark.parametrize("row", [*SUPPORT.rows, *STORAGE.rows])
def test_the_tests_of_a_row_are_there(row: dict[str, str]) -> None:
    paths = re.findall("tests/[a-z_/]+[.]py", row["tests"])
    assert all((ROOT / path).is_file() for path in paths)
    assert bool(paths) == ("not tried" not in row.get("works", ""))
