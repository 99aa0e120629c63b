"""Images that QEMU makes in other formats are named for what they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.console import run

pytestmark = pytest.mark.qemu


@pytest.mark.spec("CLI-36")
@pytest.mark.parametrize(
    ("format", "options", "name"),
    [
        ("vmdk", "", "a VMDK image"),
        ("vmdk", "subformat=streamOptimized", "a VMDK image"),
        ("vmdk", "subformat=monolithicFlat", "the descriptor of a VMDK image"),
        ("vdi", "", "a VDI image"),
        ("vhdx", "", "a VHDX image"),
        ("vpc", "", "a VHD image"),
        ("vpc", "subformat=fixed", "a VHD image"),
        ("qed", "", "a QED image"),
        ("parallels", "", "a Parallels image"),
        ("raw", "", "a raw disk with an MBR"),
    ],
)
def test_what_qemu_img_converts_to(format: str, options: str, name: str, tmp_path: Path) -> None:
    disk = bytearray(8 << 20)
    disk[446:448], disk[510:512] = b"\x80\1", b"\x55\xaa"
    (tmp_path / "disk.raw").write_bytes(disk)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", format, "-o", options, "disk.raw", "other"]
        if options
        else ["qemu-img", "convert", "-f", "raw", "-O", format, "disk.raw", "other"],
        cwd=tmp_path,
        check=True,
    )
    done = run(["dump", "other"], tmp_path)
    advice = (
        "qcow2bm attach RAW IMAGE" if format == "raw" else "qemu-img convert -O qcow2 FILE IMAGE"
    )
    assert (done.status, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1
    assert f"not a qcow2 image, but apparently {name}; " in done.err
    assert done.err.endswith(f": {advice}\n")


def test_the_advice_for_another_format_leads_to_an_image(tmp_path: Path) -> None:
    for command in (
        "qemu-img create -q -f vmdk other 8M",
        "qemu-img convert -O qcow2 other vm.qcow2",
    ):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    assert run(["add", "vm.qcow2", "daily"], tmp_path).status == 0
