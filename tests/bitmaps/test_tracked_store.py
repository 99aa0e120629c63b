"""Plans for bitmaps that are in_use by us: what is written where, and in which order."""

from __future__ import annotations

import pytest
from support.audit import Audit
from support.images import ONES, ZEROES, Built, Stored, Word, build_image
from support.model import Model
from support.recording import RecordingStorage, intervals_of

import qcow2bm
from qcow2bm.bitmaps.tracked_bitmap import PIECE_BYTES, TrackedBitmap
from qcow2bm.bitmaps.tracked_store import TrackedStore
from qcow2bm.clusters.plan import Plan, Write, execute
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE

COVERED = 8 * 512 * 512
SIZE = 20 * COVERED + 3 * 512
"""The size of a disk whose bitmap of granularity 512 has a last cluster of three bits."""

BOTH = FLAG_AUTO | FLAG_IN_USE
HEAD: list[Word] = [b"\x01", ZEROES, ONES, b"\x02", b"\x04", ZEROES, ZEROES, b"\x08"]
TABLE: list[Word] = [*HEAD, *[ZEROES] * 12, b"\x05"]


class Live:
    """An image in memory of which bitmaps are in_use by us."""

    def __init__(self, built: Built, *names: str, others: tuple[str, ...] = ()) -> None:
        self.built = built
        self.storage = RecordingStorage(built.data)
        with qcow2bm.open(built.data) as image:
            tracked = [image.bitmaps[name].entry for name in names]
            left_out = [image.bitmaps[name].entry for name in others]
        self.store = TrackedStore(self.storage)
        self.store.begin(tracked, left_out)
        self.begun = self.storage.since(0)

    def __getitem__(self, name: str) -> TrackedBitmap:
        return next(bitmap for bitmap in self.store.bitmaps if bitmap.name == name)

    def put(self, name: str, place: int, octet: int) -> Plan:
        """Changes a byte of a bitmap, and plans to store the piece that has it."""
        bitmap, piece = self[name], place // PIECE_BYTES
        bitmap.bits.octets[place] = octet
        content = bytes(bitmap.bits.octets[piece * PIECE_BYTES :][:PIECE_BYTES])
        return Plan(tuple(self.store.store([(bitmap, {piece: content})])))


def small() -> Built:
    """A bitmap whose clusters are an eighth of a piece."""
    built = build_image(Stored(b"daily", TABLE, 9), Stored(b"other"), size=SIZE)
    built.data.extend(b"\xaa" * 512 * 10)
    return built


# --- loading -------------------------------------------------------------------------------------


def test_all_bits_are_in_memory() -> None:
    live = Live(small(), "daily")
    octets = bytes(live["daily"].bits.octets)
    assert len(octets) == 512 * len(TABLE)
    found = Model.of_packed(octets, 512, SIZE)
    assert found == Model.of_table(TABLE, 512, 512, SIZE)


@pytest.mark.spec("INV-TAIL")
@pytest.mark.parametrize("word", [b"\xff" * 512, ONES])
def test_bits_behind_the_disk_are_not_loaded(word: int | bytes) -> None:
    """Bits behind the disk must be ignored: another program may have set them (INV-TAIL)."""
    built = build_image(Stored(b"daily", [*TABLE[:-1], word], 9), size=SIZE)
    octets = Live(built, "daily")["daily"].bits.octets
    assert octets[-512:] == b"\x07" + bytes(511)


# --- beginning -----------------------------------------------------------------------------------


@pytest.mark.spec("INV-INUSE")
@pytest.mark.spec("TRACK-1")
def test_begin_sets_in_use_and_nothing_else() -> None:
    built = small()
    before = bytes(built.data)
    live = Live(built, "daily", others=("other",))
    places = [(built.offset("directory-entry", number, "flags"), 4) for number in (0, 1)]
    assert intervals_of(live.begun) == [places]
    assert live.begun.barriers == 1
    assert [bitmap.flags for bitmap in Audit(built.data).bitmaps] == [BOTH, BOTH]
    assert live["daily"].entry.in_use
    assert [bitmap.name for bitmap in live.store.bitmaps] == ["daily"]
    built.plant(FLAG_AUTO, "directory-entry", 0, "flags")
    built.plant(FLAG_AUTO, "directory-entry", 1, "flags")
    assert built.data == before


@pytest.mark.spec("INV-UNKNOWN")
def test_an_unknown_autoclear_bit_is_cleared_before_anything_else() -> None:
    """Durably: the program that the bit belongs to has to notice (INV-UNKNOWN)."""
    built = build_image(Stored(), size=SIZE, header={"autoclear_features": 1 | 1 << 40})
    first, second = intervals_of(Live(built, "daily").begun)
    assert [offset < 512 for offset, _ in first] == [True]
    assert second == [(built.offset("directory-entry", 0, "flags"), 4)]
    assert Audit(built.data).autoclear == 1


def test_end_clears_in_use_and_nothing_else() -> None:
    built = small()
    live = Live(built, "daily")
    flags = (built.offset("directory-entry", 0, "flags"), 4)
    plan = Plan(tuple(live.store.end(live.store.bitmaps)))
    assert intervals_of(plan) == [[flags]]
    assert plan.barriers == 1
    execute(plan, live.storage, len(built.data))
    assert [bitmap.flags for bitmap in Audit(built.data).bitmaps] == [FLAG_AUTO, FLAG_AUTO]
    assert not live["daily"].entry.in_use


