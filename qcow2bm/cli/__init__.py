"""The command line: ``python -m qcow2bm`` and the console script ``qcow2bm``.

*Spec*: spec/cli.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qcow2bm import CommitError, Qcow2BmError, StorageError
from qcow2bm.cli.commands import parse
from qcow2bm.cli.hints import explain
from qcow2bm.cli.messages import FAILED, CommandError, fail, say
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
    try:
        with colors(call.arguments.color):
            return call.run(call.arguments)
    except UsageError as error:
        call.parser.error(str(error))
    except CommandError as failure:
        return fail(failure.subject, failure.reason)
    except (StorageError, CommitError) as error:  # the message names the file
        say(explain(error, call.parser.has_option))
        return FAILED
    except Qcow2BmError as error:
        return fail(call.parser.path[-1], explain(error))
    except MemoryError:
        return fail(call.parser.path[-1], "not enough memory")
