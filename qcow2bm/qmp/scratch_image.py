"""An image that QEMU has open for the time of one command: a file without a name.

QEMU is lent the file over the socket, so it needs access to no folder. The image is the scratch
node: bitmaps are merged into it, and QEMU stores them when the node is removed; or QEMU loads the
bitmaps that the image has, and they are merged from it.

*Spec*: spec/sidecar.md, "A running machine"; spec/live.md, "Names".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from qcow2bm.api import open
from qcow2bm.clusters.empty_image import build_empty_image
from qcow2bm.errors import QmpError, StorageError
from qcow2bm.log import logger
from qcow2bm.migration.sidecar import SavedBitmap
from qcow2bm.qmp import scratch
from qcow2bm.qmp.commands import QmpCommands


@contextmanager
def blank(virtual_size: int) -> Iterator[BinaryIO]:
    """Has an image without bitmaps, in a file without a name, for the duration of the block.

    Raises:
        StorageError: there is no room for temporary files.
        FormatError: no image can have a disk of ``virtual_size`` bytes.
    """
    image = build_empty_image(virtual_size)
    with _nameless(image.head, image.length) as file:
        yield file


@contextmanager
def with_bitmaps(virtual_size: int, bitmaps: Iterable[SavedBitmap]) -> Iterator[BinaryIO]:
    """Has an image with bitmaps, which are disabled, for the duration of the block.

    Raises as `blank` does.
    """
    image = build_empty_image(virtual_size)
    data = bytearray(image.head.ljust(image.length, b"\0"))
    with open(data, "r+") as opened, opened.edit() as edit:
        for bitmap in bitmaps:
            edit.load(bitmap.name, bitmap.granularity, bitmap.octets, enabled=False)
    with _nameless(data, len(data)) as file:
        yield file


@contextmanager
def _nameless(head: bytes | bytearray, length: int) -> Iterator[BinaryIO]:
    """Has a file without a name that begins with ``head``, and has zeros up to its ``length``."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(TemporaryFile(buffering=0))
            file.write(head)
            file.truncate(length)
        except OSError as error:
            raise StorageError.from_os(error, "a temporary file", 0, 0, "writing") from error
        yield cast("BinaryIO", file)


@contextmanager
def lent(monitor: QmpCommands, file: BinaryIO, *, read_only: bool = False) -> Iterator[None]:
    """Has QEMU open an image as the scratch node for the duration of the block.

    At the end QEMU stores the bitmaps that the node has, unless it is ``read_only``.

    Raises:
        QmpError: QEMU does not answer, or refuses.
    """
    with _descriptor(file, read_only=read_only) as descriptor:
        fdset = monitor.lend(descriptor)
    try:
        below = {"driver": "file", "filename": f"/dev/fdset/{fdset}"}
        options: dict[str, object] = {"driver": "qcow2", "file": below}
        if read_only:
            options["read-only"] = True
        with scratch.scratch_node(monitor, options):
            yield
    finally:
        try:
            monitor.take_back(fdset)
        except QmpError as error:  # the next command that has a scratch node does it
            logger.warning("QEMU keeps a temporary file open until the next command: %s", error)


@contextmanager
def _descriptor(file: BinaryIO, *, read_only: bool) -> Iterator[int]:
    """Has a descriptor with the access that QEMU will ask for: it takes no other."""
    if not read_only:
        yield file.fileno()
        return
    try:
        descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
    except OSError as error:
        raise StorageError.from_os(error, "a temporary file", 0, 0) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
