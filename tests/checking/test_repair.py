"""Repairing: sound bitmaps stay, what can be proved is repaired, and an undo restores all."""

from __future__ import annotations

import struct
from functools import cache

import pytest
from support.broken_images import broken_images
from support.crash_states import intervals
from support.images import Stored, build_image, extension
from support.problem_images import HUGE, IDS, broken
from support.repair_cases import CRASHES, BitmapFacts, bitmap_facts
from support.spec_image import (
    DATA,
    EXTENSION,
    L1,
    L2,
    REFCOUNT_TABLE,
    TABLES,
    Patch,
    image,
    in_entry,
    in_header,
    in_payload,
    patched,
    with_disk,
    word,
)
from support.specreader import page

import qcow2bm
from qcow2bm.api import repair as api
from qcow2bm.checking.findings import Findings
from qcow2bm.checking.repair import REPAIRS, Repair, plan_repair
from qcow2bm.checking.undo import plan_undo, undo_of
from qcow2bm.clusters.plan import Plan, Write
from qcow2bm.errors import FormatError, Qcow2BmError, StateError, StorageError
from qcow2bm.format.undo_file import UndoLog, build_undo, parse_undo
from qcow2bm.problem_kinds import KINDS
from qcow2bm.storage.memory import MemoryStorage

BROKEN = dict(broken_images())
each_id = pytest.mark.parametrize(
    "id", [pytest.param(id, marks=pytest.mark.deep) if id == HUGE else id for id in IDS]
)
NAMES = "daily", "weekly", "crashed"
FOREIGN = ("header", "snapshot table", "header extension")


def after(data: bytes, plan: Plan, size: int | None = None) -> bytearray:
    storage = MemoryStorage(bytearray(data))
    for step in plan.steps:
        if isinstance(step, Write):
            storage.write(step.offset, step.parts)
    if size is not None:
        storage.truncate(size)
    content = bytearray(storage.size())
    storage.read_into(0, memoryview(content))
    return content


def planned(data: bytes, *, lossless: bool = False) -> Repair:
    return plan_repair(MemoryStorage(data), lossless=lossless)


@cache
def sound() -> dict[str, BitmapFacts]:
    return bitmap_facts(image())


def require_repaired(data: bytes) -> Repair:
    """Repairs an image, asserts what holds after every repair, and returns the repair."""
    done = planned(data)
    repaired = after(data, done.plan)
    with qcow2bm.open(bytes(repaired)) as opened:
        serious = [p for p in (*opened.problems, *opened.check().problems) if p.is_serious]
    left = [p for p in serious if p.severity != "leak"]
    assert [p.id for p in left] == [p.id for p in done.left]
    again = planned(bytes(repaired))
    # Clusters that leak because their bitmap was not known are freed by the next repair.
    assert {step.what for step in again.plan.steps} <= {"refcounts", "refcounts and tails"}
    if not again.leaked_clusters < done.leaked_clusters:
        assert again.plan.steps == ()
    before, now = bitmap_facts(data), bitmap_facts(repaired)
    lost = {name for name, _ in done.lost}
    renamed = dict(done.renamed)
    for name, bitmap in before.items():
        if bitmap.status == "valid" and name in NAMES and name not in lost and not done.left:
            assert now[renamed.get(name, name)] == bitmap
    # Nothing becomes valid that is not as it was stored when all was well.
    for name, bitmap in now.items():
        if bitmap.status == "valid" and name in NAMES and name not in renamed.values():
            assert bitmap.digest in {b.digest for b in (*before.values(), *sound().values())}
    undo = undo_of(MemoryStorage(data), done.plan)
    assert parse_undo(b"".join(build_undo(undo))) == undo
    back = plan_undo(MemoryStorage(bytes(repaired)), undo, is_asserted=True)
    assert after(bytes(repaired), back, undo.file_size) == data
    return done


@pytest.mark.spec("REPAIR-1")
@each_id
def test_every_problem_there_is(id: str) -> None:
    if id == "header.incompatible_features.unknown":
        with pytest.raises(qcow2bm.UnsupportedError):
            planned(broken(id))
        return
    done = require_repaired(broken(id))
    kind = KINDS[id]
    if kind.structure not in FOREIGN and id not in ("bitmap-table.entry.unaligned",):
        assert not done.left


