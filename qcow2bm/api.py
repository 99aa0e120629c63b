"""The library's front: open an image, look at its bitmaps, edit them. No rules of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.plan import Plan, execute
from qcow2bm.clusters.problems import header_problems
from qcow2bm.errors import (
    BitmapBrokenError,
    BitmapError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    BitmapStaleError,
    Qcow2BmError,
    ReadOnlyImageError,
    StateError,
)
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.format.extensions import BitmapsExtension, HeaderExtension
from qcow2bm.format.features import Feature
from qcow2bm.format.header import MAX_REFCOUNT_ORDER, Header
from qcow2bm.problems import Problem
from qcow2bm.storage.base import Storage, WritableStorage
from qcow2bm.storage.sources import open_source, open_writable
from qcow2bm.store.directory import load_directory, verify_directory, verify_entry
from qcow2bm.store.entries import why_not_found
from qcow2bm.store.load import BitmapBits, Totals
from qcow2bm.store.status import BROKEN, INCONSISTENT, STALE, Status, as_error, judge
from qcow2bm.store.tables import Clusters, Survey, Table, has_readable_table, survey
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.bits.algebra import Op
    from qcow2bm.storage.sources import Source
    from qcow2bm.store.edit import Draft, Ranges


def open(
    source: Source,
    mode: str = "r",
    *,
    strict: bool = False,
    force_share: bool = False,
    lock_timeout: float = 0,
    locking: bool = True,
) -> Image:
    """Opens a qcow2 image for looking at its bitmaps, or for editing them.

    Args:
        source: a path, a bytes-like object, a seekable binary file (which stays open), or any
            `Storage`. Only regular files and block devices are opened by path, and no file
            that an image names is ever touched (INV-NOPATH).
        mode: "r" to read, "r+" to edit as well. For editing, ``source`` is a path, a bytearray or
            a `WritableStorage`, and nobody else can use the image while it is open.
        strict: raise on the first fault for which QEMU would refuse the image or a bitmap
            cannot be used, instead of listing it in `Image.problems`. A bitmap in use is no
            fault.
        force_share: read even while another process writes, without taking locks. What is
            then read is still checked for not having changed meanwhile. Not for editing.
        lock_timeout: how many seconds to wait for the locks while somebody else uses the image.
            For reading, of a path only.
        locking: False to edit without QEMU's locks, where the file system has none. Then
            nothing keeps a VM from using the image meanwhile, which would destroy it.

    Raises:
        FormatError: not a qcow2 image, or with ``strict`` any such fault.
        UnsupportedError: a version of qcow2 other than 2 and 3; or ``source`` cannot be edited.
        ImageLockedError: somebody writes to the image, or for editing: uses it.
        StorageError: it cannot be opened, read, or locked.
    """
    if mode not in ("r", "r+"):
        raise ValueError(f"mode is {mode!r}, must be 'r' or 'r+'")
    if mode == "r+" and force_share:
        raise ValueError("force_share is for reading; an image is not edited while others write")
    if mode == "r" and not locking:
        raise ValueError("locking is for mode 'r+'; to read without locks use force_share")
    if mode == "r":
        storage = open_source(source, lock_timeout)
        image = Image(storage, storage is not source, force_share)
    else:
        writable = open_writable(source, locking=locking)
        image = Image(writable, writable is not source, False, writable, lock_timeout)
    if strict:
        try:
            image.raise_first_problem()
        except BaseException:
            image.close()
            raise
    return image


class _Gone:
    """Stands in for what an Image no longer has."""

    def __init__(self, state: str, required: str) -> None:
        self._error = state, required

    def close(self) -> None:
        """May be called twice."""

    def __getattr__(self, name: str) -> NoReturn:
        raise StateError(*self._error)


class Image:
    """A qcow2 image: what its header says, and its bitmaps.

    Made by `open`; a context manager; belongs to one thread. Open for reading it holds locks
    only while something is read, open for editing all the time.

    Attributes:
        name: the path, or what else the storage calls itself.
        bitmaps: the bitmaps by name; made anew by every commit, after which a `Bitmap` from
            before raises `StateError`.
    """

    def __init__(
        self,
        storage: Storage,
        is_owner: bool,
        force_share: bool = False,
        writable: WritableStorage | None = None,
        lock_timeout: float = 0,
    ) -> None:
        """See `open`; ``writable`` is the storage once more if it is to be edited."""
        self.name = storage.name
        self._storage = storage
        self._force_share = force_share
        self._writable = writable
        self._edit: Edit | None = None
        self._generation = 0
        self._opened = ExitStack()
        if is_owner:
            self._opened.callback(storage.close)
        try:
            if writable:
                self._opened.enter_context(writable.write_lock(lock_timeout))
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        """Reads header and directory, and makes `bitmaps`."""
        self._survey: Survey | None = None
        self._by_bitmap: dict[int, list[Problem]] | None = None
        lock = ExitStack()
        with lock:
            if not self._force_share:
                lock.enter_context(self._storage.read_lock())
            self._file = ClusterFile(self._storage, force_share=self._force_share)
            self._header_problems = header_problems(self._file)
            self._directory = load_directory(self._file, self._header_problems)
            verify_directory(self._file, self._directory)
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
        self._leave("closed", "open")
        self._opened.close()

    def _leave(self, state: str, required: str) -> None:
        """Lets nothing read the image as it was."""
        if hasattr(self, "_file"):
            self._file.close()
        self._file = _Gone(state, required)  # type: ignore[assignment]

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
        return Bitmap(self, self.directory[index], self._generation)

    def raise_first_problem(self) -> None:
        """Does nothing if the image has no problem but remarks; what ``strict`` reading does.

        Raises:
            FormatError: the first problem that is refused, unusable or leak.
        """
        for found in self.problems:
            if found.is_serious:
                raise as_error(found)

    def edit(self, *, dry_run: bool = False) -> Edit:
        """Begins an edit: ``with image.edit() as edit:``.

        All its operations are committed together when the block ends; if it ends by an
        exception, nothing is written. With ``dry_run`` nothing is ever written, and an image open
        for reading will do.

        Raises:
            ReadOnlyImageError: the image is open for reading only.
            StateError: it is closed, or an edit is going on.
            FormatError: the image has a fault on which an edit must not build.
            UnsupportedError: it is of version 2.
            ImageLockedError, ChangedWhileReadingError: somebody else uses it, in a dry run.
            StorageError: reading failed.
        """
        self._require_open()
        if not self._writable and not dry_run:
            raise ReadOnlyImageError()
        if self._edit:
            raise StateError("being edited", "left alone until that is done")
        return Edit(self, dry_run=dry_run)

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
            self._survey = found._replace(ranges=())  # which can be many
        self._file.verify_untouched()
        return self._survey


class _Bitmaps(Mapping[str, "Bitmap"]):
    """The bitmaps that can be told by name, in the order of the directory.

    Entries that share a name, or whose name cannot be read, are only in `Image.directory`.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self._generation = image._generation
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
        return Bitmap(self._image, entry, self._generation)

    def _why_not(self, name: object) -> str:
        same = [f"@{entry.index}" for entry in self._image.directory if entry.name == name]
        if same:
            return f"is the name of several entries: {', '.join(same)}"
        return why_not_found(self)

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

    def __init__(self, image: Image, entry: DirectoryEntry, generation: int) -> None:
        """Made by `Image.bitmaps` and `Image.bitmap`."""
        self._owner = image
        self._entry = entry
        self._generation = generation

    def __repr__(self) -> str:
        entry = self._entry
        return f"<qcow2bm.Bitmap {entry.index} {entry.name!r} of {self._owner.name!r}>"

    @property
    def _image(self) -> Image:
        if self._generation != self._owner._generation:
            subject = f'the Bitmap "{escape(self._entry.name or "")}"'
            raise StateError("outdated by a commit", "looked up again", subject)
        return self._owner

    @property
    def entry(self) -> DirectoryEntry:
        """Its directory entry; this and all else raises `StateError` after a commit."""
        self._image  # noqa: B018  # raises
        return self._entry

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


