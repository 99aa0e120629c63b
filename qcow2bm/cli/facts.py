"""Facts as people read them, a label and a value on each line, and names as JSON has them."""

from __future__ import annotations

from collections.abc import Iterator

from qcow2bm.units import format_size


def print_facts(facts: Iterator[tuple[str, str]], indent: str) -> None:
    """Prints labels and values, all values in one column."""
    for label, value in facts:
        print(f"{indent}{label + ':':<{18 - len(indent)}}{value}")


def size(size_bytes: int) -> str:
    """A size, and from 1 KiB on the bytes as well."""
    spelled = format_size(size_bytes)
    return spelled if size_bytes < 1024 else f"{spelled} ({size_bytes} bytes)"


def count(number: int, thing: str, things: str | None = None) -> str:
    """So many things, in the singular or the plural."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def json_text(text: str) -> str:
    """A name as JSON can hold it: U+FFFD for what is not Unicode."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
