"""The ranges that ``set`` and ``reset`` read from standard input, as ``map`` prints them.

The input is read to its end before the image is opened. Nothing holds the image's locks meanwhile,
so ``map`` can read the same image at the other end of the pipe. What was read waits in a temporary
file if it is long.

*Spec*: spec/algebra.md, "Ranges from standard input".
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING

from qcow2bm import StorageError
from qcow2bm.cli.arguments import byte_range
from qcow2bm.cli.files import STANDARD, name_of, read_pieces
from qcow2bm.cli.messages import about
from qcow2bm.units import decode_name, escape

if TYPE_CHECKING:
    from tempfile import SpooledTemporaryFile

    import numpy as np
    from numpy.typing import NDArray

    Ranges = NDArray[np.int64] | list[tuple[int, int]]

Range = tuple[int, int | None]
"""Start and length; the length is None up to the end of the disk."""

_NUMBER = rb"([0-8]?\d{1,18})"  # fits into int64
_TEXT = re.compile(
    rb"^[ \t]*%b[ \t]+%b[ \t]+(0[ \t]+clean|1[ \t]+dirty)(?:[ \t]+(?:%b))?[ \t]*\r?\n"
    % (_NUMBER, _NUMBER, b"unallocated|data|zero|compressed"),
    re.MULTILINE,
)
_JSON = re.compile(
    rb'^[ \t]*\{ *"offset": *%b, *"length": *%b, *"type": *'
    rb'(0, *"description": *"clean"|1, *"description": *"dirty")'
    rb'(?:, *"[a-z]+": *(?:true|false))* *\},?[ \t]*\r?\n' % (_NUMBER, _NUMBER),
    re.MULTILINE,
)
_END_OF_JSON = re.compile(rb"^[ \t]*\][ \t]*\r?\n", re.MULTILINE)
_EXPECTED = {
    _TEXT: "write OFFSET LENGTH 1 dirty, as map prints it",
    _JSON: "write one range on a line, as map --json prints it",
}

_LONGEST_LINE = 4096  # bytes
_LONGEST_IN_MEMORY = 64 << 20  # bytes of ranges; more go to a temporary file
_ROW = 24  # bytes: line number, start, length
_ROWS_AT_ONCE = 1 << 17


class RangeInput:
    """The dirty ranges on standard input; a context manager that reads all of them at its start.

    Raises:
        ValueError: a line is not one that ``map`` prints, or the end is missing.
        StorageError: reading failed, or the temporary file cannot be written.
    """

    def __enter__(self) -> RangeInput:
        from tempfile import SpooledTemporaryFile  # which other edits need not load

        self._spool: SpooledTemporaryFile[bytes] = SpooledTemporaryFile(_LONGEST_IN_MEMORY)
        self._lines = 0  # that were read
        try:
            self._read()
        except BaseException:
            self._spool.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._spool.close()

    def ranges(self, disk_size: int) -> Iterator[NDArray[np.int64]]:
        """Yields the ranges in order: int64[n, 2] of (start, length) in guest bytes.

        Raises:
            ValueError: a range reaches beyond the disk.
            StorageError: the temporary file cannot be read.
        """
        import numpy as np

        with _about_temporary_file("reading"):
            self._spool.seek(0)
        while data := self._kept():
            rows = np.frombuffer(data, np.int64).reshape(-1, 3)
            starts, lengths = rows[:, 1], rows[:, 2]
            is_outside = (starts > disk_size) | (lengths > disk_size - starts)
            if is_outside.any():
                line, start, length = rows[is_outside][0].tolist()
                raise ValueError(
                    f"line {line} of {name_of(STANDARD)}: range {start}:{length} does not lie on "
                    f"the disk, which has {disk_size} bytes"
                )
            yield rows[:, 1:]

    def _kept(self) -> bytes:
        """Returns the next rows that were kept."""
        with _about_temporary_file("reading"):
            return self._spool.read(_ROW * _ROWS_AT_ONCE)

    def _read(self) -> None:
        blocks = self._blocks()
        first = next(blocks, b"")
        if first.startswith(b"["):
            self._read_json(first, blocks)
        else:
            for block in chain((first,), blocks):
                self._take(block, _TEXT)

    def _read_json(self, first: bytes, blocks: Iterator[bytes]) -> None:
        opening, _, first = first.partition(b"\n")
        if opening.strip() != b"[":
            raise self._error(f"this is no list of ranges: {_EXPECTED[_JSON]}")
        self._lines += 1
        for block in chain((first,), blocks):
            end = _END_OF_JSON.search(block) if b"]" in block else None
            self._take(block[: end.start()] if end else block, _JSON)
            if end:
                self._lines += 1
                if block[end.end() :].strip() or any(rest.strip() for rest in blocks):
                    raise self._error("text follows the end of the list")
                return
        raise self._error("the list does not end: the program that wrote it has failed")

    def _blocks(self) -> Iterator[bytes]:
        """Yields whole lines; the last one gets its end if that is missing."""
        rest = b""
        for piece in read_pieces(STANDARD):
            whole, end, rest = (rest + piece).rpartition(b"\n")
            if len(rest) > _LONGEST_LINE:
                self._lines += whole.count(b"\n") + len(end)
                raise self._error(f"has more than {_LONGEST_LINE} bytes")
            if end:
                yield whole + end
        if rest:
            yield rest + b"\n"

    def _take(self, block: bytes, row: re.Pattern[bytes]) -> None:
        """Keeps the dirty ranges of a block of lines."""
        rows = row.findall(block)
        if len(rows) != block.count(b"\n"):
            raise self._wrong_line(block, row)
        numbers = array("q")
        for line, (start, length, kind) in enumerate(rows, self._lines + 1):
            if kind[0] == ord("1"):
                numbers.extend((line, int(start), int(length)))
        with _about_temporary_file("writing"):
            self._spool.write(numbers)
        self._lines += len(rows)

    def _wrong_line(self, block: bytes, row: re.Pattern[bytes]) -> ValueError:
        lines = block.splitlines(keepends=True)
        wrong = next(line for line in lines if not row.fullmatch(line))
        self._lines += lines.index(wrong)
        shown = escape(decode_name(wrong.strip()[:40]))
        return self._error(f'"{shown}" is no range: {_EXPECTED[row]}')

    def _error(self, reason: str) -> ValueError:
        """The error for the line that follows those that were read."""
        return ValueError(f"line {self._lines + 1}: {reason}")


@contextmanager
def _about_temporary_file(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.from_os(error, "temporary file", 0, 0, action) from error


def range_or_input(text: str) -> Range | RangeInput:
    """The value of an argument that is a range, or - for standard input."""
    return RangeInput() if text == STANDARD else byte_range(text)


@contextmanager
def inputs_read(given: Iterable[Range | RangeInput]) -> Iterator[None]:
    """Keeps what is on standard input while the block runs, if that is among what is given.

    Raises:
        CommandError: a line is wrong.
    """
    with ExitStack() as stack:
        for value in given:
            if isinstance(value, RangeInput):
                with about(name_of(STANDARD), ValueError):
                    stack.enter_context(value)
        yield


def ranges_of(given: Sequence[Range | RangeInput], disk_size: int) -> Iterator[Ranges]:
    """Yields all ranges that are given; those without a length reach to the end of the disk.

    Raises:
        ValueError: a range on standard input reaches beyond the disk.
    """
    yield [
        (value[0], max(0, disk_size - value[0]) if value[1] is None else value[1])
        for value in given
        if not isinstance(value, RangeInput)
    ]
    for value in given:
        if isinstance(value, RangeInput):
            yield from value.ranges(disk_size)
