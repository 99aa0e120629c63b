"""Parsing and building with construct, whose errors become FormatError, and facts about schemas.

The schemas themselves are in the other modules of this folder.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import construct

from qcow2bm.errors import FormatError


def parse(
    schema: Any,  # noqa: ANN401
    data: bytes,
    structure: str,
    offset: int,
    offsets: Mapping[str, int] = MappingProxyType({}),
) -> Any:  # noqa: ANN401
    """Parses ``data`` with ``schema`` and returns the Container of construct.

    Messages need ``structure``, a name, ``offset``, the host offset of ``data``, and ``offsets``,
    the byte offsets of fields in ``data`` as far as they are known.

    Raises:
        FormatError: ``data`` does not fit the schema.
    """
    try:
        return schema.parse(data)
    except construct.ConstructError as error:
        field = _field_of(error)
        place = offset + offsets.get(field, 0)
        raise FormatError(structure, field, place, _reason_of(error)) from error


def build(schema: Any, values: Mapping[str, object], structure: str) -> bytes:  # noqa: ANN401
    """Builds the bytes of ``values`` with ``schema``; messages call them ``structure``.

    Raises:
        FormatError: a value does not fit its field.
    """
    try:
        return bytes(schema.build(values))
    except construct.ConstructError as error:
        raise FormatError(structure, _field_of(error), 0, _reason_of(error)) from error


def flat_struct(schema: Any) -> struct.Struct:  # noqa: ANN401
    """Returns a ``struct.Struct`` with exactly the fields of a construct Struct of plain integers.

    construct interprets a schema field by field, which is too slow for tens of thousands of
    records. The result reads the same fields, taken from the schema itself, in one call.

    Raises:
        ValueError: the fields differ in byte order.
    """
    formats = [field.subcon.fmtstr for field in schema.subcons]
    orders = {text[0] for text in formats}
    if len(orders) != 1:
        raise ValueError("the fields differ in byte order")
    return struct.Struct(orders.pop() + "".join(text[1:] for text in formats))


def field_offsets(schema: Any) -> dict[str, int]:  # noqa: ANN401
    """The byte offset of each field of a construct Struct of fixed size, by name."""
    offsets, position = {}, 0
    for field in schema.subcons:
        offsets[str(field.name)] = position
        position += field.sizeof()
    return offsets


def bit_masks(schema: Any) -> dict[str, int]:  # noqa: ANN401
    """The mask of each field of a construct BitStruct that was read as a big-endian integer."""
    masks: dict[str, int] = {}
    shift = 8 * schema.sizeof()
    for field in schema.subcon.subcons:
        width = field.subcon.length
        shift -= width
        masks[field.name] = ((1 << width) - 1) << shift
    return masks


def _field_of(error: construct.ConstructError) -> str:
    path = error.path or ""
    return path.rpartition(" -> ")[2] if " -> " in path else ""


def _reason_of(error: construct.ConstructError) -> str:
    if isinstance(error, construct.StreamError):
        return "is cut off"
    return "is invalid"
