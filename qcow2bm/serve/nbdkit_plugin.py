"""An nbdkit plugin that serves the raw data file of a qcow2 image and tracks its bitmaps.

    nbdkit python "$(qcow2bm nbdkit-plugin)" image=vm.qcow2 data=vm.raw

Parameters::

    image=PATH            the qcow2 image, made with data_file_raw=on, preallocation=metadata
    data=PATH             its data file
    bitmaps=NAME,NAME...  the bitmaps to track; by default all that are enabled and valid
    bitmap=NAME           one more of them, also one with a comma in its name
    others=mark-in-use    mark enabled bitmaps that are left out in_use, which loses them, instead
                          of refusing to begin
    flush-interval=5      the seconds between two flushes of the bitmaps; 0 for no flush before the
                          end
    intent=yes            let no bitmap be lost if nbdkit or the host dies: a write to a region that
                          was not written to for some time waits for one barrier more

This file is a script for the Python inside nbdkit, and is not imported: nbdkit finds the functions
by their names. `qcow2bm.serve.disk` does the work. ``nbdkit -v`` shows what the library logs.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

# nbdkit forks after it has loaded this file, which would lose the threads that numpy starts.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

FOLDER = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
PYTHON = ".".join(map(str, sys.version_info[:2]))


def _refuse(reason: str) -> None:
    sys.exit(f"nbdkit: error: qcow2bm: {reason}")


_installed_for = re.search(r"/python(\d+\.\d+)/(?:site|dist)-packages$", FOLDER)
if _installed_for and _installed_for[1] != PYTHON:
    _refuse(f"is installed for Python {_installed_for[1]}, but nbdkit runs Python {PYTHON}")
sys.path.insert(0, FOLDER)
try:
    import nbdkit  # type: ignore[import-not-found]
    import numpy  # noqa: F401  # needed later, when an error could not be reported as well

    from qcow2bm.errors import Qcow2BmError, StateError, StorageError, UnsupportedError
    from qcow2bm.log import logger
    from qcow2bm.serve import disk as served
    from qcow2bm.serve.signals import EndSignals
except ImportError as error:
    _reason = (str(error).strip().splitlines() or [""])[0]
    _refuse(f"cannot be loaded from {FOLDER} by Python {PYTHON}: {_reason}")

API_VERSION = 2

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a client gets EIO for all other errors

_paths: dict[str, str] = {}
_names: list[str] = []
_others: served.Others = "refuse"
_flush_interval = 5.0
_intent = False
_disk: served.Disk | None = None
_signals: EndSignals | None = None


class UsageError(Exception):
    """The parameters are wrong; the message says which and why."""


_format_any = traceback.format_exception


def _format_exception(kind: Any, error: Any, trace: Any) -> list[str]:  # noqa: ANN401
    """Returns what nbdkit prints of an exception: one line for an error of this library.

    The hint of such an error names arguments of the library, which nbdkit does not have.
    """
    if not isinstance(error, Qcow2BmError | UsageError):
        return list(_format_any(kind, error, trace))
    text, cause = error.facts if isinstance(error, Qcow2BmError) else str(error), error.__cause__
    return [f"{text}: {cause}" if isinstance(error, StateError) and cause else text]


traceback.format_exception = _format_exception  # type: ignore[assignment]


class _DebugHandler(logging.Handler):
    """Passes what the library logs to nbdkit, which prints it with ``-v``."""

    def emit(self, record: logging.LogRecord) -> None:
        nbdkit.debug(f"qcow2bm: {self.format(record)}")


logger.addHandler(_DebugHandler())
logger.setLevel(logging.INFO)


def config(key: str, value: str) -> None:
    """Takes a parameter."""
    global _others, _flush_interval, _intent
    if key in ("image", "data"):
        _paths[key] = os.path.abspath(value)  # nbdkit changes its folder before it serves
    elif key == "bitmaps":
        _names.extend(value.split(","))
    elif key == "bitmap":
        _names.append(value)
    elif key == "others":
        if value not in ("refuse", "mark-in-use"):
            raise UsageError(f"others={value} must be refuse or mark-in-use")
        _others = cast("served.Others", value)
    elif key == "flush-interval":
        _flush_interval = _seconds(value)
    elif key == "intent":
        if value not in ("yes", "no"):
            raise UsageError(f"intent={value} must be yes or no")
        _intent = value == "yes"
    else:
        raise UsageError(f"unknown parameter {key}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise UsageError(f"flush-interval={text} is no number of seconds")
    return seconds


def config_complete() -> None:
    """Checks that no parameter is missing."""
    for key in ("image", "data"):
        if key not in _paths:
            raise UsageError(f"the parameter {key}=PATH is missing")


def thread_model() -> int:
    """Returns that requests may come from any number of threads at a time."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    """Checks the files while nbdkit still has a terminal; nothing stays open over the fork."""
    served.check(_paths["image"], _paths["data"], _names or None, others=_others)


def after_fork() -> None:
    """Opens the disk, since locks and threads must belong to the process that serves."""
    global _disk, _signals
    _disk = served.Disk(
        _paths["image"],
        _paths["data"],
        _names or None,
        others=_others,
        flush_interval=_flush_interval,
        intent=_intent,
    )
    _signals = EndSignals(_stop)


def _stop() -> None:
    """Stores the bitmaps when nbdkit is asked to end; nbdkit waits until all clients have left."""
    nbdkit.shutdown()
    if _disk:
        with suppress(Qcow2BmError):  # `cleanup` raises it
            _disk.stop()


def cleanup() -> None:
    """Stores the bitmaps unless they are stored, and closes everything."""
    if _signals:
        _signals.close()
    if _disk:
        _disk.close()


def open(readonly: bool) -> served.Disk | None:
    """Returns the disk, which nbdkit passes to the other functions."""
    return _disk


def get_size(disk: served.Disk) -> int:
    """Returns the size of the disk in bytes."""
    return disk.size


def can_multi_conn(disk: served.Disk) -> bool:
    """Returns that a flush on one connection is a flush on all: there is one descriptor."""
    return True


def can_fua(disk: served.Disk) -> int:
    """Returns that single writes can be made durable."""
    return int(nbdkit.FUA_NATIVE)


def can_fast_zero(disk: served.Disk) -> bool:
    """Returns that zeroing fails at once if it cannot be fast."""
    return True


@contextmanager
def _errors() -> Iterator[None]:
    """Tells the client the kind of an error: no space, not supported, or any other."""
    try:
        yield
    except UnsupportedError:
        nbdkit.set_error(errno.EOPNOTSUPP)
        raise
    except StorageError as error:
        nbdkit.set_error(errno.ENOSPC if error.errno in _NO_ROOM else errno.EIO)
        raise


def pread(disk: served.Disk, buffer: bytearray, offset: int, flags: int) -> None:
    """Reads a range."""
    with _errors():
        disk.read_into(offset, memoryview(buffer))


def pwrite(disk: served.Disk, buffer: bytes, offset: int, flags: int) -> None:
    """Writes a range."""
    with _errors():
        disk.write(offset, buffer, fua=bool(flags & nbdkit.FLAG_FUA))


def trim(disk: served.Disk, count: int, offset: int, flags: int) -> None:
    """Discards the data of a range."""
    with _errors():
        disk.trim(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


def zero(disk: served.Disk, count: int, offset: int, flags: int) -> None:
    """Makes a range read as zeros."""
    with _errors():
        disk.zero(
            offset,
            count,
            may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM),
            is_fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
            fua=bool(flags & nbdkit.FLAG_FUA),
        )


def flush(disk: served.Disk, flags: int) -> None:
    """Makes everything written so far durable."""
    with _errors():
        disk.flush()
