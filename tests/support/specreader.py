"""Reads the pages of spec/: their tables, fenced blocks, requirements, headings and links.

spec/README.md says which of them are executed. Nothing here knows what they mean.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"

_HEADING = re.compile(r"#+ (.+)")
_REQUIREMENT = re.compile(r"\*\*([A-Z]+-\d+|INV-[A-Z]+)\*\*")
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_HEX_LINE = re.compile(r"([0-9a-f]+)  ((?:[0-9a-f]{2}(?:\*\d+)? ?)+)\s*(?:;.*)?")


class Table(NamedTuple):
    """A table: each row is its cells by column, without the marks of code."""

    page: str
    heading: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]

    def column(self, name: str) -> list[str]:
        """All cells of a column, from top to bottom."""
        return [row[name] for row in self.rows]


class Block(NamedTuple):
    """A fenced block; ``info`` is what stands after the fence's opening marks."""

    page: str
    heading: str
    info: str
    text: str


class Page(NamedTuple):
    """One Markdown file of spec/."""

    name: str
    headings: tuple[str, ...]
    tables: tuple[Table, ...]
    blocks: tuple[Block, ...]
    requirements: tuple[str, ...]
    links: tuple[str, ...]

    def table(self, heading: str) -> Table:
        """The one table under a heading."""
        (found,) = (table for table in self.tables if table.heading == heading)
        return found

    def anchors(self) -> set[str]:
        """The anchors that may follow the # in a link to this page."""
        return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in self.headings}


def pages() -> tuple[Page, ...]:
    """All pages of spec/, by name."""
    return tuple(page(path.name) for path in sorted(SPEC.glob("*.md")))


@cache
def page(name: str) -> Page:
    """The page in spec/ of that file name."""
    headings: list[str] = []
    tables: list[Table] = []
    blocks: list[Block] = []
    prose: list[str] = []
    lines = iter((SPEC / name).read_text("utf-8").splitlines())
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            rows.append(_cells(line))
            prose.append(line)
            continue
        if rows:
            tables.append(_table(name, headings[-1], rows))
            rows = []
        if line.startswith("```"):
            text = "".join(f"{inner}\n" for inner in iter(lambda: next(lines), "```"))
            blocks.append(Block(name, headings[-1], line.removeprefix("```"), text))
        elif found := _HEADING.fullmatch(line):
            headings.append(found[1].replace("`", ""))
        else:
            prose.append(line)
    if rows:
        tables.append(_table(name, headings[-1], rows))
    text = "\n".join(prose)
    return Page(
        name,
        tuple(headings),
        tuple(tables),
        tuple(blocks),
        tuple(_REQUIREMENT.findall(text)),
        tuple(_LINK.findall(text)),
    )


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [cell.strip().replace("\\|", "|") for cell in cells]


def _table(name: str, heading: str, rows: list[list[str]]) -> Table:
    columns, _, *body = rows
    cells = ([cell.replace("`", "") for cell in row] for row in body)
    return Table(
        name,
        heading,
        tuple(columns),
        tuple(dict(zip(columns, row, strict=True)) for row in cells),
    )


@cache
def marks() -> tuple[tuple[Path, str], ...]:
    """The file and the id of each ``pytest.mark.spec`` in the tests."""
    return tuple(_marks())


def _marks() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.spec":
                for argument in node.args:
                    assert isinstance(argument, ast.Constant), f"{path}: not a literal id"
                    yield path, str(argument.value)


def vector(name: str, info: str) -> bytes:
    """The bytes of the one hex block in a page that has this info."""
    (found,) = (block for block in page(name).blocks if block.info == info)
    return unhex(found.text)


def unhex(text: str) -> bytes:
    """The bytes of a hexdump.

    A line is an offset, two spaces, bytes, and an optional remark after a semicolon; ``00*8``
    stands for eight bytes of one value. Where an offset skips ahead, zeros lie between.
    """
    data = bytearray()
    for line in text.splitlines():
        found = _HEX_LINE.fullmatch(line)
        if not found or int(found[1], 16) < len(data):
            raise ValueError(f"not a line of a hexdump, or out of order: {line!r}")
        data.extend(bytes(int(found[1], 16) - len(data)))
        for token in found[2].split():
            byte, _, times = token.partition("*")
            data.extend(bytes.fromhex(byte) * int(times or 1))
    return bytes(data)
