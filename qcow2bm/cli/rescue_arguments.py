"""The arguments of the commands ``rescue``.

*Spec*: spec/rescue.md.
"""

from __future__ import annotations

from qcow2bm.cli.arguments import (
    Parser,
    add_command,
    add_commands,
    add_editing,
    add_image,
    add_output,
)

EPILOG = """\
SOCKET is the path of the VM's QMP socket, or HOST:PORT. It must be free: QEMU serves one at a time.

exit status: 0 fine; 1 could not do it; 2 done, but a bitmap is lost, in doubt, or was left as it
was; 64 wrong usage
"""

_NODES = "a node or device of the VM; may be repeated; by default all that are concerned"


def define(parser: Parser) -> None:
    """Adds the commands of the second word."""
    commands = add_commands(parser, "action")
    for action, (summary, define_one) in COMMANDS.items():
        epilog = EPILOG.partition("\n\n")[2] if action == "finish" else EPILOG
        add_command(commands, action, summary, "rescue", define_one, epilog)


def _define_start(parser: Parser) -> None:
    _define(parser)
    parser.add_argument("--dry-run", action="store_true", help="only show what is there")


def _define_arm(parser: Parser) -> None:
    _define(parser)
    parser.add_argument("--set", action="store_true", help="set the block-bitmap-mapping as well")


def _define_verdict(parser: Parser) -> None:
    _define(parser)
    remedies = parser.add_mutually_exclusive_group()
    for remedy, text in (("remove", "remove"), ("all-dirty", "make dirty all over")):
        remedies.add_argument(
            f"--{remedy}",
            dest="remedy",
            action="store_const",
            const=remedy,
            help=f"{text} bitmaps that may miss writes",
        )


def _define_finish(parser: Parser) -> None:
    add_image(parser, "what the VM ran on, when it is off")
    add_editing(parser)


def _define(parser: Parser) -> None:
    parser.add_argument(
        "--qmp", dest="image", metavar="SOCKET", required=True, help="where the VM listens"
    )
    parser.add_argument(
        "--node", dest="nodes", metavar="NODE", action="append", default=[], help=_NODES
    )
    add_output(parser)


COMMANDS = {
    "start": (
        "after a migration that failed: have QEMU store its persistent bitmaps again",
        _define_start,
    ),
    "arm": (
        "before a migration: add a sentinel that tells if another machine touches the disk",
        _define_arm,
    ),
    "verdict": (
        "after an armed migration that came back: say if another machine touched the disk",
        _define_verdict,
    ),
    "finish": ("end in the image what rescue start could not end", _define_finish),
}
