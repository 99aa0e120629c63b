"""The requirements of spec/problems.md and spec/deviations.md, each problem provoked."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.faults import (
    CRASHED,
    DAILY,
    IDS,
    PAST_EOF,
    broken,
    image,
    in_entry,
    in_header,
    in_table,
    patched,
)

import qcow2bm
from qcow2bm.errors import FormatError
from qcow2bm.problems import KINDS

SOUND = ["valid", "valid", "inconsistent"]
BREAKS_ALL = {
    "header.size.too-large",
    "header.incompatible_features.unknown",
    "bitmaps-extension.bitmap_directory_offset.unaligned",
    "bitmap-directory.past-eof",
}


def statuses(opened: qcow2bm.Image) -> list[str]:
    return [opened.bitmap(entry.index).status for entry in opened.directory]


def test_every_problem_can_be_provoked() -> None:
    assert set(IDS) == KINDS.keys()


def test_the_image_to_be_broken_is_sound() -> None:
    with qcow2bm.open(image()) as opened:
        assert opened.problems == ()


@pytest.mark.spec("PROB-1")
@pytest.mark.parametrize("id", IDS)
def test_a_problem_is_listed_and_not_raised(id: str) -> None:
    with qcow2bm.open(broken(id)) as opened:
        found = {problem.id: problem for problem in opened.problems}
    assert (found[id].severity, found[id].structure, found[id].field) == (
        KINDS[id].severity,
        KINDS[id].structure,
        KINDS[id].field,
    )


@pytest.mark.spec("PROB-1")
def test_strict_raises_the_first_refused_or_unusable() -> None:
    with pytest.raises(FormatError, match="type at 0xc10"):
        qcow2bm.open(
            patched(broken("directory-entry.type.unknown"), (0xC0C, b"\0\0\0\2")), strict=True
        )
    with qcow2bm.open(broken("directory-entry.padding.nonzero"), strict=True) as opened:
        assert len(opened.problems) == 1


@pytest.mark.spec("STAT-3")
@pytest.mark.parametrize("id", [id for id in IDS if id.startswith(("directory-entry", "bitmap-"))])
def test_a_problem_of_a_bitmap_breaks_it_unless_its_status_is_kept(id: str) -> None:
    with qcow2bm.open(broken(id)) as opened:
        for problem in opened.problems:
            if problem.bitmap_index is None:
                continue
            status = opened.bitmap(problem.bitmap_index).status
            serious = problem.severity in ("refused", "unusable")
            if serious and not KINDS[problem.id].keeps_status:
                assert status == "broken"
            elif len(opened.problems) == 1:
                assert status != "broken"


@pytest.mark.spec("PROB-2")
@pytest.mark.parametrize("id", [id for id in IDS if id.startswith(("header.", "bitmaps-ext"))])
def test_which_problems_of_the_image_break_all_bitmaps(id: str) -> None:
    with qcow2bm.open(broken(id)) as opened:
        if id in BREAKS_ALL:
            assert set(statuses(opened)) == {"broken"}
        elif {problem.id for problem in opened.problems} == {id} and opened.directory:
            expected = ["stale"] * 3 if id == "bitmaps-extension.autoclear.off" else SOUND
            assert statuses(opened) == expected


@pytest.mark.spec("PROB-4")
def test_sixteen_bad_entries_are_listed() -> None:
    with qcow2bm.open(broken("bitmap-table.entry.more")) as opened:
        ids = [p.id for p in opened.problems if p.structure == "bitmap table"]
    assert ids == ["bitmap-table.entry.past-eof"] * 16 + ["bitmap-table.entry.more"]


@pytest.mark.spec("DEV-1")
@pytest.mark.parametrize("id", [id for id in IDS if KINDS[id].keeps_status])
def test_what_the_format_allows_is_read(id: str) -> None:
    with qcow2bm.open(broken(id)) as opened:
        (problem,) = opened.problems
        assert problem.bitmap_index is not None
        bitmap = opened.bitmap(problem.bitmap_index)
        assert bitmap.status == "valid"
        bitmap.count()


@pytest.mark.spec("DEV-1")
@pytest.mark.parametrize("bits", [32, 62, 63])
def test_a_granularity_beyond_the_disk_is_one_bit(bits: int) -> None:
    with qcow2bm.open(patched(image(), *in_entry(DAILY, granularity_bits=bits))) as opened:
        assert opened.bitmaps["daily"].count() == opened.virtual_size


@pytest.mark.spec("DEV-2")
@pytest.mark.parametrize(
    "patches",
    [in_entry(DAILY, bitmap_table_offset=PAST_EOF), [in_table(DAILY, PAST_EOF)]],
    ids=["table", "data"],
)
def test_past_the_end_of_the_file_nothing_is_clean(patches: list[tuple[int, bytes]]) -> None:
    with qcow2bm.open(patched(image(), *patches)) as opened:
        assert statuses(opened) == ["broken", *SOUND[1:]]


@pytest.mark.spec("DEV-4")
@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("bitmaps-extension.nb_bitmaps.less", SOUND),
        ("bitmaps-extension.nb_bitmaps.more", SOUND),
        ("bitmap-directory.rest", SOUND),
        ("bitmap-directory.zeroes", SOUND),
        ("directory-entry.type.unknown", ["broken", *SOUND[1:]]),
    ],
)
def test_one_fault_hides_no_other_bitmap(id: str, expected: list[str]) -> None:
    with qcow2bm.open(broken(id)) as opened:
        assert statuses(opened) == expected


@pytest.mark.spec("DEV-5")
@pytest.mark.parametrize("flags", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_repeated_name_breaks_all_its_bitmaps(flags: tuple[int, int]) -> None:
    data = patched(
        broken("directory-entry.name.duplicate"),
        *in_entry(0, flags=flags[0]),
        *in_entry(1, flags=flags[1]),
    )
    with qcow2bm.open(data) as opened:
        assert statuses(opened) == ["broken", "broken", "inconsistent"]


def opened_by_qemu(path: Path) -> subprocess.CompletedProcess[str]:
    """What QEMU says when it opens an image to read it."""
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", "quit", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.qemu
@pytest.mark.spec("PROB-3")
@pytest.mark.parametrize("id", IDS)
def test_qemu_refuses_exactly_what_is_refused(id: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(broken(id))
    done = opened_by_qemu(path)
    assert (done.returncode != 0) == (KINDS[id].severity == "refused"), done.stderr
    assert (KINDS[id].qemu_message or "") in done.stderr + done.stdout


@pytest.mark.qemu
@pytest.mark.spec("PROB-3")
@pytest.mark.parametrize("flags", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_qemu_refuses_a_repeated_name_as_stated(flags: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(
        patched(
            broken("directory-entry.name.duplicate"),
            *in_entry(0, flags=flags[0]),
            *in_entry(1, flags=flags[1]),
        )
    )
    with qcow2bm.open(path) as opened:
        refused = any(problem.severity == "refused" for problem in opened.problems)
    assert (opened_by_qemu(path).returncode != 0) == refused


@pytest.mark.qemu
@pytest.mark.spec("PROB-3")
@pytest.mark.parametrize("index", [DAILY, CRASHED])
def test_qemu_refuses_a_table_beyond_all_files_as_stated(index: int, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(patched(image(), *in_entry(index, bitmap_table_offset=1 << 63)))
    with qcow2bm.open(path) as opened:
        refused = any(problem.severity == "refused" for problem in opened.problems)
    assert (opened_by_qemu(path).returncode != 0) == refused


@pytest.mark.qemu
def test_qemu_finds_no_errors_in_the_image(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(image())
    done = subprocess.run(
        ["qemu-img", "check", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "No errors were found" in done.stdout) == (0, True)


@pytest.mark.qemu
def test_qemu_drops_the_rest_of_a_sector_as_well(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(patched(image(), *in_header(size=5242879)))
    done = subprocess.run(
        ["qemu-img", "info", str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "(5242368 bytes)" in done.stdout
