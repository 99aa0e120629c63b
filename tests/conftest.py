"""Options, settings and the common fixtures of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import settings
from support.images import small_image

from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.units import ceil_div

# The same examples in every run, and no clock: a failure is never due to a slow machine.
settings.register_profile("qcow2bm", derandomize=True, deadline=None, database=None)
settings.load_profile("qcow2bm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-update",
        action="store_true",
        help="write the golden files of tests/cli anew instead of comparing with them",
    )
    parser.addoption(
        "--part",
        type=_part,
        metavar="K/N",
        help="run one of N parts of the tests, K from 0 on (or more: K modulo N)",
    )


def _part(text: str) -> tuple[int, int]:
    number, parts = map(int, text.split("/"))
    return number % parts, parts


def pytest_configure() -> None:
    """Lets QCOW2BM_QEMU name a folder whose programs come before those of the system."""
    folder = os.environ.get("QCOW2BM_QEMU")
    if folder and not os.environ["PATH"].startswith(folder + os.pathsep):
        os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]


_REPEATING = (
    *("crash", "faults", "property", "migration/test_model.py", "migration/test_lifecycle.py"),
    *("migration/test_stream_fuzz.py", "migration/test_stream_sample.py", "test_hostile.py"),
    *("checking/test_broken.py", "cli/test_stream_restore.py", "cli/test_advice.py"),
    *("spec/test_invariants.py", "bitmaps/test_commit.py", "tracker/test_interrupts.py"),
)
"""Files and folders with tests that are long even without measuring."""

_MOST_MEASURED = 10
"""In how many cases of a parametrized test coverage is measured: measuring triples the time."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Measures no coverage in long tests, and in most of the many cases of a test; see `--part`.

    They run the same lines thousands of times; others reach all of these lines, too. In a test of
    memory, what measuring takes would count as well.
    """
    if config.option.part:
        number, parts = config.option.part
        of_part = [crc32(item.nodeid.encode()) % parts for item in items]
        left_out = [item for item, part in zip(items, of_part, strict=True) if part != number]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item, part in zip(items, of_part, strict=True) if part == number]
    folder = Path(__file__).parent
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        code = getattr(getattr(item, "function", None), "__code__", None)
        measures_memory = code is not None and "traced_memory" in code.co_names
        is_long = item.path.relative_to(folder).as_posix().startswith(_REPEATING)
        if is_long or measures_memory:
            item.add_marker(pytest.mark.no_cover)
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for several in cases.values():
        step = ceil_div(len(several), _MOST_MEASURED)
        for number, item in enumerate(several):
            if number % step:
                item.add_marker(pytest.mark.no_cover)


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


@pytest.fixture(autouse=True)
def _no_colors_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away what would change the output of commands, such as FORCE_COLOR of a CI service."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The path of a small sound image: see `support.images.small_image`."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(small_image().data)
    return path


@pytest.fixture
def storage() -> MemoryStorage:
    """The same image in memory; it can be edited."""
    return MemoryStorage(small_image().data)
