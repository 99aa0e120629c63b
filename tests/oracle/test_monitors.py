"""Other ways to a machine's QMP than a socket: through virsh, and through a client of asyncio."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from qemu.qmp import QMPClient
from support import virsh
from support.console import run
from support.offloaded import LATER, MEANWHILE, Scene, assert_back, make_disk
from support.vm import Machine

import qcow2bm
from qcow2bm import live, rescue

pytestmark = pytest.mark.usefixtures("system_emulator")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A machine with its bitmaps, which have not been taken out yet."""
    disk, address = make_disk(tmp_path), tmp_path / "qmp"
    with Machine(disk.path, monitor=address) as source:
        yield Scene(disk, tmp_path / "offloaded", address, source)


@pytest.fixture
def libvirt(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a machine whose socket virsh has."""
    for name, value in virsh.install(tmp_path, scene.address).items():
        monkeypatch.setenv(name, value)
    return f"libvirt:{virsh.DOMAIN}"


@pytest.mark.spec("LIBVIRT-1")
def test_out_and_back_through_virsh(scene: Scene, libvirt: str) -> None:
    with live.connect(libvirt) as monitor:
        live.offload(monitor, str(scene.path))
        scene.write(scene.source, *MEANWHILE)
        done = live.restore(monitor, str(scene.path))
        assert {one.outcome for one in done.bitmaps} == {"restored"}
        assert monitor.execute("query-fdsets").raw == []  # what was lent was taken back
    scene.source.quit()
    assert_back(scene.disk, scene.written)


@pytest.mark.spec("LIBVIRT-1")
def test_the_commands_take_the_address(scene: Scene, libvirt: str, tmp_path: Path) -> None:
    assert run(["live", "status", "--qmp", libvirt], tmp_path).status == 0
    assert run(["rescue", "start", "--qmp", libvirt, "--dry-run"], tmp_path).status == 0
    done = run(["sidecar", "save", "--qmp", libvirt, "--node", "disk", "saved"], tmp_path)
    assert (done.status, done.err) == (0, "")


@pytest.mark.spec("LIBVIRT-2")
def test_what_virsh_says_is_the_error(libvirt: str, tmp_path: Path) -> None:
    with pytest.raises(qcow2bm.QmpError, match="virsh: failed to get domain 'other'"):
        live.connect("libvirt:other")
    done = run(["live", "status", "--qmp", "libvirt:other"], tmp_path)
    assert done.status == 1
    assert done.err.startswith("qcow2bm: libvirt:other: ")
    assert len(done.err.splitlines()) == 1
    with live.connect(libvirt) as monitor, pytest.raises(qcow2bm.QmpRefusedError, match="frob"):
        monitor.execute("frob")


@pytest.mark.spec("LIBVIRT-2")
def test_without_virsh(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(qcow2bm.UnsupportedError, match="libvirt without the program virsh"):
        live.connect("libvirt:vm1")


@pytest.mark.spec("LIBVIRT-2")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exec sleep 60", "no answer within 0.5 seconds"),
        ("echo nonsense", "no answer of QEMU"),
        ("echo []", "no answer of QEMU"),
        ("exit 3", "status 3"),
    ],
)
def test_a_virsh_that_does_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    program = tmp_path / "virsh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(qcow2bm.QmpError, match=message):
        live.connect("libvirt:vm1", timeout=0.5 if "sleep" in script else 60)


def test_a_path_that_looks_like_a_domain_is_a_path(scene: Scene) -> None:
    address = scene.address.with_name("libvirt:vm1")
    address.symlink_to(scene.address)
    with live.connect(str(address)) as monitor:
        assert isinstance(monitor, live.Monitor)


# --- asyncio --------------------------------------------------------------------------------------


@asynccontextmanager
async def connected(scene: Scene) -> AsyncIterator[QMPClient]:
    client = QMPClient("test")
    await client.connect(str(scene.address))
    try:
        yield client
    finally:
        with suppress(EOFError):  # QEMU may have been killed
            await client.disconnect()


def test_out_and_back_from_a_task(scene: Scene) -> None:
    """The loop goes on meanwhile, and the client takes commands of others."""
    asked = 0

    async def work() -> None:
        nonlocal asked
        async with connected(scene) as client:
            monitor = live.AsyncioMonitor(client)
            offloading = asyncio.create_task(monitor.run(live.offload, str(scene.path), exact=True))
            while not offloading.done():
                assert await client.execute("query-status")
                asked += 1
            assert (await offloading).left == ()
            scene.write(scene.source, *MEANWHILE)
            done = await monitor.run(live.restore, str(scene.path))
            assert {one.outcome for one in done.bitmaps} == {"restored"}

    asyncio.run(work())
    assert asked > 10
    scene.source.quit()
    assert_back(scene.disk, scene.written, is_exact=True)


def test_errors_come_out_of_the_task(scene: Scene) -> None:
    async def work() -> None:
        async with connected(scene) as client:
            monitor = live.AsyncioMonitor(client)
            with pytest.raises(ValueError, match="no node"):
                await monitor.run(live.offload, str(scene.path), ["other"])
            with pytest.raises(qcow2bm.QmpRefusedError, match="frob"):
                await asyncio.to_thread(monitor.execute, "frob")
            found = await monitor.run(live.status)
            assert {one.bitmap.name for one in found.bitmaps} >= {"daily"}
            done = await monitor.run(rescue.lift_vetoes, dry_run=True)
            assert done.bitmaps
            scene.source.kill()
            with pytest.raises(qcow2bm.QmpError, match="the connection is lost"):
                await monitor.run(live.status)

    asyncio.run(work())


@pytest.mark.parametrize("steps", [0, 1, 5, 20, 60])
def test_a_task_that_is_cancelled_ends_when_the_work_has_ended(scene: Scene, steps: int) -> None:
    async def work() -> None:
        async with connected(scene) as client:
            monitor = live.AsyncioMonitor(client)
            task = asyncio.create_task(monitor.run(live.offload, str(scene.path)))
            for _ in range(steps):
                await asyncio.sleep(0.001)
            was_done = task.done()
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            if was_done:
                await task
            else:
                with pytest.raises(asyncio.CancelledError):
                    await task
            scene.write(scene.source, *MEANWHILE)
            if scene.path.exists():
                done = await monitor.run(live.restore, str(scene.path))
                assert all(one.outcome == "restored" for one in done.bitmaps)

    asyncio.run(work())
    scene.write(scene.source, LATER)
    scene.source.quit()
    assert_back(scene.disk, scene.written)
