"""``python -m qcow2bm``."""

import sys

from qcow2bm.cli import main

sys.exit(main())
