"""The order of what the writer does, and what happens to everybody who waits when a part of it fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from cachefs.plan.extents import PAGE, Extent
from cachefs.store.check import check
from cachefs.store.format import SpanNo, Table
from cachefs.store.recover import open_store
from cachefs.store.view import StoredView
from cachefs.store.writer import BACKOFF_S, PUNCH_ALONE
from tests import stores
from tests.stores import (
    SPAN,
    Edge,
    Edges,
    Fate,
    data_extents,
    image_id,
    land,
    land_all,
    leaked,
    padded,
    patchwork,
    patient,
    random_bytes,
    read,
    running,
    segment_file,
    view_of,
)

CONTENT = random_bytes(1, 2 * SPAN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


class Held:
    """Stops the writer's thread at the first passage of an edge, until `go`."""

    def __init__(self, edges: Edges, edge: Edge) -> None:
        self._reached, self._go = threading.Event(), threading.Event()

        before = edges.on_pass

        def hold(passing: Edge) -> None:
            before(passing)
            if passing is edge and not self._reached.is_set():
                self._reached.set()
                assert self._go.wait(20)

        edges.on_pass = hold

    async def reached(self) -> None:
        assert await trio.to_thread.run_sync(self._reached.wait, 20)

    def go(self) -> None:
        self._go.set()


def test_bytes_then_sync_then_commit_then_punch_then_the_note_goes(folder: Path) -> None:
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, SPAN)
            await land(store, view, 0, padded(CONTENT, 0, 10 * PAGE))
            await store.writer.flush()
            await land(store, view, 10 * PAGE, padded(CONTENT, 10 * PAGE, SPAN))
            await store.writer.flush()
            await store.writer.flush()

    trio.run(main)
    assert edges.passed == [
        *(Edge.CREATE, Edge.APPEND, Edge.SYNC, Edge.COMMIT),
        *(Edge.APPEND, Edge.SYNC, Edge.COMMIT, Edge.PUNCH),
        *(Edge.SYNC, Edge.COMMIT),
    ]


def test_what_landed_is_committed_after_the_interval(folder: Path) -> None:
    async def main() -> None:
        async with running(folder, commit_interval_s=7) as store:
            view = view_of(store, 1, SPAN)
            assert await land(store, view, 0, padded(CONTENT, 0, SPAN))
            await trio.sleep(6.9)
            assert store.writer.commits == 0
            await trio.sleep(0.2)
            await store.writer.flush()
            assert store.writer.commits == 1

    trio.run(main, clock=MockClock(autojump_threshold=0.05))


def test_landing_goes_on_while_the_disk_works(folder: Path) -> None:
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, CONTENT[:SPAN])
            held = Held(edges, Edge.SYNC)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer.flush)
                await held.reached()
                assert await land(store, view, SPAN, CONTENT[SPAN:])
                assert await read(view, 0, 2 * SPAN) == CONTENT
                held.go()
            await store.writer.flush()
            assert store.writer.commits == 2

    trio.run(main)
    assert check(folder).sound


@pytest.mark.parametrize("twins", [False, True])
def test_what_is_dropped_while_a_commit_ends_is_counted_once(folder: Path, twins: bool) -> None:
    """It was looked up before the end, and goes after it."""
    edges = Edges()
    held: list[Held] = []
    ended = trio.Event()

    async def to_thread(work: Callable[..., Any], *args: Any, **how: Any) -> Any:
        done = await trio.to_thread.run_sync(work, *args, **how)
        if held:
            held.pop().go()
            await ended.wait()
        return done

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf, health=patient(to_thread)) as store:
            views = [view_of(store, number, SPAN) for number in (1, 2)]
            await land_all(store, views[0], CONTENT[:SPAN])
            await land_all(store, views[1], CONTENT[:SPAN] if twins else CONTENT[SPAN:])
            await store.writer.flush()
            commit = Held(edges, Edge.COMMIT)
            freed = []

            async def evict(view: StoredView) -> None:
                freed.append(await store.evict([(view.number, SpanNo(0))]))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(evict, views[0])
                await commit.reached()
                held.append(commit)
                nursery.start_soon(evict, views[1])
                while store.writer.commits < 2:
                    await wait_all_tasks_blocked(0.001)
                ended.set()
            assert sum(freed) == (SPAN if twins else 2 * SPAN)
            assert [await read(view, 0, 1) for view in views] == [None, None]

    trio.run(main)
    assert check(folder).sound
    assert leaked(folder) == []


