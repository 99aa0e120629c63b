"""The one shape in which every fault of an image is reported.

*Spec*: spec/problems.md; the table of all kinds is in `qcow2bm.problem_kinds`.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

REFUSED: Final = "refused"  # QEMU will not open the image
UNUSABLE: Final = "unusable"  # what the structure describes cannot be used; QEMU may not notice
LEAK: Final = "leak"  # space is lost, and nothing else
COSMETIC: Final = "cosmetic"  # breaks the specification without consequence
NOTE: Final = "note"  # worth knowing, no fault

Severity = Literal["refused", "unusable", "leak", "cosmetic", "note"]
SEVERITIES: tuple[Severity, ...] = (REFUSED, UNUSABLE, LEAK, COSMETIC, NOTE)

RepairName = Literal["directory", "tails", "refcounts", "stale"]
"""One part of a repair, which can be done alone: see `qcow2bm.checking.repair.REPAIRS`."""

HEADER = "header"
HEADER_EXTENSION = "header extension"
SNAPSHOT_TABLE = "snapshot table"
BITMAPS_EXTENSION = "bitmaps extension"
DIRECTORY = "bitmap directory"
ENTRY = "bitmap directory entry"
TABLE = "bitmap table"
DATA = "bitmap data"
CLUSTER = "cluster"
REFCOUNT_TABLE = "refcount table"
L1_TABLE = "L1 table"
L2_TABLE = "L2 table"

_TABLE_FIELDS = "bitmap_table_offset", "bitmap_table_size"


class Kind(NamedTuple):
    """Everything that the problems of one id have in common.

    Attributes:
        id: a dotted name that stays the same over versions.
        structure: the structure that is at fault.
        field: the field of the structure; empty for the structure as a whole.
        severity: the severity of such a problem; single problems can differ from it.
        meaning: what such a problem means to the user, and what to do about it.
        qemu_message: the part of QEMU's message that does not vary; None if QEMU says nothing.
        repair: the part of a repair that concerns such a problem; None if there is none.
        needs_check: only `check` finds such a problem, by following every reference, reading
            every refcount, and reading bits. A reader finds all others.
        keeps_status: the specification allows it, and only QEMU refuses it: the bitmap can be
            read all the same.
        distrusts_all: no directory entry of the image can be believed.
        forbids_edit: a reader can use the image, but an edit must not build on it.
        is_fittable: `fit` repairs it.
        is_overlap: two structures use the same cluster.
        is_past_end: a structure lies past the end of the file.
        is_undercount: a cluster is in use more often than its refcount says.
        breaks_directory_end: the number of entries, their lengths and the size of the directory
            do not agree.
        suggests_misreading: few programs write this, so a directory that has it was probably
            read in a wrong way.
        costs_no_bitmap: a repair keeps the bitmap.
        stands_for_more: stands for the problems of this structure that are not listed.
    """

    id: str
    structure: str
    field: str
    severity: Severity
    meaning: str
    qemu_message: str | None = None
    repair: RepairName | None = None
    needs_check: bool = False
    keeps_status: bool = False
    distrusts_all: bool = False
    forbids_edit: bool = False
    is_fittable: bool = False
    is_overlap: bool = False
    is_past_end: bool = False
    is_undercount: bool = False
    breaks_directory_end: bool = False
    suggests_misreading: bool = False
    costs_no_bitmap: bool = False
    stands_for_more: bool = False

    @property
    def concerns_table_place(self) -> bool:
        """Whether the fault is in where the bitmap table is, or how long it is."""
        return self.structure == ENTRY and self.field in _TABLE_FIELDS


class Problem(NamedTuple):
    """One fault, and where to find it.

    Attributes:
        kind: what all problems with the same id have in common.
        severity: how bad it is: "refused", "unusable", "leak", "cosmetic" or "note".
        offset: the host offset of the field in bytes.
        bitmap_index: the number of the bitmap directory entry whose bitmap is at fault; None if
            the fault is the image's.
        element: the number of the element if the structure is an array, else None.
        reason: the end of the message: what is wrong, without the place.
    """

    kind: Kind
    severity: Severity
    offset: int
    bitmap_index: int | None
    element: int | None
    reason: str

    def __repr__(self) -> str:
        """Returns id, severity and message; the kind would fill half a screen."""
        return f"<Problem {self.id} ({self.severity}): {self.message!r}>"

    @property
    def id(self) -> str:
        """The dotted name of the kind, which stays the same over versions."""
        return self.kind.id

    @property
    def structure(self) -> str:
        """The structure that is at fault."""
        return self.kind.structure

    @property
    def field(self) -> str:
        """The field of the structure; empty for the structure as a whole."""
        return self.kind.field

    @property
    def place(self) -> str:
        """The structure as messages call it, with the number of the directory entry."""
        if self.bitmap_index is None:
            return self.structure
        of = " of entry" if self.structure in (TABLE, DATA) else ""
        return f"{self.structure}{of} {self.bitmap_index}"

    @property
    def numbered_field(self) -> str:
        """The field, with the number of the element if the structure is an array."""
        return self.field if self.element is None else f"{self.field} {self.element}"

    @property
    def message(self) -> str:
        """The whole message: the place, its offset, and the reason."""
        place = f"{self.place}: {self.numbered_field}" if self.field else self.place
        return f"{place} at {self.offset:#x} {self.reason}"

    @property
    def qemu_message(self) -> str | None:
        """The part of QEMU's message that does not vary; None if QEMU says nothing.

        QEMU says nothing about a problem that a reader finds unless it refuses the image, or
        drops what leaks.
        """
        says = self.severity in (REFUSED, LEAK) or self.kind.needs_check
        return self.kind.qemu_message if says else None

    @property
    def meaning(self) -> str:
        """The meaning of the problem, and advice what to do about it."""
        return self.kind.meaning

    @property
    def repair(self) -> str | None:
        """The repair that concerns the problem, as `plan_repair` takes it; None if there is none.

        "directory", "tails", "refcounts" or "stale".
        """
        return self.kind.repair

    @property
    def is_serious(self) -> bool:
        """Whether the severity is refused, unusable or leak: more than a remark."""
        return self.severity in (REFUSED, UNUSABLE, LEAK)

    @property
    def is_fault(self) -> bool:
        """Whether the severity is refused or unusable: more than lost space."""
        return self.severity in (REFUSED, UNUSABLE)

    @property
    def costs_bitmap(self) -> bool:
        """Whether a repair drops the bitmap at fault because of this problem."""
        return self.is_fault and not self.kind.costs_no_bitmap

    @property
    def costs_every_bitmap(self) -> bool:
        """Whether a check that finds this problem lets a repair drop all bitmaps."""
        return self.kind.is_overlap and self.structure == DIRECTORY

    @property
    def breaks_bitmap(self) -> bool:
        """Whether the bitmap at fault must not be read because of this problem."""
        return self.is_fault and not self.kind.keeps_status
