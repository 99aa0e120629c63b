"""A disk that is served: its data file, and the image whose bitmaps record the writes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from qcow2bm.api import open as open_image
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.identity_map import require_identity_map
from qcow2bm.errors import StorageError, UnsupportedError
from qcow2bm.format.features import AUTOCLEAR_RAW_DATA_FILE, INCOMPATIBLE_DATA_FILE
from qcow2bm.log import logger
from qcow2bm.serve.data_file import DataFile
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.interface import Storage, read_exactly
from qcow2bm.units import align_up, escape

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qcow2bm.tracker.reports import IntentReport

Path = str | os.PathLike[str]
Others = Literal["refuse", "mark-in-use"]


def check(
    image: Path, data: Path, names: Iterable[str] | None = None, *, others: Others = "refuse"
) -> None:
    """Returns if `Disk` could serve an image with a data file; opens both only for reading.

    Raises:
        As `Disk` does, as far as that can be found out without writing.
    """
    with ExitStack() as opened:
        storage = FileStorage(image)
        opened.callback(storage.close)
        data_file = FileStorage(data)
        opened.callback(data_file.close)
        with data_file.read_lock(), storage.read_lock():
            require_servable(storage, data_file)
        tracked = opened.enter_context(open_image(storage))
        if not tracked.recoverable:  # what can be recovered will be when tracking begins
            tracked.bitmaps_to_track(names, others=others)


def require_servable(image: Storage, data: Storage) -> int:
    """Returns the size of the disk in bytes, if QEMU sees what is written to the data file.

    The caller holds the locks of both files.

    Raises:
        UnsupportedError: the image has no raw data file, or the data file does not hold every
            cluster at its guest offset.
        StorageError: the length of ``data`` is not the size of the disk; or reading failed.
        FormatError: the image is damaged.
    """
    file = ClusterFile(image, force_share=False)
    header = file.header
    if not (
        header.incompatible_features & INCOMPATIBLE_DATA_FILE
        and header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE
    ):
        raise UnsupportedError(
            "serving an image without a raw external data file (data_file_raw=on)"
        )
    for is_there, what in (
        (header.backing_file_offset, "a backing file"),
        (header.crypt_method, "encryption"),
        (header.nb_snapshots, "internal snapshots"),
    ):
        if is_there:
            raise UnsupportedError(f"serving an image with {what}")
    size, disk = data.size(), file.virtual_size
    # QEMU rounds the data file up to whole clusters, and a block device may have any length.
    is_fitting = size >= disk and (
        size <= align_up(disk, file.cluster_size)
        or (isinstance(data, FileStorage) and data.capacity() is not None)
    )
    if not is_fitting:
        raise StorageError(data.name, 0, 0, f"has {size} bytes, and the disk has {disk}")
    require_identity_map(file)
    return disk


class Disk:
    """A disk whose writes are recorded in the bitmaps of its image.

    A Disk is thread-safe, and a context manager: at the end of the block the bitmaps are stored
    and valid; after an exception they stay in_use.

    *Guarantees*: a range is dirty in the bitmaps before it changes in the data file, so every
    bitmap that is valid on disk contains the range (INV-SUPERSET). Once storing the bitmaps has
    failed, every write fails.

    Attributes:
        size: the size of the disk in bytes.
    """

    def __init__(
        self,
        image: Path,
        data: Path,
        names: Iterable[str] | None = None,
        *,
        others: Others = "refuse",
        flush_interval: float = 0,
        intent: bool = False,
    ) -> None:
        """Opens and locks image and data file as QEMU does, and begins to track.

        Args:
            image: the qcow2 image.
            data: the data file of the image. The name of a data file in the image is not used
                (INV-NOPATH).
            names: the bitmaps to track, see `qcow2bm.Image.track`.
            others: what to do with other enabled bitmaps, see `qcow2bm.Image.track`.
            flush_interval: the seconds between two flushes of what has changed in the bitmaps; 0
                for no flush before the end.
            intent: whether a crash loses no bitmap, see `qcow2bm.Image.track`.

        Raises:
            ImageLockedError: another process uses the image or the data file.
            Qcow2BmError: as `require_servable` and `qcow2bm.Image.track` do.
        """
        with ExitStack() as opened:
            storage = FileStorage(image, writable=True)
            opened.callback(storage.close)
            self._name = escape(storage.name)
            self._data = DataFile(data)
            opened.callback(self._data.close)
            tracked = opened.enter_context(open_image(storage, "r+"))
            opened.enter_context(self._data.write_lock(0))
            self.size = require_servable(storage, self._data)
            opened.callback(self._data.barrier)
            self._tracker = tracked.track(names, others=others, intent=intent)
            opened.push(self._end_tracking)
            if flush_interval:
                opened.enter_context(self._tracker.background(flush_interval))
            self._opened = opened.pop_all()
        logger.info("%s: tracking %s", self._name, [escape(name) for name in self._tracker.names])

    def _end_tracking(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is not None:
            logger.warning("%s: the bitmaps stay in use: %s", self._name, error)
            self._tracker.give_up()
        elif self._tracker.state != "stopped":
            self.stop()  # which raises if tracking has failed before

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    @property
    def intent(self) -> IntentReport | None:
        """What the intent bitmap has cost so far; None without one."""
        return self._tracker.intent

    def stop(self) -> None:
        """Waits for the writes in flight, refuses further writes, and stores the bitmaps.

        The disk can still be read. Raises as `qcow2bm.Tracker.stop` does.
        """
        self._tracker.stop()
        logger.info("%s: the bitmaps are stored and valid", self._name)

    def close(self) -> None:
        """Stores the bitmaps, makes all data durable, and closes both files. May be called twice.

        Raises:
            CommitError, StateError: storing the bitmaps failed, now or earlier.
            StorageError: making the data durable failed.
        """
        self._opened.close()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``start`` on; raises `StorageError` if reading fails."""
        read_exactly(self._data, start, buffer)

    def write(self, start: int, data: Buffer, *, fua: bool = False) -> None:
        """Writes ``data`` from byte ``start`` on; with ``fua`` the data are durable on return.

        Raises, as `zero`, `trim` and `flush` do:
            StorageError: writing failed.
            StateError: storing the bitmaps has failed, or the disk is closed.
        """
        with self._tracker.writing(start, memoryview(data).nbytes):
            self._data.write(start, [data])
        if fua:
            self.flush()

    def zero(
        self,
        start: int,
        length: int,
        *,
        may_trim: bool = False,
        is_fast: bool = False,
        fua: bool = False,
    ) -> None:
        """Makes a range read as zeros; see `DataFile.zero`."""
        with self._tracker.writing(start, length):
            self._data.zero(start, length, may_trim=may_trim, is_fast=is_fast)
        if fua:
            self.flush()

    def trim(self, start: int, length: int, *, fua: bool = False) -> None:
        """Discards the data of a range; the range then reads as anything."""
        with self._tracker.writing(start, length):
            self._data.trim(start, length)
        if fua:
            self.flush()

    def flush(self) -> None:
        """Returns once all data written so far are durable.

        Raises:
            StorageError: making the data durable failed, now or earlier.
        """
        self._data.barrier()
