"""An open qcow2 file: its header area, and reads within its bounds."""

from __future__ import annotations

from typing import Any

import pytest
from support.images import Built, Stored, build_image, extension
from support.scripted_storage import OnceAt, ScriptedStorage

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import ChangedWhileReadingError, LimitError, ShortReadError, UnsupportedError
from qcow2bm.format.extensions import BACKING_FORMAT, DATA_FILE, FEATURE_NAMES
from qcow2bm.format.features import Feature, FeatureName, FeatureNames, build_feature_names

CLUSTER = 512


def opened(image: Built) -> ClusterFile:
    return ClusterFile(ScriptedStorage(image.data), force_share=False)


def image_of(**options: Any) -> Built:
    return build_image(Stored(), **options)


# --- header area ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("additional_fields", [b"", b"unknown!" * 4])
def test_the_extensions_begin_behind_the_header(version: int, additional_fields: bytes) -> None:
    if version == 2:
        additional_fields = b""
    listed = [extension(BACKING_FORMAT, b"raw"), extension(0x12345678, b"")]
    image = image_of(version=version, additional_fields=additional_fields, extensions=listed)
    file = opened(image)
    assert file.extensions_offset == image.offset("header-extension", 0)
    assert list(file.area.extensions[:2]) == listed
    assert file.header.additional_fields == additional_fields
    assert file.find(BACKING_FORMAT) == listed[0]
    assert file.find(DATA_FILE) is None


def test_of_two_extensions_of_a_type_the_last_counts() -> None:
    listed = [extension(DATA_FILE, name) for name in (b"first", b"last \xff")]
    assert opened(image_of(extensions=listed)).find(DATA_FILE) == listed[-1]


def test_the_payload_offset_is_that_of_the_last_extension_of_a_type() -> None:
    listed = [extension(DATA_FILE, name) for name in (b"first", b"last \xff")]
    image = image_of(extensions=[*listed, extension(BACKING_FORMAT, b"raw")])
    file = opened(image)
    assert file.payload_offset(DATA_FILE) == image.offset("header-extension", 1) + 8
    assert file.read(image.offset("header-extension", 1) + 8, 6) == b"last \xff"
    assert file.payload_offset(FEATURE_NAMES) is None


def test_extensions_end_where_the_backing_name_begins() -> None:
    image = image_of(backing_name=b"base")
    name = image.offset("backing-name")
    image.plant(name - 8, "header", 0, "backing_file_offset")  # on the end marker
    file = opened(image)
    assert len(file.area.extensions) == 1
    assert file.area.end == b""
    assert file.backing_file == "\0" * 4


@pytest.mark.parametrize(
    ("offset", "size", "name"),
    [
        (0, 4, None),
        (300, 0, None),
        (300, 4, "base"),
        (CLUSTER - 2, 4, "ba"),
        (CLUSTER, 4, ""),
        (CLUSTER + 1, 4, None),
        (1 << 63, 4, None),
        (300, (1 << 32) - 1, "base" + "\0" * (CLUSTER - 304)),
    ],
)
def test_the_backing_name_is_taken_from_the_first_cluster_only(
    offset: int, size: int, name: str | None
) -> None:
    image = image_of()
    image.data[CLUSTER : CLUSTER + 4] = b"NOT!"
    place = min(offset, CLUSTER)
    image.data[place : min(place + 4, CLUSTER)] = (
        b"base"[: CLUSTER - place] if offset else b"QFI\xfb"
    )
    image.plant(offset, "header", 0, "backing_file_offset")
    image.plant(size, "header", 0, "backing_file_size")
    assert opened(image).backing_file == name


def test_feature_names_come_from_the_image_where_the_specification_has_none() -> None:
    names = FeatureNames(
        (
            FeatureName(0, 0, b"something else".ljust(46, b"\0")),
            FeatureName(0, 5, b"fifth".ljust(46, b"\0")),
            FeatureName(1, 5, b"wrong kind".ljust(46, b"\0")),
            FeatureName(0, 7, bytes(46)),
        )
    )
    listed = [extension(FEATURE_NAMES, build_feature_names(names))]
    image = image_of(extensions=listed, header={"incompatible_features": 0b11100001})
    assert opened(image).features("incompatible") == (
        Feature(0, "dirty bit"),
        Feature(5, "fifth"),
        Feature(6, None),
        Feature(7, None),
    )
    assert opened(image_of()).feature_names == FeatureNames()


def test_a_version_that_changes_between_two_reads_is_still_refused() -> None:
    image = image_of(cluster_bits=10)
    change = OnceAt(1, lambda: image.plant(4, "header", 0, "version") and None)
    with pytest.raises(UnsupportedError):
        ClusterFile(ScriptedStorage(image.data, change), force_share=True)


# --- reads ------------------------------------------------------------------------------------


def test_the_last_cluster_counts_as_whole() -> None:
    image = image_of(whole_clusters=False)
    end = len(image.data)
    assert end % CLUSTER
    file = opened(image)
    whole = -(-end // CLUSTER) * CLUSTER
    assert file.read(end - 8, whole - end + 8) == bytes(image.data[-8:]) + bytes(whole - end)
    assert file.read(end, whole - end) == bytes(whole - end)
    assert file.contains(whole, 0)
    assert not file.contains(whole, 1)
    with pytest.raises(LimitError):
        file.read(end, whole - end + 1)
    with pytest.raises(LimitError):
        file.read(1 << 63, 1)


def test_zeros_past_the_end_overwrite_what_a_buffer_held() -> None:
    image = image_of(whole_clusters=False)
    buffer = bytearray(b"\xff" * 16)
    opened(image).read_into(len(image.data) - 8, memoryview(buffer))
    assert buffer == image.data[-8:] + bytes(8)


def test_a_file_that_became_shorter_is_a_short_read() -> None:
    image = image_of()
    file = opened(image)
    del image.data[-CLUSTER:]
    with pytest.raises(ShortReadError):
        file.read(len(image.data), 8)


@pytest.mark.parametrize("force_share", [False, True])
def test_any_write_to_the_storage_is_a_change_unless_sharing_is_forced(force_share: bool) -> None:
    storage = ScriptedStorage(image_of().data)
    file = ClusterFile(storage, force_share=force_share)
    file.verify_untouched()
    storage.token = "written to"
    if force_share:
        file.verify_untouched()
        return
    with pytest.raises(ChangedWhileReadingError, match="image"):
        file.verify_untouched()


def test_verify_compares_the_bytes_that_are_used_and_no_others() -> None:
    image = image_of(backing_name=b"base")
    used = image.offset("backing-name") + 4
    for offset in range(used):
        file = opened(image)
        image.data[offset] ^= 1
        with pytest.raises(ChangedWhileReadingError):
            file.verify()
        image.data[offset] ^= 1
    file = opened(image)
    image.data[used:CLUSTER] = b"\xff" * (CLUSTER - used)
    file.verify()
