"""Tests stand alone: what several of them need lies in tests/support."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = {path.name for path in TESTS.iterdir() if path.is_dir()}
PROGRAMS = {"bench"}
"""The folders with programs that are run by hand."""

MODULES = sorted(TESTS.rglob("*.py"))
every_module = pytest.mark.parametrize(
    "path", MODULES, ids=[path.relative_to(TESTS).as_posix() for path in MODULES]
)


def faults(source: str) -> Iterator[str]:
    """The imports of a module of tests that lead to anything but helpers."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"line {node.lineno} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "tests" or (top in FOLDERS and top != "support"):
                yield f"line {node.lineno} imports {name}, which is not in tests/support"
            if any(part.startswith("test_") or part == "conftest" for part in (top, *rest[:-1])):
                yield f"line {node.lineno} imports {name}, which is a module of tests"


@every_module
def test_a_module_imports_helpers_from_support_only(path: Path) -> None:
    assert list(faults(path.read_text("utf-8"))) == []


@every_module
def test_a_helper_lies_in_support(path: Path) -> None:
    folder = path.relative_to(TESTS).parts[0]
    is_test = path.name.startswith("test_") or path.name in ("conftest.py", "__init__.py")
    assert is_test != (folder in {"support", *PROGRAMS}), "only tests/support has helpers"


@pytest.mark.parametrize("path", sorted((TESTS / "support").glob("*.py")), ids=lambda p: p.name)
def test_a_helper_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize(
    "source",
    [
        "from crash.layouts import build",
        "import tracker.recording",
        "def f():\n    from cli.test_console import run",
        "from crash import judge",
        "from .layouts import build",
        "from . import layouts",
        "from test_api import something",
        "import test_api.part",
        "from tests.support import images",
        "from qmp.conftest import qemu",
    ],
)
def test_the_rules_have_teeth(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "from support.images import build_image",
        "from support import qemu",
        "import qcow2bm.tracker.session",
        "from qcow2bm import serve",
        "import json, struct",
    ],
)
def test_the_rules_let_the_rest_pass(source: str) -> None:
    assert list(faults(source)) == []


def test_the_examples_in_the_readme_are_parts_of_tests() -> None:
    blocks = re.findall(
        r"```python\n# tests/(\S+)\n(.*?)```", (TESTS / "README.md").read_text("utf-8"), re.DOTALL
    )
    assert len(blocks) == 4
    for place, code in blocks:
        assert code in (TESTS / place).read_text("utf-8"), place


def test_the_readme_names_every_folder_and_every_helper_it_names_is_there() -> None:
    text = (TESTS / "README.md").read_text("utf-8")
    folders = {f for f in FOLDERS - {"support"} if not f.startswith((".", "__"))}
    assert folders - set(re.findall(r"`(\w+)`", text)) == set()
    table = text.partition("## Helpers")[2].partition("## One example")[0]
    named = set(re.findall(r"`(\w+)(?:\.\w+)*(?:\(\w+\))?`", table.partition("|---|---|")[2]))
    helpers = {path.stem for path in (TESTS / "support").glob("*.py")}
    assert named - helpers == {"image", "storage", "Built"}
