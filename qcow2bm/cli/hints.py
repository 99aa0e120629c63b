"""The hints that errors of the library end with, in the words of the command line.

*Spec*: spec/cli.md, "Exit status".
"""

from __future__ import annotations

from qcow2bm import Hint, Qcow2BmError

_WORDS: dict[Hint, str] = {
    "force-share": "read it anyway with -U",
    "lock-timeout": "stop that process, or wait for it with --wait SECONDS",
    "remove-all": "remove all bitmaps with remove --all",
    "salvage-or-remove-all": "salvage the bitmaps, or remove all of them with remove --all",
    "unlocked": "read it without locks with -U",
    "unlocked-write": ("if no other process uses it, write without locks with --no-lock"),
}


def explain(error: Exception) -> str:
    """Returns the message of an error; a hint in it names options instead of arguments."""
    return error.explain(_WORDS) if isinstance(error, Qcow2BmError) else str(error)
