"""All commands: the table that finds them, the types of their values, and their imports."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
from support.console import environment

import qcow2bm
from qcow2bm import cli
from qcow2bm.cli.commands import COMMANDS, parsers, root
from qcow2bm.cli.parser import Arguments, Parser

PARSERS = list(parsers())
MODULES = sorted(Path(cli.__file__).parent.glob("*.py"))

each_command = pytest.mark.parametrize("parser", PARSERS, ids=lambda p: " ".join(p.path))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def values(parser: Parser) -> set[str]:
    """The attributes that get the values of a command's arguments."""
    options = {option.dest for option in parser.options if "--help" not in option.option_strings}
    return options | {word.dest for word in parser.words}


def declared(kind: type) -> set[str]:
    """The attributes that a class of values declares."""
    return {name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})}


@each_command
def test_the_types_of_all_values_are_declared(parser: Parser) -> None:
    assert issubclass(parser.namespace, Arguments)
    assert values(parser) <= declared(parser.namespace)


def test_nothing_is_declared_that_no_command_has() -> None:
    used: dict[type, set[str]] = defaultdict(lambda: {"command", "action"})
    for parser in PARSERS:
        used[parser.namespace] |= values(parser)
    assert used == {kind: declared(kind) for kind in used}


@pytest.mark.parametrize("word", COMMANDS)
def test_a_row_leads_to_a_module_that_defines_and_runs_the_command(word: str) -> None:
    module = import_module(f"qcow2bm.cli.{COMMANDS[word].module}")
    assert callable(module.run)
    parser = Parser((word,), "")
    module.define(parser)
    assert parser.commands or parser.namespace is not Arguments or word == "nbdkit-plugin"


def summaries() -> Iterator[tuple[str, str]]:
    for word, row in COMMANDS.items():
        yield word, row.summary
        for action, command in root().of(word).commands.items():
            yield f"{word} {action}", command.summary


@pytest.mark.parametrize(("command", "summary"), list(summaries()))
def test_a_summary_is_one_line_of_help(command: str, summary: str) -> None:
    assert summary[:1].islower()
    assert not summary.endswith(".")
    assert "\n" not in summary
    assert len(summary) <= 80


@each_command
def test_the_help_has_every_argument_and_can_be_printed_twice(parser: Parser) -> None:
    fresh = root()
    for word in parser.path:
        fresh = fresh.of(word)
    text = fresh.format_help()
    assert text == fresh.format_help()
    assert text.startswith(f"usage: qcow2bm {' '.join(parser.path)} ")
    for option in fresh.options:
        assert all(name in text for name in option.option_strings)
        assert option.help
    for argument in parser.words:
        assert argument.metavar in text
        assert argument.help
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as end:
        cli.main([*parser.path, "--help"])
    assert (end.value.code, printed.getvalue()) == (0, text)


def test_the_help_of_the_program_has_every_command() -> None:
    text = root().format_help()
    for word, row in COMMANDS.items():
        assert f"  {word} " in text
        assert row.summary in " ".join(text.split())


@pytest.mark.parametrize("arguments", ["--help", "--version", "map --help"])
def test_only_the_module_of_the_command_is_imported(arguments: str) -> None:
    code = (
        "import sys\nfrom qcow2bm.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stderr.split())
    families = {f"qcow2bm.cli.{row.module}" for row in COMMANDS.values()} & loaded
    assert families == ({"qcow2bm.cli.map"} if "map" in arguments else set())
    assert "numpy" not in loaded
    assert ("construct" in loaded) == ("map" in arguments)


def faults(source: str) -> Iterator[str]:
    """The uses of anything but public names, and the changes of values, in a module."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.startswith("qcow2bm"))
            case ast.ImportFrom(module="qcow2bm", names=names):
                public = {*qcow2bm.__all__, "cli"}
                yield from (alias.name for alias in names if alias.name not in public)
            case ast.ImportFrom(module=str(module)) if module.startswith("qcow2bm."):
                if module != "qcow2bm.units" and module.split(".")[1] != "cli":
                    yield module
            case ast.Assign(targets=targets):
                for target in targets:
                    match target:
                        case ast.Attribute(value=ast.Name(id="arguments"), attr=name):
                            yield f"changes arguments.{name}"
            case ast.Attribute(value=ast.Name(id="argparse"), attr=name) if name.startswith("_"):
                yield f"uses argparse.{name}"


@each_module
def test_a_module_uses_public_names_only_and_changes_no_arguments(path: Path) -> None:
    assert list(faults(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "from qcow2bm.api import open",
        "import qcow2bm.errors",
        "from qcow2bm import errors",
        "def f():\n    from qcow2bm.storage.file import FileStorage",
        "def run(arguments):\n    arguments.image = 'other'",
        "argparse._SubParsersAction",
    ],
)
def test_the_rules_have_teeth(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "from qcow2bm import Image, sidecar, __version__",
        "from qcow2bm.units import escape",
        "from qcow2bm.cli.output import size",
        "from qcow2bm.cli import output",
        "arguments = None",
    ],
)
def test_the_rules_let_the_rest_pass(source: str) -> None:
    assert not list(faults(source))
