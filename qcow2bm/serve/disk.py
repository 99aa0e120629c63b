"""A disk that is served: its data file, and the image whose bitmaps record what is written."""

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
from qcow2bm.serve.data_file import DataFile
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.interface import Storage, read_exactly
from qcow2bm.units import align_up

if TYPE_CHECKING:
    from typing_extensions import Buffer

Path = str | os.PathLike[str]
Others = Literal["refuse", "mark-in-use"]


def check(
    image: Path, data: Path, names: Iterable[str] | None = None, *, others: Others = "refuse"
) -> None:
    """Returns if `Disk` would take these; opens both for reading, and lets go of them.

    Raises as `Disk` does, as far as that can be told without writing.
    """
    with ExitStack() as opened:
        storage = FileStorage(image)
        opened.callback(storage.close)
        data_file = FileStorage(data)
        opened.callback(data_file.close)
        with data_file.read_lock(), storage.read_lock():
            require_servable(storage, data_file)
        opened.enter_context(open_image(storage)).bitmaps_to_track(names, others=others)


def require_servable(image: Storage, data: Storage) -> int:
    """The length of the disk in bytes, if QEMU sees what is written to its data file.

    The caller holds the locks of both.

    Raises:
        UnsupportedError: the image has no raw data file, or not every cluster stands in it.
        StorageError: the length of ``data`` is not that of the disk; or reading failed.
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
    # QEMU makes the data file as long as whole clusters, and a block device may be of any length.
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

    Thread-safe. A context manager: at the end the bitmaps are stored and valid, after an
    exception they stay in_use.

    *Guarantees*: a range is in the bitmaps before it changes in the data file, so a bitmap that
    is valid on disk has it (INV-SUPERSET); where storing the bitmaps has failed, writes do.

    Attributes:
        size: in bytes.
    """

    def __init__(
        self,
        image: Path,
        data: Path,
        names: Iterable[str] | None = None,
        *,
        others: Others = "refuse",
        flush_interval: float = 0,
    ) -> None:
        """Opens and locks image and data file as QEMU does, and begins to track.

        Args:
            image: the qcow2 image.
            data: its data file; what the image says of it is not looked at (INV-NOPATH).
            names: the bitmaps to track, and ``others``: see `qcow2bm.Image.track`.
            others: what to do with other enabled bitmaps.
            flush_interval: after how many seconds to store what has changed; 0 for never.

        Raises:
            ImageLockedError: somebody uses one of the two.
            And as `require_servable` and `qcow2bm.Image.track` do.
        """
        with ExitStack() as opened:
            storage = FileStorage(image, writable=True)
            opened.callback(storage.close)
            self._data = DataFile(data)
            opened.callback(self._data.close)
            tracked = opened.enter_context(open_image(storage, "r+"))
            opened.enter_context(self._data.write_lock(0))
            self.size = require_servable(storage, self._data)
            opened.callback(self._data.barrier)
            self._tracker = tracked.track(names, others=others)
            opened.push(self._end_tracking)
            if flush_interval:
                opened.enter_context(self._tracker.background(flush_interval))
            self._opened = opened.pop_all()

    def _end_tracking(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is not None:
            self._tracker.abandon()
        elif self._tracker.state != "stopped":
            self._tracker.stop()  # which says so where tracking has failed before

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def stop(self) -> None:
        """Takes no more writes, and stores the bitmaps; it can still be read.

        Waits for writes that go on. Raises as `qcow2bm.Tracker.stop` does.
        """
        self._tracker.stop()

    def close(self) -> None:
        """Stores the bitmaps, makes all data durable and closes. May be called twice.

        Raises:
            CommitError, StateError: storing the bitmaps failed, now or before.
            StorageError: making the data durable failed.
        """
        self._opened.close()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``start`` on; raises `StorageError`."""
        read_exactly(self._data, start, buffer)

    def write(self, start: int, data: Buffer, *, fua: bool = False) -> None:
        """Writes ``data`` from byte ``start`` on; durable when it returns if ``fua``.

        Raises, as all that follow:
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
        """Gives up what stands in a range, which then reads as anything."""
        with self._tracker.writing(start, length):
            self._data.trim(start, length)
        if fua:
            self.flush()

    def flush(self) -> None:
        """Returns once all that was written is durable; raises `StorageError`, then for ever."""
        self._data.barrier()