@pytest.mark.parametrize("fails", [False, True])
def test_space_comes_back_beside_the_next_commit(folder: Path, fails: bool) -> None:
    """Who evicted is told when his own space is back, whatever becomes of that commit, and a stop waits for it."""
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, CONTENT[:SPAN])
            await store.writer.flush()
            punch, freed = Held(edges, Edge.PUNCH), []

            async def evict() -> None:
                freed.append(await store.evict([(view.number, SpanNo(0))]))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(evict)
                await punch.reached()
                assert await land(store, view, SPAN, CONTENT[SPAN:])
                if fails:
                    edges.arm(Fate.FAIL, Edge.COMMIT)
                nursery.start_soon(store.writer.flush)
                commits = store.writer.commits
                while store.writer.commits == commits and not edges.failed:
                    await wait_all_tasks_blocked(0.001)
                await wait_all_tasks_blocked(0.001)
                assert not freed
                store.writer.stop()
                punch.go()
            assert freed == [SPAN]
            assert await read(view, SPAN, SPAN) == (None if fails else CONTENT[SPAN:])

    trio.run(main)
    assert check(folder).sound
    assert leaked(folder) == []
    with stores.index_of(folder) as index, index.reading() as snapshot:
        assert not list(snapshot.items(Table.PUNCHES)), "nothing is left to be done"


