"""Files that commands read beside images: streams and sidecars.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from qcow2bm.errors import StorageError

STANDARD = "-"

_PIECE_BYTES = 1 << 17


def source(path: str) -> tuple[str, Iterator[bytes]]:
    """What messages call a file, a pipe or standard input, and its content as it comes.

    The iterator raises StorageError where reading fails.
    """
    name = "standard input" if path == STANDARD else path
    return name, _pieces(path, name)


def _pieces(path: str, name: str) -> Iterator[bytes]:
    is_standard = path == STANDARD
    if is_standard and sys.stdin is None:
        raise StorageError(name, 0, 0, "is closed")
    try:
        what = sys.stdin.fileno() if is_standard else path
        with open(what, "rb", buffering=0, closefd=not is_standard) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except OSError as error:
        raise StorageError.from_os(error, name, 0, 0) from error
