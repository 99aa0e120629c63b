"""The tail: the bitmap that records on a node in the place of those that were taken out.

Every write since the first step of the offload is in the tail, if the tail is what the offload
made. Beside it is its canary, which records as well, and begins with every bit set. What happens to
all bitmaps of a disk happens to both: libvirt carries those that record to another host, and begins
clean ones of the same names in an overlay. A canary that lacks a bit was cleared, and the tail with
it. A canary that has every bit was cleared only if the guest has written everywhere since.

A new tail may follow a tail: then the bits of the former one are in the offload file.

*Spec*: spec/live.md, "Tail".
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

from qcow2bm.format.offload_file import PlannedNode
from qcow2bm.migration.canary import MAX_BYTES, finest_granularity
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp.machine import Node, NodeBitmap
from qcow2bm.qmp.names import (
    TAIL_PREFIX,
    canary_of,
    is_of_offload,
    recorder_of,
    tail_of,
    witness_of,
)
from qcow2bm.units import ceil_div

DEFAULT_GRANULARITY = 4 << 20
MAX_GRANULARITY = 128 << 20
"""A coarser bitmap makes the source of a migration with the capability dirty-bitmaps spin."""


class TailCounts(Protocol):
    """Counts that a tail is judged by. They are seldom needed, and take a machine some time."""

    def coarsened(self) -> int:
        """Returns how many bytes the tail would mark in the granularity of its canary.

        They are counted in whole granules.
        """

    def is_canary_full(self) -> bool:
        """Returns whether the canary has all the bits that it was made with."""


class Tail(NamedTuple):
    """The tail of a node, as an offload file says that it is.

    Attributes:
        planned: the node.
        granularity: how many guest bytes a bit of the tail stands for.
        number: how many tails this one follows.
    """

    planned: PlannedNode
    granularity: int
    number: int = 0

    @property
    def name(self) -> str:
        """The name of the tail."""
        return tail_of(self.planned.uuid, self.number)

    @property
    def canary_name(self) -> str:
        """The name of its canary."""
        return canary_of(self.planned.uuid, self.number)

    @property
    def recorder_name(self) -> str:
        """The name of the bitmap that records exactly where the offload was begun."""
        return recorder_of(self.planned.uuid)

    @property
    def witness_name(self) -> str:
        """The name of the bitmap of an exact offload that is not stored, and newer than the tail.

        If QEMU takes the disk back from another machine, it loads the tail anew, which then is
        newer than the witness.
        """
        return witness_of(self.planned.uuid, self.number) if self.number else self.recorder_name

    def was_loaded_anew(self, node: Node) -> bool:
        """Returns whether the tail on a node is newer than its witness, or has none."""
        tail, witness = node.find(self.name), node.find(self.witness_name)
        return not tail or not witness or tail.place < witness.place

    @property
    def next(self) -> Self:
        """The tail that can follow."""
        return self._replace(number=self.number + 1)

    @property
    def canary_granularity(self) -> int:
        """That of the tail; or a coarser one, so that the canary takes one cluster to store."""
        size, least = self.planned.disk_size, self.granularity
        return finest_granularity(size, 8 * MAX_BYTES, least, MAX_GRANULARITY)

    def _granules(self, granularity: int) -> int:
        return ceil_div(self.planned.disk_size, granularity)

    @property
    def canary(self) -> SavedBitmap:
        """The canary as it is made: every bit is set."""
        granularity = self.canary_granularity
        granules = self._granules(granularity)
        octets = ((1 << granules) - 1).to_bytes(ceil_div(granules, 8), "little")
        return SavedBitmap(self.canary_name, granularity, True, self.planned.disk_size, octets)

    def names_on(self, node: Node) -> list[str]:
        """Returns the names of all bitmaps on a node that its offload added."""
        names = (bitmap.name for bitmap in node.bitmaps)
        return [name for name in names if is_of_offload(name, self.planned.uuid)]

    def recorder_on(self, node: Node, name: str) -> NodeBitmap | None:
        """Returns the recorder of that name; None if there is none that has what it began with.

        A recorder is not persistent: it ends with the QEMU process that has it.
        """
        found = node.find(name)
        is_ours = (
            found is not None
            and found.is_recording
            and found.is_usable
            and not found.is_persistent
            and found.granularity == self.planned.recorder_granularity
        )
        return found if is_ours else None

    def why_resized(self, node: Node) -> str:
        """Returns what happened to the size of the disk since; "" if nothing did."""
        if node.virtual_size == self.planned.disk_size:
            return ""
        return (
            f"the disk has {node.virtual_size} bytes, and had {self.planned.disk_size} when "
            "the bitmaps were taken out"
        )

    def why_unusable(self, node: Node, counts: TailCounts) -> str:
        """Returns why the tail on a node may miss writes; "" if it has all of them.

        A disk that has grown since is no fault: QEMU has let its bitmaps grow as well.
        """
        tail, canary = node.find(self.name), node.find(self.canary_name)
        if not tail:
            return (
                "it has no tail of this file. If this is the right disk, nothing recorded the "
                "writes since the bitmaps were taken out: take a full backup, with new bitmaps"
            )
        if tail.is_inconsistent:
            return "the tail is inconsistent: a QEMU that had the disk did not store it"
        if not tail.is_recording:
            return "the tail is disabled: writes are missing from it"
        if tail.granularity != self.granularity or not tail.is_persistent:
            return (
                "the tail is not the one that was made: it has another granularity or persistence"
            )
        if node.virtual_size < self.planned.disk_size:
            return self.why_resized(node)
        if not canary or not self._is_alive(canary, tail, node, counts):
            return "the canary of the tail is gone or was changed: the tail may have been cleared"
        if node.is_read_only:
            return "the node is read-only: QEMU would not store the bitmaps"
        if tail.is_busy:
            return "the tail is busy: a job uses it; try again when the job has ended"
        return ""

    def _is_alive(
        self, canary: NodeBitmap, tail: NodeBitmap, node: Node, counts: TailCounts
    ) -> bool:
        """Whether the canary was never cleared.

        If it was, it has what the tail has since then, as coarse as it is itself. So a canary that
        has every bit proves nothing if the tail touches each of its granules, and then it does not
        matter if they are no coarser than those of the tail: that tail has every bit as well.
        """
        granularity = self.canary_granularity
        every = self._granules(granularity) * granularity
        if canary.granularity != granularity or not canary.is_recording:
            return False
        if canary.is_inconsistent or canary.dirty_bytes < every:
            return False
        # In a disk that has grown, bits behind the former end can stand for others that are gone:
        # the disk was made smaller first.
        if self.why_resized(node) and not counts.is_canary_full():
            return False
        is_sparse = tail.dirty_bytes // self.granularity < self._granules(granularity)
        return granularity == self.granularity or is_sparse or counts.coarsened() < every


def foreign_tail(node: Node) -> str:
    """Returns the name of a tail on a node; "" if there is none."""
    names = (bitmap.name for bitmap in node.bitmaps)
    return next((name for name in names if name.startswith(TAIL_PREFIX)), "")
