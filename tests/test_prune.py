"""Choosing the bitmaps that a rule removes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import pytest
from support.audit import Audit
from support.images import ONES, Stored, build_image

import qcow2bm
from qcow2bm import Pruning, choose_to_prune
from qcow2bm.bitmaps.rules import RESERVED_PREFIX
from qcow2bm.format.directory import FLAG_AUTO, FLAG_IN_USE
from qcow2bm.migration import intent, sentinel
from qcow2bm.qmp import names

CLUSTER = 512
SIZE = 8 * CLUSTER << 17  # of two clusters of bits of 64 KiB

FLAGS = {
    "monday": FLAG_AUTO,
    "tuesday": 0,
    "Monday": FLAG_AUTO,
    "crashed": FLAG_AUTO | FLAG_IN_USE,
    "both": FLAG_IN_USE,
}


def image(flags: Mapping[str, int] = FLAGS, **options: Any) -> bytearray:
    stored = (
        Stored(name.encode("utf-8", "surrogateescape"), [b"\1", ONES], flags=flag)
        for name, flag in flags.items()
    )
    return build_image(*stored, size=SIZE, **options).data


def chosen(data: bytearray, **rules: Any) -> Pruning:
    with qcow2bm.open(data) as opened:
        return choose_to_prune(opened, **rules)


@pytest.mark.spec("PRUNE-1")
@pytest.mark.parametrize(
    ("rules", "removed"),
    [
        ({"keep": ["monday"]}, "tuesday Monday crashed both"),
        ({"keep": ["monday", "crashed"]}, "tuesday Monday both"),
        ({"keep_patterns": ["*day"]}, "crashed both"),
        ({"keep_patterns": ["m*", "[bc]*"]}, "tuesday Monday"),
        ({"keep_patterns": ["?onday"]}, "tuesday crashed both"),
        ({"inconsistent": True}, "crashed both"),
        ({"disabled": True}, "tuesday both"),
        ({"inconsistent": True, "disabled": True}, "tuesday crashed both"),
        ({"inconsistent": True, "keep": ["both"]}, "crashed"),
        ({"disabled": True, "keep_patterns": ["t*"]}, "both"),
        ({"disabled": True, "keep_patterns": ["nothing"]}, "tuesday both"),
        ({"keep": ["both"], "keep_patterns": ["*day"]}, "crashed"),
    ],
)
def test_what_is_selected_and_not_kept_is_removed(rules: dict[str, Any], removed: str) -> None:
    pruning = chosen(image(), **rules)
    assert list(pruning.removed) == removed.split()
    assert {*pruning.removed, *dict(pruning.kept)} == {*FLAGS}


@pytest.mark.spec("PRUNE-5")
def test_each_bitmap_that_is_kept_has_its_reason() -> None:
    pruning = chosen(image(), inconsistent=True, keep=["both"], keep_patterns=["t*", "both"])
    assert pruning.kept == (
        ("monday", "not-selected"),
        ("tuesday", "pattern"),
        ("Monday", "not-selected"),
        ("both", "named"),
    )


@pytest.mark.spec("PRUNE-5")
@pytest.mark.spec("PRUNE-6")
@pytest.mark.parametrize("many", [0, 30])
@pytest.mark.parametrize("rules", [{"keep": ["both"]}, {"disabled": True}, {"inconsistent": True}])
def test_as_much_is_free_as_was_said(rules: dict[str, Any], many: int) -> None:
    data = image({**FLAGS, **{f"more of a long name {n}": 0 for n in range(many)}})
    before = Audit(data)
    with qcow2bm.open(data, "r+") as opened:
        pruning = choose_to_prune(opened, **rules)
        with opened.edit() as edit:
            for name in pruning.removed:
                edit.remove(name)
        assert [*opened.bitmaps] == [name for name, _ in pruning.kept]
    after = Audit(data)
    assert after.miscounted == {}
    freed = CLUSTER * (len(before.refcounts) - len(after.refcounts))
    assert pruning.freed_bytes == freed > 0


@pytest.mark.spec("PRUNE-5")
def test_if_the_last_bitmap_goes_the_directory_goes() -> None:
    pruning = chosen(image({"a": FLAG_IN_USE}), inconsistent=True)
    assert pruning == Pruning(("a",), (), 3 * CLUSTER)


@pytest.mark.spec("PRUNE-2")
def test_a_name_that_is_to_be_kept_must_be_there() -> None:
    with pytest.raises(qcow2bm.BitmapNotFoundError, match='"mnday"'):
        chosen(image(), keep=["monday", "mnday"])
    with pytest.raises(ValueError, match="all bitmaps would be removed"):
        chosen(image(), keep_patterns=["mnday*"])
    assert chosen(image({}), keep_patterns=["mnday*"]) == Pruning((), (), 0)


@pytest.mark.spec("PRUNE-1")
def test_without_a_rule_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match="give a rule"):
        chosen(image())


@pytest.mark.spec("PRUNE-6")
def test_stale_bitmaps_are_not_chosen() -> None:
    with pytest.raises(qcow2bm.BitmapStaleError):
        chosen(image(autoclear=False), inconsistent=True)


def test_names_that_are_not_utf_8_are_matched() -> None:
    data = image({"\udcff-old": FLAG_AUTO, "new\nline": FLAG_AUTO})
    assert chosen(data, keep_patterns=["\udcff*"]).removed == ("new\nline",)
    assert chosen(data, keep_patterns=["new*"]).removed == ("\udcff-old",)


# What this library added for itself

UUID = uuid.UUID(int=7)
OWN = (
    sentinel.Sentinel.fresh(SIZE, CLUSTER).name,
    sentinel.Sentinel.fresh(SIZE, CLUSTER).canary_name,
    intent.Intent.fresh(SIZE, CLUSTER, ["daily"]).name,
    intent.Intent.fresh(SIZE, CLUSTER, ["daily"]).canary_name,
    names.copy_of("daily"),
    names.twin_of(sentinel.Sentinel.fresh(SIZE, CLUSTER).name),
    names.tail_of(UUID, 2),
    names.canary_of(UUID),
    names.recorder_of(UUID),
    names.witness_of(UUID, 1),
    names.arrival_of(UUID, b"token"),
    names.new_copy_name(),
    names.MERGED,
    *names.COMPARED,
)


@pytest.mark.spec("PRUNE-3")
def test_all_names_that_this_library_gives_are_reserved() -> None:
    given = {value for name, value in vars(names).items() if name.endswith("_PREFIX")}
    assert all(name.startswith(RESERVED_PREFIX) for name in (*OWN, *given, names.SCRATCH_NODE))
    for prefix in given:
        assert any(name.startswith(prefix) for name in OWN), prefix


@pytest.mark.spec("PRUNE-3")
@pytest.mark.parametrize("number", range(len(OWN)))  # the names are other ones in each process
@pytest.mark.parametrize(
    "rules", [{"keep": ["a"]}, {"keep_patterns": ["a"]}, {"inconsistent": True}, {"disabled": True}]
)
def test_no_rule_removes_what_this_library_added(number: int, rules: dict[str, Any]) -> None:
    name = OWN[number]
    data = image({name: FLAG_IN_USE, "a": FLAG_AUTO, "b": FLAG_IN_USE})
    pruning = chosen(data, **rules)
    assert pruning.removed == ("b",)
    assert (name, "reserved") in pruning.kept
    with qcow2bm.open(data, "r+") as opened, opened.edit() as edit:
        edit.remove(name)


@pytest.mark.spec("PRUNE-4")
def test_no_rule_removes_what_can_be_recovered() -> None:
    data = image({"daily": FLAG_AUTO, "lost": FLAG_IN_USE, "other": 0})
    with qcow2bm.open(data, "r+") as opened, opened.track(intent=True) as tracker:
        with tracker.writing(0, 512):
            pass
        crashed = bytearray(data)
    pruning = chosen(crashed, inconsistent=True)
    assert pruning.removed == ("lost",)
    assert ("daily", "recoverable") in pruning.kept
    assert "daily" in dict(chosen(crashed, keep=["other"]).kept)
    with qcow2bm.open(crashed, "r+") as opened:
        with opened.edit() as edit:
            edit.remove("lost")
        assert opened.recover().names == ("daily",)
