"""The library's logger: one name for all modules, and no output unless the program asks for it."""

from __future__ import annotations

import logging

logger = logging.getLogger("qcow2bm")
"""Programs set its level and handlers; without any, nothing is printed."""
logger.addHandler(logging.NullHandler())
