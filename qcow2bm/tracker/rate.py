"""The speed at which the storage takes flushed pieces, measured while flushing goes on."""

from __future__ import annotations


class Rate:
    """An average of amounts per second, in which the latest measurements weigh most."""

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """Takes in a measurement: ``amount`` was done in so many seconds."""
        self._amount = self._amount / 2 + amount
        self._seconds = self._seconds / 2 + seconds

    @property
    def per_second(self) -> float | None:
        """The average, None as long as nothing was measured."""
        return self._amount / self._seconds if self._seconds > 0 else None
