"""An edit: changes to the bitmaps of an image, written together."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from qcow2bm.api.bitmap import Bitmap, BitmapMapping
from qcow2bm.api.open_image import OpenImage
from qcow2bm.bits.operations import OPS, Op
from qcow2bm.clusters.plan import Plan, execute
from qcow2bm.errors import BitmapError, StateError
from qcow2bm.storage.interface import WritableStorage
from qcow2bm.units import ceil_div, escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.bitmaps.draft import Draft, Ranges
    from qcow2bm.bitmaps.draft_bits import PackedSource


class Edit:
    """Changes to the bitmaps of an image, written together when the ``with`` block ends.

    Made by `Image.edit`. Every operation sees the effect of those before it, and raises before
    anything is written. Sizes and ranges are in guest bytes.
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
            execute(plan, opened.guard, opened.file.file_size)
        except BaseException:
            opened.leave("in doubt after a failed commit", "opened again")
            raise
        opened.reload("unreadable after a commit")

    def plan(self) -> Plan:
        """What a commit would do now: every write and every barrier, in order.

        Raises:
            FormatError: the refcounts are damaged.
            LimitError: a structure would grow too large.
            ChangedWhileReadingError: somebody wrote to the image, locks or not.
            StorageError: there is no room, or reading failed.
            UnsupportedError: the header is laid out in a way that cannot be changed safely.
        """
        from qcow2bm.bitmaps.commit import plan_commit

        opened, storage = self._opened, self._opened.storage
        capacity = storage.capacity() if isinstance(storage, WritableStorage) else None
        try:
            draft = self._draft
            return plan_commit(opened.metadata, draft, capacity)
        finally:  # what another process changed meanwhile must not pass for damage
            with opened.lock():
                opened.metadata.verify()

    @property
    def names(self) -> list[str]:
        """The names of all bitmaps as they are now in the edit, in the order of the directory."""
        return self._draft.names

    def add(self, name: str, granularity: int | None = None, enabled: bool = True) -> None:
        """Adds a clean bitmap.

        Args:
            name: of 1 to 1023 bytes.
            granularity: a power of two from 512 to 2 GiB; by default that of QEMU, the cluster
                size within 4 KiB to 64 KiB.
            enabled: whether it is to record writes.

        Raises:
            BitmapExistsError: the image has one of that name.
            BitmapStaleError: the image has outdated bitmaps; `remove_all` drops them.
            LimitError: there would be too many, or it would be larger than QEMU allows.
            ValueError: QEMU could not use such a name or granularity.
        """
        self._draft.add(name, granularity, enabled=enabled)

    def remove(self, name: str) -> None:
        """Removes a bitmap; with one that is in_use only that, `salvage` and `load` are possible.

        Raises:
            BitmapNotFoundError, BitmapStaleError.
        """
        self._draft.remove(name)

    def remove_all(self) -> None:
        """Removes all bitmaps, stale ones too; the clusters of those leak."""
        self._draft.remove_all()

    def clear(self, name: str) -> None:
        """Makes a bitmap clean. Like all that follows, it raises what `disable` does."""
        self._draft.clear(name)

    def enable(self, name: str) -> None:
        """Makes a bitmap record writes from now on; raises as `disable` does."""
        self._draft.enable(name, enabled=True)

    def disable(self, name: str) -> None:
        """Makes a bitmap record no more writes.

        Raises:
            BitmapNotFoundError: there is none of that name.
            BitmapInconsistentError: it is in_use.
            BitmapStaleError: the bitmaps of this image are outdated.
            BitmapBrokenError: its table does not fit the disk (not here, nor in `rename`).
        """
        self._draft.enable(name, enabled=False)

    def rename(self, name: str, new_name: str) -> None:
        """Gives a bitmap another name; it keeps its place in the directory.

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
        """Adds a bitmap with what another has, also at another granularity.

        A coarser copy is dirty wherever anything it covers is dirty. It records writes from now
        on if the other does, unless ``enabled`` says otherwise.

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
        """As `set`, for int64[n, 2] of (start, length) or pairs of int; all of them or none."""
        self._draft.fill(name, ranges, is_set=True)

    def reset_many(self, name: str, ranges: Ranges) -> None:
        """As `reset`, for int64[n, 2] of (start, length) or pairs of int; all of them or none."""
        self._draft.fill(name, ranges, is_set=False)

    def invert(self, name: str) -> None:
        """Makes the dirty parts of the disk clean and the clean ones dirty; raises as `disable`."""
        self._draft.invert(name)

    def merge(self, target: str, source: str | Bitmap, op: Op = "or") -> None:
        """Combines what ``target`` records with what ``source`` records.

        The operation is done at the finer granularity of the two. If that is the source's, a
        granule of the target is dirty if anything in it is.

        Args:
            target: the bitmap that changes.
            source: the name of another bitmap in this edit; or a Bitmap, of any image whose disk
                has the same size, as it is stored.
            op: "or", "and", "xor", or "subtract" (what the source has, the target loses).

        Raises:
            As `disable` does, for either.
            BitmapError: the disks differ in size.
            LimitError: the granularities are further apart than QEMU's can be.
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

        One of that name that is in_use is replaced: its own bits are of no use any more. Whether
        the disk was written to since the bits were saved, only the caller can know.

        Args:
            name: as in `add`.
            granularity: as in `add`.
            enabled: whether it is to record writes.
            packed: uint8[ceil(bits / 8)], least significant bit first, as `Bitmap.packed` gives it,
                or so many bytes.

        Raises:
            As `add` does.
            ValueError: ``packed`` has another length than such a bitmap of this disk. Then, as
                after every other error, the edit is as it was.
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
        """Makes a bitmap valid that is in_use or stale; it keeps name, granularity and flags.

        Without further arguments everything in it is dirty, so that the next incremental backup
        saves all of the disk.

        If the bitmaps are stale, the others are inconsistent (in_use) afterwards, and can be
        salvaged, too. Those whose clusters were given to others have nothing but a name then.

        Args:
            name: the bitmap.
            packed: bits it is to have instead, one for each granule: what differs from the last
                backup. uint8[ceil(bits / 8)], least significant bit first.
            trust_stored: the bits that are stored. What was written since they were stored is
                missing from them, and from every backup that relies on them.

        Raises:
            BitmapNotFoundError: there is none of that name.
            BitmapError: it is valid, or QEMU could not use it. Or it shares clusters with somebody,
                or has lost them, where its stored bits are to be trusted, or it is in_use.
            FormatError: the image, or the directory of stale bitmaps, is damaged.
            StorageError: reading failed.
            ValueError: ``packed`` has another length than such a bitmap of this disk, or there
                is ``trust_stored`` as well. Then, as after every error, the edit is as it was.
        """
        if packed is not None and trust_stored:
            raise ValueError("packed and trust_stored exclude each other")
        granularity = self._draft.salvageable(name)
        source = None if packed is None else self._source(name, granularity, packed)
        intact = self._intact()
        is_intact = BitmapMapping(self._opened)[name].index in intact
        if not is_intact and (trust_stored or not self._draft.is_stale):
            reason = "shares clusters with others by now, or has lost them, or its table is damaged"
            raise BitmapError(name, f"{reason}: see what check says of it")
        if self._draft.is_stale:
            self._draft.revive(intact)  # after which each has a table that is its own
            self._intact_bitmaps = frozenset(range(len(self._opened.metadata.directory.entries)))
        self._draft.salvage(name, trusts_stored=trust_stored)
        if source:
            self._draft.clear(name)
            self._draft.merge(name, source, "or")

    def _intact(self) -> frozenset[int]:
        """The bitmaps whose clusters are theirs alone, by the indexes of their entries."""
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
        """Bits somebody has in memory; raises `ValueError` if they are not those of this disk."""
        import numpy as np

        from qcow2bm.bitmaps.draft_bits import PackedSource

        size, octets = self._opened.file.virtual_size, np.frombuffer(packed, np.uint8)
        length = ceil_div(ceil_div(size, granularity), 8)
        if len(octets) != length:
            reason = f"has {len(octets)} bytes of bits, must have {length} for a disk of {size}"
            raise ValueError(f'bitmap "{escape(name)}" {reason} bytes')
        return PackedSource(octets, granularity, size)

    def fit(self, name: str) -> None:
        """Makes a bitmap fit the disk after a resize by a program that left it as it was.

        What lies past the disk is dropped. What the bitmap did not cover is dirty, and with it all
        that the last cluster of its data covers: where in that the disk ended is not known.

        Raises:
            As `disable` does.
            LimitError: a bitmap of this granularity would be larger than QEMU allows.
        """
        self._draft.fit(name)
