"""The command ``nbdkit-plugin``: where the script is that nbdkit runs."""

from __future__ import annotations

import argparse
import os

from qcow2bm import serve


def run(arguments: argparse.Namespace) -> int:
    """Prints the path; returns the exit status."""
    folder = os.path.dirname(os.path.abspath(serve.__file__))
    print(os.path.join(folder, "nbdkit_plugin.py"))
    return 0
