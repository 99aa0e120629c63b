"""The command ``demo``: how short tracking makes a stop, on an image made for it.

With ``--qemu`` it shows the stop of a machine on QEMU, see `demo_qemu`.

*Spec*: spec/cli.md, "Demo".
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import NamedTuple

from qcow2bm import StateError, Tracker, open
from qcow2bm.cli import demo_qemu
from qcow2bm.cli.arguments import seconds
from qcow2bm.cli.demo_image import make_empty
from qcow2bm.cli.messages import CommandError
from qcow2bm.cli.parser import Arguments, Parser
from qcow2bm.units import format_size

_DISK_BYTES = 16 << 40
_GRANULARITY = 64 << 10
_BITMAP_BYTES = _DISK_BYTES // _GRANULARITY // 8
_ROOM_BYTES = _BITMAP_BYTES + (4 << 20)
_STRIPE_BYTES = 256 << 20  # of the disk: dirty and clean ones in turn
_WRITE_BYTES = 4 << 10
_WRITES_PER_SECOND = 1000
_FLUSH_SECONDS = 0.1
_PAUSES = 5

_EPILOG = """\
The image is in the folder for temporary files (TMPDIR) while the demo runs, and takes 33 MiB; with
--qemu the files take 320 MiB.

exit status: 0 done; 1 the command failed; 64 wrong usage
"""


class DemoArguments(Arguments):
    """The values of the arguments of ``demo``."""

    seconds: float
    qemu: bool


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = DemoArguments
    parser.examples = ("qcow2bm demo --seconds 3", "qcow2bm demo --qemu")
    parser.epilog = _EPILOG
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=seconds,
        default=10,
        help="track writes for N seconds",
    )
    parser.add_argument(
        "--qemu",
        action="store_true",
        help="show how short live offload makes the stop of a VM, with the QEMU that is installed",
    )


def run(arguments: DemoArguments) -> int:
    """Makes an image in a temporary folder, and compares two kinds of stops; the exit status."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix="qcow2bm-demo-")
    except OSError as error:
        raise CommandError("demo", f"no temporary folder: {error.strerror}") from error
    with temporary as folder:
        free = shutil.disk_usage(folder).free
        needed = demo_qemu.ROOM_BYTES if arguments.qemu else _ROOM_BYTES
        if free < needed:
            room = f"{format_size(needed)} of room, and there are {format_size(free)}"
            raise CommandError(os.path.dirname(folder), f"the demo needs {room}; set TMPDIR")
        if arguments.qemu:
            demo_qemu.demonstrate(Path(folder))
        else:
            _demonstrate(Path(folder, "demo.qcow2"), arguments.seconds)
    return 0


def _demonstrate(path: Path, seconds: float) -> None:
    disk, bitmap = format_size(_DISK_BYTES), format_size(_BITMAP_BYTES)
    print(f"A disk of {disk}, its bitmap of {bitmap} half dirty: {path}", flush=True)
    _make_image(path)
    print(
        f"A guest makes {_WRITES_PER_SECOND:,} random writes a second. "
        f"Meanwhile what changes in the bitmap is flushed every {_FLUSH_SECONDS} s.",
        flush=True,
    )
    tracked, everything = [], []  # in turn: what else the machine does affects both alike
    for number in range(_PAUSES):
        tracked.append(_tracked_stop(path, min(seconds, 0.25) if number else seconds, not number))
        everything.append(_stop_that_stores_everything(path, number))
    _compare(_Stop.median(tracked), _Stop.median(everything))


def _compare(tracked: _Stop, everything: _Stop) -> None:
    print(f"The guest pauses, and the bitmap is made valid (median of {_PAUSES}):\n")
    print(f"{'':18}{_HEADINGS}")
    print(f"store everything  {everything}\ntracked           {tracked}\n")
    print(
        f"{everything.bytes_written / tracked.bytes_written:.0f} times fewer bytes, "
        f"{everything.seconds / tracked.seconds:.0f} times faster"
    )


