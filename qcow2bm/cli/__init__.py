"""The command line: ``python -m qcow2bm`` and the console script ``qcow2bm``.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from qcow2bm.cli.grammar import parse_arguments
from qcow2bm.errors import Qcow2BmError
from qcow2bm.units import escape

OK = 0
FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; without ``argv``, that of the process.

    0 fine, 1 could not do it, 2 done but problems were found, 64 wrong usage.
    """
    # numpy's threads are of no use here, and starting them takes half of its loading time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = parse_arguments(argv)
    try:
        status: int = import_module(f"qcow2bm.cli.{arguments.command}").run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return _end_on_closed_pipe()
    except KeyboardInterrupt:
        return _end_by_signal("SIGINT")
    except Qcow2BmError as error:
        return _fail(arguments.image, str(error))
    except MemoryError:
        return _fail(arguments.image, "not enough memory")
    except OSError as error:  # of the output: storage raises errors of the library's own
        return _fail("standard output", error.strerror or str(error))
    return status


def _fail(subject: str, message: str) -> int:
    subject = escape(subject)
    line = message if message.startswith(subject) else f"{subject}: {message}"
    print(f"qcow2bm: {line}", file=sys.stderr)
    _drop_output()
    return FAILED


def _end_on_closed_pipe() -> int:
    """The reader went away: ends as programs do that do not handle the signal."""
    _drop_output()
    return _end_by_signal("SIGPIPE")


def _end_by_signal(name: str) -> int:
    import signal  # it is only needed here, and takes time to load

    number = getattr(signal, name, None)
    if number is not None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return FAILED


def _drop_output() -> None:
    """Keeps the interpreter from writing what is left in the buffer when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
