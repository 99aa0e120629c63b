"""Every error that the library raises on purpose.

The errors are divided by whose fault it is, and by what the caller may do next::

    Qcow2BmError
    ├─ FormatError               the file breaks the qcow2 specification
    ├─ UnsupportedError          legal, but not supported by this library
    ├─ LimitError                legal, but beyond a limit of this library or of QEMU
    ├─ BitmapError               one bitmap cannot serve the request
    │  ├─ BitmapNotFoundError       (also KeyError) no usable bitmap of that name
    │  ├─ BitmapExistsError         the name is taken
    │  ├─ BitmapInconsistentError   in_use is set: writes may be missing from it
    │  ├─ BitmapStaleError          the autoclear bit is off: all bitmaps are outdated
    │  └─ BitmapBrokenError         the metadata of the bitmap cannot be trusted
    ├─ StateError                called at the wrong time
    │  └─ ReadOnlyImageError        the image was opened for reading only
    ├─ StorageError              (also OSError) the storage failed
    │  ├─ ShortReadError            fewer bytes than the file claimed to have
    │  ├─ ImageLockedError          another process uses the image
    │  ├─ ChangedWhileReadingError  another process modified the image during reading
    │  └─ NoRoomError               the image has no room, and the storage cannot grow
    ├─ ComparisonError           a disk is not the one that is to be compared
    ├─ EvidenceError             nothing proves that saved bitmaps are still true of the disk
    │  ├─ IntentError               the same, of bitmaps that a crash has left in use
    │  └─ TailError                 the same, of the bitmaps of an offload
    ├─ CommitError               a commit failed; says whether the edit took effect
    └─ QmpError                  a running QEMU could not be asked
       ├─ QmpRefusedError           QEMU refused the command
       └─ QmpTimeoutError           QEMU did not answer in time

Plain ``ValueError`` and ``TypeError`` are raised for bad arguments. Every error is built from
typed attributes, survives pickle, and has a message of one printable line.

If there is something the caller can do, the message ends with a hint. The hint is also a value,
`Hint`. The message words it with arguments and methods of this library. A program that has other
words, such as the options of the command line, passes its own words to `Qcow2BmError.explain`.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Mapping
from typing import Literal

from qcow2bm.units import escape, format_size

Hint = Literal[
    "assert-alone",
    "assert-lost",
    "assert-raw",
    "assert-unchanged",
    "attach",
    "convert",
    "copy-again",
    "decompress",
    "force-share",
    "full-backup",
    "judge",
    "lock-timeout",
    "read-offload",
    "read-sidecar",
    "read-stream",
    "remove-all",
    "remove-bitmap",
    "rename-copies",
    "run-again",
    "salvage-or-remove-all",
    "undo",
    "unlocked",
    "unlocked-write",
]
"""A way in which the caller can deal with an error.

``assert-alone``: assert that no other machine wrote to a disk after a migration.
``assert-lost``: assert that the bitmaps of an offload need not be put back.
``assert-raw``: assert that a disk is raw although it begins like another format.
``assert-unchanged``: assert that nothing wrote to the disk, or make the bitmaps dirty everywhere.
``force-share``: read without locks although another process writes. ``lock-timeout``: wait for the
other process. ``full-backup``: take a full backup, for which the state of the bitmap does not
matter. ``unlocked``, ``unlocked-write``: read or write without locks, since the file system
has no locks. ``remove-all``: remove all bitmaps at once. ``remove-bitmap``: remove a bitmap to make
room. ``salvage-or-remove-all``: salvage the bitmaps, or remove all bitmaps at once. ``judge``:
judge the evidence of a machine that was armed, and settle its bitmaps. ``rename-copies``: finish a
rescue in the image of a machine that is off.