@pytest.mark.spec("REPAIR-1", "REPAIR-2")
@pytest.mark.parametrize("what", BROKEN)
def test_broken_images(what: str) -> None:
    data = BROKEN[what]
    if what.startswith(("cut", "refcount")):  # there may be nothing to put a directory in
        try:
            planned(data)
        except Qcow2BmError:
            return
    done = require_repaired(data)
    # A fault of one entry costs no other bitmap.
    if what.startswith(("entry", "table")) and " and " not in what and not done.left:
        index = int(what.split()[1][0])
        shared = {name for name, reason in done.lost if "also used by" in reason}
        repaired = bitmap_facts(after(data, done.plan))
        for number, name in enumerate(NAMES):
            if number != index and name not in shared and name not in dict(done.renamed):
                assert repaired.get(name) == sound()[name], (name, done.lost)


def test_there_are_enough_broken_images() -> None:
    print(len(BROKEN), "broken images")
    assert len(BROKEN) >= 300


@pytest.mark.spec("REPAIR-1")
@pytest.mark.parametrize("order", range(7))
def test_of_a_sound_image_no_byte_is_changed(order: int) -> None:
    stored = [Stored(b"a", (b"\x05",)), Stored(b"b", flags=0), Stored(b"c", flags=3)]
    data = build_image(*stored, refcount_order=order).data
    for lossless in (False, True):
        done = planned(bytes(data), lossless=lossless)
        assert (done.plan, done.lost, done.left) == (Plan(), (), ())


@pytest.mark.spec("REPAIR-3")
@each_id
def test_lossless_loses_nothing(id: str) -> None:
    if id == "header.incompatible_features.unknown":
        return
    data = broken(id)
    done = planned(data, lossless=True)
    assert done.lost == ()
    repaired = bitmap_facts(after(data, done.plan))
    for name, bitmap in bitmap_facts(data).items():
        assert dict(done.renamed).get(name, name) in repaired
        if bitmap.status == "valid":
            assert repaired[dict(done.renamed).get(name, name)] == bitmap
    # Nothing is given back of which it is not known whether it is a bitmap's.
    if done.left:
        assert not any(step.what == "refcounts" for step in done.plan.steps)
    full = planned(data)
    assert bool(full.lost) == bool(done.left) or full.left


@pytest.mark.spec("REPAIR-4")
def test_a_stale_extension_and_what_it_names_stay() -> None:
    data = bytearray(broken("bitmaps-extension.autoclear.off"))
    done = planned(bytes(data))
    assert done.plan.steps == ()
    assert done.leaked_clusters == 6
    data[0x400 + 2 * 20 : 0x400 + 2 * 20 + 2] = b"\0\1"  # a leak that it does not name
    data.extend(bytes(21 * 512 - len(data)))
    done = planned(bytes(data))
    assert done.leaked_clusters == 6
    with qcow2bm.open(bytes(after(bytes(data), done.plan))) as opened:
        assert opened.check().leaked_clusters == 6
        assert len(opened.directory) == 3


@pytest.mark.spec("REPAIR-4")
@pytest.mark.parametrize("lossless", [False, True])
def test_a_guess_about_a_stale_directory_gives_nothing_back(lossless: bool) -> None:
    """The size leaves out the last entry: the clusters of that bitmap are its last trace."""
    data = bytearray(broken("bitmaps-extension.autoclear.off"))
    with qcow2bm.open(bytes(data)) as opened:
        size = sum(entry.size for entry in opened.directory[:-1])
    data = bytearray(patched(bytes(data), *in_payload(bitmap_directory_size=size)))
    done = plan_repair(MemoryStorage(bytes(data)), lossless=lossless)
    assert done.plan.steps == ()
    assert done.repaired == ()


def assert_told_truly(data: bytes, lossless: bool) -> None:
    """Asserts that the problems and leaks of the image are those that the repair announced."""
    storage = MemoryStorage(bytes(data))
    try:
        done = plan_repair(storage, lossless=lossless)
    except (Qcow2BmError, StorageError):
        return
    found = Findings.load(MemoryStorage(bytes(after(data, done.plan))))
    assert set(done.left) == set(found.faults)
    assert done.leaked_clusters == found.check.leaked_clusters
    if not done.plan.steps:
        assert (done.repaired, done.lost, done.renamed) == ((), (), ())


@pytest.mark.spec("REPAIR-4")
@pytest.mark.parametrize("lossless", [False, True])
@each_id
def test_what_a_repair_says_is_what_it_does(id: str, lossless: bool) -> None:
    assert_told_truly(broken(id), lossless)


