"""What there is in a running QEMU: its state, its block nodes and their bitmaps, as values.

*Spec*: spec/rescue.md, "When".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from qcow2bm.errors import QmpError, QmpRefusedError, StateError
from qcow2bm.migration.sentinel import CANARY_SUFFIX, is_sentinel
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import SCRATCH_NODE, is_evidence, sentinel_of
from qcow2bm.units import escape

_T = TypeVar("_T")

_FILTERS = (  # drivers that only pass requests on, by what QEMU calls them
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "throttle",
)
_PROBE = 'qemu-io {} "write 0 0"'

_SETTLED = ("", "none", "cancelled", "failed", "completed")
_WITHOUT_DISKS = (  # states of a machine in which its disks may be inactive, or change hands
    "colo",
    "finish-migrate",
    "inmigrate",
    "postmigrate",
    "preconfig",
    "restore-vm",
    "save-vm",
)


class NodeBitmap(NamedTuple):
    """A bitmap in QEMU's memory.

    ``dirty_bytes`` counts whole granules, also where the last one reaches beyond the disk.
    """

    node: str
    name: str
    granularity: int
    dirty_bytes: int
    is_recording: bool
    is_persistent: bool
    is_busy: bool
    is_inconsistent: bool

    @property
    def is_usable(self) -> bool:
        """Whether QEMU lets it be changed."""
        return not self.is_busy and not self.is_inconsistent


class Node(NamedTuple):
    """A block node.

    ``alias`` is what QEMU calls it in a migration stream by default. ``is_active`` is None where
    that is not known, or not asked because no migration was ever begun.
    """

    name: str
    alias: str
    virtual_size: int
    cluster_size: int | None
    is_read_only: bool
    is_active: bool | None
    bitmaps: tuple[NodeBitmap, ...]

    def find(self, name: str) -> NodeBitmap | None:
        """The bitmap of that name."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)

    @property
    def twin(self) -> NodeBitmap | None:
        """The twin of the sentinel it is armed with; None if it is not armed.

        What is persistent is none, whatever it is called: it came from somewhere else.
        """
        return next((b for b in self.bitmaps if sentinel_of(b.name) and not b.is_persistent), None)

    @property
    def evidence(self) -> list[str]:
        """The names of what was added here to find out who writes."""
        return [bitmap.name for bitmap in self.bitmaps if is_evidence(bitmap.name)]

    @property
    def subjects(self) -> list[NodeBitmap]:
        """All other bitmaps."""
        return [bitmap for bitmap in self.bitmaps if not is_evidence(bitmap.name)]

    @property
    def tells_of_a_death(self) -> bool:
        """Whether a sentinel is inconsistent beside bitmaps that are not, which may miss writes."""
        is_dead = any(
            bitmap.is_inconsistent
            for bitmap in self.bitmaps
            # One with a canary was made by somebody else, who looks after it.
            if is_sentinel(bitmap.name)
            and not bitmap.name.endswith(CANARY_SUFFIX)
            and not self.find(bitmap.name + CANARY_SUFFIX)
        )
        return is_dead and not all(bitmap.is_inconsistent for bitmap in self.subjects)

    @property
    def has_persistent(self) -> bool:
        """Whether there is anything to lose here."""
        return any(bitmap.is_persistent for bitmap in self.subjects)


