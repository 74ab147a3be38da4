"""The link changes no byte, loses none, and counts them. How long it takes is for `bench` to say."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from bench.link import CATCH_UP_MAX_S, PIECE_SIZE_MIN_BYTES, RESET_ON_CLOSE, Link, Wire
from tests.origin import LOOPBACK, Cut, Kind, OriginImage, ScriptedOrigin, Stall, pattern

SIZE = 4 << 20
IMAGE = "11111111-2222-3333-4444-555555555555"
PATH = f"/v2/images/{IMAGE}/file"
BYTES = pattern(SIZE)
SHAPES = [(float("inf"), 0.0), (2.5e9, 0.001), (200e6, 0.030)]


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([OriginImage(IMAGE, "debian", SIZE, BYTES)]) as origin:
        yield origin


def read(port: int, start: int = 0, stop: int = SIZE) -> bytes:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=30)
    try:
        connection.request("GET", PATH, headers={"Range": f"bytes={start}-{stop - 1}"})
        return connection.getresponse().read()
    finally:
        connection.close()


@pytest.mark.parametrize(("rate_bits_per_s", "round_trip_s"), SHAPES)
def test_bytes_are_unchanged(origin: ScriptedOrigin, rate_bits_per_s: float, round_trip_s: float) -> None:
    with Link(origin.port, rate_bits_per_s, round_trip_s) as link:
        assert read(link.port) == BYTES(0, SIZE)


def test_connections_do_not_mix(origin: ScriptedOrigin) -> None:
    edges = range(0, SIZE + 1, SIZE // 16)
    with Link(origin.port, 1e9, 0.002) as link, ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda edge: read(link.port, *edge), pairwise(edges)))
        assert b"".join(parts) == BYTES(0, SIZE)
        assert link.report().connections == 16


class Echo:
    """A server that sends back what it gets, and its end."""

    def __init__(self) -> None:
        self.listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with self.listener.accept()[0] as connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    def close(self) -> None:
        self.thread.join()
        self.listener.close()


def feed(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def test_counts_are_right_both_ways() -> None:
    sent = BYTES(0, 3_000_001)
    echo = Echo()
    with Link(echo.port, 2.5e9, 0.001) as link:
        with socket.create_connection((LOOPBACK, link.port)) as client:
            feeder = threading.Thread(target=feed, args=(client, sent))
            feeder.start()
            got = b"".join(iter(lambda: client.recv(1 << 20), b""))
            feeder.join()
        assert hashlib.sha256(got).digest() == hashlib.sha256(sent).digest()
        report = link.report()
    echo.close()
    assert (report.bytes_up, report.bytes_down, report.connections) == (len(sent), len(sent), 1)


def test_counts_are_those_of_the_server(origin: ScriptedOrigin) -> None:
    with Link(origin.port) as link:
        assert link.report().bytes_down == 0
        read(link.port, 0, 100_000)
        heads = link.report().bytes_down - 100_000
        assert 100 < heads < 1000, "the body, once, and one head"
        assert origin.bytes_sent == 100_000


def test_a_kept_connection_is_one(origin: ScriptedOrigin) -> None:
    with Link(origin.port, 1e9, 0.001) as link:
        connection = http.client.HTTPConnection(LOOPBACK, link.port, timeout=30)
        for n in range(5):
            connection.request("GET", PATH, headers={"Range": f"bytes={n}-{n + 9}"})
            assert connection.getresponse().read() == BYTES(n, 10)
        report = link.report()
        connection.close()
    assert (report.connections, report.connections_open) == (1, 1)


def test_a_cut_arrives_after_the_bytes_before_it(origin: ScriptedOrigin) -> None:
    origin.fault(Cut(after=1_000_000))
    with Link(origin.port, 1e9, 0.010) as link:
        with pytest.raises(http.client.IncompleteRead) as failure:
            read(link.port)
        assert failure.value.partial == BYTES(0, 1_000_000)


def test_a_reset_passes_both_ways(origin: ScriptedOrigin) -> None:
    stall = Stall(after=10)
    origin.fault(stall, Cut(after=0, reset=True))
    with Link(origin.port, 1e9, 0.001) as link:
        with socket.create_connection((LOOPBACK, link.port)) as client:
            client.sendall(f"GET {PATH} HTTP/1.1\r\n\r\n".encode())
            origin.wait_for(lambda: origin.held == 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        stall.release.set()
        origin.wait_for(lambda: origin.data[0].done)
        assert origin.data[0].bytes_sent < SIZE
        with pytest.raises(ConnectionResetError):
            read(link.port)


def test_a_server_that_is_away_is_a_reset(origin: ScriptedOrigin) -> None:
    with Link(origin.port, 1e9, 0.001) as link:
        origin.stop()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            read(link.port)
        origin.start()
        assert read(link.port, 0, 10) == BYTES(0, 10)


def test_a_client_that_does_not_read_holds_the_server_back(origin: ScriptedOrigin) -> None:
    big = pattern(1 << 40)
    origin.change(IMAGE, size=1 << 40, content=big)
    with Link(origin.port) as link, socket.create_connection((LOOPBACK, link.port)) as client:
        client.sendall(f"GET {PATH} HTTP/1.1\r\n\r\n".encode())
        origin.wait_for(lambda: origin.bytes_sent > 1 << 20)
        assert read(link.port, 0, 10) == big(0, 10), "and nobody else"
        assert link.report().bytes_down < 1 << 26


def test_nothing_is_left_behind(origin: ScriptedOrigin) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with Link(origin.port) as link:
        pid = link.pid
        assert os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(f"/proc/{pid}")
    assert len(os.listdir("/proc/self/fd")) == files


def test_it_ends_with_its_parent(origin: ScriptedOrigin) -> None:
    # The parent is killed, and what it started must not keep the pipe that both write to.
    code = (
        "import os, signal; from bench.link import Link; "
        f"print(Link({origin.port}).pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = parent.communicate(timeout=60)  # stderr is the link's too: it ends when the link has.
    assert (int(out) > 0, err) == (True, b"")


def test_it_outlives_the_thread_that_made_it(origin: ScriptedOrigin) -> None:
    made: list[Link] = []
    maker = threading.Thread(target=lambda: made.append(Link(origin.port)))
    maker.start()
    maker.join()
    with made[0] as link:
        assert read(link.port, 0, 10) == BYTES(0, 10)


def test_metadata_passes_too(origin: ScriptedOrigin) -> None:
    with Link(origin.port, 1e9, 0.001) as link:
        connection = http.client.HTTPConnection(LOOPBACK, link.port, timeout=30)
        connection.request("GET", f"/v2/images/{IMAGE}")
        assert connection.getresponse().status == 200
        connection.close()
    assert len(origin.of_kind(Kind.IMAGE)) == 1


def test_help_and_nonsense() -> None:
    command = [sys.executable, "-m", "bench.link"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "--round-trip" in shown.stdout
    wrong = subprocess.run(
        [*command, "--target-port", "1", "--rate", "0"], capture_output=True, text=True, timeout=60
    )
    assert wrong.returncode == 2


# The wire, in virtual time


def test_a_wire_takes_time_for_bytes_and_distance() -> None:
    wire = Wire(rate_bits_per_s=8e6, delay_s=0.5)
    assert wire.carry(1_000_000, there_at_s=10, now_s=10) == 11.5
    assert wire.free_at_s == 11, "distance does not cost rate"


def test_a_wire_makes_up_for_being_looked_at_late() -> None:
    wire = Wire(8e6, 0)
    wire.carry(1000, there_at_s=10, now_s=10)
    # Busy until 10.001, and looked at later; the bytes were there, so they left at once.
    assert wire.carry(1000, there_at_s=10, now_s=10.004) == pytest.approx(10.002)
    assert wire.carry(1000, there_at_s=10.003, now_s=10.004) == pytest.approx(10.004), "not before they came"
    late_s = 10 * CATCH_UP_MAX_S
    assert wire.carry(1000, there_at_s=11, now_s=11 + late_s) == pytest.approx(
        11 + late_s - CATCH_UP_MAX_S + 0.001
    )


def test_pieces_are_short_in_time_and_not_too_small() -> None:
    assert Wire(2.5e9, 0).piece_size_bytes == 156_250
    assert Wire(56_000, 0).piece_size_bytes == PIECE_SIZE_MIN_BYTES
    assert struct.unpack("ii", RESET_ON_CLOSE) == (1, 0)
