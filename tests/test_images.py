"""The images the other tests are made of: sound for the real QEMU as well."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.images import ZEROES, Stored, Word, build_image, extension
from support.qemu import Disk, missing_tools

import qcow2bm
from qcow2bm.format.extensions import BACKING_FORMAT

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}"),
]


@pytest.mark.parametrize("refcount_order", range(7))
@pytest.mark.parametrize("cluster_bits", [9, 10, 12, 16, 21])
@pytest.mark.parametrize("whole_clusters", [True, False])
def test_qemu_finds_nothing_wrong(
    tmp_path: Path, cluster_bits: int, refcount_order: int, whole_clusters: bool
) -> None:
    (tmp_path / "base").touch()
    cluster_size = 1 << cluster_bits
    stored: list[Word] = [ZEROES, b"\x01", b"\xff" * cluster_size]
    image = build_image(
        Stored(b"daily", stored, after_table=b"\xff" * 8),
        Stored(b"not \xff UTF-8", granularity_bits=20),
        *(Stored(b"%d" % number, stored) for number in range(20 if cluster_bits < 16 else 0)),
        cluster_bits=cluster_bits,
        size=3 * 8 * cluster_size << 16,
        refcount_order=refcount_order,
        backing_name=b"base",
        extensions=[extension(BACKING_FORMAT, b"raw"), extension(0x12345678, b"unknown")],
        whole_clusters=whole_clusters,
    )
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image.data)
    done = Disk(path).check()
    assert done.returncode == 0, done.stdout + done.stderr
    with qcow2bm.open(path) as opened:
        assert opened.problems == ()


@pytest.mark.parametrize("cluster_bits", [9, 16])
def test_qemu_finds_nothing_wrong_with_version_2(tmp_path: Path, cluster_bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build_image(version=2, cluster_bits=cluster_bits).data)
    done = Disk(path).check()
    assert done.returncode == 0, done.stdout + done.stderr
