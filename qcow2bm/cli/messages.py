"""Standard output as a command uses it, and its messages on standard error.

*Spec*: spec/cli.md, "Exit status".
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

from qcow2bm import CommitError, Qcow2BmError, StorageError
from qcow2bm.cli.hints import explain
from qcow2bm.units import escape

if TYPE_CHECKING:
    from typing_extensions import Buffer

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


class WatchedOutput:
    """Standard output while a command runs; it knows whether the command has printed anything.

    As a context manager, it takes the place of standard output.

    Attributes:
        is_begun: whether anything was printed. Then no document may follow.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout
        self.is_begun = False

    def __enter__(self) -> WatchedOutput:
        sys.stdout = cast("TextIO", self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.stdout = self._stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text."""
        self.is_begun = True
        return self._stream.write(text)

    @property
    def buffer(self) -> BinaryIO:
        """What takes bytes, which the caller asks for only to write some."""
        self.is_begun = True
        return self._stream.buffer


class OutputFile(io.FileIO):
    """The file of standard output, which drops what it gets once it is told to."""

    def __init__(self) -> None:
        """Opens standard output once more; to close this leaves standard output open."""
        super().__init__(1, "w", closefd=False)
        self._drops = False

    def drop(self) -> None:
        """Lets all later writes succeed and do nothing."""
        self._drops = True

    def write(self, data: Buffer, /) -> int:
        """Writes as a file does; returns how many bytes were written."""
        return memoryview(data).nbytes if self._drops else super().write(data)


def discard_output() -> None:
    """Drops what could not be written; otherwise the interpreter would try again at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
        if isinstance(file, OutputFile):
            file.drop()
        else:
            sys.stdout = io.TextIOWrapper(io.BytesIO())


def fail(subject: str, reason: str) -> int:
    """Prints why a command failed; returns the exit status for that."""
    say(f"{escape(subject)}: {reason}")
    return FAILED


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None] | None]:
    """Shows on a terminal how much of ``total`` bytes is done: with tqdm if it is installed.

    Yields a function that is to be called with each further number of bytes that is done; None
    if standard error is no terminal.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        yield _Percentage(total).add
        print(file=sys.stderr)
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update


class _Percentage:
    """A number that counts up to 100."""

    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._done = 0
        self._shown = -1

    def add(self, count: int) -> None:
        """Adds ``count`` bytes to those that are done."""
        self._done += count
        percentage = 100 * self._done // self._total
        if percentage > self._shown:
            self._shown = percentage
            print(f"\rcompared: {percentage} %", end="", file=sys.stderr, flush=True)
