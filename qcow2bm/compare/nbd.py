"""Reads from an NBD server: the part of the protocol that qemu-nbd needs.

*Spec*: the NBD protocol: fixed newstyle handshake, structured replies, base:allocation.
"""

from __future__ import annotations

import socket
import struct

from qcow2bm.errors import StorageError
from qcow2bm.units import escape

_MAGIC, _OPTION_MAGIC, _OPTION_REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_ANSWER = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IHHQI")
_EXTENT = struct.Struct(">II")
_PLACE = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_ACK, _INFO, _ERROR_BIT = 1, 3, 1 << 31
_INFO_EXPORT = 0
_ALLOCATION = b"base:allocation"
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x668E33EF
_READ, _BLOCK_STATUS = 0, 7
_DONE = 1
_NONE, _OFFSET_DATA, _OFFSET_HOLE, _STATUS, _FAULT_BIT = 0, 1, 2, 5, 1 << 15
_READS_ZERO = 2

_MAX_STATUS_BYTES = 1 << 30  # in one request for extents
_MAX_ANSWER_BYTES = 1 << 16


class NbdReader:
    """A connection to the default export; a `qcow2bm.compare.content.Reader`.

    Attributes:
        size: of the export, in bytes.
    """

    def __init__(self, path: str, name: str) -> None:
        """Connects to the unix socket at ``path``; errors name the disk ``name``.

        Raises:
            OSError: no server listens there.
            StorageError: the server does not answer as qemu-nbd does.
        """
        self._name = name
        self._data: tuple[int, int] = 0, 0  # start and end of a range that is known to have data
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
            self.size = self._negotiate()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def _fail(self, reason: str, start: int = 0, length: int = 0) -> StorageError:
        return StorageError(self._name, start, length, reason)

    def _receive(self, buffer: memoryview) -> None:
        while len(buffer):
            try:
                count = self._socket.recv_into(buffer)
            except OSError as error:
                raise self._fail(f"qemu-nbd: {error.strerror}") from error
            if not count:
                raise self._fail("qemu-nbd has ended")
            buffer = buffer[count:]

    def _take(self, length: int) -> bytes:
        if length > _MAX_ANSWER_BYTES:
            raise self._fail("qemu-nbd sent an answer to another request")
        data = bytearray(length)
        self._receive(memoryview(data))
        return bytes(data)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._fail(f"qemu-nbd: {error.strerror}") from error

    # The handshake

    def _negotiate(self) -> int:
        magic, option_magic, flags = _GREETING.unpack(self._take(_GREETING.size))
        if (magic, option_magic) != (_MAGIC, _OPTION_MAGIC) or not flags & _FIXED_NEWSTYLE:
            raise self._fail("the server is no qemu-nbd")
        self._send((_FIXED_NEWSTYLE | flags & _NO_ZEROES).to_bytes(4, "big"))
        self._option(_OPT_STRUCTURED_REPLY, b"")
        query = bytes(4) + struct.pack(">II", 1, len(_ALLOCATION)) + _ALLOCATION
        self._option(_OPT_SET_META_CONTEXT, query)
        for kind, data in self._option(_OPT_GO, bytes(4) + bytes(2)):
            if kind == _INFO and data[:2] == _INFO_EXPORT.to_bytes(2, "big"):
                return int.from_bytes(data[2:10], "big")
        raise self._fail("qemu-nbd does not tell the size of the disk")

    def _option(self, number: int, data: bytes) -> list[tuple[int, bytes]]:
        """Requests an option; returns the answers (type, data) before the final agreement."""
        self._send(_OPTION.pack(_OPTION_MAGIC, number, len(data)) + data)
        said: list[tuple[int, bytes]] = []
        while True:
            magic, option, kind, length = _ANSWER.unpack(self._take(_ANSWER.size))
            answer = self._take(length)
            if (magic, option) != (_OPTION_REPLY, number) or kind & _ERROR_BIT:
                raise self._fail("qemu-nbd refuses an option that is needed")
            if kind == _ACK:
                return said
            said.append((kind, answer))

    # Reading

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See `qcow2bm.compare.content.Reader`."""
        self._ask(_READ, start, len(buffer))
        done, is_over = 0, False
        while not is_over:
            kind, length, is_over = self._reply(start, len(buffer))
            if kind == _OFFSET_DATA and length >= _PLACE.size:
                (place,), length = _PLACE.unpack(self._take(_PLACE.size)), length - _PLACE.size
            elif kind == _OFFSET_HOLE and length == _HOLE.size:
                place, length = _HOLE.unpack(self._take(_HOLE.size))
            elif kind == _NONE and not length:
                continue
            else:
                raise self._fail("qemu-nbd sent no data", start, len(buffer))
            part = buffer[done : done + length]
            if place != start + done or len(part) != length:
                raise self._fail("qemu-nbd sent an answer to another request", start, len(buffer))
            if kind == _OFFSET_DATA:
                self._receive(part)
            else:
                part[:] = bytes(length)
            done += length
        if done < len(buffer):
            raise self._fail("qemu-nbd sent too little data", start, len(buffer))

    def next_data(self, start: int) -> int:
        """See `qcow2bm.compare.content.Reader`."""
        while start < self.size and not self._data[0] <= start < self._data[1]:
            end = start
            for length, flags in self._status(start):
                if not flags & _READS_ZERO:
                    self._data = end, end + length
                    return end
                end += length
            start = end
        return min(start, self.size)

    def _status(self, start: int) -> list[tuple[int, int]]:
        """Returns (length, flags) of the extents from ``start`` on, at least one."""
        length = min(_MAX_STATUS_BYTES, self.size - start)
        self._ask(_BLOCK_STATUS, start, length)
        found: list[tuple[int, int]] = []
        is_done = False
        while not is_done:
            kind, size, is_done = self._reply(start, length)
            data = self._take(size)
            if kind == _STATUS and len(data) % 8 == 4:
                found += _EXTENT.iter_unpack(data[4:])
        if not found or not all(size for size, _ in found):
            raise self._fail("qemu-nbd does not tell the extents", start, length)
        return found

    def _ask(self, kind: int, start: int, length: int) -> None:
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, 0, start, length))

    def _reply(self, start: int, asked: int) -> tuple[int, int, bool]:
        """Reads the head of a part of a reply: its type, its length, and whether it is the last."""
        magic, flags, kind, _, length = _REPLY.unpack(self._take(_REPLY.size))
        if magic != _REPLY_MAGIC:
            raise self._fail("qemu-nbd sent no structured reply", start, asked)
        if kind & _FAULT_BIT:
            said = self._take(length)
            size = int.from_bytes(said[4:6], "big")
            text = escape(said[6 : 6 + size].decode("utf-8", "replace"))
            raise self._fail(f"qemu-nbd: {text or 'cannot read'}", start, asked)
        return kind, length, bool(flags & _DONE)
