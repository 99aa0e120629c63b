"""Two hosts with a page cache each, one image that both can use, and all that can happen to it.

Host A has the tracker, the library's own code. On host B there may be a program that keeps bitmaps
as QEMU does, or a tracker, too. Besides, there are programs that know nothing of bitmaps, and
storage that goes back to an earlier state. A ghost set knows which granules were really written.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from threading import Lock
from time import sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from support.images import Stored, build_image

import qcow2bm
from qcow2bm.bitmaps.commit import plan_commit
from qcow2bm.bitmaps.draft import Draft
from qcow2bm.bitmaps.tracked_bitmap import TrackedBitmap
from qcow2bm.bitmaps.tracked_store import TrackedStore
from qcow2bm.clusters.plan import Barrier, Plan, Step, Write, execute
from qcow2bm.errors import ImageLockedError
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.header import FIELD_OFFSETS
from qcow2bm.migration.intent import PREFIX as INTENT_PREFIX
from qcow2bm.migration.sentinel import CANARY_SUFFIX, is_sentinel
from qcow2bm.storage.write_guard import WriteGuard
from qcow2bm.tracker.flusher import Flusher
from qcow2bm.tracker.inflight import InFlightWrites
from qcow2bm.tracker.recorder import Recorder
from qcow2bm.tracker.reports import Activation
from qcow2bm.tracker.session import Session
from qcow2bm.tracker.tracker import Tracker
from qcow2bm.tracker.turns import Turns
from qcow2bm.tracker.waiting import Changes

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qcow2bm.migration.evidence import Policy

SECTOR = 512
GRANULE = 512
GRANULES = 4
SIZE = GRANULE * GRANULES
BY_B, BY_A, BY_STRANGERS, BY_B_LATER = range(GRANULES)
"""The granule that each writer writes, so that a missing bit tells whose write it is.

That of A is not in the first region, which an intent bitmap has from its beginning.
"""

Dirty = frozenset[int]
Snapshot = tuple[bytes, dict[str, Dirty]]
AUTOCLEAR = slice(FIELD_OFFSETS["autoclear_features"], FIELD_OFFSETS["autoclear_features"] + 8)
"""The offset of the autoclear bits in the header."""


class Disk:
    """The image as it is durable, and seen by every host that has not cached it."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.writes = 0
        self.user: str | None = None  # the host that holds the lock


