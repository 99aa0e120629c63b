"""The commands ``completion bash``, ``zsh`` and ``fish``: scripts made from the parsers.

The scripts hold the words of all commands, their options and the choices of the options. In every
other place they let the shell complete names of files.

*Spec*: spec/cli.md, "Completion".
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from functools import partial

from qcow2bm.cli.commands import all_parsers
from qcow2bm.cli.parser import Arguments, Parser

_FILES = {
    "bash": "~/.local/share/bash-completion/completions/qcow2bm",
    "zsh": '"${fpath[1]}/_qcow2bm"',
    "fish": "~/.config/fish/completions/qcow2bm.fish",
}
"""The place of the script for each shell; for bash, the package bash-completion looks there."""

_LOADING = {
    "bash": 'eval "$(qcow2bm completion bash)"',
    "zsh": 'eval "$(qcow2bm completion zsh)"',
    "fish": "qcow2bm completion fish | source",
}


_INSTALLED = {
    "bash": "share/bash-completion/completions/qcow2bm",
    "zsh": "share/zsh/site-functions/_qcow2bm",
    "fish": "share/fish/vendor_completions.d/qcow2bm.fish",
}
"""The place of the script for each shell below the prefix of an installation."""


def scripts() -> Iterator[tuple[str, str]]:
    """Yields the place of each script below the prefix of an installation, and its text."""
    for shell, place in _INSTALLED.items():
        yield place, _SCRIPTS[shell]()


def define(parser: Parser) -> None:
    """Adds the commands with their second words."""
    for shell in _FILES:
        summary = f"print the script for {shell}"
        parser.add_command(shell, summary, partial(_define_shell, shell))


def _define_shell(shell: str, parser: Parser) -> None:
    parser.examples = (f"qcow2bm completion {shell}",)
    parser.epilog = f"""\
To have it in every new shell:

  qcow2bm completion {shell} >{_FILES[shell]}

To have it in this shell:

  {_LOADING[shell]}

exit status: 0 done; 1 the command failed; 64 wrong usage
"""


def run(arguments: Arguments) -> int:
    """Prints the script; returns the exit status."""
    print(_SCRIPTS[arguments.action](), end="")
    return 0


def _choices(option: argparse.Action) -> list[str]:
    return list(map(str, option.choices or ()))


def _takes_value(option: argparse.Action) -> bool:
    return option.nargs != 0


def _help(option: argparse.Action) -> str:
    """The beginning of the help of an option: one clause."""
    return (option.help or "").partition(";")[0]


# bash

_BASH = """\
# bash completion for qcow2bm, made by: qcow2bm completion bash
_qcow2bm() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
    # bash takes --option=value for three words.
    if [[ $current == = ]]; then
        current=
    elif [[ $previous == = ]]; then
        previous=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    local path= number word choices=
    for ((number = 1; number < COMP_CWORD; number++)); do
        word=${{COMP_WORDS[number]}}
        [[ $word == -- ]] && return
        case "$path $word" in
            {commands}) path="$path $word" ;;
        esac
    done
    case "$path $previous" in
{values}
        *)
            case "$path" in
{words}
            esac
            ;;
    esac
    COMPREPLY=($(compgen -W "$choices" -- "$current"))
}}
complete -o default -F _qcow2bm qcow2bm
"""


def _bash() -> str:
    """The script for bash.

    The command of a line is its first words; a path is those words, each with a space before it.
    """
    paths, values, words = [], [], []
    for parser in all_parsers():
        path = _path(parser)
        if path:
            paths.append(f'"{path}"')
        options = " ".join(name for option in parser.options for name in option.option_strings)
        words.append(f'                "{path}") choices="{" ".join(parser.commands)}"')
        words.append(f'                    [[ $current == -* ]] && choices="{options}" ;;')
        for option in filter(_takes_value, parser.options):
            patterns = "|".join(f'"{path} {name}"' for name in option.option_strings)
            values.append(f'        {patterns}) choices="{" ".join(_choices(option))}" ;;')
    return _BASH.format(commands="|".join(paths), values="\n".join(values), words="\n".join(words))


def _path(parser: Parser) -> str:
    return "".join(f" {word}" for word in parser.path)


# zsh

_ZSH = """\
#compdef qcow2bm
# zsh completion for qcow2bm, made by: qcow2bm completion zsh
{functions}
if [[ $funcstack[1] == _qcow2bm ]]; then
    _qcow2bm "$@"
else
    compdef _qcow2bm qcow2bm
fi
"""


def _zsh() -> str:
    functions = (_zsh_of(parser) for parser in all_parsers())
    return _ZSH.format(functions="\n".join(functions))


def _zsh_of(parser: Parser) -> str:
    """The function for a command, or for the words with which several commands begin."""
    name = "_".join(("_qcow2bm", *parser.path)).replace("-", "_")
    if not parser.commands:
        specs = [*(s for o in parser.options for s in _zsh_option(o)), "*:file:_files"]
        lines = " \\\n        ".join(map(shlex.quote, specs))
        return f"{name}() {{\n    _arguments -s -S \\\n        {lines}\n}}"
    described = "\n        ".join(
        shlex.quote(f"{word}:{command.summary}") for word, command in parser.commands.items()
    )
    options = " ".join(shlex.quote(s) for o in parser.options for s in _zsh_option(o))
    return f"""\
{name}() {{
    local -a commands
    commands=(
        {described}
    )
    local curcontext=$curcontext context state state_descr line
    typeset -A opt_args
    _arguments -C {options} '1: :->command' '*:: :->arguments'
    case $state in
        command) _describe command commands ;;
        arguments)
            local next="{name}_${{line[1]//-/_}}"
            (( $+functions[$next] )) && $next
            ;;
    esac
}}"""


def _zsh_option(option: argparse.Action) -> Iterator[str]:
    text = _help(option).replace("[", "(").replace("]", ")").replace(":", " ")
    value = ""
    if _takes_value(option):
        count = option.nargs if isinstance(option.nargs, int) else 1
        action = f"({' '.join(_choices(option))})" if option.choices else "_files"
        value = f":value:{action}" * count
    for name in option.option_strings:
        is_joinable = bool(value) and name.startswith("--") and option.nargs is None
        yield f"*{name}{'=' if is_joinable else ''}[{text}]{value}"


# fish

_FISH = """\
# fish completion for qcow2bm, made by: qcow2bm completion fish
function __qcow2bm_at
    set -l path
    for word in (commandline -opc)[2..]
        switch "$path $word"
            case {commands}
                set path "$path $word"
        end
    end
    test "$path" = "$argv[1]"
end
{lines}
"""


def _fish() -> str:
    """The script for fish: all options, each with the path of the command that has it."""
    paths, lines = [], []
    for parser in all_parsers():
        path = shlex.quote(_path(parser))
        if parser.path:
            paths.append(path)
        seen = f'complete -c qcow2bm -n "__qcow2bm_at {path}"'
        for word, command in parser.commands.items():
            lines.append(f"{seen} -f -a {word} -d {_fish_quote(command.summary)}")
        lines += (f"{seen} {_fish_option(option)}" for option in parser.options)
    return _FISH.format(commands=" ".join(paths), lines="\n".join(lines))


def _fish_option(option: argparse.Action) -> str:
    parts = [
        f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
        for name in option.option_strings
    ]
    if option.choices:
        parts.append(f"-x -a {_fish_quote(' '.join(_choices(option)))}")
    elif _takes_value(option):
        parts.append("-r")
    parts.append(f"-d {_fish_quote(_help(option))}")
    return " ".join(parts)


def _fish_quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_SCRIPTS: dict[str, Callable[[], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
