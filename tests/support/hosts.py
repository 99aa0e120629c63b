"""Hosts with one disk between them: loop devices of one file, each with its own page cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.qemu import ToolError, run_ok


class Host:
    """A host: its device, and a buffered descriptor that keeps what is cached."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR)

    def reopen(self) -> None:
        os.close(self.descriptor)
        self.descriptor = os.open(self.path, os.O_RDWR)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Writes through the cache; when the method returns, the data are on the disk."""
        assert os.pwrite(self.descriptor, data, offset) == len(data)
        os.fsync(self.descriptor)


@contextmanager
def host(path: Path, sector: int) -> Iterator[Host]:
    """A host whose disk is in a file; skips where there can be no such device."""
    command = ("losetup", "--find", "--show", "--sector-size", str(sector), path)
    try:
        device = Path(run_ok(*command).strip())
    except (ToolError, FileNotFoundError) as error:
        pytest.skip(f"no loop device: {error}")
    try:
        opened = Host(device)
        try:
            yield opened
        finally:
            os.close(opened.descriptor)
    finally:
        run_ok("losetup", "--detach", device)
