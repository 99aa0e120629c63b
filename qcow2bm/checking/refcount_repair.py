"""Repairing refcounts, and clearing bits behind the end of the disk.

*Spec*: spec/repair.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.checking.bitmap_clusters import BitmapClusters
from qcow2bm.checking.check import Checker
from qcow2bm.checking.findings import Findings
from qcow2bm.checking.references import References
from qcow2bm.checking.runs import Numbers, Runs
from qcow2bm.checking.stored_refcounts import Counts, StoredRefcounts
from qcow2bm.clusters.parts import Holes
from qcow2bm.clusters.plan import SECTOR_SIZE, Write
from qcow2bm.format.refcounts import build_refcount_block
from qcow2bm.problem_kinds import BITMAPS_GONE
from qcow2bm.problems import REFUSED, UNUSABLE
from qcow2bm.units import ceil_div

MAX_HOLE_BYTES = 64 << 20
"""The limit for the bytes of tables in holes that are read before clusters are freed."""


def can_set_refcounts(earlier: Sequence[Findings], now: Findings) -> bool:
    """Whether each refcount can be set to the number of references.

    It cannot be in these cases:

    - Bitmaps cannot be read, or cannot be found. Their clusters look like leaks.
    - Clusters leak, and at the same time other refcounts are too low; ``earlier`` are all ways in
      which the image was read before. Bitmaps that are still there may then lead to clusters that
      were freed long ago.
    """
    header_problems = (found for each in earlier for found in each.metadata.header_problems)
    if any(found.kind == BITMAPS_GONE for found in header_problems):
        return False
    if any(found.is_fault for found in now.metadata.problems):
        return False
    directory = now.metadata.directory
    if not directory.is_consistent:  # its problems are notes, but its entries name clusters
        severities = {found.kind.severity for found in directory.problems}
        if not severities.isdisjoint((REFUSED, UNUSABLE)):
            return False
    is_ambiguous = any(each.check.leaked_clusters and each.nb_undercounts for each in earlier)
    return not (is_ambiguous and now.nb_undercounts)


def refcount_writes(metadata: Metadata) -> list[Write]:
    """Returns the sectors of refcount blocks that make refcounts right, in order.

    Leaked clusters are freed, except those that a stale bitmaps extension names: they are the
    last trace of its bitmaps. The refcount of a cluster that the disk does not use is set to the
    number of references. Returns nothing if a reference could not be followed. Nothing is freed if
    so many tables seem to lie in holes that reading them would take too long.

    Raises:
        StorageError: reading failed.
    """
    holes = Holes()
    checker = Checker(metadata, holes)
    # If the storage is wrong about a hole, clusters to which a table there leads look like leaks.
    can_free = holes.nb_bytes <= MAX_HOLE_BYTES
    if holes.nb_bytes and can_free:
        checker = Checker(metadata, Holes(are_read=True))
    if not checker.check.is_complete:
        return []
    file, stored = metadata.file, checker.stored
    stale = References(file)
    if metadata.directory.extension and not metadata.directory.is_consistent:
        BitmapClusters(file, metadata.directory, Holes(are_read=can_free)).count(stale)
    end = max(checker.disk.clusters, checker.others.clusters)
    limit = (1 << (1 << stored.order)) - 1
    writes: list[Write] = []
    differing = checker.differences.blocks.contain(stored.numbers)
    for entry in np.flatnonzero(differing).tolist():
        first = int(stored.numbers[entry]) * stored.per_block
        stop = min(first + stored.per_block, end)
        block = stored.read_block(entry)
        disk, named = checker.disk.counts(first, stop), stale.counts(first, stop)
        used = (disk + checker.others.counts(first, stop)).astype(np.uint64)
        wanted = block.copy()
        part = wanted[: stop - first]
        # Where the disk uses a cluster, L1 and L2 entries may have to change, too: only QEMU
        # does that.
        is_leak = (part > used) & (named == 0) & (disk == 0) & can_free
        is_low = (part < used) & (disk == 0) & (used <= limit)
        part[is_leak | is_low] = used[is_leak | is_low]
        writes += _sectors(stored, entry, np.flatnonzero(wanted != block), wanted)
    return writes


def _sectors(
    stored: StoredRefcounts, entry: int, changed: Numbers, counts: Counts
) -> Iterator[Write]:
    """Yields the sectors of a refcount block that have changed refcounts."""
    per_sector = 8 * SECTOR_SIZE >> stored.order
    code = "B" if stored.order <= 3 else "HIQ"[stored.order - 4]
    sectors = Runs.of_clusters(np.unique(changed // per_sector))
    for first, stop in zip(sectors.firsts.tolist(), sectors.stops.tolist(), strict=True):
        part = array(code, counts[first * per_sector : stop * per_sector].tobytes())
        place = int(stored.places[entry]) + first * SECTOR_SIZE
        yield Write(place, (build_refcount_block(part, stored.order),), "refcounts")


def undercounted_bitmaps(metadata: Metadata) -> frozenset[int]:
    """Returns the indexes of the bitmaps that use a cluster whose refcount is too low.

    A writer that looks for a free cluster may take such a cluster, or has taken it already.

    Raises:
        StorageError: reading failed.
    """
    holes = Holes()
    too_low = Checker(metadata, holes).differences.too_low
    clusters = BitmapClusters(metadata.file, metadata.directory, holes)
    found = {shared.bitmap_index for shared in clusters.shared_with(too_low)}
    return frozenset(index for index in found if index is not None)


def tail_writes(findings: Findings) -> Iterator[Write]:
    """Yields the sectors that clear bits behind the end of the disk (INV-TAIL).

    A bitmap with any other fault is left alone, and so are all bitmaps if the directory or the
    disk is in doubt.

    Raises:
        StorageError: reading failed.
    """
    metadata = findings.metadata
    if metadata.distrust or findings.is_disk_in_doubt:
        return
    faulty = {found.bitmap_index for found in findings.problems if found.is_fault}
    for found in findings.check.problems:
        index = found.bitmap_index
        if found.repair != "tails" or index is None or index in faulty:
            continue
        entry, file = metadata.directory.entries[index], metadata.file
        bits = ceil_div(file.virtual_size, entry.granularity) % (8 * file.cluster_size)
        start = found.offset // file.cluster_size * file.cluster_size
        data = file.read(start, file.cluster_size)
        used = bits // 8
        clean = bytearray(data)
        clean[used + 1 :] = bytes(len(clean) - used - 1)
        clean[used] &= (1 << bits % 8) - 1
        for place in range(0, len(data), SECTOR_SIZE):
            sector = bytes(clean[place : place + SECTOR_SIZE])
            if sector != data[place : place + SECTOR_SIZE]:
                yield Write(start + place, (sector,), "bits behind the end of the disk")
