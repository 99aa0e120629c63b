from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.storage.base import Storage
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.memory import MemoryStorage, StreamStorage
from qcow2bm.storage.sources import open_source

if TYPE_CHECKING:
    from qcow2bm.storage.sources import Source


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (b"", MemoryStorage),
        (bytearray(), MemoryStorage),
        (memoryview(b""), MemoryStorage),
        (io.BytesIO(), StreamStorage),
    ],
)
def test_each_source_has_its_storage(source: Source, kind: type[Storage]) -> None:
    storage = open_source(source)
    assert type(storage) is kind
    assert isinstance(storage, Storage)


def test_paths_and_open_files(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    for source in (path, str(path)):
        storage = open_source(source)
        assert type(storage) is FileStorage
        assert isinstance(storage, Storage)
        assert storage.name == str(path)
        storage.close()
    with open(path, "rb") as buffered, open(path, "rb", buffering=0) as raw:
        assert type(open_source(buffered)) is type(open_source(raw)) is StreamStorage


def test_a_storage_is_its_own() -> None:
    storage = MemoryStorage(b"")
    assert open_source(storage) is storage


@pytest.mark.parametrize("source", [None, 3, object(), ["path"]])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(TypeError, match=f"cannot open {type(source).__name__}: need a path"):
        open_source(source)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources") / "disk"


@given(data=st.binary(max_size=100), offset=st.integers(0, 150), length=st.integers(0, 150))
def test_all_storages_read_the_same(path: Path, data: bytes, offset: int, length: int) -> None:
    path.write_bytes(data)
    expected = data[offset : offset + length]
    with open(path, "rb", buffering=0) as raw:
        for source in (path, data, io.BytesIO(data), raw):
            storage = open_source(source)
            buffer = bytearray(length)
            assert storage.size() == len(data)
            assert storage.read_into(offset, memoryview(buffer)) == len(expected)
            assert buffer == expected.ljust(length, b"\0")
            storage.close()
