"""Turning a problem into the error that is raised for it.

*Spec*: spec/problems.md.
"""

from __future__ import annotations

from qcow2bm.errors import FormatError, Hint
from qcow2bm.problems import Problem


def as_error(found: Problem, consequence: str = "", hint: Hint | None = None) -> FormatError:
    """Returns a problem as the error to raise for it, its reason followed by ``consequence``."""
    field = found.numbered_field
    return FormatError(found.place, field, found.offset, found.reason + consequence, hint)