# --- storing -------------------------------------------------------------------------------------


def test_no_changes_are_no_steps() -> None:
    live = Live(small(), "daily")
    assert live.store.store([]) == []
    assert live.store.store([(live["daily"], {})]) == []


def test_a_piece_is_written_over_the_clusters_it_has() -> None:
    """Clean bits and all ones that have no cluster in the file must not get a cluster."""
    built = small()
    plan = Live(built, "daily").put("daily", 0, 3)
    clusters = [built.offset("bitmap-data", 0, number) for number in (0, 3, 4, 7)]
    assert [[(write.offset, write.length) for write in plan.writes], plan.barriers] == [
        [(clusters[0], 4 * 512)],  # one behind the other
        1,
    ]
    assert clusters == [clusters[0] + 512 * number for number in range(4)]


def test_a_cluster_gets_its_place_when_a_bit_in_it_is_set() -> None:
    built = small()
    before = Audit(built.data)
    live = Live(built, "daily")
    plan = live.put("daily", 1 * 512 + 7, 9)
    data, tables = intervals_of(plan)
    execute(plan, live.storage, len(built.data))
    audit = Audit(built.data)
    word = audit.bitmaps[0].words[1]
    assert list(audit.bitmaps[0].words) == [
        word if number == 1 else old for number, old in enumerate(before.bitmaps[0].words)
    ]
    assert list(live["daily"].words) == list(audit.bitmaps[0].words)
    assert before.refcounts[word // 512] == 0
    assert audit.refcounts - before.refcounts == {word // 512: 1}
    assert audit.miscounted == {}
    assert any(start <= word < start + length for start, length in data)
    assert built.data[word : word + 512] == bytes(7) + b"\x09" + bytes(504)
    assert tables == [(built.offset("bitmap-table", 0), 8 * len(TABLE))]


def test_a_cluster_is_given_away_once() -> None:
    """No two bitmaps may get the same cluster, even from different plans."""
    table = [ZEROES] * len(TABLE)
    built = build_image(Stored(b"a", table, 9), Stored(b"b", table, 9), size=SIZE)
    live = Live(built, "a", "b")
    for number in range(len(table)):
        for name in "ab":
            execute(live.put(name, number * 512, 1), live.storage, 0)
    audit = Audit(built.data)
    offsets = [offset for bitmap in audit.bitmaps for offset in bitmap.data_offsets]
    assert len({*offsets}) == len(offsets) == 2 * len(table)
    assert audit.miscounted == {}


def test_a_new_cluster_has_what_is_in_memory_all_of_it() -> None:
    """The first write of a new cluster must cover the whole cluster, not only the piece.

    Otherwise the rest of the cluster would show the old content of a free cluster.
    """
    built = build_image(Stored(b"big", [ZEROES], 9), cluster_bits=16, size=1 << 28)
    built.data.extend(b"\xaa" * (1 << 16))
    live = Live(built, "big")
    live["big"].bits.octets[3 * PIECE_BYTES] = 0x80  # marked, but its piece is not to be stored now
    execute(live.put("big", 0, 1), live.storage, 0)
    (word,) = Audit(built.data).bitmaps[0].words
    assert built.data[word : word + (1 << 16)] == live["big"].bits.octets


def test_all_ones_stay_an_entry() -> None:
    live = Live(small(), "daily")
    plan = live.put("daily", 2 * 512, 0xFF)
    assert live["daily"].words[2] == ONES
    assert all(isinstance(step, Write) for step in plan.steps[:-1])
    assert plan.barriers == 1


def test_what_became_all_ones_keeps_its_cluster() -> None:
    """A bitmap must keep all its clusters as long as in_use is set."""
    built = small()
    live = Live(built, "daily")
    word = live["daily"].words[0]
    live["daily"].bits.octets[:512] = b"\xff" * 512
    execute(live.put("daily", 0, 0xFF), live.storage, 0)
    assert live["daily"].words[0] == word
    assert built.data[word : word + 512] == b"\xff" * 512


def test_writes_come_in_the_order_of_the_file() -> None:
    """Writes must be in ascending order of their offsets, so that a disk writes them in one go."""
    built = build_image(
        Stored(b"late", [b"\x01"] * 4, 9), Stored(b"early", [b"\x01"] * 4, 9), size=4 * COVERED
    )
    live = Live(built, "early", "late")
    changes = [(live[name], {0: bytes(live[name].bits.octets)}) for name in ("early", "late")]
    plan = Plan(tuple(live.store.store(changes)))
    offsets = [write.offset for write in plan.writes]
    assert offsets == sorted(offsets)


def test_where_nothing_can_grow_it_is_known_at_the_beginning() -> None:
    """If there is no room for the bitmaps, beginning must fail, not the stop of the machine."""
    built = small()
    del built.data[-512 * 10 :]

    class Full(RecordingStorage):
        def capacity(self) -> int:
            return len(self.data)

    before = bytes(built.data)
    storage = Full(built.data)
    store = TrackedStore(storage)
    with pytest.raises(qcow2bm.StorageError, match="No space left"):
        store.begin([built.entries[0]], [])
    assert storage.steps == []
    assert built.data == before
