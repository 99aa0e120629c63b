"""The requirements of spec/problems.md and spec/deviations.md, each problem provoked."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from support.kinds import READ_KINDS
from support.problem_images import IDS, broken, cut_directory, repeated, snapshot_table
from support.spec_image import (
    BEHIND,
    BEYOND,
    CLUSTER,
    CRASHED,
    DAILY,
    END,
    LONGEST,
    PAST_EOF,
    extension,
    image,
    in_entry,
    in_header,
    in_payload,
    in_table,
    patched,
)

import qcow2bm
from qcow2bm.errors import FormatError
from qcow2bm.problem_kinds import KINDS
from qcow2bm.problems import DATA, ENTRY, TABLE

SOUND = ["valid", "valid", "inconsistent"]
BREAKS_ALL = {
    "header.size.too-large",
    "header.incompatible_features.unknown",
    "bitmaps-extension.bitmap_directory_offset.unaligned",
}
HIDES_ALL = {
    "header.header_length.too-small",
    "header.header_length.too-large",
    "header.autoclear_features.no-bitmaps",
    "header-extension.bitmaps.length",
    "bitmaps-extension.bitmap_directory_size.zero",
    "bitmaps-extension.bitmap_directory_offset.zero",
    "bitmaps-extension.bitmap_directory_offset.past-eof",
    "bitmaps-extension.bitmap_directory_offset.unreadable",
}


def statuses(opened: qcow2bm.Image) -> list[str]:
    return [opened.bitmap(entry.index).status for entry in opened.directory]


def test_every_problem_can_be_provoked() -> None:
    assert set(IDS) == READ_KINDS.keys()


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
def test_strict_raises_the_first_that_is_more_than_a_remark() -> None:
    with pytest.raises(FormatError, match="type at 0xc10"):
        qcow2bm.open(
            patched(broken("directory-entry.type.unknown"), (0xC0C, b"\0\0\0\2")), strict=True
        )
    with pytest.raises(FormatError, match="bitmaps extension at 0x70"):
        qcow2bm.open(broken("bitmaps-extension.autoclear.off"), strict=True)
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
@pytest.mark.parametrize("id", [i for i in IDS if KINDS[i].structure not in (ENTRY, TABLE, DATA)])
def test_which_problems_of_the_image_break_all_bitmaps(id: str) -> None:
    with qcow2bm.open(broken(id)) as opened:
        found = statuses(opened)
        own = [p for p in opened.problems if p.bitmap_index is not None]
    if id in BREAKS_ALL:
        assert found
        assert set(found) == {"broken"}
    elif id in HIDES_ALL:
        assert found == []
    elif id in ("bitmaps-extension.autoclear.off", "bitmaps-extension.version.too-old"):
        assert found == ["stale"] * 3
    elif not own:
        assert found == SOUND


@pytest.mark.spec("PROB-2")
def test_a_directory_in_the_header_is_not_read() -> None:
    with qcow2bm.open(patched(image(), *in_payload(bitmap_directory_offset=0))) as opened:
        assert ZERO in {problem.id for problem in opened.problems}
        assert opened.directory == ()


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
        ("bitmaps-extension.nb_bitmaps.less", [*SOUND[:2], "broken"]),
        ("bitmaps-extension.nb_bitmaps.more", SOUND),
        ("bitmap-directory.rest", SOUND),
        ("bitmap-directory.zeroes", SOUND),
        ("directory-entry.type.unknown", ["broken", *SOUND[1:]]),
    ],
)
def test_one_fault_hides_no_other_bitmap(id: str, expected: list[str]) -> None:
    with qcow2bm.open(broken(id)) as opened:
        assert statuses(opened) == expected


SHARED = patched(
    image(),
    (0x600, struct.pack(">Q", 1 << 63 | BEHIND)),  # the L1 table's first entry: an L2 table
    in_table(DAILY, BEHIND),
    (BEHIND, bytes(CLUSTER)),
)


@pytest.mark.spec("DEV-6")
def test_what_belongs_to_the_disk_is_not_looked_at() -> None:
    with qcow2bm.open(SHARED) as opened:
        assert opened.problems == ()
        assert statuses(opened) == SOUND


@pytest.mark.qemu
@pytest.mark.spec("DEV-6")
def test_but_qemu_notices_when_it_checks_the_image(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(SHARED)
    done = subprocess.run(
        ["qemu-img", "check", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"ERROR cluster {BEHIND // CLUSTER} refcount=0 reference=2" in done.stderr


@pytest.mark.spec("DEV-5")
@pytest.mark.parametrize("flags", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_repeated_name_breaks_all_its_bitmaps(flags: tuple[int, int]) -> None:
    with qcow2bm.open(patched(image(), *repeated(*flags))) as opened:
        assert statuses(opened) == ["broken", "broken", "inconsistent"]


DUPLICATE = "directory-entry.name.duplicate"
CUT = "bitmaps-extension.bitmap_directory_size.past-eof"
CUT_NAME = "directory-entry.truncated"
ZERO = "bitmaps-extension.bitmap_directory_offset.zero"
ZEROES = "bitmap-directory.zero-entries"
COUNT = "bitmaps-extension.nb_bitmaps.more"
TOO_LARGE = "header-extension.length.too-large"
UNKNOWN_COMPRESSION = "header.compression_type.unknown"
SNAPSHOT = "snapshot-table.extra_data_size.too-large"

"""The largest length of a file for QEMU."""

EDGES: dict[str, tuple[bytes, dict[str, str]]] = {
    "the second of a name": (patched(image(), *repeated(0, 0)), {DUPLICATE: "refused"}),
    "the second in use": (patched(image(), *repeated(0, 1)), {DUPLICATE: "unusable"}),
    "the first in use": (patched(image(), *repeated(1, 0)), {DUPLICATE: "refused"}),
    "both in use": (patched(image(), *repeated(1, 1)), {DUPLICATE: "unusable"}),
    "the last of three in use": (patched(image(), *repeated(0, 0, 1)), {DUPLICATE: "refused"}),
    "all but the first in use": (patched(image(), *repeated(0, 1, 1)), {DUPLICATE: "unusable"}),
    "no directory": (
        cut_directory(0),
        {"bitmaps-extension.bitmap_directory_offset.past-eof": "refused", COUNT: "refused"},
    ),
    "no whole last entry": (
        cut_directory(80),
        {CUT: "refused", "bitmap-directory.rest": "refused", COUNT: "refused"},
    ),
    "no last entry": (
        cut_directory(64),
        {CUT: "unusable", ZEROES: "refused", COUNT: "refused"},
    ),
    "no name": (cut_directory(88), {CUT: "unusable", CUT_NAME: "unusable"}),
    "no padding": (cut_directory(95), {}),
    "a table in use beyond any file": (
        patched(image(), *in_entry(CRASHED, bitmap_table_offset=BEYOND)),
        {"directory-entry.bitmap_table_offset.past-eof": "unusable"},
    ),
    "a bad entry in use": (
        patched(image(), in_table(CRASHED, 2)),
        {"bitmap-table.entry.reserved": "unusable"},
    ),
    "a stale directory": (
        patched(image(), *in_header(autoclear_features=0), *in_payload(reserved=1)),
        {"bitmaps-extension.autoclear.off": "leak", "bitmaps-extension.reserved.nonzero": "note"},
    ),
    **{
        f"{field} beyond any file": (
            patched(image(), *in_header(**{field: BEYOND})),
            {f"header.{field}.invalid": "refused"},
        )
        for field in ("l1_table_offset", "refcount_table_offset", "snapshots_offset")
    },
    "an L1 table that ends at 2^63": (
        patched(image(), *in_header(l1_table_offset=BEYOND - 3 * CLUSTER, l1_size=192)),
        {"header.l1_table_offset.invalid": "refused"},
    ),
    "an L1 table that ends where files can": (
        patched(image(), *in_header(l1_table_offset=LONGEST - 3 * CLUSTER)),
        {"header.l1_table_offset.past-eof": "unusable"},
    ),
    "an end marker of a length": (patched(image(), (END, extension(0, 8, b""))), {}),
    "an end marker too long": (
        patched(image(), (END, extension(0, CLUSTER, b""))),
        {TOO_LARGE: "refused"},
    ),
    "an area that ends without marker": (
        patched(image(), *in_header(backing_file_offset=END)),
        {"header-extension.end.missing": "note"},
    ),
    **{
        f"an area with {left} bytes left": (
            patched(image(), *in_header(backing_file_offset=END + left)),
            {TOO_LARGE: "refused"},
        )
        for left in (1, 7)
    },
    "an unknown compression type without its bit": (
        patched(image(), *in_header(compression_type=2)),
        {UNKNOWN_COMPRESSION: "refused", "header.compression_type.bit-missing": "refused"},
    ),
    "much extra data": (patched(image(), *snapshot_table(1024)), {}),
    "too much in a later snapshot": (
        patched(image(), *snapshot_table(24, 1025, 1026)),
        {SNAPSHOT: "refused"},
    ),
    "snapshots the file has not": (
        patched(image(), *snapshot_table(16), *in_header(nb_snapshots=3)),
        {},
    ),
}


@pytest.mark.parametrize("case", EDGES)
def test_edge_cases_are_of_the_severity_stated(case: str) -> None:
    data, severities = EDGES[case]
    with qcow2bm.open(data) as opened:
        assert {problem.id: problem.severity for problem in opened.problems} == severities


@pytest.mark.spec("SNAP-2")
def test_the_first_snapshot_with_too_much_extra_data_is_reported() -> None:
    with qcow2bm.open(patched(image(), *snapshot_table(24, 1025, 1026))) as opened:
        (problem,) = opened.problems
    assert problem.offset == BEHIND + 64 + 36


def opened_by_qemu(path: Path) -> subprocess.CompletedProcess[str]:
    """Returns the result of qemu-io when it opens an image to read it."""
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", "quit", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.qemu
@pytest.mark.spec("PROB-3")
@pytest.mark.parametrize("id", IDS)
def test_qemu_refuses_exactly_what_is_refused(id: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(broken(id))
    done = opened_by_qemu(path)
    with qcow2bm.open(path) as opened:  # some faults do not come alone
        refused = any(problem.severity == "refused" for problem in opened.problems)
        (message, *_) = [problem.qemu_message for problem in opened.problems if problem.id == id]
    assert (done.returncode != 0) == refused, done.stderr
    assert refused or KINDS[id].severity != "refused"
    assert (message or "") in done.stderr + done.stdout


@pytest.mark.qemu
@pytest.mark.spec("PROB-3")
@pytest.mark.parametrize("case", EDGES)
def test_qemu_refuses_edge_cases_as_stated(case: str, tmp_path: Path) -> None:
    data, severities = EDGES[case]
    path = tmp_path / "image.qcow2"
    path.write_bytes(data)
    assert (opened_by_qemu(path).returncode != 0) == ("refused" in severities.values())


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
