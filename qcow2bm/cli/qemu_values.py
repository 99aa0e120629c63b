"""Sizes, and names of image files, as the arguments of QEMU's programs have them.

*Spec*: spec/from-qemu-img.md, "The command bitmap".
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentTypeError
from typing import Any

from qcow2bm.units import escape

_SIZE = re.compile(
    r"\s*\+?(?:(?P<hex>0x[0-9a-f]{1,40})|(?P<whole>[0-9]{1,40})(?P<part>\.[0-9]{0,40})?)"
    r"(?P<unit>[bkmgtpe])?",
    re.IGNORECASE | re.ASCII,
)
_OPTION = re.compile(r"((?:[^,]|,,)+)(?:,|$)", re.DOTALL)
_PROTOCOL = re.compile(r"([^:/]*):")


def granularity(text: str) -> int:
    """Returns the size in bytes that the value of -g means, such as 64k, 0.5M or 0x10000."""
    found = _SIZE.fullmatch(text)
    if found:
        factor = 1 << 10 * "bkmgtpe".index((found["unit"] or "b").lower())
        part = float(f"0{found['part'] or ''}") * factor
        size = int(found["hex"] or found["whole"], 0 if found["hex"] else 10) * factor + int(part)
        if size < 1 << 63 and (factor > 1 or not part):
            return size
    raise ArgumentTypeError(
        f'Invalid granularity specified: "{escape(text)}"; write a number of bytes, or one with '
        "k, M, G, T, P or E"
    )


def plain_path(filename: str, image_format: str | None, *, is_options: bool) -> str:
    """Returns the path of the plain file with a qcow2 image that an argument names.

    Args:
        filename: a path, ``file:`` and a path, or ``json:`` and the options of a block device.
        image_format: the value of -f or -F; None if the option is not given.
        is_options: whether --image-opts is given: the argument then is KEY=VALUE,...

    Raises:
        ValueError: the argument names something else; the message says what.
    """
    if is_options:
        return _path_of_options(_parse_options(filename), image_format)
    if filename.startswith("json:"):
        return _path_of_options(_parse_json(filename.removeprefix("json:")), image_format)
    _require_qcow2("qcow2" if image_format is None else image_format)
    protocol = _PROTOCOL.match(filename)
    if protocol and protocol[1] != "file":
        raise ValueError(
            f"Unknown protocol '{escape(protocol[1])}': this command edits plain files; before a "
            "path with a colon, write file: or ./"
        )
    return _path(filename.removeprefix("file:"))


def _path_of_options(options: dict[str, Any], image_format: str | None) -> str:
    path = _path(options.pop("file.filename", None))
    driver = options.pop("driver", "qcow2")
    _require_qcow2(driver if image_format is None else image_format)
    if options.pop("file.driver", "file") != "file":
        raise ValueError("file.driver is not file: this command edits plain files")
    if options:
        raise ValueError(
            f'option "{escape(next(iter(options)))}" is not supported: give driver, file.driver '
            "and file.filename only"
        )
    return path


def _path(text: object) -> str:
    if not text or not isinstance(text, str):
        raise ValueError(
            "The 'file' block driver requires a file name: give file.filename=PATH, or a path alone"
        )
    return text


def _require_qcow2(image_format: object) -> None:
    if image_format != "qcow2":
        raise ValueError(f'the format is not qcow2 but "{escape(str(image_format))}"')


def _parse_options(text: str) -> dict[str, Any]:
    """Returns the options in KEY=VALUE,...; two commas stand for a comma in a value."""
    pairs = (found[1].partition("=") for found in _OPTION.finditer(text))
    return {key: value.replace(",,", ",") for key, _, value in pairs}


def _parse_json(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text, object_pairs_hook=_flat)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Could not parse the JSON options: {escape(str(error))}") from None
    if not isinstance(options, dict):
        raise ValueError("Invalid JSON object given")
    return options


def _flat(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object with the keys of the objects inside of it: "file.filename"."""
    flat: dict[str, Any] = {}
    for key, value in pairs:
        inner = (
            {f"{key}.{name}": content for name, content in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        if flat.keys() & inner.keys():
            raise ValueError(f'the key "{key}" is given twice')
        flat |= inner
    return flat
