"""Chooses the way to the QMP of a machine by its address."""

from __future__ import annotations

import os

from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.commands import DEFAULT_TIMEOUT, QmpCommands
from qcow2bm.qmp.libvirt import LibvirtMonitor

_LIBVIRT = "libvirt:"


def connect(address: str, timeout: float = DEFAULT_TIMEOUT) -> QmpCommands:
    """Connects to a running QEMU.

    Args:
        address: the path of a unix socket, HOST:PORT, or ``libvirt:DOMAIN``. A path that exists is
            taken as a path, whatever it looks like.
        timeout: how many seconds QEMU may take to answer each command.

    Raises as `Monitor` or `LibvirtMonitor` does.
    """
    if address.startswith(_LIBVIRT) and not os.path.exists(address):
        return LibvirtMonitor(address.removeprefix(_LIBVIRT), timeout)
    return Monitor(address, timeout)
