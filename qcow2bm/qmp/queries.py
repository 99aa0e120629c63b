"""Asks a running QEMU for its state, and returns typed values.

Every answer of QEMU is parsed here.

*Spec*: spec/rescue.md, "When" and "Arm".
"""

from __future__ import annotations

from typing import cast

from qcow2bm.errors import QmpRefusedError, StateError
from qcow2bm.qmp.aliases import Device, default_aliases
from qcow2bm.qmp.answers import Answer
from qcow2bm.qmp.commands import LENT, QmpCommands
from qcow2bm.qmp.machine import BitmapMapping, Machine, Node, NodeBitmap
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.units import escape

HUMAN_MONITOR_COMMAND = "human-monitor-command"


def query_machine(monitor: QmpCommands) -> Machine:
    """Returns the state of a machine.

    Raises:
        StateError: QEMU has ejected a disk.
        QmpError: QEMU does not answer, or a field of its answer is missing.
    """
    status = monitor.execute("query-status")["status"].text()
    answer = monitor.execute("query-migrate")
    migration = answer.get("status")
    is_source = answer.get("total-time") is not None  # which a destination does not know
    mapping = _mapping(monitor.execute("query-migrate-parameters"))
    block = monitor.execute("query-block")
    nodes = query_nodes(monitor)  # before the devices are parsed: QEMU may have ejected a disk
    devices = [device for answer in block.items() if (device := _device(answer))]
    aliases = default_aliases(devices, nodes, lambda: _children(monitor))
    nodes = [node._replace(alias=aliases.get(node.name, node.name)) for node in nodes]
    if migration and migration.text() != "none":
        nodes = [_probed(monitor, node) for node in nodes]
    last = migration.text() if migration else ""
    return Machine(status, last, mapping, tuple(nodes), is_source)


def query_nodes(monitor: QmpCommands) -> list[Node]:
    """Returns the block nodes but the scratch node, in the order of their names.

    The alias of each node is its name: `query_machine` knows better. Raises as `query_machine`
    does.
    """
    try:
        answer = monitor.execute("query-named-block-nodes", {"flat": True})
    except QmpRefusedError as error:
        if "is ejected" not in error.reason:
            raise
        # QEMU refuses every query about nodes from now on. It stores nothing on that disk either.
        state = f"without a disk ({escape(error.reason)})"
        required = "ended with quit and started again; the image has what was stored last"
        raise StateError(state, required, "the machine") from error
    nodes = [_node(one) for one in answer.items() if one["node-name"].text() != SCRATCH_NODE]
    return sorted(nodes, key=lambda node: node.name)


def query_bitmap(monitor: QmpCommands, node: str, name: str) -> NodeBitmap | None:
    """Returns a bitmap as it is now; None if there is none. Raises as `query_machine` does."""
    return next((n.find(name) for n in query_nodes(monitor) if n.name == node), None)


def query_digest(monitor: QmpCommands, bitmap: NodeBitmap) -> str | None:
    """Returns the SHA-256 of a bitmap's bits, in hex; None where QEMU does not give it.

    It is a command for debugging, which a QEMU may lack.

    Raises:
        QmpError: QEMU does not answer.
    """
    where = {"node": bitmap.node, "name": bitmap.name}
    try:
        return monitor.execute("x-debug-block-dirty-bitmap-sha256", where)["sha256"].text()
    except QmpRefusedError:
        return None


def query_scratch_bitmaps(monitor: QmpCommands) -> dict[str, int] | None:
    """Returns the dirty bytes of each bitmap of the scratch node; None if there is no such node."""
    for answer in monitor.execute("query-named-block-nodes", {"flat": True}).items():
        if answer["node-name"].text() == SCRATCH_NODE:
            found = answer.items_of("dirty-bitmaps")
            return {bitmap["name"].text(): bitmap["count"].number() for bitmap in found}
    return None


