"""Standard output while a command runs, and when it fails.

*Spec*: spec/cli.md, "Exit status".
"""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


class WatchedOutput:
    """Standard output while a command runs; it knows whether the command has printed anything.

    Attributes:
        is_begun: whether anything was printed. Then no document may follow.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout
        self.is_begun = False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text."""
        self.is_begun = True
        return self._stream.write(text)

    @property
    def buffer(self) -> BinaryIO:
        """What takes bytes, which the caller asks for only to write some."""
        self.is_begun = True
        return self._stream.buffer


class OutputFile(io.FileIO):
    """The file of standard output, which drops what it gets once it is told to."""

    def __init__(self) -> None:
        """Opens standard output once more; to close this leaves standard output open."""
        super().__init__(1, "w", closefd=False)
        self._drops = False

    def drop(self) -> None:
        """Lets all later writes succeed and do nothing."""
        self._drops = True

    def write(self, data: Buffer, /) -> int:
        """Writes as a file does; returns how many bytes were written."""
        return memoryview(data).nbytes if self._drops else super().write(data)


def discard_output() -> None:
    """Drops what could not be written; otherwise the interpreter would try again at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
        if isinstance(file, OutputFile):
            file.drop()
        else:
            sys.stdout = io.TextIOWrapper(io.BytesIO())
