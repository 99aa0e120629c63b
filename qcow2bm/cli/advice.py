"""The commands that help next, worked out from the state of an image: the one place for advice.

A command of this program is advised only if a dry run of it succeeds on the image as it is, and if
the file system has room for it.

*Spec*: spec/cli.md, "The next command".
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcow2bm import (
    Bitmap,
    BitmapBrokenError,
    BitmapError,
    BitmapInconsistentError,
    BitmapNotFoundError,
    BitmapStaleError,
    FormatError,
    Image,
    ImageLockedError,
    NoRoomError,
    Problem,
    Qcow2BmError,
    open,
)
from qcow2bm.cli.images import (
    find,
    is_marked_corrupt,
    is_outdated,
    needs_help,
    new_name,
    not_in_use,
    outdated,
    word_for,
    words_of,
)
from qcow2bm.cli.next_command import Advice, Argv, NextCommand
from qcow2bm.cli.output import count, listed, quoted, size

if TYPE_CHECKING:
    from qcow2bm import BackupReason, Edit, Plan

ALL_OF_THE_DISK = "0:"

_IS_FULL = "the next incremental backup saves the whole disk"
_MOST_NAMED = 4
_MOST_REMADE = 16
_MAX_NAME = 1023
_GRANULARITIES = [1 << bits for bits in range(9, 32)]
_LAST_KNOWN = 4
"""The highest number of an incompatible feature bit that is known here."""

_PASSED_ON = "/dev/fd/", "/dev/std", "/proc/"
"""Paths that mean another file in the next process."""

_UNDO_OVERHEAD = 64 << 10
_MAX_FILE_NAME = 255


class _NoRoomError(Exception):
    """A command that would help has no room; ``missing`` is how many bytes are to be freed."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


ASK_THE_VM = Advice(
    "another process writes to the image: if that process is a VM, ask the VM with the QMP command "
    "query-block, and look again when it is off"
)
END_THE_READER = Advice(
    "another process reads the image, perhaps as the backing file of another disk, so nothing can "
    "write to it: end that process, and look again"
)


# After a failure


def advise_after(error: BaseException, path: str) -> Advice:
    """Returns what helps after a command failed because of the state that an image is in.

    Args:
        error: the error that ended the command.
        path: the image, as it was given.
    """
    if not isinstance(error, _OF_A_STATE):
        return Advice()
    try:
        with open(path) as image:
            name = error.name if isinstance(error, BitmapError) else None
            if name is not None and name in image.bitmaps:
                return advise_bitmap(image, path, word_for(name), image.verdict(name).reason)
            return advise(image, path, _checked(image))
    except Qcow2BmError:
        return Advice()  # the error that ended the command says more


_OF_A_STATE = BitmapInconsistentError, BitmapStaleError, BitmapBrokenError, FormatError


# The image as a whole


def advise(image: Image, path: str, problems: Sequence[Problem]) -> Advice:
    """Returns what makes an image usable again, as far as that is necessary.

    Args:
        image: the image.
        path: its file, as it was given.
        problems: the problems that are known of it.
    """
    path = spelled(path)
    if not needs_help(image, problems):
        return Advice()
    serious = [found for found in problems if found.is_serious]
    missing_writes = [bitmap for bitmap in _bitmaps(image) if is_outdated(bitmap)]
    found = _with_use(image, path, lambda: _advise(image, path, serious, missing_writes))
    is_refused = any(problem.severity == "refused" for problem in serious)
    return _printable(path, found)._replace(forbids_start=is_refused or is_marked_corrupt(image))


def _with_use(image: Image, path: str, find: Callable[[], Advice]) -> Advice:
    """Returns what is found, or why nothing can be written to the image."""
    use = image.use_by_another_process()
    if use in ("writer", "reader"):
        return ASK_THE_VM if use == "writer" else END_THE_READER
    try:
        if not _is_writable(path):
            return Advice("the image is to be changed, but it cannot be written to")
        return find()
    except ImageLockedError:
        return ASK_THE_VM
    except FileNotFoundError:
        return Advice("the image is not at this path any more")
    except _NoRoomError as error:
        return Advice(f"the image is to be changed: free {size(error.missing)} for that first")