The other hints are about a file that is no qcow2 image. ``attach``: keep the bitmaps of a raw disk
in an image beside the disk. ``convert``: make a qcow2 image of it. ``copy-again``: the file is too
short; copy it once more. ``decompress``: decompress the file. ``read-offload``, ``read-sidecar``,
``read-stream``: read the bitmaps in an offload file, a sidecar or a migration stream. ``undo``:
take back the repair that wrote it.
"""

_HINTS: dict[Hint, str] = {
    "assert-alone": "pass is_alone=True if you know that no other machine wrote to the disks",
    "assert-lost": "pass is_lost=True if they need not be put back",
    "assert-raw": "pass is_raw=True if you know that it is raw",
    "assert-unchanged": (
        "pass is_asserted=True if you know that the disk is unchanged, or is_all_dirty=True"
    ),
    "attach": "if it is a raw disk, make an image for its bitmaps with qcow2bm.attach",
    "convert": "make a qcow2 image of it with qemu-img convert",
    "copy-again": "if an image is expected here, copy the image again",
    "decompress": "decompress it first",
    "force-share": "read it anyway with force_share=True",
    "full-backup": "to take a full backup, pass base=None",
    "judge": "call qcow2bm.rescue.judge, and qcow2bm.rescue.settle with each verdict",
    "lock-timeout": "stop that process, or wait for it with lock_timeout",
    "read-offload": "put its bitmaps back with qcow2bm.live.restore_offline",
    "read-sidecar": "read it with qcow2bm.sidecar.read",
    "read-stream": "read it with qcow2bm.stream.read",
    "remove-all": "remove all bitmaps with Edit.remove_all",
    "remove-bitmap": "make room with Edit.remove",
    "rename-copies": "try again, or call qcow2bm.rescue.rename_copies when the machine is off",
    "run-again": "call the same function again, which completes or removes what was begun",
    "salvage-or-remove-all": "salvage the bitmaps, or remove all of them with Edit.remove_all",
    "undo": "read it with qcow2bm.parse_undo, and take back the repair with qcow2bm.undo",
    "unlocked": "read it without locks with force_share=True",
    "unlocked-write": "if no other process uses it, write without locks with locking=False",
}


def advise(facts: str, hint: Hint | None, words: Mapping[Hint, str] = _HINTS) -> str:
    """Returns facts and a hint as one text; ``words`` are those of this library by default."""
    if not hint:
        return facts
    separator = " " if facts.endswith("?") else "; "
    return facts + separator + words[hint]


class Qcow2BmError(Exception):
    """The base of every error that the library raises on purpose.

    ``str()`` is one printable line: the facts, and the hint in the words of this library.

    Attributes:
        facts: the message without the hint.
        hint: what the caller can do about the error; None if there is no hint.

    Further attributes are the arguments of the constructor, by name.
    """

    def __init__(self, facts: str, *arguments: object, hint: Hint | None = None) -> None:
        """Keeps the message and, for pickle, the arguments of the subclass's constructor."""
        self.facts, self.hint = facts, hint
        self._message = advise(facts, hint)
        self._arguments = arguments or (facts,)
        super().__init__(self._message)

    def explain(self, words: Mapping[Hint, str]) -> str:
        """Returns the message with the hint in the words of another program."""
        return advise(self.facts, self.hint, words)

    def __str__(self) -> str:
        return self._message

    def __reduce__(self) -> tuple[type[Qcow2BmError], tuple[object, ...]]:
        return type(self), self._arguments


class FormatError(Qcow2BmError):
    """The file breaks the specification: ``structure``, ``field``, host ``offset``, ``reason``."""

    def __init__(
        self, structure: str, field: str, offset: int, reason: str, hint: Hint | None = None
    ) -> None:
        self.structure, self.field, self.offset, self.reason = structure, field, offset, reason
        where = f"{structure}: {field}" if field else structure
        facts = f"{where} at {offset:#x} {reason}"
        super().__init__(facts, structure, field, offset, reason, hint, hint=hint)


class UnsupportedError(Qcow2BmError):
    """The image or the platform needs a ``feature`` that this library does not have."""

    def __init__(self, feature: str) -> None:
        self.feature = feature
        super().__init__(f"not supported: {feature}", feature)


Removable = tuple[tuple[str, int], ...]
"""Bitmaps that can be removed to make room: the name of each, and the bytes that it gives back."""

_MOST_LISTED = 3


def _gains(bitmaps: Removable) -> str:
    """Returns what is gained by removing bitmaps, as the end of a message."""
    listed = ", ".join(f'"{escape(name)}" {format_size(size)}' for name, size in bitmaps)
    if len(bitmaps) > _MOST_LISTED:
        return f"{_gains(bitmaps[:_MOST_LISTED])}, and {len(bitmaps) - _MOST_LISTED} others less"
    return f"; what removing a bitmap would free: {listed}" if bitmaps else ""


