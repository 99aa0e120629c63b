"""The process around a command: its output, and how it ends.

*Spec*: spec/cli.md, "Exit status".
"""

from __future__ import annotations

import io
import os
import sys

from qcow2bm.units import escape

FAILED = 1


def say(text: str) -> None:
    """A line on standard error; where that is closed or broken, there is nobody to tell."""
    if sys.stderr is None:
        return
    try:
        print(f"qcow2bm: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = None  # or the interpreter tries again when it exits, and changes the status


def fail(subject: str, message: str) -> int:
    """Says what could not be done; the exit status for it."""
    say(f"{escape(subject)}: {message}")
    return FAILED


def run() -> int:
    """The program ``qcow2bm``: runs the command line on this process; its exit status."""
    # numpy's threads are of no use here, and starting them takes half of its loading time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from qcow2bm.cli import main

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
    except OSError as error:  # of the output: storage raises errors of the library's own
        return fail("standard output", error.strerror or str(error))
    finally:
        _discard_output()


def _output() -> io.TextIOWrapper:
    """Standard output that writes all or raises, whatever Python's own does.

    With PYTHONUNBUFFERED it has no buffer, and then nobody notices that a file or a pipe took
    only a part. Names may have characters that the terminal's encoding has not.
    """
    raw = io.FileIO(1, "w", closefd=False)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(raw, 1 << 16), encoding, "backslashreplace", line_buffering=raw.isatty()
    )


def _discard_output() -> None:
    """Keeps the interpreter from writing what is left, and failing, when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        sys.stdout = io.TextIOWrapper(io.BytesIO())


def _end_by_signal(name: str) -> int:
    """Ends as programs do that do not handle the signal, where there are signals."""
    import signal  # it is only needed here, and takes time to load

    if os.name == "posix":
        number = getattr(signal, name)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return FAILED
