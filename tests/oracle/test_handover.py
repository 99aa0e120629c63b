"""The fate of persistent bitmaps when a migration goes wrong and this library is the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import vm
from support.migration_tracked import CASES, Way, handed_over
from support.qemu import Disk, QmpError, StorageDaemon
from support.qemu_facts import fact
from support.specreader import page
from support.twin import MiB

pytestmark = pytest.mark.usefixtures("system_emulator")

ROWS = {row["case"]: row for row in page("lifecycle.md").table("Cases").rows}


def expected(cell: str, way: Way) -> str:
    """The text of a cell about a way: the last part of the cell that concerns it.

    The first part is of all ways, and one such as "merge: stored" of those with that option.
    """
    options = {"generation": way.generation, "merge": way.policy == "merge"}
    said, *others = cell.split(", ")
    for part in others:
        option, _, word = part.partition(": ")
        if options[option]:
            said = word
    return said


def ways() -> Iterator[tuple[str, Way]]:
    """All cases in all ways. The policy is of use only where bitmaps are lost without it."""
    for name, row in ROWS.items():
        for generation in (False, True):
            yield name, Way(False, generation, "drop")
            yield name, Way(True, generation, "drop")
            if row["outcome"] and row["qcow2bm, carried"] != "stored":
                yield name, Way(True, generation, "merge")


def identifier(way: Way) -> str:
    parts = ["carried" if way.is_carried else "stored"]
    parts += ["generation"] * way.generation + ["merge"] * (way.policy == "merge")
    return "-".join(parts)


@pytest.fixture(scope="module")
def stream(system_emulator: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stream that a machine sends which runs and migrates, with a disk of its own."""
    folder = tmp_path_factory.mktemp("stream")
    path = folder / "stream"
    disk = Disk.create(folder / "disk.qcow2", 64 * MiB)
    with vm.Machine(disk.path) as machine:
        machine.migrate(f"exec:cat >'{path}'")
        machine.wait_for_migration("completed")
        machine.wait_for("postmigrate")
        machine.quit()
    return path


@pytest.fixture(scope="module")
def daemon(qemu_tools: None) -> Iterator[StorageDaemon]:
    with StorageDaemon() as daemon:
        yield daemon


def test_every_case_has_a_row() -> None:
    assert list(CASES) == list(ROWS)


@pytest.mark.parametrize(
    ("case", "way"), [pytest.param(*each, id=f"{each[0]}-{identifier(each[1])}") for each in ways()]
)
def test_handed_over(
    case: str, way: Way, tmp_path: Path, stream: Path, daemon: StorageDaemon
) -> None:
    row = ROWS[case]
    if case.startswith("reopened") and fact("blockdev-reopen") == "no":
        with pytest.raises(QmpError, match="blockdev-reopen has not been found"):
            handed_over(case, way, tmp_path, stream, daemon)
        return
    found = handed_over(case, way, tmp_path, stream, daemon)
    assert found.outcome == expected(row["outcome"], way)
    assert found.word == expected(row["qcow2bm, carried" if way.is_carried else "qcow2bm"], way)
