"""HTTP for whoever watches the daemon: `/metrics`, `/healthz`, `/readyz`. Rule: whoever asks here can make the
loop that serves reads work for one snapshot a second, and wait for nothing.

It runs in a thread with a loop of its own, so that it answers when the daemon's loop does not. Both only leave
each other messages: the daemon's loop makes a snapshot in one go when it comes to it, and the listener waits for
that so long; after that it goes by the last one, and says how old that is. What the disk is asked for comes from
another thread, with the same limit, and at most one at a time.

A request is a line and headers that nobody looks at, within limits of bytes and time; connections are few at a
time, and closed after one answer.
"""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import trio

from cachefs import logs, metrics
from cachefs.errors import ListenError
from cachefs.metrics import Snapshot
from cachefs.option_types import Address

log = logs.get(__name__)

BACKLOG: Final = 64
REQUEST_BYTES_MAX: Final = 8192
STOP_WAIT_S: Final = 2.0

T = TypeVar("T")

_REASONS: Final = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
                   503: "Service Unavailable"}  # fmt: skip


@dataclass(frozen=True)
class Patience:
    """How much whoever asks gets. `connections` at once; each has `request_s` from its accept to the end of its
    answer. The daemon's loop, and the disk, have `answer_s`; what they said is good for `kept_s`."""

    connections: int = 32
    request_s: float = 5.0
    answer_s: float = 2.0
    kept_s: float = 1.0


@dataclass(frozen=True)
class _Reply:
    status: int
    content_type: str
    body: bytes


class _Kept(Generic[T]):
    """A value that somebody else gives when it is asked for, and that is good for a while. `ask` has `give` called
    later, once; until then nobody is asked again. All on the listener's loop."""

    def __init__(self, ask: Callable[[], None], patience: Patience) -> None:
        self._ask, self._patience, self._clock = ask, patience, time.monotonic
        self._asked_s: float | None = None
        self._given = trio.Event()
        self.value: T | None = None
        self.given_s = self._answered_s = -float("inf")
        self.delay_s = 0.0  # How long the last one took.

    @property
    def age_s(self) -> float:
        return self._clock() - self.given_s

    @property
    def is_answered(self) -> bool:
        """Whether it came in time when it was asked for last, or something instead."""
        return self.answered_age_s < self._patience.answer_s

    @property
    def answered_age_s(self) -> float:
        return self._clock() - self._answered_s

    def give(self, value: T | None) -> None:
        """None: whoever gives it is there, and has none."""
        self._answered_s = self._clock()
        if self._asked_s is not None and value is not None:
            self.value, self.given_s = value, self._answered_s
            self.delay_s = self.given_s - self._asked_s
        self.nobody()

    def nobody(self) -> None:
        """Nobody is there to be asked."""
        self._asked_s = None
        self._given.set()

    async def get(self) -> T | None:
        """The value: new, or the last one when it does not come in time; None when there never was one."""
        if self.age_s < self._patience.kept_s:
            return self.value
        if self._asked_s is None:
            self._asked_s, self._given = self._clock(), trio.Event()
            self._ask()
        if self._asked_s is not None:  # Whoever comes after the time is over does not wait at all.
            with trio.move_on_after(max(self._asked_s + self._patience.answer_s - self._clock(), 0.0)):
                await self._given.wait()
        return self.value