def _is_writable(path: str) -> bool:
    """Whether this user can write to a file, or to a block device, which is not opened for that."""
    found = os.stat(path)
    if not os.access(path, os.W_OK):
        return False
    if not stat.S_ISBLK(found.st_mode):
        return True
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    try:
        return Path("/sys/dev/block", number, "ro").read_text().strip() != "1"
    except OSError:
        return True  # nothing says otherwise


def advise_anew(path: str) -> Advice:
    """Returns the advice for an image that a command has just changed, after a whole check.

    There is no advice if the image cannot be read by now.
    """
    try:
        with open(path) as image:
            return advise(image, path, _checked(image))
    except ImageLockedError:
        return ASK_THE_VM
    except Qcow2BmError:
        return Advice()


def _checked(image: Image) -> tuple[Problem, ...]:
    """Returns all problems that a reader and a check find."""
    return (*image.problems, *image.check().problems)


def _advise(
    image: Image, path: str, serious: Sequence[Problem], missing_writes: Sequence[Bitmap]
) -> Advice:
    refused = [found for found in serious if found.severity == "refused"]
    if refused:
        if all(found.kind.is_fittable for found in refused):
            fitting = _fit_all(image, path)
            if fitting:
                return Advice("the disk was resized without its bitmaps", (fitting,))
        repairing = _repair(path)
        if repairing:
            return Advice("the metadata can be repaired", (repairing,))
        if any(found.bit > _LAST_KNOWN for found in image.features("incompatible")):
            return Advice("the image has features that are unknown here: use a newer program")
        return Advice(f"no command of qcow2bm repairs that: {_BY_HAND}")
    if missing_writes:
        finishing = _finish_rescue(image, path)
        if finishing:
            return Advice("a rescue was interrupted", (finishing,))
        recovering = _recover(image, path)
        if recovering:
            return Advice("a crash left bitmaps in use that can be recovered", (recovering,))
        why = f"writes may be missing from {listed((b.name for b in missing_writes), _MOST_NAMED)}"
        salvaging = _salvage_all(image, path)
        if salvaging:
            return Advice(why, (salvaging,))
        repairing = _repair(path)
        if repairing:
            return Advice(f"{why}; first the faults must be repaired", (repairing,))
        return _by_qemu(image, path, why)
    repairing = _repair(path)
    if repairing:
        return Advice("the metadata can be repaired", (repairing,))
    if is_marked_corrupt(image):
        return _by_qemu(image, path, "the image has the corrupt bit, so no VM can write to it")
    return _by_qemu(image, path, "the disk or its refcounts have faults")


_BY_HAND = (
    "restore the header or the file from a copy, and then run invalidate --all, since no bitmap is "
    "to be trusted then"
)


def _bitmaps(image: Image) -> Iterator[Bitmap]:
    """Yields all bitmaps that stand for backups."""
    for entry in image.directory:
        bitmap = image.bitmap(entry.index)
        if not bitmap.is_auxiliary:
            yield bitmap


def _recover(image: Image, path: str, *words: str) -> NextCommand | None:
    """Returns the command that recovers bitmaps; all that can be recovered without ``words``."""
    recoverable = image.recoverable
    names = [find(image, word).name for word in words]
    if not recoverable or not {*names} <= {*recoverable}:
        return None
    try:
        plan = image.recover(names or None, dry_run=True).plan
    except Qcow2BmError:
        return None
    if not _is_possible(path, plan):
        return None
    cost = "no write is lost; what was written shortly before the crash counts as more than it was"
    return NextCommand(_argv("recover", path, *words), cost)


def _fit_all(image: Image, path: str) -> NextCommand | None:
    def operate(edit: Edit) -> None:
        for name in not_in_use(image, edit.names):
            edit.fit(name)

    if not _is_possible(path, _try(image, operate)):
        return None
    return NextCommand(_argv("fit", path, options=["--all"]))


