"""An interrupt at any line of the tracker: closing the image releases the locks.

No bitmap is valid that misses a mark.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.images import Stored, build_image
from support.interrupts import Interrupter

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


def interrupt(path: Path, action: str, at: int) -> bool:
    """Interrupts an action at that line, closes at once, and judges.

    Returns:
        Whether there is such a line.
    """
    interrupter = Interrupter(at, FOLDER)
    image = qcow2bm.open(path, "r+")
    tracker = image.track()
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
        for bitmap in again.bitmaps.values():
            if bitmap.status == "valid" and bitmap.name == "b":
                number = int.from_bytes(bitmap.packed().tobytes(), "little")
                assert number >> (3 << 20 >> BITS) & 1
                assert number >> (5 << 20 >> BITS) & 1 or action not in ("mark", "writing")
    assert has_returned or interrupter.was_hit
    return interrupter.was_hit


def interrupt_lines(folder: Path, action: str, step: int) -> None:
    """Interrupts one line in ``step``, from the first to the last."""
    data = build_image(Stored(b"b", granularity_bits=BITS), size=SIZE).data
    path = folder / "disk.qcow2"
    line = 0
    path.write_bytes(data)
    while interrupt(path, action, line):
        path.write_bytes(data)
        line += step
    assert line >= {"mark": 5, "writing": 20}.get(action, 10)
    print(f"{action}: {line // step} lines of {line} interrupted")


@pytest.mark.parametrize("action", ACTIONS)
def test_some_lines(tmp_path: Path, action: str) -> None:
    interrupt_lines(tmp_path, action, 11 if action in ("flush", "rotate", "stop") else 1)


@pytest.mark.deep
@pytest.mark.parametrize("action", ["flush", "rotate", "stop"])
def test_every_line(tmp_path: Path, action: str) -> None:
    interrupt_lines(tmp_path, action, 1)


@pytest.mark.parametrize("action", ["writing", "flush"])
def test_the_end_of_the_block_abandons(tmp_path: Path, action: str) -> None:
    """If any line is interrupted, the block of the tracker must end with the interrupt itself."""
    data = build_image(Stored(b"b", granularity_bits=BITS), size=SIZE).data
    path = tmp_path / "disk.qcow2"
    for at in range(0, 10_000, 1 if action == "writing" else 31):
        path.write_bytes(data)
        interrupter = Interrupter(at, FOLDER)
        try:
            with (
                qcow2bm.open(path, "r+") as image,
                image.track() as tracker,
                interrupter.active(),
            ):
                ACTIONS[action](tracker)
        except KeyboardInterrupt:
            assert tracker.state in ("abandoned", "failed")
        else:
            assert not interrupter.was_hit
            break
    assert at > 20


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
