"""The state of a running QEMU, as values: its migration, its block nodes and their bitmaps.

*Spec*: spec/rescue.md, "When".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qcow2bm.errors import StateError
from qcow2bm.migration.sentinel import CANARY_SUFFIX, is_sentinel
from qcow2bm.qmp.names import is_evidence, sentinel_of
from qcow2bm.units import escape

BitmapMapping = list[dict[str, Any]]
"""A block-bitmap-mapping as QEMU takes it: of each node, the bitmaps that travel."""

_MIGRATION_IS_OVER = ("", "none", "cancelled", "failed", "completed")
_WITHOUT_DISKS = (  # states of a machine in which its disks may be inactive, or change hands
    "colo",
    "finish-migrate",
    "inmigrate",
    "postmigrate",
    "preconfig",
    "restore-vm",
    "save-vm",
)
_USE_CONT = "use cont, if no other machine runs on the disks"


class NodeBitmap(NamedTuple):
    """A bitmap in QEMU's memory.

    ``dirty_bytes`` counts whole granules, also where the last one reaches beyond the disk.
    ``place`` is the place in QEMU's list of the node's bitmaps: that which was made, or loaded,
    last comes first.
    """

    node: str
    name: str
    granularity: int
    dirty_bytes: int
    is_recording: bool
    is_persistent: bool
    is_busy: bool
    is_inconsistent: bool
    place: int = 0

    @property
    def is_usable(self) -> bool:
        """Whether QEMU allows changes to the bitmap."""
        return not self.why_unusable

    @property
    def why_unusable(self) -> str:
        """The reason why QEMU allows no changes to the bitmap; "" if it allows them."""
        if self.is_inconsistent:
            return "inconsistent"
        return "busy: a job uses it" if self.is_busy else ""


class NodeChoiceError(ValueError):
    """Several ``nodes`` have persistent bitmaps, and none was chosen."""

    def __init__(self, nodes: Sequence[str]) -> None:
        super().__init__(nodes)
        self.nodes = tuple(nodes)

    def __str__(self) -> str:
        listed = ", ".join(f'"{escape(node)}"' for node in self.nodes)
        return f"several nodes have bitmaps: choose one ({listed})"


class Node(NamedTuple):
    """A block node.

    Attributes:
        name: the node name.
        alias: the name that QEMU gives the node in a migration stream by default.
        driver: the block driver, such as ``qcow2``.
        virtual_size: of the disk, in bytes.
        cluster_size: in bytes; None where QEMU does not tell.
        is_read_only: whether QEMU opened the node read-only.
        is_active: whether QEMU may write to the node now; None where that is not known, or was
            not asked because there was no migration.
        bitmaps: all bitmaps that have a name, in the order of their names.
    """

    name: str
    alias: str
    driver: str
    virtual_size: int
    cluster_size: int | None
    is_read_only: bool
    is_active: bool | None
    bitmaps: tuple[NodeBitmap, ...]

    def find(self, name: str) -> NodeBitmap | None:
        """Returns the bitmap of that name."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)

    @property
    def twin(self) -> NodeBitmap | None:
        """The twin of the sentinel that the node is armed with; None if the node is not armed.

        A persistent bitmap is no twin, whatever its name: it was loaded from the image.
        """
        return next((b for b in self.bitmaps if sentinel_of(b.name) and not b.is_persistent), None)

    @property
    def evidence(self) -> list[str]:
        """The names of the bitmaps that were added to find out which machine wrote."""
        return [bitmap.name for bitmap in self.bitmaps if is_evidence(bitmap.name)]

    @property
    def subjects(self) -> list[NodeBitmap]:
        """All bitmaps but the evidence: those that a backup may go by."""
        return [bitmap for bitmap in self.bitmaps if not is_evidence(bitmap.name)]

    @property
    def tells_of_a_crash(self) -> bool:
        """Whether a sentinel is inconsistent beside bitmaps that are not.

        Then a QEMU that had the disk was killed, and these bitmaps may miss its writes.
        """
        is_inconsistent = any(
            bitmap.is_inconsistent
            for bitmap in self.bitmaps
            # A sentinel with a canary was not made by a rescue: its maker judges it.
            if is_sentinel(bitmap.name)
            and not bitmap.name.endswith(CANARY_SUFFIX)
            and not self.find(bitmap.name + CANARY_SUFFIX)
        )
        return is_inconsistent and not all(bitmap.is_inconsistent for bitmap in self.subjects)

    @property
    def has_persistent(self) -> bool:
        """Whether one of the subjects is persistent."""
        return any(bitmap.is_persistent for bitmap in self.subjects)


