"""The requirements of spec/header.md and spec/refcounts.md."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import pytest
from support.problem_images import broken
from support.spec_image import END, EXTENSION, extension, image, in_header, patched
from support.specreader import vector

import qcow2bm
from qcow2bm.errors import FormatError, UnsupportedError
from qcow2bm.format.extensions import BACKING_FORMAT, build_extensions, parse_extensions
from qcow2bm.format.header import build_header, parse_header
from qcow2bm.format.refcounts import build_refcount_block, parse_refcount_block
from qcow2bm.format.snapshots import parse_snapshot_table


@pytest.mark.spec("HDR-1")
def test_version_2_ends_before_the_feature_fields() -> None:
    header = parse_header(patched(vector("header.md", "hex header"), *in_header(version=2)))
    assert header.incompatible_features == 0
    assert header.compatible_features == 0
    assert header.autoclear_features == 0
    assert (header.refcount_order, header.header_length) == (4, 72)
    assert build_header(header) == build_header(header)[:72]


@pytest.mark.spec("HDR-2")
def test_a_short_header_has_no_compression_type() -> None:
    data = patched(vector("header.md", "hex header"), *in_header(header_length=104))
    header = parse_header(data)
    assert (header.compression_type, header.padding, header.additional_fields) == (None, b"", b"")
    assert build_header(header) == data[:104]
    with qcow2bm.open(
        patched(image(), *in_header(header_length=104), (104, image()[EXTENSION:END] + bytes(16)))
    ) as opened:
        assert opened.problems == ()
        assert len(opened.bitmaps) == 3


@pytest.mark.spec("HDR-3")
def test_the_disk_is_whole_sectors() -> None:
    with qcow2bm.open(broken("header.size.unaligned")) as opened:
        assert opened.header.size == 5242369
        assert opened.virtual_size == 5242368


@pytest.mark.spec("INV-UNKNOWN")
@pytest.mark.spec("HDR-4")
def test_additional_fields_survive() -> None:
    data = bytearray(vector("header.md", "hex header"))
    data[112:120] = bytes(range(8))
    assert build_header(parse_header(bytes(data))) == data


@pytest.mark.spec("HDR-5")
def test_an_image_with_such_a_header_is_not_opened() -> None:
    sound = image()
    with pytest.raises(FormatError, match="magic"):
        qcow2bm.open(patched(sound, (0, b"QFI\0")))
    for version in (0, 1, 4):
        with pytest.raises(UnsupportedError, match=f"version {version}"):
            qcow2bm.open(patched(sound, *in_header(version=version)))
    for bits in (0, 8, 22, 1 << 31):
        with pytest.raises(FormatError, match="cluster_bits"):
            qcow2bm.open(patched(sound, *in_header(cluster_bits=bits)))
    for version, end in ((2, 72), (3, 104)):
        short = patched(sound, *in_header(version=version))[:end]
        with pytest.raises(FormatError, match="cut off"):
            qcow2bm.open(short[:-1])
        qcow2bm.open(short).close()


@pytest.mark.no_cover  # which looks at the files of the source
@pytest.mark.spec("INV-NOPATH")
@pytest.mark.spec("HDR-6")
def test_no_file_that_an_image_names_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.qcow2"
    name = bytes(tmp_path / "named")
    path.write_bytes(
        patched(
            image(),
            *in_header(backing_file_offset=400, backing_file_size=len(name)),
            *in_header(incompatible_features=4, autoclear_features=3),
            (END, extension(0x44415441, 5, b"named\0\0\0") + bytes(8)),
            (400, name),
        )
    )
    touched: list[object] = []
    for function in ("open", "stat", "lstat", "access", "readlink"):
        real = getattr(os, function)

        def recorded(where: object, *rest: object, real: object = real, **named: object) -> object:
            touched.append(where)
            return real(where, *rest, **named)  # type: ignore[operator]

        monkeypatch.setattr(os, function, recorded)
    with qcow2bm.open(path) as opened:
        assert opened.backing_file == os.fsdecode(name)
        assert opened.problems == ()
        assert opened.bitmaps["daily"].count() > 0
    assert {os.fspath(where) for where in touched if isinstance(where, str | Path)} == {str(path)}


@pytest.mark.spec("INV-UNKNOWN")
@pytest.mark.spec("FEAT-1")
def test_an_unknown_incompatible_bit_breaks_every_bitmap() -> None:
    with qcow2bm.open(broken("header.incompatible_features.unknown")) as opened:
        assert [bitmap.status for bitmap in opened.bitmaps.values()] == ["broken"] * 3


@pytest.mark.spec("FEAT-2")
def test_the_specification_names_a_feature_bit_before_the_image_does() -> None:
    names = vector("header.md", "hex feature name table") + b"\2\0" + b"wrong".ljust(46, b"\0")
    data = patched(
        image(),
        *in_header(autoclear_features=1 << 63 | 1 << 62 | 1),
        (END, extension(0x6803F857, len(names), names) + bytes(8)),
    )
    with qcow2bm.open(data) as opened:
        assert opened.features("autoclear") == ((0, "bitmaps"), (62, None), (63, "generation"))


@pytest.mark.spec("INV-UNKNOWN")
@pytest.mark.spec("EXT-1")
def test_unknown_extensions_survive_in_order() -> None:
    area = (
        extension(7, 3, b"abcPPPPP")
        + extension(BACKING_FORMAT, 3, b"raw\0\0\0\0\0")
        + extension(5, 0, b"")
        + extension(7, 8, b"abcdefgh")
        + bytes(8)
    )
    found = parse_extensions(area)
    assert [each.type for each in found.extensions] == [7, BACKING_FORMAT, 5, 7]
    assert build_extensions(found) == area


@pytest.mark.spec("EXT-2")
def test_an_area_may_end_within_padding() -> None:
    cut = in_header(backing_file_offset=END + 12)
    with qcow2bm.open(patched(image(), *cut, (END, extension(1, 2, b"xy")))) as opened:
        assert [problem.id for problem in opened.problems] == ["header-extension.end.missing"]
        assert [each.data for _, each in opened.extensions[1:]] == [b"xy"]


@pytest.mark.spec("EXT-2")
def test_a_full_area_needs_no_end_marker() -> None:
    with qcow2bm.open(broken("header-extension.end.missing")) as opened:
        assert [each.type for _, each in opened.extensions] == [0x23852875, 1]
        assert {bitmap.status for bitmap in opened.bitmaps.values()} == {"valid", "inconsistent"}


@pytest.mark.spec("EXT-3")
def test_the_last_extension_of_a_type_counts() -> None:
    other = bytearray(image()[EXTENSION:END])
    other[8:12] = bytes(4)  # nb_bitmaps
    data = patched(image(), (EXTENSION, bytes(other) + image()[EXTENSION:END]))
    with qcow2bm.open(data) as opened:
        assert opened.bitmaps_extension
        assert opened.bitmaps_extension.nb_bitmaps == 3


@pytest.mark.spec("EXT-4")
def test_extensions_before_a_length_too_large_count() -> None:
    with qcow2bm.open(broken("header-extension.length.too-large")) as opened:
        assert [each.type for _, each in opened.extensions] == [0x23852875]
        assert len(opened.bitmaps) == 3


@pytest.mark.spec("REF-1")
@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_every_width(order: int) -> None:
    width = 1 << order
    counts = [i % min(1 << width, 251) for i in range(64)]
    if width >= 8:
        data = b"".join(count.to_bytes(width // 8, "big") for count in counts)
    else:
        number = sum(count << width * i for i, count in enumerate(counts))
        data = number.to_bytes(64 * width // 8, "little")
    found = parse_refcount_block(data, order)
    assert found.tolist() == counts
    assert build_refcount_block(array(found.typecode, counts), order) == data


@pytest.mark.spec("SNAP-1")
def test_a_snapshot_table_that_is_cut_off_or_has_too_much_extra_data() -> None:
    data = vector("refcounts.md", "hex snapshot table")
    with pytest.raises(FormatError, match=r"snapshot table entry 1.* cut off"):
        parse_snapshot_table(data + data[:-1], 2, 0)
    long = patched(data, (36, (1025).to_bytes(4, "big"))) + bytes(2048)
    with pytest.raises(FormatError, match="extra_data_size at 0x524 is more than 1024"):
        parse_snapshot_table(long, 1, 0x500)