def _salvage_all(image: Image, path: str) -> NextCommand | None:
    names = outdated(image)

    def operate(edit: Edit) -> None:
        for name in names:
            edit.salvage(name)

    if not _is_possible(path, _try(image, operate)):
        return None
    argv = _argv("salvage", path, options=["--all", "--all-dirty"])
    return NextCommand(argv, _IS_FULL if len(names) == 1 else f"{_IS_FULL}, by each of them")


def _repair(path: str, *, is_whole: bool = False) -> NextCommand | None:
    """Returns the command that repairs the image, unless it would change nothing.

    With ``is_whole`` the command is returned only if it repairs all faults.
    """
    from qcow2bm import plan_repair  # which takes time to load

    if not os.path.exists(path):
        return None
    try:
        planned = plan_repair(path)
    except ImageLockedError:
        raise
    except Qcow2BmError:
        return None
    undo = _undo_file(path)
    beside = planned.plan.length + _UNDO_OVERHEAD if undo else 0
    if (is_whole and planned.left) or not _is_possible(path, planned.plan, beside):
        return None
    costs = []
    if planned.lost:
        lost = [lost.name for lost in planned.lost if lost.name is not None]
        named = listed(lost) if lost else "bitmaps whose names are not known"
        each = "it" if len(lost) == 1 == len(planned.lost) else "each"
        costs.append(f"drops {named}, so the next backup by {each} must be a full one")
    if planned.renamed:
        pairs = [f"{quoted(old)} to {quoted(new)}" for old, new in planned.renamed]
        costs.append(f"renames {', '.join(pairs)}")
    if planned.left:
        costs.append(f"{count(len(planned.left), 'problem')} will be left")
    options = ["--undo", undo] if undo else ["--no-undo"]
    if not undo:
        costs.append("it cannot be taken back")
    return NextCommand(_argv("repair", path, options=options), "; ".join(costs))


def _undo_file(path: str) -> str | None:
    """Returns a name beside the image for the undo file; None if nothing can be written there."""
    folder = os.path.dirname(path) or "."
    if not os.path.isfile(path) or not os.access(folder, os.W_OK):
        return None
    is_long = len(os.fsencode(f"{os.path.basename(path)}.undo99")) > _MAX_FILE_NAME
    stem = os.path.join(os.path.dirname(path), "image") if is_long else path
    names = (f"{stem}.undo", *(f"{stem}.undo{number}" for number in range(2, 100)))
    return next((name for name in names if not os.path.lexists(name)), None)


def _by_qemu(image: Image, path: str, why: str) -> Advice:
    """Returns what QEMU's own tools do about it, and how to make again what they drop."""
    bitmaps = list(_bitmaps(image))
    dropped = [] if image.is_consistent else [entry.name or "" for entry in image.directory]
    loss = f"QEMU drops {listed(dropped)}" if dropped else ""
    if image.header.crypt_method:
        also = f"; {loss} by it" if loss else ""
        return Advice(f"{why}: repair it with qemu-img check -r all, giving it the secret{also}")
    missing = _missing_file(image, path)
    if missing is not None:
        return Advice(f"{why}: put the file {quoted(missing)} back first, which it names")
    repairing = ["qemu-img", "check", "-r", "all", path]
    first = [repairing]
    if image.version < 3:
        has_faults = any(found.is_fault for found in image.check().problems)
        first = [["qemu-img", "amend", "-o", "compat=1.1", path], *[repairing] * has_faults]
    if not dropped:
        return Advice(why, tuple(map(NextCommand, first)))
    remade = _remakeable(bitmaps)
    if remade:
        loss += f"; the commands below make {listed(b.name for b in remade)} anew, all dirty: "
        loss += _IS_FULL
    making = (command for bitmap in remade for command in _remake(bitmap, path))
    more = map(NextCommand, first[1:])
    return Advice(why, (NextCommand(first[0], loss), *more, *making))


