"""Making sure, before the guest writes, that a crash cannot lose the mark of the write.

A write may begin if the bit of its *region* is durable in the intent bitmap, or if its granules are
*settled*: durable in every bitmap that is tracked. Whoever has to wait for a bit waits for the next
barrier together with all others. Bits of regions that are settled are taken out again, some time
after they were set.

*Spec*: spec/intent.md.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qcow2bm.bits import pure_python
from qcow2bm.bits.algebra import coarsen, refine
from qcow2bm.clusters.plan import SECTOR_SIZE
from qcow2bm.errors import StateError
from qcow2bm.storage.write_guard import WriteGuard
from qcow2bm.tracker.fanout import Recording
from qcow2bm.tracker.waiting import Changes
from qcow2bm.units import align_up, ceil_div

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Octets = NDArray[np.uint8]

_MAX_AHEAD_BYTES = 256 << 20
_GROWTH = 16
_STREAMS = 64
"""So many places are remembered at which a program may go on writing."""


class Snapshot(NamedTuple):
    """What was marked when a flush began, and the regions whose bits may be taken out after it."""

    marked: Octets
    regions: Octets


class IntentLog:
    """The bits of an intent bitmap, in memory and on disk.

    Attributes:
        barriers: how many there were.
        waits: how many writes had to wait for one.
    """

    def __init__(self, storage: WriteGuard, on_failure: Callable[[BaseException], None]) -> None:
        """Before a write may begin, `place` and `follow` are called.

        Args:
            storage: of the image.
            on_failure: called once, in another thread, if a bit could not be stored.
        """
        self.barriers = self.waits = 0
        self._storage, self._on_failure = storage, on_failure
        self._changes = Changes()
        self._storing = Lock()  # one at a time, so that what is on disk is never older
        self._failure: BaseException | None = None
        self._refusal = "not begun"  # the state in which nothing is stored; "" if bits are stored
        self._is_aside = False
        self._is_due = self._is_working = False
        self._placed = 0  # how often `place` was called: numbers of regions mean others since
        # By the region behind those that were set ahead, and by one in their middle: their number.
        self._ends: dict[int, int] = {}
        self._middles: dict[int, tuple[int, int]] = {}
        self._forget_settled()

    # --- what it is about -----------------------------------------------------------------------

    def place(self, granularity: int, offset: int, octets: bytes) -> None:
        """Says where the bits are in the image, and what they are there: for a new bitmap.

        Args:
            granularity: of a region, in guest bytes.
            offset: of the cluster, in host bytes.
            octets: the bits as they are stored.
        """
        with self._changes.lock:
            self._granularity = granularity
            self._most_ahead = max(1, _MAX_AHEAD_BYTES // granularity)
            self._ends.clear()
            self._middles.clear()
            self._offset = offset
            self._wanted = bytearray(octets)  # bits to be on disk
            self._durable = bytearray(octets)  # no write of less has come since they were durable
            self._aged = np.zeros(len(octets), np.uint8)  # set when the flush before last began
            self._stored = bytes(octets)
            self._is_due = self._is_aside = False
            self._refusal = ""
            self._placed += 1
            self._changes.announce()

    def stand_aside(self) -> None:
        """Lets all writes pass: there is no bitmap any more that could be recovered."""
        with self._changes.lock:
            self._is_aside = True
            self._changes.announce()

    def move(self, offset: int) -> None:
        """Says where the same bits are after a commit."""
        with self._changes.lock:
            self._offset = offset

    def follow(self, recording: Recording) -> None:
        """Says where marks go from now on; no write is in flight. Nothing is settled there."""
        self._recording = recording
        shift, octets = recording.granularity.bit_length() - 1, recording.bits.octets
        self._settled = recording.virtual_size, shift, bytearray(len(octets))

    def unfollow(self) -> None:
        """Says that marks are about to go elsewhere: nothing is settled until `follow`."""
        self._forget_settled()

    def _forget_settled(self) -> None:
        # The size of the disk, the exponent of the granularity, and the bits of the granules that
        # are settled: one value, so that no thread sees parts of two.
        self._settled = 0, 0, bytearray()

    # --- before a write -------------------------------------------------------------------------

    def wait(self, start: int, length: int) -> None:
        """Returns when the guest may write to a range that is marked already.

        Raises:
            StateError: a bit could not be stored, or tracking does not go on.
        """
        if not length:
            return
        with self._changes.lock:
            if self._is_ready(start, length):
                return
            is_admitted = self._ask(int(start), int(length))
            if not is_admitted():
                self.waits += 1
                self._changes.wait_for(is_admitted)

    async def until_written(self, start: int, length: int) -> None:
        """`wait` in a task of asyncio."""
        if not length:
            return
        with self._changes.lock:
            if self._is_ready(start, length):
                return
            is_admitted = self._ask(int(start), int(length))
            if is_admitted():
                return
            self.waits += 1
        await self._changes.until(is_admitted)

    def wait_many(self, ranges: NDArray[np.int64]) -> None:
        """`wait` for many ranges: (start, length) of int64[n, 2]; one barrier serves all."""
        ranges = np.asarray(ranges, np.int64).reshape(-1, 2)
        with self._changes.lock:
            if not (self._is_aside or self._refusal):
                for start, length in ranges.tolist():
                    self._want(start, length, is_ahead=False)
        for start, length in ranges.tolist():
            if not self.is_settled(start, length):
                self.wait(start, length)

    def is_settled(self, start: int, length: int) -> bool:
        """Whether the granules of a range are durable in every tracked bitmap.

        Then they are marked, too: nothing is left to be done. No lock is needed: a granule that is
        settled stays so while a write is in flight. What is not on the disk is never settled, nor
        is anything once tracking has ended.
        """
        size, shift, settled = self._settled
        end = start + length
        if not 0 <= start < end <= size:
            return False
        first, last = start >> shift, end - 1 >> shift
        is_first = settled[first >> 3] >> (first & 7) & 1 == 1
        if first == last or not is_first:  # most often
            return is_first
        low, high = first >> 3, (last >> 3) + 1
        part = settled[low:high]
        filled = part[:]
        pure_python.fill(filled, first - 8 * low, last + 1 - 8 * low, is_set=True)
        return filled == part

    def _is_ready(self, start: int, length: int) -> bool:
        """Whether a write may begin, and nothing is to be stored ahead: what is so most often.

        The lock is held: a region that is durable now stays so until the write is stored.
        """
        if self._is_aside or self._refusal:
            return False
        first, last = start // self._granularity, (start + length - 1) // self._granularity
        if first != last or first in self._middles:
            return False
        return self._durable[first >> 3] >> (first & 7) & 1 == 1

    def _ask(self, start: int, length: int) -> Callable[[], bool]:
        """Wants the regions of a range; returns a function that says whether they are durable.

        The function raises what `wait` does. The lock is held, here and there.
        """
        if self._is_aside or self._refusal:
            return lambda: self._is_admitted(0, 0, self._placed)
        first, stop = self._want(start, length)
        placed = self._placed
        return lambda: self._is_admitted(first, stop, placed)

    def _want(self, start: int, length: int, *, is_ahead: bool = True) -> tuple[int, int]:
        """Lets the bits of a range be stored, and of what may come next; returns its regions."""
        first, stop = start // self._granularity, ceil_div(start + length, self._granularity)
        if not self._is_durable(first, stop):
            before = self._ends.pop(first, 0) if is_ahead else 0
            self._add(first, stop)
            self._go_ahead(stop, _GROWTH * before)
        elif first in self._middles:  # the regions that follow are stored before they are needed
            end, before = self._middles.pop(first)
            self._ends.pop(end, None)
            self._go_ahead(end, _GROWTH * before)
        return first, stop

    def _go_ahead(self, first: int, count: int) -> None:
        """Lets the bits of so many regions be stored that are likely to be needed next."""
        count = min(count, self._most_ahead)
        end = min(first + count, ceil_div(self._recording.virtual_size, self._granularity))
        self._add(first, end)
        self._ends[end] = max(1, count)
        if count > 1:
            self._middles[first + count // 2] = end, count
        for streams in (self._ends, self._middles):
            while len(streams) > _STREAMS:
                del streams[next(iter(streams))]

    def _add(self, first: int, stop: int) -> None:
        """Lets the bits of regions be stored, unless they are about to be."""
        wanted = self._wanted
        if not all(wanted[n >> 3] >> (n & 7) & 1 for n in range(first, stop)):
            pure_python.fill(wanted, first, stop, is_set=True)
            self._is_due = True
        if self._is_due and not self._is_working:
            Thread(target=self._work, name="qcow2bm intent", daemon=True).start()
            self._is_working = True  # the lock is held: the thread has not ended yet

    def _is_durable(self, first: int, stop: int) -> bool:
        durable = self._durable
        return all(durable[n >> 3] >> (n & 7) & 1 for n in range(first, stop))

    def _is_admitted(self, first: int, stop: int, placed: int) -> bool:
        """Whether regions are durable; wants them again if a flush has taken them out."""
        if self._is_aside:
            return True
        if self._failure or self._refusal or placed != self._placed:
            state = self._refusal or ("failed" if self._failure else "inactive")
            raise StateError(state, "tracking", "the tracker") from self._failure
        if self._is_durable(first, stop):
            return True
        self._add(first, stop)
        return False

    # --- storing --------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stores nothing more until `place` is called. A write that waits raises `StateError`."""
        self._refuse("inactive")

    def end(self, state: str) -> None:
        """Stores nothing more. A write that waits raises `StateError`, which has the state."""
        self._refuse(state)

    def _refuse(self, state: str) -> None:
        """Refuses writes because of a state; when this returns, nothing is stored any more."""
        with self._changes.lock:
            self._refusal = state
            self._forget_settled()
            self._changes.announce()
        with self._storing:  # until what is being stored now is on the disk
            self._is_due = False

    def disown(self) -> None:
        """Takes nothing for settled any more: for a forked process, where no lock is waited for."""
        self._refusal = "forked"
        self._forget_settled()

    def _work(self) -> None:
        """Stores bits in a thread of its own, as long as any are wanted."""
        while True:
            with self._changes.lock:
                if not self._is_due or self._refusal:
                    self._is_working = False
                    return
            try:
                self._store()
            except BaseException as error:
                with self._changes.lock:
                    self._failure = error
                    self._changes.announce()
                self._on_failure(error)
                return

    def _store(self) -> None:
        """Makes everything durable that is wanted now."""
        with self._storing:
            with self._changes.lock:
                if self._refusal:
                    return
                self._is_due = False  # bits that are wanted from now on are for the next time
            target = self._write()
            self._storage.barrier()
            with self._changes.lock:
                self.barriers += 1
                # What was taken out meanwhile is not durable: the next write has less.
                durable = np.frombuffer(self._durable, np.uint8)
                durable |= np.frombuffer(target, np.uint8) & np.frombuffer(self._wanted, np.uint8)
                self._changes.announce()

    def _write(self) -> bytes:
        """Writes the sectors that have changed; returns all bits as they are on disk then."""
        with self._changes.lock:
            target, before, offset = bytes(self._wanted), self._stored, self._offset
        changed = np.flatnonzero(np.frombuffer(target, np.uint8) != np.frombuffer(before, np.uint8))
        if len(changed):
            low = int(changed[0]) // SECTOR_SIZE * SECTOR_SIZE
            high = min(align_up(int(changed[-1]) + 1, SECTOR_SIZE), len(target))
            self._storage.write(offset + low, (target[low:high],))
            self._stored = target
        return target

    # --- taking out -----------------------------------------------------------------------------

    def snapshot(self, marking: Lock) -> Snapshot:
        """Returns what is marked now; called before a flush looks for what is due.

        ``marking`` is held by those who mark.
        """
        copied = bytes(self._recording.bits.octets)
        with marking:  # a bit that was copied has its piece touched, too, once this is entered
            marked = np.frombuffer(copied, np.uint8)
        with self._changes.lock:
            durable = np.frombuffer(bytes(self._durable), np.uint8)
            regions, self._aged = self._aged & durable, durable
        return Snapshot(marked, regions)

    def settle(self, snapshot: Snapshot) -> None:
        """Notes that all that a snapshot has is durable, and takes out the bits of its regions.

        A region stays whose marks are not all durable yet.
        """
        settled = np.frombuffer(self._settled[2], np.uint8)
        np.bitwise_or(settled, snapshot.marked, out=settled)
        if not snapshot.regions.any():
            return
        with self._storing:
            with self._changes.lock:
                if self._refusal or self._is_aside:
                    return
                # Under the lock: a write that is marked from now on finds its region taken out.
                marked = np.frombuffer(bytes(self._recording.bits.octets), np.uint8)
                gone = snapshot.regions & ~self._regions(marked & ~settled)
                keep = ~gone
                for octets in (self._wanted, self._durable):
                    view = np.frombuffer(octets, np.uint8)
                    view &= keep
                self._aged = self._aged & keep
            self._write()

    def _regions(self, marked: Octets) -> Octets:
        """The regions that have any of these granules, as bits."""
        length = len(self._wanted)
        if self._granularity >= self._recording.granularity:
            found = coarsen(marked.copy(), self._granularity // self._recording.granularity)
        else:
            found = refine(marked, self._recording.granularity // self._granularity, length)
        octets = np.zeros(length, np.uint8)
        octets[: min(length, len(found))] = found[:length]
        return octets
