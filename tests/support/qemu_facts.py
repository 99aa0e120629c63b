"""What differs between the versions of QEMU, as spec/compatibility.md has it."""

from __future__ import annotations

import re
from functools import cache

from support.qemu import run_ok
from support.specreader import page

VERSIONS = ("5.2", "7.2", "10.0", "11.1")
"""The columns of the table: the versions that were tried."""


@cache
def version() -> str:
    """The column for the QEMU that the tests use: the newest that is not newer."""
    found = re.search(r"version (\d+)\.(\d+)", run_ok("qemu-img", "--version"))
    assert found
    present = int(found[1]), int(found[2])
    older = [v for v in VERSIONS if tuple(map(int, v.split("."))) <= present]
    return older[-1] if older else VERSIONS[0]


def fact(id: str) -> str:
    """What the table has under an id for the QEMU that the tests use."""
    rows = page("compatibility.md").table("Differences").rows
    (row,) = (row for row in rows if row["id"] == id)
    return row[version()]
