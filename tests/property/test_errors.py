"""Properties of every error, whatever names a file or an image may have."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2bm
from qcow2bm import errors
from qcow2bm.errors import BitmapError, Qcow2BmError, StorageError
from qcow2bm.units import escape

# Names come from images and file systems: any text, and bytes that are none.
names = st.one_of(
    st.text(st.characters(exclude_categories=())),  # lone surrogates too
    st.binary().map(lambda name: name.decode("utf-8", "surrogateescape")),
)
words = st.sampled_from(("header", "l1_size", "is cut off", ""))
numbers = st.integers(0, (1 << 64) - 1)
actions = st.sampled_from(("reading", "writing"))
hints = st.none() | st.sampled_from(get_args(errors.Hint))
bitmap = (names, words, hints)
removable = st.lists(st.tuples(names, numbers), max_size=5).map(tuple)

OUTCOMES: tuple[errors.CommitOutcome, ...] = ("old", "new", "unknown")

FAULTS = ("not-current", "same-disk", "wrong-size", "container")

ARGUMENTS: dict[type[Qcow2BmError], tuple[st.SearchStrategy[object], ...]] = {
    errors.Qcow2BmError: (words,),
    errors.FormatError: (words, words, numbers, words, hints),
    errors.UnsupportedError: (words,),
    errors.LimitError: (words, numbers, numbers, st.none() | numbers, removable, hints),
    errors.BitmapError: bitmap,
    errors.BitmapNotFoundError: bitmap,
    errors.BitmapExistsError: bitmap,
    errors.BitmapInconsistentError: bitmap,
    errors.BitmapStaleError: bitmap,
    errors.BitmapBrokenError: bitmap,
    errors.StateError: (words, words, names.map(escape), hints),
    errors.ReadOnlyImageError: (),
    errors.StorageError: (
        *(names, numbers, numbers, words),
        *(st.none() | st.integers(1, 133), actions, hints),
    ),
    errors.ShortReadError: (names, numbers, numbers),
    errors.ImageLockedError: (names, words, actions, st.none() | st.integers(100, 203)),
    errors.ChangedWhileReadingError: (names, words),
    errors.NoRoomError: (names, numbers, numbers, numbers, removable, hints),
    errors.CommitError: (
        *(names, words, st.sampled_from(OUTCOMES), words, words),
        *(st.none() | numbers, removable, hints),
    ),
    errors.ComparisonError: (names, words, st.sampled_from(FAULTS), words),
    errors.EvidenceError: (words,),
    errors.IntentError: (words,),
    errors.TailError: (words, hints),
    errors.QmpError: (words, words, hints),
    errors.QmpRefusedError: (words, words, hints),
    errors.QmpTimeoutError: (words, st.floats(0, 1e6)),
}
some_error = st.sampled_from(list(ARGUMENTS)).flatmap(
    lambda kind: st.builds(kind, *ARGUMENTS[kind])
)


def tree(root: type[Qcow2BmError]) -> Iterator[tuple[str, str]]:
    for kind in root.__subclasses__():
        if kind.__module__.startswith("qcow2bm"):
            yield kind.__name__, root.__name__
            yield from tree(kind)


def public(error: Qcow2BmError) -> dict[str, object]:
    return {name: value for name, value in vars(error).items() if not name.startswith("_")}


def test_every_error_is_tried_here_and_public() -> None:
    kinds = {"Qcow2BmError", *(name for name, _ in tree(Qcow2BmError))}
    assert {kind.__name__ for kind in ARGUMENTS} == kinds
    assert kinds <= set(qcow2bm.__all__)


def test_the_tree_is_the_one_drawn_in_the_docstring() -> None:
    drawn, parents = [], ["Qcow2BmError"]
    for indent, name in re.findall(r"^    ((?:[│ ]  )*)[├└]─ (\w+)", errors.__doc__ or "", re.M):
        del parents[1 + len(indent) // 3 :]
        drawn.append((name, parents[-1]))
        parents.append(name)
    assert sorted(drawn) == sorted(tree(Qcow2BmError))


@given(some_error, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_an_error_survives_pickle(error: Qcow2BmError, protocol: int) -> None:
    twins: list[Any] = [pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)]
    for twin in twins:
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert public(twin) == public(error)
        assert twin.args == error.args


@given(some_error)
def test_an_error_is_one_printable_line(error: Qcow2BmError) -> None:
    assert str(error).isprintable()


@given(names, st.text(), st.sampled_from((None, errno.EIO, errno.ENOENT)), actions)
def test_a_failure_of_the_system_is_one_printable_line(
    path: str, reason: str, number: int | None, action: str
) -> None:
    failure = OSError(reason) if number is None else OSError(number, reason)
    error = StorageError.from_os(failure, path, 7, 9, action)
    assert (error.path, error.offset, error.length, error.errno) == (path, 7, 9, number)
    assert error.action == action
    assert str(error).endswith(f" ({action} 9 bytes at 0x7)")
    assert str(error).isprintable()


@given(names)
def test_a_bitmap_error_names_the_bitmap_in_quotes(name: str) -> None:
    kinds: list[type[BitmapError]] = [BitmapError, *BitmapError.__subclasses__()]
    for kind in kinds:
        error = kind(name)
        assert error.name == name
        assert error.reason == kind.default_reason
        assert str(error) == f'bitmap "{escape(name)}" {kind.default_reason}'


@pytest.mark.parametrize("hint", get_args(errors.Hint))
def test_a_hint_names_no_command_and_no_option(hint: errors.Hint) -> None:
    text = errors.advise("it failed", hint)
    assert text.startswith("it failed; ")
    assert not re.search(r"--?[a-zA-Z]|qcow2bm [a-z]|rescue [a-z]", text.replace("qemu-img", ""))


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (errors.BitmapNotFoundError("daily"), KeyError),
        (errors.StorageError("disk", 0, 0, "failed"), OSError),
        (errors.ReadOnlyImageError(), errors.StateError),
        (errors.ShortReadError("disk", 0, 512), StorageError),
        (errors.ImageLockedError("disk", "is writing to it"), StorageError),
        (errors.ChangedWhileReadingError("disk", "header"), StorageError),
        (errors.QmpRefusedError("cont", "no"), errors.QmpError),
        (errors.QmpTimeoutError("cont", 9), errors.QmpError),
    ],
)
def test_an_error_is_also_what_python_would_raise(
    error: Qcow2BmError, base: type[Exception]
) -> None:
    assert isinstance(error, base)
    assert isinstance(error, Qcow2BmError)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.FormatError("header", "size", 24, "is odd"), "header: size at 0x18 is odd"),
        (errors.FormatError("header", "", 24, "is odd"), "header at 0x18 is odd"),
        (errors.UnsupportedError("zstd"), "not supported: zstd"),
        (errors.LimitError("name", 9, 8), "name is 9, more than the limit of 8"),
        (errors.BitmapNotFoundError('a"\n'), 'bitmap "a\\"\\n" not found'),
        (errors.BitmapBrokenError("a", "is too short"), 'bitmap "a" is too short'),
        (errors.StateError("closed", "open"), "the image is closed, but must be open"),
        (
            errors.StateError("finished", "begun anew", "the edit"),
            "the edit is finished, but must be begun anew",
        ),
        (
            errors.ReadOnlyImageError(),
            'the image is open for reading only, but must be opened for writing (mode "r+")',
        ),
        (errors.BitmapExistsError("a"), 'bitmap "a" already exists'),
        (errors.QmpError("", "no greeting"), "connecting to QMP failed: no greeting"),
        (errors.QmpRefusedError("cont", "no"), "the QMP command cont failed: no"),
        (
            errors.QmpTimeoutError("cont", 2.5),
            "the QMP command cont failed: no answer within 2.5 seconds; call the same function "
            "again, which completes or removes what was begun",
        ),
        (errors.StorageError("a\x1b", 0, 0, "failed"), "a\\x1b: failed"),
        (errors.StorageError("a", 16, 8, "failed"), "a: failed (reading 8 bytes at 0x10)"),
        (
            errors.StorageError("a", 16, 8, "failed", errno.EIO, "writing"),
            "a: failed (writing 8 bytes at 0x10)",
        ),
        (
            errors.ShortReadError("a", 16, 8),
            "a: the file ended too early (reading 8 bytes at 0x10)",
        ),
        (
            errors.ChangedWhileReadingError("a", "bitmap table"),
            "a: the bitmap table changed while it was read; open the image again",
        ),
    ],
)
def test_what_an_error_says(error: Qcow2BmError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize(
    ("action", "hint", "advice"),
    [("reading", "force-share", "force_share=True"), ("writing", "lock-timeout", "lock_timeout")],
)
def test_a_lock_comes_with_the_advice_for_what_was_wanted(
    action: str, hint: errors.Hint, advice: str
) -> None:
    error = errors.ImageLockedError("disk", "is writing to it", action, 101)
    assert "in use by another process, which is writing to it" in str(error)
    assert [way for way in ("force_share", "lock_timeout") if way in str(error)] == [
        advice.partition("=")[0]
    ]
    assert (error.hint, error.held, error.lock_byte) == (hint, "is writing to it", 101)


@given(some_error)
def test_an_error_is_its_facts_and_a_hint_in_the_words_of_the_program_that_shows_it(
    error: Qcow2BmError,
) -> None:
    words = {hint: f"do {hint}" for hint in get_args(errors.Hint)}
    assert str(error).startswith(error.facts)
    assert error.explain(words).startswith(error.facts)
    if error.hint is None:
        assert str(error) == error.facts == error.explain(words)
    else:
        assert error.explain(words).endswith(f" do {error.hint}")
        assert len(str(error)) > len(error.facts) + 2


def test_no_error_of_the_library_names_an_option_of_the_command_line() -> None:
    for hint in get_args(errors.Hint):
        text = str(errors.StorageError("disk", 0, 0, "failed", hint=hint))
        assert not re.search(r"(^| )--?[A-Za-z]", text)


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        ("old", "the edit did not take effect"),
        ("new", "the edit took effect"),
        ("unknown", "whether the edit took effect is unknown"),
    ],
)
def test_a_failed_commit_says_what_the_image_has(outcome: errors.CommitOutcome, text: str) -> None:
    error = errors.CommitError("a\n", "writing the bitmaps extension", outcome, "no power")
    assert str(error).startswith(f"a\\n: writing the bitmaps extension failed: no power; {text}")


def test_an_error_of_the_system_keeps_its_number() -> None:
    failure = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "disk")
    assert StorageError.from_os(failure, "disk", 0, 0).errno == errno.ENOENT
    assert errors.ImageLockedError("disk", "").errno == errno.EAGAIN
    assert errors.ShortReadError("disk", 0, 1).errno == errno.EIO
