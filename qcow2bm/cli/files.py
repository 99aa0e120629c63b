"""Files that commands read beside images: streams and sidecars.

*Spec*: spec/cli.md, "Streams".
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2bm.errors import StorageError

STANDARD = "-"

_PIECE_BYTES = 1 << 17


def name_of(path: str) -> str:
    """What messages call it."""
    return "standard input" if path == STANDARD else path


@contextmanager
def named(arguments: argparse.Namespace, path: str) -> Iterator[None]:
    """Meanwhile messages are about that file instead of the image."""
    image, arguments.image = arguments.image, name_of(path)
    yield
    arguments.image = image  # unless there was an error, which is to be told


def drain(path: str, pieces: Iterator[bytes]) -> None:
    """Reads the rest of a pipe, so that whoever writes into it does not fail."""
    if not os.path.isfile(path):
        for _ in pieces:
            pass


def pieces(path: str) -> Iterator[bytes]:
    """The content of a file, a pipe or standard input, as it comes.

    Raises:
        StorageError: reading fails.
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
