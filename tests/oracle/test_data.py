"""The images kept in tests/data are what their script makes with the QEMU at hand."""

from __future__ import annotations

from pathlib import Path

from support.qemu import Disk, run_ok

import qcow2bm

DATA = Path(__file__).parent.with_name("data")


def test_three(tmp_path: Path) -> None:
    script = (DATA / "README.md").read_text().partition("```sh\n")[2].partition("```")[0]
    path = tmp_path / "three.qcow2"
    run_ok("sh", "-c", script, "sh", path)

    with qcow2bm.open(path) as made, qcow2bm.open(DATA / "three.qcow2") as kept:
        assert list(made.bitmaps) == list(kept.bitmaps)
        for name, bitmap in made.bitmaps.items():
            other = kept.bitmaps[name]
            assert bitmap.entry.flags == other.entry.flags
            assert bitmap.granularity == other.granularity
            assert bitmap.stale_bits().tobytes() == other.stale_bits().tobytes()
            if bitmap.status == "valid":
                expected = Disk(path).extents(name)
                assert [tuple(r) for part in other.extents() for r in part.tolist()] == expected
