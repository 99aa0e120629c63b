"""A tracker in an event loop of asyncio.

*Spec*: spec/tracking.md, "asyncio".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    suppress,
)
from contextvars import copy_context
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from qcow2bm.errors import StateError
from qcow2bm.tracker.reports import Activation, Convergence, FlushReport, Pending, StopReport
from qcow2bm.tracker.tracker import Tracker
from qcow2bm.tracker.waiting import Cancellation, GivenUpError, cancelled_by

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcow2bm.migration.evidence import Policy
    from qcow2bm.migration.lifecycle import State
    from qcow2bm.storage.file_identity import FilePath
    from qcow2bm.tracker.edit import TrackerEdit

T = TypeVar("T")


class AsyncioTracker:
    """The methods of a `Tracker` for tasks of one event loop.

    A write waits in the event loop. What writes to the image runs in one thread of the tracker's
    own, in the order in which it was asked for. As an asynchronous context manager it ends as a
    `Tracker` does.

    *Guarantees*: a task that is cancelled has done nothing, or all that it asked for, when the
    cancellation is raised. A write that is cancelled while it waits does not begin; with an intent
    bitmap it may be marked. A flush that is cancelled may have stored a part.

    Attributes:
        tracker: the tracker. Its methods that wait block the event loop.
        mark: see `Tracker`. With an intent bitmap it blocks the event loop: use `writing`.
    """

    def __init__(self, tracker: Tracker) -> None:
        """Is for the event loop of the tasks that use it."""
        self.tracker = tracker
        self.mark = tracker.mark
        self._worker = ThreadPoolExecutor(1, "qcow2bm tracker")
        self._turn = asyncio.Lock()
        self._cancellation: Cancellation | None = None  # of the last operation
        self._has_ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._run(lambda: self.tracker.__exit__(kind, error, traceback))
        except BaseException:
            await self._give_up()
            raise
        finally:
            self._has_ended = True
            self._worker.shutdown(wait=False)

    async def _give_up(self) -> None:
        """Ends tracking, whatever an operation is waiting for."""
        if self._cancellation:
            self._cancellation.set()
        ending = asyncio.get_running_loop().run_in_executor(self._worker, self.tracker.give_up)
        await _done(ending)

    @property
    def state(self) -> State:
        """See `Tracker.state`."""
        return self.tracker.state

    @property
    def names(self) -> list[str]:
        """See `Tracker.names`."""
        return self.tracker.names

    @property
    def activation(self) -> Activation:
        """See `Tracker.activation`."""
        return self.tracker.activation

    def mark_many(self, ranges: NDArray[np.int64]) -> None:
        """See `Tracker.mark_many`. With an intent bitmap it blocks the event loop."""
        self.tracker.mark_many(ranges)

    def writing(self, start: int, length: int) -> AbstractAsyncContextManager[None]:
        """Marks a write of the guest: ``async with tracker.writing(start, length)``.

        The write is in flight while the block runs. Tasks that are begun inside the block belong to
        the write. Raises as `Tracker.writing` does.
        """
        return self.tracker.async_writing(start, length)

    async def pending(self) -> Pending:
        """See `Tracker.pending`."""
        return await self._run(lambda: self.tracker.pending)

    async def flush(
        self, max_bytes: int | None = None, deadline: float | None = None
    ) -> FlushReport:
        """See `Tracker.flush`."""
        return await self._run(lambda: self.tracker.flush(max_bytes, deadline))

    async def converge(
        self,
        max_downtime: float,
        timeout: float | None = None,
        progress: Callable[[Pending], None] = lambda pending: None,
    ) -> Convergence:
        """See `Tracker.converge`; ``progress`` is called in another thread."""
        return await self._run(lambda: self.tracker.converge(max_downtime, timeout, progress))

    def background(
        self, interval: float, max_bytes_per_second: float | None = None
    ) -> AbstractAsyncContextManager[None]:
        """See `Tracker.background`."""
        return self._background(self.tracker.background(interval, max_bytes_per_second))

    @asynccontextmanager
    async def _background(self, flushing: AbstractContextManager[None]) -> AsyncIterator[None]:
        flushing.__enter__()
        try:
            yield
        finally:
            await self._run(lambda: flushing.__exit__(None, None, None))  # joins a thread

    async def stop(self) -> StopReport:
        """See `Tracker.stop`."""
        return await self._run(self.tracker.stop)

    async def rotate(self, name: str, new_name: str) -> None:
        """See `Tracker.rotate`."""
        await self._run(lambda: self.tracker.rotate(name, new_name))

    async def edit(self, change: Callable[[TrackerEdit], T]) -> T:
        """Calls ``change`` with a `TrackerEdit`, in another thread; then the edit is committed.

        >>> await tracker.edit(lambda edit: edit.add("weekly"))      # doctest: +SKIP

        Raises as `Tracker.edit` and the methods of the edit do.
        """

        def work() -> T:
            with self.tracker.edit() as edit:
                return change(edit)

        return await self._run(work)

    async def begin_migration(self, *, carried: Iterable[str] = (), sentinel: bool = True) -> None:
        """See `Tracker.begin_migration`."""
        await self._run(lambda: self.tracker.begin_migration(carried=carried, sentinel=sentinel))

    async def cancel_migration(self) -> None:
        """See `Tracker.cancel_migration`."""
        await self._run(self.tracker.cancel_migration)

    async def inactivate(self, *, data_file: FilePath | None = None) -> StopReport:
        """See `Tracker.inactivate`."""
        return await self._run(lambda: self.tracker.inactivate(data_file=data_file))

    async def activate(
        self,
        policy: Policy = "drop",
        *,
        other_side_has_stopped: bool = False,
        lock_timeout: float = 0,
    ) -> Activation:
        """See `Tracker.activate`."""
        return await self._run(
            lambda: self.tracker.activate(
                policy, other_side_has_stopped=other_side_has_stopped, lock_timeout=lock_timeout
            )
        )

    async def abandon(self) -> None:
        """See `Tracker.abandon`."""
        await self._run(self.tracker.abandon)

    async def _run(self, work: Callable[[], T]) -> T:
        """Runs an operation in the thread, when those before it have ended."""
        async with self._turn:
            if self._has_ended:
                return work()  # which raises
            self._cancellation = cancellation = Cancellation()

            def call() -> T:
                with cancelled_by(cancellation):
                    return work()

            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._worker, copy_context().run, call)
            try:
                return await asyncio.shield(running)
            except GivenUpError:
                raise StateError("being ended", "tracking", "the tracker") from None
            except asyncio.CancelledError:
                cancellation.set()
                await _done(running)
                raise


async def _done(future: asyncio.Future[Any]) -> None:
    """Waits until a future is done, however often the task is cancelled; raises nothing."""
    while not future.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    future.exception()  # the state of the tracker tells of a failure
