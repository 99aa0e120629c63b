"""Changes of the header area, in every layout a header can have.

The tests here examine the image after all steps. The crash tests show that the image is valid after
any part of the steps.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import pytest
from support.audit import Audit
from support.images import Built, Stored, build_image, extension
from support.plans import after, opened

from qcow2bm.clusters.header_draft import HeaderDraft, Switch
from qcow2bm.clusters.plan import Barrier, Plan, Step, Write, is_in_one_sector
from qcow2bm.errors import LimitError, UnsupportedError
from qcow2bm.format.extensions import BACKING_FORMAT, FEATURE_NAMES, HeaderExtension

PAYLOAD = struct.pack(">IIQQ", 7, 0, 321, 0x123400)
UNKNOWN = 0x12345678


class Layout(NamedTuple):
    """The content of the header.

    ``filler`` is the length of the data of an unknown extension before the bitmaps extension, or
    None without such an extension. ``behind`` is the same for an extension behind it.
    """

    cluster_bits: int = 12
    filler: int | None = None
    behind: int | None = None
    backing_name: bytes = b""
    additional_fields: bytes = b""

    def build(self, *bitmaps: Stored) -> Built:
        extensions = [extension(BACKING_FORMAT, b"raw")] if self.backing_name else []
        if self.filler is not None:
            extensions.append(extension(UNKNOWN, b"\xa5" * self.filler))
        behind = [] if self.behind is None else [extension(UNKNOWN + 1, b"\x5a" * self.behind)]
        return build_image(
            *bitmaps,
            cluster_bits=self.cluster_bits,
            extensions=extensions,
            extensions_behind=behind,
            backing_name=self.backing_name,
            additional_fields=self.additional_fields,
            header={"compatible_features": 1 << 63},
        )


NAMES = (b"", b"base.img", b"/images/" + b"n" * 300)
FILLERS = (None, 3, 200, *range(320, 392, 8), 1000)
LAYOUTS = [
    Layout(12, filler, behind, name, fields)
    for filler, (behind, name, fields) in product(
        FILLERS,
        [
            *((None, name, b"") for name in NAMES),
            *((5, name, b"") for name in NAMES),
            (None, b"base.img", b"unknown!" * 3),
            (300, b"base.img", b"unknown!" * 50),
        ],
    )
]
SMALL = [
    Layout(9, filler, None, name)
    for filler, name in product((None, *range(0, 100, 8), *range(280, 360, 4)), NAMES[:2])
]


def id_of(layout: Layout) -> str:
    return "-".join(str(len(v) if isinstance(v, bytes) else v) for v in layout)


def barriers(steps: Iterable[Step]) -> int:
    return sum(isinstance(step, Barrier) for step in steps)


def steps_of(switch: Switch) -> list[Step]:
    """The steps of a commit that changes nothing but the header."""
    closed = [Barrier("preparations")] if switch.before else []
    before = [*switch.before, *closed, *switch.steps]
    after = [*switch.after, Barrier("rest")] if switch.after else []
    return [*before, switch.commit, Barrier("new state"), *after]


def done(image: Built, switch: Switch, prepared: Iterable[Step] = ()) -> Audit:
    """Executes the change, and checks what must hold after any change."""
    write = switch.commit
    assert is_in_one_sector(write.offset, write.length)
    steps = [*prepared, *steps_of(switch)]
    assert all(w.offset + w.length <= image.cluster_size for w in Plan(tuple(steps)).writes)
    audit = Audit(after(image.data, steps))
    assert audit.unknown == Audit(image.data).unknown  # INV-UNKNOWN
    assert audit.data[image.cluster_size :] == image.data[image.cluster_size :]
    return audit


def draft_of(image: Built) -> HeaderDraft:
    return HeaderDraft(opened(image.data))


def payload_offset(audit: Audit) -> int:
    (place,) = (place for place, kind, _ in audit.extensions if kind == 0x23852875)
    return place + 8


# --- the first bitmap -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=id_of)
def test_an_extension_is_inserted_behind_the_others(layout: Layout) -> None:
    image = layout.build()
    switch = draft_of(image).insert(PAYLOAD)
    audit = done(image, switch)
    assert audit.extensions[-1][1:] == (0x23852875, PAYLOAD)
    assert audit.autoclear == 1
    assert barriers(steps_of(switch)) <= 5


@pytest.mark.parametrize("layout", SMALL, ids=id_of)
def test_in_the_smallest_cluster_there_is_room_or_a_clear_error(layout: Layout) -> None:
    try:
        image = layout.build()
    except ValueError:
        pytest.skip("does not fit into the cluster even without bitmaps")
    audit = Audit(image.data)
    needed = audit.end + 40 + audit.backing_size
    try:
        switch = draft_of(image).insert(PAYLOAD)
    except LimitError as error:
        failure = error
    else:
        assert needed <= 512
        assert barriers(steps_of(switch)) == 1
        assert done(image, switch).extensions[-1][1:] == (0x23852875, PAYLOAD)
        return
    assert needed > 512
    assert failure.limit == 512
    assert failure.value > 512


def test_an_insertion_that_moves_nothing_is_one_write() -> None:
    image = Layout().build()
    switch = draft_of(image).insert(PAYLOAD)
    assert (switch.before, switch.steps, switch.after) == ((), (), ())
    assert switch.commit.offset == 88


def test_a_backing_name_farther_back_is_not_moved() -> None:
    image = Layout(backing_name=b"base.img").build()
    name = image.offset("backing-name")
    image.data[400:408] = image.data[name : name + 8]
    image.data[name : name + 8] = bytes(8)
    image.plant(400, "header", 0, "backing_file_offset")
    switch = draft_of(image).insert(PAYLOAD)
    audit = done(image, switch)
    assert audit.backing_offset == 400
    assert barriers(steps_of(switch)) == 1


# --- other payloads ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=id_of)
def test_a_payload_is_replaced_in_one_sector(layout: Layout) -> None:
    image = layout.build(Stored())
    old = Audit(image.data)
    draft = draft_of(image)
    prepared = draft.straighten()
    switch = draft.replace(PAYLOAD)
    assert (switch.before, switch.steps, switch.after) == ((), (), ())
    straddles = not is_in_one_sector(payload_offset(old), 24)
    assert bool(prepared) == straddles
    audit = done(image, switch, prepared)
    place = payload_offset(audit)
    assert is_in_one_sector(place, 24)
    assert audit.data[place : place + 24] == PAYLOAD
    assert audit.autoclear == 1
    if not straddles:
        assert place == payload_offset(old)
        assert [e[:2] for e in audit.extensions] == [e[:2] for e in old.extensions]


def test_some_of_the_layouts_straddle_and_some_do_not() -> None:
    places = [payload_offset(Audit(layout.build(Stored()).data)) for layout in LAYOUTS]
    assert {is_in_one_sector(place, 24) for place in places} == {False, True}
    heads = {is_in_one_sector(place - 8, 8) for place in places}
    assert heads == {True}  # they begin at multiples of 8
    assert {(place - 8) // 512 for place in places} >= {0, 1}


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.filler in (None, 352, 360, 376)])
def test_straightening_alone_changes_only_the_order(layout: Layout) -> None:
    image = layout.build(Stored())
    old = Audit(image.data)
    prepared = draft_of(image).straighten()
    audit = Audit(after(image.data, prepared))
    assert audit.unknown == old.unknown
    assert (audit.payload, audit.autoclear) == (old.payload, old.autoclear)
    assert not prepared or isinstance(prepared[-1], Barrier)


def test_a_straddling_payload_in_a_full_cluster_cannot_be_straightened() -> None:
    filler = 512 - 112 - 8 - 8 - 8 - 8  # the payload begins 16 bytes before the second sector
    image = Layout(12, filler, 3000).build(Stored())
    assert not is_in_one_sector(payload_offset(Audit(image.data)), 24)
    with pytest.raises(LimitError) as raised:
        draft_of(image).straighten()
    assert raised.value.limit == image.cluster_size


@pytest.mark.parametrize("layout", LAYOUTS, ids=id_of)
def test_a_stale_extension_is_revived(layout: Layout) -> None:
    image = layout.build(Stored())
    image.plant(0, "header", 0, "autoclear_features")
    switch = draft_of(image).revive(PAYLOAD)
    audit = done(image, switch)
    assert audit.autoclear == 1
    place = payload_offset(audit)
    assert audit.data[place : place + 24] == PAYLOAD
    assert barriers(steps_of(switch)) == 2
    # Until the bit is set, no program uses the extension.
    assert Audit(after(image.data, switch.before)).autoclear == 0


# --- the last bitmap --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, *SMALL[:10]], ids=id_of)
def test_an_extension_is_removed_and_the_others_close_up(layout: Layout) -> None:
    try:
        image = layout.build(Stored())
    except ValueError:
        pytest.skip("does not fit into the cluster with bitmaps")
    switch = draft_of(image).remove()
    audit = done(image, switch)
    assert audit.payload is None
    assert audit.autoclear == 0
    assert audit.other_extensions == [e[1:] for e in audit.extensions]
    # The commit clears the bit; the bit is never set without the extension.
    is_moved = layout.behind is not None and layout.backing_name
    begins_behind = len(layout.additional_fields) >= 512 - 112
    assert barriers(steps_of(switch)) <= (7 if is_moved and begins_behind else 5)
    committed = Audit(after(image.data, [*switch.before, *switch.steps, switch.commit]))
    assert committed.autoclear == 0


@pytest.mark.parametrize("layout", LAYOUTS[::7], ids=id_of)
def test_inserting_and_removing_restores_the_header(layout: Layout) -> None:
    image = layout.build()
    once = after(image.data, steps_of(draft_of(image).insert(PAYLOAD)))
    twice = after(once, steps_of(HeaderDraft(opened(once)).remove()))
    audit, old = Audit(twice), Audit(image.data)
    assert audit.unknown == old.unknown
    assert [e[1:] for e in audit.extensions] == [e[1:] for e in old.extensions]
    thrice = after(twice, steps_of(HeaderDraft(opened(twice)).insert(PAYLOAD)))
    assert Audit(thrice).unknown == old.unknown


# --- the rest ---------------------------------------------------------------------------------


@pytest.mark.spec("INV-UNKNOWN")
@pytest.mark.parametrize(
    ("bits", "left"), [(0b101, 0b1), (1 << 63 | 0b11, 0b11), (1 << 2, 0), (0b11, None), (0, None)]
)
def test_unknown_autoclear_bits_go_first(bits: int, left: int | None) -> None:
    image = Layout().build(Stored())
    image.plant(bits, "header", 0, "autoclear_features")
    steps = draft_of(image).clear_unknown_autoclear()
    if left is None:
        assert steps == []
        return
    (write, barrier) = steps
    assert isinstance(write, Write)
    assert isinstance(barrier, Barrier)
    assert (write.offset, write.length) == (88, 8)
    assert int.from_bytes(after(image.data, steps)[88:96], "big") == left


def test_writes_of_other_plans_to_the_header_are_kept() -> None:
    image = Layout().build()
    draft = draft_of(image)
    foreign = Write(48, (struct.pack(">QI", 0x7000, 3),), "place of the refcount table")
    draft.apply(
        [
            foreign,
            Barrier("use of the larger refcount table"),
            Write(1 << 20, (b"elsewhere",), "data"),
        ]
    )
    switch = draft.insert(PAYLOAD)
    after_all = after(image.data, [foreign, *steps_of(switch)])
    assert after_all[48:60] == foreign.parts[0]


def test_without_an_end_marker_nothing_is_inserted() -> None:
    """Extensions may end at the backing name. An insertion there would need two sectors."""
    filler = 400
    image = Layout(12, filler, None, b"base.img").build()
    audit = Audit(image.data)
    image.data[audit.end : audit.end + 8] = b"base.img"
    image.plant(audit.end, "header", 0, "backing_file_offset")
    assert opened(image.data).area.end == b""
    with pytest.raises(UnsupportedError, match="have no end marker"):
        draft_of(image).insert(PAYLOAD)


def test_feature_names_survive_a_rearrangement() -> None:
    names = extension(FEATURE_NAMES, b"\2\77qcow2bm generation".ljust(48, b"\0") * 7)
    other = HeaderExtension(UNKNOWN, b"an odd length there", b"\0" * 5)
    image = build_image(Stored(), cluster_bits=12, extensions=[names, other], backing_name=b"base")
    assert not is_in_one_sector(payload_offset(Audit(image.data)), 24)
    draft = draft_of(image)
    prepared = draft.straighten()
    assert prepared
    audit = done(image, draft.replace(PAYLOAD), prepared)
    assert audit.other_extensions == [(names.type, names.data), (other.type, other.data)]
    assert is_in_one_sector(payload_offset(audit), 24)
