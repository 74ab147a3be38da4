"""Bodies as HTTP frames them: by length, in chunks, by the end of the connection, behind TLS, together with their
headers or byte by byte. What comes out is what was sent; all else is an error, and nothing of it is passed on.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cachefs.errors import OriginError, OriginLied, OriginUnavailable
from cachefs.sources.body import Body
from tests.origin import LOOPBACK, pattern
from tests.test_glance_source import IMAGE, Collected, fetch, source_of
from tests.test_glance_source import SIZE as IMAGE_SIZE

KIB: Final = 1 << 10
START: Final = 8 * KIB
SIZE: Final = 300 * KIB + 77
DATA: Final = pattern(IMAGE_SIZE)(START, SIZE)
END: Final = START + SIZE

Answer = Sequence[bytes]  # What is sent, one piece after the other.


class Wire:
    """A server that sends what it is told, and no more. Each connection lives until an answer says `close`, or its
    client ends it."""

    def __init__(self, answer: Callable[[], Answer], context: ssl.SSLContext | None = None) -> None:
        self._answer, self._context = answer, context
        self._listener = socket.create_server((LOOPBACK, 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http{'s' if self._context else ''}://{LOOPBACK}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self.connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.settimeout(10.0)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            self._open.append(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                while self._asked(connection):
                    said = self._answer()
                    for piece in said:
                        connection.sendall(piece)
                    if b"Connection: close" in said[0]:
                        return

    @staticmethod
    def _asked(connection: socket.socket) -> bool:
        got = b""
        while not got.endswith(b"\r\n\r\n"):
            piece = connection.recv(65536)
            if not piece:
                return False
            got += piece
        return True


def head(*lines: str) -> bytes:
    described = ["Content-Type: application/octet-stream", f"Content-Range: bytes {START}-{END - 1}/{IMAGE_SIZE}"]
    return "\r\n".join(["HTTP/1.1 206 Partial Content", *described, *lines, "", ""]).encode()


def split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def chunked(data: bytes, size: int, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    framed = b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in split(data, size))
    return framed + b"0\r\n" + trailer + b"\r\n"


LENGTH: Final = f"Content-Length: {SIZE}"
CHUNKED: Final = "Transfer-Encoding: chunked"
CLOSE: Final = "Connection: close"

GOOD: Final[dict[str, Answer]] = {
    "by length": [head(LENGTH), DATA],
    "together with the headers": [head(LENGTH) + DATA[:5000], DATA[5000:]],
    "in one piece": [head(LENGTH) + DATA],
    "in small pieces": [head(LENGTH), *split(DATA, 977)],
    "by length, then closed": [head(LENGTH, CLOSE), DATA],
    "in chunks": [head(CHUNKED), chunked(DATA, 64 * KIB)],
    "in small chunks, together with the headers": [head(CHUNKED) + chunked(DATA, 1000)],
    "in chunks cut anywhere": [head(CHUNKED), *split(chunked(DATA, 4099, b";x=y", b"X-Sum: 1\r\n"), 1021)],
    "in chunks that count, and a length": [head(CHUNKED, LENGTH), chunked(DATA, 64 * KIB)],
    "until the end of the connection": [head(CLOSE), DATA],
}
BAD: Final[dict[str, tuple[Answer, type[OriginError]]]] = {
    "cut with the headers": ([head(LENGTH, CLOSE) + DATA[:100]], OriginUnavailable),
    "cut a byte early": ([head(LENGTH, CLOSE), DATA[:-1]], OriginUnavailable),
    "fewer chunks": ([head(CHUNKED), chunked(DATA[:-1], 64 * KIB)], OriginUnavailable),
    "cut in a chunk": ([head(CHUNKED, CLOSE), chunked(DATA, 64 * KIB)[: SIZE // 2]], OriginUnavailable),
    "no chunk at its place": ([head(CHUNKED), b"10000\r\n" + DATA[:65536] + b"\r\nzz\r\n"], OriginUnavailable),
    "more chunks": ([head(CHUNKED), chunked(DATA + b"\0", 64 * KIB)], OriginLied),
    "more until the end": ([head(CLOSE), DATA + b"\0"], OriginLied),
    "less until the end": ([head(CLOSE), DATA[:-1]], OriginUnavailable),
}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of this host for itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, LOOPBACK)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "host.pem"
    path.write_bytes(made.public_bytes(encoding) + secret)
    return path


@pytest.fixture(params=["plain", "tls"])
def context(request: pytest.FixtureRequest) -> ssl.SSLContext | None:
    if request.param == "plain":
        return None
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(request.getfixturevalue("certificate"))
    return made


@pytest.fixture
def options(context: ssl.SSLContext | None, request: pytest.FixtureRequest) -> dict[str, object]:
    return {} if context is None else {"cafile": request.getfixturevalue("certificate")}


@pytest.mark.parametrize("framing", list(GOOD))
def test_a_body_is_what_was_sent(
    tmp_path: Path, context: ssl.SSLContext | None, options: dict[str, object], framing: str
) -> None:
    answer = GOOD[framing]
    with Wire(lambda: answer, context) as wire:
        source = source_of(tmp_path, wire.url, **options)
        for _ in range(3):
            sink = Collected()
            fetch(source, sink, START, END)
            assert sink.data == DATA
        assert wire.connections == (3 if CLOSE.encode() in answer[0] else 1)


@pytest.mark.parametrize("fault", list(BAD))
def test_a_body_that_is_not_is_an_error(
    tmp_path: Path, context: ssl.SSLContext | None, options: dict[str, object], fault: str
) -> None:
    answer, error = BAD[fault]
    said: Iterator[Answer] = iter([answer, GOOD["by length"]])
    with Wire(lambda: next(said), context) as wire:
        source = source_of(tmp_path, wire.url, **options)
        sink = Collected()
        with pytest.raises(error) as raised:
            fetch(source, sink, START, END)
        assert type(raised.value) is error
        assert raised.value.image == IMAGE
        assert sink.data == DATA[: len(sink.data)]
        sink = Collected()
        fetch(source, sink, START, END)  # Nothing is left of the first, nor its connection if it is at no end.
        assert sink.data == DATA
        assert wire.connections == (1 if fault == "fewer chunks" else 2)


def test_a_body_behind_tls_that_stalls_ends_at_the_read_timeout(tmp_path: Path, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    answer = [head(LENGTH), DATA[: 100 * KIB]]
    with Wire(lambda: answer, context) as wire:
        source = source_of(tmp_path, wire.url, cafile=certificate, read_timeout=0.3)
        sink = Collected()
        with pytest.raises(OriginUnavailable):
            fetch(source, sink, START, END)
        assert sink.data == DATA[: 100 * KIB]


def test_an_origin_whose_certificate_nobody_vouches_for_is_not_believed(tmp_path: Path, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Wire(lambda: GOOD["by length"], context) as wire:
        sink = Collected()
        with pytest.raises(OriginUnavailable):
            fetch(source_of(tmp_path, wire.url), sink, START, END)
        assert not sink.data


@pytest.mark.parametrize(("framing", "direct"), [("by length", True), ("in chunks", False)])
def test_a_body_of_known_length_comes_without_a_detour(
    context: ssl.SSLContext | None, framing: str, direct: bool, request: pytest.FixtureRequest
) -> None:
    """A urllib3 that is made otherwise would only be slower, and nobody would see it."""
    trusted = None if context is None else str(request.getfixturevalue("certificate"))
    with Wire(lambda: GOOD[framing], context) as wire, urllib3.PoolManager(ca_certs=trusted) as pool:
        answer = pool.request("GET", wire.url, preload_content=False)
        body = Body(answer)
        assert body.is_direct is direct
        room = memoryview(bytearray(SIZE + 100))
        at = 0
        while at < SIZE:
            n = body.read_into(room[at:])
            assert 0 < n <= SIZE - at
            at += n
        assert room[:SIZE] == DATA
        assert body.read_into(room) == 0
        assert body.is_at_end()
        again = pool.request("GET", wire.url, preload_content=False)
        assert again.read() == DATA
        assert wire.connections == 1
