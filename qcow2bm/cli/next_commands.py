"""The commands that make a bitmap usable for the next incremental backup.

A command is only named if a dry run of it succeeds.

*Spec*: spec/cli.md, "Verdict".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from qcow2bm import BackupReason, Edit, Image, ImageLockedError, Qcow2BmError, plan_repair
from qcow2bm.cli.images import find, new_name, words_of

Argv = list[str]
"""A command as a list of words."""

ALL_OF_THE_DISK = "0:"


def find_next(image: Image, path: str, name: str, reason: BackupReason) -> list[Argv]:
    """Returns commands to be run in this order, after a verdict on the bitmap that NAME means.

    They make everything in the bitmap dirty, so that the next incremental backup saves the whole
    disk. But `fit` keeps what is known to be clean, and `repair` may drop the bitmap.

    Raises:
        ImageLockedError: another process writes to the image by now.
    """
    word = words_of(image, name)
    commands: list[Argv] = []
    if reason == "disabled":
        commands = _disabled(image, path, word)
    elif reason in ("inconsistent", "stale"):
        if _succeeds(image, lambda edit: edit.salvage(find(image, word).name)):
            commands = [_argv("salvage", path, word, options=["--all-dirty"])]
    elif reason == "missing":
        commands = _missing(image, path, word)
    elif reason == "broken":
        commands = [_argv("check", path), *_broken(image, path, word)]
    # Only such words are the same in JSON, on a terminal and in a shell.
    is_printable = all(text.isprintable() for argv in commands for text in argv)
    return commands if is_printable else []


def _disabled(image: Image, path: str, word: str) -> list[Argv]:
    def operate(edit: Edit) -> None:
        found = find(image, word).name
        edit.set(found, 0, image.virtual_size)
        edit.enable(found)

    if not _succeeds(image, operate):
        return []
    return [_argv("set", path, word, ALL_OF_THE_DISK), _argv("enable", path, word)]


def _missing(image: Image, path: str, word: str) -> list[Argv]:
    def operate(edit: Edit) -> None:
        added = new_name(word)
        edit.add(added)
        edit.set(added, 0, image.virtual_size)

    if not _succeeds(image, operate):
        return []
    return [_argv("add", path, word), _argv("set", path, word, ALL_OF_THE_DISK)]


def _broken(image: Image, path: str, word: str) -> list[Argv]:
    if _succeeds(image, lambda edit: edit.fit(find(image, word).name)):
        return [_argv("fit", path, word)]
    undo = f"{path}.undo"
    if not os.path.isfile(path) or os.path.lexists(undo):
        return []  # there is no good place for the undo file
    try:
        planned = plan_repair(path)
    except ImageLockedError:
        raise
    except Qcow2BmError:
        return []
    if planned.left or not planned.plan.steps:
        return []
    return [_argv("repair", path, options=["--undo", undo])]


def _succeeds(image: Image, operate: Callable[[Edit], None]) -> bool:
    """Whether an edit would succeed.

    Raises:
        ImageLockedError: another process writes to the image by now.
    """
    try:
        with image.edit(dry_run=True) as edit:
            operate(edit)
            return bool(edit.plan().steps)
    except ImageLockedError:
        raise
    except (Qcow2BmError, ValueError):
        return False


def _argv(command: str, *words: str, options: Sequence[str] = ()) -> Argv:
    """Returns a command; ``--`` stands before words that look like options."""
    if any(word.startswith("-") for word in words):
        return ["qcow2bm", command, *options, "--", *words]
    return ["qcow2bm", command, *words, *options]
