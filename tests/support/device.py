"""A storage of a fixed size in memory."""

from __future__ import annotations

from qcow2bm.storage.memory import MemoryStorage

_CLUSTER = 512


class Device(MemoryStorage):
    """A storage that cannot grow, with some free clusters of 512 bytes at its end."""

    def __init__(self, data: bytearray, spare: int) -> None:
        super().__init__(data)
        data.extend(bytes(spare * _CLUSTER))
        self.length = len(data)

    def capacity(self) -> int:
        return self.length
