"""An image that changes or fails under the reader: at every single read, an honest answer.

Whoever frees the clusters of a bitmap may punch holes into them, so that every change here
also zeros the bitmap data: a reader that mixes old metadata with new data then reads "clean".
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest import mock

import pytest
from support.images import ONES, ZEROES, Built, Stored, Word, build_image
from support.scripted_storage import OnceAt, ScriptedStorage, io_error, short_read

import qcow2bm
from qcow2bm.format.directory import FLAG_IN_USE

CLUSTER = 512
TABLE: list[Word] = [b"\x01", ZEROES, ZEROES, ONES, b"\x02" * CLUSTER, b"\x03"]
SIZE = len(TABLE) * 8 * CLUSTER << 16

Use = Callable[[qcow2bm.Image], Any]


def bitmap_of(image: qcow2bm.Image) -> qcow2bm.Bitmap:
    return image.bitmap(0)


USES: dict[str, Use] = {
    "problems": lambda image: image.problems,
    "status": lambda image: bitmap_of(image).status,
    "clusters": lambda image: bitmap_of(image).clusters,
    "count": lambda image: bitmap_of(image).count(),
    "totals": lambda image: bitmap_of(image).totals(),
    "extents": lambda image: [e.tolist() for e in bitmap_of(image).extents()],
    "packed": lambda image: bitmap_of(image).packed().tobytes(),
    "sha256": lambda image: bitmap_of(image).sha256(),
    "stale_bits": lambda image: bitmap_of(image).stale_bits().tobytes(),
    "stale_totals": lambda image: bitmap_of(image).stale_totals(),
}
READS_BITS = ("count", "totals", "extents", "packed", "sha256")


def build() -> Built:
    return build_image(Stored(table=TABLE), Stored(b"second", [ONES] * len(TABLE)), size=SIZE)


@contextmanager
def small_chunks() -> Iterator[None]:
    """Each cluster is a batch of its own, so that much can happen between two of them."""
    with mock.patch.multiple(
        "qcow2bm.bitmaps.bit_reader", CHUNK_BYTES=CLUSTER, _LONG_BYTES=CLUSTER
    ):
        yield


# --- changes ----------------------------------------------------------------------------------


def autoclear_off(image: Built) -> None:
    image.plant(0, "header", 0, "autoclear_features")


def directory_moved(image: Built) -> None:
    image.plant(image.offset("bitmap-table", 1), "bitmaps-extension", 0, "bitmap_directory_offset")


def directory_zeroed(image: Built) -> None:
    start = image.offset("bitmap-directory")
    image.data[start : start + CLUSTER] = bytes(CLUSTER)


def marked_in_use(image: Built) -> None:
    image.plant(FLAG_IN_USE, "directory-entry", 0, "flags")


def renamed(image: Built) -> None:
    image.plant(ord("x"), "directory-entry", 0, "name")


def table_moved(image: Built) -> None:
    image.plant(image.offset("bitmap-table", 1), "directory-entry", 0, "bitmap_table_offset")


def table_rewritten(image: Built) -> None:
    for place, _ in enumerate(TABLE):
        image.plant(ONES, "bitmap-table", 0, place)


def first_word(image: Built) -> None:
    image.plant(ZEROES, "bitmap-table", 0, 0)


def middle_word(image: Built) -> None:
    image.plant(ONES, "bitmap-table", 0, 2)


def last_word(image: Built) -> None:
    image.plant(ONES, "bitmap-table", 0, len(TABLE) - 1)


def cut_off(image: Built) -> None:
    del image.data[image.offset("bitmap-data", 0, 0) :]


def emptied(image: Built) -> None:
    image.data.clear()


CHANGES = (
    autoclear_off,
    directory_moved,
    directory_zeroed,
    marked_in_use,
    renamed,
    table_moved,
    table_rewritten,
    first_word,
    middle_word,
    last_word,
    cut_off,
    emptied,
)


def apply(change: Callable[[Built], None], image: Built) -> None:
    for offset in image.clusters.values():
        image.data[offset : offset + CLUSTER] = bytes(CLUSTER)
    change(image)


def outcome(use: Use, image: qcow2bm.Image) -> Any:
    """Returns the result of ``use``, or the class of the error that ``use`` raises."""
    try:
        return use(image)
    except qcow2bm.Qcow2BmError as error:
        return type(error)


def fresh_outcome(use: Use, image: Built) -> Any:
    """The same for an image that no process writes to."""
    try:
        opened = qcow2bm.open(bytes(image.data))
    except qcow2bm.Qcow2BmError as error:
        return type(error)
    return outcome(use, opened)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", USES)
def test_a_change_between_two_reads_gives_the_old_answer_the_new_one_or_an_error(
    change: Callable[[Built], None], name: str
) -> None:
    use = USES[name]
    changed = build()
    apply(change, changed)
    answers = fresh_outcome(use, build()), fresh_outcome(use, changed)
    if name in READS_BITS:
        assert answers[0] != answers[1]  # or the test could not tell them apart
    for number in count():
        image = build()
        script = OnceAt(number, lambda image=image: apply(change, image))  # type: ignore[misc]
        with small_chunks():
            try:
                opened = qcow2bm.open(ScriptedStorage(image.data, script))
            except qcow2bm.Qcow2BmError:
                if not script.fired:
                    raise
                continue
            answer = outcome(use, opened)
        if not script.fired:
            assert answer == answers[0]
            break
        is_error = isinstance(answer, type)
        assert is_error or answer in answers, f"read {number}"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_status_is_never_read_over(change: Callable[[Built], None]) -> None:
    for name in USES:
        image = build()
        opened = qcow2bm.open(ScriptedStorage(image.data))
        assert opened.bitmap(0).status == "valid"
        apply(change, image)
        answer = outcome(USES[name], opened)
        if name in READS_BITS or (name.startswith("stale") and change not in IN_TABLE):
            assert isinstance(answer, type), name
            assert issubclass(answer, qcow2bm.StorageError), name


IN_TABLE = (table_rewritten, first_word, middle_word, last_word)


@pytest.mark.parametrize(
    "change", [change for change in CHANGES if change not in (cut_off, emptied)]
)
def test_the_error_says_that_the_image_changed(change: Callable[[Built], None]) -> None:
    image = build()
    opened = qcow2bm.open(ScriptedStorage(image.data))
    assert opened.bitmap(0).status == "valid"
    apply(change, image)
    with pytest.raises(qcow2bm.ChangedWhileReadingError):
        opened.bitmap(0).count()
    opened = qcow2bm.open(ScriptedStorage(image.data))
    assert outcome(USES["count"], opened) == fresh_outcome(USES["count"], image)


def test_a_change_before_the_tables_were_read_is_noticed() -> None:
    image = build()
    opened = qcow2bm.open(ScriptedStorage(image.data))
    apply(marked_in_use, image)
    for _ in range(2):
        with pytest.raises(qcow2bm.ChangedWhileReadingError):
            _ = opened.bitmap(0).status
        with pytest.raises(qcow2bm.ChangedWhileReadingError):
            _ = opened.problems


@pytest.mark.parametrize("name", USES)
def test_a_write_anywhere_is_noticed_even_by_what_is_known_already(name: str) -> None:
    """The same metadata may stand in the same place again after two writes."""
    storage = ScriptedStorage(build().data)
    opened = qcow2bm.open(storage)
    forced = qcow2bm.open(storage, force_share=True)
    for image in (opened, forced):
        assert image.bitmap(0).status == "valid"
    expected = outcome(USES[name], forced)
    assert outcome(USES[name], opened) == expected
    storage.token = "written to"
    assert outcome(USES[name], forced) == expected
    changed = qcow2bm.ChangedWhileReadingError
    assert outcome(USES[name], opened) is changed


def test_the_other_bitmaps_may_change_once_the_status_is_known() -> None:
    """An entry is compared by itself: a bitmap does not fail for another one's sake."""
    image = build()
    opened = qcow2bm.open(ScriptedStorage(image.data))
    expected = opened.bitmap(0).count()
    image.plant(FLAG_IN_USE, "directory-entry", 1, "flags")
    image.plant(ZEROES, "bitmap-table", 1, 0)
    assert opened.bitmap(0).count() == expected


