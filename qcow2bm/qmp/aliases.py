"""The aliases of nodes in a migration stream, where no block-bitmap-mapping gives others.

*Spec*: spec/rescue.md, "Arm".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from qcow2bm.qmp.machine import Node

_FILTERS = (  # drivers that only pass requests on, by the names that QEMU has for them
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "throttle",
)


class Device(NamedTuple):
    """A device of the guest, and the node of its disk."""

    name: str
    node: str


def default_aliases(
    devices: Iterable[Device], nodes: Sequence[Node], children: Callable[[], dict[str, str]]
) -> dict[str, str]:
    """Returns, by node, the alias that QEMU takes from a device.

    QEMU skips filters that have no bitmaps: the alias belongs to the first other node below.

    Args:
        devices: the devices.
        nodes: all nodes.
        children: returns the node below each node; called once, and only if there are filters.
    """
    by_name = {node.name: node for node in nodes}
    below: dict[str, str] | None = None
    aliases = {}
    for device in devices:
        name = device.node
        while (node := by_name.get(name)) and node.driver in _FILTERS and not node.bitmaps:
            below = dict(children()) if below is None else below
            if name not in below:
                break
            name = below.pop(name)
        aliases[name] = device.name
    return aliases
