"""The failure of a command: the line on standard error, and the document that says it in JSON.

*Spec*: spec/json.md, "failure".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from errno import errorcode
from typing import Any, NamedTuple

from qcow2bm import (
    BitmapBrokenError,
    BitmapError,
    BitmapExistsError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    BitmapStaleError,
    ChangedWhileReadingError,
    CommitError,
    ComparisonError,
    EvidenceError,
    FormatError,
    ImageLockedError,
    IntentError,
    LimitError,
    NoRoomError,
    Qcow2BmError,
    QmpError,
    QmpRefusedError,
    QmpTimeoutError,
    ReadOnlyImageError,
    ShortReadError,
    StateError,
    StorageError,
    TailError,
    UnsupportedError,
)
from qcow2bm.cli.hints import explain
from qcow2bm.cli.messages import CommandError
from qcow2bm.cli.output import SCHEMA, json_text, json_text_or_null, print_json
from qcow2bm.cli.parser import Parser
from qcow2bm.cli.standard_output import discard_output
from qcow2bm.units import escape


class Row(NamedTuple):
    """A row of the table: the id of an error, and the attributes that are facts for programs."""

    id: str
    facts: tuple[str, ...] = ()


_STORAGE = "action", "offset", "length", "errno"

ERRORS: dict[type[Exception], Row] = {
    Qcow2BmError: Row("other"),
    FormatError: Row("format", ("structure", "field", "offset")),
    UnsupportedError: Row("unsupported", ("feature",)),
    LimitError: Row("limit", ("what", "value", "limit", "missing", "bitmaps")),
    BitmapError: Row("bitmap", ("name",)),
    BitmapNotFoundError: Row("bitmap-not-found", ("name",)),
    BitmapExistsError: Row("bitmap-exists", ("name",)),
    BitmapInconsistentError: Row("bitmap-inconsistent", ("name",)),
    BitmapStaleError: Row("bitmap-stale", ("name",)),
    BitmapBrokenError: Row("bitmap-broken", ("name",)),
    StateError: Row("state", ("subject", "state", "required")),
    ReadOnlyImageError: Row("read-only-image", ("subject", "state", "required")),
    StorageError: Row("storage", _STORAGE),
    ShortReadError: Row("short-read", _STORAGE),
    ImageLockedError: Row("image-locked", ("action", "held", "lock_byte")),
    ChangedWhileReadingError: Row("changed-while-reading", ("structure",)),
    NoRoomError: Row("no-room", ("needed", "missing", "limit", "bitmaps")),
    ComparisonError: Row("comparison", ("fault", "container")),
    EvidenceError: Row("evidence"),
    IntentError: Row("intent"),
    TailError: Row("tail"),
    CommitError: Row("commit", ("step", "outcome", "growth", "bitmaps")),
    QmpError: Row("qmp", ("command",)),
    QmpRefusedError: Row("qmp-refused", ("command",)),
    QmpTimeoutError: Row("qmp-timeout", ("command", "seconds")),
    ValueError: Row("wrong-value"),
    MemoryError: Row("no-memory"),
    Exception: Row("failed"),
}
"""The table of all errors; an error that has no row of its own has that of its nearest base."""


class Failure(NamedTuple):
    """Why a command failed.

    Attributes:
        subject: the file or VM that the failure is about; None if it is about none.
        message: the line on standard error.
        error: the error that led to it.
    """

    subject: str | None
    message: str
    error: BaseException


def failure_of(error: Exception, parser: Parser) -> Failure:
    """Returns the failure of a command that ended with an error; ``parser`` is the command's."""
    if isinstance(error, CommandError):
        message = f"{escape(error.subject)}: {error.reason}"
        return Failure(error.subject, message, error.__cause__ or error)
    if isinstance(error, StorageError | CommitError):  # the message names the file
        return Failure(error.path, explain(error, parser.has_option), error)
    reason = "not enough memory" if isinstance(error, MemoryError) else explain(error)
    return Failure(None, f"{parser.path[-1]}: {reason}", error)


def print_failure(failure: Failure, following: Sequence[Sequence[str]]) -> None:
    """Prints a failure as a document; ``following`` are the commands that help.

    If standard output does not take it, nothing more is said: the command has failed already.

    Raises:
        BrokenPipeError: the reader of standard output has gone away.
    """
    try:
        print_json(document(failure, following))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        discard_output()


def document(failure: Failure, following: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """Returns a failure as "failure" in spec/json.md."""
    row = next(ERRORS[kind] for kind in type(failure.error).__mro__ if kind in ERRORS)
    facts = {name.replace("_", "-"): _fact(failure.error, name) for name in row.facts}
    hint = getattr(failure.error, "hint", None)
    return {
        "schema": SCHEMA,
        "filename": json_text_or_null(failure.subject),
        "error": {"id": row.id, "message": json_text(failure.message), "hint": hint, **facts},
        "next": list(following),
    }


def _fact(error: BaseException, name: str) -> object:
    value = getattr(error, name)
    if name == "bitmaps":
        return [{"name": json_text(name), "bytes": size} for name, size in value]
    if name == "errno":
        return errorcode.get(value)
    if name in ("field", "container"):
        return value or None
    return json_text(value) if isinstance(value, str) else value
