"""The hints that errors of the library end with, in the words of the command line.

*Spec*: spec/cli.md, "Exit status".
"""

from __future__ import annotations

from collections.abc import Callable

from qcow2bm import Hint, Qcow2BmError

_WAIT = "--wait", "stop that process, or wait for it with --wait SECONDS"

# For each hint the options that help, the best first, and what to say of them.
_WORDS: dict[Hint, tuple[tuple[str, str], ...]] = {
    "assert-alone": (("", "give --assert-alone if you know that no other VM wrote to the disks"),),
    "assert-lost": (("", "give --assert-lost if they need not be put back"),),
    "assert-raw": (("", "give --assert-raw if you know that it is raw"),),
    "assert-unchanged": (
        (
            "",
            "give --assert-unchanged if you know that the disk is unchanged, or "
            "--as-dirty-ranges-unknown",
        ),
    ),
    "attach": (
        ("", "if it is a raw disk, make an image for its bitmaps: qcow2bm attach RAW IMAGE"),
    ),
    "convert": (("", "make a qcow2 image of it: qemu-img convert -O qcow2 FILE IMAGE"),),
    "copy-again": (("", "if an image is expected here, copy the image again"),),
    "decompress": (("", "decompress it first"),),
    "force-share": (("-U", "read it anyway with -U"), _WAIT),
    "full-backup": (("", "to take a full backup, give --full instead of --base"),),
    "judge": (("", "judge it: qcow2bm rescue verdict --qmp SOCKET"),),
    "lock-timeout": (_WAIT,),
    "read-offload": (("", "put its bitmaps back: qcow2bm live restore FILE IMAGE"),),
    "read-sidecar": (
        ("", "show it: qcow2bm sidecar dump FILE; or use it: qcow2bm sidecar load FILE IMAGE"),
    ),
    "read-stream": (("", "show its bitmaps: qcow2bm stream dump FILE"),),
    "remove-all": (("", "remove all bitmaps with remove --all"),),
    "remove-bitmap": (("", "make room: qcow2bm remove IMAGE NAME"),),
    "rename-copies": (("", "try again, or when the VM is off, run: qcow2bm rescue finish IMAGE"),),
    "run-again": (
        (
            "",
            "run the same command again, which completes or removes what was begun; --timeout "
            "SECONDS gives QEMU more time",
        ),
    ),
    "salvage-or-remove-all": (
        ("", "salvage the bitmaps, or remove all of them with remove --all"),
    ),
    "undo": (("", "take back the repair that wrote it: qcow2bm undo IMAGE FILE"),),
    "unlocked": (("-U", "read it without locks with -U"),),
    "unlocked-write": (
        ("--no-lock", "if no other process uses it, write without locks with --no-lock"),
    ),
}


def explain(error: Exception, has_option: Callable[[str], bool] = lambda option: False) -> str:
    """Returns the message of an error; a hint in it names options instead of arguments.

    Args:
        error: any error.
        has_option: whether the command has an option. A hint that needs an option which the
            command does not have is left out.
    """
    if not isinstance(error, Qcow2BmError):
        return str(error)
    for option, text in _WORDS[error.hint] if error.hint else ():
        if not option or has_option(option):
            return error.explain({error.hint: text}) if error.hint else error.facts
    return error.facts


def advise(reason: str, hint: Hint | None) -> str:
    """Returns the reason that a result has, and its hint in the words of the command line."""
    return f"{reason}; {_WORDS[hint][0][1]}" if hint else reason