# --- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [io_error, short_read])
@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("word", [ZEROES, 1 << 40], ids=["sound", "broken"])
def test_every_read_may_fail_and_the_next_try_works(
    failure: Callable[[], int | None], name: str, word: int
) -> None:
    """A failure leaves nothing behind that would make the next answer a better one."""
    use = USES[name]
    image = build()
    image.plant(word, "bitmap-table", 0, 2)
    data = image.data
    expected = outcome(use, qcow2bm.open(data))
    for number in count():
        script = OnceAt(number, failure)
        storage = ScriptedStorage(data, script)
        with small_chunks():
            try:
                opened = qcow2bm.open(storage)
            except qcow2bm.StorageError:
                opened = qcow2bm.open(storage)
            else:
                answer = outcome(use, opened)
                if not script.fired:
                    assert answer == expected
                    break
                start, stop = storage.reads[number]
                if failure is short_read:  # nothing is missing from a read of no bytes
                    assert answer == (qcow2bm.ShortReadError if stop > start else expected)
                else:
                    assert answer is qcow2bm.StorageError
            assert script.fired
            assert outcome(use, opened) == expected
    assert number > 5


@pytest.mark.parametrize("force_share", [False, True])
def test_a_status_is_asked_for_again_where_nobody_tells_of_writes(force_share: bool) -> None:
    """Block devices have no time of the last write, and with forced sharing it means nothing."""
    image = build()
    opened = qcow2bm.open(ScriptedStorage(image.data), force_share=force_share)
    bitmap = opened.bitmap(0)
    assert bitmap.status == "valid"
    image.plant(image.entries[0].flags | FLAG_IN_USE, "directory-entry", 0, "flags")
    with pytest.raises(qcow2bm.ChangedWhileReadingError):
        _ = bitmap.status


def test_extents_of_a_stream_end_where_the_image_is_closed() -> None:
    image = build()
    with small_chunks(), mock.patch("qcow2bm.bitmaps.bit_reader._MANY_EXTENTS", 1):
        with qcow2bm.open(io.BytesIO(image.data)) as opened:
            extents = opened.bitmap(0).extents()
            next(extents)
        with pytest.raises(qcow2bm.StateError):
            list(extents)
