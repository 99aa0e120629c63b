"""``rescue verdict``: says whether somebody else touched the disks, and what bitmaps miss it.

*Spec*: spec/rescue.md, "Verdict".
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple

from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.qmp import actions, scratch
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.names import SCRATCH_NODE, is_evidence, sentinel_of
from qcow2bm.qmp.nodes import LiveBitmap, Machine, Node, look
from qcow2bm.qmp.start import sha256
from qcow2bm.units import escape

Word = Literal["untouched", "touched", "unknown", "left-over", "not-armed"]
Remedy = Literal["remove", "all-dirty"]
Fate = Literal["kept", "in-doubt", "removed", "all-dirty", "left"]


class Judged(NamedTuple):
    """What became of one bitmap, and why."""

    bitmap: LiveBitmap
    fate: Fate
    reason: str


class Verdict(NamedTuple):
    """What was found on one node; ``is_armed`` is whether it still is."""

    node: str
    word: Word
    reason: str
    is_armed: bool
    bitmaps: tuple[Judged, ...]

    @property
    def is_safe(self) -> bool:
        """Whether nothing is lost, in doubt, or left to do."""
        return not self.is_armed and self.word not in ("touched", "unknown")

    @property
    def is_waiting(self) -> bool:
        """Whether a job has to end before anything can be done."""
        return any(fate == "left" for _, fate, _ in self.bitmaps)


def verdict(
    monitor: Monitor, nodes: Sequence[str] = (), remedy: Remedy | None = None
) -> list[Verdict]:
    """Judges these nodes, or all that were armed, and disarms those that need no decision.

    *Guarantees*: a node is disarmed by the same transaction that does what is due to its bitmaps.
    Until then doing it again finds the same.

    Args:
        monitor: the source of the migration, which goes on.
        nodes: their names.
        remedy: what to do with bitmaps that may miss writes of somebody else: remove them, or
            make them dirty all over. Without it they stay, and the node stays armed.

    Raises:
        StateError: it is not the time, see `Machine.require_settled`.
        QmpError: QEMU does not answer, or refuses.
        ValueError: there is no node of such a name.
    """
    machine = look(monitor)
    machine.require_settled()
    scratch.discard_leftover(monitor)
    chosen = machine.select(nodes, lambda node: any(is_evidence(b.name) for b in node.bitmaps))
    return [_judge(monitor, machine, node, remedy) for node in chosen]


def _judge(monitor: Monitor, machine: Machine, node: Node, remedy: Remedy | None) -> Verdict:
    if not node.twin:
        return _without_twin(monitor, node)
    sentinel = node.find(sentinel_of(node.twin.name))
    word, reason = _evidence(monitor, machine, node, sentinel)
    concerned = _concerned(machine, node)
    busy = [bitmap for bitmap in concerned if bitmap.is_busy]
    if busy and (word == "untouched" or remedy):
        reason += f'; but "{escape(busy[0].name)}" is busy: try again when that has ended'
        return Verdict(node.name, word, reason, True, _fates(node, concerned, "left"))
    if word == "untouched":
        assert sentinel
        _disarm(monitor, node, [actions.merge(node.name, b.name, sentinel.name) for b in concerned])
        return Verdict(node.name, word, reason, False, _fates(node, concerned, "kept"))
    if not remedy:
        return Verdict(node.name, word, reason, True, _fates(node, concerned, "in-doubt"))
    if remedy == "remove":
        _disarm(monitor, node, [actions.remove(node.name, b.name) for b in concerned])
        return Verdict(node.name, word, reason, False, _fates(node, concerned, "removed"))
    with ExitStack() as stack:
        if concerned:
            stack.enter_context(scratch.all_dirty(monitor, node.virtual_size))
        merges = [actions.merge(node.name, b.name, scratch.NAME, SCRATCH_NODE) for b in concerned]
        _disarm(monitor, node, merges)
    return Verdict(node.name, word, reason, False, _fates(node, concerned, "all-dirty"))


def _without_twin(monitor: Monitor, node: Node) -> Verdict:
    """A sentinel alone came with the image: of a source that is not this machine any more."""
    leftovers = [bitmap.name for bitmap in node.bitmaps if is_sentinel(bitmap.name)]
    if not leftovers:
        return Verdict(node.name, "not-armed", "it has no sentinel", False, ())
    _disarm(monitor, node, [])
    reason = "its sentinel is of another machine, or of before this one was started; it is removed"
    return Verdict(node.name, "left-over", reason, False, ())


def _evidence(
    monitor: Monitor, machine: Machine, node: Node, sentinel: LiveBitmap | None
) -> tuple[Word, str]:
    twin = node.twin
    assert twin
    if not sentinel:
        return "touched", "the sentinel is gone: a program wrote that does not know bitmaps"
    if sentinel.is_inconsistent:
        return "touched", "somebody opened the disk for writing, and did not end properly"
    if machine.migration not in ("", "none") and not _stayed_here(machine, node, sentinel):
        return "unknown", "no block-bitmap-mapping left the sentinel out, so it travelled"
    # Both at once, so that the guest cannot write between the two looks.
    recording = [bitmap for bitmap in (sentinel, twin) if bitmap.is_recording]
    if recording:
        monitor.transaction([actions.disable(node.name, bitmap.name) for bitmap in recording])
    digests = sha256(monitor, sentinel), sha256(monitor, twin)
    if None in digests:
        return "unknown", "QEMU does not give digests of bitmaps"
    if digests[0] != digests[1]:
        return "touched", "the sentinel has writes that this machine did not make, or misses some"
    return "untouched", "the sentinel has what this machine wrote, and nothing else"


def _stayed_here(machine: Machine, node: Node, sentinel: LiveBitmap) -> bool:
    if machine.mapping is None:
        return False
    return sentinel.name not in _mapped(machine, node)


def _mapped(machine: Machine, node: Node) -> set[str]:
    """The bitmaps of a node that travel by the mapping."""
    listed = [one for one in machine.mapping or [] if one["node-name"] == node.name]
    return {bitmap["name"] for one in listed for bitmap in one["bitmaps"]}


def _concerned(machine: Machine, node: Node) -> list[LiveBitmap]:
    """Those that recorded here, and that nobody carried on for us in the image.

    The others were stored, and loaded again when the disk came back.
    """
    return [
        bitmap
        for bitmap in node.bitmaps
        if bitmap.is_recording
        and not bitmap.is_inconsistent
        and not is_evidence(bitmap.name)
        and (
            not bitmap.is_persistent
            or machine.mapping is None
            or bitmap.name in _mapped(machine, node)
        )
    ]


def _fates(node: Node, concerned: Sequence[LiveBitmap], fate: Fate) -> tuple[Judged, ...]:
    return tuple(
        Judged(bitmap, fate, "")
        if bitmap in concerned
        else Judged(bitmap, "kept", "inconsistent already")
        if bitmap.is_inconsistent
        else Judged(bitmap, "kept", "stored and loaded again")
        if bitmap.is_recording
        else Judged(bitmap, "kept", "it records no writes, and misses none")
        for bitmap in node.bitmaps
        if not is_evidence(bitmap.name)
    )


def _disarm(monitor: Monitor, node: Node, work: Sequence[actions.Action]) -> None:
    """Removes what was added for the verdict, together with the work that it calls for."""
    evidence = [b.name for b in node.bitmaps if is_evidence(b.name)]
    removals = [actions.remove(node.name, name) for name in evidence]
    monitor.transaction([*work, *removals])
