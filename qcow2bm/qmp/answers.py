"""Reads the answers of QEMU field by field into values of known types."""

from __future__ import annotations

import re
from typing import NoReturn

from qcow2bm.errors import QmpError
from qcow2bm.units import escape

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape one alone, which is no character


class Answer:
    """The answer of QEMU to a command, or a field of that answer.

    *Guarantees*: each method returns a value of the type that it names, or raises `QmpError` with
    the command and the field. Fields that are not asked for are ignored.
    """

    def __init__(self, command: str, value: object, field: str = "") -> None:
        """``value`` is decoded JSON; ``field`` is the way to it, such as ``[0].image``."""
        self._command = command
        self._value = value
        self._field = field

    def __getitem__(self, key: str) -> Answer:
        """Returns the field of that name, which has to be there."""
        found = self.get(key)
        if found is None:
            raise self._error(f"has no {key}")
        return found

    def get(self, key: str) -> Answer | None:
        """Returns the field of that name; None where QEMU leaves it out."""
        if not isinstance(self._value, dict):
            self._reject("an object")
        if key not in self._value:
            return None
        field = f"{self._field}.{key}" if self._field else key
        return Answer(self._command, self._value[key], field)

    def items(self) -> list[Answer]:
        """Returns the items of an array."""
        if not isinstance(self._value, list):
            self._reject("an array")
        return [
            Answer(self._command, value, f"{self._field}[{number}]")
            for number, value in enumerate(self._value)
        ]

    def items_of(self, key: str) -> list[Answer]:
        """Returns the items of the array of that name; none where QEMU leaves it out."""
        found = self.get(key)
        return found.items() if found else []

    def text(self) -> str:
        """Returns a string, which can be encoded as UTF-8."""
        if not isinstance(self._value, str) or _SURROGATE.search(self._value):
            self._reject("a string")
        return self._value

    def number(self) -> int:
        """Returns an integer, from 0 to the largest that QEMU has, 2^63 - 1."""
        if not isinstance(self._value, int) or isinstance(self._value, bool):
            self._reject("an integer")
        if not 0 <= self._value < 1 << 63:
            self._reject("an integer from 0 to 2^63 - 1")
        return self._value

    def power_of_two(self) -> int:
        """Returns an integer that is a power of two, such as a granularity."""
        number = self.number()
        if number.bit_count() != 1:
            self._reject("a power of two")
        return number

    def flag(self) -> bool:
        """Returns a boolean."""
        if not isinstance(self._value, bool):
            self._reject("a boolean")
        return self._value

    @property
    def raw(self) -> object:
        """The decoded JSON itself, for what is handed back to QEMU as it came."""
        return self._value

    def _reject(self, expected: str) -> NoReturn:
        raise self._error(f"is not {expected}")

    def _error(self, reason: str) -> QmpError:
        subject = f"the field {escape(self._field)} of the answer" if self._field else "the answer"
        return QmpError(self._command, f"{subject} {escape(reason)}")
