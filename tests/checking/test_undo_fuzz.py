"""Undo files that were changed on purpose, with a digest that is right all the same."""

from __future__ import annotations

import hashlib
import random
import struct
from collections import Counter
from collections.abc import Callable

import pytest
from support.problem_images import broken

import qcow2bm
from qcow2bm.format.undo_file import DIGEST_BYTES, HEAD_BYTES, STEP_BYTES

ID = "directory-entry.type.unknown"
COUNT = 3000

NUMBERS = (0, 1, 7, 511, 512, 513, 65536, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)
OFFSETS = (*NUMBERS, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def repaired() -> tuple[bytes, bytes]:
    """An image after a repair, and the undo file of the repair, without its seal."""
    data = bytearray(broken(ID))
    kept: list[bytes] = []

    def keep(undo: qcow2bm.UndoLog) -> Callable[[int], None]:
        kept.append(b"".join(qcow2bm.build_undo(undo)))
        return lambda mtime_ns: None

    qcow2bm.repair(data, keep)
    return bytes(data), kept[0]


def mutant(chance: random.Random, file: bytes) -> bytes:
    """The file with a few fields changed, steps left out, doubled or swapped, and a new digest."""
    body = bytearray(file[:-DIGEST_BYTES])
    starts, place = [], HEAD_BYTES
    while place < len(body):
        starts.append(place)
        place += STEP_BYTES + 2 * struct.unpack_from(">I", body, place + 1)[0]
    steps = [bytes(body[a:b]) for a, b in zip(starts, [*starts[1:], len(body)], strict=True)]
    head = bytearray(body[:HEAD_BYTES])
    for _ in range(chance.randint(1, 3)):
        number = chance.randrange(len(steps)) if steps else 0
        step = bytearray(steps[number]) if steps else bytearray(STEP_BYTES)
        match chance.randrange(7):
            case 0:
                struct.pack_into(">Q", head, 16, chance.choice(OFFSETS))
            case 1:
                struct.pack_into(">I", head, 12, chance.choice(NUMBERS))
            case 2:
                struct.pack_into(">Q", step, 5, chance.choice(OFFSETS))
                steps[number : number + 1] = [bytes(step)]
            case 3:
                struct.pack_into(">I", step, 1, chance.choice(NUMBERS))
                steps[number : number + 1] = [bytes(step)]
            case 4:
                steps[number:number] = [bytes(step)] * chance.choice((1, 2, 100))
                struct.pack_into(">I", head, 12, len(steps))
            case 5:
                del steps[number : number + 1]
                struct.pack_into(">I", head, 12, len(steps))
            case _:
                step[chance.randrange(len(step))] ^= 1 << chance.randrange(8)
                steps[number : number + 1] = [bytes(step)]
    body = head + b"".join(steps)
    return bytes(body) + hashlib.sha256(body).digest()


def outcome(image: bytes, file: bytes, *, is_asserted: bool) -> str:
    """What becomes of an undo: it is done, or it is refused and changes nothing."""
    data = bytearray(image)
    try:
        log = qcow2bm.parse_undo(file)
        qcow2bm.plan_undo(bytes(image), log, is_asserted=is_asserted)
        qcow2bm.undo(data, log, is_asserted=is_asserted)
    except qcow2bm.Qcow2BmError as error:
        message = str(error)
        end = type(error).__name__
    else:
        return "done"
    assert message.isprintable()
    assert data == image
    return end


def ends(seed: int, count: int) -> Counter[str]:
    image, file = repaired()
    assert outcome(image, file, is_asserted=True) == "done"
    assert outcome(image, file, is_asserted=False) == "StateError"
    chance = random.Random(seed)
    return Counter(
        outcome(image, mutant(chance, file), is_asserted=number % 4 > 0) for number in range(count)
    )


@pytest.mark.spec("REPAIR-6")
def test_an_undo_file_that_was_changed_is_refused_or_undoes_what_it_says() -> None:
    found = ends(1, 300)
    assert {"FormatError", "StateError"} <= set(found)


@pytest.mark.deep
@pytest.mark.parametrize("seed", [2, 3])
def test_many_undo_files_that_were_changed(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = ends(seed, COUNT)
    with capsys.disabled():
        print(f"\n{COUNT} undo files that were changed: {dict(found)}")
