"""Folders are layers: imports point down only, and no object reaches into another."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import qcow2bm

PACKAGE = Path(qcow2bm.__file__).parent

# From the lowest row to the highest. Rooms of one row do not import each other. The package's own
# __init__ names what is public; only the command line imports it.
ROWS = (
    ("units", "log"),
    ("errors", "problems"),
    ("problem_errors", "problem_kinds"),
    ("format", "bits", "storage"),
    ("clusters",),
    ("bitmaps", "guest"),
    ("migration",),
    ("tracker",),
    ("checking",),
    ("api",),
    ("serve", "qmp", "compare"),
    ("live", "backup"),
    ("__init__",),
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
    """Returns the folder of the package a module lies in, or the module itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Yields the dotted name of everything a module imports, in functions and blocks, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(source: str, here: str) -> Iterator[str]:
    """Yields what a module of the room ``here`` does against the order of the rooms."""
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


def test_every_room_of_the_rows_exists() -> None:
    assert {room(path) for path in MODULES} == set(ROW_OF)


# --- circles ------------------------------------------------------------------------------------


def dotted(path: Path) -> str:
    """Returns the name by which a module is imported."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def dependencies(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns for each module the other modules that it imports, wherever it does."""

    def module(name: str) -> str:
        while name not in sources and "." in name:
            name = name.rpartition(".")[0]
        return name

    return {
        name: {module(found) for found in imports(ast.parse(source))} & set(sources) - {name}
        for name, source in sources.items()
    }


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns modules that import each other in a circle, the first of them again at the end."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for name in sorted(graph[path[-1]]):
            if name in path:
                return [*path[path.index(name) :], name]
            if name not in done and (found := search([*path, name])):
                return found
        done.add(path[-1])
        return []

    return next(filter(None, (search([name]) for name in sorted(graph))), [])


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(dependencies({dotted(p): p.read_text("utf-8") for p in MODULES})) == []


@pytest.mark.parametrize(
    "back",
    [
        "from qcow2bm.a import x",
        "import qcow2bm.a",
        "from qcow2bm import a",
        "def f():\n    from qcow2bm.a import x",
        "if TYPE_CHECKING:\n    from qcow2bm.a import x",
    ],
)
def test_circles_are_found_wherever_the_import_stands(back: str) -> None:
    sources = {"qcow2bm.a": "from qcow2bm.b import x", "qcow2bm.b": "import qcow2bm.c"}
    assert circle(dependencies({**sources, "qcow2bm.c": ""})) == []
    assert circle(dependencies({**sources, "qcow2bm.c": back})) == [
        "qcow2bm.a",
        "qcow2bm.b",
        "qcow2bm.c",
        "qcow2bm.a",
    ]


def test_a_name_of_a_package_is_no_import_of_its_modules() -> None:
    sources = {"qcow2bm.api": "from qcow2bm.api.image import open", "qcow2bm.api.image": ""}
    assert circle(dependencies(sources)) == []
    sources["qcow2bm.api.image"] = "from qcow2bm.api import Bitmap"
    assert circle(dependencies(sources)) != []


# --- private names ------------------------------------------------------------------------------

# Python documents these as public: the underscore keeps them apart from the names of fields.
NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def foreign_privates(source: str) -> Iterator[str]:
    """Yields each use of a private name that belongs to another object or another module."""
    tree = ast.parse(source)
    defined = (n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef))
    own = {"self", "cls", *defined}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name) if is_private(name):
                is_own = isinstance(value, ast.Name) and value.id in own
                if not is_own and name not in NAMEDTUPLE and ast.unparse(value) != "super()":
                    yield ast.unparse(node)
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[value, ast.Constant(value=str(name)), *_],
            ) if is_private(name):
                if not (isinstance(value, ast.Name) and value.id in own):
                    yield ast.unparse(node)
            case ast.ImportFrom(names=names):
                yield from (f"import of {alias.name}" for alias in names if is_private(alias.name))


