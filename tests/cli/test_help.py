"""The help, and what is said about a word or an option that does not exist."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from support.console import run

from qcow2bm.cli.commands import COMMANDS, COMMANDS_BY_GROUP, all_parsers, parse, parsers
from qcow2bm.cli.parser import Parser

PARSERS = list(parsers())
GROUP_PARSERS = [parser for parser in all_parsers() if parser.commands]
EXAMPLES = [(parser.path, example) for parser in PARSERS for example in parser.examples]

each_command = pytest.mark.parametrize("parser", PARSERS, ids=lambda p: " ".join(p.path))
each_group = pytest.mark.parametrize(
    "parser", GROUP_PARSERS, ids=lambda p: " ".join(p.path) or "qcow2bm"
)


@pytest.mark.spec("CLI-31")
@each_group
def test_the_words_of_several_commands_alone_print_the_help(parser: Parser, tmp_path: Path) -> None:
    done = run(parser.path, tmp_path)
    assert (done.status, done.err) == (0, "")
    assert done == run([*parser.path, "--help"], tmp_path)
    for word, command in parser.commands.items():
        assert re.search(rf"^  {word} ", done.out, re.MULTILINE)
        assert command.summary in " ".join(done.out.split())


@pytest.mark.spec("CLI-31")
def test_the_help_groups_the_commands_by_what_one_wants(tmp_path: Path) -> None:
    out = run([], tmp_path).out
    sections = re.split(r"^(\S.*):\n", out, flags=re.MULTILINE)
    shown = {
        title: tuple(re.findall(r"^  ([a-z-]+) ", section, re.MULTILINE))
        for title, section in zip(sections[1::2], sections[2::2], strict=True)
    }
    shown.pop("options")
    wanted = {group: tuple(rows) for group, rows in COMMANDS_BY_GROUP.items()}
    assert list(shown.items()) == list(wanted.items())


def test_every_command_is_in_one_group() -> None:
    words = [word for rows in COMMANDS_BY_GROUP.values() for word in rows]
    assert words == list(COMMANDS)


@pytest.mark.spec("CLI-32")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("dmup", 'no command "dmup"; did you mean "dump"?'),
        ("DUMP vm.qcow2", 'no command "DUMP"; did you mean "dump"?'),
        ("stream dmup vm.stream", 'no command "stream dmup"; did you mean "dump"?'),
        ("frobnicate", 'no command "frobnicate"; see qcow2bm --help'),
        ("dump --ouput=json vm.qcow2", 'no option "--ouput"; did you mean "--output"?'),
        ("dump --ouput json vm.qcow2", 'no option "--ouput"; did you mean "--output"?'),
        ("dump --bitmpa=x vm.qcow2", 'no option "--bitmpa"; did you mean "--bitmap"?'),
        ("map vm.qcow2 daily --total", 'no option "--total"; did you mean "--totals"?'),
        ("salvage vm.qcow2 daily --al-dirty",
         'no option "--al-dirty"; did you mean "--all-dirty"?'),
        ("dump --ouput=json", 'no option "--ouput"; did you mean "--output"?'),
        ("stream --vresion", 'no option "--vresion"; options stand after COMMAND; '
         "see qcow2bm stream --help"),
        ("--vresion", 'no option "--vresion"; did you mean "--version"?'),
        ("--color=never dump vm.qcow2", 'no option "--color"; options stand after COMMAND; '
         "see qcow2bm --help"),
        ("rescue arm --qmp vm.sock --frob", 'no option "--frob"; see qcow2bm rescue arm --help'),
    ],
)  # fmt: skip
def test_a_misspelt_word_or_option_suggests_the_near_one(
    arguments: str, said: str, tmp_path: Path
) -> None:
    done = run(arguments.split(), tmp_path)
    assert done == (64, "", f"qcow2bm: error: {said}\n")


@pytest.mark.spec("CLI-32")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("add vm.qcow2 -z", 'no option "-z"; before a name that begins with -, write --; '
         "see qcow2bm add --help"),
        ("dump vm.qcow2 --bitmap -z", '--bitmap needs a value; if "-z" is the value, '
         "write --bitmap=-z; see qcow2bm dump --help"),
        ("add vm.qcow2 b -g -x", '-g needs a value; if "-x" is the value, write -g=-x; '
         "see qcow2bm add --help"),
    ],
)  # fmt: skip
def test_a_name_that_looks_like_an_option_gets_the_advice_that_helps(
    arguments: str, said: str, tmp_path: Path
) -> None:
    done = run(arguments.split(), tmp_path)
    assert done == (64, "", f"qcow2bm: error: {said}\n")


def test_the_advice_about_such_names_helps(image: Path) -> None:
    folder, name = image.parent, image.name
    assert run(["add", name, "--", "-z"], folder) == (0, "", "")
    assert ': "-z"\n' in run(["dump", name, "--bitmap=-z"], folder).out


@pytest.mark.spec("CLI-33")
@pytest.mark.parametrize(("path", "example"), EXAMPLES)
def test_an_example_can_be_typed(path: tuple[str, ...], example: str) -> None:
    paths = []
    for command in example.split(" | "):
        program, *words = shlex.split(command)
        assert program == "qcow2bm"
        paths.append(parse(words).parser.path)
    assert paths[-1] == path


@pytest.mark.spec("CLI-33")
@each_command
def test_the_help_of_a_command_has_an_example_as_it_is_written(parser: Parser) -> None:
    lines = parser.format_help().splitlines()
    assert parser.examples
    assert all(f"  {example}" in lines for example in parser.examples)


@pytest.mark.spec("CLI-33")
@each_command
def test_the_help_shows_each_default(parser: Parser) -> None:
    text = " ".join(parser.format_help().split())
    with_default = [
        option
        for option in parser.options
        if option.nargs != 0 and option.default not in (None, [], argparse.SUPPRESS)
    ]
    for option in with_default:
        assert f"{option.help} (default: {option.default})" in text


@pytest.mark.spec("CLI-33")
@each_command
@pytest.mark.parametrize(
    ("explained", "arguments"),
    [
        ("@3 means", {"NAME", "TARGET", "SOURCE", "START:LENGTH"}),
        ("@ is written with @@", {"NAME", "NEW", "TARGET", "SOURCE"}),
        ("SIZE is a number", {"SIZE"}),
        ("START and LENGTH are", {"START:LENGTH"}),
    ],
)
def test_the_help_explains_only_what_the_command_takes(
    parser: Parser, explained: str, arguments: set[str]
) -> None:
    taken = {metavar for word in parser.words for metavar in word.metavar.split()}
    taken |= {str(option.metavar) for option in parser.options}
    assert explained not in " ".join(parser.format_help().split()) or taken & arguments
