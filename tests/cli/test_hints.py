"""Hints of errors on the terminal: options of the command, and no arguments of the library."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from qcow2bm import Hint, ImageLockedError, StorageError
from qcow2bm.cli.hints import explain


@pytest.mark.parametrize("hint", get_args(Hint))
def test_a_hint_names_an_option_or_a_command_and_no_argument(hint: Hint) -> None:
    text = explain(StorageError("disk", 0, 0, "failed", hint=hint), lambda option: True)
    assert text.startswith("disk: failed; ")
    if hint not in ("decompress", "copy-again"):
        assert re.search(r" (-U|--[a-z-]+|qcow2bm [a-z]+( [a-z]+)?( [A-Z]+)+|-O qcow2)", text)
    assert not re.search(r"force_share|lock_timeout|locking=|Edit\.|qcow2bm\.", text)


@pytest.mark.parametrize(
    ("options", "hints"),
    [
        ("-U", ["with -U", ""]),
        ("--wait", ["with --wait SECONDS", "with --wait SECONDS"]),
        ("--no-lock", ["", ""]),
    ],
)
def test_a_hint_names_only_options_that_the_command_has(options: str, hints: list[str]) -> None:
    for action, hint in zip(("reading", "writing"), hints, strict=True):
        error = ImageLockedError("disk", "is writing to it", action)
        text = explain(error, options.split().__contains__)
        assert text.startswith(error.facts)
        assert text.endswith(hint or "is a VM running on it?")


def test_another_error_is_its_own_text() -> None:
    assert explain(ValueError("is odd")) == "is odd"
    assert explain(StorageError("disk", 0, 0, "failed")) == "disk: failed"
