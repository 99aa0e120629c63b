"""Options and settings of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# The same examples in every run, and no clock: a failure is never due to a slow machine.
settings.register_profile("qcow2bm", derandomize=True, deadline=None, database=None)
settings.load_profile("qcow2bm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-update",
        action="store_true",
        help="write the golden files of tests/cli anew instead of comparing with them",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Counts a skipped test with the marker ``qemu`` as failed, if QCOW2BM_REQUIRE_QEMU is set."""
    report = yield
    required = os.environ.get("QCOW2BM_REQUIRE_QEMU") and item.get_closest_marker("qemu")
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"QCOW2BM_REQUIRE_QEMU is set, but the test was skipped: {reason}"
    return report
