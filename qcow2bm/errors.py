"""Every error the library raises on purpose.

The axis is whose fault it is and what the caller may do next::

    Qcow2BmError
    ├─ FormatError               the file breaks the qcow2 specification
    ├─ UnsupportedError          legal, but not something this library does
    ├─ LimitError                legal, but beyond a limit of this library or of QEMU
    ├─ BitmapError               one bitmap cannot serve the request
    │  ├─ BitmapNotFoundError       (also KeyError) no usable bitmap of that name
    │  ├─ BitmapInconsistentError   in_use is set: writes may be missing from it
    │  ├─ BitmapStaleError          the autoclear bit is off: all bitmaps are outdated
    │  └─ BitmapBrokenError         its metadata cannot be trusted
    ├─ StateError                called at the wrong time
    └─ StorageError              (also OSError) the storage failed
       ├─ ShortReadError            fewer bytes than the file claimed to have
       ├─ ImageLockedError          another process uses the image
       └─ ChangedWhileReadingError  the image was modified under the reader

Plain ``ValueError`` and ``TypeError`` are raised for bad arguments. Every error is built
from typed attributes, survives pickle, and its message is one printable line.
"""

from __future__ import annotations

import errno as _errno

from qcow2bm.units import escape


class Qcow2BmError(Exception):
    """The base of every error this library raises on purpose.

    Attributes are the constructor's arguments, by name; ``str()`` is one printable line.
    """

    def __init__(self, message: str, *arguments: object) -> None:
        """Keeps the message and, for pickle, the arguments of the subclass's constructor."""
        super().__init__(message)
        self._message = message
        self._arguments = arguments or (message,)

    def __str__(self) -> str:
        return self._message

    def __reduce__(self) -> tuple[type[Qcow2BmError], tuple[object, ...]]:
        return type(self), self._arguments


class FormatError(Qcow2BmError):
    """The file breaks the specification: ``structure``, ``field``, host ``offset``, ``reason``."""

    def __init__(self, structure: str, field: str, offset: int, reason: str) -> None:
        self.structure, self.field, self.offset, self.reason = structure, field, offset, reason
        where = f"{structure}: {field}" if field else structure
        super().__init__(f"{where} at {offset:#x} {reason}", structure, field, offset, reason)


class UnsupportedError(Qcow2BmError):
    """The image or platform is legal, but needs a ``feature`` this library does not have."""

    def __init__(self, feature: str) -> None:
        self.feature = feature
        super().__init__(f"not supported: {feature}", feature)


class LimitError(Qcow2BmError):
    """A value is legal, but beyond a limit of this library or of QEMU."""

    def __init__(self, what: str, value: int, limit: int) -> None:
        self.what, self.value, self.limit = what, value, limit
        super().__init__(f"{what} is {value}, more than the limit of {limit}", what, value, limit)


class BitmapError(Qcow2BmError):
    """One bitmap, called ``name``, cannot serve the request, for the ``reason`` given."""

    default_reason = "cannot be used"

    def __init__(self, name: str, reason: str = "") -> None:
        self.name, self.reason = name, reason or self.default_reason
        super().__init__(f'bitmap "{escape(name)}" {self.reason}', name, self.reason)


class BitmapNotFoundError(BitmapError, KeyError):
    """The image has no usable bitmap of that name."""

    default_reason = "not found"


class BitmapInconsistentError(BitmapError):
    """The bitmap is in_use: whoever wrote the image never stored it, so bits may be missing."""

    default_reason = (
        "is in use (inconsistent), so writes may be missing from it: if a VM is running, stop it "
        "properly and look again; if it crashed, take a full backup"
    )


class BitmapStaleError(BitmapError):
    """The autoclear bit is off: the image was written by a program that ignores bitmaps."""

    default_reason = (
        "is stale, so writes are missing from it: a program without bitmap support modified the "
        "image; take a full backup"
    )


class BitmapBrokenError(BitmapError):
    """The metadata of the bitmap cannot be trusted; ``reason`` names the first fault."""

    default_reason = "is broken"


class StateError(Qcow2BmError):
    """Called at the wrong time: the image is in ``state`` where ``required`` is needed."""

    def __init__(self, state: str, required: str) -> None:
        self.state, self.required = state, required
        super().__init__(f"the image is {state}, but must be {required}", state, required)


class StorageError(Qcow2BmError, OSError):
    """Reading the storage failed at ``path``, byte ``offset``, over ``length`` bytes.

    ``errno`` is the system's error number, or None where the system reported none.
    """

    def __init__(
        self, path: str, offset: int, length: int, reason: str, errno: int | None = None
    ) -> None:
        where = f" (reading {length} bytes at {offset:#x})" if length else ""
        super().__init__(f"{escape(path)}: {reason}{where}", path, offset, length, reason, errno)
        self.path, self.offset, self.length, self.reason = path, offset, length, reason
        self.errno = errno

    @classmethod
    def from_os(cls, error: OSError, path: str, offset: int, length: int) -> StorageError:
        """The same failure in this library's words; the caller chains it with ``from``."""
        return cls(path, offset, length, escape(error.strerror or str(error)), error.errno)


class ShortReadError(StorageError):
    """The storage ended earlier than its own size promised."""

    def __init__(self, path: str, offset: int, length: int) -> None:
        super().__init__(path, offset, length, "the file ended too early", _errno.EIO)
        self._arguments = path, offset, length


class ImageLockedError(StorageError):
    """Another process holds a lock that forbids this use; ``held`` says which."""

    def __init__(self, path: str, held: str) -> None:
        self.held = held
        super().__init__(
            path,
            0,
            0,
            f"in use by another process, which {held}; is a VM running on it? "
            "read it anyway with -U (force_share=True)",
            _errno.EAGAIN,
        )
        self._arguments = path, held


class ChangedWhileReadingError(StorageError):
    """The image was modified while it was read; what was read is discarded."""

    def __init__(self, path: str, structure: str) -> None:
        self.structure = structure
        super().__init__(
            path, 0, 0, f"the {structure} changed while it was read; open the image again"
        )
        self._arguments = path, structure
