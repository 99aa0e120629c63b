"""Manual pages: their content, and that troff takes them without a warning."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from support.console import ROOT

from qcow2bm.cli.commands import all_parsers
from qcow2bm.cli.completion import scripts
from qcow2bm.cli.man_pages import man_pages

PAGES = dict(man_pages())
SECTIONS = ["NAME", "SYNOPSIS", "ARGUMENTS", "COMMANDS", "OPTIONS", "EXAMPLES", "NOTES",
            "EXIT STATUS", "SEE ALSO"]  # fmt: skip


def plain(page: str) -> str:
    """The text of a page, without what is said to troff."""
    text = re.sub(r"\\f[BIR]", "", page).replace("\\-", "-").replace("\\(aq", "'")
    return text.replace("\\(ti", "~").replace("\\(ga", "`").replace("\\e", "\\")


@pytest.mark.spec("CLI-48")
def test_there_is_a_page_for_every_command() -> None:
    names = {"-".join(("qcow2bm", *parser.path)) + ".1" for parser in all_parsers()}
    assert set(PAGES) == names
    assert "qcow2bm.1" in names
    assert "qcow2bm-stream-dump.1" in names


@pytest.mark.spec("CLI-48")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_the_help_says(name: str) -> None:
    text = plain(PAGES[name])
    words = tuple(name.removesuffix(".1").split("-"))
    parser = next(p for p in all_parsers() if "-".join(("qcow2bm", *p.path)) == "-".join(words))
    sections = re.findall(r"^\.SH (.*)$", text, re.MULTILINE)
    assert sections == [section for section in SECTIONS if section in sections]
    assert {"NAME", "SYNOPSIS", "OPTIONS", "SEE ALSO"} <= set(sections)
    for option in parser.options:
        assert all(each in text for each in option.option_strings)
        assert parser.help_of(option) in text
    for word in parser.words:
        assert word.metavar in text
    assert all(example in text for example in parser.examples)
    assert "exit status:" not in text
    related = re.findall(r"(qcow2bm[a-z0-9-]*)\(1\)", text)
    assert all(f"{title}.1" in PAGES and f"{title}.1" != name for title in related)


@pytest.mark.qemu
@pytest.mark.spec("CLI-48")
@pytest.mark.parametrize("name", PAGES)
def test_troff_takes_a_page_without_a_warning(name: str, tmp_path: Path) -> None:
    program = shutil.which("groff")
    if not program:
        pytest.skip("needs groff")
    (tmp_path / name).write_text(PAGES[name])
    done = subprocess.run(
        [program, "-man", "-ww", "-Tutf8", name],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "User Commands" in done.stdout


@pytest.mark.deep
@pytest.mark.spec("CLI-48")
def test_the_wheel_has_pages_and_scripts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*_cache", ".git", ".v*", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    # This builds the wheel from the sdist, so the sdist has all that is needed, too.
    subprocess.run([sys.executable, "-m", "build", "-o", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        data = {
            name.partition(".data/data/")[2]: archive.read(name).decode()
            for name in archive.namelist()
            if ".data/data/" in name
        }
    assert data == {f"share/man/man1/{name}": text for name, text in PAGES.items()} | dict(
        scripts()
    )
