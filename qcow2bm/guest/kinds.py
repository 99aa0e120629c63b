"""The kinds of ranges of a disk.

*Spec*: spec/data.md, "Kinds".
"""

from __future__ import annotations

from enum import IntEnum


class DataKind(IntEnum):
    """What one image has for a range of the disk, without its backing file.

    UNALLOCATED: nothing: the backing file provides the range, and without one it reads as zeros.
    DATA: data, as they are in the image file or in the data file.
    ZERO: the image says that the range reads as zeros.
    COMPRESSED: compressed data.
    """

    UNALLOCATED = 0
    DATA = 1
    ZERO = 2
    COMPRESSED = 3

    @property
    def is_present(self) -> bool:
        """Whether the image itself provides the range, and no backing file does."""
        return self is not DataKind.UNALLOCATED

    @property
    def has_data(self) -> bool:
        """Whether the image has data for the range, compressed or not."""
        return self in (DataKind.DATA, DataKind.COMPRESSED)

    def reads_as_zeros(self, *, has_backing_file: bool) -> bool:
        """Whether the range is known to read as zeros, by what this one image says."""
        return self is DataKind.ZERO or not (self.is_present or has_backing_file)