class Machine(NamedTuple):
    """A running QEMU.

    ``status`` and ``migration`` are the words of query-status and query-migrate, the latter empty
    if there was none. ``mapping`` is the block-bitmap-mapping as it was set, if it was.
    """

    status: str
    migration: str
    mapping: list[dict[str, Any]] | None
    nodes: tuple[Node, ...]

    @property
    def is_running(self) -> bool:
        """Whether the guest runs, and may write at any time."""
        return self.status == "running"

    def select(self, names: Sequence[str], wanted: Callable[[Node], bool]) -> list[Node]:
        """The nodes of these names, or devices; without names those that are wanted.

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
            return [by_name[name] for name in dict.fromkeys(names)]
        return [node for node in self.nodes if wanted(node)]

    def require_settled(self) -> None:
        """Does nothing if disks are here and stay here.

        A transaction on a disk that is inactive can make QEMU end at once, by an assertion.

        Raises:
            StateError: a migration is under way, or the disks may be inactive.
        """
        if self.migration not in _SETTLED:
            state = f"migrating (query-migrate: {escape(self.migration)})"
            raise StateError(state, "done with that, or made to by migrate_cancel", "the machine")
        if self.status in _WITHOUT_DISKS:
            state = f"in state {escape(self.status)}, without its disks"
            raise StateError(state, "running again; cont it if no other one is", "the machine")
        actives = {node.is_active for node in self.nodes if node.bitmaps}
        if False in actives:
            raise StateError("inactive", "active; cont the machine if no other one is", "a disk")
        # A destination that has not run yet looks the same, and has not taken over its disks.
        if self.migration == "completed" and not self.is_running and None in actives:
            state = f"in state {escape(self.status)} after a migration that completed"
            raise StateError(state, "running; cont it if no other one is", "the machine")


def query_machine(monitor: Monitor) -> Machine:
    """What there is now.

    Raises:
        StateError: QEMU has given up a disk.
        QmpError: QEMU does not answer, or not what it should.
    """
    status = monitor.execute("query-status")
    migration = monitor.execute("query-migrate")
    parameters = monitor.execute("query-migrate-parameters")
    devices = monitor.execute("query-block")
    nodes = query_nodes(monitor, devices)
    machine = _understood(
        "query-status",
        lambda: Machine(
            str(status["status"]),
            str(migration.get("status", "")),
            parameters.get("block-bitmap-mapping"),
            nodes,
        ),
    )
    if machine.migration in ("", "none"):
        return machine
    return machine._replace(nodes=tuple(_probed(monitor, node) for node in nodes))


def _probed(monitor: Monitor, node: Node) -> Node:
    """With `Node.is_active` where QEMU does not say: one that is not refuses an empty write."""
    if node.is_active is not None or node.is_read_only or not node.bitmaps:
        return node
    try:
        line = {"command-line": _PROBE.format(node.name)}
        said = str(monitor.execute("human-monitor-command", line))
    except QmpRefusedError:
        return node
    return node._replace(is_active="read-only" not in said)


def query_nodes(
    monitor: Monitor, devices: Sequence[dict[str, Any]] | None = None
) -> tuple[Node, ...]:
    """The nodes that there are now, but the scratch node; raises as `query_machine` does.

    ``devices`` is the answer of query-block; without it, aliases are the names of nodes.
    """
    try:
        found = monitor.execute("query-named-block-nodes", {"flat": True})
    except QmpRefusedError as error:
        if "is ejected" not in error.reason:
            raise
        # Nothing can be asked of it any more. It has nothing either that it could store wrongly.
        state = f"without a disk ({error.reason})"
        required = "ended with quit and started anew; its image has what was stored last"
        raise StateError(state, required, "the machine") from error

    def parse() -> tuple[Node, ...]:
        aliases = _aliases(monitor, devices or [], found)
        nodes = [_node(one, aliases) for one in found if one["node-name"] != SCRATCH_NODE]
        return tuple(sorted(nodes, key=lambda node: node.name))

    return _understood("query-named-block-nodes", parse)


def _aliases(
    monitor: Monitor, devices: Sequence[dict[str, Any]], nodes: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """What QEMU calls nodes by the device they belong to, below filters without bitmaps."""
    by_name = {node["node-name"]: node for node in nodes}
    below: dict[str, str] | None = None
    aliases = {}
    for device in devices:
        if not device["device"] or "inserted" not in device:
            continue
        name = device["inserted"]["node-name"]
        while (node := by_name.get(name)) and node["drv"] in _FILTERS and not _has_bitmaps(node):
            below = _children(monitor) if below is None else below
            if name not in below:
                break
            name = below.pop(name)
        aliases[name] = device["device"]
    return aliases


def _has_bitmaps(node: dict[str, Any]) -> bool:
    return any(bitmap.get("name") for bitmap in node.get("dirty-bitmaps", []))


def _children(monitor: Monitor) -> dict[str, str]:
    """The node below each node; empty where QEMU does not tell: it is a command for debugging."""
    try:
        graph = monitor.execute("x-debug-query-block-graph")
    except QmpRefusedError:
        return {}
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    return {
        names[edge["parent"]]: names[edge["child"]]
        for edge in graph["edges"]
        if edge["name"] in ("file", "backing")
    }


def query_bitmap(monitor: Monitor, node: str, name: str) -> NodeBitmap | None:
    """The bitmap of that name as it is now; raises as `query_machine` does."""
    return next((n.find(name) for n in query_nodes(monitor) if n.name == node), None)


def _node(found: dict[str, Any], aliases: dict[str, str]) -> Node:
    name = str(found["node-name"])
    bitmaps = [_bitmap(name, one) for one in found.get("dirty-bitmaps", []) if one.get("name")]
    return Node(
        name,
        aliases.get(name, name),
        int(found["image"]["virtual-size"]),
        found["image"].get("cluster-size"),
        bool(found["ro"]),
        found.get("active"),
        tuple(sorted(bitmaps, key=lambda bitmap: bitmap.name)),
    )


def _bitmap(node: str, found: dict[str, Any]) -> NodeBitmap:
    return NodeBitmap(
        node,
        str(found["name"]),
        int(found["granularity"]),
        int(found["count"]),
        bool(found["recording"]),
        bool(found["persistent"]),
        bool(found["busy"]),
        bool(found.get("inconsistent", False)),
    )


def _understood(command: str, parse: Callable[[], _T]) -> _T:
    try:
        return parse()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise QmpError(command, "the answer is not what QEMU's would be") from error
