"""The oracle: every test here compares with the real QEMU tools and has the marker ``qemu``.

Where the tools are missing the tests are skipped; with QCOW2BM_REQUIRE_QEMU set they fail, so
that a run which is meant to compare cannot pass without having compared anything.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import qemu, vm

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("qemu")


@pytest.fixture(scope="session", autouse=True)
def qemu_tools() -> None:
    require(qemu.missing_tools())


@pytest.fixture(scope="session")
def system_emulator() -> None:
    require(vm.missing_tools())


def require(missing: list[str]) -> None:
    """Skips what needs these, or fails it."""
    if not missing:
        return
    message = f"not installed: {', '.join(missing)}"
    if os.environ.get("QCOW2BM_REQUIRE_QEMU"):
        pytest.fail(message)
    pytest.skip(message)
