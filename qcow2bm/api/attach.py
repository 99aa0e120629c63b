"""Making the image that keeps the bitmaps of an existing raw disk.

*Spec*: spec/image.md, "Containers".
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from qcow2bm.api.image import open as open_image
from qcow2bm.clusters.container import ContainerLayout, default_cluster_size
from qcow2bm.errors import FormatError, StorageError, UnsupportedError
from qcow2bm.format.header import MAGIC
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.interface import read_bytes
from qcow2bm.storage.new_file import new_file, require_new

_SECTOR = 512


def attach(
    raw: str | os.PathLike[str],
    image: str | os.PathLike[str],
    bitmaps: Iterable[str] = (),
    *,
    granularity: int | None = None,
    cluster_size: int | None = None,
    is_raw: bool = False,
    lock_timeout: float = 0,
) -> None:
    """Makes a qcow2 image whose external data file is an existing raw disk.

    QEMU, or the nbdkit plugin, then opens ``image`` in the place of the raw disk, and the bitmaps
    in ``image`` record the writes. Every guest cluster is allocated at its own offset of the raw
    disk, so that the guest sees the disk exactly as it is.

    *Guarantees*: the raw disk is never opened for writing. ``image`` gets its name when it is
    whole and durable; no existing file is overwritten. After an error no file is left.

    Args:
        raw: the disk, a regular file or a block device. Its absolute path is stored in the image,
            since QEMU resolves a relative one against its own working directory.
        image: the path of the new image.
        bitmaps: names of bitmaps that the image has from the beginning: enabled, and clean. They
            are complete for a backup chain whose full backup is made after this call.
        granularity: of these bitmaps, see `Edit.add`.
        cluster_size: of the image, a power of two from 512 bytes to 2 MiB. By default the
            smallest from 64 KiB on for which the L2 tables fit QEMU's cache of 32 MiB.
        is_raw: True if the caller knows that the disk is raw although it begins like a qcow2 image.
        lock_timeout: how many seconds to wait while another process writes to the raw disk.

    Raises:
        FormatError: the disk begins like a qcow2 image, and ``is_raw`` is not given.
        UnsupportedError: the size of the disk is 0, or not whole sectors of 512 bytes.
        LimitError: the disk is too large for QEMU with this cluster size, or its path too long.
        BitmapError, ValueError: as `Edit.add` raises them.
        ImageLockedError: another process writes to the raw disk.
        StorageError: ``image`` exists already, or reading or writing failed.
    """
    path = os.fspath(image)
    require_new(path)
    disk = FileStorage(raw, lock_timeout=lock_timeout)
    try:
        with disk.read_lock():
            size = disk.size()
            if not size or size % _SECTOR:
                raise UnsupportedError(
                    f"a raw disk of {size} bytes: the size must be whole sectors of {_SECTOR} bytes"
                )
            start = read_bytes(disk, 0, len(MAGIC))
            if start == MAGIC and not is_raw:
                reason = "begins like a qcow2 image, which keeps bitmaps itself"
                raise FormatError("raw disk", "", 0, reason, "assert-raw")
            layout = ContainerLayout(
                size,
                default_cluster_size(size) if cluster_size is None else cluster_size,
                os.fsencode(os.path.abspath(os.fspath(raw))),
            )
            _write(path, layout, bitmaps, granularity)
    finally:
        disk.close()


def _write(
    path: str, layout: ContainerLayout, bitmaps: Iterable[str], granularity: int | None
) -> None:
    try:
        with new_file(path) as part:
            with open(part, "wb") as file:
                file.writelines(layout.pieces())
            with open_image(part, "r+") as container, container.edit() as edit:
                for name in bitmaps:
                    edit.add(name, granularity)
    except FileExistsError:
        require_new(path)
        raise
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError.from_os(error, path, 0, 0, "writing") from error
