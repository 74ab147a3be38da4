"""A network link in front of a loopback server. Rule: it may delay bytes and never changes them.

    with Link(target_port, rate_bits_per_s=200e6, round_trip_s=0.030) as link:
        read(f"http://127.0.0.1:{link.port}/...")
        print(link.report())

It is a relay in a process of its own, because the kernels that this runs on need not have netem. What it
models, with one loop over all connections:

- The server's bytes share one wire: a piece of one connection at a time, in turn, each as long as its size
  takes at the link's rate. What the wire has no time for yet stays with the server, as it would.
- Each direction is half a round trip long. Pieces wait in a delay line, so distance does not cost rate.
- A connection's first request waits for one round trip more, which the handshake would have taken.
- Ends and resets travel like bytes.

It does not model loss, nor TCP's slow start, nor a limit on what clients send.
"""

from __future__ import annotations

import argparse
import ctypes
import heapq
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from types import FrameType, TracebackType
from typing import Any, Self

LOOPBACK = "127.0.0.1"
PIECE_S = 0.0005  # What one connection gets of the wire before the next one's turn.
PIECE_SIZE_MIN_BYTES = 2 << 10
PIECE_SIZE_MAX_BYTES = 256 << 10
PIECES_PER_TURN_MAX = 64  # Then events are looked at again, also on a wire that is never busy.
CATCH_UP_MAX_S = 0.05  # What the wire makes up for when the process was not run in time.
WINDOW_SIZE_MAX_BYTES = 256 << 20
UNREAD_SIZE_MIN_BYTES = 256 << 10
UNREAD_SIZE_MAX_BYTES = 2 << 20
STARTING_MAX_S = 20
ENDING_MAX_S = 10
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, for no time.
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK = 1, 29
TIMER_SLACK_NS = 1000  # Linux's own 50,000 would be a tenth of a piece.


# For benchmarks and tests


@dataclass(frozen=True)
class LinkReport:
    bytes_down: int  # From the server, as the wire carried them.
    bytes_up: int
    connections: int  # Ever.
    connections_open: int


class Link:
    """The relay process, listening on `port`; it ends with `close`, or with this process."""

    def __init__(self, target_port: int, rate_bits_per_s: float = math.inf, round_trip_s: float = 0) -> None:
        options = {"target-port": target_port, "rate": rate_bits_per_s, "round-trip": round_trip_s}
        command = [sys.executable, "-P", __file__, "--parent", str(os.getpid())]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self._asking = threading.Lock()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, text=False
        )
        self.pid = self._process.pid
        try:
            self.port = int(self._told()["port"])
        except BaseException:
            self.close()
            raise

    def report(self) -> LinkReport:
        with self._asking:
            assert self._process.stdin is not None
            self._process.stdin.write(b"report\n")
            return LinkReport(**self._told())

    def close(self) -> None:
        with self._asking, self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(ENDING_MAX_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _told(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], STARTING_MAX_S)[0]:
            raise TimeoutError(f"link {self._process.pid} is silent")
        line = self._process.stdout.readline()
        if not line:
            raise ConnectionError(f"link {self._process.pid} has ended")
        told: dict[str, Any] = json.loads(line)
        return told


# The relay


class Wire:
    """When bytes come out of one direction of the link."""

    def __init__(self, rate_bits_per_s: float, delay_s: float) -> None:
        self.rate_bits_per_s, self.delay_s = rate_bits_per_s, delay_s
        self.free_at_s = 0.0
        piece = min(rate_bits_per_s / 8 * PIECE_S, PIECE_SIZE_MAX_BYTES)
        self.piece_size_bytes = max(PIECE_SIZE_MIN_BYTES, int(piece))

    def carry(self, size: int, there_at_s: float, now_s: float) -> float:
        """Bytes that have been there since `there_at_s` take their turn now: when the last one arrives."""
        start_s = max(self.free_at_s, there_at_s, now_s - CATCH_UP_MAX_S)
        self.free_at_s = start_s + size * 8 / self.rate_bits_per_s
        return self.free_at_s + self.delay_s

    def capacity(self, seconds: float) -> int:
        """The bytes that it carries in this time, within reason."""
        size = self.rate_bits_per_s / 8 * seconds if seconds else 0
        return int(min(size, WINDOW_SIZE_MAX_BYTES))


class End(Enum):
    FIN = "the source sends no more"
    RESET = "the source is broken"


@dataclass(eq=False)
class Flow:
    """One direction of one connection.

    A source is in exactly one of these states: watched by epoll; ready, in its lane's queue; full, with as
    much under way as a window allows; or ended.
    """

    pair: Pair
    source: socket.socket
    sink: socket.socket
    lane: Lane
    not_before_s: float  # When the handshake is over.
    ready_at_s: float = 0.0
    full: bool = False
    under_way: int = 0  # Bytes taken from the source that the sink has not taken.
    arrived: deque[memoryview | End] = field(default_factory=deque)
    ended: bool = False  # The sink knows.


