"""The store against a dict of bytes, whatever fails and whenever it crashes. Rule: an image's bytes never change,
so a read gives exactly the model's bytes or says that they are absent; there is no third answer.

Two lower bounds are kept beside the bytes: `kept`, the pages that must be readable now, and `durable`, those that
must be readable after a crash.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from trio.testing import MockClock, wait_all_tasks_blocked

from cachefs.errors import StoreError
from cachefs.plan.extents import PAGE, ceil
from cachefs.store import format as f
from cachefs.store.check import check
from cachefs.store.content import Store
from cachefs.store.format import SpanNo
from cachefs.store.recover import open_store
from cachefs.store.view import StoredView
from cachefs.store.writer import BACKOFF_S
from tests import stores
from tests.stores import SPAN, UNLIMITED, Crash, Edge, Edges, Fate, in_pages, padded, patchwork, read, view_of

T = TypeVar("T")

SIZES = (0, 1, PAGE, 5 * PAGE + 17, SPAN - 1, SPAN + 3 * PAGE + 5, 2 * SPAN + SPAN // 2)

CALL_S = 120  # Real seconds, for what hangs: the clock of the loop stands still.


class Loop:
    """A trio loop in a thread of its own, so that a store lives from one rule to the next. Its clock stands still
    until it is told to jump."""

    def __init__(self) -> None:
        self.clock = MockClock()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), kwargs={"clock": self.clock})
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        self._token, self._end = trio.lowlevel.current_trio_token(), trio.Event()
        async with trio.open_nursery() as self.nursery:
            self._ready.set()
            await self._end.wait()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        return trio.from_thread.run(self._in_time, function, *args, trio_token=self._token)

    async def _in_time(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        with trio.CancelScope() as scope:
            timer = threading.Timer(CALL_S, self._token.run_sync_soon, (scope.cancel,))
            timer.start()
            try:
                return await function(*args)
            finally:
                timer.cancel()
        raise AssertionError(f"{function.__name__} did not end")

    def close(self) -> None:
        trio.from_thread.run_sync(self._end.set, trio_token=self._token)
        self._thread.join()


class Life:
    """One store from its opening to its close or its crash."""

    def __init__(self, folder: Path, edges: Edges) -> None:
        self.folder, self.edges = folder, edges
        self.ended = trio.Event()
        self.failure: BaseException | None = None
        self.store = Store(edges.around(open_store(folder, SPAN)), lambda: UNLIMITED, health=stores.patient())

    async def run(self) -> None:
        try:
            await self.store.run()
        except BaseException as error:  # noqa: BLE001  # Every bug in the writer is to reach the test.
            crashed = isinstance(error, Crash) or (
                isinstance(error, BaseExceptionGroup) and error.split(Crash)[1] is None
            )
            if not crashed:
                self.failure = error
        self.ended.set()

    async def or_end(self, event: trio.Event) -> bool:
        """Waits for `event`; False when the store ended before."""
        async with trio.open_nursery() as nursery:

            async def wait(one: trio.Event) -> None:
                await one.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, self.ended)
            nursery.start_soon(wait, event)
        return event.is_set()

    async def flush(self) -> bool:
        return await self.finish(self.store.writer.flush)

    async def doubt(self, pages: Iterable[tuple[StoredView, int]]) -> bool:
        async def doubts() -> None:
            async with trio.open_nursery() as nursery:
                for view, page in pages:
                    nursery.start_soon(view.doubt, page * PAGE)

        return await self.finish(doubts)

    async def finish(self, work: Callable[[], Awaitable[object]]) -> bool:
        """Whether `work` came to its end before the store did."""
        done = trio.Event()

        async def finish() -> None:
            with suppress(StoreError):
                await work()
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish)
            finished = await self.or_end(done)
            nursery.cancel_scope.cancel()
        return finished


class Late:
    """Holds up whatever gives space back, from one passage on, until `let_go`."""

    def __init__(self, edges: Edges) -> None:
        self._edges, self._go, self._reached = edges, threading.Event(), False
        edges.on_pass = self._hold

    def _hold(self, edge: Edge) -> None:
        if edge in (Edge.PUNCH, Edge.REMOVE) and not self._go.is_set():
            self._reached = True
            assert self._go.wait(CALL_S)
            if self._edges.dead:
                raise Crash

    async def let_go(self, rounds: int, jump: Callable[[], None] | None) -> None:
        """When the writer has done what it can beside, which a few `rounds` are enough for."""
        try:
            for _ in range(rounds):
                await wait_all_tasks_blocked(0.002)
                if self._reached and jump is not None:
                    jump()
                    jump = None
        finally:
            self._go.set()


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="cachefs-model-"))
        self.loop = Loop()
        self.patch = pytest.MonkeyPatch()
        self.contents: list[bytes] = []
        self.kept: list[set[int]] = []
        self.durable: list[set[int]] = []
        self.views: list[StoredView] = []
        self.rotted = False
        self.rot_on_disk = False  # The quarantine may not be durable: a lost commit brings the rot back.
        self.leaks = False  # Something happened that may leave freed bytes unpunched.
        self.life: Life | None = None
        self.losses = random.Random(0)

    @initialize(
        images=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(SIZES)), min_size=1, max_size=3),
        segment_pages=st.sampled_from((300, 1000, 1 << 18)),
        seed=st.integers(0, 1000),
    )
    def begin(self, images: list[tuple[int, int]], segment_pages: int, seed: int) -> None:
        # Small segments, so that one run fills several.
        for module in ("landing", "recover"):
            self.patch.setattr(f"cachefs.store.{module}.SEGMENT_SIZE", segment_pages * PAGE)
        self.patch.setattr("cachefs.store.turns.STEP_S", 0.0)  # Others have a turn after each step.
        self.losses = random.Random(seed)
        self.contents = [patchwork(seed, size) for seed, size in images]
        self.kept = [set() for _ in images]
        self.durable = [set() for _ in images]
        self.open()

    # ── lives ──

    @property
    def store(self) -> Store:
        assert self.life is not None
        return self.life.store

    @property
    def edges(self) -> Edges:
        assert self.life is not None
        return self.life.edges

    def open(self) -> None:
        edges = Edges()

        async def begin() -> None:
            self.life = Life(self.folder, edges)
            self.loop.nursery.start_soon(self.life.run)
            self.views = [view_of(self.store, i + 1, len(c)) for i, c in enumerate(self.contents)]

        self.loop.call(begin)

    def close(self) -> None:
        """In order: everything is committed, and the store is sound."""
        life = self.life
        assert life is not None

        async def end() -> None:
            life.store.writer.stop()
            await life.ended.wait()

        self.settle()
        if self.life is not life:
            return self.close()  # It crashed, and was opened again.
        self.edges.disarm()
        if self.rotted:
            self.doubt_everything()
        self.loop.call(end)
        if life.failure is not None:
            raise life.failure
        cached = [view.cached for view in self.views]
        life.store.close()
        self.life = None
        if life.edges.failed:
            self.leaks = True
        self.rot_on_disk = self.rotted
        self.verify()
        if not self.leaks:
            assert stores.leaked(self.folder) == []
        self.durable = [set(pages) for pages in self.kept]
        self.open()
        assert [view.cached for view in self.views] == cached, "what is said to be cached was committed so"
        return None

    def after_crash(self) -> None:
        life = self.life
        assert life is not None
        if life.failure is not None:
            raise life.failure
        life.store.close()
        self.life = None
        life.edges.lose_unsynced(self.folder, self.losses)
        self.leaks = True
        self.rotted = self.rot_on_disk
        self.verify()
        self.kept = [set(pages) for pages in self.durable]
        self.open()

    def verify(self) -> None:
        report = check(self.folder)
        damages = [str(finding) for finding in report.findings if finding.severity.value == "damage"]
        if self.leaks:  # An append that failed, and then what was to make the file as long as its record says.
            damages = [d for d in damages if "its file ends at" not in d]
        if self.rotted:
            damages = [d for d in damages if "not what its digest says" not in d]
        assert damages == []

    def settle(self) -> None:
        """After a rule: looks at what befell the store in it, and brings it to rest."""
        life = self.life
        assert life is not None
        if life.ended.is_set():
            if life.failure is not None:
                raise life.failure
            assert life.edges.dead, "the writer ends only when it is told to, or crashes"
            return self.after_crash()
        if life.edges.commit_failed:
            life.edges.failed.clear()
            self.leaks = True
            self.rotted = self.rot_on_disk
            self.kept = [set(pages) for pages in self.durable]
            # The writer has gone back when it answers again.
            if not self.loop.call(life.flush):
                return self.settle()
            if life.edges.commit_failed:
                return self.settle()
            life.edges.lose_doomed(self.folder)
        return None

    # ── rules ──

    @rule(data=st.data(), recut=st.booleans())
    def land(self, data: st.DataObject, recut: bool) -> None:
        batch = [self.draw_landing(data, whole=recut) for _ in range(data.draw(st.integers(1, 3)))]
        self.loop.call(self.land_batch, batch)
        self.settle()

    def draw_landing(self, data: st.DataObject, whole: bool) -> tuple[int, int, int]:
        """(view, first page, pages) within one span."""
        view = data.draw(st.integers(0, len(self.contents) - 1))
        total = ceil(len(self.contents[view]), PAGE) // PAGE
        if total == 0:
            return view, 0, 0
        span_pages = SPAN // PAGE
        if whole:
            first = data.draw(st.integers(0, (total - 1) // span_pages)) * span_pages
            return view, first, min(span_pages, total - first)
        first = data.draw(st.integers(0, total - 1))
        most = min(total - first, span_pages - first % span_pages)
        return view, first, data.draw(st.integers(1, most))

    async def land_batch(self, batch: list[tuple[int, int, int]]) -> None:
        life = self.life
        assert life is not None
        async with trio.open_nursery() as nursery:
            for landing in batch:
                nursery.start_soon(self.land_one, life, *landing)

    async def land_one(self, life: Life, view: int, first: int, pages: int) -> None:
        if not pages:
            return
        data = in_pages(padded(self.contents[view], first * PAGE, (first + pages) * PAGE))
        answered = trio.Event()

        def done(kept: bool) -> None:
            answered.set()
            if kept:
                self.kept[view].update(range(first, first + pages))

        # Half of it goes past the kernel's cache.
        life.store.keep(self.views[view], first * PAGE, data, done, in_passing=bool((first + pages) % 2))
        await life.or_end(answered)

    @rule(data=st.data())
    def read_some(self, data: st.DataObject) -> None:
        view = data.draw(st.integers(0, len(self.contents) - 1))
        size = len(self.contents[view])
        if not size:
            return
        offset = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, min(size - offset, 1 << 20)))
        self.loop.call(self.read_one, view, offset, length)
        self.settle()

    async def read_one(self, view: int, offset: int, length: int) -> None:
        wanted = self.contents[view][offset : offset + length]
        pages = set(range(offset // PAGE, (offset + length - 1) // PAGE + 1))
        got = await read(self.views[view], offset, length)
        for _ in range(3):
            if got in (None, wanted) or not self.rot_on_disk:
                break
            # Rot that nobody has looked at yet, or that a failed commit has made good again.
            self.rotted = True
            assert self.life is not None
            if not await self.life.doubt([(self.views[view], page) for page in pages]):
                return
            self.kept[view] -= pages
            got = await read(self.views[view], offset, length)
        if got is None:
            excused = self.rotted or self.edges.commit_failed  # In the background: `settle` will learn of it.
            assert excused or not pages <= self.kept[view], "bytes that were kept are not there"
        else:
            assert got == wanted

    @rule(data=st.data(), fault=st.none() | st.tuples(st.sampled_from(Fate), st.integers(0, 4)))
    def storm(self, data: st.DataObject, fault: tuple[Fate, int] | None) -> None:
        """Landing, reading and committing at once, and something may fail."""
        if fault is not None:
            self.edges.arm(fault[0], after=fault[1])
        batch = [self.draw_landing(data, whole=data.draw(st.booleans())) for _ in range(3)]
        jump = data.draw(st.booleans())

        async def all_at_once() -> None:
            life = self.life
            assert life is not None
            async with trio.open_nursery() as nursery:
                for landing in batch:
                    nursery.start_soon(self.land_one, life, *landing)
                nursery.start_soon(life.flush)
                for view, first, pages in batch:
                    if pages and not self.rot_on_disk:
                        nursery.start_soon(self.read_in_storm, view, first * PAGE, pages * PAGE)
                await trio.lowlevel.checkpoint()
                if jump:
                    self.loop.clock.jump(1.5)
                for landing in reversed(batch):
                    nursery.start_soon(self.land_one, life, *landing)

        self.loop.call(all_at_once)
        self.settle()

    async def read_in_storm(self, view: int, offset: int, length: int) -> None:
        wanted = self.contents[view][offset : offset + length]
        for _ in range(3):
            got = await read(self.views[view], offset, len(wanted))
            assert got is None or got == wanted

    @rule()
    def flush(self) -> None:
        self.settle()
        life = self.life
        assert life is not None
        if self.loop.call(life.flush) and not life.edges.commit_failed:
            self.durable = [set(pages) for pages in self.kept]
        self.settle()

    @rule(seconds=st.sampled_from((0.5, 1.5, BACKOFF_S + 1)))
    def pass_time(self, seconds: float) -> None:
        async def jump() -> None:
            self.loop.clock.jump(seconds)
            await trio.lowlevel.checkpoint()

        self.loop.call(jump)
        self.settle()

    @rule()
    def reopen(self) -> None:
        self.close()

    @rule(
        fate=st.sampled_from(Fate),
        edges=st.sampled_from(
            ((), (Edge.APPEND,), (Edge.SYNC, Edge.COMMIT), (Edge.PUNCH, Edge.REMOVE), (Edge.TRUNCATE,))
        ),
        after=st.integers(0, 6),
        times=st.integers(1, 2),
    )
    def arm(self, fate: Fate, edges: tuple[Edge, ...], after: int, times: int) -> None:
        self.edges.arm(fate, *edges, after=after, times=times)

    @rule()
    def crash(self) -> None:
        """Between two writes."""
        self.edges.dead = True
        self.loop.call(self.wake_and_wait)
        self.settle()

    async def wake_and_wait(self) -> None:
        life = self.life
        assert life is not None
        life.store.put_image(stores.image_id(99), {"n": len(life.edges.passed)})
        await life.flush()

    @rule(seed=st.integers(0, 1000))
    def rot(self, seed: int) -> None:
        rng = random.Random(seed)
        for path in sorted((self.folder / "segments").glob("*.seg")):
            if path.stat().st_size:
                stores.flip(path, rng.randrange(path.stat().st_size))
                self.rotted = self.rot_on_disk = self.leaks = True  # A hole that rots has bytes.

    @rule()
    def doubt_everything(self) -> None:
        """Scrubs: what is rotten becomes absent, everything else stays."""
        life = self.life
        assert life is not None
        pages = [(view, page) for view in self.views for page in range(ceil(view.size, PAGE) // PAGE)]
        if self.loop.call(life.doubt, pages) and self.rotted:
            self.rotted = False
            self.loop.call(self.forget_what_rotted)
        self.settle()

    async def forget_what_rotted(self) -> None:
        for view, content, kept, durable in zip(self.views, self.contents, self.kept, self.durable, strict=True):
            for page in range(ceil(len(content), PAGE) // PAGE):
                wanted = content[page * PAGE : (page + 1) * PAGE]
                got = await read(view, page * PAGE, len(wanted))
                if got not in (None, wanted):
                    assert self.edges.failed, "rot is read after the chunk was looked at"
                    self.rotted = True
                if got != wanted:
                    kept.discard(page)
                    durable.discard(page)

    @rule(data=st.data(), meanwhile=st.booleans())
    def evict(self, data: st.DataObject, meanwhile: bool) -> None:
        """Spans go; while others land, and the same ones again."""
        spans = [self.draw_span(data) for _ in range(data.draw(st.integers(1, 4)))]
        batch = [self.draw_landing(data, whole=data.draw(st.booleans())) for _ in range(2)] if meanwhile else []

        async def evict() -> None:
            life = self.life
            assert life is not None
            async with trio.open_nursery() as nursery:
                for landing in batch:
                    nursery.start_soon(self.land_one, life, *landing)
                named = [(self.views[view].number, SpanNo(span)) for view, span in spans]
                nursery.start_soon(life.finish, partial(life.store.evict, named))
            self.forget(spans)

        self.forget(spans)
        self.loop.call(evict)
        if not batch and not self.life_ended and not self.edges.commit_failed:
            self.loop.call(self.read_evicted, spans)
        self.settle()

    @rule(
        data=st.data(),
        fault=st.none() | st.tuples(st.sampled_from(Fate), st.integers(0, 4)),
        rounds=st.sampled_from((0, 5, 20)),
    )
    def evict_in_storm(self, data: st.DataObject, fault: tuple[Fate, int] | None, rounds: int) -> None:
        """Several evict the same, between its steps others read, quarantine, move and commit it, and something may
        fail. The space of what goes first may come back late, beside commits that do or do not fail."""
        spans = [self.draw_span(data) for _ in range(data.draw(st.integers(1, 4)))]
        # And after these the same ones in other views, which share their chunks where the images are alike.
        again = [(view, span) for _, span in spans for view, content in enumerate(self.contents) if content]
        again = [(view, span) for view, span in again if span * SPAN < len(self.contents[view])]
        batch = [self.draw_landing(data, whole=data.draw(st.booleans())) for _ in range(2)]
        moves, jump = data.draw(st.booleans()), data.draw(st.booleans())
        if data.draw(st.booleans()):
            whole = [(v, n * SPAN // PAGE, min(SPAN, len(self.contents[v]) - n * SPAN)) for v, n in again]
            self.loop.call(self.land_batch, [(v, first, ceil(size, PAGE) // PAGE) for v, first, size in whole])
        self.flush()
        if fault is not None and rounds:  # One of the commits beside: the first passes.
            self.edges.arm(fault[0], Edge.SYNC, Edge.COMMIT, after=2 + fault[1] % 2)
        elif fault is not None:
            self.edges.arm(fault[0], after=fault[1])
        self.leaks |= moves
        late = Late(self.edges) if rounds and not self.life_ended else None

        async def all_at_once() -> None:
            life = self.life
            assert life is not None
            chunks = [f.split_chunk_key(key) for key, _ in life.store.items(f.Table.CHUNKS)]
            sources = frozenset(life.store.segments.files)
            async with trio.open_nursery() as nursery:
                if late is not None:
                    nursery.start_soon(late.let_go, rounds, partial(self.loop.clock.jump, 0.3) if jump else None)
                for part in (spans, *([one] for one in again)):
                    named = [(self.views[view].number, SpanNo(span)) for view, span in part]
                    nursery.start_soon(life.finish, partial(life.store.evict, named))
                for view, span in (*spans, *again):
                    if len(self.contents[view]) > span * SPAN and not self.rot_on_disk:
                        nursery.start_soon(self.read_in_storm, view, span * SPAN, SPAN)
                        nursery.start_soon(life.doubt, [(self.views[view], span * SPAN // PAGE)])
                if moves:
                    nursery.start_soon(life.finish, partial(life.store.move, chunks, sources))
                for landing in batch:
                    nursery.start_soon(self.land_one, life, *landing)
                await trio.lowlevel.checkpoint()
                if jump:
                    self.loop.clock.jump(1.5)
                nursery.start_soon(life.finish, life.store.remove_lifeless)
            self.forget([*spans, *again])

        self.forget([*spans, *again])
        if not self.life_ended:
            self.loop.call(all_at_once)
        self.settle()

    @property
    def life_ended(self) -> bool:
        return self.life is None or self.life.ended.is_set()

    def draw_span(self, data: st.DataObject) -> tuple[int, int]:
        view = data.draw(st.integers(0, len(self.contents) - 1))
        return view, data.draw(st.integers(0, max(0, len(self.contents[view]) - 1) // SPAN))

    def forget(self, spans: list[tuple[int, int]]) -> None:
        """They may be there or not from now on."""
        for view, span in spans:
            gone = range(span * SPAN // PAGE, (span + 1) * SPAN // PAGE)
            self.kept[view].difference_update(gone)
            self.durable[view].difference_update(gone)

    async def read_evicted(self, spans: list[tuple[int, int]]) -> None:
        for view, span in spans:
            if len(self.contents[view]) > span * SPAN:
                assert await read(self.views[view], span * SPAN, 1) is None

    @rule()
    def compact(self) -> None:
        """Every chunk moves to a new place, and what is empty then is removed."""
        self.leaks = True  # What is not removed for some failure has bytes that no chunk names.

        async def compact() -> None:
            life = self.life
            assert life is not None
            chunks = [f.split_chunk_key(key) for key, _ in life.store.items(f.Table.CHUNKS)]
            sources = frozenset(life.store.segments.files)
            await life.finish(partial(life.store.move, chunks, sources))
            if not life.ended.is_set():
                await life.finish(life.store.remove_lifeless)

        self.flush()
        self.loop.call(compact)
        self.settle()

    @rule()
    def mend(self) -> None:
        """Of what is not rotten nothing goes."""
        spans = [(view.number, SpanNo(span)) for view in self.views for span in range(view.spans)]
        life = self.life
        assert life is not None
        self.loop.call(life.finish, partial(life.store.mend, spans))
        self.settle()

    # ── always ──

    @invariant()
    def everything_kept_is_right(self) -> None:
        if self.life is not None:
            self.loop.call(self.read_all)

    async def read_all(self) -> None:
        for i, content in enumerate(self.contents):
            for offset in range(0, len(content), SPAN // 2 + PAGE):
                await self.read_one(i, offset, min(SPAN // 2 + PAGE, len(content) - offset))

    def teardown(self) -> None:
        try:
            if self.life is not None:
                self.edges.disarm()
                self.close()
        finally:
            if self.life is not None:
                life = self.life

                async def end() -> None:
                    life.store.writer.stop()
                    with trio.move_on_after(5):
                        await life.ended.wait()

                self.loop.call(end)
                life.store.close()
            self.loop.close()
            shutil.rmtree(self.folder)
            self.patch.undo()


TestStoreModel = StoreMachine.TestCase
TestStoreModel.settings = settings(
    phases=(Phase.explicit, Phase.generate),
    max_examples=40 * stores.HUNT,
    stateful_step_count=25 if stores.HUNT == 1 else 40,
)