def _missing_file(image: Image, path: str) -> str | None:
    """Returns the name of a backing file or data file that is a plain path and does not exist."""
    for name in (image.backing_file, image.data_file):
        is_plain = name is not None and ":" not in name.partition("/")[0]
        if is_plain and not os.path.exists(os.path.join(os.path.dirname(path), name or "")):
            return name
    return None


def _remakeable(bitmaps: Sequence[Bitmap]) -> list[Bitmap]:
    """Returns those of stale bitmaps that can be made anew with the same name and granularity."""
    found: dict[str, Bitmap] = {}
    for bitmap in bitmaps:
        name = bitmap.name
        is_named = name.isprintable() and 0 < len(name.encode()) <= _MAX_NAME
        if is_named and bitmap.granularity in _GRANULARITIES and len(found) < _MOST_REMADE:
            found.setdefault(name, bitmap)
    return list(found.values())


def _remake(bitmap: Bitmap, path: str) -> Iterator[NextCommand]:
    name = word_for(bitmap.name)
    yield NextCommand(_argv("add", path, name, options=["-g", str(bitmap.granularity)]))
    yield NextCommand(_argv("set", path, name, ALL_OF_THE_DISK))
    if not bitmap.auto:
        yield NextCommand(_argv("disable", path, name))


# One bitmap


def advise_bitmap(image: Image, path: str, name: str, reason: BackupReason) -> Advice:
    """Returns what makes a bitmap usable again for the next incremental backup.

    Everything in the bitmap becomes dirty by it, so that the next backup saves the whole disk. But
    `fit` keeps what is known to be clean, and `repair` may drop the bitmap.

    Args:
        image: the image.
        path: its file, as it was given.
        name: NAME as it was given.
        reason: the reason of the verdict on the bitmap.
    """
    path = spelled(path)
    return _printable(
        path, _with_use(image, path, lambda: _advise_bitmap(image, path, name, reason))
    )


def _advise_bitmap(image: Image, path: str, name: str, reason: BackupReason) -> Advice:
    word = words_of(image, name)
    bitmap = _found(image, word)
    if bitmap and bitmap.is_auxiliary:
        return Advice()  # to salvage it would be to lose the evidence of a crash
    if reason == "disabled":
        return Advice("", _disabled(image, path, word))
    if reason in ("inconsistent", "stale"):
        finishing = _finish_rescue(image, path)
        if finishing:
            return Advice("", (finishing,))
        recovering = _recover(image, path, word)
        if recovering:
            return Advice("", (recovering,))
        plan = _try(image, lambda edit: edit.salvage(find(image, word).name))
        if _is_possible(path, plan):
            argv = _argv("salvage", path, word, options=["--all-dirty"])
            return Advice("", (NextCommand(argv, _IS_FULL),))
        return _repair_or_qemu(image, path)
    if reason == "missing":
        return Advice("", _missing(image, path, word))
    if reason == "broken":
        return Advice("", (NextCommand(_argv("check", path)), *_broken(image, path, word)))
    return Advice()


def _repair_or_qemu(image: Image, path: str) -> Advice:
    repairing = _repair(path, is_whole=True)
    if repairing:
        return Advice("", (repairing,))
    if any(found.severity == "refused" for found in image.problems):
        return Advice()  # QEMU's own tools refuse the image, too
    return _by_qemu(image, path, "the disk or its refcounts have faults")


def _disabled(image: Image, path: str, word: str) -> tuple[NextCommand, ...]:
    def operate(edit: Edit) -> None:
        found = find(image, word).name
        edit.set(found, 0, image.virtual_size)
        edit.enable(found)

    if not _is_possible(path, _try(image, operate)):
        return ()
    return (
        NextCommand(_argv("set", path, word, ALL_OF_THE_DISK), _IS_FULL),
        NextCommand(_argv("enable", path, word)),
    )


def _missing(image: Image, path: str, word: str) -> tuple[NextCommand, ...]:
    def operate(edit: Edit) -> None:
        added = new_name(word)
        edit.add(added)
        edit.set(added, 0, image.virtual_size)

    if not _is_possible(path, _try(image, operate)):
        return ()
    return (
        NextCommand(_argv("add", path, word)),
        NextCommand(_argv("set", path, word, ALL_OF_THE_DISK), _IS_FULL),
    )


