"""An image while it is open: what Image, Bitmap, Edit and tracking share.

One `OpenImage` belongs to each `Image`. It holds the storage with its locks, the metadata as it
was read last, and the one thing that may be going on: an edit, or tracking.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple, NoReturn

from qcow2bm.bitmaps.directory import verify_entry
from qcow2bm.bitmaps.metadata import Metadata
from qcow2bm.bitmaps.tables import Survey
from qcow2bm.clusters.file import ClusterFile
from qcow2bm.errors import Qcow2BmError, StateError
from qcow2bm.format.directory import DirectoryEntry
from qcow2bm.storage.interface import Storage, WritableStorage
from qcow2bm.storage.write_guard import WriteGuard

TRACKED = "being tracked"
"""The state of an image from the beginning of tracking to its end."""


class Loaded(NamedTuple):
    """The metadata of an image, and the revision of the image at which it was read."""

    metadata: Metadata
    revision: int


class _Activity(NamedTuple):
    """The activity on an image, and the function that abandons it if the image is closed."""

    state: str
    abandon: Callable[[], None] | None


class OpenImage:
    """An image that is open, until `leave` or `close` is called.

    Attributes:
        name: the path, or what else the storage calls itself.
        storage: the storage; the same as ``guard`` if the image is open for editing.
        guard: what writes go through, under the locks of a writer; None if the image is open for
            reading only.
        loaded: the metadata as it was read last, also after `leave`.
        revision: counts the changes of the image after which a `Bitmap` from before is outdated.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        is_owner: bool,
        force_share: bool = False,
        writable: WritableStorage | None = None,
        lock_timeout: float = 0,
    ) -> None:
        """Takes the locks of a writer if the image is to be edited, and reads the metadata.

        Args:
            storage: the storage of the image.
            is_owner: whether `close` closes the storage.
            force_share: whether the image is read without locks.
            writable: ``storage`` once more, if the image is to be edited; else None.
            lock_timeout: how many seconds to wait for the locks of a writer.

        Raises:
            As `qcow2bm.open` does.
        """
        self.name = storage.name
        self.guard = WriteGuard(writable) if writable else None
        self.storage: Storage = self.guard or storage
        self.revision = 0
        self._force_share = force_share
        self._activity: _Activity | None = None
        self._left: tuple[str, str] | None = None
        self._resources = ExitStack()
        if is_owner:
            self._resources.callback(storage.close)
        try:
            if self.guard:
                self._resources.callback(self.guard.release)
                self.guard.acquire(lock_timeout)
            self.loaded = self._load()
        except BaseException:
            self._resources.close()
            raise

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Image cannot be pickled")

    def _load(self) -> Loaded:
        metadata = Metadata.load(self.storage, force_share=self._force_share)
        return Loaded(metadata, self.revision)

    @property
    def metadata(self) -> Metadata:
        """The metadata as it was read last.

        Raises:
            StateError: the image was left or closed.
        """
        self.require_open()
        return self.loaded.metadata

    @property
    def file(self) -> ClusterFile:
        """Header, header extensions and bounded reads; raises as `metadata` does."""
        return self.metadata.file

    def lock(self) -> AbstractContextManager[None]:
        """Returns the locks of a reader; raises as `ClusterFile.lock` and `metadata` do."""
        return self.file.lock()

    def require_open(self) -> None:
        """Returns if the image is open.

        Raises:
            StateError: the image was left or closed.
        """
        if self._left:
            raise StateError(*self._left)

    def require_idle(self) -> None:
        """Returns if neither an edit nor tracking is going on.

        Raises:
            StateError: one of them is.
        """
        if self._activity:
            raise StateError(self._activity.state, "left alone until that is done")

    def begin(self, state: str, abandon: Callable[[], None] | None = None) -> None:
        """Records that an edit or tracking begins; `require_idle` was called before.

        Args:
            state: what the image is until `end`, such as "being edited".
            abandon: called by `close` if the image is closed before `end`.
        """
        self._activity = _Activity(state, abandon)

    def end(self) -> None:
        """Records that the edit or the tracking has ended."""
        self._activity = None

    @property
    def is_tracked(self) -> bool:
        """Whether tracking goes on."""
        return self._activity is not None and self._activity.state == TRACKED

    def look_again(self) -> None:
        """Reads the metadata again while a tracker may have changed them.

        Each `Bitmap` from before is outdated if the directory has changed.

        Raises:
            ChangedWhileReadingError: the tracker has just changed them: try again.
            StorageError: reading failed.
        """
        if not self.is_tracked or not self.guard or not self.guard.is_held:
            return
        metadata = Metadata.load(self.storage, force_share=True)  # the tracker has the locks
        if metadata.directory.entries != self.loaded.metadata.directory.entries:
            self.outdate()
        self.loaded = Loaded(metadata, self.revision)

    def outdated_error(self, subject: str) -> StateError:
        """Returns the error for using a ``subject`` that a change of the image has outdated."""
        return StateError("outdated by a commit", "looked up again", subject)

    def outdate(self) -> None:
        """Makes each `Bitmap` from before raise `StateError`, since the image has changed."""
        self.revision += 1

    def reload(self, unreadable: str) -> None:
        """Reads the metadata again after a change; nothing can be read as it was before.

        Args:
            unreadable: the state in which the image is left if the metadata cannot be read. That
                raises nothing: the change itself is done.
        """
        self.loaded.metadata.file.close()
        self.outdate()
        try:
            self.loaded = self._load()
        except Qcow2BmError:
            self.leave(unreadable, "opened again")

    def leave(self, state: str, required: str) -> None:
        """Lets nothing be read any more: everything raises ``StateError(state, required)``."""
        self.loaded.metadata.file.close()
        self._left = state, required

    def close(self) -> None:
        """Abandons what is going on, lets the locks go, and closes the storage if it is owned."""
        if self._activity and self._activity.abandon:
            # Without the locks nothing may be written. If an interrupt ends the waiting for another
            # thread that writes, the locks stay until the next `close`.
            self._activity.abandon()
        self.leave("closed", "open")
        self._resources.close()

    def survey(self) -> Survey:
        """Returns what the bitmap tables have; the first call reads the tables.

        Raises:
            StateError: the image was left or closed.
            ImageLockedError: another process writes to the image.
            ChangedWhileReadingError: the image changed since it was opened.
            StorageError: reading failed.
        """
        found = self.metadata.survey
        self.file.verify_untouched()
        return found

    def verify(self, entry: DirectoryEntry) -> None:
        """Reads a stored entry again if the storage cannot tell of writes; raises as `survey`."""
        if not self.file.is_watched and entry.name_bytes is not None:
            with self.lock():
                verify_entry(self.file, entry)
