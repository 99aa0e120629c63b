"""The library's front: open an image, look at its bitmaps. No rules of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.problems import header_problems
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    BitmapStaleError,
    FormatError,
    StateError,
)
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.format.extensions import BitmapsExtension, HeaderExtension
from qcow2bm.format.features import Feature
from qcow2bm.format.header import MAX_REFCOUNT_ORDER, Header
from qcow2bm.problems import Problem
from qcow2bm.storage.sources import open_source
from qcow2bm.store.directory import load_directory, verify_directory, verify_entry
from qcow2bm.store.load import BitmapBits, Totals
from qcow2bm.store.status import BROKEN, INCONSISTENT, STALE, Status, judge
from qcow2bm.store.tables import Clusters, Survey, Table, has_readable_table, survey
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.storage.sources import Source


def open(
    source: Source, mode: str = "r", *, strict: bool = False, force_share: bool = False
) -> Image:
    """Opens a qcow2 image for looking at its bitmaps.

    Args:
        source: a path, a bytes-like object, a seekable binary file (which stays open), or any
            `Storage`. Only regular files and block devices are opened by path, and no file
            that an image names is ever touched (INV-NOPATH).
        mode: "r", to read.
        strict: raise on the first fault for which QEMU would refuse the image or a bitmap
            cannot be used, instead of listing it in `Image.problems`. A bitmap in use is no
            fault.
        force_share: read even while another process writes, without taking locks. What is
            then read is still checked for not having changed meanwhile.

    Raises:
        FormatError: not a qcow2 image, or with ``strict`` any such fault.
        UnsupportedError: a version of qcow2 other than 2 and 3.
        ImageLockedError: somebody writes to the image.
        StorageError: it cannot be opened, read, or locked.
    """
    if mode != "r":
        raise ValueError(f"mode is {mode!r}, must be 'r'")
    image = Image(source, force_share=force_share)
    if strict:
        try:
            image.raise_first_problem()
        except BaseException:
            image.close()
            raise
    return image


class _Closed:
    """Stands in for what a closed Image no longer has."""

    def close(self) -> None:
        """May be called twice."""

    def __getattr__(self, name: str) -> NoReturn:
        raise StateError("closed", "open")


class Image:
    """A qcow2 image, open for reading: what its header says, and its bitmaps.

    Made by `open`; a context manager; belongs to one thread. Locks are held only while
    something is read, not while the Image is open.
    """

    def __init__(self, source: Source, *, force_share: bool = False) -> None:
        """See `open`."""
        storage = open_source(source)
        self.name = storage.name
        self._owned = None if storage is source else storage
        self._survey: Survey | None = None
        self._by_bitmap: dict[int, list[Problem]] | None = None
        try:
            with nullcontext() if force_share else storage.read_lock():
                self._file = ClusterFile(storage, force_share=force_share)
                self._header_problems = header_problems(self._file)
                self._directory = load_directory(self._file, self._header_problems)
                verify_directory(self._file, self._directory)
        except BaseException:
            self.close()
            raise
        self.bitmaps: Mapping[str, Bitmap] = _Bitmaps(self)

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
        """Closes what `open` opened. May be called twice."""
        if self._owned:
            self._owned.close()
        if hasattr(self, "_file"):
            self._file.close()
        self._file = _Closed()  # type: ignore[assignment]

    @property
    def header(self) -> Header:
        """The fixed header, fields under their names in the specification."""
        return self._file.header

    @property
    def version(self) -> int:
        """The version of qcow2, 2 or 3."""
        return self._file.header.version

    @property
    def virtual_size(self) -> int:
        """The size of the disk in bytes, whole sectors as QEMU counts it."""
        return self._file.virtual_size

    @property
    def cluster_size(self) -> int:
        """The size of a cluster in bytes."""
        return self._file.cluster_size

    @property
    def file_size(self) -> int:
        """The size of the image file in bytes, when it was opened."""
        return self._file.file_size

    @property
    def refcount_bits(self) -> int | None:
        """The width of a refcount in bits; None where the header says nonsense."""
        header = self._file.header
        return header.refcount_bits if header.refcount_order <= MAX_REFCOUNT_ORDER else None

    @property
    def backing_file(self) -> str | None:
        """The name of the backing file as the header has it; never opened."""
        return self._file.backing_file

    def features(self, kind: str) -> tuple[Feature, ...]:
        """The feature bits that are set; ``kind`` is one of `format.features.KINDS`."""
        return self._file.features(kind)

    @property
    def extensions(self) -> tuple[tuple[int, HeaderExtension], ...]:
        """The header extensions in order, each with the host offset of its head."""
        area = self._file.area
        offsets = area.offsets(self._file.extensions_offset)
        return tuple(zip(offsets, area.extensions, strict=True))

    @property
    def bitmaps_extension(self) -> BitmapsExtension | None:
        """The bitmaps extension; None where there is none, or one of the wrong length."""
        self._require_open()
        return self._directory.extension

    @property
    def is_consistent(self) -> bool:
        """Whether the autoclear bit of the bitmaps is set: without it they are outdated."""
        self._require_open()
        return self._directory.is_consistent

    @property
    def directory(self) -> tuple[DirectoryEntry, ...]:
        """All bitmap directory entries in order, broken ones included."""
        self._require_open()
        return self._directory.entries

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong with header, extensions, directory and tables.

        The first use reads all bitmap tables; with ``force_share``, and where the storage does
        not tell of writes, later ones know no more.

        Raises:
            ImageLockedError: somebody writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        tables = self._tables().problems
        return (*self._header_problems, *self._directory.problems, *tables)

    def bitmap(self, index: int) -> Bitmap:
        """The bitmap of a directory entry by its number, whatever its name.

        Raises:
            BitmapNotFoundError: there is no entry of that number.
        """
        if not 0 <= index < len(self.directory):
            raise BitmapNotFoundError(f"@{index}")
        return Bitmap(self, self.directory[index])

    def raise_first_problem(self) -> None:
        """Does nothing if the image has no problem but remarks; what ``strict`` reading does.

        Raises:
            FormatError: the first problem that is refused, unusable or leak.
        """
        for found in self.problems:
            if found.is_serious:
                place, _, reason = found.message.partition(f" at {found.offset:#x} ")
                structure, _, field = place.partition(": ")
                raise FormatError(structure, field, found.offset, reason)

    def _problems_of(self, index: int) -> list[Problem]:
        self._tables()  # asks whether the image is still what it was
        if self._by_bitmap is None:
            by_bitmap: dict[int, list[Problem]] = {}
            for found in self.problems:
                if found.bitmap_index is not None:
                    by_bitmap.setdefault(found.bitmap_index, []).append(found)
            self._by_bitmap = by_bitmap  # only when it is complete: reading may have failed
        return self._by_bitmap.get(index, [])

    def _verify(self, entry: DirectoryEntry) -> None:
        """Looks at a stored entry again where the storage does not tell of writes."""
        if not self._file.is_watched and entry.name_bytes is not None:
            with self._file.lock():
                verify_entry(self._file, entry)

    def _require_open(self) -> None:
        self._file.header  # noqa: B018  # raises StateError where the image is closed

    def _tables(self) -> Survey:
        self._require_open()
        if self._survey is None:
            found = survey(self._file, self._directory, self._header_problems)
            with self._file.lock():
                verify_directory(self._file, self._directory)
            self._survey = found
        self._file.verify_untouched()
        return self._survey


class _Bitmaps(Mapping[str, "Bitmap"]):
    """The bitmaps that can be told by name, in the order of the directory.

    Entries that share a name, or whose name cannot be read, are only in `Image.directory`.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        names = Counter(entry.name for entry in image.directory)
        self._entries = {
            entry.name: entry
            for entry in image.directory
            if entry.name is not None and names[entry.name] == 1
        }

    def __getitem__(self, name: str) -> Bitmap:
        entry = self._entries.get(name)
        if entry is None:
            raise BitmapNotFoundError(str(name), self._why_not(name))
        return Bitmap(self._image, entry)

    def _why_not(self, name: object) -> str:
        same = [f"@{entry.index}" for entry in self._image.directory if entry.name == name]
        if same:
            return f"is the name of several entries: {', '.join(same)}"
        known = ", ".join(f'"{escape(found)}"' for found in islice(self, 5))
        more = ", ..." if len(self) > 5 else ""
        return f"not found; the image has {known}{more}" if known else "not found: it has none"

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{len(self)} bitmaps of {self._image!r}>"