def query_lent_files(monitor: QmpCommands) -> list[int]:
    """Returns the numbers of the fdsets of the files that were lent to QEMU."""
    return [
        fdset["fdset-id"].number()
        for fdset in monitor.execute("query-fdsets").items()
        if any(_is_lent(descriptor) for descriptor in fdset.items_of("fds"))
    ]


def _is_lent(descriptor: Answer) -> bool:
    label = descriptor.get("opaque")
    return label is not None and label.text() == LENT


def run_qemu_io(monitor: QmpCommands, node: str, command: str) -> str:
    """Has QEMU run a command of qemu-io on a node, and returns what it prints, in one line."""
    line = {"command-line": f'qemu-io {node} "{command}"'}
    printed = monitor.execute(HUMAN_MONITOR_COMMAND, line).text()
    return escape(" ".join(printed.split()))


def _mapping(parameters: Answer) -> BitmapMapping | None:
    """The block-bitmap-mapping as QEMU has it: fields that are not known here stay in it."""
    answer = parameters.get("block-bitmap-mapping")
    if not answer:
        return None
    for node in answer.items():
        node["node-name"].text()
        for bitmap in node["bitmaps"].items():
            bitmap["name"].text()
    return cast("BitmapMapping", answer.raw)


def _device(answer: Answer) -> Device | None:
    """A device that has a name and a disk; None for another."""
    name, disk = answer["device"].text(), answer.get("inserted")
    return Device(name, disk["node-name"].text()) if name and disk else None


def _node(answer: Answer) -> Node:
    name, image = answer["node-name"].text(), answer["image"]
    cluster_size, active = image.get("cluster-size"), answer.get("active")
    listed = enumerate(answer.items_of("dirty-bitmaps"))
    found = (_bitmap(name, one, place) for place, one in listed)
    bitmaps = sorted((bitmap for bitmap in found if bitmap), key=lambda bitmap: bitmap.name)
    return Node(
        name,
        name,
        answer["drv"].text(),
        image["virtual-size"].number(),
        _cluster_size(cluster_size),
        answer["ro"].flag(),
        active.flag() if active else None,
        tuple(bitmaps),
    )


def _cluster_size(answer: Answer | None) -> int | None:
    """A cluster size that a qcow2 image can have; what is no image may have any other."""
    number = answer.number() if answer else 0
    return number if number.bit_count() == 1 else None


def _bitmap(node: str, answer: Answer, place: int) -> NodeBitmap | None:
    """A bitmap that has a name; None for one of QEMU's own, which jobs use."""
    name, inconsistent = answer.get("name"), answer.get("inconsistent")
    if not name or not name.text():
        return None
    return NodeBitmap(
        node,
        name.text(),
        answer["granularity"].power_of_two(),
        answer["count"].number(),
        answer["recording"].flag(),
        answer["persistent"].flag(),
        answer["busy"].flag(),
        inconsistent.flag() if inconsistent else False,
        place,
    )


def _children(monitor: QmpCommands) -> dict[str, str]:
    """The node below each node; none where QEMU does not tell: it is a command for debugging."""
    try:
        graph = monitor.execute("x-debug-query-block-graph")
    except QmpRefusedError:
        return {}
    names = {node["id"].number(): node["name"].text() for node in graph["nodes"].items()}
    return {
        names[parent]: names[child]
        for edge in graph["edges"].items()
        if edge["name"].text() in ("file", "backing")
        and (parent := edge["parent"].number()) in names
        and (child := edge["child"].number()) in names
    }


def _probed(monitor: QmpCommands, node: Node) -> Node:
    """Sets `Node.is_active` where QEMU does not tell: an inactive node refuses an empty write."""
    if node.is_active is not None or node.is_read_only or not node.bitmaps:
        return node
    try:
        printed = run_qemu_io(monitor, node.name, "write 0 0")
    except QmpRefusedError:
        return node
    return node._replace(is_active="read-only" not in printed)
