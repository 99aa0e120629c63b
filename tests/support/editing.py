"""Editing an image in memory, and looking at what came of it."""

from __future__ import annotations

from collections.abc import Callable

from support.audit import Audit

import qcow2bm

Work = Callable[[qcow2bm.Edit], object]


def each(*works: Work) -> Work:
    """One after the other in one edit."""

    def work(edit: qcow2bm.Edit) -> None:
        for one in works:
            one(edit)

    return work


def edit(data: bytearray, work: Work) -> tuple[qcow2bm.Plan, Audit]:
    """Commits an edit; returns its plan, and what then stands in the image.

    Whatever the edit does: every cluster is counted as often as it is referred to, and nothing in
    the header changes that bitmaps have no part in (INV-UNKNOWN).
    """
    before = Audit(data)
    with qcow2bm.open(data, "r+") as image, image.edit() as edit:
        work(edit)
        plan = edit.plan()
    audit = Audit(data)
    assert audit.miscounted == {}
    assert audit.unknown == before.unknown
    return plan, audit


def plan_of(data: bytes | bytearray, work: Work) -> qcow2bm.Plan:
    """The plan of an edit that is not committed."""
    with qcow2bm.open(data) as image, image.edit(dry_run=True) as edit:
        work(edit)
        return edit.plan()
