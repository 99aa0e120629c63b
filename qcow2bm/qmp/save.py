"""``sidecar save --qmp``: the bitmaps that a running QEMU has in memory.

QMP does not give bits. So they are merged into bitmaps of a scratch image, all in one transaction,
which QEMU stores there as soon as the image is closed. It is a file without a name, which QEMU is
handed over the socket: it needs no access to any folder of ours.

*Spec*: spec/sidecar.md, "A running machine".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple, cast

from qcow2bm.api import open, sidecar
from qcow2bm.clusters.empty_image import build_empty_image
from qcow2bm.errors import BitmapError, QmpError, StateError, StorageError
from qcow2bm.migration.sidecar import SavedBitmap, Sidecar
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import SCRATCH_NODE
from qcow2bm.qmp.nodes import Machine, Node, NodeBitmap, query_machine
from qcow2bm.qmp.veto import sha256
from qcow2bm.units import escape


class Omission(NamedTuple):
    """A persistent bitmap that cannot be saved, and why."""

    bitmap: NodeBitmap
    reason: str


class MachineSidecar(NamedTuple):
    """The bitmaps of a node of a running machine; ``left_out`` are those that cannot be saved."""

    sidecar: Sidecar
    left_out: tuple[Omission, ...]


class NodeChoiceError(ValueError):
    """Several ``nodes`` have persistent bitmaps, and none was chosen."""

    def __init__(self, nodes: Sequence[str]) -> None:
        super().__init__(nodes)
        self.nodes = tuple(nodes)

    def __str__(self) -> str:
        listed = ", ".join(f'"{escape(node)}"' for node in self.nodes)
        return f"several nodes have bitmaps: choose one ({listed})"


def save_sidecar(monitor: Monitor, name: str | None = None) -> MachineSidecar:
    """Copies the persistent bitmaps of a node, as they are now, into a `Sidecar`.

    All bitmaps are of one moment, unless an iothread serves the disk: then each bitmap is of some
    moment during the transaction.

    *Guarantees*: the machine's own nodes and bitmaps do not change. The scratch node that is added
    is removed at the end; after an interruption, by the next call of this or another function of
    `qcow2bm.qmp.rescue`.

    Args:
        monitor: the machine.
        name: the node or device; not needed if only one node has persistent bitmaps.

    Raises:
        NodeChoiceError: ``name`` is needed.
        StateError: the machine's state does not allow it, see `Machine.require_settled`; or the
            verdict about the last migration is due.
        QmpError: QEMU does not answer, refuses, or did not store the bitmaps.
        StorageError: there is no room for temporary files.
        ValueError: there is no such node, or it has no bitmaps that can be saved.
    """
    machine = query_machine(monitor)
    machine.require_settled()
    scratch.discard_leftover(monitor)
    node = _chosen(machine, name)
    if node.tells_of_a_death or (node.twin and machine.migration in ("completed", "failed")):
        subject = f'the node "{escape(node.name)}"'
        raise StateError("armed, and not judged", "judged by rescue verdict first", subject)
    persistent = [bitmap for bitmap in node.bitmaps if bitmap.is_persistent]
    usable = [bitmap for bitmap in persistent if bitmap.is_usable]
    left_out = tuple(Omission(b, _why_not(b)) for b in persistent if not b.is_usable)
    if not usable:
        reasons = (f'bitmap "{escape(b.name)}" is {reason}' for b, reason in left_out)
        raise ValueError("; ".join(reasons) or "has no persistent bitmaps")
    with _blank(node.virtual_size) as file:
        digests = _store(monitor, node, usable, file.fileno())
        bitmaps = _read(file, usable, digests)
    return MachineSidecar(Sidecar(node.virtual_size, b"", tuple(bitmaps)), left_out)


def _chosen(machine: Machine, name: str | None) -> Node:
    nodes = machine.select([] if name is None else [name], lambda node: node.has_persistent)
    if not nodes:
        raise ValueError("no node has persistent bitmaps")
    if len(nodes) > 1:
        raise NodeChoiceError([node.name for node in nodes])
    return nodes[0]


def _why_not(bitmap: NodeBitmap) -> str:
    return "inconsistent" if bitmap.is_inconsistent else "busy: a job uses it"


@contextmanager
def _blank(virtual_size: int) -> Iterator[BinaryIO]:
    """An image without bitmaps, in a file without a name."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(TemporaryFile(buffering=0))
            blank = build_empty_image(virtual_size)
            file.write(blank.head)
            file.truncate(blank.length)
        except OSError as error:
            raise StorageError.from_os(error, "a temporary file", 0, 0, "writing") from error
        yield cast("BinaryIO", file)


def _store(
    monitor: Monitor, node: Node, bitmaps: Sequence[NodeBitmap], descriptor: int
) -> list[str | None]:
    """Has QEMU store copies of bitmaps in an image; their digests, where it gives them."""
    fdset = monitor.lend(descriptor)
    try:
        image: dict[str, Any] = {"driver": "file", "filename": f"/dev/fdset/{fdset}"}
        try:
            monitor.execute(
                "blockdev-add", {"driver": "qcow2", "node-name": SCRATCH_NODE, "file": image}
            )
            monitor.transaction([*map(_added, bitmaps), *(_merged(node, b) for b in bitmaps)])
            digests = [sha256(monitor, b._replace(node=SCRATCH_NODE)) for b in bitmaps]
        except BaseException:
            with suppress(QmpError):  # the one that is under way says more
                scratch.discard(monitor)
            raise
        scratch.discard(monitor)
    finally:
        with suppress(QmpError):  # the next command here does it
            monitor.take_back(fdset)
    return digests


def _added(bitmap: NodeBitmap) -> actions.Action:
    name, granularity = bitmap.name, bitmap.granularity
    return actions.add(SCRATCH_NODE, name, granularity, persistent=True, enabled=False)


def _merged(node: Node, bitmap: NodeBitmap) -> actions.Action:
    return actions.merge(SCRATCH_NODE, bitmap.name, bitmap.name, node.name)


def _read(
    file: BinaryIO, bitmaps: Sequence[NodeBitmap], digests: Sequence[str | None]
) -> list[SavedBitmap]:
    """What QEMU stored, which is compared with what it said of it."""
    found = []
    with open(file) as image:
        for live, digest in zip(bitmaps, digests, strict=True):
            try:
                (bitmap,) = sidecar.collect(image, [image.bitmaps[live.name]]).bitmaps
            except BitmapError as error:
                raise QmpError("blockdev-del", f"QEMU did not store a bitmap: {error}") from error
            if digest not in (None, bitmap.sha256()):
                reason = f'the bits of "{escape(live.name)}" are not what QEMU said they were'
                raise QmpError("blockdev-del", reason)
            found.append(bitmap._replace(enabled=live.is_recording))
    return found
