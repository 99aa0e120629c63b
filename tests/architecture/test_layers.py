"""Folders are layers: imports point down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2bm

PACKAGE = Path(qcow2bm.__file__).parent

# From the lowest row to the highest. Rooms of one row do not know each other. The package's own
# __init__ names the public things and is nobody's dependency but the command line's.
ROWS = (
    ("units", "log"),
    ("errors", "problems"),
    ("problem_kinds",),
    ("format", "bits", "storage"),
    ("clusters",),
    ("bitmaps",),
    ("migration",),
    ("tracker",),
    ("checking",),
    ("api",),
    ("serve", "qmp", "compare"),
    ("__init__",),
    ("report",),
    ("cli",),
    ("__main__",),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}

ONLY_IN = {"construct": "format", "fcntl": "storage", "mmap": "storage", "msvcrt": "storage"}
FILE_MODULES = {"os", "io", "pathlib", "shutil", "socket", "subprocess", "tempfile"}
IMAGE_CALLS = {"pread", "preadv", "pwrite", "pwritev", "lseek", "ftruncate", "fsync", "fdatasync"}

MODULES = sorted(PACKAGE.rglob("*.py"))
every_module = pytest.mark.parametrize(
    "path", MODULES, ids=[path.relative_to(PACKAGE).as_posix() for path in MODULES]
)


def room(path: Path) -> str:
    """The folder of the package a module lies in, or the module itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted name of everything imported, wherever in the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(source: str, here: str) -> Iterator[str]:
    """What a module of the room ``here`` does that it must not do."""
    tree = ast.parse(source)
    for name in imports(tree):
        top, _, rest = name.partition(".")
        if top in ONLY_IN and here != ONLY_IN[top]:
            yield f"imports {top}, which belongs to {ONLY_IN[top]}/"
        if top == "qcow2bm":
            there = rest.partition(".")[0]
            there = there if there in ROW_OF or (PACKAGE / there).is_dir() else "__init__"
            if there != here and ROW_OF.get(there, len(ROWS)) >= ROW_OF[here]:
                yield f"imports {name}, which is not below {here}"
        if top in FILE_MODULES and here != "storage" and ROW_OF[here] < ROW_OF["api"]:
            yield f"imports {top}, though it touches no file"
    if here == "storage":
        return
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.alias(name=name) if name in IMAGE_CALLS:
                yield f"uses {name}, which belongs to storage/"
            case ast.Call(func=ast.Name(id="open")) if ROW_OF[here] < ROW_OF["api"]:
                yield "opens a file, which belongs to storage/"


@every_module
def test_a_module_has_a_layer_and_keeps_to_it(path: Path) -> None:
    assert room(path) in ROW_OF, "a new room needs a place in ROWS"
    assert list(faults(path.read_text("utf-8"), room(path))) == []


@every_module
def test_a_module_says_what_it_is_for(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert not {"utils", "util", "helpers", "common", "misc"}.intersection(parts)
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("units", "from qcow2bm.errors import FormatError"),
        ("format", "import qcow2bm.bits.pure_python"),
        ("format", "from qcow2bm import bits"),
        ("clusters", "from qcow2bm.bitmaps import bit_reader"),
        ("bitmaps", "def f():\n    from qcow2bm.api import open"),
        ("bitmaps", "from qcow2bm import open"),
        ("serve", "from qcow2bm.qmp import client"),
        ("clusters", "import construct"),
        ("api", "from construct.lib import Container"),
        ("clusters", "import fcntl"),
        ("clusters", "import os"),
        ("cli", "import os\nos.pread(3, 1, 0)"),
        ("cli", "from os import pread"),
        ("clusters", "open('disk')"),
    ],
)
def test_the_rules_have_teeth(here: str, source: str) -> None:
    assert list(faults(source, here))


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("errors", "from qcow2bm.units import escape"),
        ("bitmaps", "from qcow2bm.bitmaps.tables import survey"),
        ("bitmaps", "from qcow2bm import problems"),
        ("format", "from construct import Struct"),
        ("storage", "import fcntl, os\nos.pread(3, 1, 0)"),
        ("cli", "from qcow2bm import __version__, open\nopen('disk')"),
    ],
)
def test_the_rules_let_the_rest_pass(here: str, source: str) -> None:
    assert list(faults(source, here)) == []
