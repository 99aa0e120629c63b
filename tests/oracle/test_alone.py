"""The fate of persistent bitmaps when a migration goes wrong and QEMU is on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.migration_alone import CASES, alone
from support.specreader import page

pytestmark = pytest.mark.usefixtures("system_emulator")

ROWS = {
    row["case"]: row
    for row in page("lifecycle.md").table("Cases").rows
    if row["QEMU, dirty-bitmaps on"]  # the others are not of QEMU alone
}


def test_every_case_has_a_row() -> None:
    assert list(CASES) == list(ROWS)


@pytest.mark.parametrize("capability", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("case", ROWS)
def test_alone(case: str, capability: bool, tmp_path: Path) -> None:
    column = "QEMU, dirty-bitmaps on" if capability else "QEMU, off"
    assert alone(case, capability, tmp_path) == ROWS[case][column]
