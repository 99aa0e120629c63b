"""A tracker logs failures and the results of hand-overs, and nothing if all goes well."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.faulty_storage import Fault, FaultyStorage
from support.images import Stored, build_image

import qcow2bm
from qcow2bm.errors import CommitError, StateError
from qcow2bm.tracker.tracker import Tracker

SIZE = 1 << 24


@contextmanager
def tracking() -> Iterator[tuple[FaultyStorage, Tracker]]:
    storage = FaultyStorage(build_image(Stored(b"a", granularity_bits=12), size=SIZE).data)
    with qcow2bm.open(storage, "r+") as image:
        yield storage, image.track()


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int, str]]:
    return [found for found in caplog.record_tuples if found[0] == "qcow2bm"]


def test_what_goes_well_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "qcow2bm")
    with tracking() as (_, tracker):
        tracker.mark(0, SIZE)
        tracker.flush()
        tracker.rotate("a", "b")
        with tracker.background(0.001), tracker.writing(0, 1):
            time.sleep(0.01)
        tracker.stop()
    assert lines(caplog) == []


def test_a_failure_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with tracking() as (storage, tracker):
        tracker.mark(0, 1)
        storage.fault = Fault(len(storage.calls))
        with pytest.raises(CommitError) as raised:
            tracker.flush()
        assert tracker.state == "failed"
        cause = raised.value.__cause__
    assert lines(caplog) == [("qcow2bm", logging.ERROR, f"tracking has failed: {raised.value}")]
    assert cause is not None


@pytest.mark.spec("TRACK-16")
def test_a_failure_in_the_background_is_logged_once_with_the_exception(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The end of the block waits for the thread, so all that the thread logs is there then."""
    with tracking() as (storage, tracker):
        storage.fault = Fault(len(storage.calls), is_sticky=True)
        with tracker.background(0.001):
            tracker.mark(0, 1)
            end = time.monotonic() + 60
            while not lines(caplog):
                assert time.monotonic() < end
                time.sleep(0.001)
        with pytest.raises(StateError) as raised:
            tracker.flush()
    cause = raised.value.__cause__
    assert lines(caplog) == [("qcow2bm", logging.ERROR, f"tracking has failed: {cause}")]
    (record,) = (record for record in caplog.records if record.name == "qcow2bm")
    assert record.exc_info is not None
    assert record.exc_info[1] is cause


def test_the_judgement_of_a_hand_over_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qcow2bm")
    with tracking() as (_, tracker):
        tracker.inactivate()
        found = tracker.activate()
        tracker.stop()
    text = f"an image was taken back: {found.outcome}: {found.reason}"
    assert lines(caplog) == [("qcow2bm", logging.INFO, text)]
