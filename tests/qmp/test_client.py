"""Connections: their faults, the answers, and that no package is loaded before it is needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.console import ROOT
from support.fakeqemu import FakeQemu

from qcow2bm.errors import QmpError, QmpRefusedError, UnsupportedError
from qcow2bm.qmp import client
from qcow2bm.qmp.client import Monitor
from qcow2bm.qmp.queries import query_machine


def test_a_command_is_answered(qemu: FakeQemu, address: str) -> None:
    with Monitor(address) as monitor:
        assert monitor.execute("query-status")["status"].text() == "running"
        monitor.close()  # may be called twice
    with Monitor(address) as monitor:  # the next one is served
        assert query_machine(monitor).status == "running"


def test_a_refusal_is_one_line(qemu: FakeQemu, address: str) -> None:
    qemu.refuse = lambda command, arguments: "no\n\x1b[1m way" if command == "stop" else None
    with Monitor(address) as monitor:
        with pytest.raises(QmpRefusedError) as caught:
            monitor.execute("stop")
        assert str(caught.value) == "the QMP command stop failed: no \\x1b[1m way"
        monitor.execute("query-status")  # it goes on


@pytest.mark.spec("RESCUE-2")
def test_a_lost_connection_is_said_and_nothing_is_sent_again(qemu: FakeQemu, address: str) -> None:
    qemu.hang_up_after = 0
    with Monitor(address) as monitor:
        for _ in range(2):
            with pytest.raises(QmpError, match="transaction failed: the connection is lost") as e:
                monitor.transaction([])
            assert not isinstance(e.value, QmpRefusedError)
    assert qemu.changes() == ["transaction"]


def test_a_path_where_no_server_listens(tmp_path: Path) -> None:
    with pytest.raises(QmpError, match="connecting to QMP failed: No such file or directory"):
        Monitor(str(tmp_path / "none"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(QmpError, match="connecting to QMP failed: Connection refused"):
        Monitor(str(tmp_path / "file"))


@pytest.mark.parametrize("greeting", [{"hello": 1}, [], {"QMP": 1}])
def test_whatever_else_greets(qemu: FakeQemu, address: str, greeting: object) -> None:
    qemu.greeting = greeting
    with pytest.raises(QmpError, match="connecting to QMP failed: ") as caught:
        Monitor(address)
    assert str(caught.value).isprintable()


def test_a_server_that_is_busy_with_another_client(
    qemu: FakeQemu, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_GREETING_SECONDS", 0.05)
    with Monitor(address), pytest.raises(QmpError, match="another client is connected"):
        Monitor(address)


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("/run/vm.sock", "/run/vm.sock"),
        ("vm.sock", "vm.sock"),
        ("localhost:4444", ("localhost", 4444)),
        ("[::1]:4444", ("::1", 4444)),
        ("./a:1", "./a:1"),
        ("a:b", "a:b"),
    ],
)
def test_what_is_a_path(address: str, parsed: object) -> None:
    assert client._parse(address) == parsed


def test_a_path_that_looks_like_a_port_is_a_path(
    qemu: FakeQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with qemu.serving(Path("vm:1")), Monitor("vm:1") as monitor:
        monitor.execute("query-status")


def test_over_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(QmpError, match="Connection refused"):
        Monitor(f"127.0.0.1:{port}")


@pytest.mark.spec("RESCUE-3")
def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)
    with pytest.raises(UnsupportedError, match=r'install it: pip install "qcow2bm\[qmp\]"'):
        Monitor("anywhere")


@pytest.mark.spec("RESCUE-3")
def test_nothing_else_loads_the_package() -> None:
    program = (
        "import sys, qcow2bm, qcow2bm.cli.rescue, qcow2bm.qmp.veto, qcow2bm.qmp.arm\n"
        "import qcow2bm.qmp.verdict, qcow2bm.qmp.copies\n"
        "assert 'qemu' not in sys.modules and 'qemu.qmp' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def without(field: str) -> dict[str, object]:
    """A node that lacks one field."""
    node = {"node-name": "disk", "drv": "qcow2", "ro": False, "image": {"virtual-size": 512}}
    return {key: value for key, value in node.items() if key != field}


NODES = "query-named-block-nodes"
MAPPING = "block-bitmap-mapping"
BITMAP = {"name": "a", "granularity": 512, "count": 0, "recording": 1}


@pytest.mark.parametrize(
    ("command", "answer", "reason"),
    [
        ("query-status", {}, "the answer has no status"),
        ("query-status", [], "the answer is not an object"),
        ("query-status", {"status": 1}, "the field status of the answer is not a string"),
        ("query-migrate", 1, "the answer is not an object"),
        ("query-migrate", {"status": None}, "the field status of the answer is not a string"),
        (
            "query-block",
            [{"device": 1, "inserted": {}}],
            r"\[0\].device of the answer is not a str",
        ),
        ("query-block", [{"device": "d", "inserted": {}}], r"\[0\].inserted .* has no node-name"),
        ("query-migrate-parameters", {MAPPING: {}}, f"{MAPPING} of the answer is not an array"),
        ("query-migrate-parameters", {MAPPING: [{"node-name": "n"}]}, r"\[0\] .* has no bitmaps"),
        (NODES, {"disk": {}}, "the answer is not an array"),
        (NODES, [without("drv")], r"the field \[0\] of the answer has no drv"),
        (NODES, [without("image")], r"the field \[0\] of the answer has no image"),
        (NODES, [without("") | {"ro": 0}], r"\[0\].ro of the answer is not a boolean"),
        (
            NODES,
            [without("") | {"image": {"virtual-size": True}}],
            "virtual-size .* not an integer",
        ),
        (NODES, [without("") | {"dirty-bitmaps": [BITMAP]}], r"bitmaps\[0\].recording .* boolean"),
    ],
)
def test_an_answer_that_qemu_would_not_give_names_the_field(
    qemu: FakeQemu, address: str, command: str, answer: object, reason: str
) -> None:
    qemu.answers[command] = answer
    with Monitor(address) as monitor, pytest.raises(QmpError, match=reason) as caught:
        query_machine(monitor)
    assert caught.value.command == command


def test_a_socket_that_is_connected_serves_as_well(qemu: FakeQemu, address: str) -> None:
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(address)
    with Monitor(connected) as monitor:
        assert monitor.execute("query-status")["status"].text() == "running"
    assert connected.fileno() == -1
