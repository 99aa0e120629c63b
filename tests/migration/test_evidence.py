"""Judging whether a disk is the one that was given away: the tables of the specification again.

Nothing here touches an image but the tests of `Definition`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.images import Stored, build_image, extension
from support.plans import opened

from qcow2bm.format.directory import (
    FLAG_AUTO,
    FLAG_IN_USE,
    TYPE_DIRTY_TRACKING,
    DirectoryEntry,
)
from qcow2bm.format.extensions import BACKING_FORMAT, CRYPTO, DATA_FILE
from qcow2bm.format.features import INCOMPATIBLE_DATA_FILE
from qcow2bm.migration.evidence import (
    Definition,
    Departure,
    Facts,
    Judgement,
    Policy,
    Witness,
    decide,
    judge,
)
from qcow2bm.migration.sentinel import PREFIX, Sentinel
from qcow2bm.storage.file_identity import FileIdentity

SIZE = 1 << 20
SENTINEL = Sentinel(f"{PREFIX}0f0e0d0c-0b0a-4908-8706-050403020100", 512, SIZE)
BITS = SIZE // 512
LENGTH = 512
DEFINITION = Definition(3, 16, SIZE, 0, 1, 65536, 0, False, None, None, None, None)
WITH_DATA_FILE = DEFINITION._replace(
    incompatible_features=INCOMPATIBLE_DATA_FILE, external_data_file_name=b"disk.raw"
)
IDENTITY = FileIdentity(1, 2, 3, 4, 5)
TOKEN = b"token of 16 byte"

IN_USE = FLAG_AUTO | FLAG_IN_USE


def entry(
    name: str, flags: int = FLAG_AUTO, granularity_bits: int = 16, table: int = 65536
) -> DirectoryEntry:
    key = name.encode()
    sizes = len(key), 0, b"", key, b""
    return DirectoryEntry(0, 0, table, 1, flags, TYPE_DIRTY_TRACKING, granularity_bits, *sizes)


def facts(*entries: DirectoryEntry, **changes: Any) -> Facts:
    listed = {found.name or "": found for found in entries}
    return Facts(DEFINITION, None, None, True, listed)._replace(**changes)


def octets(*bits: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A bitmap that has these set."""
    unpacked = np.zeros(8 * LENGTH, np.uint8)
    unpacked[list(bits)] = 1
    return np.packbits(unpacked, bitorder="little")


SOUND = entry(SENTINEL.name, granularity_bits=9)
CANARY = entry(SENTINEL.canary_name, 0, 9)
UNTOUCHED = Witness(octets(), octets(0, BITS - 1))


def ranges(verdict: Judgement) -> list[list[int]] | None:
    return None if verdict.changed is None else verdict.changed.tolist()


# --- evidence -----------------------------------------------------------------------------------


def test_nothing_happened() -> None:
    verdict = judge(Departure(facts(), SENTINEL), facts(SOUND, CANARY), UNTOUCHED)
    assert verdict.outcome == "unchanged"
    assert verdict.changed is not None
    assert verdict.changed.dtype == np.int64
    assert verdict.changed.shape == (0, 2)


