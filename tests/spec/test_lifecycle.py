"""The requirements of spec/lifecycle.md, and its tables row by row on real images."""

from __future__ import annotations

import io
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import pytest
from support.crash_states import intervals
from support.faulty_storage import Fault, FaultyStorage
from support.images import Stored, build_image, extension
from support.layouts import append
from support.plans import each
from support.recording import RecordingStorage, intervals_of
from support.specreader import page

import qcow2bm
from qcow2bm.clusters.plan import Plan, Write
from qcow2bm.errors import CommitError, StateError
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.format.extensions import DATA_FILE, GENERATION, Generation
from qcow2bm.format.features import AUTOCLEAR_GENERATION, GENERATION_NAME
from qcow2bm.migration.lifecycle import TRANSITIONS, Event, State
from qcow2bm.migration.sentinel import PREFIX, is_sentinel
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.file_identity import identify
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.tracker.reports import Activation
from qcow2bm.tracker.tracker import Tracker

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE = page("lifecycle.md")
GRANULE = 4096
SIZE = 8 << 20
OLD_SENTINEL = PREFIX + "00000000-0000-4000-8000-000000000000"
AUTOCLEAR = 88  # where the autoclear features stand in the header

Data = bytearray
Tamper = Callable[[Data], object]


def image(*names: str, **options: Any) -> Data:
    """Enabled bitmaps, with clusters of 4096, and the disabled one "off"."""
    bitmaps = [Stored(name.encode(), granularity_bits=12) for name in names or ("a", "c")]
    off = Stored(b"off", granularity_bits=12, flags=0)
    return build_image(*bitmaps, off, **{"cluster_bits": 12, "size": SIZE, **options}).data


def statuses(data: Data | bytes) -> dict[str, str]:
    with qcow2bm.open(bytes(data)) as opened:
        return {name: bitmap.status for name, bitmap in opened.bitmaps.items()}


def dirty(data: Data | bytes, name: str) -> set[int]:
    """The granules that a valid bitmap has."""
    with qcow2bm.open(bytes(data)) as opened:
        bits = np.unpackbits(opened.bitmaps[name].packed(), bitorder="little")
        return set(np.flatnonzero(bits).tolist())


