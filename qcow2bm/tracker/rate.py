"""How fast something goes, measured while it does."""

from __future__ import annotations


class Rate:
    """An average of amounts per second in which what is longer ago counts for less."""

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """So much was done in so long."""
        self._amount = self._amount / 2 + amount
        self._seconds = self._seconds / 2 + seconds

    @property
    def per_second(self) -> float | None:
        """The average, None as long as nothing is known."""
        return self._amount / self._seconds if self._seconds > 0 else None