class Host:
    """A storage as one host sees it: what it has read stays as it was until it is refreshed."""

    def __init__(self, name: str, disk: Disk, *, is_watched: bool) -> None:
        self.name = name
        self.excludes_other_hosts = False  # so that the library has to ask, and to refresh
        self.disk = disk
        self.is_watched = is_watched
        self.cache: dict[int, bytes] = {}
        self.unsynced: list[Step] = []
        self.log: list[Step] = []  # since the test emptied it

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        """A copy that shares the steps and the cached sectors, which never change."""
        new = Host.__new__(Host)
        memo[id(self)] = new
        new.__dict__.update(self.__dict__)
        new.disk = deepcopy(self.disk, memo)
        new.cache = dict(self.cache)
        new.unsynced, new.log = list(self.unsynced), list(self.log)
        return new

    def size(self) -> int:
        ends = [s.offset + s.length for s in self.unsynced if isinstance(s, Write)]
        return max([len(self.disk.data), *ends])

    def _sector(self, number: int) -> bytes:
        if number not in self.cache:
            part = bytes(self.disk.data[number * SECTOR : (number + 1) * SECTOR])
            self.cache[number] = part.ljust(SECTOR, b"\0")
        return self.cache[number]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        stop = min(offset + len(buffer), self.size())
        for number in range(offset // SECTOR, -(-stop // SECTOR)):
            low, high = max(offset, number * SECTOR), min(stop, (number + 1) * SECTOR)
            part = self._sector(number)[low - number * SECTOR : high - number * SECTOR]
            buffer[low - offset : high - offset] = part
        return max(0, stop - offset)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        assert self.disk.user == self.name, "INV-INACTIVE: a write without the lock"
        data = b"".join(parts)
        self.disk.writes += 1
        step = Write(offset, (data,), "something")
        self.unsynced.append(step)
        self.log.append(step)
        for number in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
            low, high = number * SECTOR, (number + 1) * SECTOR
            sector = bytearray(self._sector(number))
            start, stop = max(low, offset), min(high, offset + len(data))
            sector[start - low : stop - low] = data[start - offset : stop - offset]
            self.cache[number] = bytes(sector)

    def barrier(self) -> None:
        assert self.disk.user == self.name, "INV-INACTIVE: a barrier without the lock"
        self.write_back()
        self.log.append(Barrier("all"))

    def write_back(self) -> None:
        """Whole sectors, as they are cached here."""
        for step in self.unsynced:
            if isinstance(step, Write):
                for number in range(
                    step.offset // SECTOR, -(-(step.offset + step.length) // SECTOR)
                ):
                    start = number * SECTOR
                    self.disk.data.extend(bytes(max(0, start + SECTOR - len(self.disk.data))))
                    self.disk.data[start : start + SECTOR] = self.cache[number]
        self.unsynced.clear()

    def refresh(self) -> None:
        self.write_back()
        self.cache.clear()

    @property
    def is_stale(self) -> bool:
        """Whether anything that is cached is not what is on the disk."""
        return any(
            part != bytes(self.disk.data[n * SECTOR : (n + 1) * SECTOR]).ljust(SECTOR, b"\0")
            for n, part in self.cache.items()
        )

    def truncate(self, size: int) -> None:
        raise AssertionError("nothing here fails")

    def capacity(self) -> int | None:
        return None

    def change_token(self) -> object:
        return self.disk.writes if self.is_watched else None

    def read_lock(self) -> _Lock:
        return _Lock(self, is_shared=True)

    def write_lock(self, timeout: float) -> _Lock:
        return _Lock(self, is_shared=False)

    def close(self) -> None:
        pass


class _Lock:
    """A context manager that can be copied."""

    def __init__(self, host: Host, *, is_shared: bool) -> None:
        self._host, self._is_shared = host, is_shared

    def __enter__(self) -> None:
        if self._is_shared:
            return
        if self._host.disk.user:
            raise ImageLockedError(self._host.name, "is in use", "writing")
        self._host.disk.user = self._host.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_shared:
            self._host.disk.user = None


class Bits(NamedTuple):
    """A bitmap in the memory of QEMU."""

    dirty: Dirty
    granularity: int
    flags: int


Loaded = dict[str, Bits]


class Qemu:
    """A program on host B that keeps bitmaps as QEMU does.

    It sets in_use of all it loads, keeps their bits in memory, and stores all of them in new
    clusters at its end. It does not know the generation: opening for writing clears that bit,
    without a barrier; reopening an image that was read-only leaves it.
    """

    def __init__(self, host: Host, *, reopens: bool, received: dict[str, Dirty]) -> None:
        self.held = WriteGuard(host)
        self.held.acquire(0)
        self.reopens = reopens
        store = TrackedStore(self.held)
        self.bits: Loaded = {}
        if not reopens:
            known = store.file.header.autoclear_features & 3
            self.held.write(AUTOCLEAR.start, [known.to_bytes(8, "big")])
        if not store.metadata.directory.is_consistent:
            return
        for entry in store.metadata.directory.entries:
            name = entry.name or ""
            if entry.in_use and name not in received:
                continue
            dirty = received.get(name) or _dirty(TrackedBitmap.load(store.file, entry).bits.octets)
            self.bits[name] = Bits(dirty, entry.granularity, entry.flags & ~FLAG_IN_USE)
            place = entry.offset + 12
            self.held.write(place, [(entry.flags | FLAG_IN_USE).to_bytes(4, "big")])
        if self.bits:
            self.held.barrier()

    def write(self, granule: int) -> None:
        for name, (dirty, granularity, flags) in self.bits.items():
            if flags & FLAG_AUTO:
                new = granule * GRANULE // granularity
                self.bits[name] = Bits(dirty | {new}, granularity, flags)

    def close(self) -> None:
        store = TrackedStore(self.held)
        draft = Draft(store.metadata, set(self.bits))
        if self.bits:
            for name, (dirty, granularity, flags) in self.bits.items():
                draft.remove(name)
                draft.add(name, granularity, enabled=bool(flags & FLAG_AUTO))
                starts = [number * granularity for number in dirty]
                ranges = [(start, min(granularity, SIZE - start)) for start in starts]
                draft.fill(name, ranges, is_set=True)
            store.file.__dict__["generation"] = None  # it knows of none, and changes none
            plan = plan_commit(store.metadata, draft, None)
            keeps = store.file.header.autoclear_features & 1 << 63
            execute(_without_clearing(plan) if keeps else plan, self.held, None)
        self.held.barrier()
        self.held.release()


def _without_clearing(plan: Plan) -> Plan:
    """Returns a plan without the steps that clear bits unknown to the planner."""
    steps = list(plan.steps)
    if isinstance(steps[0], Write) and "unknown features" in steps[0].what:
        del steps[:2]
    return Plan(tuple(steps))


def _dirty(octets: bytes | bytearray) -> Dirty:
    number = int.from_bytes(octets, "little")
    return frozenset(bit for bit in range(number.bit_length()) if number >> bit & 1)


class Seen(NamedTuple):
    """A bitmap as a reader of the image sees it."""

    status: str
    is_auto: bool
    granularity: int
    dirty: Dirty

    def misses(self, written: Dirty) -> Dirty:
        """The granules of those written that it does not have."""
        return frozenset(g for g in written if g * GRANULE // self.granularity not in self.dirty)


@lru_cache(1 << 12)  # more would not make it faster, and images are large
def look_recovered(data: bytes) -> dict[str, Seen]:
    """All bitmaps of an image by name, once those are recovered that a crash has left in_use."""
    recovered = bytearray(data)
    with qcow2bm.open(recovered, "r+") as image:
        if not image.recoverable:
            return {}
        image.recover()
    return look(bytes(recovered))


@lru_cache(1 << 12)
def look(data: bytes) -> dict[str, Seen]:
    """All bitmaps of an image by name."""
    with qcow2bm.open(data) as image:
        return {
            name: Seen(
                bitmap.status,
                bitmap.auto,
                bitmap.granularity,
                _dirty(bitmap.stale_bits().tobytes()) if bitmap.status != "broken" else frozenset(),
            )
            for name, bitmap in image.bitmaps.items()
        }


class Options(NamedTuple):
    """The options that are the same in a whole exploration."""

    generation: bool
    is_watched: bool
    carried: tuple[str, ...]
    policy: Policy
    intent: bool = False


class World:
    """Everything there is at one time, and what may happen next.

    Attributes:
        written: by bitmap the granules that were written since it was last cleared.
        since: what others did to the image since the tracker let it go.
        start, hand_over: the storage as it was then, to which it can go back.
        activation: what the last `activate` found; None if another event was the last.
        path: the events that led here.
        had_sentinel: whether there was one then: beside stale bitmaps there is none.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        fine = Stored(b"fine", granularity_bits=9)
        coarse = Stored(b"coarse", granularity_bits=10)
        self.disk = Disk(bytes(build_image(fine, coarse, size=SIZE, cluster_bits=9).data))
        self.a_host, self.b_host = self._hosts()
        self.a: Tracker | None = None
        self.b: Qemu | Tracker | None = None
        self.b_wrote = False
        self.written: dict[str, Dirty] = {"fine": frozenset(), "coarse": frozenset()}
        self.since: frozenset[str] = frozenset()
        self.activation: Activation | None = None
        self.had_sentinel = False
        self.path: tuple[str, ...] = ()
        self.start = self.hand_over = self._snapshot()
        self._track_a()

    def _hosts(self) -> tuple[Host, Host]:
        watched = self.options.is_watched
        return (
            Host("A", self.disk, is_watched=watched),
            Host("B", self.disk, is_watched=watched),
        )

    def _snapshot(self) -> Snapshot:
        return bytes(self.disk.data), dict(self.written)

    def copy(self, without: str = "") -> World:
        """A copy that is independent of this world; ``without`` the program of one host."""
        memo: dict[int, Any] = {}
        new = World.__new__(World)
        new.__dict__.update(self.__dict__)
        new.disk = deepcopy(self.disk, memo)
        new.a_host, new.b_host = deepcopy(self.a_host, memo), deepcopy(self.b_host, memo)
        new.a = _copy_of(self.a, memo) if self.a and without != "A" else None
        b = self.b if without != "B" else None
        new.b = _copy_of(b, memo) if isinstance(b, Tracker) else deepcopy(b, memo)
        new.written = dict(self.written)
        return new

    # --- what can happen -------------------------------------------------------------------

    def events(self) -> Iterator[tuple[str, Callable[[World], None]]]:
        """The events that can happen now: a name, and the function that does it to a world."""
        state = self.a.state if self.a else None
        yield from self._events_of_a(state)
        if self.b:
            yield "B writes", lambda w: w._write_b(BY_B)
            yield "B writes elsewhere", lambda w: w._write_b(BY_B_LATER)
            yield "B closes", World._close_b
            yield "B is killed", World._kill_b
        elif not self.disk.user:
            yield "B opens", lambda w: w._open_b()
            if self.options.generation:  # without, it is no different
                yield "B reopens", lambda w: w._open_b(reopens=True)
            yield "B tracks", World._track_b
            if state == "inactive" and self.options.carried and not self.since:
                yield "B opens and receives", lambda w: w._open_b(receives=True)
            if state == "inactive":
                yield from self._events_of_others()

    def _events_of_others(self) -> Iterator[tuple[str, Callable[[World], None]]]:
        for what, name, happen in (
            ("unaware", "unaware program writes", World._write_unaware),
            ("cleared", "all is cleared", World._clear_all),
            ("cleared one", "coarse is cleared", World._clear_one),
            ("merged", "others are merged into coarse", World._merge_into_one),
            ("restored", "cleared and restored", World._clear_and_restore),
            ("raw", "raw write", World._write_raw),
            ("rolled back to the start", "rollback to the start", World._roll_back_to_the_start),
            ("rolled back", "rollback to the hand-over", World._roll_back),
        ):
            if what not in self.since:  # once more makes no difference
                yield name, happen

    def _events_of_a(self, state: str | None) -> Iterator[tuple[str, Callable[[World], None]]]:
        if state is None:
            if not self.disk.user:
                yield "A starts", World._track_a
                is_stale = not self.disk.data[AUTOCLEAR][-1] & 1
                if self.options.intent and not is_stale:
                    yield "fine is removed and made again", World._make_again
            return
        assert self.a
        if state in ("tracking", "migrating"):
            yield "A writes", World._write_a
            yield "A flushes", lambda w: w._of_a.flush() and None
            yield "A inactivates", World._inactivate
            yield "A stops", World._stop_a
        if state == "tracking":
            yield "A begins", lambda w: w._begin()
        if state == "migrating":
            yield "A cancels", lambda w: w._of_a.cancel_migration()
        if state == "inactive":
            yield "A activates", World._activate
        yield "A is killed", World._kill_a

    @property
    def _of_a(self) -> Tracker:
        assert self.a
        return self.a

    def _is_elsewhere(self) -> bool:
        return self.a is not None and self.a.state == "inactive"

    def _note(self, what: str) -> None:
        if self._is_elsewhere():
            self.since |= {what}

    def _wrote(self, granule: int) -> None:
        for name in self.written:
            self.written[name] |= {granule}

    def _track_a(self) -> None:
        self.a = _track(self.a_host, self.options.generation, intent=self.options.intent)
        if self.a is None:
            self.a_host.disk.user = None
        self.since = frozenset()

    def _write_a(self) -> None:
        with self._of_a.writing(BY_A * GRANULE, 1):
            self._wrote(BY_A)

    def _begin(self) -> None:
        names = set(self._of_a.names)
        self._of_a.begin_migration(carried=[n for n in self.options.carried if n in names])

    def _inactivate(self) -> None:
        if self._of_a.state == "tracking":
            self._begin()
        self._of_a.inactivate()
        self.since = frozenset()
        self.hand_over = self._snapshot()

    def _activate(self) -> None:
        if self.b:
            before = self.disk.writes
            try:
                self._of_a.activate(other_side_has_stopped=True)
            except ImageLockedError:
                assert self._of_a.state == "inactive"
                assert self.disk.writes == before
                return
            raise AssertionError("the image is in use")
        migration = self._of_a._session.migration
        self.had_sentinel = migration is not None and migration.sentinel is not None
        self.activation = self._of_a.activate(self.options.policy, other_side_has_stopped=True)
        for name, fate in self.activation.bitmaps.items():
            if fate.kind == "kept":  # whatever others took from it
                self.written[name] |= self.hand_over[1][name]

    def _stop_a(self) -> None:
        self._of_a.stop()
        self._kill_a()

    def _kill_a(self) -> None:
        if self._of_a._session.storage.is_held:
            self.a_host.write_back()  # the system does that, though the process is gone
            self.disk.user = None
        self.a, self.since = None, frozenset()

    def _open_b(self, *, reopens: bool = False, receives: bool = False) -> None:
        received = {}
        if receives:
            bitmaps = self._of_a._session.recording.bitmaps
            received = {bitmap.name: _dirty(bitmap.bits.octets) for bitmap in bitmaps}
            received = {n: d for n, d in received.items() if n in self.options.carried}
        self.b = Qemu(self.b_host, reopens=reopens, received=received)
        self._note("received" if receives else "reopened" if reopens else "opened")

    def _track_b(self) -> None:
        self.b = _track(self.b_host, None)  # without intent
        if self.b is None:
            self.disk.user = None
        else:
            self._note("tracked")

    def _write_b(self, granule: int) -> None:
        if isinstance(self.b, Tracker):
            self.b.mark(granule * GRANULE, 1)
        else:
            assert self.b
            self.b.write(granule)
        self._wrote(granule)
        self._note("wrote" if granule == BY_B else "wrote elsewhere")

    def _close_b(self) -> None:
        if isinstance(self.b, Tracker):
            self.b.stop()
            self.disk.user = None
        else:
            assert self.b
            self.b.close()
        self.b = None

    def _kill_b(self) -> None:
        self.b_host.write_back()
        self.disk.user = None
        self.b = None
        self._note("died")

    def _write_unaware(self) -> None:
        self.disk.data[AUTOCLEAR] = bytes(8)
        self.disk.writes += 1
        self._wrote(BY_STRANGERS)
        self._note("unaware")

    def _clear_all(self) -> None:
        with self._edited() as bits:
            for name in bits:
                self._clear(bits, name)
        self._note("cleared")

    def _clear_one(self) -> None:
        with self._edited() as bits:
            self._clear(bits, "coarse")
        self._note("opened")
        self._note("cleared one")

    def _clear(self, bits: Loaded, name: str) -> None:
        if name in bits:
            bits[name] = bits[name]._replace(dirty=frozenset())
            if name in self.written:
                self.written[name] = frozenset()

    def _make_again(self) -> None:
        with self._edited() as bits:
            bits["fine"] = Bits(frozenset(), GRANULE, FLAG_AUTO)
            self.written["fine"] = frozenset()

    def _merge_into_one(self) -> None:
        with self._edited() as bits:
            if "coarse" in bits:
                dirty = bits["coarse"].dirty | {BY_STRANGERS // 2}
                bits["coarse"] = bits["coarse"]._replace(dirty=dirty)
                self.written["coarse"] |= {BY_STRANGERS}
        self._note("opened")
        self._note("merged")

    @contextmanager
    def _edited(self) -> Iterator[Loaded]:
        """The bitmaps as QEMU has loaded them, to be changed by hand."""
        b = Qemu(self.b_host, reopens=False, received={})
        yield b.bits
        b.close()

    def _clear_and_restore(self) -> None:
        self.disk.writes += 1
        self._note("restored")

    def _write_raw(self) -> None:
        self.disk.writes += 1
        self._note("raw")

    def _roll_back(self) -> None:
        self._go_back(self.hand_over)
        self.since = frozenset({"rolled back"})

    def _roll_back_to_the_start(self) -> None:
        self._go_back(self.start)
        self.since = frozenset({"rolled back to the start"})

    def _go_back(self, snapshot: Snapshot) -> None:
        data, written = snapshot
        self.disk.data[:] = data
        self.disk.writes += 1
        self.written = dict(written)

    # --- what a crash leaves ---------------------------------------------------------------

    def after_power_loss(self, host: str, data: bytes | bytearray) -> World:
        """The world when that host has lost power, and this is what is on the disk then."""
        new = self.copy(without=host)
        new.disk.data[:] = data
        new.disk.user = None
        new.path += (f"{host} loses power",)
        new.disk.writes += 1
        if host == "A":
            new.since = frozenset()
            new.a_host = Host("A", new.disk, is_watched=new.options.is_watched)
        else:
            new.b_host = Host("B", new.disk, is_watched=new.options.is_watched)
            new._note("died")
        return new


def _track(host: Host, generation: bool | None, *, intent: bool = False) -> Tracker | None:
    """A tracker of whatever records writes; None if there is nothing."""
    image = qcow2bm.open(host, "r+")
    try:
        tracker = image.track(generation=generation, intent=intent)
    except qcow2bm.BitmapError:
        image._opened._resources.pop_all()
        return None
    tracker._session._on_end = _nothing  # the Image stays behind
    return tracker


def _nothing() -> None:
    pass


# A copy of a storage has a lock of its own; no thread holds one while a world is copied.
copyreg.pickle(type(Lock()), lambda lock: (Lock, ()))
copyreg.pickle(Changes, lambda changes: (Changes, ()))


def _copy_of(tracker: Tracker, memo: dict[int, Any]) -> Tracker:
    """A copy with locks of its own; no write is in flight, and no operation runs.

    The copy shares what never changes: copying all of it took half of the whole exploration.
    """
    old = tracker._session
    while old.intent and old.intent._is_working:
        sleep(0)  # the thread finds nothing more to store, and ends
    metadata, migration = old.store.metadata, old.migration
    file = metadata.file
    never_change: list[object] = [
        metadata.directory,
        metadata.survey,
        file.header,
        file.area,
        file.feature_names,
    ]
    if migration:
        never_change += [migration.sentinel, migration.departure]
    memo |= {id(value): value for value in never_change}
    memo[id(old)] = session = Session.__new__(Session)
    special = {"recorder", "in_flight", "clock", "_turns", "_on_end"}
    for name, value in vars(old).items():
        if name not in special:
            setattr(session, name, deepcopy(value, memo))
    session.in_flight, session._turns = InFlightWrites(), Turns()
    session._on_end, session.clock = old._on_end, old.clock
    session.recorder = Recorder(deepcopy(old.recording, memo))
    if session.state not in ("tracking", "migrating"):
        session.recorder.close(session.state)
    new = Tracker.__new__(Tracker)
    new._session = session
    new._flusher = Flusher(session)
    new._flusher._batches = deepcopy(tracker._flusher._batches, memo)
    new.mark = session.marker()
    return new


def in_memory(tracker: Tracker) -> dict[str, Seen]:
    """The bitmaps as a tracker has them: all that was marked is in them."""
    recording = tracker._session.recording
    recording.fan_out()
    return {
        bitmap.name: Seen("tracked", True, bitmap.granularity, _dirty(bitmap.bits.octets))
        for bitmap in recording.bitmaps
    }


def touched(tracker: Tracker) -> tuple[tuple[int, ...], ...]:
    """Returns the pieces that are to be stored, by bitmap."""
    bitmaps = tracker._session.recording.bitmaps
    return tuple(tuple(bitmap.due().tolist()) for bitmap in bitmaps)


def intent_bits(tracker: Tracker) -> tuple[bytes, ...]:
    """The bits that a tracker has of its intent bitmap, and those of settled granules."""
    log = tracker._session.intent
    if not log or tracker.state not in ("tracking", "migrating"):
        return ()
    return bytes(log._wanted), bytes(log._durable), log._aged.tobytes(), bytes(log._settled[2])


def plain_name(name: str, sentinel: str) -> str:
    """The name, without what is different in each path."""
    if name.startswith(INTENT_PREFIX):
        return f"{name[: len(INTENT_PREFIX)]}{name[len(INTENT_PREFIX) + 36 :]}"
    if is_sentinel(name):
        whose = "its" if name.removesuffix(CANARY_SUFFIX) == sentinel else "another"
        return f"{whose} {'canary' if name.endswith(CANARY_SUFFIX) else 'sentinel'}"
    return name
