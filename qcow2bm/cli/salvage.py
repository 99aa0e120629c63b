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
from qcow2bm.cli import addressing
from qcow2bm.cli.console import fail, say
from qcow2bm.cli.edit import open_to_edit, plan_as_json, print_plan
from qcow2bm.cli.facts import json_text, size
from qcow2bm.cli.progress import progress
from qcow2bm.clusters.plan import Plan
from qcow2bm.store.status import INCONSISTENT
from qcow2bm.units import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.compare.content import Content

SCHEMA = 1

_QCOW2 = b"QFI\xfb"


class _InputError(Exception):
    """What is wrong with one of the two that are to be compared: (name, what)."""


def run(arguments: argparse.Namespace) -> int:
    """Salvages a bitmap; returns the exit status."""
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
    from qcow2bm.compare.differences import differences

    old, new = arguments.compare
    say(
        f"note: {escape(old)} must be exactly what the last backup holds: whatever is the same in "
        f"{escape(new)} will not be saved by the next one"
    )
    for path in (old, new):
        if not os.path.exists(path):
            raise _InputError(path, "there is no such file")
    if os.path.samefile(old, new) or os.path.samefile(old, arguments.image):
        raise _InputError(old, "is not the last backup, but the disk that is compared with it")
    with ExitStack() as opened:
        before = _content(opened, arguments, old, arguments.old_format)
        now = _content(opened, arguments, new, arguments.new_format)
        if now.size != image.virtual_size:
            reason = f"has {now.size} bytes, but the disk has {image.virtual_size}"
            raise _InputError(new, reason)
        show = opened.enter_context(progress(min(before.size, now.size)))
        granularity = image.bitmaps[name].granularity
        return differences(before, now, granularity, progress=show)


def _content(
    opened: ExitStack, arguments: argparse.Namespace, path: str, kind: str | None
) -> Content:
    """What a file or block device holds, which nobody writes to until all is closed."""
    from qcow2bm.compare.content import RawContent
    from qcow2bm.compare.differences import WORKERS
    from qcow2bm.compare.qemu_nbd import served
    from qcow2bm.storage.file import FileStorage

    is_image = os.path.samefile(path, arguments.image)
    storage = FileStorage(path, locking=not arguments.no_lock, lock_timeout=arguments.wait)
    opened.callback(storage.close)
    head = bytearray(len(_QCOW2))
    storage.read_into(0, memoryview(head))
    if is_image:
        kind = "qcow2"
    elif kind is None and head == _QCOW2:
        option = "--old-format" if path == arguments.compare[0] else "--new-format"
        raise _InputError(
            path,
            f"begins like a qcow2 image: say {option} qcow2 if it is one; if it is a disk on "
            f"which a guest wrote that, {option} raw",
        )
    if kind == "qcow2":
        is_locked = is_image and not arguments.dry_run
        return opened.enter_context(served(path, WORKERS, is_locked=is_locked))
    opened.enter_context(storage.read_lock())
    return RawContent(storage)


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
