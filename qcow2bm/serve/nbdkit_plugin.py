"""An nbdkit plugin that serves the raw data file of a qcow2 image and tracks its bitmaps.

    nbdkit python "$(qcow2bm nbdkit-plugin)" image=vm.qcow2 data=vm.raw

Parameters::

    image=PATH            the qcow2 image, made with data_file_raw=on, preallocation=metadata
    data=PATH             its data file
    bitmaps=NAME,NAME...  the bitmaps to track; by default all that are enabled and valid
    bitmap=NAME           one more of them, also one with a comma in its name
    others=mark-in-use    let enabled bitmaps that are left out be lost, instead of refusing
    flush-interval=5      after how many seconds to store what has changed; 0 for at the end only

This file is a script for the Python inside nbdkit, nothing to import: nbdkit finds the functions
by their names. What they do is in `qcow2bm.serve.disk`.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

# Starting threads before nbdkit forks would lose them; numpy's are of no use here.
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
    import numpy  # noqa: F401  # needed later, when this could not be said as well

    from qcow2bm.errors import Qcow2BmError, StateError, StorageError, UnsupportedError
    from qcow2bm.serve import disk as served
    from qcow2bm.serve.signals import EndSignals
except ImportError as error:
    _reason = (str(error).strip().splitlines() or [""])[0]
    _refuse(f"cannot be loaded from {FOLDER} by Python {PYTHON}: {_reason}")

API_VERSION = 2

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # all else is EIO to a client

_paths: dict[str, str] = {}
_names: list[str] = []
_others: served.Others = "refuse"
_flush_interval = 5.0
_disk: served.Disk | None = None
_signals: EndSignals | None = None


class UsageError(Exception):
    """The parameters are wrong; the message says it all."""


_format_any = traceback.format_exception


def _format_exception(kind: Any, error: Any, trace: Any) -> list[str]:  # noqa: ANN401
    """What nbdkit prints of an exception: one line where that says it all."""
    if not isinstance(error, Qcow2BmError | UsageError):
        return list(_format_any(kind, error, trace))
    cause = error.__cause__
    return [f"{error}: {cause}" if isinstance(error, StateError) and cause else str(error)]


traceback.format_exception = _format_exception  # type: ignore[assignment]


def config(key: str, value: str) -> None:
    """Takes a parameter."""
    global _others, _flush_interval
    if key in ("image", "data"):
        _paths[key] = os.path.abspath(value)  # in the background nbdkit is in another folder
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
    """Has got all parameters."""
    for key in ("image", "data"):
        if key not in _paths:
            raise UsageError(f"the parameter {key}=PATH is missing")


def thread_model() -> int:
    """Requests come from any number of threads."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    """Says what is wrong while somebody can read it; nothing stays open over the fork."""
    served.check(_paths["image"], _paths["data"], _names or None, others=_others)


def after_fork() -> None:
    """Opens the disk: locks and threads belong to the process that serves."""
    global _disk, _signals
    _disk = served.Disk(
        _paths["image"],
        _paths["data"],
        _names or None,
        others=_others,
        flush_interval=_flush_interval,
    )
    _signals = EndSignals(_stop)


def _stop() -> None:
    """Stores the bitmaps when nbdkit is to end, which waits until all clients have left."""
    nbdkit.shutdown()
    if _disk:
        with suppress(Qcow2BmError):  # cleanup says it
            _disk.stop()


def cleanup() -> None:
    """Stores the bitmaps if that is not done, and lets go of everything."""
    if _signals:
        _signals.close()
    if _disk:
        _disk.close()


def open(readonly: bool) -> served.Disk | None:
    """What the other functions get: the disk."""
    return _disk


def get_size(disk: served.Disk) -> int:
    """The length of the disk in bytes."""
    return disk.size


def can_multi_conn(disk: served.Disk) -> bool:
    """A flush on one connection is a flush on all: there is one descriptor."""
    return True


def can_fua(disk: served.Disk) -> int:
    """Single writes can be made durable."""
    return int(nbdkit.FUA_NATIVE)


def can_fast_zero(disk: served.Disk) -> bool:
    """Zeroing says so if it could not be fast."""
    return True


@contextmanager
def _errors() -> Iterator[None]:
    """Tells the client which error it was, where it can make a difference."""
    try:
        yield
    except UnsupportedError:
        nbdkit.set_error(errno.EOPNOTSUPP)
        raise
    except StorageError as error:
        nbdkit.set_error(errno.ENOSPC if error.errno in _NO_ROOM else errno.EIO)
        raise


def pread(disk: served.Disk, buffer: bytearray, offset: int, flags: int) -> None:
    """Reads."""
    with _errors():
        disk.read_into(offset, memoryview(buffer))


def pwrite(disk: served.Disk, buffer: bytes, offset: int, flags: int) -> None:
    """Writes."""
    with _errors():
        disk.write(offset, buffer, fua=bool(flags & nbdkit.FLAG_FUA))


def trim(disk: served.Disk, count: int, offset: int, flags: int) -> None:
    """Gives up what stands in a range."""
    with _errors():
        disk.trim(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


def zero(disk: served.Disk, count: int, offset: int, flags: int) -> None:
    """Writes zeros."""
    with _errors():
        disk.zero(
            offset,
            count,
            may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM),
            is_fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
            fua=bool(flags & nbdkit.FLAG_FUA),
        )


def flush(disk: served.Disk, flags: int) -> None:
    """Makes durable what was written."""
    with _errors():
        disk.flush()