@pytest.mark.spec("REPAIR-4")
@pytest.mark.parametrize("lossless", [False, True])
def test_what_a_repair_says_of_an_entry_that_is_cut_off(lossless: bool) -> None:
    """The entries can be read in several ways, none of which a lossless repair makes true."""
    with qcow2bm.open(image()) as opened:
        size = sum(entry.size for entry in opened.directory)
    for less in (1, 8, 32):
        patches = in_payload(bitmap_directory_size=size - less)
        assert_told_truly(patched(image(), *patches), lossless)
    assert_told_truly(patched(image(), *in_payload(nb_bitmaps=2)), lossless)
    for index in range(3):
        for length in (200, 1000):
            cut = patched(image(), *in_entry(index, name_size=length))
            assert_told_truly(cut, lossless)
            in_doubt = patched(cut, *in_entry((index + 1) % 3, type=7))
            assert_told_truly(in_doubt, lossless)


@pytest.mark.deep
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_what_a_repair_says_of_every_broken_image(name: str, lossless: bool) -> None:
    assert_told_truly(bytes(BROKEN[name]), lossless)


@pytest.mark.spec("REPAIR-4", "REPAIR-9")
def test_a_stale_extension_goes_if_that_is_asked_for() -> None:
    data = broken("bitmaps-extension.autoclear.off")
    done = plan_repair(MemoryStorage(data), only=["stale"])
    removed = after(data, done.plan)
    assert done.leaked_clusters == 6
    with qcow2bm.open(bytes(removed)) as opened:
        assert opened.bitmaps_extension is None
        assert {problem.id for problem in opened.check().problems} == {"cluster.refcount.leak"}
    both = plan_repair(MemoryStorage(data), only=["stale", "refcounts"])
    assert (both.leaked_clusters, both.left) == (0, ())
    again = plan_repair(MemoryStorage(bytes(removed)))
    assert after(bytes(removed), again.plan) == after(data, both.plan)
    too_old = broken("bitmaps-extension.version.too-old")
    assert plan_repair(MemoryStorage(too_old), only=list(REPAIRS)).plan.steps == ()


@pytest.mark.spec("REPAIR-9")
@each_id
def test_each_repair_alone_does_what_check_says_it_does(id: str) -> None:
    if id == "header.incompatible_features.unknown":
        return
    data = broken(id)
    with qcow2bm.open(data) as opened:
        problems = *opened.problems, *opened.check().problems
    named = {found.kind.repair for found in problems}
    for repair in REPAIRS:
        done = plan_repair(MemoryStorage(data), only=[repair])
        if done.plan.steps:
            assert repair in named
    assert plan_repair(MemoryStorage(data), only=[]).plan.steps == ()


def test_the_repairs_that_are_named() -> None:
    from qcow2bm.cli.commands import root

    found = {row["repair"]: row["what"] for row in page("repair.md").tables[1].rows}
    assert found == REPAIRS
    (only,) = (option for option in root().of("repair").options if option.dest == "only")
    assert only.choices == tuple(REPAIRS)


def test_a_refcount_block_in_guest_data_is_not_written_to() -> None:
    """A refcount table entry leads to a cluster of the disk."""
    shared = REFCOUNT_TABLE + 8, word(DATA)
    data = with_disk(shared, *in_entry(0, flags=4))
    with pytest.raises(FormatError, match="something else uses as well"):
        planned(data)
    payload = with_disk(shared, (0x78, (2).to_bytes(4, "big")))
    done = planned(payload)
    assert not any(step.what == "refcounts" for step in done.plan.steps)


@pytest.mark.spec("REPAIR-2")
@pytest.mark.parametrize("is_size_wrong", [False, True])
def test_of_two_that_claim_one_table_neither_is_believed(is_size_wrong: bool) -> None:
    """If two entries claim one table, the repair must drop both, also if one has a wrong size.

    An entry with a wrong size can still be right about the place of the table.
    """
    stored = [Stored(name, (bytes([5 + n]),)) for n, name in enumerate((b"a", b"b", b"c"))]
    data = bytes(build_image(*stored).data)
    with qcow2bm.open(data) as opened:
        a, b, _ = opened.directory
    data = patched(data, (b.offset, a.bitmap_table_offset.to_bytes(8, "big")))
    if is_size_wrong:
        data = patched(data, (a.offset + 8, (2).to_bytes(4, "big")))
    done = planned(data)
    assert [name for name, _ in done.lost] == ["a", "b"]
    assert set(bitmap_facts(after(data, done.plan))) == {"c"}


