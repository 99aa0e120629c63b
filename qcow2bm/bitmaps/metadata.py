"""Everything an image says about its bitmaps, loaded in one place.

*Spec*: spec/bitmaps.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property

from qcow2bm.bitmaps.backup_verdict import BackupReason, backup_reason
from qcow2bm.bitmaps.directory import BitmapDirectory, load_directory, verify_directory
from qcow2bm.bitmaps.status import Status, judge
from qcow2bm.bitmaps.tables import Survey, survey
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.problems import header_problems
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.problems import Problem
from qcow2bm.storage.interface import Storage


class Metadata:
    """Header, header extensions, bitmap directory and bitmap tables of an image, as read once.

    `load` is the only way to make one. Nothing changes it afterwards; after a commit the image
    is loaded again. The bitmap tables are read at the first use of `survey`.

    Attributes:
        file: header and header extensions, and bounded reads.
        header_problems: the problems of header and header extensions.
        directory: the bitmap directory with its problems.
    """

    def __init__(
        self, file: ClusterFile, header_problems: tuple[Problem, ...], directory: BitmapDirectory
    ) -> None:
        """See `load`."""
        self.file = file
        self.header_problems = header_problems
        self.directory = directory

    @classmethod
    def load(cls, storage: Storage, *, force_share: bool = False) -> Metadata:
        """Reads header, extensions and directory under the locks of a reader.

        With ``force_share`` no locks are taken, neither now nor later: the caller holds them, or
        does without locks.

        Raises:
            FormatError: the header cannot be read, or its cluster size is impossible.
            UnsupportedError: the version of qcow2 is neither 2 nor 3.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed while it was read.
            StorageError: reading failed.
        """
        with nullcontext() if force_share else storage.read_lock():
            file = ClusterFile(storage, force_share=force_share)
            found = header_problems(file)
            directory = load_directory(file, found)
            verify_directory(file, directory)
        return cls(file, found, directory)

    @cached_property
    def survey(self) -> Survey:
        """The bitmap tables, read at the first use, and their problems.

        Raises:
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was loaded.
            StorageError: reading failed.
        """
        found = survey(self.file, self.directory, self.header_problems)
        with self.file.lock():
            self.verify()
        return found

    def verify(self) -> None:
        """Reads header area and directory again; the caller holds the locks of a reader.

        Raises:
            ChangedWhileReadingError: they changed since they were loaded.
            StorageError: reading failed.
        """
        verify_directory(self.file, self.directory)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of header, extensions, directory and tables; raises as `survey` does."""
        return (*self.header_problems, *self.directory.problems, *self.survey.problems)

    @property
    def distrust(self) -> Problem | None:
        """The problem that makes every directory entry untrustworthy; None in most images.

        Raises as `survey` does.
        """
        return self.directory.distrust or self.survey.distrust

    @cached_property
    def _problems_by_bitmap(self) -> dict[int, list[Problem]]:
        by_bitmap: dict[int, list[Problem]] = {}
        for found in self.problems:
            if found.bitmap_index is not None:
                by_bitmap.setdefault(found.bitmap_index, []).append(found)
        return by_bitmap

    def problems_of(self, index: int) -> tuple[Problem, ...]:
        """The problems of one bitmap, by its index in the directory; raises as `survey` does."""
        return tuple(self._problems_by_bitmap.get(index, ()))

    def status_of(self, entry: DirectoryEntry) -> tuple[Status, str]:
        """The status of a bitmap, and for a broken one the reason; raises as `survey` does."""
        problems: Iterable[Problem] = self.problems_of(entry.index)
        return judge(entry, self.directory, self.survey.distrust, problems)

    def backup_reason_of(self, entry: DirectoryEntry) -> tuple[BackupReason, str]:
        """The reason of the verdict on a bitmap, and for a broken one the first problem.

        Raises as `survey` does.
        """
        problems = (*self.problems_of(entry.index), *self.header_problems)
        return backup_reason(entry, *self.status_of(entry), problems)
