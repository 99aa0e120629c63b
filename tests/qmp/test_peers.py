"""QMP peers that answer wrongly, fall silent, or send events without end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from support.fakeqemu import FakeBitmap, FakeQemu
from support.traced_memory import traced_memory

from qcow2bm import rescue
from qcow2bm.errors import Qcow2BmError, QmpError, QmpTimeoutError
from qcow2bm.qmp.names import SCRATCH_NODE

Way = tuple[str | int, ...]
"""The way to a field of an answer."""

WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 1 << 64, 1.5, "", "x", "\ud800", "\x1b[1m\n"),
    *([], [None], [{}], {}, {"a": 1}, ["x"], 5000 * [[]]),
)
"""The values that a field is replaced by; the field is also left out."""

LEFT_OUT = object()


def _verdict(monitor: rescue.Monitor) -> None:
    for verdict in rescue.judge(monitor).nodes:
        rescue.settle(monitor, verdict, "all-dirty")


FUNCTIONS: dict[str, Callable[[rescue.Monitor], object]] = {
    "start": rescue.lift_vetoes,
    "arm": lambda monitor: rescue.arm(monitor, set_mapping=True),
    "verdict": _verdict,
    "save": rescue.save_sidecar,
}


def machine(function: str) -> FakeQemu:
    """A machine for which the function has work to do."""
    fake = FakeQemu()
    fake.nodes["disk"].active = True
    fake.devices["disk"] = "virtio0"
    fake.bitmaps["a"] = FakeBitmap(bits={1, 2, 3}, vetoed=True)
    fake.bitmaps["b"] = FakeBitmap(4096, {7}, recording=False)
    fake.mapping = [{"node-name": "disk", "alias": "d", "bitmaps": [{"name": "a", "alias": "a"}]}]
    if function == "verdict":
        name = "00000000-0000-4000-8000-000000000000"
        fake.bitmaps["qcow2bm-sentinel-" + name] = FakeBitmap(bits={1, 5})
        fake.bitmaps["qcow2bm-twin-" + name] = FakeBitmap(bits={1}, persistent=False)
    return fake


def ways_in(value: object, way: Way = ()) -> Iterator[Way]:
    """The ways to an answer and to all of its fields."""
    yield way
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ways_in(inner, (*way, key))


def replaced(answer: Any, way: Way, value: object) -> Any:
    """An answer with another value for one field."""
    if not way:
        return None if value is LEFT_OUT else value
    answer = deepcopy(answer)
    *outer, last = way
    place = answer
    for key in outer:
        place = place[key]
    if value is LEFT_OUT:
        del place[last]
    else:
        place[last] = value
    return answer


def answers_of(function: str, folder: Path) -> list[object]:
    """The answers to the commands that the function sends to a sound machine, in their order."""
    answers: list[object] = []
    fake = machine(function)

    def alter(command: str, answer: object) -> object:
        answers.append(deepcopy(answer))
        return answer

    fake.alter = alter
    with fake.serving(folder / "sound") as address, rescue.Monitor(address) as monitor:
        FUNCTIONS[function](monitor)
    return answers


def try_with(function: str, address: Path, altered: dict[int, list[tuple[Way, object]]]) -> bool:
    """Whether the function accepts the answers of a peer some of whose answers are altered.

    Each error must be one of this library, and one printable line. A second call, to a peer that
    answers properly, must succeed and leave nothing behind.
    """
    fake = machine(function)
    number = -1

    def alter(command: str, answer: object) -> object:
        nonlocal number
        number += 1
        for way, value in altered.get(number, ()):
            with suppress(TypeError, LookupError):  # another change has removed this field
                answer = replaced(answer, way, value)
        return answer

    fake.alter = alter
    message = ""
    with fake.serving(address):
        try:
            with rescue.Monitor(str(address), timeout=30) as monitor:
                FUNCTIONS[function](monitor)
        except (Qcow2BmError, ValueError) as error:
            message = str(error) or "without a message\n"
        assert message.isprintable(), (altered, message)
        altered = {}
        with rescue.Monitor(str(address), timeout=30) as monitor:
            FUNCTIONS[function](monitor)
    assert SCRATCH_NODE not in fake.nodes
    assert fake.descriptors == []
    assert {"a", "b"} <= set(fake.bitmaps)
    assert fake.bitmaps["a"].bits >= {1, 2, 3}
    return not message


@pytest.mark.spec("RESCUE-21")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_field_is_wrong(function: str, tmp_path: Path) -> None:
    answers = answers_of(function, tmp_path)
    places = [(n, way) for n, answer in enumerate(answers) for way in ways_in(answer)]
    cases = [(n, way, value) for n, way in places for value in (LEFT_OUT, *WRONG)]
    tried = cases[:: max(1, len(cases) // 60)]
    accepted = sum(try_with(function, tmp_path / "s", {n: [(way, v)]}) for n, way, v in tried)
    assert 0 < accepted < len(tried)


@pytest.mark.deep
@pytest.mark.parametrize("function", FUNCTIONS)
def test_many_fields_are_wrong(
    function: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = answers_of(function, tmp_path)
    places = [(n, way) for n, answer in enumerate(answers) for way in ways_in(answer)]
    values = (LEFT_OUT, *WRONG)
    tries: list[dict[int, list[tuple[Way, object]]]] = [
        {n: [(way, value)]} for n, way in places for value in values
    ][::2]
    chance = random.Random(11)
    for _ in range(200):
        altered: dict[int, list[tuple[Way, object]]] = {}
        for n, way in chance.sample(places, 3):
            altered.setdefault(n, []).append((way, chance.choice(values)))
        tries.append(altered)
    accepted = sum(try_with(function, tmp_path / "s", altered) for altered in tries)
    with capsys.disabled():
        print(f"\n{function}: {len(tries)} peers that answer wrongly, {accepted} accepted")


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("query-fdsets", None),
        ("query-fdsets", "x"),
        ("query-fdsets", [{"fdset-id": 1}]),
        ("add-fd", {}),
        ("add-fd", []),
        ("x-debug-block-dirty-bitmap-sha256", {}),
        ("x-debug-block-dirty-bitmap-sha256", []),
    ],
)
def test_the_error_names_the_command(command: str, wrong: object, tmp_path: Path) -> None:
    fake = machine("save")
    fake.alter = lambda sent, answer: wrong if sent == command else answer
    with fake.serving(tmp_path / "s") as address, rescue.Monitor(address) as monitor:
        if wrong == [{"fdset-id": 1}]:  # an fdset without files, which QEMU may have
            rescue.save_sidecar(monitor)
            return
        with pytest.raises(QmpError) as caught:
            rescue.save_sidecar(monitor)
    assert caught.value.command == command


class Impatient(rescue.Monitor):
    """Waits for a moment only where no answer comes, and elsewhere as long as it takes."""

    SECONDS = 0.05

    def __init__(self, address: str, silent_at: str) -> None:
        self._silent_at = silent_at
        super().__init__(address)

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> rescue.Answer:
        self.timeout = self.SECONDS if command == self._silent_at else rescue.DEFAULT_TIMEOUT
        return super().execute(command, arguments)


@pytest.mark.spec("RESCUE-20")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_peer_falls_silent_at_each_command(function: str, tmp_path: Path) -> None:
    sent = machine(function)
    with sent.serving(tmp_path / "sound") as address, rescue.Monitor(address) as monitor:
        FUNCTIONS[function](monitor)
    for command in dict.fromkeys(command for command, _ in sent.commands):
        fake = machine(function)
        fake.silent_at = command
        with fake.serving(tmp_path / "s") as address:
            with Impatient(address, command) as monitor:
                if command == "remove-fd":  # all is saved, and the file is taken back later
                    FUNCTIONS[function](monitor)
                else:
                    with pytest.raises(QmpTimeoutError, match="completes or removes") as caught:
                        FUNCTIONS[function](monitor)
                    assert caught.value.command == command
                    assert caught.value.seconds == Impatient.SECONDS
                with pytest.raises(QmpError, match="the connection is closed"):
                    monitor.execute("query-status")
            fake.silent_at = ""
            with rescue.Monitor(address) as monitor:
                FUNCTIONS[function](monitor)
        assert SCRATCH_NODE not in fake.nodes
        assert fake.descriptors == []


def test_events_without_end_take_no_memory_and_end_at_the_deadline(tmp_path: Path) -> None:
    fake = machine("start")
    fake.floods_at = "query-status"
    with (
        fake.serving(tmp_path / "s") as address,
        rescue.Monitor(address) as monitor,
        traced_memory() as memory,
    ):
        monitor.timeout = 1
        with pytest.raises(QmpTimeoutError):
            monitor.execute("query-status")
    assert memory.peak < 48 << 20  # qemu.qmp buffers twice 10 MB


def test_a_silent_server_is_not_waited_for(tmp_path: Path) -> None:
    fake = machine("start")
    fake.silent_at = "qmp_capabilities"
    with fake.serving(tmp_path / "s") as address, pytest.raises(QmpError, match="no greeting"):
        rescue.Monitor(address, timeout=0.2)


def test_a_peer_stops_reading_in_the_middle_of_a_command(tmp_path: Path) -> None:
    """What is not sent yet must not be waited for, either."""
    fake = machine("start")
    fake.deaf = True
    with (
        fake.serving(tmp_path / "s") as address,
        rescue.Monitor(address) as monitor,
    ):
        monitor.timeout = 0.3
        with pytest.raises(QmpTimeoutError):
            monitor.execute("query-status", {"much": (8 << 20) * "x"})


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_positive(timeout: float) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        rescue.Monitor("nowhere", timeout)


def test_the_cluster_size_of_another_kind_of_node_is_of_no_interest(tmp_path: Path) -> None:
    fake = machine("start")

    def alter(command: str, answer: Any) -> Any:
        if command == "query-named-block-nodes":
            other = {"node-name": "san", "ro": False, "drv": "iscsi", "active": True}
            answer.append(other | {"image": {"virtual-size": 512, "cluster-size": 15 << 20}})
        return answer

    fake.alter = alter
    with fake.serving(tmp_path / "s") as address, rescue.Monitor(address) as monitor:
        assert all(one.is_safe for one in rescue.lift_vetoes(monitor).bitmaps)
