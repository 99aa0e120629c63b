"""An interrupt at any line of the tracker: closing the image releases the locks.

No bitmap is valid that misses a mark.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.console import environment
from support.images import Stored, build_image
from support.interrupts import Interrupter
from support.specreader import SPEC

import qcow2bm
from qcow2bm.tracker import tracker as tracker_module

SIZE = 8 << 20
BITS = 16
FOLDER = str(Path(tracker_module.__file__).parent)


def write(tracker: qcow2bm.Tracker) -> None:
    with tracker.writing(5 << 20, 1):
        pass


ACTIONS: dict[str, Callable[[qcow2bm.Tracker], object]] = {
    "mark": lambda tracker: tracker.mark(5 << 20, 1),
    "writing": write,
    "pending": lambda tracker: tracker.pending,
    "flush": lambda tracker: tracker.flush(),
    "rotate": lambda tracker: tracker.rotate("b", "c"),
    "stop": lambda tracker: tracker.stop(),
    "abandon": lambda tracker: tracker.abandon(),
}


def interrupt(path: Path, action: str, at: int, *, intent: bool) -> bool:
    """Interrupts an action at that line, closes at once, and judges.

    With intent, all bitmaps are valid once they are recovered.

    Returns:
        Whether there is such a line.
    """
    interrupter = Interrupter(at, FOLDER)
    image = qcow2bm.open(path, "r+")
    tracker = image.track(intent=intent)
    tracker.mark(3 << 20, 1)
    has_returned = False
    try:
        with interrupter.active():
            ACTIONS[action](tracker)
            has_returned = True
    except KeyboardInterrupt:
        image.close()  # while the traceback, and so each frame of the tracker, still lives
    else:
        image.close()
    with qcow2bm.open(path, "r+") as again:  # the locks are free
        if again.recoverable:
            again.recover()
        if intent and action != "abandon":
            assert {"b"} <= again.bitmaps.keys()
            assert {bitmap.status for bitmap in again.bitmaps.values()} == {"valid"}
        for bitmap in again.bitmaps.values():
            if bitmap.status == "valid" and bitmap.name == "b":
                number = int.from_bytes(bitmap.packed().tobytes(), "little")
                assert number >> (3 << 20 >> BITS) & 1
                is_marked = has_returned and action in ("mark", "writing")
                assert number >> (5 << 20 >> BITS) & 1 or not is_marked
    assert has_returned or interrupter.was_hit
    return interrupter.was_hit


def interrupt_lines(folder: Path, action: str, step: int, *, intent: bool) -> None:
    """Interrupts one line in ``step``, from the first to the last."""
    data = build_image(Stored(b"b", granularity_bits=BITS), size=SIZE).data
    path = folder / "disk.qcow2"
    line = 0
    path.write_bytes(data)
    while interrupt(path, action, line, intent=intent):
        path.write_bytes(data)
        line += step
    assert line >= {"mark": 5, "writing": 20}.get(action, 10)
    print(f"{action}: {line // step} lines of {line} interrupted")


@pytest.mark.spec("INTENT-9")
@pytest.mark.parametrize("intent", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
def test_some_lines(tmp_path: Path, action: str, intent: bool) -> None:
    is_long = action in ("flush", "rotate", "stop")
    interrupt_lines(tmp_path, action, (29 if intent else 11) if is_long else 1, intent=intent)


@pytest.mark.deep
@pytest.mark.parametrize("intent", [False, True])
@pytest.mark.parametrize("action", ["flush", "rotate", "stop"])
def test_every_line(tmp_path: Path, action: str, intent: bool) -> None:
    interrupt_lines(tmp_path, action, 1, intent=intent)


def edit(tracker: qcow2bm.Tracker) -> None:
    with tracker.edit() as edit:
        edit.add("c", 1 << BITS)
        edit.merge("c", "b")


def ended_by_an_interrupt(path: Path, action: str, at: int) -> str:
    """Interrupts an action at that line; the block of the tracker ends. Returns its last state.

    Nothing was written where the interrupt came: what is valid has every other mark.
    """
    interrupter = Interrupter(at, FOLDER)
    try:
        with qcow2bm.open(path, "r+") as image, image.track() as tracker:
            tracker.mark(3 << 20, 1)
            with interrupter.active():
                {**ACTIONS, "edit": edit}[action](tracker)
    except KeyboardInterrupt:
        pass
    else:
        assert not interrupter.was_hit
        return ""
    with qcow2bm.open(path, "r+") as again:  # the locks are free
        valid = {b.name: b.packed() for b in again.bitmaps.values() if b.status == "valid"}
    if "b" in valid:
        assert int.from_bytes(valid["b"].tobytes(), "little") >> (3 << 20 >> BITS) & 1
    if tracker.state == "stopped":
        assert {"b", *tracker.names} <= valid.keys()
    return tracker.state


@pytest.mark.spec("TRACK-26")
@pytest.mark.parametrize("bitmaps", [(b"b",), (b"b", b"other")], ids=["one", "two"])
@pytest.mark.parametrize(
    ("action", "step"),
    [
        ("mark", 1),
        ("writing", 1),
        ("pending", 3),
        ("flush", 11),
        ("rotate", 11),
        ("edit", 11),
        ("stop", 11),
        pytest.param("flush", 1, marks=pytest.mark.deep),
        pytest.param("rotate", 1, marks=pytest.mark.deep),
        pytest.param("edit", 1, marks=pytest.mark.deep),
        pytest.param("stop", 1, marks=pytest.mark.deep),
    ],
)
def test_the_end_of_the_block_stores(
    tmp_path: Path, action: str, step: int, bitmaps: tuple[bytes, ...]
) -> None:
    """The bitmaps are lost only where the interrupt came while something was stored."""
    stored = [Stored(name, granularity_bits=BITS) for name in bitmaps]
    data = build_image(*stored, size=SIZE).data
    path = tmp_path / "disk.qcow2"
    states: Counter[str] = Counter()
    for at in range(0, 100_000, step):
        path.write_bytes(data)
        state = ended_by_an_interrupt(path, action, at)
        if not state:
            break
        states[state] += 1
    print(f"{action}: {dict(states)}")
    assert states["stopped"]
    assert states.keys() <= {"stopped", "failed"}
    assert not states["failed"] or action not in ("mark", "writing", "pending")


def test_any_other_exception_abandons(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build_image(Stored(b"b", granularity_bits=BITS), size=SIZE).data)
    with (
        pytest.raises(ZeroDivisionError),
        qcow2bm.open(path, "r+") as image,
        image.track() as tracker,
        tracker.writing(0, 1),
    ):
        _ = 1 // 0
    assert tracker.state == "abandoned"


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_program_that_is_told_to_end_loses_no_bitmap(
    tmp_path: Path, end: type[BaseException]
) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build_image(Stored(b"b", granularity_bits=BITS), size=SIZE).data)
    with (
        pytest.raises(end),
        qcow2bm.open(path, "r+") as image,
        image.track() as tracker,
        tracker.background(interval=1000),
        tracker.writing(0, 1),
    ):
        raise end
    assert tracker.state == "stopped"
    with qcow2bm.open(path) as again:
        assert again.bitmaps["b"].count() == 1 << BITS


@pytest.mark.spec("TRACK-26")
def test_the_recipe_for_sigterm(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build_image(Stored(b"b", granularity_bits=BITS), size=SIZE).data)
    (recipe,) = re.findall(
        r"`(signal\.signal\(.*?\))` in", (SPEC / "tracking.md").read_text("utf-8")
    )
    program = (
        "import signal, sys, time, qcow2bm\n"
        f"{recipe}\n"
        "with qcow2bm.open('disk.qcow2', 'r+') as image, image.track() as tracker:\n"
        "    with tracker.background(interval=1000), tracker.writing(0, 1):\n"
        "        print('ready', flush=True)\n"
        "        for _ in range(6000):  # a signal just before one sleep does not end it\n"
        "            time.sleep(0.01)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(60) == 143
    with qcow2bm.open(path) as again:
        assert again.bitmaps["b"].count() == 1 << BITS


def test_a_write_is_entered_only_once(tmp_path: Path) -> None:
    """A second use would end the record of the first one, and `stop` would not wait for it."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build_image(Stored(b"b", granularity_bits=BITS), size=SIZE).data)
    with qcow2bm.open(path, "r+") as image, image.track() as tracker:
        writing = tracker.writing(0, 1)
        with writing:
            with pytest.raises(qcow2bm.StateError, match="used"):
                writing.__enter__()
            with pytest.raises(qcow2bm.StateError, match="inside a write"):
                tracker.flush()
        with pytest.raises(qcow2bm.StateError, match="used"):
            writing.__enter__()
