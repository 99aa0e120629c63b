"""Files that commands read beside images: streams, sidecars and undo files.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from qcow2bm import StorageError

STANDARD = "-"

_PIECE_BYTES = 1 << 17


def name_of(path: str) -> str:
    """The name of the file in messages."""
    return "standard input" if path == STANDARD else path


def read_pieces(path: str) -> Iterator[bytes]:
    """The content of a file, a pipe or standard input, as it arrives.

    Raises:
        StorageError: reading failed.
    """
    is_standard, name = path == STANDARD, name_of(path)
    if is_standard and sys.stdin is None:
        raise StorageError(name, 0, 0, "is closed")
    try:
        what = sys.stdin.fileno() if is_standard else path
        with open(what, "rb", buffering=0, closefd=not is_standard) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except OSError as error:
        raise StorageError.from_os(error, name, 0, 0) from error


def drain(path: str, pieces: Iterator[bytes]) -> None:
    """Reads a pipe to its end, so that the program that writes into the pipe does not fail."""
    if not os.path.isfile(path):
        for _ in pieces:
            pass
