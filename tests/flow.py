"""A whole way of a read for tests: a source that says where each of its bytes belongs, a link and faults in
front of it, the real store behind it, and a clock that nobody waits for. Rule: faults are layers and scripts;
nothing of cachefs is patched.

Time. The store works in real threads, and `MockClock(autojump_threshold=0)` jumps while they do: whatever they
take would last until some deadline far away. A threshold above 0 only makes that rarer, and every jump slow. So
the clock here jumps by itself never; `virtual_time` keeps a task that moves it to the next deadline when all
tasks are blocked and trio counts no thread at work. Threads therefore take no time at all, time is spent only
where somebody sleeps, and a test that can never go on fails at once instead of hanging.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import threading
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import UUID

import trio
from trio.testing import MockClock, active_thread_count, wait_all_tasks_blocked

from cachefs.blocks import Blocks
from cachefs.errors import OriginError, OriginUnavailable, RangeRefused
from cachefs.fetcher import MEMORY_MAX, Fetcher
from cachefs.plan.extents import BLOCK, Extent
from cachefs.sources import Sink, Timing
from cachefs.store.content import Store
from cachefs.store.format import ViewKind
from cachefs.store.recover import Opened, open_store
from cachefs.store.room import Limits
from cachefs.store.view import StoredView
from cachefs.views.stored import StoredFile
from tests.stores import SPAN, UNLIMITED, Edges, image_id, patient

KIB, MIB = 1 << 10, 1 << 20

# ── Time ──────────────────────────────────────────────────────────────────────────────────────────────

# Real clocks are always a little late, and never by the same. Who wakes on the dot may find, by rounding, that it
# is too early, and would look again for ever.
OVERSHOOT_S = 1e-7
# No test takes a tenth of it; one that takes it goes round in circles.
REAL_S_MAX = 60

# So often it is looked, in real time, whether threads are at work.
BUSY_LOOK_S = 0.0002

_quiet: trio.lowlevel.RunVar[list[trio.Event]] = trio.lowlevel.RunVar("quiet")


def virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test in virtual time, which starts at 0."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        clock = MockClock()

        async def main() -> None:
            _quiet.set([])
            async with trio.open_nursery() as nursery:
                token = trio.lowlevel.current_trio_token()
                watchdog = threading.Timer(REAL_S_MAX, token.run_sync_soon, [nursery.cancel_scope.cancel])
                watchdog.start()
                try:
                    nursery.start_soon(_keep_time, clock)
                    await test(*args, **kwargs)
                    nursery.cancel_scope.cancel()
                    return
                finally:
                    watchdog.cancel()
            raise AssertionError(f"it went on for {REAL_S_MAX} s")

        try:
            trio.run(main, clock=clock)
        except BaseExceptionGroup as group:
            raise _alone(group) from None

    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]  # For pytest's fixtures.
    del run.__wrapped__  # Or pytest would see an async test.
    return run


def _alone(error: BaseException) -> BaseException:
    """What went wrong, out of the nurseries that it passed through, where it is one thing."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _keep_time(clock: MockClock) -> None:
    lateness = random.Random(0)
    while True:
        await wait_all_tasks_blocked()
        if _threads_at_work():
            # Until one ends, or waits for this loop.
            await wait_all_tasks_blocked(BUSY_LOOK_S)
            continue
        waiting = _quiet.get()
        if waiting:
            _quiet.set([])
            for event in waiting:
                event.set()
            continue
        due_s = trio.lowlevel.current_statistics().seconds_to_next_deadline
        assert due_s != math.inf, "everybody waits, and nothing is due"
        clock.jump(max(due_s, 0.0) + OVERSHOOT_S * lateness.random())


def nap(seconds: float) -> None:
    """In a thread of `to_thread`: sleeps in virtual time. Raises as `from_thread.run` does when the test ends."""
    trio.from_thread.run(trio.sleep, seconds)


