"""Counts what several bitmaps have together, without changing any of them.

*Spec*: spec/live.md, "Tail" and "Exact".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qcow2bm.errors import QmpError
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp import actions, scratch_image
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.qmp.queries import query_scratch_bitmaps


class Merged(NamedTuple):
    """Bitmaps that are counted together, as if they had one ``granularity``, in bytes.

    ``sources`` are nodes and names; the node of a bitmap that is lent is `SCRATCH_NODE`.
    """

    granularity: int
    sources: Sequence[tuple[str, str]]


def count_merged(
    monitor: QmpCommands,
    virtual_size: int,
    merged: Mapping[str, Merged],
    lent: Iterable[SavedBitmap] = (),
) -> dict[str, int]:
    """Returns how many bytes are dirty in each of several sets of bitmaps, in whole granules.

    All of them are of one moment: QEMU merges in one transaction.

    Args:
        monitor: the machine.
        virtual_size: of the disk, in bytes.
        merged: the sets, each with a name that no bitmap of ``lent`` has.
        lent: bitmaps that are not in the machine.

    Raises:
        QmpError: QEMU does not answer, or refuses; or another program removes the scratch node.
        StorageError: there is no room for temporary files.
    """
    with (
        scratch_image.with_bitmaps(virtual_size, lent) as image,
        scratch_image.lent(monitor, image),
    ):
        work = []
        for name, (granularity, sources) in merged.items():
            add = actions.add(SCRATCH_NODE, name, granularity, persistent=False, enabled=False)
            work += [add, actions.merge_all(SCRATCH_NODE, name, sources)]
        monitor.transaction(work)
        counts = query_scratch_bitmaps(monitor) or {}
    if not merged.keys() <= counts.keys():
        raise QmpError("query-named-block-nodes", "the scratch node is gone: another program ran")
    return {name: counts[name] for name in merged}
