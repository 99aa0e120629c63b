"""A server that breaks the protocol is an error, and does not make the reader wait."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from qcow2bm.compare.nbd import NbdReader
from qcow2bm.errors import StorageError

SIZE = 1 << 20
REPLY = 0x668E33EF


def answer(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def part(kind: int, data: bytes = b"", *, is_last: bool = True) -> bytes:
    return struct.pack(">IHHQI", REPLY, is_last, kind, 0, len(data)) + data


GREETING = b"NBDMAGICIHAVEOPT\0\3"
HANDSHAKE = (
    GREETING
    + answer(8, 1)
    + answer(10, 4, struct.pack(">I", 1) + b"base:allocation")
    + answer(10, 1)
    + answer(7, 3, struct.pack(">HQH", 0, SIZE, 1))
    + answer(7, 1)
)
STATUS = part(5, struct.pack(">IIIII", 1, 4096, 3, SIZE - 4096, 0))
DATA = (
    part(1, struct.pack(">Q", 4096) + b"d" * 4096, is_last=False)
    + part(2, struct.pack(">QI", 8192, 4096), is_last=False)
    + part(0)
)


@contextmanager
def server(path: Path, content: bytes) -> Iterator[str]:
    """Sends all of it to each client, without reading a request, and closes the connection."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):  # of a client that hangs up first
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path)
        finally:
            thread.join()


def use(path: str) -> tuple[int, int, bytes]:
    """One of each request: the size, where data begin, and data and a hole."""
    buffer = bytearray(b"?" * 8192)
    with closing(NbdReader(path, "disk")) as reader:
        found = reader.next_data(0)
        reader.read_into(4096, memoryview(buffer))
        return reader.size, found, bytes(buffer)


def test_what_a_server_says_is_understood(tmp_path: Path) -> None:
    with server(tmp_path / "s", HANDSHAKE + STATUS + DATA) as path:
        assert use(path) == (SIZE, 4096, b"d" * 4096 + bytes(4096))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", "no qemu-nbd"),
        (b"", "has ended"),
        (GREETING + answer(8, 1 << 31 | 1), "refuses"),
        (GREETING + answer(8, 1) + answer(10, 1) + answer(7, 1), "the size of the disk"),
        (HANDSHAKE + part(0x8001, struct.pack(">IH", 5, 9) + b"no medium"), "no medium"),
        (HANDSHAKE + part(0), "does not tell the extents"),
        (HANDSHAKE + part(5, struct.pack(">III", 1, 0, 0)), "does not tell the extents"),
        (HANDSHAKE + STATUS + part(0x8001, struct.pack(">IH", 5, 0)), "cannot read"),
        (HANDSHAKE + STATUS + part(0), "too little data"),
        (
            HANDSHAKE + STATUS + part(1, struct.pack(">Q", 0) + b"d" * 4096),
            "an answer to another request",
        ),
        (
            HANDSHAKE + STATUS + part(2, struct.pack(">QI", 4096, 9000)),
            "an answer to another request",
        ),
        (HANDSHAKE + STATUS + part(77, b"x"), "sent no data"),
        (HANDSHAKE + STATUS + struct.pack(">IIQ", 0x67446698, 0, 0) + bytes(9), "no structured"),
        (HANDSHAKE + part(5, bytes(1 << 17)), "an answer to another request"),
    ],
)
def test_a_server_that_does_not_keep_to_the_protocol(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with (
        server(tmp_path / "s", content) as path,
        pytest.raises(StorageError, match=message) as error,
    ):
        use(path)
    assert error.value.path == "disk"


def test_whatever_a_server_says_there_is_an_error_or_an_answer(tmp_path: Path) -> None:
    random, good = Random(1), HANDSHAKE + STATUS + DATA
    found: list[str] = []
    for number in range(300):
        content = bytearray(good)
        for _ in range(random.randrange(1, 4)):
            content[random.randrange(len(content))] = random.randrange(256)
        del content[random.choice([len(content), random.randrange(len(content))]) :]
        with server(tmp_path / str(number), bytes(content)) as path:
            try:
                use(path)
            except StorageError as error:
                found.append(str(error))
    assert all(len(message.splitlines()) == 1 for message in found)
    assert len(found) > 100