def test_what_gives_space_back_may_break_and_the_store_goes_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No thread can be had, for one. The next start gives it back."""
    edges = Edges()

    def break_down(edge: Edge) -> None:
        if edge is Edge.PUNCH:
            raise RuntimeError("can't start new thread")

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, CONTENT[:SPAN])
            await store.writer.flush()
            edges.on_pass = break_down
            assert await store.evict([(view.number, SpanNo(0))]) == SPAN
            assert await land(store, view, SPAN, CONTENT[SPAN:])
            await store.writer.flush()
            assert await read(view, SPAN, SPAN) == CONTENT[SPAN:]

    trio.run(main)
    assert "unexpected failure of giving space back" in caplog.text
    assert leaked(folder) != []
    open_store(folder).close()
    assert leaked(folder) == []
    assert check(folder).sound


def test_flush_with_nothing_to_do_returns(folder: Path) -> None:
    async def main() -> None:
        async with running(folder) as store:
            await store.writer.flush()
            await store.writer.flush()

    trio.run(main)


@pytest.mark.parametrize("edge", [Edge.SYNC, Edge.COMMIT])
def test_after_a_failed_commit_everything_since_the_last_is_absent(folder: Path, edge: Edge) -> None:
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, CONTENT[:SPAN])
            await store.writer.flush()
            assert await land(store, view, SPAN, CONTENT[SPAN:])
            assert await read(view, SPAN, SPAN) == CONTENT[SPAN:]
            edges.arm(Fate.FAIL, edge)
            await store.writer.flush()
            # Told only after the readers were.
            assert await read(view, SPAN, 1) is None
            assert view.cached == SPAN
            assert await read(view, 0, SPAN) == CONTENT[:SPAN]
            edges.lose_doomed(folder)
            await view.load(Extent(0, 2 * SPAN))
            assert view.absent(Extent(0, 2 * SPAN)) == [Extent(SPAN, 2 * SPAN)]
            assert not await land(store, view, SPAN, CONTENT[SPAN:]), "not again at once"
            await trio.sleep(BACKOFF_S)
            assert await land(store, view, SPAN, CONTENT[SPAN:])
            await store.writer.flush()
            assert store.writer.trouble is None
        async with running(folder) as store:
            assert await read(view_of(store, 1, 2 * SPAN), 0, 2 * SPAN) == CONTENT

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert check(folder).sound


def test_a_commit_that_was_done_and_reported_as_failed_is_believed(folder: Path) -> None:
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, SPAN)
            await land_all(store, view, CONTENT[:SPAN], piece=SPAN // 4)
            edges.arm(Fate.FAIL_LATE, Edge.COMMIT)
            await store.writer.flush()
            await store.writer.flush()
            assert await read(view, 0, SPAN) == CONTENT[:SPAN]

    trio.run(main)
    assert check(folder).sound


def test_a_commit_that_fails_while_more_lands(folder: Path) -> None:
    """What lands on top of a lost commit is lost with it, and the writer goes on."""
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, CONTENT[:SPAN])
            edges.arm(Fate.FAIL, Edge.SYNC)
            syncing, appending = Held(edges, Edge.SYNC), Held(edges, Edge.APPEND)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer.flush)
                await syncing.reached()
                nursery.start_soon(land, store, view, SPAN, CONTENT[SPAN:])
                nursery.start_soon(store.writer.flush)
                await appending.reached()
                syncing.go()
                await trio.to_thread.run_sync(time.sleep, 0.1)  # The failure is known; the landing still works.
                appending.go()
            await store.writer.flush()
            assert store.writer.trouble is not None
            assert await read(view, 0, 1) is None
            assert await read(view, SPAN, 1) is None
            await trio.sleep(BACKOFF_S)
            await land_all(store, view, CONTENT)
            assert await read(view, 0, 2 * SPAN) == CONTENT

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert check(folder).sound


def test_everybody_who_waits_is_told_when_the_last_commit_fails(folder: Path) -> None:
    edges = Edges()
    told: list[bool] = []

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, CONTENT[:SPAN])
            edges.arm(Fate.FAIL, Edge.COMMIT, times=9)
            held = Held(edges, Edge.SYNC)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer.flush)
                await held.reached()
                store.writer.stop()
                store.keep(view, SPAN, memoryview(CONTENT)[SPAN:], told.append)
                nursery.start_soon(store.writer.flush)
                nursery.start_soon(view.doubt, 0)
                await wait_all_tasks_blocked()
                held.go()

    async def in_time() -> None:
        with trio.fail_after(20):
            await main()

    trio.run(in_time)
    assert len(told) == 1
    assert check(folder).sound


def test_the_last_of_several_landings_of_a_span_has_the_last_word_on_the_total(folder: Path) -> None:
    content = random_bytes(2, 2 * SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            async with trio.open_nursery() as nursery:
                # One group: span 0, span 1, and span 0 again.
                for part in (Extent(0, PAGE), Extent(SPAN, 2 * SPAN), Extent(PAGE, SPAN)):
                    nursery.start_soon(land, store, view, part.start, padded(content, *part))
            assert view.cached == len(content)
            assert view.complete

    trio.run(main)


def test_a_failed_append_keeps_nothing_and_leaks_nothing(folder: Path) -> None:
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, CONTENT[:SPAN])
            edges.arm(Fate.FAIL, Edge.APPEND)
            assert not await land(store, view, SPAN, CONTENT[SPAN:])
            assert store.writer.trouble is not None
            assert "No space left" in store.writer.trouble
            assert await read(view, SPAN, 1) is None
            assert await read(view, 0, SPAN) == CONTENT[:SPAN]
            await trio.sleep(BACKOFF_S)
            assert await land(store, view, SPAN, CONTENT[SPAN:])
            assert await read(view, 0, 2 * SPAN) == CONTENT

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert check(folder).sound
    assert stores.leaked(folder) == []


def test_a_cut_that_fails_after_a_failed_commit_costs_only_space(folder: Path) -> None:
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, CONTENT)
            edges.arm(Fate.FAIL, Edge.COMMIT)
            edges.arm(Fate.FAIL, Edge.TRUNCATE)
            await store.writer.flush()
            await store.writer.flush()
            await trio.sleep(BACKOFF_S)
            await land_all(store, view, CONTENT)
            assert await read(view, 0, 2 * SPAN) == CONTENT

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert check(folder).sound


def test_a_disk_that_never_comes_back_does_not_stop_the_loop(folder: Path) -> None:
    edges = Edges()
    content = patchwork(3, SPAN)

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, SPAN)
            edges.arm(Fate.FAIL, Edge.COMMIT, times=1000)
            for n in range(20):
                store.put_image(image_id(n), {"n": n})
                await land(store, view, 0, padded(content, 0, SPAN))
                await store.writer.flush()
                await trio.sleep(BACKOFF_S)
                assert await read(view, 0, 1) is None
            edges.disarm()
            await store.writer.flush()
            await trio.sleep(BACKOFF_S)
            await land_all(store, view, content)
            await store.writer.flush()
            assert await read(view, 0, SPAN) == content
            assert store.writer.trouble is None
        async with running(folder) as store:
            assert len(store.images) == 20

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_many_holes_in_several_segments_give_their_space_back_and_harm_no_neighbour(folder: Path) -> None:
    """They are made side by side. A segment whose end was cut off is not appended to again: so there are two."""
    each = PUNCH_ALONE
    size = 2 * each * SPAN

    async def main() -> None:
        for begin in (0, each):
            async with running(folder) as store:
                gone, stays = view_of(store, 1, size), view_of(store, 2, size)
                for span in range(begin, begin + each):
                    for number, view in enumerate((gone, stays)):
                        assert await land(store, view, span * SPAN, random_bytes(2 * span + number, PAGE))
            if not begin:
                os.truncate(segment_file(folder, 1), segment_file(folder, 1).stat().st_size - 1)
        async with running(folder) as store:
            gone, stays = view_of(store, 1, size), view_of(store, 2, size)
            assert await store.evict([(gone.number, SpanNo(n)) for n in range(2 * each)]) == 2 * each * PAGE
            await store.flush()
            for span in range(2 * each):
                if span != each - 1:  # It was cut off.
                    assert bytes(await stays.read(span * SPAN, PAGE)) == random_bytes(2 * span + 1, PAGE)
        for segment in (1, 2):
            assert sum(extent.length for extent in data_extents(segment_file(folder, segment))) <= each * PAGE

    trio.run(main)
