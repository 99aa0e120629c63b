"""Judging from facts whether a disk that comes back is as it was given away; no I/O.

*Spec*: spec/lifecycle.md, "Evidence" and "What becomes of the bitmaps".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format import extensions
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.format.features import AUTOCLEAR_RAW_DATA_FILE, INCOMPATIBLE_DATA_FILE
from qcow2bm.migration.intent import is_intent
from qcow2bm.migration.sentinel import Sentinel, is_sentinel
from qcow2bm.storage.file_identity import FileIdentity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DiskOutcome = Literal["unchanged", "changed", "unknown"]
Policy = Literal["drop", "merge"]
Kind = Literal["kept", "reloaded", "dropped"]


class Definition(NamedTuple):
    """The header fields that describe the disk itself: any change of it is a change of the disk."""

    version: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    incompatible_features: int
    raw_external_data: bool
    backing_file: str | None
    backing_format: bytes | None
    crypto_header: bytes | None
    external_data_file_name: bytes | None

    @classmethod
    def of(cls, file: ClusterFile) -> Definition:
        """The definition that an image has."""
        header = file.header
        found = (file.find(type) for type in _DEFINING_EXTENSIONS)
        return cls(
            header.version,
            header.cluster_bits,
            header.size,
            header.crypt_method,
            header.l1_size,
            header.l1_table_offset,
            header.incompatible_features,
            bool(header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE),
            file.backing_file,
            *(extension.data if extension else None for extension in found),
        )

    def difference(self, other: Definition) -> str:
        """The name of the first field in which two definitions differ; empty if none does."""
        pairs = zip(self._fields, self, other, strict=True)
        return next((field for field, mine, its in pairs if mine != its), "")


_DEFINING_EXTENSIONS = extensions.BACKING_FORMAT, extensions.CRYPTO, extensions.DATA_FILE


class Facts(NamedTuple):
    """An image at one time, as far as it matters here.

    Attributes:
        definition: what the header says of the disk.
        token: the token of the generation; None where none is recorded.
        data_file: the identity of the external data file; None if the caller gave no path of it.
        is_consistent: whether the autoclear bit of the bitmaps is set.
        entries: the directory entries of all bitmaps, by name.
        broken: the names of the bitmaps that do not fit the disk, or cannot be read.
    """

    definition: Definition
    token: bytes | None
    data_file: FileIdentity | None
    is_consistent: bool
    entries: Mapping[str, DirectoryEntry]
    broken: Collection[str] = ()


class Departure(NamedTuple):
    """An image as it was given away.

    Attributes:
        facts: of that time, with the entries of our own bitmaps only.
        sentinel: the sentinel that was added before; None if there was none.
    """

    facts: Facts
    sentinel: Sentinel | None


class Judgement(NamedTuple):
    """The answer to whether the disk was written to.

    Attributes:
        outcome: the answer.
        reason: the evidence for it.
        changed: what was written, int64[n, 2] of (start, length) in guest bytes; None if that is
            not known.
    """

    outcome: DiskOutcome
    reason: str
    changed: NDArray[np.int64] | None = None


class Fate(NamedTuple):
    """The fate of a bitmap at activation.

    Attributes:
        kind: "kept" with what it has in memory, "reloaded" with what the image has, or "dropped":
            tracked no more.
        reason: why.
    """

    kind: Kind
    reason: str


class Witness(NamedTuple):
    """The bits of sentinel and canary, uint8[n]; None for a bitmap that is gone or broken."""

    sentinel: NDArray[np.uint8] | None = None
    canary: NDArray[np.uint8] | None = None


def judge(departure: Departure, found: Facts, witness: Witness) -> Judgement:
    """Judges whether the disk is as it was: the first evidence that is found decides."""
    before, sentinel = departure.facts, departure.sentinel
    if field := before.definition.difference(found.definition):
        return Judgement("changed", f"the header has another {field}")
    if before.is_consistent and not found.is_consistent:
        return Judgement("changed", "a program that does not know bitmaps wrote: autoclear is off")
    if found.data_file != before.data_file:
        return Judgement("changed", "the external data file was written to")
    if sentinel is None:
        reason = "no sentinel was made, so nothing tells whether the disk was written to"
        is_renewed = before.token is not None and before.token != found.token
        return Judgement("changed", _OTHER_TOKEN) if is_renewed else Judgement("unknown", reason)
    names = sentinel.name, sentinel.canary_name
    lack = sentinel.why_no_evidence(*map(found.entries.get, names))
    if lack:
        return Judgement("changed", lack)
    if witness.sentinel is None or witness.canary is None:
        return Judgement("changed", "the sentinel is broken")
    if not sentinel.is_alive(witness.canary):
        return Judgement("changed", "bitmaps were cleared, the canary too, or the disk was shrunk")
    written = sentinel.written(witness.sentinel)
    if len(written):
        return Judgement("changed", "the sentinel has ranges that were written", written)
    if before.token is not None and before.token != found.token:
        return Judgement("changed", _OTHER_TOKEN, written)
    if _has_data_file(before) and before.data_file is None:
        reason = "nothing tells whether the external data file was written to"
        return Judgement("unknown", reason)
    return Judgement("unchanged", "the sentinel was not touched", written)


_OTHER_TOKEN = "the generation is another: a program opened the image for writing"


def _has_data_file(facts: Facts) -> bool:
    return bool(facts.definition.incompatible_features & INCOMPATIBLE_DATA_FILE)


def decide(
    departure: Departure, found: Facts, judgement: Judgement, policy: Policy
) -> dict[str, Fate]:
    """Decides what becomes of each bitmap that we tracked, or that records writes in the image now.

    Returns:
        A fate for each of these bitmaps, by name.
    """
    ours = departure.facts.entries
    may_merge = (
        policy == "merge"
        and judgement.changed is not None
        and all(_is_same(entry, found.entries.get(name)) for name, entry in ours.items())
    )
    fates = {
        name: _fate_of_ours(entry, found, judgement, may_merge=may_merge)
        for name, entry in ours.items()
    }
    for name, entry in found.entries.items():
        is_new = name not in ours and not (is_sentinel(name) or is_intent(name))
        if is_new and entry.auto and _is_sound(name, found):
            fates[name] = Fate("reloaded", "records writes in the image")
    return fates


def _fate_of_ours(
    before: DirectoryEntry, found: Facts, judgement: Judgement, *, may_merge: bool
) -> Fate:
    name = before.name or ""
    now = found.entries.get(name)
    if not found.is_consistent:
        return Fate("dropped", "is stale: a program that does not know bitmaps wrote")
    if now is None:
        return Fate("dropped", "is not in the image any more")
    if name in found.broken:
        return Fate("dropped", "is broken in the image")
    if not now.auto:
        return Fate("dropped", "was disabled")
    # If another bitmap of that name is in_use, another writer took ours over, and may have added
    # to it.
    is_as_left = not now.in_use or _is_same(before, now)
    if judgement.outcome == "unchanged" and is_as_left and now.granularity == before.granularity:
        return Fate("kept", "the disk is unchanged")
    if not now.in_use:
        return Fate("reloaded", "the image has what was recorded there")
    if may_merge and before.in_use:
        return Fate("kept", "what was written elsewhere is merged into it")
    return Fate("dropped", "is in_use in the image, so writes may be missing from it")


def _is_sound(name: str, found: Facts) -> bool:
    entry = found.entries[name]
    return found.is_consistent and name not in found.broken and not entry.in_use


def _is_same(before: DirectoryEntry, now: DirectoryEntry | None) -> bool:
    """Whether an entry is as it was, wherever in the directory it stands now."""
    return now is not None and now._replace(number=0, offset=0) == before._replace(
        number=0, offset=0
    )
