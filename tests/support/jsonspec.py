"""Checks what the command line prints against the tables of spec/json.md.

A value cell is alternatives joined by "or": ``null``, ``integer``, ``number``, ``string``,
``boolean``, a literal, a link to the table of another object, or a list of such.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from support.specreader import page

_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
}
_LINK = re.compile(r"\[(.+)\]\(#.+\)")


def check_dump(document: object) -> None:
    """Raises AssertionError unless the document is what ``dump`` may print."""
    _check_object("dump", document, "dump")


def check_stream_dump(document: object) -> None:
    """Raises AssertionError unless the document is what ``stream dump`` may print."""
    _check_object("stream dump", document, "stream dump")


def check_check(document: object) -> None:
    """Raises AssertionError unless the document is what ``check`` may print."""
    _check_object("check", document, "check")


def check_backup(document: object) -> None:
    """Raises AssertionError unless the document is what ``backup`` may print."""
    _check_object("backup", document, "backup")


def check_repair(document: object) -> None:
    """Raises AssertionError unless the document is what ``repair`` may print."""
    _check_object("repair", document, "repair")


def check_salvage(document: object) -> None:
    """Raises AssertionError unless the document is what ``salvage`` may print."""
    _check_object("salvage", document, "salvage")


def check_verdict(document: object) -> None:
    """Raises AssertionError unless the document is what ``verdict`` may print."""
    _check_object("verdict", document, "verdict")


def check_measure(document: object) -> None:
    """Raises AssertionError unless the document is what ``measure`` may print."""
    _check_object("measure", document, "measure")


def check_prune(document: object) -> None:
    """Raises AssertionError unless the document is what ``prune`` may print."""
    _check_object("prune", document, "prune")


def check_verify(document: object) -> None:
    """Raises AssertionError unless the document is what ``verify`` may print."""
    _check_object("verify", document, "verify")


def check_sidecar_dump(document: object) -> None:
    """Raises AssertionError unless the document is what ``sidecar dump`` may print."""
    _check_object("sidecar dump", document, "sidecar dump")


def check_live(action: str, document: object) -> None:
    """Raises AssertionError unless the document is what ``live`` with this word may print."""
    _check_object(f"live {action}", document, action)


def check_rescue(action: str, document: object) -> None:
    """Raises AssertionError unless the document is what ``rescue`` with this word may print."""
    _check_object(f"rescue {action}", document, action)


def check_failure(document: object) -> None:
    """Raises AssertionError unless the document is what a command may print that fails."""
    _check_object("failure", document, "failure")
    assert isinstance(document, dict)
    rows = {row["id"]: row for row in page("json.md").table("Error ids").rows}
    facts = {fact for fact in rows[document["error"]["id"]]["facts"].split(", ") if fact}
    assert document["error"].keys() == {"id", "message", "hint", *facts}, f"failure: {document}"


def failure_in(out: str, err: str) -> dict[str, Any]:
    """Returns the document of a command that failed.

    Raises AssertionError unless ``out`` is nothing but that document, and ``err`` says the same: a
    line, and the commands that help.
    """
    document: dict[str, Any] = json.loads(out)
    check_failure(document)
    message, *more = err.splitlines()
    assert message == f"qcow2bm: {document['error']['message']}"
    assert all(line.startswith("  ") for line in more)
    commands = [line.removeprefix("  next: ") for line in more if line.startswith("  next: ")]
    assert [shlex.split(command) for command in commands] == document["next"]
    return document


def check_dry_run(document: object) -> None:
    """Raises AssertionError unless the document is what a dry run may print."""
    _check_object("dry run", document, "dry run")


def check_map(document: object) -> None:
    """Raises AssertionError unless the document is what ``map``, or its totals, may print."""
    assert isinstance(document, list), "map: not a list"
    for number, row in enumerate(document):
        heading = "map totals" if isinstance(row, dict) and "percent" in row else "map"
        _check_object(heading, row, f"map[{number}]")


def _check_object(heading: str, found: object, where: str) -> None:
    assert isinstance(found, dict), f"{where}: not an object"
    rows = page("json.md").table(heading).rows
    values = {row["key"].removesuffix(", optional"): row["value"] for row in rows}
    required = {row["key"] for row in rows if not row["key"].endswith(", optional")}
    assert found.keys() <= values.keys(), f"{where}: unknown {found.keys() - values.keys()}"
    assert required <= found.keys(), f"{where}: without {required - found.keys()}"
    for key, value in found.items():
        _check_value(values[key].split(" or "), value, f"{where}.{key}")


def _check_value(alternatives: list[str], value: object, where: str) -> None:
    for alternative in alternatives:
        link = _LINK.fullmatch(alternative)
        if alternative.startswith("list of ") and isinstance(value, list):
            for number, item in enumerate(value):
                items = alternative.removeprefix("list of ").split(", ")
                _check_value(items, item, f"{where}[{number}]")
            return
        if link and isinstance(value, dict):
            _check_object(link[1], value, where)
            return
        if isinstance(value, _TYPES.get(alternative, ())) and (
            alternative == "boolean" or not isinstance(value, bool)
        ):
            return
        if alternative not in _TYPES and json.dumps(value) == alternative:
            return
    raise AssertionError(f"{where}: {value!r} is none of {', '.join(alternatives)}")
