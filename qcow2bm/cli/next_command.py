"""What to do next, as a value, and how it is printed.

`qcow2bm.cli.advice` works it out.

*Spec*: spec/cli.md, "The next command".
"""

from __future__ import annotations

from typing import NamedTuple

from qcow2bm.cli.messages import say_more
from qcow2bm.cli.output import command_line
from qcow2bm.cli.terminal import paint, print_text

Argv = list[str]
"""A command as a list of words."""


class NextCommand(NamedTuple):
    """A command that helps, and what is lost by it; the cost is empty if nothing is lost."""

    argv: Argv
    cost: str = ""


class Advice(NamedTuple):
    """What to do next, and why.

    Attributes:
        why: one line for people; empty if there is nothing to do.
        commands: are to be run in this order, each only if the one before it succeeded. There is
            none if no command helps; ``why`` then says what does.
        forbids_start: whether no VM can be started on the image before that is done.
    """

    why: str = ""
    commands: tuple[NextCommand, ...] = ()
    forbids_start: bool = False

    @property
    def as_json(self) -> list[Argv]:
        """The commands alone, as documents have them under "next"."""
        return [command.argv for command in self.commands]


def print_advice(advice: Advice) -> None:
    """Prints why something is to be done, and the commands, ready to be pasted into a shell."""
    if advice.why:
        print_text(advice.why, hanging=0)
    for argv, cost in advice.commands:
        print(f"  next: {paint(command_line(argv), 'command')}")
        if cost:
            print_text(f"        cost: {cost}", hanging=14)


def say_advice(advice: Advice) -> None:
    """Prints on standard error what `print_advice` prints on standard output."""
    if advice.why:
        say_more(advice.why)
    for argv, cost in advice.commands:
        say_more(f"next: {command_line(argv)}")
        if cost:
            say_more(f"      cost: {cost}")
