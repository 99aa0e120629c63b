"""spec/invariants.md defines each invariant that is cited, and says where it is kept and proved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.specreader import ROOT, SPEC, marks, page

PAGE = SPEC / "invariants.md"
INVARIANTS = [id for id in page(PAGE.name).requirements if id.startswith("INV-")]


def texts() -> Iterator[tuple[Path, str]]:
    """Every text that may cite an invariant, but not the page that defines them."""
    for path in (
        ROOT / "README.md",
        *(ROOT / ".github").rglob("*.md"),
        *SPEC.glob("*.md"),
        *(ROOT / "qcow2bm").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "tests").rglob("*.md"),
    ):
        if path not in (PAGE, Path(__file__)):
            yield path, path.read_text("utf-8")


def sections() -> dict[str, str]:
    """The part of the page that belongs to each invariant."""
    parts = re.split(r"^- \*\*(INV-[A-Z]+)\*\* ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(section: str, label: str) -> set[str]:
    """The paths that follow a label of a section, up to the next full stop."""
    found = re.search(rf"\*{label}:\*(.*?)\.\s*$", section, re.DOTALL | re.MULTILINE)
    assert found, f"no {label}: {section}"
    return set(re.findall(r"`([\w/.]+)`", found[1]))


def test_each_invariant_that_is_cited_is_defined() -> None:
    cited = {
        (str(path.relative_to(ROOT)), id)
        for path, text in texts()
        for id in re.findall(r"\bINV-[A-Z]+\b", text)
    }
    assert {found for found in cited if found[1] not in INVARIANTS} == set()


def test_each_invariant_that_is_defined_is_cited() -> None:
    """In words: the marks of the tests that prove it do not count."""
    prose = "\n".join(re.sub(r"mark\.spec\([^)]*\)", "", text) for _, text in texts())
    assert [id for id in INVARIANTS if not re.search(rf"\b{id}\b", prose)] == []


@pytest.mark.parametrize("id", INVARIANTS)
def test_an_invariant_is_proved_where_the_page_says(id: str) -> None:
    marked = {path.relative_to(ROOT).as_posix() for path, found in marks() if found == id}
    assert marked, "no test proves it"
    assert named(sections()[id], "Proved in") == marked


@pytest.mark.parametrize("id", INVARIANTS)
def test_an_invariant_is_kept_where_the_page_says(id: str) -> None:
    modules = named(sections()[id], "Kept in")
    assert modules
    assert [path for path in modules if not (ROOT / "qcow2bm" / path).exists()] == []


def test_each_invariant_says_what_is_lost_without_it() -> None:
    assert set(sections()) == set(INVARIANTS)
    assert [id for id, text in sections().items() if "*Without it:*" not in text] == []
