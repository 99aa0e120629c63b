"""Plans of changes to images in memory, and the images that the plans make."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from support.audit import Audit

import qcow2bm
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plan import Plan, Step, execute
from qcow2bm.storage.memory import MemoryStorage

Work = Callable[[qcow2bm.Edit], object]
"""The operations of one edit."""


def opened(data: bytes | bytearray) -> ClusterFile:
    """The image as the layers below the API see it."""
    return ClusterFile(MemoryStorage(data), force_share=False)


def after(data: bytes | bytearray, steps: Iterable[Step]) -> bytearray:
    """A copy of the image with these steps done."""
    copy = bytearray(data)
    execute(Plan(tuple(steps)), MemoryStorage(copy), len(copy))
    return copy


def each(*works: Work) -> Work:
    """Several works in one edit, one after the other."""

    def work(edit: qcow2bm.Edit) -> None:
        for one in works:
            one(edit)

    return work


def plan_of(data: bytes | bytearray, work: Work) -> Plan:
    """The plan of an edit that is not committed."""
    with qcow2bm.open(data) as image, image.edit(dry_run=True) as edit:
        work(edit)
        return edit.plan()


def edit(data: bytearray, work: Work) -> tuple[Plan, Audit]:
    """Commits an edit; returns its plan, and an audit of the changed image.

    Asserts what holds after any edit: each cluster's refcount is the number of references to the
    cluster, and nothing in the header changes that does not belong to bitmaps (INV-UNKNOWN).
    """
    before = Audit(data)
    with qcow2bm.open(data, "r+") as image, image.edit() as edit:
        work(edit)
        plan = edit.plan()
    audit = Audit(data)
    assert audit.miscounted == {}
    assert audit.unknown == before.unknown
    return plan, audit
