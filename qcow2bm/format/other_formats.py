"""Telling the format of a file that does not begin like a qcow2 image.

Only the error about such a file needs this module.
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.errors import FormatError, Hint
from qcow2bm.format.header import MAGIC
from qcow2bm.format.offload_file import MAGIC as OFFLOAD_MAGIC
from qcow2bm.format.sidecar import MAGIC as SIDECAR_MAGIC
from qcow2bm.format.undo_file import MAGIC as UNDO_MAGIC

HEAD_BYTES = 0x10048
"""The length of the start of a file that is looked at: up to the magic of btrfs."""

TAIL_BYTES = 512
"""The length of the end of a file that is looked at: the footer of a VHD image."""

_LEAST_DISK_BYTES = 512
_MBR_SIGNATURE = b"\x55\xaa"


class OtherFormat(NamedTuple):
    """A format, and what the caller can do with a file of this format."""

    name: str
    hint: Hint


class _Signature(NamedTuple):
    offset: int
    magic: bytes
    name: str
    hint: Hint


# The first that fits decides. A disk image of another format can hold anything, and a disk with a
# file system can begin with a boot sector: so containers stand before disks.
SIGNATURES = (
    _Signature(0, SIDECAR_MAGIC, "a sidecar of qcow2bm", "read-sidecar"),
    _Signature(0, OFFLOAD_MAGIC, "an offload file of qcow2bm", "read-offload"),
    _Signature(0, UNDO_MAGIC, "an undo file of qcow2bm", "undo"),
    _Signature(0, b"QEVM", "a migration stream of QEMU", "read-stream"),
    _Signature(0, b"\x1f\x8b", "a file compressed with gzip", "decompress"),
    _Signature(0, b"\xfd7zXZ\0", "a file compressed with xz", "decompress"),
    _Signature(0, b"\x28\xb5\x2f\xfd", "a file compressed with zstd", "decompress"),
    _Signature(0, b"\x04\x22\x4d\x18", "a file compressed with lz4", "decompress"),
    _Signature(0, b"BZh", "a file compressed with bzip2", "decompress"),
    _Signature(0, b"PK\x03\x04", "a ZIP archive", "decompress"),
    _Signature(0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "decompress"),
    _Signature(257, b"ustar", "a tar archive", "decompress"),
    _Signature(0, b"KDMV", "a VMDK image", "convert"),
    _Signature(0, b"COWD", "a VMDK image", "convert"),
    _Signature(0, b"# Disk DescriptorFile", "the descriptor of a VMDK image", "convert"),
    _Signature(0, b"vhdxfile", "a VHDX image", "convert"),
    _Signature(0, b"conectix", "a VHD image", "convert"),
    _Signature(0, b"QED\0", "a QED image", "convert"),
    _Signature(0, b"WithoutFreeSpace", "a Parallels image", "convert"),
    _Signature(0, b"WithouFreSpacExt", "a Parallels image", "convert"),
    _Signature(0x40, b"\x7f\x10\xda\xbe", "a VDI image", "convert"),
    _Signature(0x8001, b"CD001", "a CD or DVD (ISO 9660)", "convert"),
    _Signature(512, b"EFI PART", "a raw disk with a GPT", "attach"),
    _Signature(4096, b"EFI PART", "a raw disk with a GPT", "attach"),
    _Signature(0, b"LUKS\xba\xbe", "a raw disk with LUKS encryption", "attach"),
    _Signature(512, b"LABELONE", "a raw disk with a physical volume of LVM", "attach"),
    _Signature(0, b"XFSB", "a raw disk with XFS", "attach"),
    _Signature(0x10040, b"_BHRfS_M", "a raw disk with btrfs", "attach"),
    _Signature(0x438, b"\x53\xef", "a raw disk with ext2, ext3 or ext4", "attach"),
    _Signature(4086, b"SWAPSPACE2", "a raw disk with swap space", "attach"),
    _Signature(3, b"NTFS    ", "a raw disk with NTFS", "attach"),
    _Signature(3, b"EXFAT   ", "a raw disk with exFAT", "attach"),
    _Signature(54, b"FAT1", "a raw disk with FAT", "attach"),
    _Signature(82, b"FAT32", "a raw disk with FAT", "attach"),
)
FOOTERS = (
    _Signature(0, b"conectix", "a VHD image", "convert"),
    _Signature(0, b"koly", "a DMG image", "convert"),
)


def identify(head: bytes, tail: bytes, size: int) -> OtherFormat | None:
    """Returns what a file looks like that is no qcow2 image; None if it may be anything.

    Args:
        head: the first `HEAD_BYTES` of the file, or all of it.
        tail: the last `TAIL_BYTES` of the file, or all of it.
        size: the size of the file in bytes.
    """
    for data, signatures in ((head, SIGNATURES), (tail, FOOTERS)):
        for offset, magic, name, hint in signatures:
            if data.startswith(magic, offset):
                return OtherFormat(name, hint)
    if size < _LEAST_DISK_BYTES:
        return OtherFormat(f"a file of {size} byte{'' if size == 1 else 's'}", "copy-again")
    if _has_mbr(head):
        return OtherFormat("a raw disk with an MBR", "attach")
    if not any(head):
        return OtherFormat("a raw disk that begins with zeros", "attach")
    return None


def _has_mbr(head: bytes) -> bool:
    """Whether the first sector is a boot record with four entries that can be partitions."""
    states = head[446:510:16]
    return head[510:512] == _MBR_SIGNATURE and not set(states) - {0x00, 0x80}


def not_qcow2(head: bytes, tail: bytes, size: int) -> FormatError:
    """Returns the error about a file that has another magic; the arguments are as of `identify`."""
    reason = f'is not "{MAGIC[:3].decode()}\\xfb": not a qcow2 image'
    found = identify(head, tail, size)
    if found:
        return FormatError(
            "header", "magic", 0, f"{reason}, but apparently {found.name}", found.hint
        )
    return FormatError("header", "magic", 0, reason, "attach")
