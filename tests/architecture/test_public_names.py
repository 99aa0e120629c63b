from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from typing import Any

import pytest

import qcow2bm


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


@pytest.mark.parametrize("name", qcow2bm.__all__)
def test_each_public_name_resolves(name: str) -> None:
    value: Any = getattr(qcow2bm, name)
    if name == "__version__":
        assert isinstance(value, str)
        return
    assert vars(qcow2bm)[name] is value  # looked up only once
    assert value.__name__ == name
    assert value.__module__.startswith("qcow2bm.")
    assert inspect.getdoc(value)


def test_the_list_of_public_names_is_sorted_and_complete() -> None:
    assert qcow2bm.__all__ == sorted(set(qcow2bm.__all__))
    assert dir(qcow2bm) == qcow2bm.__all__


def test_a_star_import_brings_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from qcow2bm import *", names)
    del names["__builtins__"]
    assert set(names) == set(qcow2bm.__all__)
    assert names["open"] is qcow2bm.open


@pytest.mark.parametrize("name", ["utils", "Header", "__path", "escape"])
def test_any_other_name_is_missing(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'qcow2bm' has no attribute '{name}'$"):
        qcow2bm.__getattr__(name)


def test_what_a_type_checker_sees_is_what_is_public() -> None:
    """The imports under TYPE_CHECKING repeat the names; nothing else keeps them equal."""
    tree = ast.parse(inspect.getsource(qcow2bm))
    imported = {
        (alias.name, node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {
        (name, getattr(qcow2bm, name).__module__)
        for name in qcow2bm.__all__
        if name != "__version__"
    }
    assert imported == homes
