"""Making the container of an existing raw disk; with QEMU in tests/oracle/test_attach.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import qcow2bm
from qcow2bm.clusters.container import ContainerLayout, default_cluster_size
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.identity_map import require_identity_map
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.memory import MemoryStorage

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(300 * 512))
    return path


@pytest.mark.parametrize("cluster_size", [512, 4 * KiB, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("size", [512, 1536, 64 * KiB, MiB + 512, 33 * MiB])
def test_every_cluster_is_where_it_is_on_the_disk(size: int, cluster_size: int) -> None:
    layout = ContainerLayout(size, cluster_size, b"/disk.raw")
    data = b"".join(layout.pieces())
    assert len(data) == layout.length
    storage = MemoryStorage(bytearray(data))
    require_identity_map(ClusterFile(storage, force_share=False))
    with qcow2bm.open(data) as image:
        assert image.virtual_size == size
        assert image.has_raw_data_file
        assert image.problems == ()
        found = image.check()
    assert found.problems == ()
    assert found.leaked_clusters == 0
    assert found.is_complete


@pytest.mark.parametrize(
    ("size", "cluster_size"),
    [
        (512, 64 * KiB),
        (256 * GiB, 64 * KiB),
        (256 * GiB + 512, 128 * KiB),
        (4 * TiB, MiB),
        (16 * TiB, 2 * MiB),
        (1 << 60, 2 * MiB),
    ],
)
def test_the_l2_tables_of_the_default_fit_the_cache_of_qemu(size: int, cluster_size: int) -> None:
    assert default_cluster_size(size) == cluster_size


@pytest.mark.parametrize("size", [0, 511, 513, -512])
def test_a_layout_is_of_whole_sectors(size: int) -> None:
    with pytest.raises(ValueError, match="whole sectors"):
        ContainerLayout(size, 64 * KiB, b"x")


@pytest.mark.parametrize("cluster_size", [0, 256, 1000, 4 * MiB])
def test_a_cluster_size_is_one_of_the_format(cluster_size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        ContainerLayout(MiB, cluster_size, b"x")


def test_what_qemu_could_not_open_is_not_made() -> None:
    with pytest.raises(qcow2bm.LimitError, match="L1 table"):
        ContainerLayout(1 << 62, 64 * KiB, b"x")
    with pytest.raises(qcow2bm.LimitError, match="name"):
        ContainerLayout(MiB, 512, b"x" * 400)
    with pytest.raises(qcow2bm.LimitError, match="name"):
        ContainerLayout(MiB, 64 * KiB, b"x" * 1024)


def test_the_disk_stays_and_the_bitmaps_are_there(disk: Path, tmp_path: Path) -> None:
    before, times = disk.read_bytes(), disk.stat().st_mtime_ns
    path = tmp_path / "vm.qcow2"
    qcow2bm.attach(disk, path, ["daily", "weekly"], granularity=4096)
    assert (disk.read_bytes(), disk.stat().st_mtime_ns) == (before, times)
    with qcow2bm.open(path) as image:
        assert image.virtual_size == len(before)
        assert [
            (b.name, b.granularity, b.auto, b.status, b.count()) for b in image.bitmaps.values()
        ] == [
            ("daily", 4096, True, "valid", 0),
            ("weekly", 4096, True, "valid", 0),
        ]
        assert image.problems == ()
    assert sorted(tmp_path.iterdir()) == [disk, path]


def test_without_bitmaps_there_is_no_extension(disk: Path, tmp_path: Path) -> None:
    qcow2bm.attach(disk, tmp_path / "vm.qcow2")
    with qcow2bm.open(tmp_path / "vm.qcow2") as image:
        assert image.bitmaps_extension is None


def test_the_name_in_the_header_is_absolute(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    qcow2bm.attach("disk.raw", "vm.qcow2")
    assert os.fsencode(disk) in (tmp_path / "vm.qcow2").read_bytes()[:65536]


def test_no_file_is_overwritten(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    path.write_bytes(b"mine")
    with pytest.raises(qcow2bm.StorageError, match="exists already"):
        qcow2bm.attach(disk, path)
    with pytest.raises(qcow2bm.StorageError, match="exists already"):
        qcow2bm.attach(disk, disk)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 bytes"),
        (b"x" * 1000, "1000 bytes: the size must be whole sectors"),
        (b"QFI\xfb" + bytes(508), "begins like a qcow2 image"),
    ],
)
def test_a_disk_that_is_none_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(content)
    with pytest.raises(qcow2bm.Qcow2BmError, match=match):
        qcow2bm.attach(disk, tmp_path / "vm.qcow2", ["daily"])
    assert list(tmp_path.iterdir()) == [disk]


def test_the_caller_may_know_that_a_disk_is_raw(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"QFI\xfb" + bytes(508))
    qcow2bm.attach(disk, tmp_path / "vm.qcow2", is_raw=True)
    assert (tmp_path / "vm.qcow2").exists()


def test_after_an_error_no_file_is_left(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(qcow2bm.BitmapExistsError):
        qcow2bm.attach(disk, tmp_path / "vm.qcow2", ["a", "a"])
    with pytest.raises(ValueError, match="granularity"):
        qcow2bm.attach(disk, tmp_path / "vm.qcow2", ["a"], granularity=1000)
    assert list(tmp_path.iterdir()) == [disk]


def test_a_disk_that_is_written_to_is_refused(disk: Path, tmp_path: Path) -> None:
    writer = FileStorage(disk, writable=True)
    try:
        with writer.write_lock(0), pytest.raises(qcow2bm.ImageLockedError):
            qcow2bm.attach(disk, tmp_path / "vm.qcow2")
    finally:
        writer.close()
    assert list(tmp_path.iterdir()) == [disk]