def _threads_at_work() -> int:
    """How many do not wait for this loop. (Those begun with `abandon_on_cancel` wait by tasks of the system.)"""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    tasks = (task for nursery in root.child_nurseries for task in nursery.child_tasks)
    waiting = sum(getattr(task.coro, "__qualname__", "") == "Run.run_system" for task in tasks)
    at_work: int = active_thread_count() - waiting
    return at_work


async def quiet() -> None:
    """Returns when nothing moves any more unless time does."""
    event = trio.Event()
    _quiet.get().append(event)
    await event.wait()


async def until(holds: Callable[[], bool]) -> None:
    """Returns soon after `holds()`, in virtual time; fails when that does not come in 1000 s."""
    for _ in range(20_000):
        if holds():
            return
        await trio.sleep(0.05)
    raise AssertionError("it never came")


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────────

_PIECE = 256 * KIB


@functools.lru_cache(maxsize=128)
def _piece(image: int, number: int) -> bytes:
    words = array("Q", range(image << 48 | number * _PIECE, image << 48 | (number + 1) * _PIECE, 8))
    words.byteswap()
    return words.tobytes()


def content(image: int, start: int, end: int) -> bytes:
    """What image `image` has there: words of 8 bytes, each its own offset (and the image's number on top)."""
    first = start // _PIECE
    got = b"".join(_piece(image, n) for n in range(first, -(-end // _PIECE)))
    return got[start - first * _PIECE : end - first * _PIECE]


# ── The origin ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Request:
    """One request as it went. `got` bytes were handed on, the last at `ended_s`; times are virtual seconds."""

    number: int
    image: int
    extent: Extent
    stream: bool
    began_s: float
    first_s: float = math.nan
    ended_s: float = math.nan
    got: int = 0
    error: BaseException | None = None

    @property
    def running(self) -> bool:
        return math.isnan(self.ended_s)


@dataclass(frozen=True)
class Refuse:
    """No body: `error`, after the request's cost."""

    error: Callable[[str], OriginError]


@dataclass(frozen=True)
class Cut:
    """The body ends after `after` bytes; with `error` None, as if it were whole."""

    after: int
    error: Callable[[str], OriginError] | None = OriginUnavailable


@dataclass(frozen=True)
class Stall:
    """After `after` bytes nothing comes until `until`."""

    until: trio.Event
    after: int = 0


@dataclass(frozen=True)
class Slow:
    """This body comes at `rate` bytes per second, whatever the link could carry."""

    rate: float


@dataclass(frozen=True)
class Longer:
    """The body goes on for `by` bytes after its end."""

    by: int


Act = Refuse | Cut | Stall | Slow | Longer


class Wire:
    """A link's one capacity: pieces queue, so requests at once share it evenly."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free_s = 0.0

    async def carry(self, n: int) -> None:
        self._free_s = max(self._free_s, trio.current_time()) + n / self.rate
        await trio.sleep_until(self._free_s)


@dataclass
class ScriptedSource:
    """A Source. A request costs `cost_s` before its first byte; `rate` (bytes per second) is shared by all of
    them; bytes come in pieces of `piece`. `script` says what goes wrong, by the request's number; `act` is asked
    about the others. `streams_only` images refuse ranges. `doubled` names the requests that asked for bytes
    which another one was still to bring."""

    cost_s: float = 0.02
    rate: float = 50e6
    piece: int = 64 * KIB
    script: dict[int, Act] = field(default_factory=dict)
    act: Callable[[Request], Act | None] = lambda request: None
    streams_only: set[int] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    doubled: list[tuple[Request, Request]] = field(default_factory=list)
    at_once_max: int = 0

    def __post_init__(self) -> None:
        self.wire = Wire(self.rate)

    # ── Source ──

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        assert 0 <= extent.start < extent.end <= size, "a range is of the image, and not empty"
        assert extent.start % BLOCK == 0, "requests begin on a block"
        assert extent.end % BLOCK == 0 or extent.end == size, "requests end on a block or with the image"
        return await self._answer(image, extent, False, sink)

    async def stream(self, image: str, size: int, sink: Sink) -> Timing:
        return await self._answer(image, Extent(0, size), True, sink)

    # ── what was asked ──

    def of(self, image: int) -> list[Request]:
        return [r for r in self.requests if r.image == image]

    @property
    def extents(self) -> list[Extent]:
        return [r.extent for r in self.requests]

    def times_asked(self, image: int, block: int) -> int:
        """In how many ranged requests the block was."""
        return sum(1 for r in self.of(image) if not r.stream and r.extent.start <= block * BLOCK < r.extent.end)

    # ── inside ──

    def bytes_of(self, image: int, start: int, end: int) -> bytes:
        return content(image, start, end)

    async def _answer(self, image: str, extent: Extent, stream: bool, sink: Sink) -> Timing:
        number = UUID(image).int
        request = Request(len(self.requests), number, extent, stream, trio.current_time())
        for other in self.requests:
            if other.running and other.image == number and other.stream == stream:
                rest = Extent(other.extent.start + other.got, other.extent.end)
                if rest.meets(extent):
                    self.doubled.append((other, request))
        self.requests.append(request)
        self.at_once_max = max(self.at_once_max, sum(r.running for r in self.requests))
        try:
            return await self._send(image, request, sink)
        except BaseException as error:
            request.error = error
            raise
        finally:
            request.ended_s = trio.current_time()

    async def _send(self, image: str, request: Request, sink: Sink) -> Timing:
        act = self.script.get(request.number) or self.act(request)
        await trio.sleep(self.cost_s)
        if isinstance(act, Refuse):
            raise act.error(image)
        if not request.stream and request.image in self.streams_only:
            raise RangeRefused(image)
        wire = Wire(act.rate) if isinstance(act, Slow) else self.wire
        end = request.extent.end + (act.by if isinstance(act, Longer) else 0)
        stop = request.extent.start + act.after if isinstance(act, Cut | Stall) else end
        at = request.extent.start
        while True:
            if at >= stop and at < end:
                if isinstance(act, Stall):
                    await act.until.wait()
                    stop = end
                elif isinstance(act, Cut) and act.error is not None:
                    raise act.error(image)
            if at >= min(stop, end):
                break
            room = await sink.room()
            n = min(len(room), self.piece, stop - at, end - at)
            await wire.carry(n)
            if math.isnan(request.first_s):
                request.first_s = trio.current_time()
            room[:n] = self.bytes_of(request.image, at, at + n)
            at += n
            request.got += n
            sink.arrived(n)
        first_s = request.first_s if request.got else trio.current_time()
        return Timing(first_s - request.began_s, trio.current_time() - first_s)


# ── The store ─────────────────────────────────────────────────────────────────────────────────────────


class LateStore(Store):
    """A store whose disk is slow: what is to be kept reaches its writer `late_s` seconds later, in order."""

    late_s = 0.0

    def __init__(self, opened: Opened, limits: Callable[[], Limits]) -> None:
        super().__init__(opened, limits, health=patient())
        self._nursery: trio.Nursery | None = None
        self._busy_until_s = 0.0

    async def run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            await super().run()
            self._nursery.cancel_scope.cancel()

    def keep(
        self,
        view: StoredView,
        offset: int,
        data: memoryview,
        done: Callable[[bool], None],
        *,
        in_passing: bool = False,
    ) -> None:
        if not self.late_s:
            super().keep(view, offset, data, done, in_passing=in_passing)
            return
        self._busy_until_s = max(self._busy_until_s, trio.current_time()) + self.late_s
        assert self._nursery is not None
        land = functools.partial(super().keep, view, offset, data, done, in_passing=in_passing)
        self._nursery.start_soon(self._keep_at, self._busy_until_s, land)

    @staticmethod
    async def _keep_at(at_s: float, land: Callable[[], None]) -> None:
        await trio.sleep_until(at_s)
        land()


# ── All together ──────────────────────────────────────────────────────────────────────────────────────


class Reader(Protocol):
    """One who has an image open."""

    async def __call__(self, offset: int, length: int) -> bytes: ...


@dataclass
class Flow:
    """Source, store, fetcher and blocks as the daemon joins them."""

    source: ScriptedSource
    store: LateStore
    fetcher: Fetcher
    blocks: Blocks
    services: trio.Nursery
    watch: Watch

    def stored(self, image: int, size: int) -> StoredView:
        return self.store.view(image_id(image), ViewKind.ORIGINAL, size)

    def open(self, image: int, size: int) -> Reader:
        """Opens the image as one reader does, with a reading pattern of its own; bytes are checked."""
        view = StoredFile(self.stored(image, size), self.blocks)

        async def read(offset: int, length: int) -> bytes:
            now = view.read_now(offset, length)
            data = bytes(now) if now is not None else bytes(await view.read(offset, length))
            assert data == content(image, offset, max(offset, min(offset + length, size))), (
                f"other bytes than image {image} has from {offset} on"
            )
            return data

        return read

    async def read(self, image: int, size: int, offset: int, length: int) -> bytes:
        """One read by somebody who was never here before."""
        return await self.open(image, size)(offset, length)

    async def settled(self) -> None:
        """Waits until no flight is under way and the store has, or has refused, every slab; as long as that
        takes, in virtual time."""
        await until(lambda: all(f.over and f.slabs for f in self.fetcher.flights()) and self._is_quiet())

    def _is_quiet(self) -> bool:
        refused = sum(len(slab.data) for flight in self.fetcher.flights() for slab in flight.slabs)
        return refused == self.fetcher.memory_unkept

    def stop(self) -> None:
        """What the daemon does first when it stops."""
        self.services.cancel_scope.cancel()


class Watch(trio.abc.Instrument):
    """Looks at the fetcher's memory after every step of every task."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.memory_max = self.uncounted_bytes = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        slabs = (slab for flight in self._fetcher.flights() for slab in flight.slabs)
        places = {id(slab.data.obj): len(cast(bytearray, slab.data.obj)) for slab in slabs}  # Some were split.
        held = sum(places.values())
        used = self._fetcher.memory_used
        self.memory_max = max(self.memory_max, used)
        self.uncounted_bytes = max(self.uncounted_bytes, held - used)


@asynccontextmanager
async def flow(
    folder: Path,
    source: ScriptedSource | None = None,
    *,
    connections: int = 8,
    retries: int = 3,
    memory_max: int = MEMORY_MAX,
    read_deadline_s: float = 600.0,
    limits: Callable[[], Limits] = lambda: UNLIMITED,
    span_size: int = SPAN,
    edges: Edges | None = None,
    doubling_allowed: bool = False,
) -> AsyncIterator[Flow]:
    """Everything in its nurseries, ended in the daemon's order. Held to, whatever the test is about: no block
    is asked for while a request is to bring it, requests at once and bytes in memory stay within their bounds."""
    made = source or ScriptedSource()
    opened = open_store(folder, span_size)
    store = LateStore(opened if edges is None else edges.around(opened), limits)
    try:
        async with trio.open_nursery() as writing:
            writing.start_soon(store.run)
            try:
                async with trio.open_nursery() as services:
                    fetcher = Fetcher(made, store, connections, retries, memory_max)
                    await services.start(fetcher.run)
                    watch = Watch(fetcher)
                    trio.lowlevel.add_instrument(watch)
                    try:
                        yield Flow(made, store, fetcher, Blocks(fetcher, read_deadline_s), services, watch)
                    finally:
                        trio.lowlevel.remove_instrument(watch)
                        services.cancel_scope.cancel()
            finally:
                store.writer.stop()
    finally:
        store.close()
    assert made.at_once_max <= connections
    assert watch.memory_max <= max(memory_max, span_size), "more in memory than the bound"
    assert not watch.uncounted_bytes, "slabs that nobody counts"
    assert doubling_allowed or not made.doubled, f"asked for twice at once: {made.doubled}"
