"""QEMU finds what `prune` left in an image, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.console import run
from support.qemu import Disk

SIZE = 64 << 20


@pytest.mark.spec("PRUNE-6")
def test_qemu_finds_the_bitmaps_that_were_kept(tmp_path: Path) -> None:
    disk = Disk.create(tmp_path / "vm.qcow2", SIZE, cluster_size=4096)
    for name in ("2026-11-30", "2026-12-01", "2026-12-02", "weekly"):
        disk.add(name, 4096)
    disk.io("write 1M 64k")
    pruned = run(["prune", "vm.qcow2", "--keep-pattern", "2026-12-*"], tmp_path)
    assert (pruned.status, pruned.err) == (0, "")
    assert [bitmap["name"] for bitmap in disk.listed()] == ["2026-12-01", "2026-12-02"]
    assert disk.check().returncode == 0
    assert disk.extents("2026-12-01") == [(1 << 20, 64 << 10)]