@pytest.mark.spec("LIFE-10")
@pytest.mark.parametrize("bit", [0, 1, BITS // 2, BITS - 2, BITS - 1])
def test_no_range_is_blind(bit: int) -> None:
    """Not the first, where the canary has its bit, and not the last."""
    left, found = Departure(facts(), SENTINEL), facts(SOUND, CANARY)
    verdict = judge(left, found, UNTOUCHED._replace(sentinel=octets(bit)))
    assert (verdict.outcome, ranges(verdict)) == ("changed", [[512 * bit, 512]])


@pytest.mark.spec("LIFE-10")
@given(st.sets(st.integers(0, BITS - 1), max_size=3), st.sets(st.integers(1, BITS - 1), max_size=3))
def test_no_write_puts_back_a_canary_that_was_cleared(written: set[int], others: set[int]) -> None:
    """Its first and last bits count, whatever the sentinel has by then and it has else."""
    left, found = Departure(facts(), SENTINEL), facts(SOUND, CANARY)
    verdict = judge(left, found, Witness(octets(*written), octets(*others)))
    assert (verdict.outcome, ranges(verdict)) == ("changed", None)
    shrunk = judge(left, found, Witness(octets(*written), octets(0, *(others - {BITS - 1}))))
    assert (shrunk.outcome, ranges(shrunk)) == ("changed", None)
    alive = judge(left, found, Witness(octets(*written), octets(0, BITS - 1, *others)))
    assert alive.outcome == ("changed" if written else "unchanged")
    assert alive.changed is not None
    assert int(alive.changed[:, 1].sum()) == 512 * len(written)


@pytest.mark.parametrize("field", Definition._fields)
def test_every_field_of_the_definition_counts(field: str) -> None:
    change: dict[str, Any] = {field: "other"}
    other = DEFINITION._replace(**change)
    verdict = judge(Departure(facts(), SENTINEL), facts(SOUND, CANARY, definition=other), UNTOUCHED)
    assert (verdict.outcome, ranges(verdict)) == ("changed", None)
    assert field in verdict.reason
    assert DEFINITION.difference(other) == field
    assert DEFINITION.difference(DEFINITION) == ""


@pytest.mark.spec("LIFE-17")
@pytest.mark.parametrize("field", FileIdentity._fields)
def test_everything_of_the_data_file_counts(field: str) -> None:
    before = facts(definition=WITH_DATA_FILE, data_file=IDENTITY)
    now = before._replace(
        data_file=IDENTITY._replace(**{field: 9}), entries=facts(SOUND, CANARY).entries
    )
    left = Departure(before, SENTINEL)
    verdict = judge(left, now, UNTOUCHED)
    assert (verdict.outcome, ranges(verdict)) == ("changed", None)
    same = judge(left, now._replace(data_file=IDENTITY), UNTOUCHED)
    assert (same.outcome, ranges(same)) == ("unchanged", [])
    gone = judge(left, now._replace(data_file=None), UNTOUCHED)
    assert gone.outcome == "changed"


class Found(NamedTuple):
    """What may be found, each independent of the others."""

    is_redefined: bool
    is_consistent: bool
    has_data_file: bool
    gave_path: bool
    is_data_file_other: bool
    has_sentinel: bool
    lack: str  # what is wrong with the sentinel
    canary_lack: str  # and with its canary
    written: tuple[int, ...]
    records: bool  # the generation, when it was given away
    token: str  # what was found of it: "same", "other" or "none"


LACKS = ("gone", "in_use", "other way", "coarser", "broken")
CANARY_LACKS = (*LACKS, "cleared", "its last bit only")
founds = st.builds(
    Found,
    *(st.sampled_from((False, False, False, True)), st.sampled_from((True, True, True, False))),
    *(st.booleans(), st.booleans(), st.sampled_from((False, False, True))),
    *(st.sampled_from((True, True, True, False)), st.sampled_from(("",) * 9 + LACKS)),
    st.sampled_from(("",) * 12 + CANARY_LACKS),
    st.lists(st.sampled_from((0, 1, 7, 8, BITS - 2, BITS - 1)), max_size=3, unique=True).map(tuple),
    *(st.booleans(), st.sampled_from(("same", "same", "other", "none"))),
)


def lacking(entry: DirectoryEntry, lack: str) -> list[DirectoryEntry]:
    """The entry with what is wrong with it."""
    kinds = {
        "in_use": entry._replace(flags=entry.flags | FLAG_IN_USE),
        "other way": entry._replace(flags=entry.flags ^ FLAG_AUTO),
        "coarser": entry._replace(granularity_bits=10),
    }
    return [] if lack == "gone" else [kinds.get(lack, entry)]


def build(found: Found) -> tuple[Departure, Facts, Witness]:
    definition = WITH_DATA_FILE if found.has_data_file else DEFINITION
    identity = IDENTITY if found.has_data_file and found.gave_path else None
    token = TOKEN if found.records else None
    left = Departure(
        facts(definition=definition, data_file=identity, token=token),
        SENTINEL if found.has_sentinel else None,
    )
    both = (SOUND, found.lack), (CANARY, found.canary_lack)
    entries = [one for entry, lack in both for one in lacking(entry, lack)]
    is_other = found.is_data_file_other and identity is not None
    now = facts(
        *entries,
        definition=definition._replace(size=2 * SIZE) if found.is_redefined else definition,
        data_file=identity._replace(size=9) if identity and is_other else identity,
        token={"same": token, "other": b"another 16 bytes", "none": None}[found.token],
        is_consistent=found.is_consistent,
        broken={entry.name or "" for entry, lack in both if lack == "broken"},
    )
    canary = {"cleared": octets(), "its last bit only": octets(BITS - 1)}
    witness = Witness(octets(*found.written), canary.get(found.canary_lack, octets(0, BITS - 1)))
    nothing = (
        None if lack in ("gone", "broken") else bits
        for (_, lack), bits in zip(both, witness, strict=True)
    )
    return left, now, Witness(*nothing)


def expected(found: Found) -> tuple[str, list[list[int]] | None]:
    """The table "Evidence", line by line."""
    has_path = found.has_data_file and found.gave_path
    is_other_token = found.records and found.token != "same"
    if found.is_redefined:
        return "changed", None
    if not found.is_consistent:
        return "changed", None
    if has_path and found.is_data_file_other:
        return "changed", None
    if not found.has_sentinel:
        return ("changed" if is_other_token else "unknown"), None
    if found.lack or found.canary_lack:
        return "changed", None
    if found.written:
        covered = sorted(found.written)
        joined: list[list[int]] = []
        for bit in covered:
            if joined and sum(joined[-1]) == 512 * bit:
                joined[-1][1] += 512
            else:
                joined.append([512 * bit, 512])
        return "changed", joined
    if is_other_token:
        return "changed", []
    if found.has_data_file and not found.gave_path:
        return "unknown", None
    return "unchanged", []


@pytest.mark.spec("LIFE-15")
@given(founds)
def test_the_first_line_that_fits_is_the_answer(found: Found) -> None:
    verdict = judge(*build(found))
    assert (verdict.outcome, ranges(verdict)) == expected(found)
    assert verdict.reason


@pytest.mark.spec("LIFE-15")
@given(founds)
def test_only_a_sentinel_proves_that_nothing_changed(found: Found) -> None:
    if judge(*build(found)).outcome == "unchanged":
        assert found.has_sentinel
        assert not found.lack
        assert not found.canary_lack
        assert not found.written


@pytest.mark.spec("LIFE-14")
@pytest.mark.parametrize("has_sentinel", [False, True])
@pytest.mark.parametrize("token", [None, b"another 16 bytes"])
def test_another_generation_is_a_writer_and_the_same_proves_nothing(
    token: bytes | None, has_sentinel: bool
) -> None:
    left = Departure(facts(token=TOKEN), SENTINEL if has_sentinel else None)
    other = judge(left, facts(SOUND, CANARY, token=token), UNTOUCHED)
    assert (other.outcome, ranges(other)) == ("changed", [] if has_sentinel else None)
    same = judge(left, facts(SOUND, CANARY, token=TOKEN), UNTOUCHED).outcome
    assert same == ("unchanged" if has_sentinel else "unknown")


def test_a_generation_that_another_writer_began_is_no_sign() -> None:
    """It was not recorded when the image was given away; the sentinel has to tell."""
    left = Departure(facts(), SENTINEL)
    assert judge(left, facts(SOUND, CANARY, token=TOKEN), UNTOUCHED).outcome == "unchanged"


# --- what becomes of the bitmaps ----------------------------------------------------------------

WRITTEN = np.array([[0, 512], [SIZE - 512, 512]])
VERDICTS = {
    "unchanged": Judgement("unchanged", "", np.zeros((0, 2), np.int64)),
    "changed": Judgement("changed", "", WRITTEN),
    "changed, nothing written": Judgement("changed", "", np.zeros((0, 2), np.int64)),
    "changed, ranges unknown": Judgement("changed", ""),
    "unknown": Judgement("unknown", ""),
}
NOW: dict[str, Callable[[DirectoryEntry], DirectoryEntry | None]] = {
    "gone": lambda before: None,
    "as left": lambda before: before._replace(number=7, offset=99),
    "valid": lambda before: before._replace(flags=FLAG_AUTO, bitmap_table_offset=1 << 20),
    "in_use": lambda before: before._replace(flags=IN_USE),
    "disabled": lambda before: before._replace(flags=0),
    "disabled, in_use": lambda before: before._replace(flags=FLAG_IN_USE),
    "broken": lambda before: before,
}

WITH_RANGES = "changed", "changed, nothing written"
one_of_ours = st.tuples(st.booleans(), st.sampled_from([*NOW, "as left", "as left"]))


def model(
    ours: list[tuple[bool, str]], is_consistent: bool, outcome: str, policy: Policy
) -> list[str]:
    """The table "What becomes of the bitmaps"; each of ours is (was it carried, how it is)."""

    def in_use(is_carried: bool, now: str) -> bool:
        return now == "in_use" or (now == "as left" and is_carried)

    def is_as_left(is_carried: bool, now: str) -> bool:
        return now == "as left" or now == "broken" or (now == "in_use" and is_carried)

    fates = []
    are_all_as_left = all(is_as_left(*one) for one in ours)
    for is_carried, now in ours:
        if now in ("gone", "broken", "disabled", "disabled, in_use") or not is_consistent:
            fates.append("dropped")
        elif outcome == "unchanged" and (not in_use(is_carried, now) or is_carried):
            fates.append("kept")
        elif not in_use(is_carried, now):
            fates.append("reloaded")
        elif outcome in WITH_RANGES and policy == "merge" and is_carried and are_all_as_left:
            fates.append("kept")
        else:
            fates.append("dropped")
    return fates


@given(
    st.lists(one_of_ours, min_size=1, max_size=3),
    st.sampled_from((True, True, True, False)),
    st.sampled_from(list(VERDICTS)),
    st.sampled_from(("drop", "merge")),
)
def test_what_becomes_of_ours(
    ours: list[tuple[bool, str]], is_consistent: bool, outcome: str, policy: Policy
) -> None:
    before, now, broken = [], [], []
    for number, (is_carried, how) in enumerate(ours):
        mine = entry(f"b{number}", IN_USE if is_carried else FLAG_AUTO)
        before.append(mine)
        if (found := NOW[how](mine)) is not None:
            now.append(found)
        if how == "broken":
            broken.append(mine.name or "")
    left = Departure(facts(*before), SENTINEL)
    found_facts = facts(*now, is_consistent=is_consistent, broken=broken)
    fates = decide(left, found_facts, VERDICTS[outcome], policy)
    assert list(fates) == [mine.name for mine in before]
    kinds = [fate.kind for fate in fates.values()]
    assert kinds == model(ours, is_consistent, outcome, policy)
    assert all(fate.reason for fate in fates.values())


@pytest.mark.parametrize("outcome", ["changed, ranges unknown", "unknown"])
def test_without_ranges_there_is_nothing_to_merge(outcome: str) -> None:
    mine = entry("a", IN_USE)
    fates = decide(Departure(facts(mine), None), facts(mine), VERDICTS[outcome], "merge")
    assert fates["a"].kind == "dropped"


@pytest.mark.parametrize("outcome", VERDICTS)
def test_bits_of_another_granularity_are_never_ours(outcome: str) -> None:
    mine = entry("a")
    now = facts(entry("a", granularity_bits=17))
    assert decide(Departure(facts(mine), SENTINEL), now, VERDICTS[outcome], "merge")["a"].kind == (
        "reloaded"
    )
    carried, other = entry("a", IN_USE), facts(entry("a", IN_USE, 17))
    assert decide(Departure(facts(carried), SENTINEL), other, VERDICTS[outcome], "merge")[
        "a"
    ].kind == ("dropped")


@pytest.mark.spec("LIFE-19")
@pytest.mark.parametrize("outcome", VERDICTS)
@pytest.mark.parametrize("policy", ["drop", "merge"])
def test_others_are_tracked_too_if_they_are_sound_and_record(outcome: str, policy: Policy) -> None:
    now = facts(
        entry("a"),
        entry("new"),
        entry("crashed", IN_USE),
        entry("off", 0),
        entry("broken"),
        SOUND,
        CANARY._replace(flags=FLAG_AUTO),  # a canary that was enabled is none of ours either
        broken={"broken"},
    )
    fates = decide(Departure(facts(entry("a")), SENTINEL), now, VERDICTS[outcome], policy)
    assert list(fates) == ["a", "new"]
    assert fates["new"].kind == "reloaded"
    stale = decide(
        Departure(facts(entry("a")), SENTINEL),
        now._replace(is_consistent=False),
        VERDICTS[outcome],
        policy,
    )
    assert {name: fate.kind for name, fate in stale.items()} == {"a": "dropped"}


# --- definitions of real images -----------------------------------------------------------------

PLAIN: dict[str, Any] = {"cluster_bits": 12, "size": SIZE}
OTHERS: dict[str, dict[str, Any]] = {
    "version": {"version": 2},
    "cluster_bits": {"cluster_bits": 13},
    "size": {"size": SIZE - 512},
    "crypt_method": {"header": {"crypt_method": 2}},
    "l1_size": {"header": {"l1_size": 2}},
    "l1_table_offset": {"header": {"l1_table_offset": 1 << 20}},
    "incompatible_features": {"header": {"incompatible_features": 16}},
    "raw_external_data": {"header": {"autoclear_features": 3}},
    "backing_file": {"backing_name": b"base"},
    "backing_format": {"extensions": [extension(BACKING_FORMAT, b"raw")]},
    "crypto_header": {"extensions": [extension(CRYPTO, bytes(16))]},
    "external_data_file_name": {"extensions": [extension(DATA_FILE, b"disk.raw")]},
}


def test_each_field_has_an_image_that_differs_in_it() -> None:
    assert set(OTHERS) == set(Definition._fields)


@pytest.mark.parametrize("field", OTHERS)
def test_the_definition_of_an_image(field: str) -> None:
    def definition(**options: Any) -> Definition:
        built = build_image(Stored(), **{**PLAIN, **options})
        return Definition.of(opened(bytes(built.data)))

    before = definition()
    other = definition(**OTHERS[field])
    assert getattr(other, field) != getattr(before, field)
    assert before.difference(other)
    assert definition() == before


def test_what_has_nothing_to_do_with_the_disk_is_not_in_its_definition() -> None:
    built = build_image(Stored(), **PLAIN)
    other = build_image(
        Stored(b"other", granularity_bits=9),
        Stored(b"more"),
        extensions=[extension(0x12345678, b"unknown")],
        header={"compatible_features": 1, "autoclear_features": 1 | 1 << 63},
        additional_fields=bytes(8),
        **PLAIN,
    )
    first, second = (Definition.of(opened(bytes(found.data))) for found in (built, other))
    assert first._replace(l1_table_offset=0) == second._replace(l1_table_offset=0)
