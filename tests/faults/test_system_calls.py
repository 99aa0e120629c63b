"""A real process whose system calls fail, by strace: it says so, and QEMU opens what is left.

Where strace is missing or not allowed to trace the tests are skipped; with QCOW2BM_REQUIRE_QEMU
set they fail.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.faulty_storage import Fault, FaultyStorage
from support.images import build_image
from support.interrupted_edits import BACKING_NAME, EDITS, calls, plan, state_of, states
from support.qemu import LEAKS, TOOLS, Disk, run

import qcow2bm
from qcow2bm.errors import CommitError

pytestmark = pytest.mark.qemu

CALLS = ("pwritev2", "fdatasync")
PROGRAM = """
import sys
import qcow2bm
from support.interrupted_edits import EDITS

try:
    with qcow2bm.open(sys.argv[2], "r+") as image:
        EDITS[sys.argv[1]].run(image)
except qcow2bm.Qcow2BmError as error:
    print(getattr(error, "outcome", "refused"), error, file=sys.stderr)
    sys.exit(3)
"""
REFUSED = 3


class Injection(NamedTuple):
    """The way in which strace makes a system call fail instead of letting it happen."""

    call: str
    effect: str

    def options(self, when: str) -> tuple[str, ...]:
        """The option of strace; ``when`` is a call's number from 1, with "+" for all later ones."""
        fault = f"inject={self.call}:{self.effect}:when={when}"
        # Other system calls then run at full speed. With it, this strace loses injected signals.
        fast = () if self.effect == DEADLY else ("--seccomp-bpf",)
        return *fast, "-e", f"trace={self.call}", "-e", fault

    def occasions(self, name: str) -> Iterator[str]:
        """Every call alone, and all of them."""
        counts = {"pwritev2": len(plan(name).writes), "fdatasync": plan(name).barriers}
        yield from map(str, range(1, 1 + counts.get(self.call, 0)))
        if self.effect != DEADLY:
            yield "1+"


DEADLY = "signal=KILL"
INJECTIONS = [
    *(Injection("pwritev2", effect) for effect in ("error=EIO", "error=ENOSPC", "retval=0")),
    *(Injection("fdatasync", effect) for effect in ("error=EIO", "error=EDQUOT")),
    *(Injection(call, DEADLY) for call in CALLS),
    Injection("fcntl", "error=ENOLCK"),
]


def run_traced(name: str, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Edits an image in a process of its own, under strace; the trace goes beside the image."""
    return subprocess.run(
        [
            *("strace", "-f", "-qq", "-P", str(path), "-o", f"{path}.trace", *options),
            *(sys.executable, "-c", PROGRAM, name, str(path)),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    """All are there, and strace may trace."""
    reason = ", ".join(name for name in ("strace", *TOOLS) if not shutil.which(name))
    if not reason:
        done = run(
            "strace", "-qq", "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO", "true"
        )
        reason = done.stderr.strip() if done.returncode else ""
    if not reason:
        return
    if os.environ.get("QCOW2BM_REQUIRE_QEMU"):
        pytest.fail(f"cannot be used: {reason}")
    pytest.skip(f"cannot be used: {reason}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that has the backing file of all overlays."""
    (tmp_path / BACKING_NAME.decode()).write_bytes(build_image(size=1 << 20).data)
    return tmp_path


def require_sound_to_qemu(path: Path) -> None:
    """QEMU opens it, knows the same bitmaps, and finds leaks at worst."""
    disk = Disk(path)
    check = disk.check()
    assert check.returncode in (0, LEAKS), check
    with qcow2bm.open(path) as image:
        names = list(image.bitmaps) if image.is_consistent else []
    assert [bitmap["name"] for bitmap in disk.listed()] == names


def require_old_or_new(name: str, path: Path, injection: Injection, when: str) -> str:
    """The outcome of an edit into which a fault was injected."""
    old, new = states(name)
    path.write_bytes(EDITS[name].image())
    done = run_traced(name, path, *injection.options(when))
    trace = Path(f"{path}.trace").read_text()
    if injection.effect == DEADLY:
        assert done.returncode == -signal.SIGKILL
        assert "killed by SIGKILL" in trace
        outcome = "unknown"
    else:
        assert done.returncode == REFUSED, done
        assert "(INJECTED)" in trace
        outcome, _, message = done.stderr.partition(" ")
        assert message.startswith(f"{path}: ")
        assert message.count("\n") == 1
        assert message.endswith("\n")
    allowed = {"old": [old], "refused": [old], "new": [new], "unknown": [old, new]}
    assert state_of(path.read_bytes()) in allowed[outcome]
    require_sound_to_qemu(path)
    return outcome


def test_strace_sees_what_the_plan_says(folder: Path) -> None:
    """strace must see the calls of the plan; the tests below inject faults into these calls."""
    path = folder / "disk.qcow2"
    path.write_bytes(EDITS["set"].image())
    done = run_traced(
        "set", path, "-e", "trace=pwrite64,pwritev,pwritev2,fdatasync,fsync,ftruncate"
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = re.findall(r"^\d+ +(\w+)\(", Path(f"{path}.trace").read_text(), re.M)
    assert found == [CALLS[plan("set").is_barrier(n)] for n, _ in enumerate(plan("set").steps)]


@pytest.mark.parametrize("injection", INJECTIONS, ids=" ".join)
def test_a_system_call_fails(folder: Path, injection: Injection) -> None:
    for when in injection.occasions("rename"):
        require_old_or_new("rename", folder / "disk.qcow2", injection, when)


@pytest.mark.deep
@pytest.mark.parametrize("name", EDITS)
def test_a_system_call_of_any_edit_fails(folder: Path, name: str) -> None:
    came: Counter[str] = Counter()
    for number, injection in enumerate(INJECTIONS):
        occasions = [*injection.occasions(name)]
        for when in occasions[number % 2 :: 2] or occasions:
            came[require_old_or_new(name, folder / "disk.qcow2", injection, when)] += 1
    print(f"{name}: {came.total()} injections: {dict(came)}")


def test_a_disk_that_is_full_gets_its_file_back_as_it_was(folder: Path) -> None:
    path = folder / "disk.qcow2"
    content = EDITS["set"].image()
    path.write_bytes(content)
    inject = "inject=pwritev2:error=ENOSPC:when=3+"
    done = run_traced("set", path, "-e", "trace=pwritev2", "-e", inject)
    assert done.returncode == REFUSED
    assert "No space left on device; the edit did not take effect" in done.stderr
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", EDITS)
def test_qemu_opens_whatever_a_failed_write_or_barrier_leaves(folder: Path, name: str) -> None:
    path = folder / "disk.qcow2"
    steps = [n for n, call in enumerate(calls(name)) if call in ("write", "barrier")]
    for number in steps:
        for share in (0, 0.5):
            fault = Fault(number, is_sticky=True, share=share)
            storage = FaultyStorage(EDITS[name].image(), fault, keeps=lambda sector: sector % 2 > 0)
            with qcow2bm.open(storage, "r+") as image, pytest.raises(CommitError):
                EDITS[name].run(image)
            path.write_bytes(storage.data)
            require_sound_to_qemu(path)
