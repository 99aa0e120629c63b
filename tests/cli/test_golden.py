"""The exact output of the commands: tests/cli/golden has one file for each case.

``pytest --golden-update`` writes the files anew; read the difference before you keep it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from support import golden_images as images
from support.console import run
from support.jsonspec import failure_in

GOLDEN = Path(__file__).parent / "golden"


class Case(NamedTuple):
    name: str
    image: str
    arguments: str  # IMAGE stands for the image's name
    status: int = 0
    input: str = ""  # what is on standard input


CASES = [
    Case("dump", "sound", "dump IMAGE"),
    Case("dump-json", "sound", "dump --output=json IMAGE"),
    Case("dump-extents", "sound", "dump --extents IMAGE"),
    Case("dump-extents-json", "sound", "dump --extents --output=json IMAGE"),
    Case("dump-entries", "broken", "dump --entries --space --no-count IMAGE", 2),
    Case("dump-entries-json", "broken", "dump --entries --space --output=json IMAGE", 2),
    Case("dump-sha256", "sound", "dump --sha256 --no-count IMAGE"),
    Case("dump-one", "sound", "dump --bitmap weekly IMAGE"),
    Case("dump-empty", "empty", "dump IMAGE"),
    Case("dump-empty-json", "empty", "dump --output=json IMAGE"),
    Case("dump-crashed", "crashed", "dump IMAGE"),
    Case("dump-crashed-stale", "crashed", "dump --stale IMAGE"),
    Case("dump-crashed-json", "crashed", "dump --stale --extents --output=json IMAGE"),
    Case("dump-stale", "stale", "dump IMAGE", 2),
    Case("dump-stale-stale", "stale", "dump --stale IMAGE", 2),
    Case("dump-broken", "broken", "dump IMAGE", 2),
    Case("dump-broken-json", "broken", "dump --output=json IMAGE", 2),
    Case("dump-broken-one", "broken", "dump --bitmap sound IMAGE", 2),
    Case("dump-broken-index", "broken", "dump --bitmap @2 IMAGE", 2),
    Case("dump-names", "names", "dump IMAGE"),
    Case("dump-names-json", "names", "dump --output=json --no-count IMAGE"),
    Case("dump-data-file", "data_file", "dump IMAGE"),
    Case("dump-cut-off", "cut_off", "dump IMAGE", 2),
    Case("map", "sound", "map IMAGE daily"),
    Case("map-json", "sound", "map --output=json IMAGE daily"),
    Case("map-totals", "sound", "map --totals IMAGE daily"),
    Case("map-totals-json", "sound", "map --totals --output=json IMAGE daily"),
    Case("map-totals-dirty", "sound", "map --totals --dirty IMAGE daily"),
    Case("map-dirty", "sound", "map --dirty IMAGE daily"),
    Case("map-dirty-json", "sound", "map --dirty --output=json IMAGE daily"),
    Case("map-data", "mapped", "map --data IMAGE daily"),
    Case("map-data-json", "mapped", "map --data --output=json IMAGE daily"),
    Case("map-data-dirty", "mapped", "map --data --dirty IMAGE daily"),
    Case("map-data-dirty-json", "mapped", "map --data --dirty --output=json IMAGE daily"),
    Case("map-data-totals", "mapped", "map --data --totals IMAGE daily"),
    Case("map-data-totals-json", "mapped", "map --data --totals --output=json IMAGE daily"),
    Case("map-data-several", "sound", "map --data IMAGE daily größe --op subtract"),
    Case("map-data-backing-json", "sound", "map --data --dirty --output=json IMAGE weekly"),
    Case("map-data-backing", "sound", "map --data --output=json IMAGE größe"),
    Case("map-data-fault", "mapped_with_fault", "map --data IMAGE daily", 1),
    Case("map-data-fault-json", "mapped_with_fault", "map --data --output=json IMAGE daily", 1),
    Case("map-fault", "mapped_with_fault", "map IMAGE daily"),
    Case("map-clean", "sound", "map IMAGE weekly"),
    Case("map-clean-dirty-json", "sound", "map --dirty --output=json IMAGE weekly"),
    Case("map-all-dirty", "sound", "map IMAGE größe"),
    Case("map-dash", "names", "map IMAGE -- -rf"),
    Case("map-at", "names", "map IMAGE @@1"),
    Case("map-index", "names", "map IMAGE @0"),
    Case("map-no-such-index", "names", "map IMAGE @6", 1),
    Case("map-no-such-name", "names", "map IMAGE daily", 1),
    Case("map-in-use", "crashed", "map --output=json IMAGE daily", 1),
    Case("map-stale", "stale", "map --output=json IMAGE daily", 1),
    Case("map-bit-flip", "broken", "map IMAGE @1", 1),
    Case("map-twice", "broken", "map IMAGE twice", 1),
    Case("map-sound-among-broken", "broken", "map IMAGE sound", 2),
    Case("map-quiet", "broken", "map -q IMAGE sound", 2),
    Case("measure", "sound", "measure IMAGE"),
    Case("measure-resized", "crashed", "measure --resize 1G IMAGE daily"),
    Case("measure-resized-json", "crashed", "measure --resize 1G --json IMAGE daily"),
    Case("measure-broken", "broken", "measure IMAGE", 2),
    Case("measure-stale", "stale", "measure IMAGE", 2),
    Case("measure-names", "names", "measure IMAGE @0 @@1"),
    Case("measure-add", "sound", "measure --add --count 20 -g 512 --name-size 100 IMAGE"),
    Case("measure-add-json", "sound", "measure --add --json IMAGE"),
    Case("measure-add-stale", "stale", "measure --add IMAGE", 1),
    Case("measure-new", "sound", "measure --size 1T --cluster-size 4k --refcount-bits 64"),
    Case("measure-nothing", "sound", "measure", 64),
    Case("prune", "sound", "prune --keep daily IMAGE"),
    Case("prune-dry-run", "crashed", "prune --inconsistent --dry-run IMAGE"),
    Case("prune-dry-run-json", "crashed", "prune --inconsistent --dry-run --json IMAGE"),
    Case("prune-misspelt", "sound", "prune --keep-pattern Daily* IMAGE", 1),
    Case("prune-stale", "stale", "prune --keep daily IMAGE", 1),
    Case("prune-no-rule", "sound", "prune IMAGE", 64),
    Case("map-several", "sound", "map --dirty IMAGE daily weekly größe"),
    Case("map-several-and-json", "sound", "map --output=json IMAGE daily größe --op and"),
    Case("map-several-xor", "sound", "map IMAGE @2 daily weekly --op xor"),
    Case("map-several-subtract-totals", "sound", "map --totals IMAGE größe daily --op subtract"),
    Case("map-several-one-in-use", "crashed", "map --output=json IMAGE base daily", 1),
    Case("map-several-no-such-name", "sound", "map IMAGE daily monthly", 1),
    Case("edit-silent", "sound", "set IMAGE daily 20M:4k 24M:2M"),
    Case("edit-dry-run", "sound", "set --dry-run IMAGE daily 20M:4k 24M:2M"),
    Case("edit-dry-run-json", "sound", "set --dry-run --output=json IMAGE daily 20M:4k 24M:2M"),
    Case("edit-dry-run-first", "empty", "add --dry-run IMAGE daily"),
    Case("edit-dry-run-last", "sound", "remove --dry-run IMAGE --all"),
    Case("edit-dry-run-nothing", "sound", "clear --dry-run IMAGE weekly"),
    Case("edit-dry-run-nothing-json", "sound", "clear --dry-run --output=json IMAGE weekly"),
    Case("edit-add-again", "sound", "add IMAGE daily", 1),
    Case("edit-add-granularity", "sound", "add IMAGE new -g 1000", 1),
    Case("edit-add-no-size", "sound", "add IMAGE new -g 64q", 64),
    Case("edit-add-stale", "stale", "add IMAGE new", 1),
    Case("edit-add-version-2", "version_2", "add IMAGE new", 1),
    Case("edit-add-dirty", "dirty", "add IMAGE new", 1),
    Case("edit-add-full-header", "full_header", "add IMAGE new", 1),
    Case("edit-in-use", "crashed", "merge IMAGE base daily", 1),
    Case("edit-in-use-clear", "crashed", "clear IMAGE daily", 1),
    Case("edit-remove-in-use", "crashed", "remove IMAGE daily"),
    Case("edit-remove-nothing", "sound", "remove IMAGE", 64),
    Case("edit-broken", "broken", "disable IMAGE sound", 1),
    Case("edit-unknown-name", "sound", "rename IMAGE monthly weekly", 1),
    Case("edit-rename-taken", "sound", "rename IMAGE daily weekly", 1),
    Case("edit-new-name-at", "sound", "rename IMAGE daily @1", 1),
    Case("edit-range", "sound", "set IMAGE daily 1M", 64),
    Case("edit-range-beyond", "sound", "reset IMAGE daily 39M:2M", 1),
    Case(
        "edit-range-input",
        "sound",
        "set --dry-run IMAGE daily -",
        input="  20971520        4096    1  dirty\n  25165824     2097152    1  dirty\n",
    ),
    Case(
        "edit-range-input-beyond",
        "sound",
        "reset IMAGE daily -",
        1,
        input="         0    16777216    0  clean\n  40894464     2097152    1  dirty\n",
    ),
    Case(
        "edit-range-input-wrong",
        "sound",
        "set IMAGE daily 1M:64k -",
        1,
        input="         0    16777216    0  clean\n  16777216  60.0%   1 dirty\n",
    ),
    Case(
        "edit-range-input-cut-off",
        "sound",
        "set --output=json IMAGE daily -",
        1,
        input='[\n{ "offset":  0, "length": 512, "type": 1, "description": "dirty"}',
    ),
    Case("edit-merge-from", "sound", "merge IMAGE daily monthly --from IMAGE --dry-run", 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "vm.qcow2").write_bytes(getattr(images, case.image)().data)
    result = run(case.arguments.replace("IMAGE", "vm.qcow2").split(), tmp_path, case.input.encode())
    shown = f"$ qcow2bm {case.arguments.replace('IMAGE', 'vm.qcow2')}\n{result.out}"
    if result.err:
        shown += f"--- standard error\n{result.err}"
    shown += f"--- exit status {result.status}\n"
    path = GOLDEN / f"{case.name}.txt"
    if request.config.getoption("--golden-update"):
        path.write_text(shown, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == shown
    assert result.status == case.status
    if case.status == 1:
        _, *more = result.err.splitlines()
        assert all(line.startswith("  ") for line in more)
    if case.status == 1 and "--output=json" in case.arguments:
        failure_in(result.out, result.err)
    elif case.status == 1:
        assert not result.out


def test_every_file_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {case.name for case in CASES}
