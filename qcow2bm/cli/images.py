"""Opening the image that IMAGE means, and finding the bitmap that NAME means.

*Spec*: spec/cli.md, "Names".
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from qcow2bm import BackupVerdict, Bitmap, BitmapError, BitmapNotFoundError, Image, Problem, open
from qcow2bm.cli.arguments import EditingArguments
from qcow2bm.units import decode_name, escape

_CORRUPT = 1
"""The number of the incompatible feature bit "corrupt"."""


def open_to_edit(path: str, arguments: EditingArguments) -> Image:
    """Opens the image that a command edits: for reading if it is a dry run.

    Raises:
        Qcow2BmError: as `qcow2bm.open` does.
    """
    if arguments.dry_run:
        return open(path, lock_timeout=arguments.wait)
    return open(path, "r+", lock_timeout=arguments.wait, locking=not arguments.no_lock)


def find(image: Image, name: str) -> Bitmap:
    """The bitmap that NAME on the command line means.

    Raises:
        BitmapNotFoundError: there is none, or several entries have that name.
    """
    if _is_number(name):
        return _by_number(image, name)
    return image.bitmaps[_plain(name)]


def name_of(image: Image, name: str) -> str:
    """The name of the bitmap that NAME on the command line means, also if there is none so named.

    Raises:
        BitmapNotFoundError: NAME is a number, and there is no such entry.
    """
    return _by_number(image, name).name if _is_number(name) else _plain(name)


def not_in_use(image: Image, names: Iterable[str]) -> list[str]:
    """Returns those of some bitmaps that --all means: those that are not in use."""
    return [name for name in names if not image.bitmaps[name].in_use]


def is_outdated(bitmap: Bitmap) -> bool:
    """Whether writes may be missing from a bitmap, and the bitmap stands for a backup."""
    return bitmap.status in ("inconsistent", "stale") and not bitmap.is_auxiliary


def needs_help(image: Image, problems: Iterable[Problem]) -> bool:
    """Whether a command is to be advised; ``problems`` are those that are known of the image."""
    return (
        any(found.is_serious for found in problems)
        or is_marked_corrupt(image)
        or any(map(is_outdated, map(image.bitmap, range(len(image.directory)))))
    )


def is_marked_corrupt(image: Image) -> bool:
    """Whether the image has the corrupt bit, with which QEMU only reads it."""
    return any(found.bit == _CORRUPT for found in image.features("incompatible"))


def outdated(image: Image) -> list[str]:
    """Returns the names of the bitmaps that `salvage --all` means."""
    return [name for name, bitmap in image.bitmaps.items() if is_outdated(bitmap)]


def judge(image: Image, name: str) -> BackupVerdict:
    """The verdict on the bitmap that NAME on the command line means, also if there is none.

    Raises:
        Qcow2BmError: as `Image.verdict` does.
    """
    if not _is_number(name):
        return image.verdict(_plain(name))
    try:
        bitmap = _by_number(image, name)
    except BitmapNotFoundError as error:
        return BackupVerdict("missing", error.facts)
    return bitmap.verdict()


def words_of(image: Image, name: str) -> str:
    """Returns the word for NAME in another command: a number if the name cannot be printed."""
    if _is_number(name):
        return name
    plain = _plain(name)
    if plain.isprintable():
        return name
    numbers = [entry.index for entry in image.directory if entry.name == plain]
    return f"@{numbers[0]}" if len(numbers) == 1 else name


def word_for(name: str) -> str:
    """Returns the word that means the bitmap of a name."""
    return f"@{name}" if name.startswith("@") else name


def new_name(name: str) -> str:
    """The name that NEW on the command line means.

    Raises:
        ValueError: it would mean the entry of a number.
    """
    if _is_number(name):
        raise ValueError(f'a name that begins with @ is written with @@: "@{escape(name)}"')
    return _plain(name)


def _is_number(name: str) -> bool:
    return name.startswith("@") and not name.startswith("@@")


def _plain(name: str) -> str:
    # Arguments come decoded by the locale; names in images are UTF-8 where they are text.
    raw = os.fsencode(name.removeprefix("@") if name.startswith("@@") else name)
    return decode_name(raw)


def _by_number(image: Image, name: str) -> Bitmap:
    count = len(image.directory)
    # int() accepts digits of other scripts, and refuses more than 4300 of them.
    if name[1:].isdecimal() and name.isascii() and len(name) < 8 and int(name[1:]) < count:
        _require_clear(image, name)
        return image.bitmap(int(name[1:]))
    known = f"@0 to @{count - 1}" if count else "none"
    raise BitmapNotFoundError(
        name,
        f"not found; directory entries: {known} (a name that begins with @ is written with @@)",
    )


def _require_clear(image: Image, name: str) -> None:
    """Raises `BitmapError` if NAME is a number, and is the name of another entry, too.

    `qemu-img` would take NAME as the name, so to guess would change or remove the wrong bitmap.
    """
    names = {entry.name: entry.index for entry in image.directory}
    number = int(name[1:])
    if names.get(name, number) != number:
        spellings = (f"@{number:0{width}}" for width in range(1, 8))
        entry = next(spelling for spelling in spellings if spelling not in names)
        raise BitmapError(
            name,
            f'exists, but "{name}" also means entry {number} of the directory: write "@{name}" for '
            f'the bitmap of that name, or "{entry}" for entry {number}',
        )


def valid_bitmaps(image: Image) -> tuple[list[Bitmap], list[str]]:
    """Returns the bitmaps that are valid, and for each other one a line that it is left out.

    Sentinels that are not valid are not worth a line.
    """
    bitmaps = [image.bitmap(entry.index) for entry in image.directory]
    left_out = [
        f"{_label(bitmap)} is {bitmap.status}, and left out"
        for bitmap in bitmaps
        if bitmap.status != "valid" and not bitmap.is_auxiliary
    ]
    return [bitmap for bitmap in bitmaps if bitmap.status == "valid"], left_out


def _label(bitmap: Bitmap) -> str:
    name = bitmap.entry.name
    return f"bitmap @{bitmap.index}" if name is None else f'bitmap "{escape(name)}"'
