"""The HTTP of the metrics: what it answers, also while the daemon's loop or its disk does not, and to whom.

Real sockets and the real thread; the daemon's loop is the test's own, which can be made to hang.
"""

from __future__ import annotations

import functools
import http.client
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import trio

from cachefs.errors import ListenError
from cachefs.listener import Listener, Patience
from cachefs.metrics import Snapshot
from cachefs.option_types import Address

LOOPBACK: Final = Address("127.0.0.1", 0)
# Long enough for a loop that is well, short enough to wait for.
SHORT: Final = Patience(connections=4, request_s=0.5, answer_s=0.2, kept_s=0.05)
READY: Final = {"is_ready": True, "state": "ready", "reasons": []}


def real_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Sockets and threads know no other time."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        async def main() -> None:
            with trio.fail_after(60):
                await test(**fixtures)

        trio.run(main)

    return run


@dataclass
class Daemon:
    """What the listener asks: counts how often, and may fail, or hang."""

    ready: dict[str, Any] = field(default_factory=lambda: dict(READY))
    looks: int = 0
    asks: int = 0
    broken: bool = False
    disk: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.disk.set()

    def look(self) -> Snapshot:
        self.looks += 1
        if self.broken:
            raise RuntimeError("a bug")
        return Snapshot({"ready": self.ready, "uptime": self.looks, "reads": {"waiting": 3}}, {})

    def ask_disk(self) -> dict[str, Any]:
        self.asks += 1
        self.disk.wait(20)
        return {"bytes_on_disk": 12345}


@asynccontextmanager
async def listening(daemon: Daemon, patience: Patience = SHORT) -> AsyncIterator[Listener]:
    listener = Listener(LOOPBACK, daemon.look, daemon.ask_disk, patience)
    listener.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        yield listener
        daemon.disk.set()
        nursery.cancel_scope.cancel()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def values(self) -> dict[str, float]:
        """Those without labels, by name."""
        lines = [line.split() for line in self.text.splitlines() if line and line[0] != "#" and "{" not in line]
        return {name: float(value) for name, value in lines}


def get(address: Address, path: str, method: str = "GET") -> Answer:
    with closing(http.client.HTTPConnection(address.host, address.port, timeout=20)) as connection:
        connection.request(method, path)
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read().decode())


def left_over() -> list[threading.Thread]:
    """Threads of listeners that do not end."""
    threads = [thread for thread in threading.enumerate() if thread.name == "metrics"]
    for thread in threads:
        thread.join(10)  # The last thing that one does is to say that it ends.
    return [thread for thread in threads if thread.is_alive()]


async def asked(listener: Listener, path: str, method: str = "GET") -> Answer:
    return await trio.to_thread.run_sync(get, listener.address, path, method)


