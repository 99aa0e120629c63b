"""Whether a disk that comes back is the one that was given away: pure judgement of facts.

*Spec*: spec/lifecycle.md, "Evidence" and "What becomes of the bitmaps".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.format import extensions
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.format.features import AUTOCLEAR_RAW_DATA_FILE, INCOMPATIBLE_DATA_FILE
from qcow2bm.migration.sentinel import Sentinel, is_sentinel
from qcow2bm.storage.file_identity import FileIdentity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DiskOutcome = Literal["unchanged", "changed", "unknown"]
Policy = Literal["drop", "merge"]
Kind = Literal["kept", "reloaded", "dropped"]


class Definition(NamedTuple):
    """What the header says of the disk itself; somebody who changes that changes the disk."""

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
        """That of an image."""
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
        """The name of the first field in which they differ; nothing if they do not."""
        pairs = zip(self._fields, self, other, strict=True)
        return next((field for field, mine, its in pairs if mine != its), "")


_DEFINING_EXTENSIONS = extensions.BACKING_FORMAT, extensions.CRYPTO, extensions.DATA_FILE


class Facts(NamedTuple):
    """What an image is at one time, as far as it matters here.

    Attributes:
        token: that of the generation; None where none is recorded.
        data_file: the identity of the external data file whose path the caller gave.
        is_consistent: whether the autoclear bit of the bitmaps is set.
        entries: of all bitmaps, by name.
        broken: the names of those that cannot be used.
    """

    definition: Definition
    token: bytes | None
    data_file: FileIdentity | None
    is_consistent: bool
    entries: Mapping[str, DirectoryEntry]
    broken: Collection[str] = ()


class Departure(NamedTuple):
    """How an image was when it was given away; ``facts`` has the entries of ours only."""

    facts: Facts
    sentinel: Sentinel | None


class Judgement(NamedTuple):
    """Whether the disk was written to, and why that is the answer.

    ``changed`` is what was written, int64[n, 2] of (start, length) in guest bytes, or None if
    that is not known.
    """

    outcome: DiskOutcome
    reason: str
    changed: NDArray[np.int64] | None = None


class Fate(NamedTuple):
    """What became of a bitmap at activation, and why."""

    kind: Kind
    reason: str


class Witness(NamedTuple):
    """The bits of sentinel and canary, uint8[n]; None for one that is not there, or broken."""

    sentinel: NDArray[np.uint8] | None = None
    canary: NDArray[np.uint8] | None = None


def judge(left: Departure, found: Facts, witness: Witness) -> Judgement:
    """Whether the disk is as it was."""
    before = left.facts
    if field := before.definition.difference(found.definition):
        return Judgement("changed", f"the header has another {field}")
    if before.is_consistent and not found.is_consistent:
        return Judgement("changed", "a program wrote that does not know bitmaps: autoclear is off")
    if found.data_file != before.data_file:
        return Judgement("changed", "the external data file was written to")
    if left.sentinel is None:
        reason = "no sentinel was made, so nothing tells whether the disk was written to"
        is_renewed = before.token is not None and before.token != found.token
        return Judgement("changed", _OTHER_TOKEN) if is_renewed else Judgement("unknown", reason)
    names = left.sentinel.name, left.sentinel.canary_name
    lack = left.sentinel.why_no_evidence(*map(found.entries.get, names))
    if lack:
        return Judgement("changed", lack)
    if witness.sentinel is None or witness.canary is None:
        return Judgement("changed", "the sentinel is broken")
    if not left.sentinel.is_alive(witness.canary):
        return Judgement("changed", "bitmaps were cleared, the canary too, or the disk was shrunk")
    written = left.sentinel.written(witness.sentinel)
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


def decide(left: Departure, found: Facts, verdict: Judgement, policy: Policy) -> dict[str, Fate]:
    """What becomes of each bitmap: of ours, and of those that record writes in the image now.

    "kept" are ours with what they have in memory, "reloaded" what the image has, "dropped" what
    is tracked no more.
    """
    ours = left.facts.entries
    may_merge = (
        policy == "merge"
        and verdict.changed is not None
        and all(_is_same(entry, found.entries.get(name)) for name, entry in ours.items())
    )
    fates = {
        name: _fate_of_ours(entry, found, verdict, may_merge=may_merge)
        for name, entry in ours.items()
    }
    for name, entry in found.entries.items():
        is_new = name not in ours and not is_sentinel(name)
        if is_new and entry.auto and _is_sound(name, found):
            fates[name] = Fate("reloaded", "records writes in the image")
    return fates


def _fate_of_ours(
    before: DirectoryEntry, found: Facts, verdict: Judgement, *, may_merge: bool
) -> Fate:
    name = before.name or ""
    now = found.entries.get(name)
    if not found.is_consistent:
        return Fate("dropped", "is stale: a program wrote that does not know bitmaps")
    if now is None:
        return Fate("dropped", "is not in the image any more")
    if name in found.broken:
        return Fate("dropped", "is broken in the image")
    if not now.auto:
        return Fate("dropped", "was disabled")
    # If it is in_use, but another one, somebody took it over, and may have added to it.
    is_as_left = not now.in_use or _is_same(before, now)
    if verdict.outcome == "unchanged" and is_as_left and now.granularity == before.granularity:
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
    """Whether an entry is as it was, wherever in the directory."""
    return now is not None and now._replace(number=0, offset=0) == before._replace(
        number=0, offset=0
    )