def _found(image: Image, word: str) -> Bitmap | None:
    """Returns the bitmap that a word means; None if there is none, or there are several."""
    try:
        return find(image, word)
    except BitmapNotFoundError:
        return None


def _is_only_too_long_or_short(image: Image, bitmap: Bitmap) -> bool:
    """Whether no fault of a bitmap is another than that its table does not fit the disk."""
    return all(
        found.kind.is_fittable
        for found in _checked(image)
        if found.bitmap_index == bitmap.index and found.is_fault
    )


def _finish_rescue(image: Image, path: str) -> NextCommand | None:
    """Returns the command that puts the copies of an interrupted rescue in their places."""
    from qcow2bm import rescue  # which takes time to load

    def operate(edit: Edit) -> None:
        rescue.rename_copies(image, edit)

    if not _is_possible(path, _try(image, operate)):
        return None
    return NextCommand(["qcow2bm", "rescue", "finish", path])


def _broken(image: Image, path: str, word: str) -> tuple[NextCommand, ...]:
    bitmap = _found(image, word)
    if bitmap and _is_only_too_long_or_short(image, bitmap):
        name = bitmap.name
        if _is_possible(path, _try(image, lambda edit: edit.fit(name))):
            return (NextCommand(_argv("fit", path, word)),)
    repairing = _repair(path, is_whole=True)
    return (repairing,) if repairing else ()


# Dry runs and words


def _try(image: Image, operate: Callable[[Edit], None]) -> Plan | None:
    """Returns what an edit would write; None if it would fail.

    Raises:
        ImageLockedError: another process writes to the image by now.
        _NoRoomError: the image is as large as its device, and has no room.
    """
    try:
        with image.edit(dry_run=True) as edit:
            operate(edit)
            return edit.plan()
    except ImageLockedError:
        raise
    except NoRoomError as error:
        raise _NoRoomError(error.missing) from error
    except (Qcow2BmError, ValueError):
        return None


def _is_possible(path: str, plan: Plan | None, beside: int = 0) -> bool:
    """Whether there is a plan, and it changes something.

    Args:
        path: the image.
        plan: what would be written; None if that would fail.
        beside: how many bytes are written to another file in the same folder.

    Raises:
        _NoRoomError: the file system has no room for what is written.
    """
    if plan is None or not plan.steps:
        return False
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode):  # the plan itself has the limit of a device
        is_sparse = status.st_blocks * 512 < status.st_size
        start = 0 if is_sparse else status.st_size
        needed = beside + sum(
            max(0, write.offset + write.length - max(write.offset, start)) for write in plan.writes
        )
        system = os.statvfs(path)
        missing = needed - system.f_bavail * system.f_frsize
        if missing > 0:
            raise _NoRoomError(missing)
    return True


def _argv(command: str, *words: str, options: Sequence[str] = ()) -> Argv:
    """Returns a command; ``--`` stands before words that look like options."""
    if any(word.startswith("-") for word in words):
        return ["qcow2bm", command, *options, "--", *words]
    return ["qcow2bm", command, *words, *options]


def spelled(path: str) -> str:
    """Returns a path as no program takes it for an option or for a protocol."""
    is_odd = path.startswith("-") or ":" in path.partition("/")[0]
    return f"./{path}" if is_odd else path


def _printable(path: str, advice: Advice) -> Advice:
    """Returns the advice; without commands if a word of them would not be the same in a shell."""
    if not advice.commands:
        return advice
    words = [word for command in advice.commands for word in command.argv]
    if all(map(_is_printable, words)) and not path.startswith(_PASSED_ON):
        return advice
    why = advice.why or "commands would help"
    return Advice(f"{why}, but the path or a name cannot be given to a command: use another path")


def _is_printable(word: str) -> bool:
    try:
        word.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return word.isprintable()
