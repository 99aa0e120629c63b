"""A file that is no qcow2 image is named for what it looks like."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import subprocess
import sys
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.console import ROOT, environment

import qcow2bm
from qcow2bm import FormatError, Hint
from qcow2bm.format import other_formats
from qcow2bm.format.offload_file import MAGIC as OFFLOAD_MAGIC
from qcow2bm.format.undo_file import MAGIC as UNDO_MAGIC

MIB = 1 << 20


def at(*pieces: tuple[int, bytes], size: int = MIB) -> bytes:
    """Zeros of that size with the given bytes at the given offsets."""
    data = bytearray(size)
    for offset, content in pieces:
        data[offset : offset + len(content)] = content
    return bytes(data)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("vm.qcow2", bytes(4096))
    return file.getvalue()


def archived() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("vm.qcow2")
        member.size = 4096
        archive.addfile(member, io.BytesIO(bytes(4096)))
    return file.getvalue()


def sidecar() -> bytes:
    saved = qcow2bm.sidecar.Sidecar(disk_size=MIB, header=b"", bitmaps=())
    return b"".join(qcow2bm.sidecar.write(saved))


BOOT = (510, b"\x55\xaa")
PARTITION = (446, b"\x80\0\0\0\x83\0\0\0\0\x08\0\0\0\x08\0\0")

FILES: dict[str, tuple[bytes, str, Hint]] = {
    "gzip": (gzip.compress(bytes(MIB)), "a file compressed with gzip", "decompress"),
    "xz": (lzma.compress(bytes(MIB)), "a file compressed with xz", "decompress"),
    "bzip2": (bz2.compress(bytes(MIB)), "a file compressed with bzip2", "decompress"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "a file compressed with zstd", "decompress"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(600), "a file compressed with lz4", "decompress"),
    "zip": (zipped(), "a ZIP archive", "decompress"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(600), "a 7z archive", "decompress"),
    "tar": (archived(), "a tar archive", "decompress"),
    "vmdk": (at((0, b"KDMV")), "a VMDK image", "convert"),
    "vmdk of ESX": (at((0, b"COWD")), "a VMDK image", "convert"),
    "vmdk descriptor": (
        b"# Disk DescriptorFile\nversion=1\n",
        "the descriptor of a VMDK image",
        "convert",
    ),
    "vdi": (
        at((0, b"<<< Oracle VM VirtualBox Disk Image >>>\n"), (0x40, b"\x7f\x10\xda\xbe")),
        "a VDI image",
        "convert",
    ),
    "vhdx": (at((0, b"vhdxfile")), "a VHDX image", "convert"),
    "dynamic vhd": (at((0, b"conectix")), "a VHD image", "convert"),
    "fixed vhd": (at(BOOT, PARTITION, (MIB - 512, b"conectix")), "a VHD image", "convert"),
    "qed": (at((0, b"QED\0")), "a QED image", "convert"),
    "parallels": (at((0, b"WithoutFreeSpace")), "a Parallels image", "convert"),
    "dmg": (at((MIB - 512, b"koly")), "a DMG image", "convert"),
    "iso": (at((0x8001, b"CD001")), "a CD or DVD (ISO 9660)", "convert"),
    "iso that boots": (
        at(BOOT, PARTITION, (0x8001, b"CD001")),
        "a CD or DVD (ISO 9660)",
        "convert",
    ),
    "gpt": (at(BOOT, PARTITION, (512, b"EFI PART")), "a raw disk with a GPT", "attach"),
    "gpt of 4k sectors": (at(BOOT, (4096, b"EFI PART")), "a raw disk with a GPT", "attach"),
    "mbr": (at(BOOT, PARTITION), "a raw disk with an MBR", "attach"),
    "luks": (at((0, b"LUKS\xba\xbe\0\2")), "a raw disk with LUKS encryption", "attach"),
    "lvm": (at((512, b"LABELONE")), "a raw disk with a physical volume of LVM", "attach"),
    "ext4": (at((0x438, b"\x53\xef")), "a raw disk with ext2, ext3 or ext4", "attach"),
    "xfs": (at((0, b"XFSB")), "a raw disk with XFS", "attach"),
    "btrfs": (at((0x10040, b"_BHRfS_M")), "a raw disk with btrfs", "attach"),
    "swap": (at((4086, b"SWAPSPACE2")), "a raw disk with swap space", "attach"),
    "ntfs": (at(BOOT, (3, b"NTFS    ")), "a raw disk with NTFS", "attach"),
    "exfat": (at(BOOT, (3, b"EXFAT   ")), "a raw disk with exFAT", "attach"),
    "fat16": (at(BOOT, (54, b"FAT16   ")), "a raw disk with FAT", "attach"),
    "fat32": (at(BOOT, (82, b"FAT32   ")), "a raw disk with FAT", "attach"),
    "zeros": (bytes(MIB), "a raw disk that begins with zeros", "attach"),
    "sidecar": (sidecar(), "a sidecar of qcow2bm", "read-sidecar"),
    "offload file": (OFFLOAD_MAGIC + bytes(600), "an offload file of qcow2bm", "read-offload"),
    "undo file": (UNDO_MAGIC + bytes(600), "an undo file of qcow2bm", "undo"),
    "stream": (b"QEVM\0\0\0\3" + bytes(600), "a migration stream of QEMU", "read-stream"),
    "short": (b"hello", "a file of 5 bytes", "copy-again"),
    "one byte": (b"Q", "a file of 1 byte", "copy-again"),
}


@pytest.mark.spec("CLI-36")
@pytest.mark.parametrize("kind", FILES)
def test_the_error_names_the_format_and_says_what_to_do(kind: str) -> None:
    data, name, hint = FILES[kind]
    with pytest.raises(FormatError) as caught:
        qcow2bm.open(data)
    error = caught.value
    reason = f'is not "QFI\\xfb": not a qcow2 image, but apparently {name}'
    assert (error.structure, error.field, error.offset) == ("header", "magic", 0)
    assert (error.reason, error.hint) == (reason, hint)
    assert str(error).startswith(f"header: magic at 0x0 {reason}; ")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    "data",
    [
        b"\x01" * MIB,
        at(BOOT, (446, b"\x42")),  # no boot record: a partition is active or not
        b"QFJ\xfb" + bytes(1020),
    ],
    ids=["bytes", "no partitions", "a bit flip"],
)
def test_a_file_of_no_known_format_may_be_a_raw_disk(data: bytes) -> None:
    with pytest.raises(FormatError, match="not a qcow2 image; if it is a raw disk, ") as caught:
        qcow2bm.open(data)
    assert caught.value.hint == "attach"


def test_an_empty_file_is_said_to_be_empty() -> None:
    with pytest.raises(FormatError, match="the file is empty; if an image is expected") as caught:
        qcow2bm.open(b"")
    assert caught.value.hint == "copy-again"


@given(st.binary(max_size=1 << 10), st.sampled_from(sorted(FILES)), st.integers(0, 1 << 17))
def test_any_other_file_is_refused_in_one_line(noise: bytes, kind: str, length: int) -> None:
    data = noise + FILES[kind][0][len(noise) : length]
    if data.startswith(b"QFI\xfb"):
        return
    with pytest.raises(FormatError) as caught:
        qcow2bm.open(data)
    assert str(caught.value).isprintable()


def test_no_more_is_read_than_what_decides() -> None:
    furthest = max(s.offset + len(s.magic) for s in other_formats.SIGNATURES)
    assert furthest == other_formats.HEAD_BYTES


def test_an_image_is_opened_without_the_table_of_other_formats() -> None:
    code = (
        "import sys, qcow2bm\n"
        "with qcow2bm.open('tests/data/three.qcow2') as image: image.problems\n"
        "print('qcow2bm.format.other_formats' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
