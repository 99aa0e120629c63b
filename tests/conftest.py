"""Options and settings of the whole test suite."""

from __future__ import annotations

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
