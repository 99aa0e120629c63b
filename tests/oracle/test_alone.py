"""What becomes of persistent bitmaps when a migration goes wrong and QEMU is on its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import vm

from .alone import CASES, alone

OUTCOMES = {  # with the capability dirty-bitmaps, and without it
    "cancelled before inactivation": ("lost", "stored"),
    "failed before inactivation": ("lost", "stored"),
    "cancelled in pre-switchover": ("lost", "stored"),
    "failed after inactivation": ("stored", "stored"),
    "succeeded, source goes on": ("stored", "stored"),
    "succeeded, stop and start": ("lost", "stored"),
    "destination loaded only": ("unusable", "stored"),
    "destination loaded and was killed": ("stored", "lost"),
    "destination wrote and stored": ("unusable", "stored"),
    "destination wrote and was killed": ("WRONG", "lost"),
    "destination never ran": ("stored", "stored"),
    "unaware program wrote": ("WRONG", "lost"),
    "committed into": ("WRONG", "stored"),
}


@pytest.fixture(scope="module", autouse=True)
def system_emulator() -> None:
    missing = vm.missing_tools()
    if not missing:
        return
    message = f"not installed: {', '.join(missing)}"
    if os.environ.get("QCOW2BM_REQUIRE_QEMU"):
        pytest.fail(message)
    pytest.skip(message)


def test_every_case_has_an_outcome() -> None:
    assert OUTCOMES.keys() == CASES.keys()


@pytest.mark.parametrize("capability", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("case", OUTCOMES)
def test_alone(case: str, capability: bool, tmp_path: Path) -> None:
    assert alone(case, capability, tmp_path) == OUTCOMES[case][not capability]
