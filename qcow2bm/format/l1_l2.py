"""The layout of the entries of L1 and L2 tables, which map guest offsets to host offsets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from construct import BitsInteger, BitStruct

from qcow2bm.format.schema import bit_masks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

L1_ENTRY_LENGTH = 8
L2_ENTRY_LENGTH = 8  # with extended L2 entries, another 8 bytes follow: `SUBCLUSTERS`
SUBCLUSTERS_PER_CLUSTER = 32

L1_ENTRY = BitStruct(
    "copied" / BitsInteger(1),
    "reserved_high" / BitsInteger(7),
    "offset" / BitsInteger(47),
    "reserved_low" / BitsInteger(9),
)
L2_ENTRY = BitStruct(
    "copied" / BitsInteger(1),
    "compressed" / BitsInteger(1),
    "reserved_high" / BitsInteger(6),
    "offset" / BitsInteger(47),
    "reserved_low" / BitsInteger(8),
    "zero" / BitsInteger(1),
)
SUBCLUSTERS = BitStruct(
    "zero" / BitsInteger(SUBCLUSTERS_PER_CLUSTER),
    "allocated" / BitsInteger(SUBCLUSTERS_PER_CLUSTER),
)

L1_MASKS = bit_masks(L1_ENTRY)
L2_MASKS = bit_masks(L2_ENTRY)
SUBCLUSTER_MASKS = bit_masks(SUBCLUSTERS)
"""The mask of each field in an entry that was read as a big-endian integer of 64 bits."""


@overload
def compressed_extent(word: int, cluster_bits: int) -> tuple[int, int]: ...
@overload
def compressed_extent(
    word: NDArray[np.uint64], cluster_bits: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]: ...
def compressed_extent(word: Any, cluster_bits: int) -> Any:
    """Returns the host bytes, as (start, end), of a compressed cluster by its L2 table entry.

    ``word`` may also be an array of entries, uint64[n]; the results are then arrays, too.

    *Spec*: the entry has the offset of the first byte in its low ``62 - (cluster_bits - 8)`` bits,
    and above them the number of 512-byte sectors that follow the first sector.
    """
    offset_bits = 62 - (cluster_bits - 8)
    start = word & (1 << offset_bits) - 1
    sectors = (word >> offset_bits & (1 << cluster_bits - 8) - 1) + 1
    return start, start - start % 512 + sectors * 512
