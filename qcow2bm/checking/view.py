"""All that is known of an image at some time: what a reader finds, and what a check finds."""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.bitmaps.directory import BitmapDirectory, load_directory
from qcow2bm.bitmaps.tables import Survey, survey
from qcow2bm.checking.check import Check, check
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.problems import header_problems
from qcow2bm.problems import CLUSTER, Problem
from qcow2bm.storage.interface import Storage


class View(NamedTuple):
    """An image that nobody changes meanwhile."""

    file: ClusterFile
    header: tuple[Problem, ...]
    directory: BitmapDirectory
    survey: Survey
    check: Check

    @classmethod
    def of(cls, storage: Storage) -> View:
        """Looks at everything; raises what opening and checking an image do."""
        file = ClusterFile(storage, force_share=True)
        header = header_problems(file)
        directory = load_directory(file, header)
        return cls(file, header, directory, survey(file, directory, header), check(file, directory))

    @property
    def read_problems(self) -> tuple[Problem, ...]:
        """What a reader finds."""
        return (*self.header, *self.directory.problems, *self.survey.problems)

    @property
    def is_disk_in_doubt(self) -> bool:
        """Whether not all of it could be followed, so that nobody knows what belongs to whom."""
        return any(
            p.is_fault and p.bitmap_index is None and p.structure != CLUSTER
            for p in (*self.header, *self.check.problems)
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All there are, each once."""
        return tuple(dict.fromkeys((*self.read_problems, *self.check.problems)))
