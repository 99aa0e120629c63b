"""``python -m qcow2bm``."""

import sys

from qcow2bm.cli.console import run

sys.exit(run())