class LimitError(Qcow2BmError):
    """A value, ``what``, is legal, but beyond a limit of this library or of QEMU.

    Attributes:
        missing: how many bytes of free clusters are missing; None unless the image has as many
            clusters as refcounts can be stored for.
        bitmaps: as of a `NoRoomError`.
    """

    def __init__(
        self,
        what: str,
        value: int,
        limit: int,
        missing: int | None = None,
        bitmaps: Removable = (),
        hint: Hint | None = None,
    ) -> None:
        self.what, self.value, self.limit = what, value, limit
        self.missing, self.bitmaps = missing, bitmaps
        facts = f"{what} is {value}, more than the limit of {limit}{_gains(bitmaps)}"
        super().__init__(facts, what, value, limit, missing, bitmaps, hint, hint=hint)

    def with_bitmaps(self, bitmaps: Removable, hint: Hint | None) -> LimitError:
        """Returns this error with the bitmaps that can be removed, and a hint."""
        return LimitError(self.what, self.value, self.limit, self.missing, bitmaps, hint)


class BitmapError(Qcow2BmError):
    """The bitmap ``name`` cannot serve the request, for the ``reason`` given."""

    default_reason = "cannot be used"

    def __init__(self, name: str, reason: str = "", hint: Hint | None = None) -> None:
        self.name, self.reason = name, reason or self.default_reason
        facts = f'bitmap "{escape(name)}" {self.reason}'
        super().__init__(facts, name, self.reason, hint, hint=hint)


class BitmapNotFoundError(BitmapError, KeyError):
    """The image has no usable bitmap of that name."""

    default_reason = "not found"


class BitmapExistsError(BitmapError):
    """The image already has a bitmap of that name."""

    default_reason = "already exists"


class BitmapInconsistentError(BitmapError):
    """The bitmap is in_use: a program that recorded writes has not stored it, or not yet."""

    default_reason = (
        "is in use (inconsistent), so writes may be missing from it: if a VM is running, stop the "
        "VM properly and look again; if the VM crashed, salvage the bitmap, or take a full backup"
    )


class BitmapStaleError(BitmapError):
    """The autoclear bit is off: a program without bitmap support wrote to the image."""

    default_reason = (
        "is stale, so writes are missing from it: a program without bitmap support modified the "
        "image; salvage the bitmap, or take a full backup"
    )


class BitmapBrokenError(BitmapError):
    """The metadata of the bitmap cannot be trusted; ``reason`` names the first problem."""

    default_reason = "is broken"


class StateError(Qcow2BmError):
    """The call came at the wrong time: ``subject`` is in ``state``, but must be ``required``."""

    def __init__(
        self, state: str, required: str, subject: str = "the image", hint: Hint | None = None
    ) -> None:
        self.state, self.required, self.subject = state, required, subject
        facts = f"{subject} is {state}, but must be {required}"
        super().__init__(facts, state, required, subject, hint, hint=hint)


class ReadOnlyImageError(StateError):
    """The image was opened for reading only, but an edit needs ``open(path, "r+")``."""

    def __init__(self) -> None:
        super().__init__("open for reading only", 'opened for writing (mode "r+")')
        self._arguments = ()


class StorageError(Qcow2BmError, OSError):
    """The storage ``path`` failed over ``length`` bytes from byte ``offset`` on.

    Attributes:
        action: the operation that failed, "reading" or "writing".
        errno: the error number of the system; None if the system reported none.
    """

    def __init__(
        self,
        path: str,
        offset: int,
        length: int,
        reason: str,
        errno: int | None = None,
        action: str = "reading",
        hint: Hint | None = None,
    ) -> None:
        where = f" ({action} {length} bytes at {offset:#x})" if length else ""
        facts = f"{escape(path)}: {reason}{where}"
        super().__init__(facts, path, offset, length, reason, errno, action, hint, hint=hint)
        self.path, self.offset, self.length, self.reason = path, offset, length, reason
        self.errno, self.action = errno, action

    @property
    def is_full(self) -> bool:
        """Whether the storage failed because it has no room left."""
        return self.errno in (_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG)

    @classmethod
    def from_os(
        cls, error: OSError, path: str, offset: int, length: int, action: str = "reading"
    ) -> StorageError:
        """Returns a failure of the system as an error of this library, to be raised ``from`` it."""
        reason = escape(error.strerror or str(error))
        return cls(path, offset, length, reason, error.errno, action)


