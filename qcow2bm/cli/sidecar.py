"""The commands ``sidecar save``, ``sidecar load`` and ``sidecar dump``.

*Spec*: spec/cli.md, "Sidecars".
"""

from __future__ import annotations

import argparse

from qcow2bm.api import Image, open
from qcow2bm.api import sidecar as saved_bitmaps
from qcow2bm.cli import files, report
from qcow2bm.cli.console import fail, say
from qcow2bm.migration.sentinel import is_sentinel
from qcow2bm.migration.sidecar import Sidecar, read_sidecar, write_sidecar
from qcow2bm.storage.new_file import require_new, write_new
from qcow2bm.units import escape


def run(arguments: argparse.Namespace) -> int:
    """Does one of the commands; returns the exit status."""
    return _ACTIONS[arguments.action](arguments)


def _save(arguments: argparse.Namespace) -> int:
    given, is_live = arguments.names, arguments.qmp is not None
    if len(given) != 2 - is_live:
        arguments.parser.error("give FILE" if is_live else "give IMAGE and FILE, or --qmp and FILE")
    if is_live and (arguments.sentinel or arguments.force_share):
        arguments.parser.error("--sentinel and -U are of an IMAGE, not of --qmp")
    if arguments.sentinel and arguments.force_share:
        arguments.parser.error("--sentinel changes the image, so nobody else may use it: no -U")
    if given[-1] == files.STANDARD:
        arguments.parser.error("FILE has to be a file")
    if arguments.node is not None and not is_live:
        arguments.parser.error("--node is of --qmp")
    arguments.image = arguments.qmp if is_live else given[0]
    require_new(given[-1])
    try:
        sidecar, left_out = (_from_vm if is_live else _from_image)(arguments)
    except ValueError as error:
        return fail(arguments.image, str(error))
    if not any(not is_sentinel(bitmap.name) for bitmap in sidecar.bitmaps):
        return fail(arguments.image, "no bitmap is valid")
    write_new(given[-1], write_sidecar(*sidecar))
    for what in left_out if not arguments.quiet else ():
        say(f"warning: {escape(arguments.image)}: {what}")
    return 0


def _from_image(arguments: argparse.Namespace) -> tuple[Sidecar, list[str]]:
    if arguments.sentinel:
        with open(arguments.image, "r+") as image:
            if _saved(image)[0].bitmaps:
                saved_bitmaps.add_sentinel(image)
            return _saved(image)
    with report.open_image(arguments) as image:
        return _saved(image)


def _saved(image: Image) -> tuple[Sidecar, list[str]]:
    valid, left_out = report.valid_bitmaps(image)
    nameless = [f"bitmap @{b.index} has no name, and is left out" for b in valid if not b.name]
    return saved_bitmaps.collect(
        image, filter(lambda bitmap: bitmap.name, valid)
    ), left_out + nameless


def _from_vm(arguments: argparse.Namespace) -> tuple[Sidecar, list[str]]:
    from qcow2bm.qmp.rescue import Monitor, NodeChoiceError, save_sidecar

    try:
        with Monitor(arguments.qmp) as monitor:
            sidecar, left_out = save_sidecar(monitor, arguments.node)
    except NodeChoiceError as error:
        listed = ", ".join(f'"{escape(node)}"' for node in error.nodes)
        reason = f"several nodes have bitmaps: choose one with --node ({listed})"
        raise ValueError(reason) from error
    return sidecar, [f'bitmap "{escape(b.name)}" is {why}, and left out' for b, why in left_out]


def _load(arguments: argparse.Namespace) -> int:
    from qcow2bm.cli.restore import restore

    with files.named(arguments, arguments.file):
        sidecar = read_sidecar(files.pieces(arguments.file))
    return restore(arguments, sidecar.bitmaps, sidecar.header)


def _dump(arguments: argparse.Namespace) -> int:
    from qcow2bm.cli.sidecar_dump import print_dump

    path, arguments.image = arguments.image, files.name_of(arguments.image)
    print_dump(arguments.image, read_sidecar(files.pieces(path)), arguments.output)
    return 0


_ACTIONS = {"save": _save, "load": _load, "dump": _dump}
