"""The messages of a command on standard error: failures, warnings, and progress.

*Spec*: spec/cli.md, "Exit status".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from qcow2bm import CommitError, Qcow2BmError, StorageError
from qcow2bm.cli.hints import explain
from qcow2bm.units import escape, format_size

FAILED = 1


class CommandError(Exception):
    """A command failed. The line on standard error names the ``subject`` and the ``reason``."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(subject, reason)
        self.subject, self.reason = subject, reason


@contextmanager
def about(subject: str, *more_errors: type[Exception]) -> Iterator[None]:
    """Adds to errors in the block the name of the file or VM that they are about.

    Args:
        subject: the file or VM.
        more_errors: errors that the command expects, apart from those of the library.

    Raises:
        CommandError: instead of an error of the library, one of ``more_errors``, or `MemoryError`.
        StorageError, CommitError: as they were raised, since their messages name the file.
    """
    try:
        yield
    except (StorageError, CommitError):
        raise
    except Qcow2BmError as error:
        raise CommandError(subject, explain(error)) from error
    except more_errors as error:
        raise CommandError(subject, str(error)) from error
    except MemoryError as error:
        raise CommandError(subject, "not enough memory") from error


def say(text: str) -> None:
    """Prints a message on standard error, unless standard error is closed or broken."""
    _print_error(f"qcow2bm: {text}")


def say_more(text: str) -> None:
    """Prints one more line of the message that `say` printed last."""
    _print_error(f"  {text}")


def _print_error(line: str) -> None:
    if sys.stderr is None:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = None  # or the interpreter tries again when it exits, and changes the status


def fail(subject: str, reason: str) -> int:
    """Prints why a command failed; returns the exit status for that."""
    say(f"{escape(subject)}: {reason}")
    return FAILED


@contextmanager
def progress(total: int, done: str) -> Iterator[Callable[[int], None] | None]:
    """Shows on a terminal how much of ``total`` bytes is done: with tqdm if it is installed.

    ``done`` says what is done with them, such as "compared".

    Yields a function that is to be called with each further number of bytes that is done; None
    if standard error is no terminal.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        yield _Percentage(total, done).add
        print(file=sys.stderr)
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update


class _Percentage:
    """A number that counts up to 100."""

    def __init__(self, total: int, word: str) -> None:
        self._word = word
        self._total = max(1, total)
        self._done = 0
        self._shown = -1

    def add(self, count: int) -> None:
        """Adds ``count`` bytes to those that are done."""
        self._done += count
        percentage = min(100, 100 * self._done // self._total)
        if percentage > self._shown:
            self._shown = percentage
            text = f"\r{self._word}: {percentage} % of {format_size(self._total)}"
            print(text, end="", file=sys.stderr, flush=True)
