"""The write guard of a storage, and dropping the cached pages of files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.images import Stored, build_image

import qcow2bm
from qcow2bm.errors import ImageLockedError, StateError, StorageError
from qcow2bm.storage import write_guard
from qcow2bm.storage.file import FileStorage
from qcow2bm.storage.interface import WritableStorage, read_bytes
from qcow2bm.storage.memory import MemoryStorage
from qcow2bm.storage.write_guard import WriteGuard

if TYPE_CHECKING:
    from typing_extensions import Buffer

CONTENT = bytes(range(256)) * 4
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="writing is for Linux")


class Logged(MemoryStorage):
    """Records all calls. Taking its lock, and releasing it, can be made to fail."""

    excludes_other_hosts = True

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(bytearray(CONTENT), "<logged>")
        self.log: list[str] = []
        self.error = error
        self.refresh_error: BaseException | None = None
        self.release_error: BaseException | None = None

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        self.log.append("write")
        super().write(offset, parts)

    def barrier(self) -> None:
        self.log.append("barrier")

    def truncate(self, size: int) -> None:
        self.log.append("truncate")
        super().truncate(size)

    def refresh(self) -> None:
        self.log.append("refresh")
        if self.refresh_error:
            raise self.refresh_error

    def close(self) -> None:
        self.log.append("close")

    @contextmanager
    def _locked(self, timeout: float) -> Iterator[None]:
        if self.error:
            raise self.error
        self.log.append(f"lock {timeout}")
        try:
            yield
        finally:
            self.log.append("unlock")
            if self.release_error:
                raise self.release_error

    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        return self._locked(timeout)


class Unseen(Logged):
    """A storage whose lock other hosts do not see."""

    excludes_other_hosts = False


WRITES: dict[str, Callable[[WriteGuard], object]] = {
    "write": lambda held: held.write(0, [b"x"]),
    "nothing": lambda held: held.write(0, []),
    "barrier": lambda held: held.barrier(),
    "truncate": lambda held: held.truncate(1),
    "refresh": lambda held: held.refresh(),
}


@pytest.mark.spec("LIFE-2")
@pytest.mark.parametrize("work", WRITES)
def test_without_the_lock_nothing_is_written(work: str) -> None:
    storage = Logged()
    held = WriteGuard(storage)
    with pytest.raises(StateError, match="storage is inactive"):
        WRITES[work](held)
    assert storage.log == []
    held.acquire(0)
    held.release()
    with pytest.raises(StateError):
        WRITES[work](held)
    assert storage.log == ["lock 0", "unlock"]
    assert read_bytes(held, 0, held.size()) == CONTENT


@pytest.mark.parametrize("work", WRITES)
def test_with_the_lock_every_call_reaches_the_storage(work: str) -> None:
    storage = Logged()
    held = WriteGuard(storage)
    held.acquire(2.5)
    WRITES[work](held)
    kind = "write" if work == "nothing" else work
    assert storage.log == ["lock 2.5", kind]


def test_is_held_is_true_while_the_lock_is_held() -> None:
    held = WriteGuard(Logged())
    states = [held.is_held]
    steps: list[Callable[[], object]] = [lambda: held.acquire(0), held.release]
    for step in (*steps, held.release, steps[0]):
        step()
        states.append(held.is_held)
    held.close()
    assert [*states, held.is_held] == [False, True, False, False, True, False]


def test_the_lock_is_released_once() -> None:
    storage = Logged()
    held = WriteGuard(storage)
    held.release()
    held.acquire(0)
    held.release()
    held.release()
    held.close()
    assert storage.log == ["lock 0", "unlock", "close"]


def test_closing_releases_the_lock_first() -> None:
    storage = Logged()
    held = WriteGuard(storage)
    held.acquire(0)
    held.close()
    assert storage.log == ["lock 0", "unlock", "close"]
    with pytest.raises(StateError):
        held.write(0, [b"x"])


@pytest.mark.parametrize("kind", [Logged, Unseen])
def test_the_lock_is_taken_once(kind: type[Logged]) -> None:
    """An acquire that was interrupted after the lock was taken can be repeated."""
    storage = kind()
    held = WriteGuard(storage)
    held.acquire(1)
    before = list(storage.log)
    held.acquire(2)
    storage.error = ImageLockedError("disk", "writes to it", "writing")
    held.acquire(0)
    assert held.is_held
    assert storage.log == before
    held.release()
    assert not held.is_held
    with pytest.raises(ImageLockedError):
        held.acquire(0)
    assert storage.log == [*before, "unlock"]


@pytest.mark.spec("LIFE-3")
def test_cached_data_are_dropped_if_other_hosts_can_write_unnoticed() -> None:
    storage = Unseen()
    held = WriteGuard(storage)
    for _ in range(2):
        held.acquire(0)
        assert storage.log == ["lock 0", "refresh"]
        held.release()
        del storage.log[:]
    alone = Logged()
    held = WriteGuard(alone)
    held.acquire(0)
    assert alone.log == ["lock 0"]


@pytest.mark.parametrize("error", [StorageError("disk", 0, 0, "no"), KeyboardInterrupt()])
def test_a_cache_that_cannot_be_dropped_releases_the_lock(error: BaseException) -> None:
    storage = Unseen()
    storage.refresh_error = error
    held = WriteGuard(storage)
    with pytest.raises(type(error)):
        held.acquire(0)
    assert storage.log == ["lock 0", "refresh", "unlock"]
    assert not held.is_held
    with pytest.raises(StateError):
        held.write(0, [b"x"])
    storage.refresh_error = None
    held.acquire(0)
    held.write(0, [b"x"])


@pytest.mark.parametrize(
    "error", [ImageLockedError("disk", "writes to it", "writing"), StorageError("disk", 0, 0, "no")]
)
def test_a_lock_that_is_refused_is_not_held(error: Exception) -> None:
    storage = Logged(error)
    held = WriteGuard(storage)
    for _ in range(2):
        with pytest.raises(type(error)):
            held.acquire(0)
        assert not held.is_held
        with pytest.raises(StateError):
            held.barrier()
    storage.error = None
    held.acquire(0)
    held.barrier()
    assert storage.log == ["lock 0", "barrier"]


def test_nothing_is_written_even_if_the_lock_cannot_be_released() -> None:
    storage = Logged()
    held = WriteGuard(storage)
    held.acquire(0)
    storage.release_error = StorageError("disk", 0, 0, "cannot be unlocked")
    with pytest.raises(StorageError):
        held.release()
    assert not held.is_held
    with pytest.raises(StateError):
        held.write(0, [b"x"])


class Interrupted(ExitStack):
    """Raises KeyboardInterrupt once, before it releases anything."""

    was_interrupted = False

    def close(self) -> None:
        if not self.was_interrupted:
            self.was_interrupted = True
            raise KeyboardInterrupt
        super().close()


@pytest.mark.parametrize("after", ["release", "acquire", "close"])
def test_a_release_that_was_interrupted_is_completed_later(
    after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_guard, "ExitStack", Interrupted)
    storage = Logged()
    guard = WriteGuard(storage)
    Interrupted.was_interrupted = True
    guard.acquire(0)
    Interrupted.was_interrupted = False
    with pytest.raises(KeyboardInterrupt):
        guard.release()
    assert not guard.is_held
    with pytest.raises(StateError):
        guard.write(0, [b"x"])
    assert storage.log == ["lock 0"]
    {"release": guard.release, "acquire": lambda: guard.acquire(1), "close": guard.close}[after]()
    more = {"release": [], "acquire": ["lock 1"], "close": ["close"]}[after]
    assert storage.log == ["lock 0", "unlock", *more]


def test_nothing_is_written_while_the_lock_is_released() -> None:
    refused: list[bool] = []

    class Late(Logged):
        @contextmanager
        def _locked(self, timeout: float) -> Iterator[None]:
            yield
            with suppress(StateError):
                held.write(0, [b"late"])
                refused.append(False)
            refused.append(True)

    held = WriteGuard(Late())
    held.acquire(0)
    held.release()
    assert refused == [True]


def test_reading_works_without_the_lock() -> None:
    storage = MemoryStorage(bytearray(CONTENT))
    held = WriteGuard(storage)
    assert held.size() == len(CONTENT)
    assert read_bytes(held, 5, 5) == CONTENT[5:10]
    assert held.capacity() is None
    assert held.change_token() is None
    assert held.name == storage.name
    with held.read_lock(), held.write_lock(0):
        pass
    assert isinstance(held, WritableStorage)


@pytest.mark.spec("LIFE-5")
@pytest.mark.parametrize("kind", [Logged, Unseen, MemoryStorage])
def test_the_storage_decides_whether_other_hosts_are_excluded(kind: type[MemoryStorage]) -> None:
    storage = MemoryStorage(bytearray(CONTENT)) if kind is MemoryStorage else kind()  # type: ignore[call-arg]
    assert WriteGuard(storage).excludes_other_hosts is (kind is not Unseen)
    assert isinstance(storage, WritableStorage)


def test_a_storage_must_state_whether_other_hosts_are_excluded() -> None:
    """A storage without this attribute must not be accepted: other hosts might not see its lock."""

    class Silent:
        pass

    for name in {"name", *dir(WritableStorage)} - {"excludes_other_hosts"}:
        if not name.startswith("_"):
            setattr(Silent, name, getattr(MemoryStorage, name, "silent"))
    assert not isinstance(Silent(), WritableStorage)
    Silent.excludes_other_hosts = True  # type: ignore[attr-defined]
    assert isinstance(Silent(), WritableStorage)


# --- regular files ------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


@on_linux
@pytest.mark.spec("LIFE-5")
@pytest.mark.parametrize("locking", [True, False])
def test_the_locks_of_a_file_exclude_other_hosts(path: Path, locking: bool) -> None:
    storage = FileStorage(path, writable=True, locking=locking)
    assert storage.excludes_other_hosts is locking
    assert WriteGuard(storage).excludes_other_hosts is locking
    storage.close()


@on_linux
@pytest.mark.spec("LIFE-5")
def test_the_locks_of_a_device_do_not_exclude_other_hosts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileStorage(path, writable=True)
    monkeypatch.setattr(storage, "capacity", lambda: 1 << 30)
    assert not storage.excludes_other_hosts
    storage.close()


@on_linux
@pytest.mark.spec("LIFE-3")
def test_cached_pages_of_a_file_are_written_and_then_dropped(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []
    real = os.posix_fadvise

    def advise(*arguments: int) -> None:
        calls.append(arguments)
        real(*arguments)

    monkeypatch.setattr(os, "fdatasync", lambda descriptor: calls.append((descriptor,)))
    monkeypatch.setattr(os, "posix_fadvise", advise)
    storage = FileStorage(path, writable=True)
    storage.write(0, [b"new"])
    storage.refresh()
    descriptor = storage._file.fileno()
    # The system drops only clean pages, so they are written first.
    assert calls == [(descriptor,), (descriptor, 0, 0, os.POSIX_FADV_DONTNEED)]
    assert read_bytes(storage, 0, storage.size()) == b"new" + CONTENT[3:]
    assert storage._direct is None  # no direct input and output for regular files
    storage.close()


@on_linux
@pytest.mark.parametrize("name", ["fdatasync", "posix_fadvise"])
def test_a_cache_that_cannot_be_dropped_raises_a_storage_error(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: int) -> None:
        raise OSError(5, "Input/output error")

    storage = FileStorage(path, writable=True)
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(StorageError, match="Input/output error") as raised:
        storage.refresh()
    assert raised.value.path == str(path)
    monkeypatch.undo()
    storage.refresh()
    storage.close()
    with pytest.raises(StateError):
        storage.refresh()


@on_linux
@pytest.mark.spec("LIFE-3")
@pytest.mark.spec("LIFE-4")
def test_a_cache_that_cannot_be_dropped_leaves_the_tracker_inactive(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(build_image(Stored(b"a")).data)

    def fail(*arguments: int) -> None:
        raise OSError(5, "Input/output error")

    with qcow2bm.open(path, "r+") as image:
        tracker = image.track()
        tracker.inactivate()
        before = path.read_bytes()
        monkeypatch.setattr(os, "posix_fadvise", fail)
        with pytest.raises(StorageError):
            tracker.activate()
        monkeypatch.undo()
        assert tracker.state == "inactive"
        assert path.read_bytes() == before
        with qcow2bm.open(path, "r+"):  # the locks were released
            pass
        assert tracker.activate().outcome == "unchanged"


@on_linux
def test_a_forked_process_refreshes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage(path, writable=True)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(StateError, match="forked"):
        storage.refresh()
    monkeypatch.undo()
    storage.close()
