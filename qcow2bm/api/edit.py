"""An edit: changes to the bitmaps of an image, written together."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from qcow2bm.api.bitmap import Bitmap, BitmapMapping
from qcow2bm.api.open_image import OpenImage
from qcow2bm.bits.operations import OPS, Op
from qcow2bm.clusters.plan import Plan, execute
from qcow2bm.errors import (
    BitmapError,
    CommitError,
    LimitError,
    NoRoomError,
    Qcow2BmError,
    StateError,
    StorageError,
)
from qcow2bm.migration.intent import is_intent
from qcow2bm.storage.interface import WritableStorage
from qcow2bm.units import ceil_div, escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.bitmaps.draft import Draft
    from qcow2bm.bitmaps.draft_bits import PackedSource
    from qcow2bm.bitmaps.granules import Ranges
    from qcow2bm.bitmaps.room import Remedy


class Edit:
    """Changes to the bitmaps of an image, written together when the ``with`` block ends.

    `Image.edit` makes it. Every operation sees the effect of the operations before it, and raises
    before anything is written. An operation that raises changes nothing in the edit. Sizes and
    ranges are in guest bytes.
    """

    def __init__(self, opened: OpenImage, *, dry_run: bool) -> None:
        """See `Image.edit`."""
        from qcow2bm.bitmaps.draft import Draft
        from qcow2bm.bitmaps.editable import require_editable

        self._opened = opened
        self._dry_run = dry_run
        require_editable(opened.metadata)
        self._open_draft = Draft(opened.metadata)
        self._revision = opened.revision
        self._state = "not begun"
        self._intact_bitmaps: frozenset[int] | None = None

    def __enter__(self) -> Edit:
        if self._state != "not begun":
            raise StateError(self._state, "begun anew with Image.edit", "the edit")
        self._opened.require_idle()
        if self._revision != self._opened.revision:
            raise StateError("edited since", "asked for an edit afterwards")
        self._opened.begin("being edited")
        self._state = "going on"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._dry_run:
                self._commit(self.plan())
        finally:
            self._opened.end()
            self._state = "finished"

    @property
    def _draft(self) -> Draft:
        if self._state != "going on":
            raise StateError(self._state, "inside its with block", "the edit")
        self._opened.require_open()
        return self._open_draft

    def _commit(self, plan: Plan) -> None:
        opened = self._opened
        if not plan.steps or not opened.guard:
            return
        try:
            self._execute(plan, opened.guard)
        except BaseException:
            opened.leave("in doubt after a failed commit", "opened again")
            raise
        opened.reload("unreadable after a commit")

    def _execute(self, plan: Plan, guard: WritableStorage) -> None:
        """Executes a plan; if the file system is full, says in the error what would make room."""
        size = self._opened.file.file_size
        try:
            execute(plan, guard, size)
        except CommitError as error:
            cause = error.__cause__
            growth = max(write.offset + write.length for write in plan.writes) - size
            if isinstance(cause, StorageError) and cause.is_full and growth > 0:
                raise error.with_room(growth, *self._remedy(None)) from cause
            raise

    def plan(self) -> Plan:
        """Returns what a commit would do now: every write and every barrier, in order.

        Raises:
            FormatError: the refcounts are damaged.
            LimitError: a structure would grow too large.
            ChangedWhileReadingError: another process wrote to the image, in spite of the locks.
            NoRoomError: the image has too few free clusters, and the storage cannot grow.
            StorageError: reading failed.
            UnsupportedError: the layout of the header cannot be changed safely.
        """
        from qcow2bm.bitmaps.commit import plan_commit

        opened, storage = self._opened, self._opened.storage
        capacity = storage.capacity() if isinstance(storage, WritableStorage) else None
        try:
            draft = self._draft
            return plan_commit(opened.metadata, draft, capacity)
        except (LimitError, NoRoomError) as error:
            if error.missing is None:
                raise
            raise error.with_bitmaps(*self._remedy(capacity)) from error
        finally:  # a change by another process must not be reported as damage
            with opened.lock():
                opened.metadata.verify()

    def _remedy(self, capacity: int | None) -> Remedy:
        """Returns which bitmaps can be removed to make room; none if the image cannot be read."""
        from qcow2bm.bitmaps.room import NO_REMEDY, find_remedy

        try:
            return find_remedy(self._opened.metadata, self._open_draft, capacity)
        except Qcow2BmError:  # the failure that led here is the one to be reported
            return NO_REMEDY

    @property
    def names(self) -> list[str]:
        """The names of all bitmaps at this point of the edit, in the order of the directory."""
        return self._draft.names

    def add(self, name: str, granularity: int | None = None, enabled: bool = True) -> None:
        """Adds a clean bitmap.

        Args:
            name: of 1 to 1023 bytes.
            granularity: a power of two from 512 to 2 GiB; by default, as in QEMU, the cluster size,
                but at least 4 KiB and at most 64 KiB.
            enabled: whether the bitmap is to record writes.

        Raises:
            BitmapExistsError: the image has a bitmap of that name.
            BitmapStaleError: the bitmaps of the image are stale; `remove_all` removes them.
            LimitError: there would be too many bitmaps, or this one would be larger than QEMU
                allows.
            ValueError: QEMU could not use such a name or granularity.
        """
        self._draft.add(name, granularity, enabled=enabled)

    def remove(self, name: str) -> None:
        """Removes a bitmap.

        With a bitmap that is in_use only `remove`, `salvage`, `load` and `invalidate` are possible
        (EDIT-7).

        Raises:
            BitmapNotFoundError: there is no bitmap of that name.
            BitmapStaleError: the bitmaps of the image are stale.
        """
        self._draft.remove(name)

    def remove_all(self) -> None:
        """Removes all bitmaps. The clusters of stale bitmaps leak."""
        self._draft.remove_all()

    def clear(self, name: str) -> None:
        """Makes everything in a bitmap clean; raises as `disable` does."""
        self._draft.clear(name)

    def enable(self, name: str) -> None:
        """Makes a bitmap record writes from now on; raises as `disable` does."""
        self._draft.enable(name, enabled=True)

    def disable(self, name: str) -> None:
        """Makes a bitmap record no more writes.

        Raises:
            BitmapNotFoundError: there is no bitmap of that name.
            BitmapInconsistentError: the bitmap is in_use.
            BitmapStaleError: the bitmaps of the image are stale.
            BitmapBrokenError: the table of the bitmap does not fit the disk. `enable`, `disable`
                and `rename` do not raise this.
        """
        self._draft.enable(name, enabled=False)

    def invalidate(self, name: str) -> None:
        """Marks a bitmap in_use, so that QEMU and this library call it inconsistent.

        Use this for all bitmaps if the header of the image, or the whole image, was restored from
        an older copy: a bitmap may then look valid and miss writes. `salvage` makes the bitmap
        valid again.

        A bitmap that is in_use already, or stale, stays as it is, since no program trusts it.

        Raises:
            BitmapNotFoundError: there is no bitmap of that name.
        """
        self._draft.invalidate(name)
        for intent in filter(is_intent, self._draft.names):
            self._draft.invalidate(intent)  # or it would prove that the bitmap has every write

    def rename(self, name: str, new_name: str) -> None:
        """Gives a bitmap another name. The bitmap keeps its place in the directory.

        Raises:
            As `disable` does.
            BitmapExistsError: the new name is taken.
            ValueError: QEMU could not use the new name.
        """
        self._draft.rename(name, new_name)

    def copy(
        self,
        name: str,
        new_name: str,
        granularity: int | None = None,
        enabled: bool | None = None,
    ) -> None:
        """Adds a bitmap with the bits of another one.

        Args:
            name: the bitmap to copy.
            new_name: the name of the copy.
            granularity: of the copy; by default that of the other. A granule of a coarser copy is
                dirty if anything in the granule is dirty.
            enabled: whether the copy is to record writes; by default as the other.

        Raises:
            As `disable` and `add` do.
        """
        self._draft.copy(name, new_name, granularity, enabled=enabled)

    def set(self, name: str, start: int, length: int) -> None:
        """Makes a range dirty, widened to whole granules.

        Raises:
            As `disable` does.
            ValueError: the range reaches beyond the disk.
        """
        self._draft.fill(name, [(start, length)], is_set=True)

    def reset(self, name: str, start: int, length: int) -> None:
        """Makes a range clean, narrowed to whole granules; raises as `set` does."""
        self._draft.fill(name, [(start, length)], is_set=False)

    def set_many(self, name: str, ranges: Ranges) -> None:
        """Makes ranges dirty as `set` does: int64[n, 2] of (start, length), or pairs of int."""
        self._draft.fill(name, ranges, is_set=True)

    def reset_many(self, name: str, ranges: Ranges) -> None:
        """Makes ranges clean as `reset` does: int64[n, 2] of (start, length), or pairs of int."""
        self._draft.fill(name, ranges, is_set=False)

    def invert(self, name: str) -> None:
        """Makes each dirty granule clean and each clean one dirty; raises as `disable` does."""
        self._draft.invert(name)

    def merge(self, target: str, source: str | Bitmap, op: Op = "or") -> None:
        """Combines the bits of ``target`` with the bits of ``source``.

        The operation is done at the finer of the two granularities. If the source is the finer
        one, a granule of the target becomes dirty if anything in the result is dirty there.

        Args:
            target: the bitmap that changes.
            source: the name of another bitmap in this edit; or a `Bitmap`, as it is stored, of any
                image whose disk has the same size.
            op: "or", "and", "xor", or "subtract", which makes clean what is dirty in the source.

        Raises:
            As `disable` does, for either bitmap.
            BitmapError: the disks differ in size.
            LimitError: the granularities differ by more than they can in QEMU.
        """
        if op not in OPS:
            raise ValueError(f'op is {op!r}, must be "or", "and", "xor" or "subtract"')
        if isinstance(source, str):
            self._draft.merge(target, source, op)
            return
        if not isinstance(source, Bitmap):
            raise TypeError(f"source is a name or a Bitmap, not {type(source).__name__}")
        from qcow2bm.bitmaps.draft_bits import PackedSource

        size, own_size = source.disk_size, self._opened.file.virtual_size
        if size != own_size:
            reason = f"belongs to a disk of {size} bytes, but this one has {own_size}"
            raise BitmapError(source.name, reason)
        self._draft.find(target)
        packed = PackedSource(source.packed(), source.granularity, size)
        self._draft.merge(target, packed, op)

    def load(
        self,
        name: str,
        granularity: int,
        packed: NDArray[np.uint8] | bytes | bytearray | memoryview,
        enabled: bool = True,
    ) -> None:
        """Adds a bitmap with bits that were saved elsewhere.

        A bitmap of that name that is in_use is replaced. Only the caller can know whether the disk
        was written to since the bits were saved; `qcow2bm.sidecar` keeps evidence of that.

        Args:
            name: as in `add`.
            granularity: as in `add`.
            packed: the bits: uint8[ceil(bits / 8)], least significant bit first, as
                `Bitmap.packed` returns them, or as many bytes.
            enabled: whether the bitmap is to record writes.

        Raises:
            As `add` does.
            ValueError: ``packed`` does not have the length of such a bitmap of this disk.
        """
        self._draft.require_granularity(granularity)
        source = self._source(name, granularity, packed)
        self._draft.replace(name, granularity, enabled=enabled)
        self._draft.merge(name, source, "or")

    def salvage(
        self,
        name: str,
        packed: NDArray[np.uint8] | bytes | bytearray | memoryview | None = None,
        *,
        trust_stored: bool = False,
    ) -> None:
        """Makes a bitmap valid that is in_use or stale, with its name, granularity and flags.

        By default everything in the bitmap becomes dirty, so that the next incremental backup
        saves the whole disk.

        If the bitmaps of the image are stale, the other bitmaps become inconsistent (in_use), and
        can be salvaged in turn. A stale bitmap whose clusters now belong to something else has
        lost its stored bits.

        Args:
            name: the bitmap.
            packed: the bits the bitmap is to have instead, one for each granule that differs from
                the last backup: uint8[ceil(bits / 8)], least significant bit first.
            trust_stored: keep the stored bits. Writes since the bits were stored are then missing
                from the bitmap, and from every backup that relies on the bitmap.

        Raises:
            BitmapNotFoundError: there is no bitmap of that name.
            BitmapError: the bitmap is valid; or QEMU could not use the bitmap; or clusters of the
                bitmap are lost or shared, and the bitmap is in_use or ``trust_stored`` is given.
            FormatError: the image, or the directory of stale bitmaps, is damaged.
            StorageError: reading failed.
            ValueError: ``packed`` does not have the length of such a bitmap of this disk, or is
                given together with ``trust_stored``.
        """
        if packed is not None and trust_stored:
            raise ValueError("packed and trust_stored exclude each other")
        granularity = self._draft.salvageable(name)
        source = None if packed is None else self._source(name, granularity, packed)
        intact = self._intact()
        index = (
            BitmapMapping(self._opened)[name].index
            if self._draft.is_stale
            else self._draft.stored_index(name)
        )
        is_intact = index is None or index in intact
        if not is_intact and (trust_stored or not self._draft.is_stale):
            reason = "has a damaged table, or clusters that are lost or belong to something else"
            raise BitmapError(name, f"{reason}: check says which")
        if self._draft.is_stale:
            self._draft.revive(intact)  # each bitmap then has a table that is its own
            self._intact_bitmaps = frozenset(range(len(self._opened.metadata.directory.entries)))
        self._draft.salvage(name, trusts_stored=trust_stored)
        if source:
            self._draft.clear(name)
            self._draft.merge(name, source, "or")

    def _intact(self) -> frozenset[int]:
        """Returns the indexes of the bitmaps whose clusters belong to nothing else."""
        if self._intact_bitmaps is None:
            from qcow2bm.checking.salvage import intact_bitmaps

            with self._opened.lock():
                self._intact_bitmaps = intact_bitmaps(self._opened.storage)
        return self._intact_bitmaps

    def _source(
        self,
        name: str,
        granularity: int,
        packed: NDArray[np.uint8] | bytes | bytearray | memoryview,
    ) -> PackedSource:
        """Returns bits in memory as a source; raises `ValueError` if their length is wrong."""
        import numpy as np

        from qcow2bm.bitmaps.draft_bits import PackedSource

        size, octets = self._opened.file.virtual_size, np.frombuffer(packed, np.uint8)
        length = ceil_div(ceil_div(size, granularity), 8)
        if len(octets) != length:
            reason = f"has {len(octets)} bytes of bits, must have {length} for a disk of {size}"
            raise ValueError(f'bitmap "{escape(name)}" {reason} bytes')
        return PackedSource(octets, granularity, size)

    def fit(self, name: str) -> None:
        """Makes a bitmap fit the disk after a program resized the disk without its bitmaps.

        Bits past the end of the disk are dropped. The part of the disk that the bitmap did not
        cover becomes dirty, and so does everything that the last cluster of the bitmap data covers,
        since the old end of the disk is not stored.

        Raises:
            As `disable` does.
            LimitError: a bitmap of this granularity would be larger than QEMU allows.
        """
        self._draft.fit(name)