class ShortReadError(StorageError):
    """The storage ended before the size that it had reported."""

    def __init__(self, path: str, offset: int, length: int) -> None:
        super().__init__(path, offset, length, "the file ended too early", _errno.EIO)
        self._arguments = path, offset, length


class ImageLockedError(StorageError):
    """Another process, or another `Image` of this process, holds a lock that forbids this use.

    Attributes:
        held: what the other process does, such as "is writing to it (lock byte 101)".
        action: what was wanted, "reading" or "writing".
        lock_byte: the byte of QEMU's protocol that the other process has locked; None where the
            storage has locks of another kind.
        is_own: whether this process itself has the image open for writing.
    """

    def __init__(
        self,
        path: str,
        held: str,
        action: str = "reading",
        lock_byte: int | None = None,
        is_own: bool = False,
    ) -> None:
        self.held, self.lock_byte, self.is_own = held, lock_byte, is_own
        if is_own:
            reason = f"in use by this process itself, which {held}"
        else:
            reason = f"in use by another process, which {held}; is a VM running on it?"
        hint: Hint | None = "lock-timeout" if action == "writing" else "force-share"
        if is_own and action == "writing":  # to wait for this process would be to wait for ever
            hint = None
        super().__init__(path, 0, 0, reason, _errno.EAGAIN, action, hint)
        self._arguments = path, held, action, lock_byte, is_own

    def by_this_process(self) -> ImageLockedError:
        """Returns the same error for an image that this process itself has open for writing."""
        return type(self)(self.path, self.held, self.action, self.lock_byte, is_own=True)


class ChangedWhileReadingError(StorageError):
    """The image was modified during reading; the data that were read are discarded."""

    def __init__(self, path: str, structure: str) -> None:
        self.structure = structure
        super().__init__(
            path, 0, 0, f"the {structure} changed while it was read; open the image again"
        )
        self._arguments = path, structure


class NoRoomError(StorageError):
    """The image has too few free clusters for an edit, and the storage cannot grow.

    Attributes:
        needed: how many bytes of free clusters the edit needs.
        missing: how many bytes too few there are. If a structure needs clusters in a row, clusters
            that are free elsewhere do not count.
        limit: where the storage ends, in bytes.
        bitmaps: the bitmaps that can be removed, and that this edit leaves alone: the name of each,
            and how many bytes of clusters it gives back, the largest first.
    """

    def __init__(
        self,
        path: str,
        needed: int,
        missing: int,
        limit: int,
        bitmaps: Removable = (),
        hint: Hint | None = None,
    ) -> None:
        self.needed, self.missing, self.limit, self.bitmaps = needed, missing, limit, bitmaps
        reason = (
            f"No space left: the edit needs {format_size(needed)} of free clusters, "
            f"{format_size(missing)} more than there are, and the storage ends at "
            f"{format_size(limit)}; nothing was changed{_gains(bitmaps)}"
        )
        super().__init__(path, 0, 0, reason, _errno.ENOSPC, "writing", hint)
        self._arguments = path, needed, missing, limit, bitmaps, hint

    def with_bitmaps(self, bitmaps: Removable, hint: Hint | None) -> NoRoomError:
        """Returns this error with the bitmaps that can be removed, and a hint."""
        return NoRoomError(self.path, self.needed, self.missing, self.limit, bitmaps, hint)


class ComparisonError(Qcow2BmError):
    """The disk at ``path`` cannot be one of the two that are to be compared, for the ``reason``.

    ``fault`` is what is wrong: "not-current", it is not known to be what the disk holds now;
    "same-disk", the backup is the disk itself, or depends on it; "wrong-size"; "container", the
    file begins like a file of the format ``container``, but its format was not given.
    """

    def __init__(
        self,
        path: str,
        reason: str,
        fault: Literal["not-current", "same-disk", "wrong-size", "container"],
        container: str = "",
    ) -> None:
        self.path, self.reason, self.fault, self.container = path, reason, fault, container
        super().__init__(f"{escape(path)}: {reason}", path, reason, fault, container)


