"""The program ``qcow2bm``: the process around one command, its output, and how it ends.

*Spec*: spec/cli.md, "Exit status".
"""

from __future__ import annotations

import io
import os
import sys

from qcow2bm.cli import main
from qcow2bm.cli.messages import FAILED, fail
from qcow2bm.cli.standard_output import OutputFile, discard_output


def run() -> int:
    """Runs the command that this process was started for; returns the exit status."""
    # numpy's threads are of no use here, and starting them takes half of its loading time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        sys.stdout = _output()
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return _end_by_signal("SIGPIPE")
    except KeyboardInterrupt:
        return _end_by_signal("SIGINT")
    except OSError as error:  # of standard output: for files the library has its own errors
        return fail("standard output", error.strerror or str(error))
    finally:
        discard_output()


def _output() -> io.TextIOWrapper:
    """Standard output that writes everything or raises an error.

    Python's own does not with PYTHONUNBUFFERED: then it has no buffer, and if a file or a pipe
    takes only a part, the rest is lost without an error. Characters of names that the terminal's
    encoding does not have are escaped.
    """
    raw = OutputFile()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(raw, 1 << 16), encoding, "backslashreplace", line_buffering=raw.isatty()
    )


def _end_by_signal(name: str) -> int:
    """Ends the process by a signal; on systems without signals, returns the status of a failure."""
    import signal  # which takes time to load

    if os.name == "posix":
        number = getattr(signal, name)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return FAILED