class Listener:
    """`look` gives a snapshot, on the daemon's loop; `ask_disk` the values that the disk is asked for, in a
    thread. `open` before the mount is there, `run` on the daemon's loop."""

    def __init__(
        self,
        address: Address,
        look: Callable[[], Snapshot],
        ask_disk: Callable[[], dict[str, Any]],
        patience: Patience = Patience(),  # It is frozen.
    ) -> None:
        self._address, self._look, self._ask_disk, self._patience = address, look, ask_disk, patience
        self._socket: socket.socket | None = None
        self._daemon: trio.lowlevel.TrioToken | None = None
        self._own: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None
        self._ended: trio.Event | None = None  # On the daemon's loop.
        self._stopping = False

    @property
    def address(self) -> Address:
        """Where it listens, once it is open."""
        assert self._socket is not None, "open comes first"
        return Address(self._address.host, self._socket.getsockname()[1])

    def open(self) -> None:
        """Begins to listen; answers come when it runs. Raises ListenError."""
        family = socket.AF_INET6 if ":" in self._address.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._address.host, self._address.port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            taken = error.errno == errno.EADDRINUSE
            what = "another process listens there" if taken else error.strerror or str(error)
            raise ListenError(
                str(self._address), f"{what}: set [metrics] listen to another address, or to nothing"
            ) from error
        self._socket = listener

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; the thread has ended then, or is left behind because it hangs."""
        assert self._socket is not None, "open comes first"
        self._daemon = trio.lowlevel.current_trio_token()
        ended = self._ended = trio.Event()
        threading.Thread(target=self._thread, args=(self._socket,), name="metrics", daemon=True).start()
        log.info("metrics on http://%s/metrics", self.address)
        task_status.started()
        try:
            await ended.wait()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(STOP_WAIT_S):
                self._stop()
                await ended.wait()
            self.close()

    def _stop(self) -> None:
        self._stopping = True
        try:
            if self._own is not None:
                self._own.run_sync_soon(self._cancel)
        except trio.RunFinishedError:
            pass

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    # ── the thread ──

    def _thread(self, listener: socket.socket) -> None:
        try:
            trio.run(self._serve, listener)
        except BaseException:  # The daemon goes on without: reads matter more.
            log.exception("unexpected failure of the metrics: they are off until the next start")
        finally:
            assert self._daemon is not None
            assert self._ended is not None
            try:
                self._daemon.run_sync_soon(self._ended.set)
            except trio.RunFinishedError:
                pass

    async def _serve(self, listener: socket.socket) -> None:
        self._own = trio.lowlevel.current_trio_token()
        if self._stopping:
            return
        assert self._daemon is not None, "run came first"
        answers = _Answers(self._look, self._ask_disk, self._daemon, self._patience)
        server = _Server(answers.to, self._patience)
        with trio.CancelScope() as self._scope:
            await server.run(trio.socket.from_stdlib_socket(listener))


class _Answers:
    """What each path is answered."""

    def __init__(
        self,
        look: Callable[[], Snapshot],
        ask_disk: Callable[[], dict[str, Any]],
        daemon: trio.lowlevel.TrioToken,
        patience: Patience,
    ) -> None:
        self._look, self._ask_disk, self._daemon, self._patience = look, ask_disk, daemon, patience
        self._own = trio.lowlevel.current_trio_token()
        self._repeats = logs.Repeats(log)
        self._snapshot: _Kept[Snapshot] = _Kept(self._ask_loop, patience)
        self._store: _Kept[dict[str, Any]] = _Kept(self._ask_store, patience)
        self._text: tuple[Snapshot, bytes] | None = None
        self._paths: dict[str, Callable[[], Awaitable[_Reply]]] = {
            "/metrics": self._metrics, "/healthz": self._healthz, "/readyz": self._readyz,
        }  # fmt: skip

    async def to(self, path: str) -> _Reply:
        answer = self._paths.get(path)
        if answer is None:
            return _text(404, f"there is {', '.join(self._paths)}")
        return await answer()

    async def _metrics(self) -> _Reply:
        async with trio.open_nursery() as nursery:  # Both at once: each may take its time.
            nursery.start_soon(self._store.get)
            snapshot = await self._snapshot.get()
        if snapshot is None:
            return _text(503, "the daemon's loop has not answered yet")
        seconds = {"age": self._snapshot.age_s, "delay": self._snapshot.delay_s}
        if self._store.value is not None:
            seconds["store_age"] = self._store.age_s
        # Many who ask at once get one text.
        is_new = self._text is None or self._text[0] is not snapshot or seconds["age"] >= self._patience.kept_s
        if is_new or self._text is None:
            whole = Snapshot(snapshot.status, snapshot.times, self._store.value, seconds)
            self._text = snapshot, metrics.exposition(whole, self._unreadable)
        return _Reply(200, metrics.CONTENT_TYPE, self._text[1])

    def _unreadable(self, family: metrics.Family, error: Exception) -> None:
        self._repeats.error(family.name, "the metric %s cannot be read: %r", family.name, error)

    async def _healthz(self) -> _Reply:
        await self._snapshot.get()
        alive, age_s = self._snapshot.is_answered, self._snapshot.answered_age_s
        age = None if age_s == float("inf") else round(age_s, 3)
        return _json(200 if alive else 503, {"alive": alive, "heartbeat_age_seconds": age})

    async def _readyz(self) -> _Reply:
        snapshot = await self._snapshot.get()
        if snapshot is None or not self._snapshot.is_answered:
            return _json(503, {"state": "unready", "reasons": ["the loop that serves reads does not answer"]})
        ready = snapshot.status["ready"]
        return _json(200 if ready["is_ready"] else 503, {"state": ready["state"], "reasons": ready["reasons"]})

    # ── who is asked ──

    def _ask_loop(self) -> None:
        try:
            self._daemon.run_sync_soon(self._on_daemons_loop)
        except trio.RunFinishedError:
            self._snapshot.nobody()

    def _on_daemons_loop(self) -> None:
        """Nothing may go wrong here: trio takes the daemon down for an exception."""
        found: Snapshot | None = None
        try:
            found = self._look()
        except Exception as error:  # noqa: BLE001
            self._repeats.error("snapshot", "unexpected failure of a snapshot: %r", error)
        try:
            self._own.run_sync_soon(self._snapshot.give, found)
        except trio.RunFinishedError:
            pass

    def _ask_store(self) -> None:
        trio.lowlevel.spawn_system_task(self._in_a_thread)

    async def _in_a_thread(self) -> None:
        found: dict[str, Any] | None = None
        try:
            found = await trio.to_thread.run_sync(self._ask_disk, abandon_on_cancel=True)
        except Exception as error:  # noqa: BLE001  # As when it does not answer.
            self._repeats.warning("disk", "the store's disk cannot say how full it is: %r", error)
        self._store.give(found)


class _Server:
    """HTTP/1.1, as much of it as a scrape needs: `answer` gives what is at a path."""

    def __init__(self, answer: Callable[[str], Awaitable[_Reply]], patience: Patience) -> None:
        self._answer, self._patience = answer, patience
        self._limit = trio.Semaphore(patience.connections)
        self._repeats = logs.Repeats(log)

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._limit.acquire()  # More wait in the kernel, and then nobody but they do.
                try:
                    connection, _ = await listener.accept()
                except OSError as error:
                    self._limit.release()
                    self._repeats.warning("accept", "metrics: no connection can be accepted: %s", error.strerror)
                    await trio.sleep(1)
                    continue
                except BaseException:
                    self._limit.release()
                    raise
                nursery.start_soon(self._converse, trio.SocketStream(connection))

    async def _converse(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                with trio.move_on_after(self._patience.request_s):
                    head = await _head(stream)
                    if head:
                        await self._reply_to(head, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # Whoever asked has gone away.
        except Exception:  # A bug in one answer is none of the next one's.
            log.exception("unexpected failure of an answer")
        finally:
            self._limit.release()

    async def _reply_to(self, head: bytes, stream: trio.SocketStream) -> None:
        method, path = _request_line(head)
        if method not in ("GET", "HEAD"):
            reply = _text(405 if method else 400, "GET is all there is")
        else:
            reply = await self._answer(path)
        lines = [
            f"HTTP/1.1 {reply.status} {_REASONS[reply.status]}",
            f"Content-Type: {reply.content_type}",
            f"Content-Length: {len(reply.body)}",
            "Cache-Control: no-store",
            "Connection: close",
            *(["Allow: GET, HEAD"] if reply.status == 405 else []),
        ]
        await stream.send_all(
            "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else reply.body)
        )
        await stream.send_eof()


async def _head(stream: trio.SocketStream) -> bytes:
    """A request up to its empty line; nothing when the other side leaves before; what came, when that is too
    much."""
    head = b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < REQUEST_BYTES_MAX:
        part = await stream.receive_some(REQUEST_BYTES_MAX)
        if not part:
            return b""
        head += part
    return head


def _request_line(head: bytes) -> tuple[str, str]:
    """Method and path; two empty texts for what is none."""
    words = head.split(b"\n", 1)[0].decode("latin-1").split()
    if len(head) >= REQUEST_BYTES_MAX or len(words) != 3 or not words[2].startswith("HTTP/1."):
        return "", ""
    return words[0], words[1].partition("?")[0]


def _json(status: int, value: dict[str, Any]) -> _Reply:
    return _Reply(status, "application/json", json.dumps(value).encode() + b"\n")


def _text(status: int, text: str) -> _Reply:
    return _Reply(status, "text/plain; charset=utf-8", text.encode() + b"\n")
