"""A fake machine, and the address of its QMP server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakeqemu import FakeBitmap, FakeQemu


@pytest.fixture
def qemu() -> FakeQemu:
    """A machine whose disk has the bitmaps a and b, which a migration put a veto on."""
    fake = FakeQemu()
    fake.bitmaps["a"] = FakeBitmap(bits={1, 2, 3}, vetoed=True)
    fake.bitmaps["b"] = FakeBitmap(4096, {7}, recording=False, vetoed=True)
    return fake


@pytest.fixture
def address(qemu: FakeQemu, tmp_path: Path) -> Iterator[str]:
    with qemu.serving(tmp_path / "qmp") as path:
        yield path
