"""From what a user writes as NAME to a bitmap.

*Spec*: spec/cli.md, "Names".
"""

from __future__ import annotations

import os

from qcow2bm.api import Bitmap, Image
from qcow2bm.errors import BitmapNotFoundError
from qcow2bm.units import decode_name, escape


def find(image: Image, name: str) -> Bitmap:
    """The bitmap that NAME on the command line means.

    Raises:
        BitmapNotFoundError: there is none, or the name is that of several entries.
    """
    if name.startswith("@") and not name.startswith("@@"):
        return _by_index(image, name)
    return image.bitmaps[_plain(name)]


def new_name(name: str) -> str:
    """The name that NEW on the command line means.

    Raises:
        ValueError: it would mean a directory entry by its number.
    """
    if name.startswith("@") and not name.startswith("@@"):
        raise ValueError(f'a name that begins with @ is written @@: "@{escape(name)}"')
    return _plain(name)


def _plain(name: str) -> str:
    # Arguments come decoded by the locale; names in images are UTF-8 where they are text.
    raw = os.fsencode(name.removeprefix("@") if name.startswith("@@") else name)
    return decode_name(raw)


def _by_index(image: Image, name: str) -> Bitmap:
    count = len(image.directory)
    if name[1:].isdecimal() and name.isascii() and len(name) < 8 and int(name[1:]) < count:
        return image.bitmap(int(name[1:]))
    known = f"@0 to @{count - 1}" if count else "none"
    raise BitmapNotFoundError(
        name, f"not found; directory entries: {known} (a name that begins with @ is written @@)"
    )
