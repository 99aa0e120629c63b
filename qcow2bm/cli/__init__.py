"""The command line: ``python -m qcow2bm`` and the console script ``qcow2bm``.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qcow2bm import Qcow2BmError
from qcow2bm.cli.commands import parse
from qcow2bm.cli.failure import WatchedOutput, failure_of, print_failure
from qcow2bm.cli.messages import FAILED, CommandError, say
from qcow2bm.cli.parser import UsageError
from qcow2bm.cli.terminal import colors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0 fine, 1 the command failed, 2 done but problems were found, 64 wrong usage.

    Args:
        argv: the command and its arguments; by default those of the process.

    Raises:
        OSError: standard output failed, for instance by `BrokenPipeError`.
        SystemExit: wrong usage, --help and --version.
    """
    call = parse(sys.argv[1:] if argv is None else argv)
    output = WatchedOutput()
    try:
        with output, colors(call.arguments.color):
            return call.run(call.arguments)
    except UsageError as error:
        call.parser.error(str(error))
    except (CommandError, Qcow2BmError, MemoryError) as error:
        failure = failure_of(error, call.parser)
        if getattr(call.arguments, "output", None) == "json" and not output.is_begun:
            print_failure(failure)
        say(failure.message)
        return FAILED
