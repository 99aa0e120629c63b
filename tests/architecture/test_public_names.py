from __future__ import annotations

import ast
import builtins
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest

import qcow2bm

PACKAGE = Path(qcow2bm.__file__).parent


def modules_after(statement: str) -> set[str]:
    """The top-level modules a fresh interpreter has loaded after a statement."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import qcow2bm",
        "import qcow2bm; dir(qcow2bm), qcow2bm.__version__",
        "from qcow2bm import Qcow2BmError, StorageError, Problem, Storage",
    ],
)
def test_the_package_loads_nothing_heavy(statement: str) -> None:
    loaded = modules_after(statement)
    assert "qcow2bm" in loaded
    assert not loaded & {"numpy", "construct", "qcow2bm.api"}


def test_opening_an_image_needs_no_numpy() -> None:
    loaded = modules_after("from qcow2bm import open, Image, Bitmap")
    assert {"qcow2bm.api", "construct"} <= loaded
    assert "numpy" not in loaded


MODULES = (
    *("backup", "compare", "live", "new_file", "problems", "rescue", "sidecar", "stream"),
    "units",
)
LITERALS = (
    *("BackupReason", "CommitOutcome", "EntryKind", "Hint", "KeptReason", "Op", "OtherUse"),
    *("Policy", "Severity", "State", "Status"),
)


@pytest.mark.parametrize("name", qcow2bm.__all__)
def test_each_public_name_resolves(name: str) -> None:
    value: Any = getattr(qcow2bm, name)
    if name == "__version__":
        assert isinstance(value, str)
        return
    assert vars(qcow2bm)[name] is value  # looked up only once
    if name in LITERALS:
        assert get_origin(value) is Literal
        return
    assert inspect.getdoc(value)
    if name in MODULES:
        assert inspect.ismodule(value)
        assert value.__name__.startswith("qcow2bm.")
        return
    assert value.__name__ == name
    assert value.__module__.startswith("qcow2bm.")


@pytest.mark.parametrize("name", qcow2bm.__all__)
def test_each_public_name_is_loaded_whatever_was_loaded_before(name: str) -> None:
    """A folder of the name of a function would take its place once a module of it is loaded."""
    internal = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.stem != name]
    folders = {path.parts[0].removesuffix(".py") for path in internal}
    assert name not in folders - set(MODULES)


def test_the_list_of_public_names_is_sorted_and_complete() -> None:
    assert qcow2bm.__all__ == sorted(set(qcow2bm.__all__))
    assert dir(qcow2bm) == qcow2bm.__all__


def test_a_star_import_brings_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from qcow2bm import *", names)
    del names["__builtins__"]
    assert set(names) == set(qcow2bm.__all__)
    assert names["open"] is qcow2bm.open


@pytest.mark.parametrize("name", ["utils", "Draft", "__path", "escape"])
def test_any_other_name_is_missing(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'qcow2bm' has no attribute '{name}'$"):
        qcow2bm.__getattr__(name)


def test_what_a_type_checker_sees_is_what_is_public() -> None:
    """The imports under TYPE_CHECKING repeat the names; nothing else keeps them equal."""
    tree = ast.parse(inspect.getsource(qcow2bm))
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted([*imported, "__version__"]) == qcow2bm.__all__
    for name, place in imported.items():
        module, _, inner = place.rpartition(".")
        value = getattr(qcow2bm, name)
        assert getattr(import_module(module), inner) is value
        if name not in (*MODULES, *LITERALS):
            assert value.__module__ == module


# Names for literals, and for unions of types that are public or built in: no caller needs them.
ALIASES = {"DiskOutcome", "FilePath", "Kind", "Ranges", "Removable", "Self", "Source", "Step"}
# Methods of public classes that only this library calls.
INTERNAL = {
    "compare.ServedContent.reader",
    *(f"{module}.QmpCommands.transaction" for module in ("live", "rescue")),
    "stream.StreamBitmap.add",
    "stream.StreamBitmaps.add",
}
STANDARD = {
    *vars(builtins),
    *("Any", "Literal", "NamedTuple", "NoReturn", "None", "annotations"),
    *("Concatenate", "P", "QMPClient", "T"),
    *("Callable", "Collection", "Iterable", "Iterator", "Mapping", "Sequence"),
    *("AbstractAsyncContextManager", "AbstractContextManager", "TracebackType"),
    *("Buffer", "NDArray", "UUID", "np", "os"),
}


def public_objects() -> Iterator[tuple[str, object]]:
    """Each class and function that has a public name, in the package or in a public module."""
    for name in qcow2bm.__all__:
        value = getattr(qcow2bm, name)
        if name not in MODULES:
            yield name, value
        for inner in getattr(value, "__all__", ()) if name in MODULES else ():
            yield f"{name}.{inner}", getattr(value, inner)


def annotated() -> Iterator[tuple[str, Callable[..., object]]]:
    """Each public function, class, and public method of such a class."""
    for name, value in public_objects():
        if inspect.isfunction(value):
            yield name, value
        if not inspect.isclass(value) or not value.__module__.startswith("qcow2bm."):
            continue
        yield name, value
        for member, inner in vars(value).items():
            inner = inner.fget if isinstance(inner, property) else inner
            inner = getattr(inner, "__func__", inner)
            if not inspect.isfunction(inner) or member.startswith("_"):
                continue
            if inner.__module__.startswith("qcow2bm."):  # others come from NamedTuple
                yield f"{name}.{member}", inner


def names_in(annotation: str) -> set[str]:
    """The names an annotation is made of; of those with dots the first part."""
    tree = ast.parse(annotation, mode="eval")
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript)]
    literals = {
        id(inner)
        for node in constants
        if isinstance(node.value, ast.Name) and node.value.id == "Literal"
        for inner in ast.walk(node.slice)
    }
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in literals}


def public_types() -> set[str]:
    names = set(qcow2bm.__all__)
    for module in MODULES:
        names |= set(getattr(getattr(qcow2bm, module), "__all__", ()))
    return names


@pytest.mark.parametrize(
    ("name", "function"),
    [pytest.param(*found, id=found[0]) for found in annotated() if found[0] not in INTERNAL],
)
def test_what_a_public_function_takes_and_returns_is_public(
    name: str, function: Callable[..., object]
) -> None:
    public = public_types() | STANDARD | ALIASES
    for parameter, annotation in inspect.get_annotations(function).items():
        annotation = getattr(annotation, "__forward_arg__", annotation)
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        assert names_in(text) <= public, (name, parameter, text)
