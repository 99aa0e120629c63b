"""The command ``nbdkit-plugin``: the path of the script that nbdkit runs."""

from __future__ import annotations

from pathlib import Path

import qcow2bm
from qcow2bm.cli.arguments import Arguments, Parser

_EPILOG = """\
The plugin serves the raw data file of an image that was made with data_file_raw=on and
preallocation=metadata:

  nbdkit python "$(qcow2bm nbdkit-plugin)" image=vm.qcow2 data=vm.raw

Further parameters: bitmaps=NAME,NAME...  bitmap=NAME  others=mark-in-use  flush-interval=SECONDS
"""


def define(parser: Parser) -> None:
    """Sets the end of the help; there are no arguments."""
    parser.epilog = _EPILOG


def run(arguments: Arguments) -> int:
    """Prints the path; returns the exit status."""
    print(Path(qcow2bm.__file__).absolute().with_name("serve") / "nbdkit_plugin.py")
    return 0