class Bitmap:
    """One bitmap of an image.

    What it records is read only when asked for: `count`, `extents`, `packed` and `sha256` read
    it, and raise unless `status` is "valid", so that a backup cannot go by a bitmap that misses
    writes. `stale_bits` is the one way to see the bits of any other.
    """

    def __init__(self, image: Image, entry: DirectoryEntry) -> None:
        """Made by `Image.bitmaps` and `Image.bitmap`."""
        self._image = image
        self.entry = entry

    def __repr__(self) -> str:
        return f"<qcow2bm.Bitmap {self.entry.index} {self.name!r} of {self._image.name!r}>"

    @property
    def index(self) -> int:
        """The number of its directory entry."""
        return self.entry.index

    @property
    def name(self) -> str:
        """The name; bytes that are not UTF-8 are kept as surrogates (PEP 383)."""
        return self.entry.name or ""

    @property
    def granularity(self) -> int:
        """How many guest bytes one bit stands for."""
        return self.entry.granularity

    @property
    def auto(self) -> bool:
        """Whether it is to record all writes to the disk (QEMU: enabled)."""
        return self.entry.auto

    @property
    def in_use(self) -> bool:
        """Whether writes may be missing from what is stored."""
        return self.entry.in_use

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of this bitmap alone; raises as `Image.problems` does."""
        return tuple(self._image._problems_of(self.index))

    @property
    def status(self) -> Status:
        """What the bitmap is good for; raises as `Image.problems` does.

        "stale" if the autoclear bit is off, else "broken" if its metadata cannot be trusted,
        else "inconsistent" if it is in_use, else "valid".
        """
        return self._judge()[0]

    @property
    def clusters(self) -> Clusters | None:
        """How many table entries of each kind there are; None where the table is unreadable."""
        table = self._table()
        return table.clusters if table else None

    def count(self) -> int:
        """How many guest bytes are dirty, clipped to the disk.

        Raises:
            BitmapInconsistentError, BitmapStaleError, BitmapBrokenError: it is not "valid".
            ImageLockedError: somebody writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        return self.totals(with_extents=False).dirty_bytes

    def totals(self, *, with_extents: bool = True) -> Totals:
        """Dirty guest bytes and number of extents, in one pass; raises as `count` does."""
        return self._bits().totals(with_extents=with_extents)

    def extents(self) -> Iterator[NDArray[np.int64]]:
        """The dirty ranges of the disk: arrays int64[n, 2] of (start, length) in guest bytes.

        *Guarantees*: ascending, merged, clipped to the disk; an extent is never split, not even
        over two arrays; memory does not grow with the bitmap. The locks of a reader are held
        only while bits are read, not while the caller works on an array.

        Raises:
            As `count` does, on the first use for the status, at any array for reading.
        """
        return self._bits().extents()

    def packed(self) -> NDArray[np.uint8]:
        """All bits, uint8[ceil(bits / 8)], least significant bit first, zero past the disk.

        Raises as `count` does.
        """
        return self._bits().packed()

    def sha256(self) -> str:
        """What QEMU's x-debug-block-dirty-bitmap-sha256 gives for the bitmap, in hex.

        Raises as `count` does.
        """
        return self._bits().sha256()

    def stale_bits(self) -> NDArray[np.uint8]:
        """The bits as they are stored, uint8[ceil(bits / 8)], whatever the status.

        *Guarantees*: none for a backup: writes may be missing. What cannot be read is dirty
        (INV-COARSE).

        Raises:
            BitmapBrokenError: there is no table to read.
            LimitError: the disk would need more bits than QEMU allows, 512 MiB.
            ImageLockedError: somebody writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        return self._stale().packed()

    def stale_totals(self) -> Totals:
        """What `stale_bits` amount to; raises as it does."""
        return self._stale().totals()

    @property
    def has_stale_bits(self) -> bool:
        """Whether `stale_bits` has a table to read."""
        self._image._require_open()
        return has_readable_table(self.entry, self._image._file)

    @property
    def _label(self) -> str:
        """The name for messages; the number where the name cannot be read."""
        return f"@{self.index}" if self.entry.name is None else self.entry.name

    def _table(self) -> Table | None:
        return self._image._tables().tables[self.index]

    def _judge(self) -> tuple[Status, str]:
        image = self._image
        problems = image._problems_of(self.index)
        image._verify(self.entry)
        return judge(self.entry, image._directory, image._tables().distrust, problems)

    def _bits(self) -> BitmapBits:
        status, reason = self._judge()
        name = self._label
        if status == INCONSISTENT:
            raise BitmapInconsistentError(name)
        if status == STALE:
            raise BitmapStaleError(name)
        table = self._table()
        if status == BROKEN or not table:
            raise BitmapBrokenError(name, f"is broken: {reason}")
        return BitmapBits(self._image._file, self.entry, table.fingerprint)

    def _stale(self) -> BitmapBits:
        file = self._image._file
        if not self.has_stale_bits:
            raise BitmapBrokenError(self._label, "is broken: its table cannot be read")
        return BitmapBits(file, self.entry, None, dirty_where_unknown=True)
