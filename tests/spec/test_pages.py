"""The pages of spec/ hold together: links, citations in the source, requirements with tests."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.specreader import ROOT, SPEC, marks, page, pages, unhex

import qcow2bm

CITATION = re.compile(r'spec/([\w-]+\.md)((?:,\s+"[^"]+"(?:\s+and\s+"[^"]+")*)?)')


def test_links_lead_somewhere() -> None:
    for found in pages():
        for link in found.links:
            name, _, anchor = link.partition("#")
            assert not name or (SPEC / name).is_file(), (found.name, link)
            if anchor:
                assert anchor in page(name or found.name).anchors(), (found.name, link)


def test_every_page_is_in_the_index() -> None:
    index = page("README.md")
    assert {found.name for found in pages()} == {
        "README.md",
        *(link for link in index.links if "#" not in link and "/" not in link),
    }


def test_links_of_the_pages_elsewhere_lead_somewhere() -> None:
    """Links in the README and in the pages for contributors must lead to files and to headings."""
    for path in (ROOT / "README.md", *sorted((ROOT / ".github").rglob("*.md"))):
        for link in re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", path.read_text("utf-8")):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve()
            assert target.exists(), (path.name, link)
            if anchor:
                assert anchor in page(target.name).anchors(), (path.name, link)


def test_modules_that_the_contributors_page_names_are_there() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`(\w+/\w+\.py)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "qcow2bm" / name).is_file()] == []


def test_the_changelog_has_this_version() -> None:
    assert any(h.startswith(f"[{qcow2bm.__version__}] - ") for h in page("changelog.md").headings)


def citations() -> Iterator[tuple[Path, str, list[str]]]:
    """Each mention of a page in the source: where, which page, which of its headings."""
    for path in sorted((ROOT / "qcow2bm").rglob("*.py")):
        for found in CITATION.finditer(path.read_text("utf-8")):
            yield path, found[1], re.findall(r'"([^"]+)"', " ".join(found[2].split()))


def test_citations_in_the_source_lead_somewhere() -> None:
    found = list(citations())
    assert any(headings for _, _, headings in found)
    for path, name, headings in found:
        assert (SPEC / name).is_file(), (path, name)
        for heading in headings:
            assert heading in page(name).headings, (path, name, heading)


def test_each_requirement_is_stated_once() -> None:
    stated = Counter(id for found in pages() for id in found.requirements)
    assert [id for id, times in stated.items() if times > 1] == []


def test_each_requirement_has_a_test_and_each_mark_a_requirement() -> None:
    stated = {id for found in pages() for id in found.requirements}
    marked = {id for _, id in marks()}
    assert stated - marked == set(), "requirements without a test"
    assert marked - stated == set(), "tests of no requirement"


@pytest.mark.parametrize("line", ["0000 00", "0008  0", "zz  00", "0000  00  no semicolon"])
def test_a_hexdump_that_cannot_be_read_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not a line of a hexdump"):
        unhex(line)


def test_a_hexdump_fills_gaps_with_zeros_and_cannot_go_back() -> None:
    assert unhex("0002  ff 01*2  ; remark\n0006  aa\n") == b"\0\0\xff\1\1\0\xaa"
    with pytest.raises(ValueError, match="out of order"):
        unhex("0000  00*4\n0002  00\n")
