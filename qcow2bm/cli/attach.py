"""The command ``attach``: an image that keeps the bitmaps of an existing raw disk.

*Spec*: spec/image.md, "Containers".
"""

from __future__ import annotations

from qcow2bm import attach
from qcow2bm.cli.arguments import NEW_NAME_NOTE, SIZE_NOTE, add_wait, size
from qcow2bm.cli.images import new_name
from qcow2bm.cli.messages import about
from qcow2bm.cli.parser import Arguments as ParserArguments
from qcow2bm.cli.parser import Parser

_EPILOG = """\
Start the VM with IMAGE in the place of RAW: the guest sees the same disk, and the bitmaps record
the writes. RAW is never written to. Make a full backup once the bitmaps record.

exit status: 0 done; 1 the command failed, and there is no IMAGE; 64 wrong usage
"""


class Arguments(ParserArguments):
    """The values of the arguments of ``attach``."""

    raw: str
    image: str
    bitmap: list[str]
    granularity: int | None
    cluster_size: int | None
    is_raw: bool
    wait: float


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = ("qcow2bm attach disk.raw vm.qcow2 --bitmap daily",)
    parser.notes = (NEW_NAME_NOTE, SIZE_NOTE)
    parser.epilog = _EPILOG
    parser.add_word("raw", "RAW", "a raw disk: a file or block device that no other process uses")
    parser.add_word("image", "IMAGE", "the new qcow2 image; the name must be free")
    parser.add_argument(
        "--bitmap",
        metavar="NAME",
        action="append",
        default=[],
        help="add a bitmap that records writes; can be repeated",
    )
    parser.add_argument(
        "-g",
        "--granularity",
        metavar="SIZE",
        type=size,
        help="how many bytes of the disk one bit of these bitmaps stands for (default: 64k)",
    )
    parser.add_argument(
        "--cluster-size",
        metavar="SIZE",
        type=size,
        help="the cluster size of IMAGE, 512 to 2M (default: 64k, and more for a disk over 256G)",
    )
    parser.add_argument(
        "--assert-raw",
        dest="is_raw",
        action="store_true",
        help="you know that RAW is a raw disk, although it begins like a qcow2 image",
    )
    add_wait(parser, "writes to RAW")


def run(arguments: Arguments) -> int:
    """Makes the image; returns the exit status."""
    with about(arguments.raw, ValueError):
        attach(
            arguments.raw,
            arguments.image,
            map(new_name, arguments.bitmap),
            granularity=arguments.granularity,
            cluster_size=arguments.cluster_size,
            is_raw=arguments.is_raw,
            lock_timeout=arguments.wait,
        )
    return 0
