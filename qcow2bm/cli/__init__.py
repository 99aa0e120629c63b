"""The command line: ``python -m qcow2bm`` and the console script ``qcow2bm``.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from qcow2bm.cli.console import fail, say
from qcow2bm.cli.grammar import parse_arguments
from qcow2bm.cli.hints import explain
from qcow2bm.errors import CommitError, Qcow2BmError, StorageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; without ``argv``, that of the process.

    0 fine, 1 could not do it, 2 done but problems were found, 64 wrong usage.

    Raises:
        OSError: of standard output, `BrokenPipeError` included.
        SystemExit: wrong usage, --help and --version.
    """
    arguments = parse_arguments(argv)
    try:
        status: int = import_module(f"qcow2bm.cli.{arguments.module}").run(arguments)
    except (StorageError, CommitError) as error:  # says itself which file
        say(explain(error))
        return 1
    except Qcow2BmError as error:
        return fail(arguments.image, explain(error))
    except MemoryError:
        return fail(arguments.image, "not enough memory")
    return status
