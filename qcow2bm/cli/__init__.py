"""The command line: ``python -m qcow2bm`` and the console script ``qcow2bm``.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from typing import TextIO, cast

from qcow2bm import Qcow2BmError
from qcow2bm.cli.commands import Call, parse
from qcow2bm.cli.messages import FAILED, CommandError, say
from qcow2bm.cli.parser import UsageError
from qcow2bm.cli.standard_output import WatchedOutput
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
        with redirect_stdout(cast("TextIO", output)), colors(call.arguments.color):
            return call.run(call.arguments)
    except UsageError as error:
        call.parser.error(str(error))
    except (CommandError, Qcow2BmError, MemoryError) as error:
        _report(error, call, is_begun=output.is_begun)
        return FAILED


def _report(error: Exception, call: Call, *, is_begun: bool) -> None:
    """Prints a failure, and what helps; as a document only if no other one ``is_begun``."""
    # Only failures need these modules.
    from qcow2bm.cli.advice import advise_after
    from qcow2bm.cli.failure import failure_of, print_failure
    from qcow2bm.cli.next_command import Advice, say_advice

    failure = failure_of(error, call.parser)
    say(failure.message)
    advice = Advice()
    image = getattr(call.arguments, "image", None)
    if image is not None and failure.subject == image:
        with suppress(Qcow2BmError, MemoryError, OSError):  # the error that is told says more
            advice = advise_after(failure.error, image)
    if getattr(call.arguments, "output", None) == "json" and not is_begun:
        print_failure(failure, advice.as_json)
    say_advice(advice)
