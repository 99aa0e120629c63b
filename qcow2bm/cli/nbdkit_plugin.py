"""The command ``nbdkit-plugin``: the path of the script that nbdkit runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qcow2bm.cli.parser import Arguments, Parser

_EPILOG = """\
The plugin serves the raw data file of an image in which every cluster is allocated at its own
offset, as "qcow2bm attach" makes it:

  qcow2bm attach vm.raw vm.qcow2 --bitmap daily
  nbdkit python "$(qcow2bm nbdkit-plugin)" image=vm.qcow2 data=vm.raw

Further parameters: bitmaps=NAME,NAME... bitmap=NAME others=mark-in-use flush-interval=SECONDS
"""


def define(parser: Parser) -> None:
    """Sets what the help says; there are no arguments."""
    parser.examples = ("qcow2bm nbdkit-plugin",)
    parser.epilog = _EPILOG


def run(arguments: Arguments) -> int:
    """Prints the path; returns the exit status."""
    script = find_spec("qcow2bm.serve.nbdkit_plugin")  # nbdkit alone can import it
    assert script
    assert script.origin
    print(Path(script.origin).absolute())
    return 0