@every_module
def test_a_module_uses_no_private_name_of_another_object(path: Path) -> None:
    assert list(foreign_privates(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "image._file",
        "image._file = None",
        "self._image._file",
        "def f(other):\n    return other._file",
        "f()._file",
        "image[0]._file",
        "import argparse\nargparse._SubParsersAction",
        "from qcow2bm.api.image import _Gone",
        "getattr(image, '_file')",
        "setattr(self._image, '_file', 0)",
    ],
)
def test_the_rule_of_private_names_has_teeth(source: str) -> None:
    assert list(foreign_privates(source))


@pytest.mark.parametrize(
    "source",
    [
        "self._file, cls._table, super()._file, self._file._replace(size=1), image.__class__",
        "class _Work:\n    _limit = 1\n_Work._limit",
        "from qcow2bm.api.image import open as _open",
        "getattr(self, '_file')",
        "getattr(image, 'file')",
    ],
)
def test_the_rule_of_private_names_lets_the_rest_pass(source: str) -> None:
    assert list(foreign_privates(source)) == []


# --- the command line ---------------------------------------------------------------------------

PUBLIC_MODULES = {
    name: set(getattr(value, "__all__", ()))
    for name in qcow2bm.__all__
    if inspect.ismodule(value := getattr(qcow2bm, name))
}


def internal_names(source: str) -> Iterator[str]:
    """Yields what a module of the command line takes from the library that is not public."""
    tree = ast.parse(source)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    top, _, rest = alias.name.partition(".")
                    if top == "qcow2bm" and rest.partition(".")[0] not in ("", "cli", "units"):
                        yield f"import {alias.name}"
            case ast.ImportFrom(module="qcow2bm", names=names):
                for alias in names:
                    if alias.name in PUBLIC_MODULES:
                        modules[alias.asname or alias.name] = alias.name
                    if alias.name not in (*qcow2bm.__all__, "cli"):
                        yield f"from qcow2bm import {alias.name}"
            case ast.ImportFrom(module=str(module), names=names):
                top, _, rest = module.partition(".")
                room, _, inner = rest.partition(".")
                if top != "qcow2bm" or room == "cli":
                    continue
                is_module = room in PUBLIC_MODULES and not inner
                for alias in names:
                    known = PUBLIC_MODULES.get(room) or {alias.name}
                    if not is_module or alias.name not in known:
                        yield f"from {module} import {alias.name}"
            case ast.Call(
                func=ast.Name(id="import_module"), args=[ast.Constant(value=str(name)), *_]
            ) if name.startswith("qcow2bm.") and not name.startswith("qcow2bm.cli."):
                yield f"import_module({name!r})"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in modules:
                known = PUBLIC_MODULES[modules[name]]
                if known and attribute not in known:
                    yield ast.unparse(node)


def test_the_command_line_uses_public_names_only() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): list(internal_names(path.read_text("utf-8")))
        for path in MODULES
        if room(path) in ("cli", "__main__")
    }
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import qcow2bm.api",
        "from qcow2bm import api",
        "from qcow2bm import Draft",
        "from qcow2bm.api import Image",
        "from qcow2bm.api.sidecar import read",
        "from qcow2bm.sidecar import parse_saved_header",
        "def f():\n    from qcow2bm.qmp.client import Monitor",
        "if TYPE_CHECKING:\n    from qcow2bm.storage.interface import Storage",
        "from qcow2bm import sidecar\nsidecar.parse_saved_header",
        "from qcow2bm import stream as s\ns.read_stream",
        "from importlib import import_module\nimport_module('qcow2bm.qmp.rescue')",
    ],
)
def test_the_rule_of_public_names_has_teeth(source: str) -> None:
    assert list(internal_names(source))


@pytest.mark.parametrize(
    "source",
    [
        "import qcow2bm, qcow2bm.cli.output",
        "from qcow2bm import __version__, open, sidecar, units\nsidecar.read(open)",
        "from qcow2bm import stream as s\ns.read([])",
        "from qcow2bm.units import escape",
        "from qcow2bm.cli.output import size",
        "from importlib import import_module\nimport_module(f'qcow2bm.cli.{name}')",
    ],
)
def test_the_rule_of_public_names_lets_the_rest_pass(source: str) -> None:
    assert list(internal_names(source)) == []