@pytest.mark.spec("REPAIR-2")
@pytest.mark.parametrize("more", ["nothing", "flags", "length"])
def test_what_was_given_back_long_ago_is_not_believed_for_another_fault(more: str) -> None:
    """No cluster of bitmaps is counted, and others leak: of newer bitmaps, perhaps."""
    counts = [(0x400 + 2 * n, bytes(2)) for n in range(6, 12)]
    leaks = [(0x400 + 2 * n, b"\0\1") for n in range(12, 18)]
    faults: dict[str, list[Patch]] = {
        "nothing": [],
        "flags": in_entry(1, flags=8),
        "length": [(EXTENSION + 4, bytes([0, 0, 0, 16]))],
    }
    data = patched(image(), *counts, *leaks, *faults[more], (18 * 512 - 1, b"\0"))
    done = planned(data)
    assert "cluster.refcount.too-low" in {found.id for found in done.left}
    counts_now = after(data, done.plan)[0x400 + 2 * TABLES[0] // 512 :][:4]
    assert counts_now == bytes(4)  # of table and data of the first


def test_extra_data_are_not_taken_for_a_name() -> None:
    """Extra data must not be taken for a name, even if the directory has another fault as well."""
    built = build_image(
        Stored(b"a", (b"\5",), extra_data=bytes(range(1, 9))),
        Stored(b"b", (b"\6",), flags=3),
        Stored(b"c", (b"\7",)),
    )
    with qcow2bm.open(bytes(built.data)) as opened:
        size = opened.directory[1].offset_of("bitmap_table_size")
    for patches in ([], [(size, (2).to_bytes(4, "big"))]):
        data = patched(bytes(built.data), *patches)
        assert [name for name, _ in planned(data).lost][:1] == ["a"]


@pytest.mark.spec("REPAIR-5")
@pytest.mark.parametrize("what", ["L1 table", "L1 entry", "L2 entry", "compressed", "snapshots"])
def test_nothing_is_put_where_something_leads_that_was_cut_off(what: str) -> None:
    sound = with_disk(*in_entry(0, type=9))
    end = len(sound)
    patches: dict[str, list[Patch]] = {
        "L1 table": in_header(l1_table_offset=end),
        "L1 entry": [(L1 + 8, word(1 << 63 | end))],
        "L2 entry": [(L2 + 8, word(1 << 63 | end))],
        "compressed": [(L2 + 8, word(1 << 62 | 3 << 61 | end))],
        "snapshots": in_header(nb_snapshots=2, snapshots_offset=end),
    }
    data = patched(sound, *patches[what])
    done = planned(data)
    fresh = [s.offset for s in done.plan.steps if isinstance(s, Write) and s.is_fresh]
    assert fresh
    assert min(fresh) > end
    before = bitmap_facts(sound)
    repaired = bitmap_facts(after(data, done.plan))
    assert repaired["weekly"] == before["weekly"]
    assert planned(bytes(after(data, done.plan))).lost == ()


def test_a_stray_entry_does_not_make_the_file_endless() -> None:
    data = with_disk(*in_entry(0, type=9), (L2 + 8, word(1 << 63 | 1 << 45)))
    with pytest.raises(FormatError, match=r"L2 table: entry 1 at 0x3008 .* repair that first"):
        planned(data)


def test_tails_are_left_where_nobody_knows_whose_they_are() -> None:
    """The table leads to guest data, and the disk's own tables cannot be followed."""
    sound = with_disk((TABLES[0], word(DATA)), (DATA, b"\xff" * 512))
    broken_header = patched(sound, *in_header(l1_size=1 << 30))
    done = planned(broken_header)
    assert after(broken_header, done.plan)[DATA : DATA + 512] == b"\xff" * 512


def test_names_that_many_have_are_told_apart_at_once() -> None:
    stored = [Stored(b"same", (bytes([n % 255 + 1]),)) for n in range(600)]
    done = planned(bytes(build_image(*stored, cluster_bits=12).data))
    assert [new for _, new in done.renamed] == [f"same-{n}" for n in range(1, 601)]


def test_a_directory_that_gets_longer_than_the_file() -> None:
    name = b"n" * 200
    data = bytes(build_image(Stored(name, (b"\1",)), Stored(name, (b"\2",))).data)
    done = planned(data)
    assert len(done.renamed) == 2
    assert len(bitmap_facts(after(data, done.plan))) == 2


def test_an_extension_in_version_2_is_left_alone() -> None:
    data = bytearray(broken("bitmaps-extension.version.too-old"))
    place = bytes(data).index((0x23852875).to_bytes(4, "big"))
    data[place + 4 : place + 8] = (40).to_bytes(4, "big")
    data[place + 32 : place + 40] = b"\xff" * 8  # so that it is no shorter either
    assert planned(bytes(data)).plan.steps == ()


@pytest.mark.spec("REPAIR-8")
def test_of_a_directory_that_is_not_one_no_names_are_told() -> None:
    done = planned(patched(image(), *in_payload(bitmap_directory_offset=0x600)))
    assert [name for name, _ in done.lost] == [None]


@pytest.mark.spec("REPAIR-4")
def test_what_a_stale_entry_that_cannot_be_read_names_is_not_given_back() -> None:
    data = broken("bitmaps-extension.autoclear.off")
    data = patched(data, *in_entry(0, granularity_bits=200))
    assert planned(data).plan.steps == ()


@pytest.mark.spec("REPAIR-3")
def test_what_is_seen_only_once_the_length_is_right_is_no_reason_to_do_nothing() -> None:
    data = with_disk((TABLES[0], word(DATA)), (EXTENSION + 4, bytes([0, 0, 0, 16])))
    done = planned(data, lossless=True)
    assert done.plan.steps
    assert "bitmap-data.overlap" in {found.id for found in done.left}


@pytest.mark.spec("REPAIR-8", "REPAIR-4")
def test_stale_bitmaps_that_are_removed_are_named() -> None:
    done = plan_repair(
        MemoryStorage(broken("bitmaps-extension.autoclear.off")), only=["stale", "refcounts"]
    )
    assert [name for name, _ in done.lost] == list(NAMES)


@pytest.mark.spec("REPAIR-6")
@pytest.mark.parametrize("id", ["directory-entry.flags.reserved"])
@pytest.mark.parametrize("length", [368, 376])
def test_writes_that_overlap_are_undone(id: str, length: int) -> None:
    """The payload lies in two sectors: the header is written again in other pieces."""
    extra = extension(0x12345678, bytes(length))
    built = build_image(
        Stored(b"a", (b"\5",)), Stored(b"b", (b"\6",)), cluster_bits=12, extensions=[extra]
    )
    with qcow2bm.open(bytes(built.data)) as opened:
        place = opened.directory[0].offset_of("flags")
    data = patched(bytes(built.data), (place, (8).to_bytes(4, "big")))
    data = patched(data, *in_header(autoclear_features=1 | 1 << 40))
    done = planned(data)
    undo = undo_of(MemoryStorage(data), done.plan)
    repaired = bytes(after(data, done.plan))
    back = plan_undo(MemoryStorage(repaired), undo, is_asserted=True)
    undone = bytes(after(repaired, back, undo.file_size))
    assert undone == data
    assert plan_undo(MemoryStorage(undone), undo, is_asserted=True).steps == ()


def test_an_entry_that_swallows_the_next_one() -> None:
    """If a name would have NUL bytes inside, the repair must correct the length of the name."""
    data = patched(image(), *in_entry(0, name_size=5 + 32))
    done = planned(data)
    assert (done.lost, done.left) == ((), ())
    assert bitmap_facts(after(data, done.plan)) == sound()


def test_of_a_name_that_two_have_nobody_knows_whose_it_is() -> None:
    data = broken("directory-entry.name.duplicate")
    done = planned(data)
    assert done.renamed == (("daily", "daily-1"), ("daily", "daily-2"))
    assert "daily" not in bitmap_facts(after(data, done.plan))


def test_a_granularity_that_bits_speak_against_is_not_believed() -> None:
    size = 64 << 20
    octets = bytes([4] + 119 * [0] + [1])
    data = bytearray(build_image(Stored(b"b", (octets,)), size=size).data)
    with qcow2bm.open(bytes(data)) as opened:
        place = opened.directory[0].offset_of("granularity_bits")
    data[place] += 1
    done = planned(bytes(data))
    assert [name for name, _ in done.lost] == ["b"]


def test_a_size_that_reaches_over_an_old_entry_revives_nothing() -> None:
    stored = [Stored(b"a", (b"\x05",)), Stored(b"b", (b"\x06",)), Stored(b"c", (b"\x07",))]
    data = bytearray(build_image(*stored).data)
    with qcow2bm.open(data, "r+") as opened, opened.edit() as edit:
        edit.remove("c")
    with qcow2bm.open(bytes(data)) as opened:
        extension = opened.bitmaps_extension
        assert extension
        payload = next(o for o, e in opened.extensions if e.type == 0x23852875) + 8
        new = extension.bitmap_directory_offset
    entry = struct.pack(">QIIBBHI", new + 512 * 5, 1, 2, 1, 16, 1, 0) + b"c" + bytes(7)
    data[new + 64 : new + 96] = entry
    data[payload + 8 : payload + 16] = (96).to_bytes(8, "big")
    done = planned(bytes(data))
    assert set(bitmap_facts(after(bytes(data), done.plan))) == {"a", "b"}


# --- crashes ------------------------------------------------------------------------------------


def require_no_worse(data: bytes | bytearray, states: tuple[dict[str, BitmapFacts], ...]) -> None:
    """Asserts that an image has, after a crash, exactly the bitmaps of one of the given states."""
    found = bitmap_facts(data)
    assert found in states, found


@pytest.mark.spec("REPAIR-5")
@pytest.mark.parametrize("id", CRASHES)
@pytest.mark.parametrize("way", ["repair", "undo"])
def test_a_crash_leaves_the_image_as_before_or_repaired(id: str, way: str) -> None:
    import random

    data = broken(id)
    done = planned(data)
    repaired = bytes(after(data, done.plan))
    undo = undo_of(MemoryStorage(data), done.plan)
    states = bitmap_facts(data), bitmap_facts(repaired)
    start, plan = (
        (data, done.plan)
        if way == "repair"
        else (repaired, plan_undo(MemoryStorage(repaired), undo, is_asserted=True))
    )
    rng, count = random.Random(1), 0
    for interval in intervals(start, plan):
        for choice in interval.choices(rng):
            state = interval.image(choice)
            require_no_worse(state, states)
            count += 1
            if way == "undo":  # which can be done again
                back = plan_undo(MemoryStorage(bytes(state)), undo, is_asserted=True)
                assert after(bytes(state), back, undo.file_size) == data
            elif count % 7 == 0:  # and a repair, too
                again = planned(bytes(state))
                assert bitmap_facts(after(bytes(state), again.plan)) == states[1]
                assert not again.left
    assert count


@pytest.mark.spec("REPAIR-6")
@pytest.mark.parametrize("what", ["guest", "bitmap", "longer", "refcount", "header"])
def test_an_image_that_changed_since_is_not_undone(what: str) -> None:
    data = broken("directory-entry.type.unknown")
    done = planned(data)
    undo = undo_of(MemoryStorage(data), done.plan)
    repaired = after(data, done.plan)
    if what == "guest":
        repaired[0x600:0x608] = (1 << 63 | 0x3000).to_bytes(8, "big")  # an L2 table
    elif what == "bitmap":
        with qcow2bm.open(repaired, "r+") as opened, opened.edit() as edit:
            edit.add("new")
    elif what == "longer":
        repaired += bytes(512)
    elif what == "refcount":
        repaired[0x400 + 2 * 30] ^= 1
    else:
        repaired[0x58] ^= 0x40
    with pytest.raises(StateError, match="as the repair left it"):
        plan_undo(MemoryStorage(bytes(repaired)), undo, is_asserted=True)


def test_the_way_back_is_kept_before_anything_is_written() -> None:
    data = bytearray(broken("directory-entry.type.unknown"))
    before = bytes(data)

    def fail(undo: UndoLog) -> object:
        raise StorageError("undo", 0, 0, "No space left on device")

    with pytest.raises(StorageError):
        api.repair(data, fail)  # type: ignore[arg-type]
    assert data == before
    kept: list[UndoLog] = []

    def keep(undo: UndoLog) -> object:
        assert data == before
        kept.append(undo)
        return lambda mtime: None

    assert api.repair(data, keep).plan.steps  # type: ignore[arg-type]
    assert data != before
    assert api.undo(data, kept[0], is_asserted=True)
    assert data == before
    assert not api.undo(data, kept[0])


@pytest.mark.spec("REPAIR-6")
def test_an_undo_file_that_is_damaged_is_refused() -> None:
    data = broken("directory-entry.type.unknown")
    undo = b"".join(build_undo(undo_of(MemoryStorage(data), planned(data).plan)))
    for length in range(0, len(undo), 7):
        with pytest.raises(FormatError):
            parse_undo(undo[:length])
    damaged = bytearray(undo)
    for place in range(0, len(undo), 11):
        damaged[place] ^= 1
        with pytest.raises(Qcow2BmError):
            parse_undo(bytes(damaged))
        damaged[place] ^= 1
