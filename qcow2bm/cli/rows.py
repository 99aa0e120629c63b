"""Printing millions of pairs of numbers as text, at the speed of numpy.

All rows have the same length: numbers are padded with spaces on the left, which JSON allows
between tokens. So the rows of a block are one array. The constant text is written into the array
once, and only the digits change, four at a time from a table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 8192

_WORD = 4  # bytes, and decimal digits, written at once
_BASE = 10**_WORD


def _digits() -> NDArray[np.uint32]:
    """The text of 0..9999 as four characters: first padded with spaces, then with zeros."""
    numbers = range(_BASE)
    text = "".join(f"{n:4d}" for n in numbers) + "".join(f"{n:04d}" for n in numbers)
    return np.frombuffer(text.encode("ascii"), np.uint32)


class RowPrinter:
    """Rows of two numbers each: ``before`` first ``between`` second ``after``.

    ``afters`` are the texts that end a row, which must be equally long. They are used in turn, or
    each row says which one it has; a printer is for one of these.
    """

    def __init__(
        self, before: bytes, between: bytes, afters: tuple[bytes, ...], limit: int
    ) -> None:
        """``limit`` is the largest number that will occur."""
        self._words = -(-len(str(limit)) // _WORD)
        number = bytes(_WORD * self._words)
        # Rows are whole words long, and so is the way from the first number to the second.
        before += b" " * (-(len(before) + len(afters[0])) % _WORD)
        between += b" " * (-len(between) % _WORD)
        rows = b"".join(before + number + between + number + after for after in afters)
        self._length = len(rows) // len(afters)
        count = BLOCK_ROWS + len(afters) - 1  # the first row may have any of ``afters``
        text = rows * -(-count // len(afters))
        # The text begins so far from a whole word that the numbers begin at whole words.
        shift = -len(before) % _WORD
        self._text = np.zeros(shift + len(text), np.uint8)[shift:]
        self._text[:] = np.frombuffer(text, np.uint8)
        first = len(before)
        second = first + len(number) + len(between)
        self._columns = tuple(
            tuple(self._column(start + _WORD * word) for word in range(self._words))
            for start in (first, second)
        )
        self._ends = np.frombuffer(b"".join(afters), np.uint8).reshape(len(afters), -1)
        place = self._length - self._ends.shape[1]
        self._end_column = np.ndarray(
            (count, self._ends.shape[1]), np.uint8, self._text.data, place, (self._length, 1)
        )
        self._digits = _digits()
        # The last group of a number that is 0 shows "0", higher ones show nothing.
        self._spaced = self._digits.copy()
        self._spaced[0] = np.frombuffer(b"    ", np.uint32)[0]

    def _column(self, offset: int) -> NDArray[np.uint32]:
        """The same four bytes of every row."""
        rows = (len(self._text) - offset - _WORD) // self._length + 1
        return np.ndarray((rows,), np.uint32, self._text.data, offset, (self._length,))

    def print(
        self,
        firsts: NDArray[np.int64],
        seconds: NDArray[np.int64],
        ends: int | NDArray[np.int64] = 0,
    ) -> memoryview:
        """The text of these rows, at most `BLOCK_ROWS`; valid until the next call.

        ``ends`` is the number of the text in ``afters`` that ends the first row, if they are used
        in turn; otherwise the number of that of each row, int64[n].
        """
        phase = ends if isinstance(ends, int) else 0
        if not isinstance(ends, int):
            self._end_column[: len(firsts)] = self._ends[ends]
        stop = phase + len(firsts)
        for columns, numbers in zip(self._columns, (firsts, seconds), strict=True):
            high = numbers
            for word in reversed(range(self._words)):
                if word != self._words - 1 and not high.any():
                    columns[word][phase:stop] = self._spaced[0]
                    continue
                rest, high = high, high // _BASE
                group = rest - high * _BASE
                group += _BASE * (high > 0)
                table = self._digits if word == self._words - 1 else self._spaced
                columns[word][phase:stop] = table[group]
        return self._text.data[phase * self._length : stop * self._length]
