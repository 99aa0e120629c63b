"""The images of the command ``demo``.

*Spec*: spec/cli.md, "Demo".
"""

from __future__ import annotations

import os
from pathlib import Path

from qcow2bm import StorageError, build_empty_image


def make_empty(path: Path, virtual_size: int) -> None:
    """Makes the image of an empty disk of so many bytes.

    Raises:
        StorageError: writing failed.
    """
    empty = build_empty_image(virtual_size)
    try:
        path.write_bytes(empty.head)
        os.truncate(path, empty.length)
    except OSError as error:
        raise StorageError.from_os(error, str(path), 0, 0, "writing") from error
