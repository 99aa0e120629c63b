"""The command ``salvage``: a bitmap that is in_use or stale is made valid again.

*Spec*: spec/repair.md, "Salvage".
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from qcow2bm.api import Image
from qcow2bm.bitmaps.status import INCONSISTENT
from qcow2bm.cli import addressing
from qcow2bm.cli.console import fail, say
from qcow2bm.cli.edit import open_to_edit, plan_as_json, print_plan
from qcow2bm.cli.facts import json_text, size
from qcow2bm.cli.progress import progress
from qcow2bm.clusters.plan import Plan
from qcow2bm.errors import ImageLockedError
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.compare.content import Content, Identity
    from qcow2bm.compare.qemu_nbd import ServedContent
    from qcow2bm.storage.interface import Storage

SCHEMA = 1

_CONTAINERS = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "VMDK",
    b"# Disk DescriptorFile": "VMDK",
    b"vhdxfile": "VHDX",
    b"conectix": "VHD",
    b"<<< ": "VDI",
    b"QED\0": "QED",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"WithoutFreeSpace": "Parallels",
    b"WithouFreSpacExt": "Parallels",
}


_SAME = "is not the last backup, but the disk that is compared with it, or on top of it"


class _InputError(Exception):
    """What is wrong with one of the two that are to be compared: (name, what)."""


def run(arguments: argparse.Namespace) -> int:
    """Salvages a bitmap; returns the exit status."""
    if not arguments.compare and (
        arguments.old_format or arguments.new_format or arguments.is_current
    ):
        arguments.parser.error("--old-format, --new-format and --assert-current are of --compare")
    try:
        with open_to_edit(arguments) as image:
            name = addressing.find(image, arguments.name).name
            plan = _salvage(arguments, image, name)
            if arguments.output == "json":
                print(json.dumps(_document(arguments, image, name, plan), indent=1))
            elif arguments.dry_run:
                print_plan(arguments, plan)
            else:
                _print(image, name)
    except _InputError as error:
        return fail(*error.args)
    except ImageLockedError as error:  # of reading, in a dry run or of what is compared
        raise ImageLockedError(error.path, error.held, "writing") from error
    return 0


def _salvage(arguments: argparse.Namespace, image: Image, name: str) -> Plan:
    label = f'"{escape(name)}"'
    if arguments.trust_stale:
        say(
            f"warning: writes since {label} was stored last are missing from it, and so from all "
            "backups that go by it"
        )
    _require_salvageable(image, name)
    differing = _differing(arguments, image, name) if arguments.compare else None
    with image.edit(dry_run=arguments.dry_run) as edit:
        edit.salvage(name, differing, trust_stored=arguments.trust_stale)
        return edit.plan() if arguments.dry_run else Plan()


def _require_salvageable(image: Image, name: str) -> None:
    """Finds out before two disks are compared whether there will be a use for it."""
    with image.edit(dry_run=True) as edit:
        edit.salvage(name)


def _differing(arguments: argparse.Namespace, image: Image, name: str) -> NDArray[np.uint8]:
    from qcow2bm.compare.differences import find_differences

    old, new = arguments.compare
    say(
        f"note: {escape(old)} must be exactly what the last backup restores to, with all "
        f"increments: whatever is the same in {escape(new)} will not be saved by the next one"
    )
    ours, before, now = map(_identity, (arguments.image, old, new))
    with ExitStack() as opened:
        has_data_file = image.has_data_file
        disk = _disk(opened, arguments, image) if now == ours or has_data_file else None
        files = disk.identities if disk and has_data_file else set()  # a data file among them
        if (
            now != ours
            and not arguments.is_current
            and not (
                image.has_raw_data_file and now in files  # which has no backing file, so it is that
            )
        ):
            raise _InputError(
                new,
                "is neither the image nor its data file: if you know that it is what the disk "
                "holds now, --assert-current",
            )
        if before in (mine := {ours, now, *files}):
            raise _InputError(old, _SAME)
        content = _content(opened, arguments, old, arguments.old_format, "--old-format")
        if not mine.isdisjoint(getattr(content, "identities", ())):  # an overlay on it, say
            raise _InputError(old, _SAME)
        current: Content | None = disk if now == ours else None
        if current is None:
            current = _content(opened, arguments, new, arguments.new_format, "--new-format")
        if current.size != image.virtual_size:
            reason = f"has {current.size} bytes, but the disk has {image.virtual_size}"
            raise _InputError(new, reason)
        if content.size != current.size:
            say(
                f"warning: {escape(old)} has {content.size} bytes, the disk {current.size}: was it "
                "resized since?"
            )
        show = opened.enter_context(progress(min(content.size, current.size)))
        return find_differences(content, current, image.bitmaps[name].granularity, progress=show)


def _identity(path: str) -> Identity:
    from qcow2bm.compare.content import identity

    try:
        return identity(os.stat(path))
    except (OSError, ValueError) as error:
        raise _InputError(path, getattr(error, "strerror", None) or str(error)) from error


def _disk(opened: ExitStack, arguments: argparse.Namespace, image: Image) -> ServedContent:
    """What the image holds, with all that belongs to it."""
    from qcow2bm.compare.differences import WORKERS
    from qcow2bm.compare.qemu_nbd import served

    is_locked, locking = not arguments.dry_run, not arguments.no_lock
    return opened.enter_context(
        served(image.name, WORKERS, is_locked=is_locked, locking=locking, wait=arguments.wait)
    )


def _content(
    opened: ExitStack, arguments: argparse.Namespace, path: str, kind: str | None, option: str
) -> Content:
    """What a file or block device holds, which nobody writes to until all is closed."""
    from qcow2bm.compare.content import RawContent
    from qcow2bm.compare.differences import WORKERS
    from qcow2bm.compare.qemu_nbd import served
    from qcow2bm.storage.file import FileStorage

    locking, wait = not arguments.no_lock, arguments.wait
    storage = FileStorage(path, locking=locking, lock_timeout=wait)
    opened.callback(storage.close)
    opened.enter_context(storage.read_lock())
    if kind is None:
        _require_raw(storage, path, option)
    if kind == "qcow2":
        return opened.enter_context(served(path, WORKERS, locking=locking, wait=wait))
    return RawContent(storage)


def _require_raw(storage: Storage, path: str, option: str) -> None:
    """Nobody wants the bytes of a container compared with those of a disk."""
    head = bytearray(max(map(len, _CONTAINERS)))
    storage.read_into(0, memoryview(head))
    for magic, name in _CONTAINERS.items():
        if not head.startswith(magic):
            continue
        if name == "qcow2":
            cure = f"say {option} qcow2 if it is one"
        else:
            cure = "make it raw or qcow2 if it is one"
        reason = (
            f"begins like a file of {name}: {cure}; if it is a disk on which a guest wrote that,"
        )
        raise _InputError(path, f"{reason} {option} raw")


def _print(image: Image, name: str) -> None:
    dirty = size(image.bitmaps[name].count())
    print(f'"{escape(name)}" is valid: {dirty} of {size(image.virtual_size)} dirty')
    for other in _inconsistent(image):
        print(f'"{escape(other)}" is inconsistent: salvage it, too, or remove it')


def _inconsistent(image: Image) -> Iterator[str]:
    return (name for name, bitmap in image.bitmaps.items() if bitmap.status == INCONSISTENT)


def _document(
    arguments: argparse.Namespace, image: Image, name: str, plan: Plan
) -> dict[str, object]:
    is_done = not arguments.dry_run
    return {
        "schema": SCHEMA,
        "filename": json_text(arguments.image),
        "dry-run": arguments.dry_run,
        "name": json_text(name),
        "dirty-bytes": image.bitmaps[name].count() if is_done else None,
        "inconsistent": [json_text(other) for other in _inconsistent(image)] if is_done else None,
        "plan": None if is_done else plan_as_json(plan),
    }
