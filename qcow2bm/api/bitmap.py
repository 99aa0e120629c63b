"""One bitmap of an image, and reading what it records."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qcow2bm.api.dirty_set import DirtySet
from qcow2bm.api.open_image import OpenImage
from qcow2bm.bitmaps.backup_verdict import DISABLED, USABLE, BackupReason, BackupVerdict
from qcow2bm.bitmaps.bit_reader import BitReader, Totals
from qcow2bm.bitmaps.entries import (
    GRANULARITY_BITS_LIMIT,
    MAX_GRANULARITY_BITS,
    why_not_found,
)
from qcow2bm.bitmaps.space import BitmapSpace, full_space, kept_space, space_of
from qcow2bm.bitmaps.status import BROKEN, INCONSISTENT, STALE, VALID, Status
from qcow2bm.bitmaps.table_entries import TableRun, runs_of_entries
from qcow2bm.bitmaps.tables import Clusters, Table, has_readable_table
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    BitmapStaleError,
)
from qcow2bm.format.directory import (
    FLAG_NAMES,
    KNOWN_FLAGS,
    TYPE_DIRTY_TRACKING,
    DirectoryEntry,
)
from qcow2bm.problems import Problem
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.api.data_extents import DataTotals
    from qcow2bm.bits.coarser import GranularityTotals


class Bitmap(DirtySet):
    """One bitmap of an image.

    The bits are read only on demand, by `count`, `extents`, `packed` and `sha256`. These raise an
    error unless `status` is "valid", so that no backup relies on a bitmap that misses writes. Only
    `stale_bits` and `stale_totals` read the bits of other bitmaps.

    ``a | b``, ``a & b``, ``a ^ b`` and ``a - b`` combine bitmaps, see `Combination`.
    """

    def __init__(self, opened: OpenImage, entry: DirectoryEntry, revision: int) -> None:
        """See `Image.bitmaps` and `Image.bitmap`, which make it."""
        self._opened = opened
        self._entry = entry
        self._revision = revision

    def __repr__(self) -> str:
        entry = self._entry
        return f"<qcow2bm.Bitmap {entry.index} {entry.name!r} of {self._opened.name!r}>"

    @property
    def _image(self) -> OpenImage:
        """The image, if nothing has outdated this Bitmap; raises `StateError` otherwise."""
        if self._revision != self._opened.revision:
            subject = f'the Bitmap "{escape(self._entry.name or "")}"'
            raise self._opened.outdated_error(subject)
        return self._opened

    @property
    def entry(self) -> DirectoryEntry:
        """The directory entry. After a commit this and everything else raises `StateError`."""
        self._image  # noqa: B018  # raises
        return self._entry

    @property
    def index(self) -> int:
        """The number of the directory entry, from 0."""
        return self.entry.index

    @property
    def name(self) -> str:
        """The name; bytes that are not UTF-8 are kept as surrogates (PEP 383)."""
        return self.entry.name or ""

    @property
    def granularity(self) -> int:
        """The number of guest bytes that one bit stands for."""
        return self.entry.granularity

    @property
    def auto(self) -> bool:
        """Whether the bitmap is to record all writes to the disk, which QEMU calls enabled."""
        return self.entry.auto

    @property
    def in_use(self) -> bool:
        """Whether writes may be missing from the stored bits."""
        return self.entry.in_use

    @property
    def disk_size(self) -> int:
        """The size of the disk in bytes."""
        return self._image.file.virtual_size

    @property
    def flags(self) -> tuple[str, ...]:
        """The names of the flags that are set: "in-use", "auto", "extra-data-compatible"."""
        return tuple(name for bit, name in FLAG_NAMES.items() if self.entry.flags & bit)

    @property
    def unknown_flags(self) -> int:
        """The flags that are set and have no meaning in the specification."""
        return self.entry.flags & ~KNOWN_FLAGS

    @property
    def is_dirty_tracking(self) -> bool:
        """Whether the type of the bitmap is 1, dirty tracking, the only one that is defined."""
        return self.entry.type == TYPE_DIRTY_TRACKING

    @property
    def has_legal_granularity(self) -> bool:
        """Whether the specification allows the stored granularity."""
        return self.entry.granularity_bits < GRANULARITY_BITS_LIMIT

    @property
    def is_auxiliary(self) -> bool:
        """Whether this library added the bitmap for itself: it stands for no backup.

        Sentinels are such bitmaps, see spec/lifecycle.md, and intent bitmaps, see spec/intent.md.
        """
        from qcow2bm.migration.intent import is_intent  # it takes time to load uuid

        return self.is_sentinel or is_intent(self.entry.name)

    @property
    def is_sentinel(self) -> bool:
        """Whether the bitmap is a sentinel of this library; see spec/lifecycle.md."""
        from qcow2bm.migration.sentinel import is_sentinel  # it takes time to load uuid

        return is_sentinel(self.entry.name)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of this bitmap alone; raises as `Image.problems` does."""
        image = self._image
        image.survey()  # asks the storage whether the image has changed
        return image.metadata.problems_of(self.index)

    @property
    def status(self) -> Status:
        """Whether a backup can rely on the bitmap; raises as `Image.problems` does.

        "stale" if the autoclear bit is off; else "broken" if the metadata of the bitmap cannot be
        trusted; else "inconsistent" if the bitmap is in_use; else "valid".
        """
        return self._judge()[0]

    @property
    def backup_reason(self) -> BackupReason:
        """The reason of `verdict`, as far as header and metadata of bitmaps can tell.

        "usable" if the next incremental backup can use the bitmap; "disabled" if the bitmap is
        valid but does not record; "broken" also if the status is "valid" but `repair` would drop
        the bitmap; else the status. Neither bits nor L2 tables are read: `verdict` also finds a
        bitmap "broken" that shares clusters with the disk, or has bits far behind its end.

        Raises as `Image.problems` does.
        """
        return self._judge_for_backup()[0]

    def verdict(self) -> BackupVerdict:
        """Returns whether the next incremental backup can use the bitmap.

        *Guarantees*: those of `Image.verdict`.

        Raises:
            As `Image.verdict` does.
        """
        from qcow2bm.checking.check import check  # it takes time to load numpy

        self._image.require_idle()
        reason, problem = self._judge_for_backup()
        name = self._label
        if reason in (USABLE, DISABLED):
            problem = check(self._image.metadata).fault_of(self.index)
            reason = BROKEN if problem else reason
        if reason in (USABLE, DISABLED):
            return BackupVerdict(
                reason, _message(name, reason), self.totals(with_extents=False).dirty_bytes
            )
        error = _refusal(name, reason, problem)
        advice = "; take a full backup, and see what check says" if reason == BROKEN else ""
        return BackupVerdict(reason, f"{error.facts}{advice}")

    @property
    def clusters(self) -> Clusters | None:
        """The number of table entries of each kind; None if the table is unreadable."""
        table = self._table()
        return table.clusters if table else None

    @property
    def space(self) -> BitmapSpace | None:
        """How many bytes of the image file the bitmap takes; None if `clusters` is None.

        To remove the bitmap frees the clusters of its table and of its data.
        """
        image = self._image
        image.survey()  # asks the storage whether the image has changed
        return space_of(image.metadata, self.entry)

    def full_space(self, virtual_size: int | None = None) -> BitmapSpace | None:
        """Returns the most that the bitmap can take: every cluster of its bits is stored.

        None if `space` is None, or if QEMU could not use the granularity of the bitmap.

        Args:
            virtual_size: of the disk in bytes, if that is to be resized.

        Raises:
            LimitError: a disk of that size would need more bits than QEMU allows.
            StorageError, ImageLockedError, ChangedWhileReadingError: as of `space`.
            UnsupportedError: the disk has 0 bytes.
        """
        if not self.space:
            return None
        size = self.disk_size if virtual_size is None else virtual_size
        return full_space(self.entry, size, self._image.file.cluster_size)

    def space_after_resize(self, virtual_size: int) -> BitmapSpace | None:
        """Returns the space after the disk is resized, and before anything more is written.

        QEMU makes a new part of the disk clean in the bitmap, so no cluster of bits is stored for
        that part.

        *Guarantees*: if the disk becomes smaller, QEMU may store less data: a last cluster
        of bits that becomes all zeros is not stored.

        Args:
            virtual_size: of the disk in bytes.

        Raises:
            As `full_space` and `table` do.
        """
        full = self.full_space(virtual_size)
        return full and kept_space(full, self._words(), self._image.file.cluster_size)

    def table(self) -> Iterator[TableRun]:
        """Returns the entries of the bitmap table in order, as runs, whatever the status.

        Raises:
            BitmapBrokenError: there is no readable table.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        return runs_of_entries(self._words(), self._image.file.cluster_size)

    def _words(self) -> array[int]:
        """Returns the bitmap table, uint64[n]; raises as `table` does."""
        found = self._table()
        self._require_table()
        expected = found.fingerprint if found else None
        return BitReader(self._image.file, self.entry, expected).table()

    def count(self) -> int:
        """Returns how many guest bytes are dirty, clipped to the disk.

        Raises:
            BitmapInconsistentError, BitmapStaleError, BitmapBrokenError: the status is not "valid".
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        # Programs that call this mostly use numpy; the command line calls `totals`.
        return self._bits().totals(with_extents=False, vectorize=True).dirty_bytes

    def totals(self, *, with_extents: bool = True) -> Totals:
        """Returns dirty guest bytes and number of extents, in one pass; raises as `count` does."""
        return self._bits().totals(with_extents=with_extents)

    def coarser_totals(self) -> tuple[GranularityTotals, ...]:
        """Returns what the next backup costs at this granularity, and what at coarser ones.

        The first element is that of the bitmap itself: dirty guest bytes, and the number of
        extents. Each following one counts the same dirty granules at twice the granularity, up to
        2 GiB, or to a granularity at which nothing or all is dirty: coarser ones make no
        difference. What a finer granularity would have had cannot be known from the bits.

        *Guarantees*: memory does not grow with the bitmap; the bits are read once.

        Raises:
            As `count` does.
        """
        return self._bits().coarser_totals(1 << MAX_GRANULARITY_BITS)

    def extents(self) -> Iterator[NDArray[np.int64]]:
        """Yields the dirty ranges of the disk: int64[n, 2] of (start, length) in guest bytes.

        *Guarantees*: the extents are ascending, merged, and clipped to the disk. An extent is
        never split, not even over two arrays. Memory does not grow with the bitmap. The locks of a
        reader are held only while bits are read, not while the caller works on an array.

        Raises:
            As `count` does: before the first array because of the status, before any array because
            reading failed.
        """
        return self._bits().extents()

    def data_extents(self) -> Iterator[NDArray[np.int64]]:
        """Yields what is dirty and what the image has there, for the whole disk without gaps.

        Each array is int64[n, 4] with n >= 1: start and length in guest bytes, whether the range is
        dirty (0 or 1), and the value of its `DataKind`. No two neighbours are alike in both. The
        bits and the tables are read while the caller goes on.

        Raises:
            As `count` and `Image.data_extents` do.
        """
        from qcow2bm.api.data_extents import dirty_data_extents

        return dirty_data_extents(self._image, self.extents())

    def data_totals(self) -> DataTotals:
        """Returns how many bytes of the disk `data_extents` has of each kind, clean and dirty.

        Raises as `data_extents` does.
        """
        from qcow2bm.api.data_extents import data_totals

        return data_totals(self.data_extents())

    def packed(self) -> NDArray[np.uint8]:
        """Returns all bits: uint8[ceil(bits / 8)], least significant first, zero past the disk.

        Raises as `count` does.
        """
        return self._bits().packed()

    def sha256(self) -> str:
        """Returns what QEMU's x-debug-block-dirty-bitmap-sha256 gives for the bitmap, in hex.

        Raises as `count` does.
        """
        return self._bits().sha256()

    def stale_bits(self) -> NDArray[np.uint8]:
        """Returns the bits as they are stored: uint8[ceil(bits / 8)], whatever the status.

        *Guarantees*: none for a backup, since writes may be missing. Bits that cannot be read are
        dirty (INV-COARSE).

        Raises:
            BitmapBrokenError: there is no readable table.
            LimitError: the disk would need more bits than QEMU allows, 512 MiB.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        return self._stale().packed()

    def stale_totals(self) -> Totals:
        """Returns dirty guest bytes and number of extents of `stale_bits`; raises as it does."""
        return self._stale().totals()

    def stale_extents(self) -> Iterator[NDArray[np.int64]]:
        """Yields the dirty ranges of `stale_bits`, as `extents` yields ranges; raises as it does.

        Memory does not grow with the bitmap, so there is no `LimitError`.
        """
        return self._stale().extents()

    @property
    def has_stale_bits(self) -> bool:
        """Whether the bitmap has a table that `stale_bits` and `table` can read."""
        return has_readable_table(self.entry, self._image.file)

    @property
    def _label(self) -> str:
        """The name for messages, or the number if the name cannot be read."""
        return f"@{self.index}" if self.entry.name is None else self.entry.name

    def _table(self) -> Table | None:
        return self._image.survey().tables[self.index]

    def _judge(self) -> tuple[Status, str]:
        image = self._image
        image.survey()  # asks the storage whether the image has changed
        image.verify(self.entry)
        return image.metadata.status_of(self.entry)

    def _judge_for_backup(self) -> tuple[BackupReason, str]:
        self._judge()  # asks the storage whether the image has changed
        return self._image.metadata.backup_reason_of(self.entry)

    def require_valid(self) -> None:
        """Returns if `status` is "valid"; raises as `count` does."""
        self._bits()

    def _bits(self) -> BitReader:
        status, reason = self._judge()
        name = self._label
        table = self._table()
        if status != VALID or not table:
            if status == INCONSISTENT and self._image.is_tracked:
                raise BitmapInconsistentError(name, _TRACKED)
            raise _refusal(name, status, reason)
        return BitReader(self._image.file, self.entry, table.fingerprint)

    def _stale(self) -> BitReader:
        self._require_table()
        return BitReader(self._image.file, self.entry, None, dirty_where_unknown=True)

    def _require_table(self) -> None:
        if not self.has_stale_bits:
            raise BitmapBrokenError(self._label, "is broken: its table cannot be read")


_TRACKED = "is in use while the image is tracked: before it is read, rotate or disable it"


def _refusal(name: str, status: BackupReason | Status, reason: str) -> BitmapError:
    """Returns the error for reading the bits of a bitmap that is not valid."""
    if status == INCONSISTENT:
        return BitmapInconsistentError(name)
    if status == STALE:
        return BitmapStaleError(name)
    return BitmapBrokenError(name, f"is broken: {reason}")


def _message(name: str, reason: BackupReason) -> str:
    """Returns the message of a verdict on a bitmap whose bits can be relied on."""
    if reason == USABLE:
        return (
            f'bitmap "{escape(name)}" is valid and records writes: the next incremental backup can '
            "use it"
        )
    return (
        f'bitmap "{escape(name)}" is disabled, so all that was written since it was disabled is '
        "missing from it: take a full backup, or make all of it dirty and enable it"
    )


class BitmapMapping(Mapping[str, Bitmap]):
    """The bitmaps of an image by name, in the order of the directory.

    Entries that share a name, or whose name cannot be read, are only in `Image.directory`.
    """

    def __init__(self, opened: OpenImage) -> None:
        """Takes the entries that were read last."""
        self._opened = opened
        metadata, self._revision = opened.loaded
        entries = metadata.directory.entries
        names = Counter(entry.name for entry in entries)
        self._entries = {
            entry.name: entry
            for entry in entries
            if entry.name is not None and names[entry.name] == 1
        }

    def __getitem__(self, name: str) -> Bitmap:
        entry = self._entries.get(name)
        if entry is None:
            raise BitmapNotFoundError(str(name), self._why_not(name))
        return Bitmap(self._opened, entry, self._revision)

    def _why_not(self, name: object) -> str:
        entries = self._opened.metadata.directory.entries
        same = [f"@{entry.index}" for entry in entries if entry.name == name]
        if same:
            return f"is the name of several entries: {', '.join(same)}"
        return why_not_found(self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{len(self)} bitmaps of <qcow2bm.Image {self._opened.name!r}>>"