class _Stop(NamedTuple):
    """A stop: the bytes and barriers that it wrote, and how long it took."""

    bytes_written: int
    barriers: int
    seconds: float

    @classmethod
    def of(cls, tracker: Tracker) -> _Stop:
        """Stops a tracker."""
        begun = time.perf_counter()
        report = tracker.stop()
        return cls(report.bytes_written, report.barriers, time.perf_counter() - begun)

    @classmethod
    def median(cls, stops: list[_Stop]) -> _Stop:
        """The stop that took neither long nor short."""
        return sorted(stops, key=lambda stop: stop.seconds)[len(stops) // 2]

    def __str__(self) -> str:
        return f"{self.bytes_written:>12,}{self.barriers:>10}{self.seconds * 1e3:>14.1f}"


_HEADINGS = f"{'bytes':>12}{'barriers':>10}{'milliseconds':>14}"


def _make_image(path: Path) -> None:
    """Makes an empty disk, with a bitmap of which half the bits are set in every cluster."""
    make_empty(path, _DISK_BYTES)
    with open(path, "r+") as image, image.edit() as edit:
        edit.add("daily", _GRANULARITY)
        starts = range(0, _DISK_BYTES, 2 * _STRIPE_BYTES)
        edit.set_many("daily", [(start, _STRIPE_BYTES) for start in starts])


def _tracked_stop(path: Path, seconds: float, is_shown: bool) -> _Stop:
    """A stop after writes were tracked, and the bitmap flushed, for some time."""
    with open(path, "r+") as image, image.track() as tracker:
        with _guest(tracker) as guest:

            def status() -> str:
                pending = format_size(tracker.pending.bytes)
                return f"{guest.writes:,} writes, a stop now would store {pending}"

            with tracker.background(_FLUSH_SECONDS):
                if is_shown:
                    _show(status, seconds)
                else:
                    time.sleep(seconds)
            time.sleep(_FLUSH_SECONDS)  # the pause comes when most has changed since a flush
        return _Stop.of(tracker)


def _stop_that_stores_everything(path: Path, number: int) -> _Stop:
    """A stop after something changed in every part of the bitmap, and nothing was flushed.

    The changes are in the clean stripes, each time a granule farther in them than for the
    ``number`` before.
    """
    with open(path, "r+") as image, image.track() as tracker:
        for start in range(_STRIPE_BYTES, _DISK_BYTES, 2 * _STRIPE_BYTES):
            tracker.mark(start + number * _GRANULARITY, _GRANULARITY)
        return _Stop.of(tracker)


class _Guest:
    """Writes at random places, as far as its tracker can tell.

    Attributes:
        writes: how many writes there were so far.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.writes = 0
        self._tracker = tracker

    def run(self, is_paused: Event) -> None:
        """Writes until it is paused, or the tracker has failed, which then says why."""
        random, begun = Random(), time.monotonic()
        with suppress(StateError):
            while not is_paused.wait(0.01):
                while self.writes < (time.monotonic() - begun) * _WRITES_PER_SECOND:
                    start = random.randrange(0, _DISK_BYTES, _WRITE_BYTES)
                    with self._tracker.writing(start, _WRITE_BYTES):
                        self.writes += 1  # where a server writes the data


@contextmanager
def _guest(tracker: Tracker) -> Iterator[_Guest]:
    """A guest that runs while the block does."""
    guest, is_paused = _Guest(tracker), Event()
    thread = Thread(target=guest.run, args=(is_paused,))
    thread.start()
    try:
        yield guest
    finally:
        is_paused.set()
        thread.join()


def _show(status: Callable[[], str], seconds: float) -> None:
    """Shows the status each second: in a bar where tqdm is installed, else in lines."""
    steps = math.ceil(seconds)
    try:
        progress = import_module("tqdm").tqdm(total=steps, unit="s")
    except ImportError:
        progress = nullcontext()
    with progress as bar:
        for step in range(steps):
            time.sleep(seconds / steps)
            if bar is None:
                print(f"{seconds * (step + 1) / steps:5.0f} s  {status()}", flush=True)
            else:
                bar.set_postfix_str(status(), refresh=False)
                bar.update()
