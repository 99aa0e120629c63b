"""The command ``demo --qemu``: how short an offload makes the stop of a machine on QEMU.

The machine has no guest: QEMU's own qemu-io writes instead. It migrates to nowhere, and goes on.

*Spec*: spec/cli.md, "Demo".
"""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, cast

from qcow2bm import live, open
from qcow2bm.cli.demo_image import make_empty
from qcow2bm.cli.messages import CommandError
from qcow2bm.cli.output import count
from qcow2bm.units import format_size

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

_DISK_BYTES = 16 << 40
_GRANULARITY = 64 << 10
_BITMAP_BYTES = _DISK_BYTES // _GRANULARITY // 8
_BITMAPS = 4
_WRITES = 300
_NODE = "disk"
_PROGRAMS = (f"qemu-system-{platform.machine()}", "qemu-kvm", "/usr/libexec/qemu-kvm")

ROOM_BYTES = (2 * _BITMAPS + 2) * _BITMAP_BYTES
"""How many bytes the image, the offload file and a scratch image take."""


def demonstrate(folder: Path) -> None:
    """Shows two stops of a machine, one as it is and one after an offload.

    Raises:
        CommandError: QEMU or the package qemu.qmp is missing, or QEMU does not start.
        Qcow2BmError: as the functions of `live` do.
    """
    program = _find_qemu()
    try:
        from qemu.qmp import QMPError
    except ImportError as error:
        reason = 'the package qemu.qmp is missing; install it: pip install "qcow2bm[qmp]"'
        raise CommandError("demo", reason) from error
    image = folder / "demo.qcow2"
    print(
        f"A disk of {format_size(_DISK_BYTES)}, and {count(_BITMAPS, 'bitmap')} of "
        f"{format_size(_BITMAP_BYTES)} with random bits: {image}",
        flush=True,
    )
    _make_image(image)
    try:
        written = asyncio.run(_run(program, image, folder))
    except (QMPError, OSError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CommandError("demo", f"QEMU has ended ({reason})") from error
    _require_every_write(image, written)


def _find_qemu() -> str:
    for name in _PROGRAMS:
        if found := shutil.which(name):
            return found
    raise CommandError("demo", f"there is no QEMU: {_PROGRAMS[0]} is not installed")


def _make_image(path: Path) -> None:
    make_empty(path, _DISK_BYTES)
    with open(path, "r+") as image, image.edit() as edit:
        for number in range(_BITMAPS):
            edit.load(f"bitmap{number}", _GRANULARITY, Random(number).randbytes(_BITMAP_BYTES))


async def _run(program: str, image: Path, folder: Path) -> list[int]:
    """Runs the machine, and returns where it wrote."""
    random = Random(0)
    written: list[int] = []
    path = str(folder / "demo.bitmaps")
    async with _machine(program, image, folder) as client:

        async def write() -> None:
            for _ in range(_WRITES):
                written.append(random.randrange(_DISK_BYTES // _GRANULARITY) * _GRANULARITY)
                line = f'qemu-io {_NODE} "write -q {written[-1]} {_GRANULARITY}"'
                await client.execute("human-monitor-command", {"command-line": line})

        monitor = live.AsyncioMonitor(client)
        await write()
        plain = await _stop(client)
        print(f"as it is: the machine stops for {1000 * plain:7.1f} ms to migrate", flush=True)
        done = await monitor.run(live.offload, path)
        taken = count(len(done.plan.bitmaps), "bitmap")
        print(f"live offload: {taken} in a file, and one coarse bitmap in the machine records")
        await write()
        short = await _stop(client)
        print(f"after it: the machine stops for {1000 * short:7.1f} ms to migrate", flush=True)
        # Nothing received the migration, so no other machine can have written.
        back = await monitor.run(live.restore, path, is_alone=True)
        restored = count(sum(one.outcome == "restored" for one in back.bitmaps), "bitmap")
        print(f"live restore: {restored} back in the machine")
        await _quit(client)
    print(f"\n{plain / short:.0f} times shorter")
    return written


async def _quit(client: QMPClient) -> None:
    """Has QEMU store the bitmaps, and end."""
    from qemu.qmp import QMPError

    with suppress(QMPError, EOFError, OSError):  # QEMU may hang up before it answers
        await client.execute("quit")


@asynccontextmanager
async def _machine(program: str, image: Path, folder: Path) -> AsyncIterator[QMPClient]:
    """A machine without a guest that has the image, and a connection to its QMP server."""
    from qemu.qmp import ConnectError, QMPClient

    below = {"driver": "file", "filename": image.name}
    disk = {"driver": "qcow2", "node-name": _NODE, "file": below}
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [
                *(program, "-nodefaults", "-no-user-config", "-display", "none"),
                *("-machine", "none", "-blockdev", json.dumps(disk)),
                *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                *("-mon", "chardev=qmp,mode=control"),
            ],
            cwd=folder,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())  # it raises the same
    client = QMPClient("demo")
    try:
        ours.setblocking(False)
        try:
            await client.connect(ours)
        except ConnectError as error:
            process.kill()
            said = " ".join(process.communicate()[1].decode(errors="replace").split())
            raise CommandError("demo", f"QEMU does not start: {said}") from error
        yield client
        await asyncio.to_thread(process.wait)  # it was told to quit
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
        with suppress(Exception):  # it is lost: QEMU has ended
            await client.disconnect()
        ours.close()


async def _stop(client: QMPClient) -> float:
    """Migrates to nowhere, and returns how many seconds the machine stopped; it goes on then."""
    state = [{"capability": "events", "state": True}]
    await client.execute("migrate-set-capabilities", {"capabilities": state})
    with client.listener(("STOP", "MIGRATION")) as listener:
        await client.execute("migrate", {"uri": "exec:cat >/dev/null"})
        while True:
            status: Any = await client.execute("query-status")
            migration: Any = await client.execute("query-migrate")
            if migration.get("status") in ("failed", "cancelled"):
                raise CommandError("demo", "QEMU did not migrate")
            if migration.get("status") == "completed" and status["status"] == "postmigrate":
                break
            await asyncio.sleep(0.05)
        times: dict[str, float] = {}
        for event in listener.clear():
            message = cast("dict[str, Any]", event)
            time, data = message["timestamp"], message.get("data", {})
            name = data.get("status", message["event"])
            times[name] = time["seconds"] + time["microseconds"] / 1e6
    await client.execute("cont")
    return times["completed"] - times["STOP"]


def _require_every_write(path: Path, written: list[int]) -> None:
    with open(path) as image:
        for bitmap in image.bitmaps.values():
            bits = bitmap.packed()
            granules = (start // _GRANULARITY for start in written)
            if not all(bits[granule // 8] >> granule % 8 & 1 for granule in granules):
                raise CommandError("demo", f"{bitmap.name} misses a write: please report it")
        print(f"{count(len(written), 'write')}, all of them in each bitmap")