class Edit:
    """Changes to the bitmaps of an image, written together when the ``with`` block ends.

    Made by `Image.edit`. Every operation sees the effect of those before it, and raises before
    anything is written. Sizes and ranges are in guest bytes.
    """

    def __init__(self, image: Image, *, dry_run: bool) -> None:
        """See `Image.edit`."""
        from qcow2bm.store.edit import Draft, require_editable

        file, directory = image._file, image._directory
        self._image = image
        self._dry_run = dry_run
        self._survey = survey(file, directory, image._header_problems)
        require_editable(file, directory, self._survey, image._header_problems)
        self._open_draft = Draft(file, directory)
        self._generation = image._generation
        self._state = "not begun"

    def __enter__(self) -> Edit:
        if self._state != "not begun":
            raise StateError(self._state, "begun anew with Image.edit", "the edit")
        if self._image._edit or self._generation != self._image._generation:
            raise StateError("being edited or edited since", "asked for an edit afterwards")
        self._image._edit = self
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
            self._image._edit = None
            self._state = "finished"

    @property
    def _draft(self) -> Draft:
        if self._state != "going on":
            raise StateError(self._state, "inside its with block", "the edit")
        self._image._require_open()
        return self._open_draft

    def _commit(self, plan: Plan) -> None:
        image, storage = self._image, self._image._writable
        if not plan.steps or not storage:
            return
        try:
            execute(plan, storage, image.file_size)
        except BaseException:
            image._leave("in doubt after a failed commit", "opened again")
            raise
        image._file.close()
        image._generation += 1
        try:
            image._load()
        except Qcow2BmError:  # what was to be done is done
            image._leave("unreadable after a commit", "opened again")

    def plan(self) -> Plan:
        """What a commit would do now: every write and every barrier, in order.

        Raises:
            FormatError: the refcounts are damaged.
            LimitError: a structure would grow too large.
            ChangedWhileReadingError: somebody wrote to the image, locks or not.
            StorageError: there is no room, or reading failed.
            UnsupportedError: the header is laid out in a way that cannot be changed safely.
        """
        from qcow2bm.store.commit import plan_commit

        image, storage = self._image, self._image._storage
        capacity = storage.capacity() if isinstance(storage, WritableStorage) else None
        try:
            return plan_commit(image._file, image._directory, self._survey, self._draft, capacity)
        finally:  # what somebody else changed meanwhile must not pass for damage
            with image._file.lock():
                verify_directory(image._file, image._directory)

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
        """Removes a bitmap, the only thing that can be done to one that is in_use.

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
        if op not in ("or", "and", "xor", "subtract"):
            raise ValueError(f'op is {op!r}, must be "or", "and", "xor" or "subtract"')
        if isinstance(source, str):
            self._draft.merge(target, source, op)
            return
        if not isinstance(source, Bitmap):
            raise TypeError(f"source is a name or a Bitmap, not {type(source).__name__}")
        from qcow2bm.store.draft import PackedSource

        size, own_size = source._image.virtual_size, self._image.virtual_size
        if size != own_size:
            reason = f"belongs to a disk of {size} bytes, but this one has {own_size}"
            raise BitmapError(source.name, reason)
        self._draft.find(target)
        packed = PackedSource(source.packed(), source.granularity, size)
        self._draft.merge(target, packed, op)

    def fit(self, name: str) -> None:
        """Makes a bitmap fit the disk after a resize by a program that left it as it was.

        What lies past the disk is dropped. What the bitmap did not cover is dirty, and with it all
        that the last cluster of its data covers: where in that the disk ended is not known.

        Raises:
            As `disable` does.
            LimitError: a bitmap of this granularity would be larger than QEMU allows.
        """
        self._draft.fit(name)
