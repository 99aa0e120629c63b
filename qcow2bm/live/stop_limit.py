"""Keeps a stop to a time: new tails follow until storing them takes no longer.

*Spec*: spec/live.md, "Limit".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qcow2bm.live import recording, stop, tail
from qcow2bm.live.offload_file import OffloadFile
from qcow2bm.log import logger
from qcow2bm.qmp.bitmap_copies import copy_bitmaps
from qcow2bm.qmp.commands import QmpCommands
from qcow2bm.qmp.machine import Machine
from qcow2bm.qmp.queries import query_machine

_MOST_ROUNDS = 10


@dataclass(frozen=True)
class Pace:
    """How many bytes of bits QEMU stored, and in how many seconds."""

    bytes: int = 0
    seconds: float = 0

    def __add__(self, other: Pace) -> Pace:
        """Returns both together."""
        return Pace(self.bytes + other.bytes, self.seconds + other.seconds)

    def seconds_for(self, bytes: int) -> float:
        """Returns how long so many bytes take, once something was stored."""
        return self.seconds * bytes / self.bytes

    def bytes_in(self, seconds: float) -> float:
        """Returns how many bytes are stored in so many seconds."""
        return self.bytes * seconds / self.seconds if self.seconds else 0


class Limited(NamedTuple):
    """The result of `limit_stop`.

    Attributes:
        fits: whether a stop takes no longer than it may.
        stop_bytes: how many bytes of bits a stop stores now, at most.
        stop_seconds: how long that takes.
        rounds: how often new tails followed.
        fitting_granularity: in bytes, of a tail that keeps to the limit wherever the guest writes;
            None if the tail does so, or if no granularity does.
    """

    fits: bool
    stop_bytes: int
    stop_seconds: float
    rounds: int
    fitting_granularity: int | None


def limit_stop(
    monitor: QmpCommands, file: OffloadFile, names: Sequence[str], pace: Pace, most_seconds: float
) -> Limited:
    """Lets new tails follow until a stop takes no longer than ``most_seconds``.

    Args:
        monitor: the machine, whose bitmaps are in the file.
        file: of the offload.
        names: of the nodes, in the order of the plan.
        pace: how fast QEMU stored bits up to now.
        most_seconds: how long QEMU may take to store bits.

    Raises as `recording.roll` does.
    """
    rounds = 0
    if not pace.bytes:
        pace = _measured(monitor, file, names[0])
    while True:
        machine = query_machine(monitor)
        stop_bytes = stop.bytes_at_stop(machine, stop.stored_bitmaps(machine))
        seconds = pace.seconds_for(stop_bytes)
        tails = {number: _bytes_of(machine, file, number) for number in range(len(names))}
        dirty = {number: size for number, size in tails.items() if size}
        if seconds <= most_seconds:
            return Limited(True, stop_bytes, seconds, rounds, None)
        if not dirty or rounds == _MOST_ROUNDS:
            granularity = _fitting(machine, file, names, pace, most_seconds)
            return Limited(False, stop_bytes, seconds, rounds, granularity)
        rounds += 1
        logger.info("live offload: a stop takes %.1f ms: round %d", 1e3 * seconds, rounds)
        for number, size in dirty.items():
            pace += Pace(size, recording.roll(monitor, file, number, names[number]))


def _measured(monitor: QmpCommands, file: OffloadFile, name: str) -> Pace:
    """How fast QEMU stores the tail and the canary of the first node, which has a bit."""
    first = file.tail(0)
    node = recording.sound_node(monitor, first, name)
    bitmaps = [bitmap for bitmap in node.bitmaps if bitmap.name in (first.name, first.canary_name)]
    size = sum(stop.bytes_of(node, bitmap) for bitmap in bitmaps)
    return Pace(size, copy_bitmaps(monitor, node, bitmaps).seconds)


def _bytes_of(machine: Machine, file: OffloadFile, number: int) -> int:
    """How many bytes of bits the tail of a node takes to store now."""
    name = file.tail(number).name
    return stop.bytes_at_stop(machine, filter(None, (node.find(name) for node in machine.nodes)))


def _fitting(
    machine: Machine, file: OffloadFile, names: Sequence[str], pace: Pace, most_seconds: float
) -> int | None:
    """The finest granularity with which a tail full of bits would fit, beside what stays."""
    nodes = {node.name: node for node in machine.nodes}
    ours = {name for one in file.tails for name in (one.name, one.canary_name)}
    others = [bitmap for bitmap in stop.stored_bitmaps(machine) if bitmap.name not in ours]
    room = pace.bytes_in(most_seconds) - stop.bytes_at_stop(machine, others)
    granularity = file.plan.tail_granularity
    while (granularity := 2 * granularity) <= tail.MAX_GRANULARITY:
        tails = [one._replace(granularity=granularity) for one in file.tails]
        needed = (
            stop.most_bytes_of_tail(nodes[name], one)
            for name, one in zip(names, tails, strict=True)
        )
        if sum(needed) <= room:
            return granularity
    return None
