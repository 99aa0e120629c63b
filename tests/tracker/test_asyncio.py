"""A tracker in an event loop: writes wait in tasks, and cancelling is exact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
from support.images import Stored, build_image
from support.recording import stored_bits

import qcow2bm
from qcow2bm.tracker.inflight import InFlightWrites

BITS = 9
GRANULE = 1 << BITS
SIZE = 4096 * GRANULE
WRITERS = 4


def run(test: Awaitable[None]) -> None:
    """Runs a test in an event loop, which must not wait for ever."""

    async def limited() -> None:
        await asyncio.wait_for(test, 60)

    asyncio.run(limited())


def new_image(folder: Path, *names: bytes) -> Path:
    path = folder / "disk.qcow2"
    bitmaps = [Stored(name, granularity_bits=BITS) for name in names or (b"b",)]
    path.write_bytes(build_image(*bitmaps, size=SIZE).data)
    return path


@asynccontextmanager
async def tracking(path: Path) -> AsyncIterator[qcow2bm.AsyncioTracker]:
    with qcow2bm.open(path, "r+") as image:
        async with qcow2bm.AsyncioTracker(image.track()) as tracker:
            yield tracker


async def until(is_reached: Callable[[], bool]) -> None:
    while not is_reached():
        await asyncio.sleep(0)


class Gate:
    """A task inside a write of one granule, until it is let out."""

    def __init__(self, tracker: qcow2bm.AsyncioTracker, granule: int) -> None:
        self.is_inside = False
        self._may_leave = asyncio.Event()
        self.task = asyncio.create_task(self._write(tracker, granule))

    async def _write(self, tracker: qcow2bm.AsyncioTracker, granule: int) -> None:
        async with tracker.writing(granule * GRANULE, 1):
            self.is_inside = True
            await self._may_leave.wait()

    async def leave(self) -> None:
        self._may_leave.set()
        await self.task


def is_closed(tracker: qcow2bm.AsyncioTracker) -> bool:
    """Whether something waits for the writes in flight."""
    return bool(tracker.tracker._session.in_flight._drainers)


@pytest.mark.spec("TRACK-24")
def test_who_wants_the_gate_empty_gets_it(tmp_path: Path) -> None:
    """A write that comes later waits for the rotation, in the same event loop, too."""

    async def test() -> None:
        async with tracking(new_image(tmp_path)) as tracker:
            inside = [Gate(tracker, number) for number in range(WRITERS)]
            await until(lambda: all(gate.is_inside for gate in inside))
            rotation = asyncio.create_task(tracker.rotate("b", "c"))
            await until(lambda: is_closed(tracker))
            later = [Gate(tracker, WRITERS + number) for number in range(WRITERS)]
            for gate in inside:
                for _ in range(10):
                    await asyncio.sleep(0)
                assert not rotation.done()
                assert not any(gate.is_inside for gate in later)
                await gate.leave()
            await rotation
            await until(lambda: all(gate.is_inside for gate in later))
            for gate in later:
                await gate.leave()

    run(test())
    assert granules(tmp_path, "b") == {*range(WRITERS)}
    assert granules(tmp_path, "c") == {*range(WRITERS, 2 * WRITERS)}


def granules(folder: Path, name: str) -> set[int]:
    bits = stored_bits((folder / "disk.qcow2").read_bytes())[name]
    return {number for number, bit in enumerate(bits.tolist()) if bit}


@pytest.mark.spec("TRACK-24")
def test_writers_without_a_pause_do_not_keep_a_rotation_waiting(tmp_path: Path) -> None:
    """While a rotation waits, each task at most ends the write that it is inside of."""

    async def test() -> None:
        begun = [0] * WRITERS
        is_over = False

        async def write(number: int) -> None:
            while not is_over:
                async with tracker.writing(number * GRANULE, 1):
                    begun[number] += 1
                    await asyncio.sleep(0.001)

        async with tracking(new_image(tmp_path)) as tracker:
            tasks = [asyncio.create_task(write(number)) for number in range(WRITERS)]
            await until(lambda: all(begun))
            for number in range(20):
                rotation = asyncio.create_task(tracker.rotate(tracker.names[0], f"c{number}"))
                await until(lambda: is_closed(tracker) or rotation.done())  # noqa: B023
                before = sum(begun)
                await until(lambda: not is_closed(tracker) or rotation.done())  # noqa: B023
                assert sum(begun) - before <= WRITERS  # those that began when it was over
                await rotation
            is_over = True
            await asyncio.gather(*tasks)

    run(test())


@pytest.mark.spec("TRACK-24")
def test_what_a_write_begins_belongs_to_it(tmp_path: Path) -> None:
    """Otherwise the write would wait for a task that waits for the write."""

    async def test() -> None:
        async with tracking(new_image(tmp_path)) as tracker:
            async with tracker.writing(0, 1):
                rotation = asyncio.create_task(tracker.rotate("b", "c"))
                with pytest.raises(qcow2bm.StateError, match="inside a write"):
                    await rotation  # the write may be waiting for it

            async def write_two_parts() -> None:
                async with tracker.writing(0, 1):
                    await until(lambda: is_closed(tracker))
                    parts = [Gate(tracker, number) for number in (1, 2)]
                    await asyncio.gather(*(part.leave() for part in parts))

            writing = asyncio.create_task(write_two_parts())
            await asyncio.sleep(0)
            await tracker.rotate("b", "c")
            await writing

    run(test())
    assert granules(tmp_path, "b") == {0, 1, 2}


@pytest.mark.spec("TRACK-24")
def test_a_thread_does_not_wait_for_its_own_tasks(tmp_path: Path) -> None:
    """The methods that block would keep the event loop from ending what they wait for."""

    async def test() -> None:
        async with tracking(new_image(tmp_path)) as tracker:
            inside = Gate(tracker, 0)
            await until(lambda: inside.is_inside)
            for block in (
                lambda: tracker.tracker.rotate("b", "c"),
                lambda: tracker.tracker.stop(),
            ):
                with pytest.raises(qcow2bm.StateError, match="use AsyncioTracker"):
                    block()
            rotation = asyncio.create_task(tracker.rotate("b", "c"))
            await until(lambda: is_closed(tracker))
            with pytest.raises(qcow2bm.StateError, match="use AsyncioTracker"):
                tracker.tracker.writing(GRANULE, 1).__enter__()
            with pytest.raises(qcow2bm.StateError, match="use AsyncioTracker"):
                tracker.tracker.flush()
            await inside.leave()
            await rotation
            tracker.tracker.flush()

    run(test())


@pytest.mark.spec("TRACK-25")
def test_a_cancelled_rotation_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with tracking(new_image(tmp_path)) as tracker:
            inside = Gate(tracker, 0)
            await until(lambda: inside.is_inside)
            rotation = asyncio.create_task(tracker.rotate("b", "c"))
            waiting = asyncio.create_task(tracker.flush())
            await until(lambda: is_closed(tracker))
            later = Gate(tracker, 1)
            await asyncio.sleep(0)
            rotation.cancel()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await rotation
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert tracker.names == ["b"]
            assert tracker.state == "tracking"
            await until(lambda: later.is_inside)  # the gate is open again
            await later.leave()
            await inside.leave()
            await tracker.rotate("b", "c")

    run(test())
    assert granules(tmp_path, "b") == {0, 1}


@pytest.mark.spec("TRACK-25")
@pytest.mark.parametrize(
    "cancellations", [500, pytest.param(10_000, marks=pytest.mark.deep)], ids=str
)
def test_cancelling_at_random(tmp_path: Path, cancellations: int) -> None:
    """No bit is missing, nobody waits for ever, and the gate is empty at the end."""
    chance = Random(cancellations)
    written: list[int] = []
    left = cancellations

    async def test() -> None:
        nonlocal left
        count = 0

        async def write() -> None:
            granule = chance.randrange(4096)
            async with tracker.writing(granule * GRANULE, 1):
                written.append(granule)
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)

        async def rotate() -> None:
            nonlocal count
            async with rotating:
                (name,) = {*tracker.names} - {"all"}
                count += 1
                new_name = f"r{count}"
                try:
                    await tracker.rotate(name, new_name)
                except asyncio.CancelledError:
                    assert ({*tracker.names} - {"all"}) in ({name}, {new_name})
                    raise
                assert {*tracker.names} == {"all", new_name}

        async def edit() -> None:
            await tracker.edit(lambda edit: edit.merge("all", "all"))

        async def flush() -> None:
            await tracker.flush()

        async def task() -> None:
            work = chance.choices((write, rotate, flush, edit), (20, 1, 2, 1))[0]
            await work()

        tasks: set[asyncio.Task[None]] = set()
        rotating = asyncio.Lock()
        async with tracking(new_image(tmp_path, b"r0", b"all")) as tracker:
            names = {"r0", "all"}
            while left:
                while len(tasks) < 8:
                    tasks.add(asyncio.create_task(task()))
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                one = chance.choice([*tasks])
                left -= one.cancel()
                done = {one for one in tasks if one.done()}
                for one in done:
                    if not one.cancelled():
                        assert one.exception() is None
                tasks -= done
                names |= {*tracker.names}
                if len(names) > 50:
                    frozen = names - {*tracker.names}

                    def remove(edit: qcow2bm.TrackerEdit) -> None:
                        for name in frozen:  # noqa: B023
                            edit.remove(name)

                    await tracker.edit(remove)
                    names -= frozen
            for one in tasks:
                one.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not tracker.tracker._session.in_flight._writes
            assert not is_closed(tracker)
            await tracker.pending()

    asyncio.run(asyncio.wait_for(test(), 600))
    assert {*written} <= granules(tmp_path, "all")
    print(f"{cancellations} cancellations, {len(written)} writes, none missing")


@pytest.mark.spec("TRACK-26")
def test_leaving_the_block_waits_for_the_writes_in_flight(tmp_path: Path) -> None:
    async def test() -> None:
        async with tracking(new_image(tmp_path)) as tracker:
            inside = Gate(tracker, 5)
            await until(lambda: inside.is_inside)
            asyncio.get_running_loop().call_later(0.01, inside._may_leave.set)
        assert inside.task.done()

    run(test())
    assert granules(tmp_path, "b") == {5}


@pytest.mark.spec("TRACK-26")
def test_leaving_a_block_that_would_wait_for_itself(tmp_path: Path) -> None:
    """The lock is free again, and the error says what to use."""
    path = new_image(tmp_path)

    async def test() -> None:
        with qcow2bm.open(path, "r+") as image:
            one = image.track()
            inside = Gate(qcow2bm.AsyncioTracker(one), 0)
            await until(lambda: inside.is_inside)
            with pytest.raises(qcow2bm.StateError, match="use AsyncioTracker"), one:
                pass
            assert one.state == "abandoned"
        qcow2bm.open(path, "r+").close()
        await inside.leave()

    run(test())


@pytest.mark.spec("TRACK-26")
@pytest.mark.parametrize("end", ["cancelled", "interrupted", "failed"])
def test_a_program_that_ends(tmp_path: Path, end: str) -> None:
    async def test() -> None:
        async with tracking(new_image(tmp_path)) as tracker, tracker.background(interval=1000):
            async with tracker.writing(0, 1):
                pass
            if end == "failed":
                raise ZeroDivisionError
            if end == "interrupted":
                raise KeyboardInterrupt
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(60)

    kinds: dict[str, Any] = {
        "cancelled": asyncio.CancelledError,
        "interrupted": KeyboardInterrupt,
        "failed": ZeroDivisionError,
    }
    with pytest.raises(kinds[end]):
        run(test())
    with qcow2bm.open(tmp_path / "disk.qcow2") as image:
        assert image.bitmaps["b"].status == ("valid" if end != "failed" else "inconsistent")


@pytest.mark.spec("TRACK-26")
def test_an_end_that_is_cancelled_itself_releases_the_lock(tmp_path: Path) -> None:
    path = new_image(tmp_path)

    async def test() -> None:
        gates = []

        async def work() -> None:
            async with tracking(path) as tracker:
                gates.append(Gate(tracker, 0))
                await until(lambda: gates[0].is_inside)
                trackers.append(tracker)

        trackers: list[qcow2bm.AsyncioTracker] = []
        task = asyncio.create_task(work())
        await until(lambda: bool(trackers) and is_closed(trackers[0]))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert trackers[0].state == "abandoned"
        qcow2bm.open(path, "r+").close()
        await gates[0].leave()

    run(test())


@pytest.mark.spec("TRACK-26")
def test_an_end_that_is_cancelled_while_a_rotation_waits(tmp_path: Path) -> None:
    """The rotation must not take a write of another task for ended."""
    path = new_image(tmp_path)
    operations: list[asyncio.Task[None]] = []
    gates: list[Gate] = []

    async def work() -> None:
        async with tracking(path) as tracker:
            gates.append(Gate(tracker, 7))
            await until(lambda: gates[0].is_inside)
            operations.append(asyncio.create_task(tracker.rotate("b", "new")))
            await until(lambda: is_closed(tracker))
            await asyncio.Event().wait()

    async def test() -> None:
        task = asyncio.create_task(work())
        await until(lambda: bool(operations))
        for _ in range(20):
            await asyncio.sleep(0.001)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(qcow2bm.StateError, match="being ended"):
            await operations[0]
        await gates[0].leave()

    run(test())
    with qcow2bm.open(path) as image:
        assert [*image.bitmaps] == ["b"]
        assert image.bitmaps["b"].status == "inconsistent"


def test_every_operation(tmp_path: Path) -> None:
    async def test() -> None:
        async with tracking(new_image(tmp_path)) as tracker:
            tracker.mark(0, 1)
            assert (await tracker.pending()).pieces == 1
            assert (await tracker.flush()).pieces == 1
            assert (await tracker.converge(1.0)).is_reached
            async with tracker.background(0.001):
                tracker.mark(GRANULE, 1)
            await tracker.edit(lambda edit: edit.add("new"))
            assert tracker.names == ["b", "new"]
            with pytest.raises(qcow2bm.BitmapNotFoundError):
                await tracker.edit(lambda edit: edit.remove("nope"))
            await tracker.begin_migration()
            await tracker.cancel_migration()
            await tracker.inactivate()
            with pytest.raises(qcow2bm.StateError):
                async with tracker.writing(0, 1):
                    pass
            assert (await tracker.activate()).outcome == "unchanged"
            assert tracker.activation.outcome == "unchanged"
            report = await tracker.stop()
            assert report.seconds >= 0
        with pytest.raises(qcow2bm.StateError):
            await tracker.flush()
        await tracker.abandon()

    run(test())


@pytest.mark.spec("TRACK-24")
def test_writes_that_wait_for_each_other_are_found_out() -> None:
    """A thread inside a write waits for another that waits at the gate: nothing would ever end."""
    writes = InFlightWrites(stuck_seconds=0.05)
    threads: list[Thread] = []

    def outside() -> None:
        with writes.write(lambda: None):
            pass

    def drain() -> None:
        with suppress(qcow2bm.StateError), writes.drained():
            raise AssertionError("a write is in flight")

    with writes.write(lambda: None):
        drainer = Thread(target=drain)
        drainer.start()
        while not writes._drainers:
            pass
        threads.append(Thread(target=outside))
        threads[0].start()
        threads[0].join()  # which would never end
        drainer.join()
    with writes.drained():
        pass