@dataclass(eq=False)
class Lane:
    """One direction of the link, and who waits for it."""

    wire: Wire
    window: int
    ready: deque[Flow] = field(default_factory=deque)
    bytes_carried: int = 0


@dataclass(eq=False)
class Pair:
    """One connection: the client's socket and ours to the server."""

    client: socket.socket
    server: socket.socket
    flows: list[Flow] = field(default_factory=list)
    closed: bool = False


class Relay:
    def __init__(self, target_port: int, rate_bits_per_s: float, round_trip_s: float) -> None:
        self.target = (LOOPBACK, target_port)
        self.round_trip_s = round_trip_s
        wire_down = Wire(rate_bits_per_s, round_trip_s / 2)
        wire_up = Wire(math.inf, round_trip_s / 2)
        # Twice what fills the delay line, so that only a client that does not read meets the window.
        self.down = Lane(wire_down, wire_down.capacity(round_trip_s) + (1 << 20))
        self.up = Lane(wire_up, wire_down.capacity(round_trip_s) + (1 << 20))
        unread = wire_down.capacity(2 * round_trip_s)
        self.unread_size_bytes = min(max(unread, UNREAD_SIZE_MIN_BYTES), UNREAD_SIZE_MAX_BYTES)
        self.listener = socket.create_server((LOOPBACK, 0), backlog=512)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.pairs: set[Pair] = set()
        self.connections = 0
        self._line: list[tuple[float, int, Flow, memoryview | End]] = []  # A heap: the delay lines of all.
        self._entries = 0
        self._epoll = select.epoll()
        self._interest: dict[int, int] = {}
        self._reads: dict[int, Flow] = {}
        self._writes: dict[int, Flow] = {}
        self._asked = b""
        self._over = False

    def run(self) -> None:
        self._epoll.register(self.listener, select.EPOLLIN)
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._tell({"port": self.port})
        while not self._over:
            now_s = time.monotonic()
            self._deliver(now_s)
            self._pump(self.down, now_s)
            self._pump(self.up, now_s)
            # select() takes microseconds, where epoll_wait() would round up to milliseconds.
            if select.select([self._epoll], [], [], self._idle_s())[0]:
                for fd, events in self._epoll.poll(0):
                    self._event(fd, events)

    def report(self) -> LinkReport:
        return LinkReport(self.down.bytes_carried, self.up.bytes_carried, self.connections, len(self.pairs))

    def _idle_s(self) -> float | None:
        due = [lane.wire.free_at_s for lane in (self.down, self.up) if lane.ready]
        if self._line:
            due.append(self._line[0][0])
        return max(0.0, min(due) - time.monotonic()) if due else None

    # From sources onto the wire

    def _pump(self, lane: Lane, now_s: float) -> None:
        for _ in range(PIECES_PER_TURN_MAX):
            if not lane.ready or lane.wire.free_at_s > now_s:
                return
            flow = lane.ready.popleft()
            if flow.pair.closed:
                continue
            if flow.under_way >= lane.window:
                flow.full = True
                continue
            self._take(flow, now_s)

    def _take(self, flow: Flow, now_s: float) -> None:
        """One piece, if there is any, and the next state of the flow's source."""
        lane = flow.lane
        try:
            data = flow.source.recv(lane.wire.piece_size_bytes)
        except BlockingIOError:
            return self._watch(flow.source, select.EPOLLIN)
        except OSError:
            return self._send_off(flow, End.RESET, now_s + lane.wire.delay_s)
        if not data:
            return self._send_off(flow, End.FIN, now_s + lane.wire.delay_s)
        arrival_s = lane.wire.carry(len(data), flow.ready_at_s, now_s)
        lane.bytes_carried += len(data)
        flow.under_way += len(data)
        self._send_off(flow, memoryview(data), arrival_s)
        if len(data) == lane.wire.piece_size_bytes:
            lane.ready.append(flow)  # Still ready since then: the wire can make up for a late turn.
        else:
            self._watch(flow.source, select.EPOLLIN)
        return None

    def _send_off(self, flow: Flow, piece: memoryview | End, arrival_s: float) -> None:
        self._entries += 1  # Equal times keep their order.
        arrival_s = max(arrival_s, flow.not_before_s + flow.lane.wire.delay_s)
        heapq.heappush(self._line, (arrival_s, self._entries, flow, piece))

    # From the delay lines to sinks

    def _deliver(self, now_s: float) -> None:
        while self._line and self._line[0][0] <= now_s:
            _, _, flow, piece = heapq.heappop(self._line)
            if not flow.pair.closed:
                flow.arrived.append(piece)
                if len(flow.arrived) == 1:
                    self._hand_over(flow)

    def _hand_over(self, flow: Flow) -> None:
        """What has arrived, as far as the sink takes it."""
        while flow.arrived and not flow.pair.closed:
            piece = flow.arrived[0]
            if isinstance(piece, End):
                return self._end(flow, piece)
            try:
                taken = flow.sink.send(piece)
            except BlockingIOError:
                return self._watch(flow.sink, select.EPOLLOUT)
            except OSError:
                return self._close(flow.pair, reset=True)
            flow.under_way -= taken
            if taken == len(piece):
                flow.arrived.popleft()
            else:
                flow.arrived[0] = piece[taken:]
        if flow.full and flow.under_way < flow.lane.window:
            flow.full = False
            flow.ready_at_s = time.monotonic()
            flow.lane.ready.append(flow)
        return None

    def _end(self, flow: Flow, end: End) -> None:
        flow.arrived.clear()
        flow.ended = True
        if end is End.RESET:
            return self._close(flow.pair, reset=True)
        with suppress(OSError):
            flow.sink.shutdown(socket.SHUT_WR)
        if all(each.ended for each in flow.pair.flows):
            self._close(flow.pair, reset=False)
        return None

    # Sockets

    def _event(self, fd: int, events: int) -> None:
        if fd == self.listener.fileno():
            return self._accept()
        if fd == sys.stdin.fileno():
            return self._answer()
        interest = self._interest.get(fd, 0)
        broken = events & (select.EPOLLERR | select.EPOLLHUP)
        if interest & select.EPOLLOUT and (events & select.EPOLLOUT or broken):
            self._unwatch(fd, select.EPOLLOUT)
            self._hand_over(self._writes[fd])
        # Closed by that hand-over, perhaps.
        if self._interest.get(fd, 0) & select.EPOLLIN and (events & select.EPOLLIN or broken):
            self._unwatch(fd, select.EPOLLIN)
            flow = self._reads[fd]
            flow.ready_at_s = time.monotonic()
            flow.lane.ready.append(flow)
        return None

    def _watch(self, end: socket.socket, event: int) -> None:
        fd = end.fileno()
        before = self._interest.get(fd, 0)
        self._interest[fd] = before | event
        if before:
            self._epoll.modify(fd, before | event)
        else:
            self._epoll.register(fd, event)

    def _unwatch(self, fd: int, event: int) -> None:
        """With nothing left to watch for, unregister: epoll tells of hang-ups whether asked or not."""
        rest = self._interest.pop(fd, 0) & ~event
        if rest:
            self._interest[fd] = rest
            self._epoll.modify(fd, rest)
        else:
            self._epoll.unregister(fd)

    def _accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:
            return  # It left before we came.
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.unread_size_bytes)
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.connect_ex(self.target)  # Should it fail, the first recv says so.
        now_s = time.monotonic()
        pair = Pair(client, server)
        up = Flow(pair, client, server, self.up, now_s + self.round_trip_s)
        down = Flow(pair, server, client, self.down, now_s + self.round_trip_s)
        pair.flows = [up, down]
        self.pairs.add(pair)
        self.connections += 1
        for flow in pair.flows:
            self._reads[flow.source.fileno()] = self._writes[flow.sink.fileno()] = flow
            self._watch(flow.source, select.EPOLLIN)

    def _close(self, pair: Pair, reset: bool) -> None:
        pair.closed = True
        self.pairs.discard(pair)
        for end in (pair.client, pair.server):
            fd = end.fileno()
            del self._reads[fd], self._writes[fd]
            if self._interest.get(fd):
                self._unwatch(fd, ~0)
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            end.close()

    # The parent

    def _answer(self) -> None:
        asked = os.read(sys.stdin.fileno(), 4096)
        self._over = not asked
        *lines, self._asked = (self._asked + asked).split(b"\n")
        for _ in lines:
            self._tell(asdict(self.report()))

    def _tell(self, told: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):
            print(json.dumps(told), flush=True)


def end_with_parent(parent: int) -> None:
    """Death of the parent's *thread* signals too, so see who the parent is before believing it."""

    def orphaned(signum: int, frame: FrameType | None) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGUSR1, orphaned)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
    orphaned(0, None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.link",
        description="Relay connections to a loopback server as if a network link lay between.",
        epilog="Prints {'port': N}, then a line of counts for each line on stdin. Ends with stdin.",
    )
    parser.add_argument("--target-port", type=int, required=True, help="where the server listens")
    parser.add_argument("--rate", type=float, default=math.inf, help="of its responses, bit/s: 2.5e9, inf")
    parser.add_argument("--round-trip", type=float, default=0.0, help="seconds: 0.030")
    parser.add_argument("--parent", type=int, help="a process to end with, which must have started this one")
    options = parser.parse_args(arguments)
    if not (options.rate > 0 and 0 <= options.round_trip < math.inf):
        parser.error("the rate must be above 0, and the round trip 0 or more")
    if options.parent is not None:
        end_with_parent(options.parent)
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)
    Relay(options.target_port, options.rate, options.round_trip).run()


if __name__ == "__main__":
    main()
