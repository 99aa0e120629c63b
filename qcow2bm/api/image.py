"""An image: opening it, and what its header and its bitmap directory say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NoReturn

from qcow2bm.api.bitmap import Bitmap, BitmapMapping
from qcow2bm.api.edit import Edit
from qcow2bm.api.open_image import Loaded, OpenImage
from qcow2bm.bitmaps.backup_verdict import MISSING, BackupVerdict
from qcow2bm.bitmaps.rules import default_granularity
from qcow2bm.errors import BitmapNotFoundError, ReadOnlyImageError
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.format.extensions import (
    BACKING_FORMAT,
    DATA_FILE,
    BitmapsExtension,
    HeaderExtension,
)
from qcow2bm.format.features import AUTOCLEAR_RAW_DATA_FILE, INCOMPATIBLE_DATA_FILE, Feature
from qcow2bm.format.header import MAX_REFCOUNT_ORDER, Header
from qcow2bm.problem_errors import as_error
from qcow2bm.problems import Problem
from qcow2bm.storage.interface import WritableStorage, use_by_another_process
from qcow2bm.storage.sources import open_source, open_writable
from qcow2bm.units import decode_name, escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.api.data_extents import DataTotals
    from qcow2bm.api.dirty_set import DirtySet
    from qcow2bm.bitmaps.growth import Addition
    from qcow2bm.bitmaps.space import BitmapSpace
    from qcow2bm.checking.check import Check
    from qcow2bm.clusters.layout import Snapshot
    from qcow2bm.clusters.space import FileSpace
    from qcow2bm.storage.interface import OtherUse
    from qcow2bm.storage.sources import Source
    from qcow2bm.tracker.reports import Recovery
    from qcow2bm.tracker.tracker import Tracker


def open(
    source: Source,
    mode: str = "r",
    *,
    strict: bool = False,
    force_share: bool = False,
    lock_timeout: float = 0,
    locking: bool = True,
) -> Image:
    """Opens a qcow2 image to read its bitmaps, or to edit them.

    Args:
        source: a path, a bytes-like object, a seekable binary file (which stays open), or any
            `Storage`. A path must lead to a regular file or a block device. Files that the image
            names are never opened (INV-NOPATH).
        mode: "r" to read, "r+" to edit as well. For editing, ``source`` is a path, a bytearray or
            a `WritableStorage`, and no other process can use the image while it is open.
        strict: raise the first problem for which QEMU would refuse the image, or for which a
            bitmap cannot be used, instead of listing it in `Image.problems`. A bitmap that is
            in_use is no such problem.
        force_share: read without locks, even while another process writes to the image. An image
            that changes while it is read raises `ChangedWhileReadingError` all the same. Not for
            editing.
        lock_timeout: how many seconds to wait for the locks while another process uses the image.
            For reading, only a path is waited for.
        locking: False to edit without QEMU's locks, where the file system has none. Then nothing
            keeps a VM from using the image meanwhile, which would destroy the image.

    Raises:
        FormatError: the file is no qcow2 image, or, with ``strict``, has a problem.
        UnsupportedError: the version of qcow2 is neither 2 nor 3, or ``source`` cannot be edited.
        ImageLockedError: another process writes to the image, or, for editing, uses the image.
        StorageError: the file cannot be opened, read, or locked.
    """
    if mode not in ("r", "r+"):
        raise ValueError(f"mode is {mode!r}, must be 'r' or 'r+'")
    if mode == "r+" and force_share:
        raise ValueError("force_share is for reading; an image is not edited while others write")
    if mode == "r" and not locking:
        raise ValueError("locking is for mode 'r+'; to read without locks use force_share")
    if mode == "r":
        storage = open_source(source, lock_timeout)
        opened = OpenImage(storage, is_owner=storage is not source, force_share=force_share)
    else:
        writable = open_writable(source, locking=locking)
        is_owner = writable is not source
        opened = OpenImage(
            writable, is_owner=is_owner, writable=writable, lock_timeout=lock_timeout
        )
    image = Image(opened)
    if strict:
        try:
            image.raise_first_problem()
        except BaseException:
            image.close()
            raise
    return image


class Image:
    """A qcow2 image: what its header says, and its bitmaps.

    `open` makes it. It is a context manager, and belongs to one thread. An image that is open for
    reading holds locks only while it reads; an image that is open for editing holds locks until it
    is closed.

    Attributes:
        name: the path, or what else the storage calls itself.
    """

    def __init__(self, opened: OpenImage) -> None:
        """See `open`."""
        self.name = opened.name
        self._opened = opened
        self._bitmaps: tuple[Loaded, BitmapMapping] | None = None

    @property
    def bitmaps(self) -> Mapping[str, Bitmap]:
        """The bitmaps by name, in the order of the directory.

        Bitmaps that share a name, or whose name cannot be read, are only in `directory`. Every
        commit makes the mapping anew; a `Bitmap` from before raises `StateError`.

        While the image is tracked, bitmaps that are not tracked can be read, such as one that was
        rotated away. Then the metadata are read again each time.

        Raises:
            ChangedWhileReadingError: the tracker is just changing the metadata: try again.
            StorageError: the metadata could not be read again.
        """
        self._opened.look_again()
        loaded = self._opened.loaded
        if not self._bitmaps or self._bitmaps[0] is not loaded:
            self._bitmaps = loaded, BitmapMapping(self._opened)
        return self._bitmaps[1]

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Image cannot be pickled")

    def __repr__(self) -> str:
        return f"<qcow2bm.Image {self.name!r}>"

    def close(self) -> None:
        """Closes what `open` opened; abandons tracking that goes on. May be called twice."""
        self._opened.close()

    @property
    def header(self) -> Header:
        """The fixed header, fields under their names in the specification."""
        return self._opened.file.header

    @property
    def version(self) -> int:
        """The version of qcow2, 2 or 3."""
        return self._opened.file.header.version

    @property
    def virtual_size(self) -> int:
        """The size of the disk in bytes, whole sectors as QEMU counts it."""
        return self._opened.file.virtual_size

    @property
    def cluster_size(self) -> int:
        """The size of a cluster in bytes."""
        return self._opened.file.cluster_size

    @property
    def default_granularity(self) -> int:
        """The granularity of a bitmap that is added without one, in bytes; as QEMU chooses it."""
        return default_granularity(self.cluster_size)

    @property
    def file_size(self) -> int:
        """The size of the image file in bytes, when it was opened."""
        return self._opened.file.file_size

    @property
    def refcount_bits(self) -> int | None:
        """The width of a refcount in bits; None if the header has an impossible width."""
        header = self._opened.file.header
        return header.refcount_bits if header.refcount_order <= MAX_REFCOUNT_ORDER else None

    @property
    def backing_file(self) -> str | None:
        """The name of the backing file as the header has it; never opened."""
        return self._opened.file.backing_file

    @property
    def backing_format(self) -> str | None:
        """The format of the backing file as the header has it; None if it does not."""
        found = self._opened.file.find(BACKING_FORMAT)
        return decode_name(found.data) if found else None

    @property
    def used_header(self) -> bytes:
        """The bytes of the header, its extensions and the name of the backing file, as read."""
        return self._opened.file.used_header

    @property
    def data_file(self) -> str | None:
        """The name of the data file as the header has it; never opened."""
        found = self._opened.file.find(DATA_FILE)
        return decode_name(found.data) if found else None

    @property
    def has_data_file(self) -> bool:
        """Whether the guest data are in a file of their own, which is never opened here."""
        return bool(self._opened.file.header.incompatible_features & INCOMPATIBLE_DATA_FILE)

    @property
    def has_raw_data_file(self) -> bool:
        """Whether the guest data lie in the data file as on a raw disk."""
        autoclear = self._opened.file.header.autoclear_features
        return self.has_data_file and bool(autoclear & AUTOCLEAR_RAW_DATA_FILE)

    def features(self, kind: str) -> tuple[Feature, ...]:
        """The feature bits that are set; ``kind``: "incompatible", "compatible", "autoclear"."""
        return self._opened.file.features(kind)

    @property
    def extensions(self) -> tuple[tuple[int, HeaderExtension], ...]:
        """The header extensions in order, each with the host offset of its head."""
        area = self._opened.file.area
        offsets = area.offsets(self._opened.file.extensions_offset)
        return tuple(zip(offsets, area.extensions, strict=True))

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Returns the internal snapshots, in the order of the snapshot table.

        Raises:
            FormatError: the snapshot table is not whole, or an entry is damaged.
            LimitError: the snapshot table is larger than QEMU allows.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        from qcow2bm.clusters.layout import read_snapshots

        metadata = self._opened.metadata
        with self._opened.lock():
            found = read_snapshots(metadata.file)
            metadata.verify()
        return found

    @property
    def bitmaps_extension(self) -> BitmapsExtension | None:
        """The bitmaps extension; None if there is none, or if its length is wrong."""
        return self._opened.metadata.directory.extension

    @property
    def is_consistent(self) -> bool:
        """Whether the autoclear bit of the bitmaps is set. If not, all bitmaps are stale."""
        return self._opened.metadata.directory.is_consistent

    @property
    def directory(self) -> tuple[DirectoryEntry, ...]:
        """All bitmap directory entries in order, broken ones included."""
        return self._opened.metadata.directory.entries

    @property
    def bitmap_space(self) -> BitmapSpace | None:
        """How many bytes of the image file all bitmaps take together.

        None if the table of a bitmap could not be read, as of all bitmaps that are stale. Raises as
        `problems` does.
        """
        from qcow2bm.bitmaps.space import space_of_all

        self._opened.survey()  # asks the storage whether the image has changed
        return space_of_all(self._opened.metadata)

    def measure_addition(
        self,
        count: int = 1,
        *,
        granularity: int | None = None,
        name_size: int = 36,
        virtual_size: int | None = None,
    ) -> Addition:
        """Returns by how much the image grows if bitmaps are added in one edit.

        *Guarantees*: nothing is written. `Edit.add` of such bitmaps makes the image grow by exactly
        what is returned as `Addition.empty`, and an edit that also stores every cluster of their
        bits by exactly `Addition.full`.

        Args:
            count: how many bitmaps.
            granularity: as in `Edit.add`.
            name_size: the length of each name in bytes; 36 is that of a UUID.
            virtual_size: of the disk in bytes, if that is to be resized before.

        Raises:
            StateError: the image is closed, being edited, or being tracked.
            Others as `Edit.add` and `Edit.plan` do.
        """
        from qcow2bm.bitmaps.growth import measure_addition

        opened, storage = self._opened, self._opened.storage
        opened.require_idle()
        capacity = storage.capacity() if isinstance(storage, WritableStorage) else None
        size = self.virtual_size if virtual_size is None else virtual_size
        try:
            return measure_addition(
                opened.metadata,
                capacity,
                count=count,
                granularity=granularity,
                name_size=name_size,
                virtual_size=size,
            )
        finally:  # a change by another process must not be reported as damage
            with opened.lock():
                opened.metadata.verify()

    def file_space(self, *, count_free: bool = True) -> FileSpace:
        """Returns where the used part of the image file ends, and how much before that is free.

        That is what the refcounts say; `check` finds out whether they are right.

        Args:
            count_free: read all refcounts, and count the free clusters. Without it, only the end is
                looked for, which needs one refcount block in most images.

        Raises:
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        from qcow2bm.clusters.space import file_space

        metadata = self._opened.metadata
        with self._opened.lock():
            found = file_space(metadata.file, metadata.header_problems, count_free=count_free)
            metadata.verify()
        return found

    def use_by_another_process(self) -> OtherUse | None:
        """Returns how another process uses the image at this moment, without waiting.

        "writer": another process writes to the image, or lets no other process read it. Without
        ``force_share``, reading then raises `ImageLockedError`. "reader": another process reads the
        image. "no": no other process uses it. The storage tells by QEMU's locks (LOCK-11), so
        programs without these locks, and other hosts that use a block device, are not seen. A
        second `Image` of this process counts as another process.

        None if that is not known: the file system or the platform has no such locks, or the image
        is not in a file.

        Raises:
            StateError: the image is closed.
        """
        self._opened.require_open()
        return use_by_another_process(self._opened.storage)

    def data_extents(self) -> Iterator[NDArray[np.int64]]:
        """Yields what the image has for each range of the disk, in order, without gaps.

        Each array is int64[n, 3] with n >= 1: start and length in guest bytes, and the value of the
        `DataKind`, as `spec/data.md` defines the kinds. The last range ends where the disk ends. No
        two neighbours are of one kind, also where one array ends and the next one begins. The L2
        tables are read while the caller goes on; the locks of a reader are held only for that. The
        backing file and the data file are never opened.

        With ``force_share``, and while the image is tracked, the tables may change meanwhile. Then
        each range is as the tables said when they were read.

        Raises:
            FormatError: a table has an entry that cannot be, or the header is such that the tables
                cannot be read.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        from qcow2bm.api.data_extents import data_extents

        self._opened.require_open()
        self._opened.look_again()
        return data_extents(self._opened)

    def dirty_data_extents(self, dirty: DirtySet) -> Iterator[NDArray[np.int64]]:
        """`Bitmap.data_extents` for a combination of bitmaps, or for any other set.

        Raises:
            ValueError: the set is of a larger disk.
            Qcow2BmError: as ``dirty.extents`` and `data_extents` do.
        """
        from qcow2bm.api.data_extents import dirty_data_extents

        if dirty.disk_size > self.virtual_size:
            raise ValueError(f"of {dirty.disk_size} bytes, but the disk has {self.virtual_size}")
        self._opened.require_open()
        self._opened.look_again()
        return dirty_data_extents(self._opened, dirty.extents())

    def dirty_data_totals(self, dirty: DirtySet) -> DataTotals:
        """`Bitmap.data_totals` for any set; raises as `dirty_data_extents` does."""
        from qcow2bm.api.data_extents import data_totals

        return data_totals(self.dirty_data_extents(dirty))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong with header, extensions, directory and tables.

        The first use reads all bitmap tables. Later uses return the same problems. They raise
        `ChangedWhileReadingError` if the storage can tell that the image has changed since, and
        the image was not opened with ``force_share``.

        Raises:
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        self._opened.survey()  # asks the storage whether the image has changed
        return self._opened.metadata.problems

    def check(self) -> Check:
        """Follows every reference in the image, and compares the references with the refcounts.

        The problems found here are not among `problems`, for which headers and tables are enough.
        `qcow2bm.check` returns both.

        Raises:
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        from qcow2bm.checking.check import check

        self._opened.survey()  # asks the storage whether the image has changed
        return check(self._opened.metadata)

    def bitmap(self, index: int) -> Bitmap:
        """Returns the bitmap of a directory entry by its number; the name does not matter.

        Raises:
            BitmapNotFoundError: there is no entry of that number.
        """
        if not 0 <= index < len(self.directory):
            raise BitmapNotFoundError(f"@{index}")
        return Bitmap(self._opened, self.directory[index], self._opened.revision)

    def verdict(self, name: str) -> BackupVerdict:
        """Returns whether the next incremental backup can use the bitmap of this name.

        If there is no such bitmap, the reason is "missing"; nothing is raised. If several bitmaps
        have the name, the verdict is that on the first of them: none of them is usable.

        *Guarantees*: if the verdict is "usable", the bitmap has every write since it was made or
        cleared, as far as the image can tell: `check` is made, and finds no fault for which
        `repair` would drop the bitmap. That does not hold in three cases: a VM writes to the image
        while it is read with ``force_share``; the image, or its header, was restored from an older
        copy (then use `Edit.invalidate`); or a sentinel beside the bitmap is inconsistent, so that
        a machine that had the disk ended without storing its bitmaps (then take a full backup).

        Raises:
            StateError: the image is closed, being edited, or being tracked.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        self._opened.require_open()
        self._opened.require_idle()
        for entry in self.directory:
            if entry.name == name:
                return self.bitmap(entry.index).verdict()
        try:
            return self.bitmaps[name].verdict()
        except BitmapNotFoundError as error:
            advice = f'add "{escape(name)}", and take a full backup'
            return BackupVerdict(MISSING, f"{error.facts}; {advice}")

    def raise_first_problem(self) -> None:
        """Raises the first serious problem of the image, if there is one, as ``strict`` does.

        Raises:
            FormatError: the first problem of severity "refused", "unusable" or "leak".
        """
        for found in self.problems:
            if found.is_serious:
                raise as_error(found)

    def edit(self, *, dry_run: bool = False) -> Edit:
        """Begins an edit: ``with image.edit() as edit:``.

        All operations of the edit are committed together when the block ends. If the block ends
        by an exception, nothing is written. With ``dry_run`` nothing is ever written, and the
        image may be open for reading only.

        Raises:
            ReadOnlyImageError: the image is open for reading only.
            StateError: the image is closed, being edited, or being tracked.
            FormatError: the image has a problem that an edit could make worse.
            UnsupportedError: the version of qcow2 is 2.
            ImageLockedError, ChangedWhileReadingError: in a dry run, another process uses the
                image.
            StorageError: reading failed.
        """
        self._opened.require_open()
        if not self._opened.guard and not dry_run:
            raise ReadOnlyImageError()
        self._opened.require_idle()
        return Edit(self._opened, dry_run=dry_run)

    def track(
        self,
        names: Iterable[str] | None = None,
        *,
        others: Literal["refuse", "mark-in-use"] = "refuse",
        reserve: bool = False,
        generation: bool | None = None,
        intent: bool = False,
    ) -> Tracker:
        """Begins to record writes to the disk in bitmaps, which are in_use when this returns.

        From now on the program calls `Tracker.mark` for each write to the disk, until
        `Tracker.stop` stores the bitmaps. Meanwhile the Image can be neither edited nor tracked
        again.

        Args:
            names: the bitmaps; by default all bitmaps that are enabled (`auto`) and valid.
            others: what to do with other bitmaps that are enabled and valid, since they will miss
                writes. "refuse": raise `BitmapError`. "mark-in-use": mark them in_use. That loses
                these bitmaps, and until they are removed QEMU refuses to resize the image and to
                migrate its bitmaps.
            reserve: allocate all clusters of the bitmaps at the beginning, all-zeroes clusters
                included. Then `Tracker.stop` never needs a third barrier, for new clusters.
            generation: True to keep a generation token in the header from now on, which proves
                more after a migration; False to remove the token; None to leave that as it is.
                The token uses an autoclear bit that is not registered with the format, see
                spec/lifecycle.md.
            intent: whether a crash loses no bitmap. A write then waits, where the guest has not
                written for some time, until its region is durable in one more bitmap. If the
                process or the host dies, `recover` makes the bitmaps valid again, see
                spec/intent.md.

        Bitmaps that an earlier tracker with intent left in_use are recovered first.

        Raises:
            ReadOnlyImageError: the image is open for reading only.
            StateError: the image is closed, being edited, or being tracked.
            BitmapError: a bitmap is missing, not valid, or disabled, or would be left out.
            CommitError: a write or barrier failed.
            UnsupportedError: as for an edit; or this is a free-threaded Python.
            FormatError, LimitError, StorageError: as for an edit.
        """
        from qcow2bm.api.track import begin  # loads numpy

        self._opened.require_open()
        if not self._opened.guard:
            raise ReadOnlyImageError()
        self._opened.require_idle()
        return begin(
            self._opened, names, others, reserve=reserve, generation=generation, intent=intent
        )

    def recover(self, names: Iterable[str] | None = None, *, dry_run: bool = False) -> Recovery:
        """Makes bitmaps valid that were tracked with intent when the process or the host died.

        Each gets what the intent bitmap has, beside what is stored of it: every write since it
        began to record, and more where a region was written to shortly before.

        Args:
            names: the bitmaps; by default all that can be recovered.
            dry_run: write nothing; the image need not be open for editing.

        Raises:
            IntentError: there is no intent bitmap that has every write; unless all bitmaps are
                valid and no names are given.
            BitmapError: a bitmap is not one of those that the intent bitmap stands for, or not
                in_use.
            Qcow2BmError: as `edit` and a commit do.
        """
        from qcow2bm.api.recover import recover

        self._opened.require_open()
        if not self._opened.guard and not dry_run:
            raise ReadOnlyImageError()
        self._opened.require_idle()
        return recover(self._opened, names, dry_run=dry_run)

    @property
    def recoverable(self) -> tuple[str, ...]:
        """The names of the bitmaps that `recover` would make valid.

        While the image is tracked with intent, these are the bitmaps that a crash would leave so.

        Raises:
            StateError: an edit or a tracker has changed the bitmap directory since it was read.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        from qcow2bm.api.recover import recoverable

        return tuple(bitmap.name for bitmap in recoverable(self._opened))

    def bitmaps_to_track(
        self,
        names: Iterable[str] | None = None,
        *,
        others: Literal["refuse", "mark-in-use"] = "refuse",
    ) -> list[Bitmap]:
        """Returns the bitmaps that `track` would track with these arguments; nothing is written.

        An image open for reading will do.

        Raises:
            BitmapError: as `track` does.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        from qcow2bm.api.track import choose  # loads numpy

        chosen, _ = choose(self._opened, names, others)
        return chosen
