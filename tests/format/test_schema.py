from __future__ import annotations

import construct
import pytest

from qcow2bm.errors import FormatError
from qcow2bm.format.schema import bit_masks, build, flat_struct, parse

PAIR = construct.Struct("first" / construct.Int8ub, "second" / construct.Int16ub)


def test_a_flat_struct_has_the_fields_of_its_schema_and_no_alignment() -> None:
    flat = flat_struct(PAIR)
    assert flat.size == PAIR.sizeof() == 3
    assert flat.unpack(b"\1\2\3") == (1, 0x0203)


def test_a_flat_struct_of_mixed_byte_order_is_refused() -> None:
    mixed = construct.Struct("big" / construct.Int16ub, "little" / construct.Int16ul)
    with pytest.raises(ValueError, match="byte order"):
        flat_struct(mixed)


def test_masks_are_counted_from_the_highest_bit() -> None:
    word = construct.BitStruct(
        "high" / construct.BitsInteger(3), "middle" / construct.BitsInteger(12),
        "low" / construct.BitsInteger(1),
    )  # fmt: skip
    assert bit_masks(word) == {"high": 0xE000, "middle": 0x1FFE, "low": 0x0001}


def test_faults_become_format_errors_that_name_the_field() -> None:
    with pytest.raises(FormatError, match=r"^pair: second at 0x\w+ is cut off$") as caught:
        parse(PAIR, b"\1\2", "pair", 0x10)
    assert isinstance(caught.value.__cause__, construct.StreamError)
    with pytest.raises(FormatError, match=r"^pair: first at 0x0 is invalid$") as caught:
        build(PAIR, {"first": 256, "second": 0}, "pair")
    assert isinstance(caught.value.__cause__, construct.FormatFieldError)


def test_a_fault_of_the_whole_names_no_field() -> None:
    with pytest.raises(FormatError, match=r"^number at 0x10 is cut off$"):
        parse(construct.Int32ub, b"", "number", 0x10)