def ends_of(data: Data | bytes, name: str) -> set[int]:
    """The first and the last granule of a bitmap."""
    with qcow2bm.open(bytes(data)) as opened:
        return {0, (opened.virtual_size - 1) // opened.bitmaps[name].granularity}


def sentinel_in(data: Data | bytes) -> str:
    """The name of the sentinel; its canary is there, too, and nothing else of that kind."""
    canary, name = sorted(filter(is_sentinel, statuses(data)), key=len, reverse=True)
    assert canary == name + "-canary"
    return name


def canary_in(data: Data | bytes) -> str:
    return sentinel_in(data) + "-canary"


def generation(data: Data | bytes) -> Generation | None:
    with qcow2bm.open(bytes(data)) as opened:
        return opened._opened.file.generation


@contextmanager
def tracking(source: Data | FaultyStorage | MemoryStorage, **options: Any) -> Iterator[Tracker]:
    """A tracker of an image; it is abandoned if nobody stops it."""
    with qcow2bm.open(source, "r+") as opened:
        yield opened.track(**options)


# --- what others do to an image -----------------------------------------------------------------


def edited(*works: Callable[[qcow2bm.Edit], object]) -> Tamper:
    """Another program that keeps bitmaps; this library stands in for it."""

    def tamper(data: Data) -> None:
        with qcow2bm.open(data, "r+") as opened, opened.edit() as edit:
            each(*works)(edit)

    return tamper


def anew(data: Data, *names: str) -> None:
    """Takes out bitmaps and puts in "a"."""
    removals = [lambda edit, n=n: edit.remove(n) for n in names]
    edited(*removals, lambda edit: edit.add("a", GRANULE))(data)


def guest_writes(*ranges: tuple[int, int]) -> Tamper:
    """Writes as the guest of QEMU does: all enabled bitmaps record it, and are stored anew."""

    def tamper(data: Data) -> None:
        with qcow2bm.open(data, "r+") as opened:
            names = [b.name for b in opened.bitmaps.values() if b.auto and b.status == "valid"]
            with opened.edit() as edit:
                for name in names:
                    for start, length in ranges:
                        edit.set(name, start, length)

    return tamper


def sentinel_is(work: Callable[[qcow2bm.Edit, str], object]) -> Tamper:
    """Changes the sentinel alone."""

    def tamper(data: Data) -> None:
        name = sentinel_in(data)
        edited(lambda edit: work(edit, name))(data)

    return tamper


def canary_is(work: Callable[[qcow2bm.Edit, str], object]) -> Tamper:
    """Changes the canary alone."""

    def tamper(data: Data) -> None:
        name = canary_in(data)
        edited(lambda edit: work(edit, name))(data)

    return tamper


def planted(offset: int, format: str, value: int) -> Tamper:
    return lambda data: struct.pack_into(format, data, offset, value)


def autoclear(data: Data, clear: int) -> None:
    (bits,) = struct.unpack_from(">Q", data, AUTOCLEAR)
    struct.pack_into(">Q", data, AUTOCLEAR, bits & ~clear)


def entry_field(name: str, offset: int, format: str, change: Callable[[int], int]) -> Tamper:
    """Another number in a directory entry; "" stands for the sentinel, "-canary" for its canary."""

    def tamper(data: Data) -> None:
        wanted = sentinel_in(data) + name if name in ("", "-canary") else name
        with qcow2bm.open(bytes(data)) as opened:
            place = opened.bitmaps[wanted].entry.offset + offset
        (old,) = struct.unpack_from(format, data, place)
        struct.pack_into(format, data, place, change(old))

    return tamper


def other_token(data: Data) -> None:
    with qcow2bm.open(bytes(data)) as opened:
        (place,) = (at for at, found in opened.extensions if found.type == GENERATION)
    data[place + 8] ^= 0xFF


FLAGS, TABLE_SIZE, GRANULARITY = 12, 8, 17


def in_use_now(name: str) -> Tamper:
    return entry_field(name, FLAGS, ">I", lambda old: old | FLAG_IN_USE)


def disabled_now(name: str) -> Tamper:
    return entry_field(name, FLAGS, ">I", lambda old: old & ~FLAG_AUTO)


def enabled_now(name: str) -> Tamper:
    return entry_field(name, FLAGS, ">I", lambda old: old | FLAG_AUTO)


def coarser_now(name: str) -> Tamper:
    return entry_field(name, GRANULARITY, ">B", lambda old: old + 1)


def cleared(data: Data) -> None:
    """All bitmaps that nobody has in_use."""
    with qcow2bm.open(bytes(data)) as opened:
        names = [bitmap.name for bitmap in opened.bitmaps.values() if bitmap.status == "valid"]
    edited(*(lambda edit, n=n: edit.clear(n) for n in names))(data)


def misfit_now(name: str) -> Tamper:
    return entry_field(name, TABLE_SIZE, ">I", lambda old: old + 1)


def also(*tampers: Tamper) -> Tamper:
    def tamper(data: Data) -> None:
        for one in tampers:
            one(data)

    return tamper


def nothing(data: Data) -> None:
    """The other side never opened it."""


def rewritten(path: Path, data: bytes) -> None:
    """Writes until the file system's clock has moved on."""
    before = identify(path)
    while identify(path) == before:
        path.write_bytes(data)
        time.sleep(0.002)


# --- states -------------------------------------------------------------------------------------


def test_states() -> None:
    found = PAGE.table("States")
    assert found.columns[0] == "state"
    assert set(found.columns[1:]) == set(get_args(Event))
    assert set(found.column("state")) == set(get_args(State)) == set(TRANSITIONS)
    stated = {
        row["state"]: {event: row[event] for event in found.columns[1:] if row[event]}
        for row in found.rows
    }
    assert stated == TRANSITIONS


# --- evidence -----------------------------------------------------------------------------------


class Case(NamedTuple):
    """A hand-over as it was prepared, and the events meanwhile; ``ranges`` if they are known."""

    tamper: Tamper
    ranges: list[list[int]] | None = None
    sentinel: bool = True
    generation: bool = False
    data_file: bool = False
    gives_path: bool = True
    is_device: bool = False
    on_file: Callable[[Path], object] = lambda path: None


def header_cases() -> Iterator[Case]:
    def with_backing(data: Data) -> None:
        data[2000:2004] = b"base"
        struct.pack_into(">QI", data, 8, 2000, 4)

    def with_other_l1(data: Data) -> None:
        struct.pack_into(">Q", data, 40, append(data, bytes(4096)))

    def with_zstd(data: Data) -> None:
        struct.pack_into(">Q", data, 72, 1 << 3)
        data[104] = 1

    def with_other_data_file(data: Data) -> None:
        with qcow2bm.open(bytes(data)) as opened:
            (place,) = (at for at, found in opened.extensions if found.type == DATA_FILE)
        data[place + 8] ^= 1

    yield Case(planted(24, ">Q", SIZE - 512))
    yield Case(planted(24, ">Q", SIZE - 512), sentinel=False)
    yield Case(with_backing)
    yield Case(with_other_l1)
    yield Case(with_zstd)
    yield Case(with_other_data_file, data_file=True)
    # Such images are not edited, so they cannot be taken back at all.
    yield Case(planted(32, ">I", 2))
    yield Case(planted(72, ">Q", 1 << 4))
    yield Case(planted(24, ">Q", SIZE + 512))


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.utime(other, ns=times)
    other.replace(path)


def put_back(path: Path) -> None:
    """Another time of the last change gives away who puts back that of the last write."""
    before = path.stat()
    rewritten(path, path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


LAST = SIZE - 512
EVIDENCE: dict[str, list[Case]] = {
    "the header says something else of the disk: size, backing file, L1 table, encryption, "
    "external data file, incompatible features": [],
    "the autoclear bit of the bitmaps is off": [
        Case(lambda data: autoclear(data, 1)),
        Case(lambda data: autoclear(data, ~0), generation=True),
        Case(lambda data: autoclear(data, 1), sentinel=False),
    ],
    "the external data file has another device, inode, size, or time of its last write or change": [
        Case(nothing, data_file=True, on_file=on_file)
        for on_file in (
            grown,
            replaced,
            put_back,
            lambda path: rewritten(path, b"other"),
            lambda path: path.unlink(),
        )
    ],
    "no sentinel was made, and the generation is another": [
        Case(other_token, sentinel=False, generation=True),
        Case(lambda data: autoclear(data, 1 << 63), sentinel=False, generation=True),
        Case(edited(lambda edit: edit.add("x")), sentinel=False, generation=True),
    ],
    "no sentinel was made": [
        Case(nothing, sentinel=False),
        Case(nothing, sentinel=False, generation=True),
        Case(guest_writes((0, 512)), sentinel=False),
    ],
    "the sentinel or its canary is gone, in_use, of another granularity, or broken; the sentinel "
    "is disabled, or the canary enabled; or the canary is clear": [
        Case(sentinel_is(lambda edit, name: edit.remove(name))),
        Case(canary_is(lambda edit, name: edit.remove(name))),
        *(
            Case(change(name))
            for change in (in_use_now, coarser_now, misfit_now)
            for name in ("", "-canary")
        ),
        Case(disabled_now("")),
        Case(enabled_now("-canary")),
        Case(canary_is(lambda edit, name: edit.clear(name))),
        Case(canary_is(lambda edit, name: edit.reset(name, 0, 512))),
        Case(canary_is(lambda edit, name: edit.invert(name))),
        Case(edited(lambda edit: edit.remove_all())),
        # Whatever was written before, or is afterwards, it does not come back.
        Case(cleared),
        *(Case(also(cleared, guest_writes((start, 1)))) for start in (0, SIZE // 2, LAST)),
        *(Case(also(guest_writes((start, 1)), cleared)) for start in (0, SIZE // 2, LAST)),
        Case(also(cleared, guest_writes((0, SIZE)))),
        Case(also(cleared, guest_writes((0, 1))), generation=True),
    ],
    "the sentinel has anything": [
        Case(guest_writes((0, 512)), [[0, 512]]),
        Case(guest_writes((LAST, 1)), [[LAST, 512]]),
        Case(guest_writes((SIZE - 1, 1)), [[LAST, 512]]),
        Case(guest_writes((1000, 1000), (LAST - 512, 1)), [[512, 1536], [LAST - 512, 512]]),
        Case(guest_writes((0, 512)), [[0, 512]], generation=True),
        Case(guest_writes((LAST, 1)), [[LAST, 512]], generation=True),
        Case(guest_writes((0, SIZE)), [[0, SIZE]]),
        Case(guest_writes((0, 512)), [[0, 512]], data_file=True, gives_path=False),
    ],
    "the generation is another": [
        Case(other_token, [], generation=True),
        Case(lambda data: autoclear(data, 1 << 63), [], generation=True),
        Case(edited(lambda edit: edit.add("x")), [], generation=True),
        Case(other_token, [], generation=True, data_file=True, gives_path=False),
    ],
    "there is an external data file of which no path was given, or which is a block device": [
        Case(nothing, data_file=True, gives_path=False),
        Case(nothing, data_file=True, gives_path=False, on_file=grown),
        Case(nothing, data_file=True, is_device=True),
        Case(nothing, data_file=True, is_device=True, on_file=grown),
        Case(nothing, generation=True, data_file=True, is_device=True),
    ],
    "the sentinel has nothing": [
        Case(nothing, []),
        Case(nothing, [], generation=True),
        Case(nothing, [], data_file=True),
        Case(edited(lambda edit: edit.add("x")), []),
        Case(edited(lambda edit: edit.clear("a")), []),
        Case(canary_is(lambda edit, name: edit.set(name, 0, SIZE)), []),
    ],
}
EVIDENCE[next(iter(EVIDENCE))] += header_cases()


def taken_back(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Activation, Data]:
    """The image goes, something happens to it, and it comes back."""
    path = folder / "disk.raw"
    path.write_bytes(b"the data")
    options: dict[str, Any] = {}
    if case.data_file:
        name = extension(DATA_FILE, str(path).encode())
        options = {"extensions": [name], "header": {"incompatible_features": 4}}
    data = image(**options)
    if case.is_device:
        monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    with tracking(data, generation=case.generation or None) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.begin_migration(sentinel=case.sentinel)
        tracker.inactivate(data_file=path if case.data_file and case.gives_path else None)
        case.tamper(data)
        case.on_file(path)
        return tracker.activate(), data


def test_every_line_of_the_evidence_is_tried() -> None:
    assert list(EVIDENCE) == PAGE.table("Evidence").column("found")
    assert all(EVIDENCE.values())


@pytest.mark.spec("LIFE-15")
@pytest.mark.parametrize(
    ("line", "number"),
    [(line, number) for line, cases in EVIDENCE.items() for number in range(len(cases))],
    ids=lambda value: value[:30] if isinstance(value, str) else str(value),
)
def test_evidence(line: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = (row for row in PAGE.table("Evidence").rows if row["found"] == line)
    case = EVIDENCE[line][number]
    try:
        activation, _ = taken_back(case, tmp_path, monkeypatch)
    except qcow2bm.Qcow2BmError as error:
        # What cannot be edited at all cannot be taken back either.
        assert line.startswith("the header says"), error  # noqa: PT017
        assert isinstance(error, qcow2bm.FormatError | qcow2bm.UnsupportedError)  # noqa: PT017
        return
    assert activation.outcome == row["outcome"], activation.reason
    found = None if activation.changed is None else activation.changed.tolist()
    assert found == case.ranges
    kind = "unknown" if found is None else "those" if found else "none"
    assert kind == row["ranges"]


def test_most_other_headers_can_be_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most cases must be taken back; otherwise the row would be proved by errors alone."""
    came = 0
    for case in header_cases():
        try:
            activation, _ = taken_back(case, tmp_path, monkeypatch)
        except qcow2bm.Qcow2BmError:
            continue
        assert activation.outcome == "changed"
        came += 1
    assert came == 6


# --- what becomes of the bitmaps ----------------------------------------------------------------

UNCHANGED: Tamper = nothing


def wrote(data: Data) -> None:
    """Writes as a program that keeps the sentinel and stores "a", but no bitmap that is in_use."""
    guest_writes((9 * GRANULE, 1))(data)


class Fated(NamedTuple):
    """``name`` is what the row is about; "a" is stored, and what is ``carried`` is not."""

    outcome: str
    name: str
    tamper: Tamper
    policy: str = "drop"
    carried: tuple[str, ...] = ()
    sentinel: bool = True


def for_any(name: str, tamper: Tamper, *, carried: tuple[str, ...] = ()) -> list[Fated]:
    """The same with each outcome."""
    return [
        Fated("unchanged", name, tamper, carried=carried),
        Fated("changed", name, also(wrote, tamper), carried=carried),
        Fated("changed", name, also(wrote, tamper), "merge", carried),
        Fated("unknown", name, tamper, carried=carried, sentinel=False),
    ]


FATES: dict[tuple[str, str], list[Fated]] = {
    ("any", "enabled and broken: it does not fit the disk"): [*for_any("a", misfit_now("a"))],
    ("any", "not there, or disabled; or the autoclear bit is off"): [
        *for_any("a", edited(lambda edit: edit.remove("a"))),
        *for_any("a", disabled_now("a")),
        *for_any("c", disabled_now("c"), carried=("c",)),
        *for_any("c", edited(lambda edit: edit.remove("c")), carried=("c",)),
        Fated("changed", "a", lambda data: autoclear(data, 1)),
        Fated("changed", "c", lambda data: autoclear(data, 1), "merge", ("c",)),
    ],
    (
        "unchanged",
        "of the same granularity, and valid, or carried and in_use as it was left",
    ): [
        Fated("unchanged", "a", nothing),
        Fated("unchanged", "a", edited(lambda edit: edit.set("a", 0, SIZE))),
        Fated("unchanged", "c", nothing, carried=("c",)),
        Fated("unchanged", "c", nothing, "merge", ("c",)),
        Fated(
            "unchanged",
            "c",
            entry_field("c", FLAGS, ">I", lambda old: old & ~FLAG_IN_USE),
            carried=("c",),
        ),
    ],
    ("any", "valid otherwise"): [
        Fated("changed", "a", wrote),
        Fated("changed", "a", wrote, "merge"),
        Fated("unknown", "a", nothing, sentinel=False),
        Fated(
            "changed",
            "c",
            also(wrote, entry_field("c", FLAGS, ">I", lambda old: old & ~FLAG_IN_USE)),
            "merge",
            ("c",),
        ),
    ],
    (
        "changed, policy merge",
        "carried, in_use as it was left, and no entry of ours is different",
    ): [
        Fated("changed", "a", wrote, "merge", ("a", "c")),
        Fated("changed", "c", wrote, "merge", ("a", "c")),
    ],
    ("any", "in_use otherwise"): [
        *for_any("a", in_use_now("a")),
        Fated("changed", "c", wrote, "drop", ("a", "c")),
        Fated("unknown", "c", nothing, "drop", ("a", "c"), sentinel=False),
        Fated("unknown", "c", nothing, "merge", ("a", "c"), sentinel=False),
        # The other one was stored anew, so the one who wrote took bitmaps over.
        Fated("changed", "c", wrote, "merge", ("c",)),
        Fated("changed", "c", also(wrote, disabled_now("a")), "merge", ("a", "c")),
    ],
}


def test_every_line_of_what_becomes_of_the_bitmaps_is_tried() -> None:
    rows = PAGE.table("What becomes of the bitmaps").rows
    assert sorted((row["outcome"], row["in the image it is"]) for row in rows) == sorted(FATES)


def policy_fits(outcome: str, case: Fated) -> bool:
    kind, _, policy = outcome.partition(", policy ")
    return kind in ("any", case.outcome) and policy in ("", case.policy)


@pytest.mark.spec("LIFE-18")
@pytest.mark.parametrize(
    ("line", "number"),
    [(line, number) for line, cases in FATES.items() for number in range(len(cases))],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, tuple) else str(value),
)
def test_what_becomes_of_the_bitmaps(line: tuple[str, str], number: int) -> None:
    (row,) = (
        row
        for row in PAGE.table("What becomes of the bitmaps").rows
        if (row["outcome"], row["in the image it is"]) == line
    )
    case = FATES[line][number]
    assert policy_fits(line[0], case)
    data = image()
    with tracking(data) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.begin_migration(carried=case.carried, sentinel=case.sentinel)
        tracker.mark(6 * GRANULE, 1)
        tracker.inactivate()
        case.tamper(data)
        before = statuses(data)
        stored = dirty(data, case.name) if before.get(case.name) == "valid" else set()
        activation = tracker.activate(case.policy)  # type: ignore[arg-type]
        assert activation.outcome == case.outcome
        fate = activation.bitmaps[case.name]
        kind = row["then it is"].partition(",")[0]
        assert fate.kind == kind, fate.reason
        becomes = "inconsistent" if "becomes in_use" in row["then it is"] else None
        if kind == "dropped":
            assert case.name not in tracker.names
            assert statuses(data).get(case.name) == (becomes or before.get(case.name))
        else:
            assert statuses(data)[case.name] == "inconsistent"
        tracker.mark(7 * GRANULE, 1)
        tracker.stop()
    found = statuses(data)
    if kind == "dropped":
        # in_use is never cleared
        assert found.get(case.name) == (becomes or before.get(case.name))
        return
    bits = dirty(data, case.name)
    wanted = {
        "kept": {5, 6, 7} | stored,
        "reloaded": {7} | stored,
    }[kind]
    if kind == "kept" and case.outcome == "changed":
        wanted |= {9}
    # Nothing is dirty that was not marked, or written.
    assert bits == wanted


# --- letting go and taking back -----------------------------------------------------------------


class LockedStorage(RecordingStorage):
    """A storage that also records when its lock is taken and released, and every read."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.log: list[str] = []

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        self.log.append("write")
        super().write(offset, parts)

    def barrier(self) -> None:
        self.log.append("barrier")
        super().barrier()

    def truncate(self, size: int) -> None:
        self.log.append("truncate")
        super().truncate(size)

    def refresh(self) -> None:
        self.log.append("refresh")
        super().refresh()

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.log.append("read")
        return super().read_into(offset, buffer)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.log.append("lock")
        try:
            yield
        finally:
            self.log.append("unlock")

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        return self._locked()


@pytest.mark.spec("LIFE-1")
@pytest.mark.parametrize("begins_before", [False, True])
def test_what_inactivate_does_in_which_order(begins_before: bool) -> None:
    data = image()
    storage = LockedStorage(data)
    with tracking(storage) as tracker:
        if begins_before:
            tracker.begin_migration()
        tracker.mark(5 * GRANULE, 1)
        tracker.inactivate()
        assert storage.log.count("unlock") == 1
        assert storage.log[-1] == "unlock"
        assert storage.log[-2] == "barrier"
        flags = storage.steps[-4:-1]
        assert [step.length for step in flags if isinstance(step, Write)] == [4, 4, 4]
        assert storage.steps[-5].__class__.__name__ == "Barrier"  # after what is left
        assert set(statuses(data).values()) == {"valid"}
        assert dirty(data, "a") == dirty(data, "c") == {5}
        assert tracker.names == ["a", "c"]
        assert all(bitmap.bits.octets[0] == 1 << 5 for bitmap in tracker._session.recording.bitmaps)


def edit_while_tracked(opened: qcow2bm.Image) -> None:
    with opened.edit() as edit:
        edit.add("x")


@pytest.mark.spec("INV-INACTIVE")
@pytest.mark.spec("LIFE-2")
def test_nothing_is_written_while_it_is_in_other_hands() -> None:
    """INV-INACTIVE, whoever asks for it."""
    data = image()
    storage = LockedStorage(data)
    opened = qcow2bm.open(storage, "r+")
    outdated = opened.edit()
    tracker = opened.track()
    tracker.mark(5 * GRANULE, 1)
    tracker.inactivate()
    held, store = opened._opened.guard, tracker._session.store
    assert held
    before, steps, first = bytes(data), len(storage.steps), len(storage.log)

    def in_background() -> None:
        with tracker.background(0.001):
            time.sleep(0.01)

    def enter(work: AbstractContextManager[object]) -> None:
        with work:
            pass

    refused: list[Callable[[], object]] = [
        tracker.flush,
        lambda: tracker.flush(4096, 1),
        lambda: tracker.converge(0, 1),
        lambda: tracker.pending,
        tracker.stop,
        tracker.inactivate,
        tracker.begin_migration,
        lambda: tracker.begin_migration(sentinel=False),
        tracker.cancel_migration,
        lambda: tracker.rotate("a", "b"),
        lambda: enter(tracker.edit()),
        lambda: enter(tracker.writing(0, 1)),
        lambda: tracker.mark(0, 1),
        lambda: tracker.mark_many(np.array([[0, 1]])),
        lambda: edit_while_tracked(opened),
        lambda: enter(outdated),
        opened.track,
        lambda: held.write(0, [b"x"]),
        held.barrier,
        lambda: held.truncate(0),
        held.refresh,
        lambda: store.begin([], []),
        lambda: store.commit(store.plan(store.load_draft()), []),
    ]
    for work in refused:
        try:
            work()
        except (StateError, CommitError):
            pass
        else:
            # An empty plan asks for nothing.
            assert work is refused[-1]
        assert data == before
        assert len(storage.steps) == steps
    in_background()
    with pytest.raises(StateError), tracker.edit() as edit:
        edit.add("x")
    assert not {"write", "barrier", "truncate", "lock", "refresh"} & set(storage.log[first:])
    tracker.abandon()
    opened.close()
    assert len(storage.steps) == steps
    assert data == before


@pytest.mark.spec("INV-INACTIVE")
@pytest.mark.spec("LIFE-2")
def test_until_the_locks_are_taken_nothing_is_written() -> None:
    data = image()
    storage = LockedStorage(data)
    with tracking(storage) as tracker:
        tracker.inactivate()
        first = len(storage.log)
        tracker.activate()
        log = storage.log[first:]
        assert log[0] == "lock"
        assert {"write", "barrier"} <= set(log)


class Host(MemoryStorage):
    """A host with a page cache of its own: what others write it does not see by itself."""

    PAGE_SIZE = 4096

    def __init__(self, data: Data, *, forgets: bool = True) -> None:
        super().__init__(data, "<shared>")
        self.shared = data
        self.pages: dict[int, bytes] = {}
        self.forgets = forgets
        self.log: list[str] = []
        self.is_locked = False

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.log.append("read")
        length = min(len(buffer), max(0, len(self.shared) - offset))
        for at in range(offset, offset + length):
            number, place = divmod(at, self.PAGE_SIZE)
            if number not in self.pages:
                start = number * self.PAGE_SIZE
                content = bytes(self.shared[start : start + self.PAGE_SIZE])
                self.pages[number] = content.ljust(self.PAGE_SIZE, b"\0")
            buffer[at - offset] = self.pages[number][place]
        return length

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        assert self.is_locked
        data = b"".join(parts)
        super().write(offset, [data])
        for number in range(offset // self.PAGE_SIZE, (offset + len(data)) // self.PAGE_SIZE + 1):
            self.pages.pop(number, None)

    def cache_everything(self) -> None:
        """Reads the whole image, as any program on this host may do at any time."""
        self.read_into(0, memoryview(bytearray(len(self.shared))))

    def refresh(self) -> None:
        assert self.is_locked
        self.log.append("refresh")
        if self.forgets:
            self.pages.clear()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.log.append("lock")
        self.is_locked = True
        try:
            yield
        finally:
            self.is_locked = False

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        return self._locked()


@pytest.mark.spec("LIFE-3")
def test_what_is_cached_is_dropped_before_anything_is_read() -> None:
    data = image()
    host = Host(data)
    with tracking(host) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.inactivate()
        host.cache_everything()
        guest_writes((20 * GRANULE, 1))(data)
        del host.log[:]
        activation = tracker.activate()
        assert host.log[:2] == ["lock", "refresh"]
        assert host.log.count("refresh") == 1
        assert "read" in host.log
        assert activation.outcome == "changed"
        assert activation.changed is not None
        assert activation.changed.tolist()[0] == [20 * GRANULE, 512]
        assert {fate.kind for fate in activation.bitmaps.values()} == {"reloaded"}
        tracker.mark(6 * GRANULE, 1)
        tracker.stop()
    assert dirty(data, "a") == {5, 6, 20}


@pytest.mark.spec("LIFE-3")
def test_without_that_it_would_be_deceived() -> None:
    """A host that keeps its cache must be deceived; otherwise the test above proves nothing."""
    data = image()
    host = Host(data, forgets=False)
    with tracking(host) as tracker:
        tracker.inactivate()
        host.cache_everything()
        guest_writes((20 * GRANULE, 1))(data)
        assert tracker.activate().outcome == "unchanged"


@pytest.mark.spec("LIFE-3")
def test_header_extensions_directory_and_tables_are_read_afresh() -> None:
    """If another program has moved structures, taking back must find them at their new places."""
    data = image()
    with tracking(data) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.inactivate()
        edited(lambda edit: edit.set("a", 50 * GRANULE, 1))(data)
        edited(lambda edit: edit.remove("off"))(data)
        edited(lambda edit: edit.add("first", 512))(data)
        assert tracker.activate().outcome == "unchanged"
        tracker.mark(6 * GRANULE, 1)
        tracker.stop()
    assert dirty(data, "a") == {5, 6, 50}
    assert dirty(data, "c") == {5, 6}
    assert dirty(data, "first") == {48}
    assert "off" not in statuses(data)


@pytest.mark.spec("LIFE-3")
def test_a_device_is_read_and_written_past_the_cache_from_its_opening_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    storage = FileStorage(path, writable=True)
    monkeypatch.setattr(storage, "capacity", lambda: 1 << 30)
    made: list[str] = []

    def refuse(*arguments: object) -> None:
        raise AssertionError("was written through the cache")

    monkeypatch.setattr(os, "pwritev", refuse)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)  # of what others cached

    class Direct:
        def __init__(self, path: str) -> None:
            made.append(path)

        def read_into(self, offset: int, buffer: memoryview) -> int:
            made.append("read")
            part = path.read_bytes()[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            return len(part)

        def write(self, offset: int, parts: Sequence[Buffer]) -> None:
            made.append("write")
            data = bytearray(path.read_bytes())
            new = b"".join(parts)
            data[offset : offset + len(new)] = new
            path.write_bytes(data)

        def barrier(self) -> None:
            made.append("barrier")

        def close(self) -> None:
            made.append("close")

    monkeypatch.setattr("qcow2bm.storage.file.DirectFile", Direct)
    with qcow2bm.open(storage, "r+") as opened:
        assert made[0] == str(path)
        tracker = opened.track()
        assert {"read", "write", "barrier"} <= set(made)
        tracker.mark(5 * GRANULE, 1)
        tracker.inactivate()
        tracker.activate(other_side_has_stopped=True)
        tracker.mark(6 * GRANULE, 1)
        tracker.stop()
    storage.close()
    assert made[-1] == "close"
    assert made.count(str(path)) == 1
    assert {5, 6} <= dirty(path.read_bytes(), "a")


# --- LIFE-4: whatever fails ---------------------------------------------------------------------


class Attempt(NamedTuple):
    """An activation of which a call failed: the image then, and what was raised."""

    call: str
    error: Exception
    state: str
    data: Data
    effects: list[str]
    retry: Activation | None


def attempt(number: int, is_sticky: bool, **options: Any) -> Attempt | None:
    """Fails the call of that number; None where there are not so many."""
    storage = FaultyStorage(image())
    with tracking(storage, **options) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.begin_migration(carried=["c"])
        tracker.inactivate()
        first, before = len(storage.calls), len(storage.effects)
        storage.fault = Fault(first + number, is_sticky=is_sticky)
        try:
            tracker.activate()
        except qcow2bm.Qcow2BmError as error:
            failed: Exception = error
        else:
            return None
        state, effects = tracker.state, storage.effects[before:]
        call = storage.calls[first + number]
        left = bytearray(storage.data)
        storage.fault = None
        retry = tracker.activate() if state == "inactive" else None
        if retry:
            tracker.mark(6 * GRANULE, 1)
            tracker.stop()
            assert {5, 6} <= dirty(storage.data, "a")
        return Attempt(call, failed, state, left, effects, retry)


@cache
def attempts(*, generation: bool | None = None) -> tuple[Attempt, ...]:
    """Each call of an activation fails in turn, once or from then on."""
    all_of_them: list[Attempt] = []
    for is_sticky in (False, True):
        number = 0
        while found := attempt(number, is_sticky, generation=generation):
            all_of_them.append(found)
            number += 1
        assert number > 30
    return tuple(all_of_them)


@pytest.mark.spec("INV-SUPERSET")
@pytest.mark.spec("LIFE-4")
@pytest.mark.parametrize("is_recorded", [False, True])
def test_whatever_fails_no_bitmap_is_valid_that_misses_something(is_recorded: bool) -> None:
    states = set()
    for found in attempts(generation=is_recorded or None):
        states.add(found.state)
        assert found.state in ("inactive", "failed")
        now = statuses(found.data)
        assert now["off"] == "valid"
        assert now["c"] == "inconsistent"  # it was carried: only in memory is all of it
        if now["a"] == "valid":
            assert dirty(found.data, "a") == {5}
        else:
            assert found.state == "failed"
        if found.state == "inactive":
            assert found.retry
            assert "c" in found.retry.bitmaps
    assert states == {"inactive", "failed"}


@pytest.mark.spec("LIFE-4")
def test_what_fails_before_the_commit_point_can_be_tried_again() -> None:
    """Unless the commit may count, tracking goes on once whatever failed works again."""
    wrong = []
    for found in attempts():
        if isinstance(found.error, CommitError) and found.error.outcome != "old":
            assert found.state == "failed"
            continue
        counts = "a" in statuses(found.data) and statuses(found.data)["a"] == "inconsistent"
        if not counts and found.state != "inactive":
            wrong.append((found.call, str(found.error)))
        if found.retry:
            assert found.retry.outcome == "unchanged"
    assert wrong == []


@pytest.mark.spec("LIFE-4")
def test_what_was_begun_oneself_is_no_sign_of_others() -> None:
    """A token that was drawn for the commit that failed does not make the disk a changed one."""
    wrong = [
        (found.call, str(found.error), found.retry.reason)
        for found in attempts(generation=True)
        if found.retry and found.retry.outcome != "unchanged"
    ]
    assert wrong == []


@pytest.mark.spec("LIFE-4")
@pytest.mark.parametrize(
    ("tamper", "repair", "error"),
    [
        (planted(72, ">Q", 1), planted(72, ">Q", 0), qcow2bm.FormatError),
        (planted(72, ">Q", 2), planted(72, ">Q", 0), qcow2bm.FormatError),
        (planted(0, ">I", 0), planted(0, ">I", 0x514649FB), qcow2bm.FormatError),
        (planted(4, ">I", 4), planted(4, ">I", 3), qcow2bm.UnsupportedError),
    ],
    ids=["dirty", "corrupt", "no qcow2", "version 4"],
)
def test_an_image_that_must_not_be_edited(
    tamper: Tamper, repair: Tamper, error: type[Exception]
) -> None:
    data = image()
    storage = LockedStorage(data)
    with tracking(storage) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.inactivate()
        tamper(data)
        before, steps = bytes(data), len(storage.steps)
        for _ in range(2):
            with pytest.raises(error):
                tracker.activate()
            assert storage.log[-1] == "unlock"
            assert (len(storage.steps), bytes(data)) == (steps, before)
            assert tracker.state == "inactive"
        repair(data)
        assert tracker.activate().outcome == "unchanged"


@pytest.mark.spec("LIFE-4")
def test_somebody_else_has_the_locks(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    with qcow2bm.open(path, "r+") as opened:
        tracker = opened.track()
        tracker.inactivate()
        with qcow2bm.open(path, "r+"):
            before = path.read_bytes()
            with pytest.raises(qcow2bm.ImageLockedError):
                tracker.activate()
            assert tracker.state == "inactive"
            assert path.read_bytes() == before
        assert tracker.activate().outcome == "unchanged"
        with pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.open(path)


@pytest.mark.spec("LIFE-4")
def test_another_file_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    with qcow2bm.open(path, "r+") as opened:
        tracker = opened.track()
        tracker.inactivate()
        mine = path.rename(tmp_path / "mine")
        path.write_bytes(image())
        with pytest.raises(qcow2bm.StorageError, match="replaced"):
            tracker.activate()
        mine.replace(path)
        assert tracker.activate().outcome == "unchanged"


@pytest.mark.spec("LIFE-4")
def test_after_the_commit_point_the_bitmaps_stay_in_use() -> None:
    ended = [found for found in attempts() if found.state == "failed"]
    for found in ended:
        if isinstance(found.error, CommitError) and found.error.outcome == "new":
            assert statuses(found.data)["a"] == "inconsistent"
    assert {e.error.outcome for e in ended if isinstance(e.error, CommitError)} == {
        "new",
        "unknown",
    }


# --- the rest of letting go and taking back -----------------------------------------------------


class SharedDevice(LockedStorage):
    excludes_other_hosts = False


@pytest.mark.spec("LIFE-5")
def test_where_locks_do_not_tell_the_caller_has_to() -> None:
    storage = SharedDevice(image())
    with tracking(storage) as tracker:
        tracker.inactivate()
        first = len(storage.log)
        with pytest.raises(StateError, match="other_side_has_stopped=True"):
            tracker.activate()
        assert storage.log[first:] == []
        assert tracker.state == "inactive"
        assert tracker.activate(other_side_has_stopped=True).outcome == "unchanged"


@pytest.mark.spec("LIFE-5")
@pytest.mark.parametrize("locking", [False, True])
def test_without_locking_nobody_is_kept_away(tmp_path: Path, locking: bool) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    with qcow2bm.open(path, "r+", locking=locking) as opened:
        tracker = opened.track()
        tracker.inactivate()
        if not locking:
            with pytest.raises(StateError, match="other_side_has_stopped=True"):
                tracker.activate()
        assert tracker.activate(other_side_has_stopped=not locking).outcome == "unchanged"


@pytest.mark.spec("INV-INUSE")
@pytest.mark.spec("LIFE-6")
@pytest.mark.parametrize("tamper", [nothing, wrote], ids=["unchanged", "changed"])
def test_bitmaps_are_in_use_before_a_mark_is_accepted(tamper: Tamper) -> None:
    """One commit must both set in_use and remove the sentinel, before any mark is accepted."""
    data = image()
    refused: list[str] = []

    class Marking(LockedStorage):
        def barrier(self) -> None:
            super().barrier()
            if is_coming_back:
                with pytest.raises(StateError):
                    tracker.mark(0, 1)
                refused.append(statuses(self.data)["a"])

    is_coming_back = False
    storage = Marking(data)
    with tracking(storage) as tracker:
        tracker.inactivate()
        names = {sentinel_in(data), canary_in(data)}
        tamper(data)
        before, first = bytes(data), len(storage.steps)
        is_coming_back = True
        tracker.activate()
        is_coming_back = False
        tracker.mark(0, 1)
        assert refused[-1] == "inconsistent"
        plan = storage.since(first)
        assert sum(length == 24 for part in intervals_of(plan) for _, length in part) == 1
        seen = []
        for interval in intervals(before, plan):
            now = statuses(interval.after)
            seen.append((now["a"], now["c"], len(names & now.keys())))
        old, new = ("valid", "valid", 2), ("inconsistent", "inconsistent", 0)
        assert sorted(set(seen), reverse=True) == [old, new]
        assert seen == sorted(seen, reverse=True)


@pytest.mark.spec("LIFE-7")
def test_what_is_carried_is_not_stored() -> None:
    data = image()
    with tracking(data) as tracker:
        tracker.begin_migration(carried=["c"])
        tracker.mark(5 * GRANULE, 1)
        tracker.inactivate()
        assert statuses(data)["a"] == "valid"
        assert statuses(data)["c"] == "inconsistent"
        with qcow2bm.open(bytes(data)) as opened:
            assert not opened.bitmaps["c"].stale_bits().any()


@pytest.mark.spec("LIFE-7")
@pytest.mark.parametrize("end", ["cancel", "activate", "stop"])
def test_carrying_ends_with_the_migration(end: str) -> None:
    data = image()
    with tracking(data) as tracker:
        tracker.begin_migration(carried=["c"])
        tracker.mark(5 * GRANULE, 1)
        if end == "cancel":
            tracker.cancel_migration()
        if end == "activate":
            tracker.inactivate()
            assert tracker.activate().bitmaps["c"].kind == "kept"
        if end == "stop":
            tracker.stop()
        else:
            tracker.inactivate()
        assert statuses(data)["c"] == "valid"
        assert 5 in dirty(data, "c")


@pytest.mark.spec("LIFE-7")
def test_a_stop_ends_it_even_if_the_sentinel_cannot_be_removed() -> None:
    """If the sentinel cannot be removed, the stop must store all bitmaps, even carried ones."""
    storage = FaultyStorage(image())
    with tracking(storage) as tracker:
        tracker.begin_migration(carried=["c"])
        tracker.mark(5 * GRANULE, 1)
        storage.fault = Fault(len(storage.calls))  # the first read of the removal
        tracker.stop()
        assert tracker.state == "stopped"
    found = statuses(storage.data)
    assert (found["a"], found["c"]) == ("valid", "valid")
    assert dirty(storage.data, "c") == {5}


# --- the sentinel -------------------------------------------------------------------------------


@pytest.mark.spec("LIFE-8")
def test_the_sentinel_of_an_image() -> None:
    data = image()
    names = set()
    with tracking(data) as tracker:
        for _ in range(3):
            tracker.begin_migration()
            name = sentinel_in(data)
            names.add(name)
            with qcow2bm.open(bytes(data)) as opened:
                entry, canary = (opened.bitmaps[n].entry for n in (name, canary_in(data)))
            assert (entry.granularity, entry.auto, entry.in_use) == (512, True, True)
            assert (canary.granularity, canary.auto, canary.in_use) == (512, False, False)
            assert entry.bitmap_table_size == canary.bitmap_table_size == 1
            tracker.cancel_migration()
            assert list(statuses(data)) == ["a", "c", "off"]
    assert len(names) == 3


@pytest.mark.spec("LIFE-9")
def test_the_sentinel_costs_the_stop_one_write_of_four_bytes() -> None:
    plans: list[Plan] = []
    for has_sentinel in (False, True):
        data = image()
        storage = LockedStorage(data)
        with tracking(storage) as tracker:
            tracker.begin_migration(sentinel=has_sentinel)
            if has_sentinel:
                assert statuses(data)[sentinel_in(data)] == "inconsistent"
                assert statuses(data)[canary_in(data)] == "valid"
            tracker.mark(5 * GRANULE, 1)
            first = len(storage.steps)
            tracker.inactivate()
            plans.append(storage.since(first))
            if has_sentinel:
                assert statuses(data)[sentinel_in(data)] == "valid"
                assert dirty(data, sentinel_in(data)) == set()
                assert dirty(data, canary_in(data)) == ends_of(data, canary_in(data))
    without, with_it = plans
    assert with_it.barriers == without.barriers
    assert with_it.length == without.length + 4
    flags = [sum(write.length == 4 for write in plan.writes) for plan in plans]
    assert flags == [2, 3]


@pytest.mark.spec("LIFE-9")
def test_it_is_added_before_the_stop_while_marking_goes_on() -> None:
    marked: list[int] = []

    class Marking(RecordingStorage):
        def barrier(self) -> None:
            super().barrier()
            if is_beginning:
                marked.append(len(marked) + 10)
                tracker.mark(marked[-1] * GRANULE, 1)

    is_beginning = False
    storage = Marking(image())
    with tracking(storage) as tracker:
        is_beginning = True
        tracker.begin_migration()
        is_beginning = False
        tracker.inactivate()
    assert marked
    assert dirty(storage.data, "a") == set(marked)


@pytest.mark.spec("LIFE-10")
@pytest.mark.parametrize("size", [SIZE, SIZE + 512, 3 * 512, 512, (64 << 20) + 1536])
def test_the_canary_of_an_image(size: int) -> None:
    data = image(size=size)
    with tracking(data) as tracker:
        tracker.mark(0, 1)
        tracker.begin_migration()
        assert dirty(data, canary_in(data)) == ends_of(data, canary_in(data))  # from the beginning
        tracker.mark(0, size)
        tracker.inactivate()
        assert dirty(data, canary_in(data)) == ends_of(data, canary_in(data))
        assert dirty(data, sentinel_in(data)) == set()
        found = tracker.activate()
        assert found.changed is not None
        assert (found.outcome, found.changed.shape) == ("unchanged", (0, 2))
        tracker.rotate("a", "fresh")
        tracker.inactivate()
        tracker.activate()
        tracker.stop()
    assert dirty(data, "c") == set(range(-(-size // GRANULE)))
    assert dirty(data, "fresh") == set()  # nothing counts as written that was not


@pytest.mark.spec("LIFE-10")
@pytest.mark.parametrize("size", [SIZE, SIZE + 512, 3 * 512, 512, (64 << 20) + 1536])
def test_no_write_changes_the_canary_and_all_change_the_sentinel(size: int) -> None:
    for start in {0, 511, size // 2, size - 512, size - 1}:
        data = image(size=size)
        with tracking(data) as tracker:
            tracker.inactivate()
            guest_writes((start, 1))(data)
            assert dirty(data, canary_in(data)) == ends_of(data, canary_in(data))
            with qcow2bm.open(bytes(data)) as opened:
                granularity = opened.bitmaps[sentinel_in(data)].granularity
            first = start // granularity * granularity
            found = tracker.activate()
            assert found.outcome == "changed"
            assert found.changed is not None
            assert found.changed.tolist() == [[first, min(granularity, size - first)]]
            tracker.stop()
        assert dirty(data, "a") == {start // GRANULE}


@pytest.mark.spec("LIFE-10")
@pytest.mark.parametrize("carried", [(), ("c",), ("a", "c")])
@pytest.mark.parametrize("policy", ["drop", "merge"])
@pytest.mark.parametrize("start", [None, 0, 5 * GRANULE, SIZE // 2, SIZE - 512])
def test_if_bitmaps_were_cleared_it_tells_nothing(
    carried: tuple[str, ...], policy: str, start: int | None
) -> None:
    """If bitmaps were cleared, carried bitmaps must be dropped, wherever the guest there writes."""
    data = image()
    with tracking(data) as tracker:
        tracker.mark(7 * GRANULE, 1)
        tracker.begin_migration(carried=carried)
        tracker.inactivate()
        cleared(data)
        if start is not None:
            guest_writes((start, 1))(data)
        found = tracker.activate(policy)  # type: ignore[arg-type]
        assert (found.outcome, found.changed) == ("changed", None)
        kinds = {name: fate.kind for name, fate in found.bitmaps.items()}
        assert kinds == {n: "dropped" if n in carried else "reloaded" for n in ("a", "c")}


SENTINEL_KINDS = {
    "valid": FLAG_AUTO,
    "in_use": FLAG_AUTO | FLAG_IN_USE,
    "disabled": 0,
    "disabled, in_use": FLAG_IN_USE,
}


@pytest.mark.spec("LIFE-11")
@pytest.mark.parametrize("suffix", ["", "-canary"])
@pytest.mark.parametrize("kind", SENTINEL_KINDS)
@pytest.mark.parametrize("names", [None, ["a"]])
def test_one_that_was_left_behind_goes_when_tracking_begins(
    kind: str, names: list[str] | None, suffix: str
) -> None:
    """A sentinel or a canary that was left behind must be removed, even if the other is missing."""
    old = Stored((OLD_SENTINEL + suffix).encode(), [b"\x01"], 12, SENTINEL_KINDS[kind])
    other = Stored(OLD_SENTINEL.encode()[:-1], granularity_bits=12, flags=0)
    data = build_image(Stored(b"a", granularity_bits=12), old, other, size=SIZE).data
    with tracking(data, names=names) as tracker:
        assert tracker.names == ["a"]
        assert set(statuses(data)) == {"a", OLD_SENTINEL[:-1]}


@pytest.mark.spec("LIFE-11")
@pytest.mark.parametrize("end", ["abandon", "inactivate", "begin"])
def test_that_of_a_source_that_died(end: str) -> None:
    data = image()
    with tracking(data) as tracker:
        tracker.begin_migration()
        if end == "inactivate":
            tracker.inactivate()
        if end == "abandon":
            tracker.abandon()
    left = sentinel_in(data)
    assert statuses(data)[left] == ("valid" if end == "inactivate" else "inconsistent")
    assert statuses(data)[canary_in(data)] == "valid"
    if end != "inactivate":
        edited(lambda edit: edit.remove("a"), lambda edit: edit.add("a"))(data)
    with tracking(data, names=["a"], others="mark-in-use"):
        assert not any(map(is_sentinel, statuses(data)))


# --- generation ---------------------------------------------------------------------------------


def test_the_generation_is_named_and_off_by_default() -> None:
    data = image()
    with tracking(data) as tracker:
        assert generation(data) is None
        tracker.stop()
    with tracking(data, generation=True) as tracker:
        assert generation(data)
    with qcow2bm.open(bytes(data)) as opened:
        (own,) = (f for f in opened.features("autoclear") if f.bit == 63)
        assert own.name == GENERATION_NAME
        assert opened.header.autoclear_features & AUTOCLEAR_GENERATION


def tokens(data: Data, step: Callable[[], object]) -> tuple[bytes, bytes]:
    """The token before and after something."""
    before = generation(data)
    step()
    after = generation(data)
    assert before
    assert after
    assert after.counter > before.counter
    return before.token, after.token


@pytest.mark.spec("LIFE-12")
def test_every_writer_draws_a_new_token() -> None:
    data = image()
    with tracking(data, generation=True) as tracker:
        tracker.stop()
    seen: set[bytes] = set()

    def step(work: Callable[[], object]) -> None:
        before, after = tokens(data, work)
        assert before != after
        assert after not in seen
        seen.update((before, after))

    for work in (
        lambda edit: edit.add("x"),
        lambda edit: edit.set("x", 0, 1),
        lambda edit: edit.disable("x"),
        lambda edit: edit.remove("x"),
        lambda edit: edit.remove_all(),
        each(lambda edit: edit.add("a"), lambda edit: edit.add("c")),
    ):
        step(lambda work=work: edited(work)(data))  # type: ignore[misc]
    for options in ({}, {"generation": None}, {"generation": True}):
        with qcow2bm.open(data, "r+") as opened:
            begun: list[Tracker] = []
            track = partial(opened.track, **options)
            step(lambda begun=begun, track=track: begun.append(track()))  # type: ignore[misc]
            (tracker,) = begun
            step(tracker.begin_migration)
            step(tracker.inactivate)
            step(tracker.activate)
            step(lambda tracker=tracker: tracker.rotate("a", "b"))  # type: ignore[misc]
            step(lambda tracker=tracker: tracker.rotate("b", "d"))  # type: ignore[misc]
            step(tracker.stop)
        anew(data, "a", "b", "d")
    with tracking(data, generation=False):
        assert generation(data) is None


@pytest.mark.spec("LIFE-12")
@pytest.mark.parametrize("work", ["edit", "begin_migration", "activate", "track", "inactivate"])
def test_a_token_is_durable_no_later_than_the_first_change_that_counts(work: str) -> None:
    data = image()
    with tracking(data, generation=True) as tracker:
        tracker.stop()
    storage = RecordingStorage(data)
    before, first = bytes(data), 0
    with qcow2bm.open(storage, "r+") as opened:
        if work == "edit":
            with opened.edit() as edit:
                edit.add("x")
        else:
            tracker = opened.track()
            tracker.mark(0, 1)
            for name in ("begin_migration", "inactivate", "activate"):
                if work == "track":
                    break
                before, first = bytes(data), len(storage.steps)
                getattr(tracker, name)()
                if name == work:
                    break
        plan = storage.since(first)
    old = generation(before)
    assert old
    counted = statuses(before)
    is_new = False
    for interval in intervals(before, plan):
        found = generation(interval.after)
        assert found
        is_new = is_new or found.token != old.token
        if statuses(interval.after) != counted:
            assert is_new
            return
    pytest.fail("nothing counted")


@pytest.mark.spec("LIFE-12")
def test_of_several_extensions_that_is_renewed_which_counts() -> None:
    listed = [extension(GENERATION, letter * 24) for letter in (b"x", b"y")]
    data = image(extensions=listed, header={"autoclear_features": 1 | 1 << 63})
    before = generation(data)
    edited(lambda edit: edit.add("x"))(data)
    after = generation(data)
    assert before
    assert after is None or after.token != before.token


@pytest.mark.spec("LIFE-12")
def test_where_others_have_ended_it_it_is_recorded_again() -> None:
    """If another writer has ended the generation, taking back must record a new one."""
    data = image()
    with tracking(data, generation=True) as tracker:
        for _ in range(2):
            tracker.inactivate()
            autoclear(data, 1 << 63)
            assert tracker.activate().outcome == "changed"
            assert generation(data)


@pytest.mark.spec("LIFE-12")
def test_where_there_is_no_room_for_it_any_more_the_image_comes_back_all_the_same() -> None:
    data = image()
    with tracking(data, generation=True) as tracker:
        tracker.inactivate()
        autoclear(data, 1 << 63)
        with qcow2bm.open(bytes(data)) as opened:
            end = opened._opened.file.extensions_end
        # Somebody rewrote the header, and left the rest of the cluster to an extension of his.
        length = 4096 - end - 16
        data[end : end + 8] = struct.pack(">II", 0x12345678, length)
        data[end + 8 : 4096] = bytes(4096 - end - 8)
        before = bytes(data)
        try:
            assert tracker.activate().outcome == "changed"
        except qcow2bm.LimitError:
            assert data == before
            raise


@pytest.mark.spec("LIFE-13")
def test_without_the_bit_the_extension_means_nothing() -> None:
    data = image()
    with tracking(data, generation=True) as tracker:
        tracker.stop()
    before = generation(data)
    autoclear(data, 1 << 63)
    assert generation(data) is None
    edited(lambda edit: edit.add("x"))(data)
    with qcow2bm.open(bytes(data)) as opened:
        (stale,) = (found for _, found in opened.extensions if found.type == GENERATION)
        assert before
        assert stale.data[:16] == before.token  # nobody draws a new one
        assert not opened.header.autoclear_features >> 63
    with tracking(data):
        assert generation(data) is None
    anew(data, "a", "c")
    with tracking(data, generation=True) as tracker:
        now = generation(data)
        assert now
        assert now.token != before.token


@pytest.mark.spec("LIFE-14")
@pytest.mark.parametrize("has_sentinel", [False, True])
def test_the_same_token_proves_nothing_and_another_one_does(has_sentinel: bool) -> None:
    for tamper, outcome in (
        (nothing, "unchanged" if has_sentinel else "unknown"),
        (other_token, "changed"),
        (lambda data: autoclear(data, 1 << 63), "changed"),
    ):
        data = image()
        with tracking(data, generation=True) as tracker:
            tracker.begin_migration(sentinel=has_sentinel)
            tracker.inactivate()
            tamper(data)
            assert tracker.activate().outcome == outcome


@pytest.mark.spec("LIFE-14")
def test_what_happened_the_last_time_is_no_sign_the_next_time() -> None:
    """A cleared autoclear bit must be a sign of a writer once, not again at the next hand-over."""
    data = image()
    with tracking(data, generation=True) as tracker:
        tracker.inactivate()
        autoclear(data, 1 << 63)
        assert tracker.activate().outcome == "changed"
        tracker.inactivate()
        assert tracker.activate().outcome == "unchanged"


# --- evidence and what becomes of the bitmaps ---------------------------------------------------


@pytest.mark.spec("LIFE-16")
def test_whoever_wrote_stops_the_guest_wherever_that_was() -> None:
    """ "unchanged" is all that lets it go on, so that must never be said of a disk written to."""
    for start in (0, 511, 4096, SIZE // 2, SIZE - 1024, SIZE - 512, SIZE - 1):
        data = image()
        with tracking(data) as tracker:
            tracker.inactivate()
            guest_writes((start, 1))(data)
            found = tracker.activate()
            assert found.outcome == "changed"
            assert found.changed is not None
            assert any(low <= start < low + length for low, length in found.changed.tolist())


@pytest.mark.spec("LIFE-17")
def test_an_external_data_file_is_looked_at_and_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    for module, name in ((os, "open"), (io, "open"), (io, "FileIO"), (io, "open_code")):
        original = getattr(module, name)

        def watched(path: object, *rest: Any, original: Any = original, **more: Any) -> Any:
            opened.append(path)
            return original(path, *rest, **more)

        monkeypatch.setattr(module, name, watched)
    path = tmp_path / "disk.raw"
    path.write_bytes(b"the data")
    path.chmod(0)
    named = extension(DATA_FILE, str(path).encode())
    data = image(extensions=[named], header={"incompatible_features": 4})
    opened.clear()
    with tracking(data) as tracker:
        tracker.inactivate(data_file=path)
        assert tracker.activate().outcome == "unchanged"
    assert str(path) not in {os.fsdecode(p) for p in opened if isinstance(p, str | bytes | Path)}


@pytest.mark.spec("LIFE-17")
def test_a_data_file_that_is_none_is_found_out_before_anything_is_done(
    tmp_path: Path,
) -> None:
    data = image()
    with tracking(data) as tracker:
        before = bytes(data)
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)  # who opened it would wait for a writer for ever
        for path in (tmp_path / "none", "a\0b", fifo, tmp_path, os.devnull):
            with pytest.raises(qcow2bm.StorageError):
                tracker.inactivate(data_file=path)
            assert data == before
            assert tracker.state == "tracking"
        tracker.inactivate()


@pytest.mark.spec("LIFE-18")
def test_kept_has_what_is_in_memory_and_what_the_image_has_besides() -> None:
    data = image()
    with tracking(data) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.inactivate()
        edited(lambda edit: edit.clear("a"), lambda edit: edit.set("a", 100 * GRANULE, 1))(data)
        assert tracker.activate().bitmaps["a"].kind == "kept"
        tracker.stop()
    assert dirty(data, "a") == {5, 100}
    assert dirty(data, "c") == {5}


@pytest.mark.spec("LIFE-18")
def test_nothing_is_dropped_that_others_would_believe() -> None:
    """A bitmap that misses writes from now on must not be left valid and recording."""
    for names in (("a", "c"), ("", "c"), ("a", "\udcff")):
        stored = [Stored(n.encode("utf-8", "surrogateescape"), granularity_bits=12) for n in names]
        data = build_image(*stored, size=SIZE, cluster_bits=12).data
        with tracking(data) as tracker:
            assert tracker.names == list(names)
            tracker.inactivate()
            activation = tracker.activate()
            missed = {n for n, fate in activation.bitmaps.items() if fate.kind == "dropped"}
            believed = {n for n, status in statuses(data).items() if status == "valid"}
            assert missed & believed == set(), names


@pytest.mark.spec("LIFE-19")
def test_what_records_in_the_image_by_then_is_tracked_too() -> None:
    data = image()
    with tracking(data) as tracker:
        tracker.inactivate()
        edited(lambda edit: edit.add("new", GRANULE))(data)
        edited(lambda edit: edit.set("new", 50 * GRANULE, 1))(data)
        edited(lambda edit: edit.add("quiet", GRANULE, enabled=False))(data)
        edited(lambda edit: edit.add("crashed", GRANULE))(data)
        in_use_now("crashed")(data)
        found = tracker.activate()
        assert found.bitmaps["new"].kind == "reloaded"
        assert tracker.names == ["a", "c", "new"]
        assert statuses(data)["new"] == "inconsistent"
        tracker.mark(7 * GRANULE, 1)
        tracker.stop()
    assert {7, 50} <= dirty(data, "new")
    assert statuses(data)["crashed"] == "inconsistent"
    assert dirty(data, "quiet") == set()


class Watched(RecordingStorage):
    """Tells when it was written to, whoever did."""

    def change_token(self) -> object:
        return hash(bytes(self.data))


@pytest.mark.spec("LIFE-20")
@pytest.mark.parametrize("is_written", [False, True])
def test_if_somebody_wrote_all_of_it_is_stored_again(is_written: bool) -> None:
    data = image()
    storage = Watched(data)
    with tracking(storage) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.inactivate()
        if is_written:
            edited(lambda edit: edit.disable("off"))(data)
            edited(lambda edit: edit.clear("a"))(data)
        assert tracker.activate().outcome == "unchanged"
        whole = sum(len(bitmap.bits.touched) for bitmap in tracker._session.recording.bitmaps)
        assert whole > 0
        assert tracker.pending.pieces == (whole if is_written else 0)
        tracker.flush()
        tracker.stop()
    assert dirty(data, "a") == dirty(data, "c") == {5}