class Machine(NamedTuple):
    """The state of a running QEMU.

    Attributes:
        status: as query-status has it, such as ``running``.
        migration: the status of the last migration, as query-migrate has it; "" if there was none.
        mapping: the block-bitmap-mapping; None if none was ever set.
        nodes: the block nodes but the scratch node, in the order of their names.
        is_source: whether the last migration went from here to elsewhere.
    """

    status: str
    migration: str
    mapping: BitmapMapping | None
    nodes: tuple[Node, ...]
    is_source: bool = False

    @property
    def is_running(self) -> bool:
        """Whether the guest runs, and may write at any time."""
        return self.status == "running"

    def select(self, names: Sequence[str], wanted: Callable[[Node], bool]) -> list[Node]:
        """Returns the nodes of these names or devices; without names, those that are wanted.

        Raises:
            ValueError: there is no node of such a name.
        """
        by_name = {node.alias: node for node in self.nodes}
        by_name |= {node.name: node for node in self.nodes}
        for name in names:
            if name not in by_name:
                known = ", ".join(escape(node.name) for node in self.nodes if node.has_persistent)
                there = f"persistent bitmaps are on: {known}" if known else "there are no bitmaps"
                raise ValueError(f'there is no node "{escape(name)}"; {there}')
        if names:
            return list({by_name[name].name: by_name[name] for name in names}.values())
        return [node for node in self.nodes if wanted(node)]

    def require_settled(self) -> None:
        """Raises unless this QEMU has its disks, and no migration can take them away.

        A transaction on an inactive disk can end QEMU by an assertion.

        Raises:
            StateError: a migration is under way, or the disks may be inactive.
        """
        if self.migration not in _MIGRATION_IS_OVER:
            state = f"migrating (query-migrate: {escape(self.migration)})"
            required = "done with the migration: wait for its end, or use migrate_cancel"
            raise StateError(state, required, "the machine")
        if self.status == "inmigrate":
            state = "waiting for a migration, and has no disks yet"
            required = "done with the migration: try again once it has completed; do not use cont"
            raise StateError(state, required, "the machine")
        if self.status == "postmigrate":
            state = "in state postmigrate, without its disks"
            required = (
                "running: use the QMP socket of the destination; or cont here, if no other machine "
                "runs on the disks"
            )
            raise StateError(state, required, "the machine")
        if self.status in _WITHOUT_DISKS:
            state = f"in state {escape(self.status)}, without its disks"
            raise StateError(state, f"running: {_USE_CONT}", "the machine")
        # An inactive disk has no bitmaps in memory, so nodes without bitmaps count as well.
        actives = {node.is_active for node in self.nodes}
        if False in actives:
            raise StateError("inactive", f"active: {_USE_CONT}", "a disk")
        # A destination that has not run yet looks the same, and does not have its disks yet. QEMU
        # activates all disks at once, so one that is active is proof enough.
        if self.migration == "completed" and not self.is_running and True not in actives:
            state = f"in state {escape(self.status)} after a migration that completed"
            raise StateError(state, f"running: {_USE_CONT}", "the machine")

    @property
    def has_left(self) -> bool:
        """Whether the last migration completed, and went from here to elsewhere."""
        return self.migration == "completed" and self.is_source

    @property
    def has_arrived(self) -> bool:
        """Whether the last migration completed, and came from elsewhere to here."""
        return self.migration == "completed" and not self.is_source

    @property
    def goes_on(self) -> bool:
        """Whether the machine has its disks although it migrated: another may have written."""
        return self.has_left and self.status not in _WITHOUT_DISKS

    def require_judged(self, node: Node) -> None:
        """Raises if a verdict about the bitmaps of a node is due: they may miss writes.

        Raises:
            StateError: a verdict is due.
        """
        if node.tells_of_a_crash or (node.twin and self.migration in ("completed", "failed")):
            subject = f'the node "{escape(node.name)}"'
            raise StateError("armed, and not judged", "judged first", subject, "judge")