def while_the_loop_hangs(listener: Listener, *paths: str) -> list[Answer]:
    """Answers to these, one after the other, while the loop that calls this does nothing else."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.extend(get(listener.address, path) for path in paths))
    thread.start()
    thread.join(30)
    return answers


@real_time
async def test_metrics_health_and_readiness_are_answered() -> None:
    async with listening(Daemon()) as listener:
        metrics = await asked(listener, "/metrics")
        assert (metrics.status, metrics.headers["Content-Type"]) == (
            200,
            "text/plain; version=0.0.4; charset=utf-8",
        )
        assert metrics.values["cachefs_ready"] == 1
        assert metrics.values["cachefs_reads_waiting"] == 3
        assert metrics.values["cachefs_store_used_bytes"] == 12345
        assert metrics.values["cachefs_snapshot_age_seconds"] < 1
        health = await asked(listener, "/healthz")
        assert (health.status, health.json["alive"]) == (200, True)
        assert health.json["heartbeat_age_seconds"] < 1
        ready = await asked(listener, "/readyz?verbose")
        assert (ready.status, ready.json) == (200, {"state": "ready", "reasons": []})


@real_time
async def test_degraded_is_ready_with_reasons_and_what_cannot_be_used_is_not() -> None:
    daemon = Daemon()
    async with listening(daemon) as listener:
        daemon.ready = {"is_ready": True, "state": "degraded", "reasons": ["the store's disk is down: it hangs"]}
        answer = await asked(listener, "/readyz")
        assert (answer.status, answer.json["state"]) == (200, "degraded")
        assert answer.json["reasons"] == ["the store's disk is down: it hangs"]
        daemon.ready = {"is_ready": False, "state": "unready", "reasons": ["it is not mounted"]}
        await trio.sleep(2 * SHORT.kept_s)
        answer = await asked(listener, "/readyz")
        assert (answer.status, answer.json) == (503, {"state": "unready", "reasons": ["it is not mounted"]})


@real_time
async def test_a_loop_that_hangs_is_told_by_all_three_and_holds_up_none() -> None:
    daemon = Daemon()
    async with listening(daemon) as listener:
        assert (await asked(listener, "/metrics")).values["cachefs_uptime_seconds"] == 1
        await trio.sleep(2 * SHORT.kept_s)
        metrics, health, ready, again = while_the_loop_hangs(
            listener, "/metrics", "/healthz", "/readyz", "/metrics"
        )
        assert (metrics.status, metrics.values["cachefs_uptime_seconds"]) == (200, 1), "the last snapshot"
        assert metrics.values["cachefs_snapshot_age_seconds"] >= SHORT.answer_s
        assert again.values["cachefs_snapshot_age_seconds"] > metrics.values["cachefs_snapshot_age_seconds"]
        assert (health.status, health.json["alive"]) == (503, False)
        assert health.json["heartbeat_age_seconds"] >= SHORT.answer_s
        assert (ready.status, ready.json["state"]) == (503, "unready")
        assert daemon.looks == 1, "nobody could look"
        await trio.sleep(0.1)  # It is well again:
        assert (await asked(listener, "/healthz")).status == 200
        assert (await asked(listener, "/metrics")).values["cachefs_snapshot_age_seconds"] < SHORT.answer_s


@real_time
async def test_before_the_loop_ever_answered_there_are_no_metrics() -> None:
    async with listening(Daemon()) as listener:
        metrics, health, ready = while_the_loop_hangs(listener, "/metrics", "/healthz", "/readyz")
        assert [metrics.status, health.status, ready.status] == [503, 503, 503]
        assert health.json == {"alive": False, "heartbeat_age_seconds": None}


@real_time
async def test_a_disk_that_hangs_leaves_out_what_it_was_asked_for_and_is_asked_once() -> None:
    daemon = Daemon()
    async with listening(daemon) as listener:
        daemon.disk.clear()
        for _ in range(3):
            answer = await asked(listener, "/metrics")
            assert (answer.status, answer.values["cachefs_reads_waiting"]) == (200, 3)
            assert "cachefs_store_used_bytes" not in answer.values
            await trio.sleep(2 * SHORT.kept_s)
        assert daemon.asks == 1
        daemon.disk.set()
        await trio.sleep(0.1)
        answer = await asked(listener, "/metrics")
        assert answer.values["cachefs_store_used_bytes"] == 12345
        daemon.disk.clear()
        await trio.sleep(2 * SHORT.kept_s)
        answer = await asked(listener, "/metrics")
        assert answer.values["cachefs_store_used_bytes"] == 12345, "the last that is known, and its age:"
        assert answer.values["cachefs_store_usage_age_seconds"] >= SHORT.answer_s


@real_time
async def test_a_bug_in_a_snapshot_is_no_end_of_anything(caplog: pytest.LogCaptureFixture) -> None:
    daemon = Daemon(broken=True)
    async with listening(daemon) as listener:
        assert (await asked(listener, "/metrics")).status == 503
        assert (await asked(listener, "/healthz")).status == 200, "the loop did answer"
        assert (await asked(listener, "/metrics")).status == 503
        daemon.broken = False
        assert (await asked(listener, "/metrics")).status == 200
    said = [record.getMessage() for record in caplog.records if "cannot be read" not in record.getMessage()]
    assert said == ["unexpected failure of a snapshot: RuntimeError('a bug')"]


@real_time
async def test_many_who_ask_at_once_cost_one_snapshot() -> None:
    daemon = Daemon()
    patience = Patience(connections=8, request_s=20, answer_s=5, kept_s=60)
    async with listening(daemon, patience) as listener:
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await asked(listener, "/metrics"))

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(ask)
        assert [answer.status for answer in answers] == [200] * 30
        assert (daemon.looks, daemon.asks) == (1, 1)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/ HTTP/1.0\r\n\r\n", 404),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET http://x/metrics HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 4\r\n\r\nabcd", 405),
        (b"GET /healthz HTTP/1.1\n\n", 200),
        (b"GET /healthz\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /healthz SPDY/9\r\n\r\n", 400),
        (b"GET /" + b"x" * 9000, 400),
        (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 2000, 400),
    ],
)
@real_time
async def test_what_is_no_request_gets_a_status_and_an_end(request_: bytes, status: int) -> None:
    async with listening(Daemon()) as listener:
        said = await trio.to_thread.run_sync(_raw, listener.address, request_)
        assert said.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"Connection: close\r\n" in said
        assert (await asked(listener, "/healthz")).status == 200


def _raw(address: Address, request: bytes) -> bytes:
    with socket.create_connection((address.host, address.port), timeout=20) as connection:
        connection.sendall(request)
        said = b""
        try:
            while part := connection.recv(65536):
                said += part
        except ConnectionResetError:
            pass  # It had sent more than anybody read.
        return said


@real_time
async def test_head_has_no_body() -> None:
    async with listening(Daemon()) as listener:
        answer = await asked(listener, "/metrics", "HEAD")
        assert (answer.status, answer.text) == (200, "")
        assert int(answer.headers["Content-Length"]) > 100


@real_time
async def test_who_says_nothing_or_reads_nothing_is_shown_out() -> None:
    """More connections than there are places, all of them mute: whoever comes then is answered in time."""
    async with listening(Daemon()) as listener:
        address = (listener.address.host, listener.address.port)
        mute = [await trio.to_thread.run_sync(socket.create_connection, address) for _ in range(10)]
        mute[0].sendall(b"GET /metr")
        try:
            assert (await asked(listener, "/healthz")).status == 200
            assert await trio.to_thread.run_sync(mute[1].recv, 10) == b"", "it was closed"
        finally:
            for connection in mute:
                connection.close()


@real_time
async def test_who_leaves_early_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    async with listening(Daemon()) as listener:
        for request in (b"", b"GET /metrics HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"):
            connection = socket.create_connection((listener.address.host, listener.address.port))
            connection.sendall(request)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # A reset, no goodbye.
            connection.close()
        assert (await asked(listener, "/metrics")).status == 200
    assert "unexpected" not in caplog.text


@real_time
async def test_a_port_that_is_taken_is_said_so() -> None:
    async with listening(Daemon()) as listener:
        second = Listener(listener.address, Daemon().look, Daemon().ask_disk)
        with pytest.raises(ListenError) as failure:
            second.open()
        assert str(failure.value) == (
            f"metrics/listen: {listener.address}: another process listens there: set [metrics] listen to another "
            "address, or to nothing"
        )


@real_time
async def test_an_address_that_is_not_here_is_said_so() -> None:
    with pytest.raises(ListenError, match="Cannot assign requested address"):
        Listener(Address("192.0.2.1", 0), Daemon().look, Daemon().ask_disk).open()


@real_time
async def test_at_the_end_nobody_listens_and_no_thread_is_left() -> None:
    async with listening(Daemon()) as listener:
        address = listener.address
        assert (await asked(listener, "/healthz")).status == 200
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((address.host, address.port))
    assert not left_over()


@real_time
async def test_who_is_stopped_before_the_thread_ran_ends_as_well() -> None:
    daemon = Daemon()
    listener = Listener(LOOPBACK, daemon.look, daemon.ask_disk, SHORT)
    listener.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        nursery.cancel_scope.cancel()
    assert not left_over()


@real_time
async def test_it_listens_at_ipv6_too() -> None:
    try:
        socket.socket(socket.AF_INET6).bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")
    daemon = Daemon()
    listener = Listener(Address("::1", 0), daemon.look, daemon.ask_disk, SHORT)
    listener.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        assert (await asked(listener, "/healthz")).status == 200
        nursery.cancel_scope.cancel()
