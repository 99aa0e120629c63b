"""Context managers that an interrupt (Ctrl-C) or a cancellation does not leave half entered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from qcow2bm.errors import StateError


class Block:
    """A context manager that calls ``begin`` before its block, and ``end`` after the block.

    An interrupt can come at any line. Therefore ``end`` is called as well if ``begin`` raises, and
    once more if ``end`` itself is interrupted; it must allow for both. A generator as a context
    manager would leave behind what ``begin`` recorded, as long as the traceback of the interrupt
    lives.
    """

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """The object can be entered once, because ``begin`` and ``end`` belong to one block."""
        self._begin, self._end = begin, end
        self._is_used = False

    def __enter__(self) -> Self:
        """Calls ``begin``, and raises what it raises.

        Raises:
            StateError: the object was entered before.
        """
        if self._is_used:
            raise StateError("used", "a new one for each block", "the context manager")
        self._is_used = True
        try:
            self._begin()
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Calls ``end`` before the block ends; it is called again then, and must allow for that."""
        try:
            self._end()
        except BaseException:  # an interrupt
            self._end()
            raise


class AsyncBlock:
    """`Block` as an asynchronous context manager, whose ``begin`` may wait."""

    def __init__(self, begin: Callable[[], Awaitable[None]], end: Callable[[], None]) -> None:
        """The object can be entered once, because ``begin`` and ``end`` belong to one block."""
        self._begin = begin
        self._block = Block(lambda: None, end)

    async def __aenter__(self) -> None:
        """Awaits ``begin``, and raises what it raises; as `Block.__enter__` does otherwise."""
        self._block.__enter__()
        try:
            await self._begin()
        except BaseException as error:
            self._block.__exit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._block.__exit__(kind, error, traceback)
