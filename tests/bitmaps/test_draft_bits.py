"""Every operation of an edit changes the bits as the same operation on sets of granules does."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audit import Audit
from support.images import ONES, ZEROES, Built, Stored, Word, build_image
from support.model import Bitmaps, Model
from support.plans import edit, opened, plan_of

import qcow2bm
from qcow2bm.bitmaps.draft_bits import DraftBits, PackedSource
from qcow2bm.bits.operations import OPS
from qcow2bm.errors import LimitError

CLUSTER = 512
PER_CLUSTER = 8 * CLUSTER

PATTERNS = (b"\x01", b"\x5a" * CLUSTER, b"\0" * 300 + b"\xff" * 212, b"\x80" * 2)


def table_of(choice: list[int], bits: int) -> list[Word]:
    """A table as this library stores it: 0 and 1 for what is all the same, else a pattern."""
    table: list[Word] = []
    for number in range(-(-bits // PER_CLUSTER)):
        kind = choice[number % len(choice)]
        left = bits - number * PER_CLUSTER
        if kind > 1 or (kind == 1 and left < PER_CLUSTER):
            mask = (1 << min(left, PER_CLUSTER)) - 1
            pattern = PATTERNS[kind - 2].ljust(CLUSTER, b"\0") if kind > 1 else b"\xff" * CLUSTER
            content = int.from_bytes(pattern, "little") & mask
            table.append(content.to_bytes(CLUSTER, "little") if content else ZEROES)
        else:
            table.append(kind)
    return table


class Case(NamedTuple):
    """A disk with two bitmaps of any granularities."""

    size: int
    granularity_bits: tuple[int, int]
    tables: tuple[list[Word], list[Word]]

    def build(self) -> Built:
        stored = zip((b"daily", b"other"), self.tables, self.granularity_bits, strict=True)
        return build_image(*(Stored(*one) for one in stored), size=self.size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    first = draw(st.integers(9, 16))
    other = draw(st.integers(max(9, first - 7), min(first + 7, 31)))
    finer = min(first, other)
    edge = draw(st.sampled_from((8, 64, PER_CLUSTER, 2 * PER_CLUSTER)))
    bits = max(1, edge + draw(st.integers(-9, 9) | st.integers(-edge, PER_CLUSTER)))
    sectors = draw(st.integers(0, (1 << finer - 9) - 1))
    size = (bits << finer) - 512 * sectors
    choice = st.lists(st.integers(0, 1 + len(PATTERNS)), min_size=1, max_size=4)
    tables = [table_of(draw(choice), -(-size >> bits_)) for bits_ in (first, other)]
    return Case(size, (first, other), (tables[0], tables[1]))


Step = tuple[str, tuple[Any, ...]]


@st.composite
def steps(draw: st.DrawFn, size: int) -> list[Step]:
    start = st.integers(0, size) | st.sampled_from((0, size // 2, size))
    ranges = start.flatmap(
        lambda first: st.tuples(
            st.just(first),
            st.integers(0, size - first) | st.sampled_from((0, min(1, size - first), size - first)),
        )
    )
    many = st.lists(ranges, max_size=5) | st.integers(1, 200).map(
        lambda n: [(k * size // n, size // (3 * n)) for k in range(n)]
    )
    target = st.sampled_from(("daily", "other"))
    step = st.one_of(
        st.tuples(st.sampled_from(("set", "reset")), st.tuples(target, ranges).map(_flat)),
        st.tuples(st.sampled_from(("set_many", "reset_many")), st.tuples(target, many)),
        st.tuples(st.sampled_from(("invert", "clear")), st.tuples(target)),
        st.tuples(st.just("merge"), st.tuples(target, target, st.sampled_from(OPS))),
    )
    return draw(st.lists(step, min_size=1, max_size=5))


def _flat(pair: tuple[str, tuple[int, int]]) -> tuple[str, int, int]:
    return pair[0], *pair[1]


def compare(data: bytearray, expected: Bitmaps) -> None:
    """The bits as they stand in the image, and as the library reads them again."""
    audit = Audit(data)
    assert {b.name.decode(): audit.dirty(b) for b in audit.bitmaps} == {
        name: bitmap.numbers for name, bitmap in expected.by_name.items()
    }
    with qcow2bm.open(data, strict=True) as image:
        for name, bitmap in expected.by_name.items():
            assert image.bitmaps[name].packed().tobytes() == bitmap.packed


@pytest.mark.spec("EDIT-4")
@pytest.mark.spec("EDIT-11")
@pytest.mark.spec("EDIT-13")
@given(st.data())
@settings(max_examples=80)
def test_every_operation_does_what_it_does_to_sets(data: st.DataObject) -> None:
    case = data.draw(cases())
    image = case.build()
    expected = Bitmaps.of_image(image.data)
    listed = data.draw(steps(case.size))

    def work(edit: qcow2bm.Edit) -> None:
        for operation, arguments in listed:
            getattr(edit, operation)(*arguments)

    before = Audit(image.data)
    plan, audit = edit(image.data, work)
    for operation, arguments in listed:
        getattr(expected, operation)(*arguments)
    compare(image.data, expected)
    audit.check()
    # What is as it was is where it was, and takes no writes.
    changed = [
        old.name
        for old, new in zip(before.bitmaps, audit.bitmaps, strict=True)
        if before.dirty(old) != audit.dirty(new)
    ]
    assert bool(plan.steps) == bool(changed)
    for old, new in zip(before.bitmaps, audit.bitmaps, strict=True):
        assert (old == new) == (old.name not in changed)


@pytest.mark.deep
@given(st.data())
@settings(max_examples=4000)
def test_every_operation_at_length(data: st.DataObject) -> None:
    test_every_operation_does_what_it_does_to_sets.hypothesis.inner_test(data)


@given(cases(), st.integers(9, 20), st.booleans())
@settings(max_examples=30)
def test_a_copy_is_the_same_at_its_granularity(case: Case, bits: int, given_: bool) -> None:
    image = case.build()
    source = Bitmaps.of_image(image.data)["daily"]
    granularity = 1 << bits if given_ else None
    _, audit = edit(image.data, lambda edit: edit.copy("daily", "twin", granularity))
    audit.check()
    twin = source.at(granularity or source.granularity)
    assert 1 << audit.bitmaps[2].granularity_bits == twin.granularity
    assert audit.dirty(audit.bitmaps[2]) == twin.numbers
    assert audit.bitmaps[2].flags == audit.bitmaps[0].flags


@given(cases(), st.sampled_from(OPS))
@settings(max_examples=30)
def test_a_bitmap_of_another_image_is_as_good(case: Case, op: Any) -> None:
    image, other = case.build(), case.build()
    expected = Bitmaps.of_image(image.data)
    edit(other.data, lambda edit: edit.invert("other"))
    with qcow2bm.open(bytes(other.data)) as source:
        _, audit = edit(image.data, lambda edit: edit.merge("daily", source.bitmaps["other"], op))
    audit.check()
    inverted = copy.copy(expected["other"])
    inverted.invert()
    expected["daily"].merge(inverted, op)
    compare(image.data, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("table", [[b"\x5a" * CLUSTER, ONES, b"\x01"], [ZEROES, ONES, ZEROES]])
def test_merged_with_itself(op: Any, table: list[Word]) -> None:
    size = 3 * PER_CLUSTER << 16
    image = build_image(Stored(b"daily", table), size=size)
    before = Audit(image.data).dirty(Audit(image.data).bitmaps[0])
    plan, audit = edit(image.data, lambda edit: edit.merge("daily", "daily", op))
    audit.check()
    kept = op in ("or", "and")
    assert audit.dirty(audit.bitmaps[0]) == (before if kept else set())
    assert (plan.steps == ()) == kept


# --- only what changes ------------------------------------------------------------------------


def draft_of(image: Built, granularity_bits: int, table: list[Word]) -> DraftBits:
    words = array("Q", Audit(image.data).bitmaps[0].words)
    assert len(words) == len(table)
    return DraftBits(opened(image.data), 1 << granularity_bits, words)


def in_memory(bits: DraftBits) -> set[int]:
    octets = bits.octets(0, -(-bits.bits // 8))
    return set(np.flatnonzero(np.unpackbits(octets, bitorder="little")).tolist())


SIZES = (3 * PER_CLUSTER, 3 * PER_CLUSTER - 1, 2 * PER_CLUSTER + 1, 2 * PER_CLUSTER + 8 * 37 + 3)
STRAY: list[list[Word]] = [
    [ZEROES, ONES, ONES],
    [ZEROES, ONES, b"\xff" * CLUSTER],
    [b"\0" * CLUSTER, b"\xff" * CLUSTER, b"\x80" * CLUSTER],
]


def uses(bits: int) -> Iterator[tuple[str, Any]]:
    yield "fill", lambda draft: draft.fill(0, bits, is_set=True)
    yield "fill part", lambda draft: draft.fill(5, bits, is_set=True)
    yield "last bit", lambda draft: draft.fill(bits - 1, bits, is_set=False)
    yield "invert", lambda draft: draft.invert()
    yield "or itself", lambda draft: draft.combine("or", draft)
    yield "xor itself", lambda draft: draft.combine("xor", draft)
    many = np.array([[n, n + 2] for n in range(0, bits - 2, 50)], np.int64)
    yield "many", lambda draft: draft.fill_many(many, is_set=True)


@pytest.mark.parametrize("bits", SIZES)
@pytest.mark.parametrize("table", STRAY)
def test_bits_past_the_disk_never_get_into_memory(bits: int, table: list[Word]) -> None:
    """Other programs leave them there, QEMU for one (INV-TAIL)."""
    image = build_image(Stored(b"daily", table), size=bits << 16)
    audit = Audit(image.data)
    stored = {n for n in audit.dirty(audit.bitmaps[0]) if n < bits}
    model = Model.of_numbers(stored, 1 << 16, bits << 16)
    for name, use in uses(bits):
        draft = draft_of(image, 16, table)
        assert in_memory(draft) == stored
        use(draft)
        found = in_memory(draft)
        assert max(found, default=0) < bits, name
        for number, content in draft.changed.items():
            left = min(bits - number * PER_CLUSTER, PER_CLUSTER)
            if content == ONES:
                assert left == PER_CLUSTER, name
            elif not isinstance(content, int):
                value = int.from_bytes(content, "little")
                assert 0 < value < (1 << left), name
                assert value != (1 << PER_CLUSTER) - 1, name
    model.invert()
    draft = draft_of(image, 16, table)
    draft.invert()
    assert in_memory(draft) == model.numbers


@pytest.mark.parametrize("bits", SIZES)
@pytest.mark.parametrize("table", STRAY)
def test_bits_past_the_disk_that_others_left(bits: int, table: list[Word]) -> None:
    """A cluster that is written has none any more, and no other bitmap ever gets them."""
    image = build_image(
        Stored(b"daily", table), Stored(b"other", granularity_bits=12), size=bits << 16
    )
    expected = Bitmaps.of_image(image.data)

    def work(edit: qcow2bm.Edit | Bitmaps) -> None:
        edit.copy("daily", "twin")
        edit.copy("daily", "finer", 1 << 14)
        edit.copy("daily", "coarser", 1 << 20)
        edit.merge("other", "daily", "xor")
        edit.invert("daily")

    _, audit = edit(image.data, work)
    audit.check()
    work(expected)
    compare(image.data, expected)


@pytest.mark.parametrize("bits", SIZES)
def test_what_is_as_stored_is_not_changed(bits: int) -> None:
    table = table_of([2, 1, 3], bits)
    image = build_image(Stored(b"daily", table), size=bits << 16)
    draft = draft_of(image, 16, table)
    for _ in range(2):
        draft.fill(0, bits, is_set=True)
        draft.fill(0, bits, is_set=False)
        assert draft.changed.keys() <= {0, 1, 2}
    draft = draft_of(image, 16, table)
    draft.fill(100, 200, is_set=True)
    assert set(draft.changed) == {0}
    draft.fill(100, 200, is_set=False)
    assert draft.changed == {}
    draft.invert()
    assert set(draft.changed) == {0, 1, 2}
    draft.invert()
    assert draft.changed == {}
    draft.fill(0, PER_CLUSTER, is_set=True)
    assert draft.changed == {0: ONES}
    draft.fill(0, PER_CLUSTER, is_set=False)
    assert draft.changed == {0: ZEROES}


def test_sources_say_what_they_are_without_being_read() -> None:
    table: list[Word] = [ZEROES, ZEROES, ONES, ONES, b"\x01"]
    bits = len(table) * PER_CLUSTER
    image = build_image(Stored(b"daily", table), size=bits << 16)
    draft = draft_of(image, 16, table)
    assert draft.constant(0, 2 * CLUSTER) == ZEROES
    assert draft.constant(2 * CLUSTER + 7, CLUSTER) == ONES
    assert draft.constant(CLUSTER, 2 * CLUSTER) is None
    assert draft.constant(4 * CLUSTER, 1) is None
    assert draft.constant(10 * CLUSTER, CLUSTER) == ZEROES  # past the disk
    assert len(draft.octets(4 * CLUSTER, 3 * CLUSTER)) == 3 * CLUSTER
    packed = PackedSource(draft.octets(0, 5 * CLUSTER), 1 << 16, bits << 16)
    assert packed.constant(0, 5 * CLUSTER) is None
    assert packed.octets(4 * CLUSTER, 2 * CLUSTER).tobytes() == b"\1".ljust(2 * CLUSTER, b"\0")
    assert packed.bits == draft.bits


@pytest.mark.spec("EDIT-14")
def test_granularities_can_be_as_far_apart_as_qemu_s() -> None:
    image = build_image(
        Stored(b"fine", [b"\x01"], 9), Stored(b"coarse", [ZEROES], 31), size=PER_CLUSTER << 9
    )
    _, audit = edit(image.data, lambda edit: edit.merge("coarse", "fine"))
    assert audit.dirty(audit.bitmaps[1]) == {0}
    _, audit = edit(image.data, lambda edit: edit.merge("fine", "coarse"))
    assert audit.dirty(audit.bitmaps[0]) == set(range(PER_CLUSTER))
    # The specification allows more, and such an image can be read.
    beyond = build_image(
        Stored(b"fine", granularity_bits=9), Stored(b"coarse", granularity_bits=32), size=1 << 20
    )
    with qcow2bm.open(beyond.data) as other, pytest.raises(LimitError, match="granularities"):
        plan_of(
            build_image(Stored(b"fine", granularity_bits=9), size=1 << 20).data,
            lambda edit: edit.merge("fine", other.bitmaps["coarse"]),
        )


# --- fit --------------------------------------------------------------------------------------


@pytest.mark.spec("EDIT-12")
@pytest.mark.parametrize("bits", SIZES)
@pytest.mark.parametrize("stored", [1, 2, 4, 7])
@pytest.mark.parametrize("choice", [[2, 1, 3], [0], [1], [3, 0]])
def test_a_table_is_made_to_fit(bits: int, stored: int, choice: list[int]) -> None:
    table = table_of(choice, stored * PER_CLUSTER)
    image = build_image(Stored(b"daily", table), Stored(b"other"), size=bits << 16)
    full = {
        number * PER_CLUSTER + n
        for number, word in enumerate(table)
        for n in range(PER_CLUSTER)
        if (int.from_bytes(word, "little") >> n & 1 if isinstance(word, bytes) else word)
    }
    expected = {n for n in full if n < bits}
    if stored < 3:  # where in the last cluster the disk ended is not known
        expected |= set(range((stored - 1) * PER_CLUSTER, bits))

    with qcow2bm.open(image.data, "r+") as opened_:
        with pytest.raises(qcow2bm.BitmapBrokenError):
            opened_.bitmaps["daily"].count()
        with opened_.edit() as edit:
            edit.fit("daily")
        assert opened_.bitmaps["daily"].status == "valid"
        assert opened_.problems == ()
    audit = Audit(image.data)
    assert audit.dirty(audit.bitmaps[0]) == expected
    audit.check()


@pytest.mark.spec("EDIT-4")
@pytest.mark.parametrize("bits", SIZES)
@pytest.mark.parametrize("table", STRAY)
@pytest.mark.parametrize("use", ["set", "fit"])
def test_a_table_that_is_written_has_no_bits_past_the_disk(
    bits: int, table: list[Word], use: str
) -> None:
    image = build_image(Stored(b"daily", table), size=bits << 16)
    (expected,) = Bitmaps.of_image(image.data).by_name.values()
    is_stray = len(Audit(image.data).dirty(Audit(image.data).bitmaps[0])) > len(expected.numbers)
    if use == "set":
        expected.set(5 << 16, 1)
        _, audit = edit(image.data, lambda edit: edit.set("daily", 5 << 16, 1))
    else:
        plan, audit = edit(image.data, lambda edit: edit.fit("daily"))
        assert bool(plan.steps) == is_stray
    assert audit.dirty(audit.bitmaps[0]) == expected.numbers


@pytest.mark.parametrize("bits", SIZES)
def test_what_fits_is_left_alone(bits: int) -> None:
    image = build_image(Stored(b"daily", table_of([2, 1, 3], bits)), size=bits << 16)
    assert plan_of(image.data, lambda edit: edit.fit("daily")).steps == ()


def test_a_fitted_bitmap_can_be_worked_with_in_the_same_edit() -> None:
    image = build_image(Stored(b"daily", [ONES]), size=2 * PER_CLUSTER << 16)

    def work(edit: qcow2bm.Edit) -> None:
        with pytest.raises(qcow2bm.BitmapBrokenError, match='fit bitmap "daily" first'):
            edit.set("daily", 0, 1)
        edit.rename("daily", "weekly")
        edit.disable("weekly")
        edit.fit("weekly")
        edit.fit("weekly")
        edit.reset("weekly", 0, 1 << 16)

    _, audit = edit(image.data, work)
    (bitmap,) = audit.bitmaps
    assert (bitmap.name, bitmap.flags) == (b"weekly", 0)
    assert audit.dirty(bitmap) == set(range(1, 2 * PER_CLUSTER))