class EvidenceError(Qcow2BmError):
    """Nothing proves that a disk is unchanged since bitmaps of it were saved.

    ``reason`` says what the proof lacks.
    """

    def __init__(self, reason: str, hint: Hint | None = "assert-unchanged") -> None:
        self.reason = reason
        facts = f"the disk may have been written to since the bitmaps were saved: {reason}"
        super().__init__(facts, reason, hint, hint=hint)


class IntentError(EvidenceError):
    """Bitmaps that a crash left in use cannot be recovered: nothing proves that writes are known.

    ``reason`` says what the proof lacks.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        facts = f"the bitmaps cannot be recovered: {reason}"
        Qcow2BmError.__init__(self, facts, reason)
        self._arguments = (reason,)


class TailError(EvidenceError):
    """Bitmaps of an offload cannot be put back here: nothing proves that every write is known.

    ``reason`` says what the proof lacks, or that this is another machine or disk.
    """

    def __init__(self, reason: str, hint: Hint | None = None) -> None:
        super().__init__(reason, hint)
        facts = f"the bitmaps of the offload cannot be put back here: {reason}"
        Qcow2BmError.__init__(self, facts, reason, hint, hint=hint)


CommitOutcome = Literal["old", "new", "unknown"]

_OUTCOMES: dict[CommitOutcome, str] = {
    "old": "the edit did not take effect, all bitmaps are as before",
    "new": "the edit took effect, but some clusters may have leaked: qemu-img check -r leaks",
    "unknown": "whether the edit took effect is unknown: make sure that the storage works again, "
    "then look at the bitmaps; each is as before or as after the edit, none in between",
}


class CommitError(Qcow2BmError):
    """Writing an edit to ``path`` failed at ``step``, for the ``reason`` given.

    Each bitmap is as before the edit or as after the edit (INV-ATOMIC). Nothing was undone, and
    nothing was tried again.

    Attributes:
        outcome: "old", if all bitmaps are as before; "new", if all bitmaps are as after; "unknown",
            if only reading the storage itself can tell which of the two it is.
        consequence: what the message says of the outcome; it has its own words if the failure was
            not that of an edit.
        growth: by how many bytes the file would have grown, if an edit failed because the file
            system is full; else None.
        bitmaps: as of a `NoRoomError`. What removing a bitmap frees stays in the file, and is there
            for the next edit.
    """

    def __init__(
        self,
        path: str,
        step: str,
        outcome: CommitOutcome,
        reason: str,
        consequence: str = "",
        growth: int | None = None,
        bitmaps: Removable = (),
        hint: Hint | None = None,
    ) -> None:
        self.path, self.step, self.outcome, self.reason = path, step, outcome, reason
        self.consequence = consequence or _OUTCOMES[outcome]
        self.growth, self.bitmaps = growth, bitmaps
        facts = f"{escape(path)}: {step} failed: {reason}; {self.consequence}"
        if growth is not None:
            facts += f"; the file would have grown by {format_size(growth)}{_gains(bitmaps)}"
        arguments = path, step, outcome, reason, consequence, growth, bitmaps, hint
        super().__init__(facts, *arguments, hint=hint)

    def with_room(self, growth: int, bitmaps: Removable, hint: Hint | None) -> CommitError:
        """Returns this error with what is missing, the bitmaps that can be removed, and a hint."""
        return CommitError(
            self.path, self.step, self.outcome, self.reason, self.consequence, growth, bitmaps, hint
        )


class QmpError(Qcow2BmError):
    """A QMP ``command`` failed for the ``reason`` given; "" stands for connecting to QEMU.

    Whether QEMU executed the command is unknown, except for a `QmpRefusedError`.
    """

    def __init__(self, command: str, reason: str, hint: Hint | None = None) -> None:
        self.command, self.reason = command, reason
        what = f"the QMP command {command}" if command else "connecting to QMP"
        super().__init__(f"{what} failed: {reason}", command, reason, hint, hint=hint)


class QmpRefusedError(QmpError):
    """QEMU refused the ``command``, and did nothing; ``reason`` is the answer of QEMU."""


class QmpTimeoutError(QmpError):
    """QEMU did not answer the ``command`` within ``seconds``, and may still execute it."""

    def __init__(self, command: str, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(command, f"no answer within {seconds:g} seconds", "run-again")
        self._arguments = command, seconds
