"""From what a user writes as NAME to a bitmap.

*Spec*: spec/cli.md, "Names".
"""

from __future__ import annotations

import os

from qcow2bm.api import Bitmap, Image
from qcow2bm.errors import BitmapNotFoundError


def find(image: Image, name: str) -> Bitmap:
    """The bitmap that NAME on the command line means.

    Raises:
        BitmapNotFoundError: there is none, or the name is that of several entries.
    """
    if name.startswith("@") and not name.startswith("@@"):
        return _by_index(image, name)
    # Arguments come decoded by the locale; names in images are UTF-8 where they are text.
    plain = os.fsencode(name.removeprefix("@") if name.startswith("@@") else name)
    wanted = plain.decode("utf-8", "surrogateescape")
    return image.bitmaps[wanted]


def _by_index(image: Image, name: str) -> Bitmap:
    count = len(image.directory)
    if name[1:].isdecimal() and name.isascii() and len(name) < 8 and int(name[1:]) < count:
        return image.bitmap(int(name[1:]))
    known = f"@0 to @{count - 1}" if count else "none"
    raise BitmapNotFoundError(
        name, f"not found; directory entries: {known} (a name that begins with @ is written @@)"
    )
