"""An image together with everything that is wrong with it."""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.checking.check import Check, check
from qcow2bm.problems import CLUSTER, Problem
from qcow2bm.storage.interface import Storage


class Findings(NamedTuple):
    """The findings of a reader and of a check in an image.

    Attributes:
        metadata: the metadata of the image, with the problems that a reader finds.
        check: what a check finds beyond that.
        problems: all problems, each once; those that a reader finds come first.
    """

    metadata: Metadata
    check: Check
    problems: tuple[Problem, ...]

    @classmethod
    def load(cls, storage: Storage) -> Findings:
        """Reads and checks an image; the caller holds the locks.

        Raises:
            FormatError: the header cannot be read.
            UnsupportedError: the version of qcow2 is neither 2 nor 3.
            StorageError: reading failed.
        """
        metadata = Metadata.load(storage, force_share=True)
        # The bitmap tables are read now as well: the storage may be changed later.
        problems, checked = metadata.problems, check(metadata)
        return cls(metadata, checked, tuple(dict.fromkeys((*problems, *checked.problems))))

    @property
    def faults(self) -> tuple[Problem, ...]:
        """The problems of the severity refused or unusable."""
        return tuple(found for found in self.problems if found.is_fault)

    @property
    def nb_undercounts(self) -> int:
        """The number of listed problems that are refcounts that are too low."""
        return sum(found.kind.is_undercount for found in self.check.problems)

    @property
    def is_disk_in_doubt(self) -> bool:
        """Whether a reference could not be followed: then the owner of a cluster is not known."""
        return any(
            found.is_fault and found.bitmap_index is None and found.structure != CLUSTER
            for found in (*self.metadata.header_problems, *self.check.problems)
        )
