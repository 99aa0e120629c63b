"""Undo files: what a repair changed, kept for taking the repair back.

*Spec*: spec/repair.md, "Undo file".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from qcow2bm.errors import StorageError
from qcow2bm.format.undo_file import UndoLog, build_seal, build_undo
from qcow2bm.storage.new_file import append, require_new, write_new


class UndoFile:
    """A new file that keeps what a repair changes: ``repair(image, UndoFile(path))``.

    The file is on the disk before the repair writes anything. After the last write, the file gets
    the time of that write, by which `undo` can tell that nothing was written to the image since.
    `parse_undo` reads the content of the file.

    Attributes:
        path: the path of the file, or of a pipe, which cannot get that time.
        fault: why the file could not get that time, if so. The repair is done all the same, and
            undoing it needs ``is_asserted``.
    """

    def __init__(self, path: str) -> None:
        """Nothing is written yet.

        Raises:
            StorageError: the file is there already, or is no place to write to.
        """
        require_new(path)
        if os.path.exists(path) and stat.S_ISCHR(os.stat(path).st_mode):
            raise StorageError(path, 0, 0, "is a device, and keeps nothing: choose a new name")
        self.path = path
        self.fault: StorageError | None = None

    def __call__(self, undo: UndoLog) -> Callable[[int], None]:
        """Writes the file; returns what adds the time. This is what `repair` calls.

        Raises:
            StorageError: the file could not be written; then there is none.
        """
        write_new(self.path, build_undo(undo))
        return self._seal

    def _seal(self, mtime_ns: int) -> None:
        if os.path.isfile(self.path):
            try:
                append(self.path, build_seal(mtime_ns))
            except StorageError as error:
                self.fault = error
