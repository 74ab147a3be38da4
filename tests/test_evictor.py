"""Room is made: between the watermarks, for a landing, when asked; and never by what is leased. A small store in
memory for what is decided, a model for what must always hold, and the real store for the bytes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cachefs.commands import EVICT_WAIT_S, IMAGES_MAX, Commands, SizedView
from cachefs.errors import ControlError, Leased, NoEntry, StoreError
from cachefs.evictor import PAUSE_S, ROUND_S, SLICE_SPANS, STUCK_S, Asked, Cause, Evictor, Watermarks
from cachefs.leases import Leases
from cachefs.plan.eviction import Priority
from cachefs.store.content import Store
from cachefs.store.format import SpanNo, UseFlag, ViewNo
from cachefs.store.room import Limits
from cachefs.store.view import StoredView
from cachefs.uses import LOOK_S, RETOUCH_S, Uses
from tests.evictions import MIB, FakeStore, FakeView, wall_clock
from tests.flow import quiet, virtual_time
from tests.stores import SPAN, examples, image_id, land, random_bytes, read, running, view_of

A, B = image_id(1), image_id(2)
MARKS = Watermarks(high=0.95, low=0.85)


@dataclass(frozen=True)
class Node:
    """What decides, over one store."""

    uses: Uses
    leases: Leases
    evictor: Evictor
    away: list[bool]
    priorities: dict[str, Priority]
    held: set[str]

    def count(self, cause: Cause) -> tuple[int, int]:
        """(spans, bytes) evicted for this cause."""
        return self.evictor.evicted[cause].spans, self.evictor.evicted[cause].bytes


@asynccontextmanager
async def evicting(store: Any, marks: Watermarks = MARKS, pinned_max: int = 1 << 62) -> AsyncIterator[Node]:
    """The loops over `store`, which is a fake or the real one. Make `away` true for a Glance that is away."""
    uses, leases = Uses(store, wall_clock), Leases(store, lambda: pinned_max, wall_clock)
    away = [False]
    priorities: dict[str, Priority] = {}
    held: set[str] = set()
    evictor = Evictor(
        store, uses, leases, marks,
        origin_is_well=lambda: not away[0],
        priority_of=lambda image: priorities.get(image, Priority.NORMAL),
        is_held=held.__contains__,
    )  # fmt: skip
    store.on_full = evictor.on_full
    await leases.load()
    async with trio.open_nursery() as nursery:
        await nursery.start(uses.run)
        await nursery.start(evictor.run)
        yield Node(uses, leases, evictor, away, priorities, held)
        uses.save()
        nursery.cancel_scope.cancel()


async def one_round() -> None:
    await trio.sleep(ROUND_S + 1)
    await quiet()


async def age() -> None:
    """What came is seen, and used again from now on it is used twice."""
    await trio.sleep(RETOUCH_S + LOOK_S + 1)


# ── Between the watermarks ────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_above_the_high_watermark_the_coldest_go_down_to_the_low_one() -> None:
    store = FakeStore(limit=100 * MIB)
    view = store.add_view(1, size=200 * MIB)
    async with evicting(store) as node:
        for span in range(95):
            store.land(view, span)
            if span % 10 == 9:
                await trio.sleep(LOOK_S)
        await one_round()
        assert len(store.here(view)) == 95, "at the high watermark is not above it"
        store.land(view, 95)
        await one_round()
        assert store.here(view) == list(range(11, 96))
        assert node.count(Cause.WATERMARK) == (11, 11 * MIB)
        await one_round()
        assert len(store.here(view)) == 85
        assert node.evictor.stuck is None


@virtual_time
async def test_a_whole_image_read_does_not_flush_what_guests_boot_from() -> None:
    store = FakeStore(limit=100 * MIB)
    guest, scanned = store.add_view(1), store.add_view(2, size=1 << 40)
    async with evicting(store) as node:
        for span in range(20):
            node.uses.set_boot(guest.number, map(SpanNo, range(span + 1)))
        store.land(guest, *range(30))
        await age()
        store.read(guest, *range(20, 30))
        await age()
        for span in range(1000):
            assert await store.keep(scanned, span)
            if span % 50 == 0:
                await trio.sleep(1)
        await one_round()
        assert store.here(guest) == list(range(30))
        assert store.used <= 95 * MIB


@virtual_time
async def test_what_is_pinned_or_open_stays_and_the_rest_goes() -> None:
    store = FakeStore(limit=100 * MIB)
    opened, pinned, other = (store.add_view(n) for n in (1, 2, 3))
    async with evicting(store) as node:
        node.leases.opened(opened.number)
        node.leases.pin(pinned.record.image, pinned.record.size)
        store.land(opened, *range(30))
        store.land(pinned, *range(30))
        await trio.sleep(LOOK_S + 1)
        store.land(other, *range(40))
        await one_round()
        assert (len(store.here(opened)), len(store.here(pinned)), len(store.here(other))) == (30, 30, 25)


@virtual_time
async def test_low_priority_goes_before_normal_and_normal_before_critical() -> None:
    store = FakeStore(limit=60 * MIB)
    views = [store.add_view(n) for n in (1, 2, 3)]
    async with evicting(store, Watermarks(0.95, 0.5)) as node:
        node.priorities.update({image_id(1): Priority.CRITICAL, image_id(3): Priority.LOW})
        for view in views:
            store.land(view, *range(20))
            await trio.sleep(1)
        await one_round()
        assert [len(store.here(view)) for view in views] == [20, 10, 0]


@virtual_time
async def test_what_a_policy_holds_goes_last_and_before_what_is_leased() -> None:
    store = FakeStore(limit=60 * MIB)
    held, booted, leased = (store.add_view(n) for n in (1, 2, 3))
    async with evicting(store) as node:
        node.held.add(held.record.image)
        node.leases.opened(leased.number)
        for span in range(20):
            node.uses.set_boot(booted.number, map(SpanNo, range(span + 1)))
        for view in (held, booted, leased):
            store.land(view, *range(20))
        await one_round()
        assert [len(store.here(view)) for view in (held, booted, leased)] == [20, 11, 20]
        store.limit = 32 * MIB
        await one_round()
        assert [len(store.here(view)) for view in (held, booted, leased)] == [7, 0, 20]


@virtual_time
async def test_what_came_since_the_plan_goes_before_what_is_held() -> None:
    """A plan that already names what is held may be some seconds old."""
    store = FakeStore(limit=60 * MIB)
    held, other = store.add_view(1), store.add_view(2)
    async with evicting(store) as node:
        node.held.add(held.record.image)
        store.land(held, *range(60))
        await one_round()  # Down to the low watermark, out of what is held: there is nothing else.
        assert len(store.here(held)) == 51
        for span in range(20):
            assert await store.keep(other, span)
        assert len(store.here(other)) <= 10
        assert len(store.here(held)) >= 50


@virtual_time
async def test_shared_spans_free_less_than_they_look_and_so_more_of_them_go() -> None:
    store = FakeStore(limit=100 * MIB, sizes={1: 50 * MIB})
    shared, other = store.add_view(1), store.add_view(2)
    async with evicting(store) as node:
        store.land(shared, *range(20), chunks=frozenset({1}))
        await trio.sleep(LOOK_S + 1)
        store.land(other, *range(50))
        await one_round()
        assert store.here(shared) == []
        # The first 15 looked like enough and freed nothing; among the next were the last that named the chunk.
        assert node.count(Cause.WATERMARK) == (30, 60 * MIB)


@virtual_time
async def test_others_who_fill_the_filesystem_make_the_store_smaller() -> None:
    store = FakeStore(limit=100 * MIB)
    view = store.add_view(1)
    async with evicting(store) as node:
        store.land(view, *range(60))
        await one_round()
        assert store.used == 60 * MIB
        store.limit = 20 * MIB
        await one_round()
        assert store.used == 17 * MIB
        store.limit = 0
        await one_round()
        assert store.used == 0
        assert node.evictor.stuck is None


@virtual_time
async def test_while_glance_is_away_nothing_goes_for_a_watermark_and_the_limit_holds() -> None:
    store = FakeStore(limit=100 * MIB)
    view = store.add_view(1, size=200 * MIB)
    async with evicting(store) as node:
        node.away[0] = True
        store.land(view, *range(99))
        await one_round()
        assert store.used == 99 * MIB
        store.limit = 90 * MIB
        await one_round()
        assert store.used == 90 * MIB
        assert await store.keep(view, 150), "for a landing there is room, still"
        assert store.used <= 90 * MIB
        node.away[0] = False
        store.land(view, *range(151, 155))
        await one_round()
        assert store.used <= int(0.95 * 90 * MIB)


# ── Ended images ──────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_what_has_ended_goes_though_there_is_room_and_its_view_is_forgotten() -> None:
    store = FakeStore()
    view, other = store.add_view(1, size=200 * MIB), store.add_view(2)
    async with evicting(store) as node:
        store.land(view, *range(SLICE_SPANS + 10))
        store.land(other, 0)
        await trio.sleep(LOOK_S + 1)
        store.end(view)
        await one_round()
        assert store.views() == [other]
        assert node.count(Cause.ENDED) == (SLICE_SPANS + 10, (SLICE_SPANS + 10) * MIB)
        assert store.here(other) == [0]


@virtual_time
async def test_what_has_ended_stays_while_it_is_open() -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with evicting(store) as node:
        store.land(view, *range(10))
        node.leases.opened(view.number)
        store.end(view)
        await trio.sleep(3600)
        assert len(store.here(view)) == 10
        node.leases.released(view.number)
        await one_round()
        assert store.views() == []


# ── For a landing ─────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_landing_that_meets_the_limit_gets_room_at_once() -> None:
    store = FakeStore(limit=64 * MIB)
    view = store.add_view(1, size=1 << 40)
    async with evicting(store, Watermarks(1.0, 0.9)) as node:
        await node.uses.ready.wait()
        await quiet()
        began_s = trio.current_time()
        for span in range(300):
            assert await store.keep(view, span)
            assert store.used <= 64 * MIB
        assert trio.current_time() - began_s < 1
        assert store.used >= 50 * MIB, "no more went than is needed, and some slack"
        assert node.count(Cause.FULL)[1] >= (300 - 64) * MIB
        assert store.refusals == 0


@virtual_time
async def test_where_everything_is_leased_the_landing_is_refused_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FakeStore(limit=10 * MIB)
    view, pinned = store.add_view(1), store.add_view(2)
    async with evicting(store) as node:
        node.leases.opened(view.number)
        node.leases.pin(pinned.record.image, pinned.record.size)
        store.land(view, *range(5))
        store.land(pinned, *range(5))
        for _ in range(20):
            assert not await store.keep(view, 20)
            await trio.sleep(7)
        assert node.evictor.stuck == "everything that is cached is leased (2 images, 1 of them pinned)"
        assert node.evictor.status()["stuck"] == node.evictor.stuck
        assert [r.levelno for r in caplog.records if "leased" in r.getMessage()] == [logging.WARNING]
        assert store.evictions == []
        node.leases.unpin(pinned.record.image)
        assert await store.keep(view, 20)
        await trio.sleep(STUCK_S + ROUND_S)
        assert node.evictor.stuck is None
    assert len(caplog.records) == 1


@virtual_time
async def test_where_nothing_is_cached_and_there_is_no_room_it_is_said_so() -> None:
    store = FakeStore(limit=0)
    view = store.add_view(1)
    async with evicting(store) as node:
        assert not await store.keep(view, 0)
        assert node.evictor.stuck == "nothing that is cached is left to evict"


@virtual_time
async def test_spans_that_came_unseen_are_found_before_a_landing_is_refused() -> None:
    store = FakeStore(limit=10 * MIB)
    view = store.add_view(1)
    async with evicting(store) as node:
        await node.uses.ready.wait()
        await trio.sleep(100)
        store.land(view, *range(10))
        view.maps.clear()  # As after a failed commit: nobody saw them come.
        assert await store.keep(view, 20)
        assert store.used <= 10 * MIB
        assert node.evictor.stuck is None


@virtual_time
async def test_a_lease_that_is_taken_between_two_slices_is_kept() -> None:
    store = FakeStore(limit=1000 * MIB, evict_s=1.0)
    view, other = store.add_view(1, size=1 << 40), store.add_view(2, size=1 << 40)
    async with evicting(store, Watermarks(0.95, 0.01)) as node:
        await quiet()
        store.land(view, *range(500))
        await trio.sleep(LOOK_S)
        store.land(other, *range(480))

        def on_evict(spans: Sequence[tuple[ViewNo, SpanNo]]) -> None:
            assert not node.leases.is_leased(view) or all(number != view.number for number, _ in spans)
            if len(store.evictions) == 2:
                node.leases.opened(view.number)

        store.on_evict = on_evict
        await trio.sleep(60)
        assert store.here(view) == list(range(3 * SLICE_SPANS, 500))
        assert store.here(other) == []


@virtual_time
async def test_a_span_that_was_used_since_the_plan_was_made_waits_for_the_next() -> None:
    store = FakeStore(limit=200 * MIB, evict_s=1.0)
    view = store.add_view(1, size=1 << 40)
    async with evicting(store, Watermarks(0.95, 0.5)) as node:
        store.land(view, *range(150))
        await age()
        store.read(view, *range(150))
        await trio.sleep(LOOK_S + 1)
        store.land(view, *range(150, 200))  # These go first.

        def on_evict(spans: Sequence[tuple[ViewNo, SpanNo]]) -> None:
            if not store.evictions:
                store.read(view, *range(100, 150))
                store.read(view, 14)

        store.on_evict = on_evict
        await trio.sleep(30)
        here = store.here(view)
        assert 14 in here
        assert set(range(100, 150)) <= set(here)
        assert len(here) == 100
        assert node.count(Cause.WATERMARK)[0] == 100


# ── What fails ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [OSError(5, "the disk"), StoreError("the index"), ValueError("a bug")])
def test_a_store_that_fails_does_not_end_eviction(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    @virtual_time
    async def body() -> None:
        store = FakeStore(limit=10 * MIB)
        view = store.add_view(1)
        async with evicting(store) as node:
            await quiet()
            store.land(view, *range(10))
            before = node.uses.last_s
            store.fails = [error]
            assert not await store.keep(view, 20), "who waits for room is not left waiting"
            assert node.evictor.trouble == str(error)
            await trio.sleep(PAUSE_S + ROUND_S)
            assert node.evictor.trouble is None
            assert store.used <= 9.5 * MIB
            store.fails = [error, error, error]  # In the middle, too.
            store.land(view, *range(20, 25))
            await trio.sleep(10 * (PAUSE_S + ROUND_S))
            assert store.used <= 9.5 * MIB
            assert before(view.number, SpanNo(24))

    body()
    assert any(record.levelno == logging.ERROR for record in caplog.records)


@virtual_time
async def test_what_could_not_be_evicted_is_known_as_before() -> None:
    store = FakeStore(limit=10 * MIB)
    view = store.add_view(1)
    async with evicting(store, Watermarks(1.0, 0.5)) as node:
        node.uses.set_boot(view.number, [SpanNo(3)])
        store.land(view, *range(10))
        await trio.sleep(LOOK_S + 1)
        before = [
            (node.uses.last_s(view.number, SpanNo(n)), node.uses.flags(view.number, SpanNo(n))) for n in range(10)
        ]
        assert before[3][1] == UseFlag.BOOT

        def on_evict(spans: Sequence[tuple[ViewNo, SpanNo]]) -> None:
            store.fails.append(OSError(5, "the disk"))

        store.on_evict = on_evict
        assert not await store.keep(view, 20)
        after = [
            (node.uses.last_s(view.number, SpanNo(n)), node.uses.flags(view.number, SpanNo(n))) for n in range(10)
        ]
        assert after == before


# ── When asked ────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_image_is_evicted_when_asked() -> None:
    store = FakeStore()
    view, other = store.add_view(1, size=1 << 40), store.add_view(2)
    async with evicting(store) as node:
        store.land(view, *range(150))
        store.land(other, 0)
        view.maps.clear()  # Also what nobody has seen come.
        asked = await node.evictor.evict_image(view.record.image)
        assert (asked.spans, asked.bytes) == (150, 150 * MIB)
        assert store.here(view) == []
        assert store.here(other) == [0]
        assert max(map(len, store.evictions)) == SLICE_SPANS
        assert node.count(Cause.ASKED) == (150, 150 * MIB)
        asked = await node.evictor.evict_image(image_id(99))
        assert (asked.spans, asked.bytes) == (0, 0), "nothing is cached of an image that nobody knows"


@virtual_time
async def test_what_is_leased_is_not_evicted_and_the_reason_is_given() -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with evicting(store) as node:
        store.land(view, 0)
        node.leases.opened(view.number)
        node.leases.pin(A, MIB)
        with pytest.raises(Leased, match=r"it is open \(1 handle\), it is pinned"):
            await node.evictor.evict_image(A)
        node.leases.released(view.number)
        with pytest.raises(Leased, match="it is pinned"):
            await node.evictor.evict_image(A)
        assert store.evictions == []
        node.leases.unpin(A)
        assert (await node.evictor.evict_image(A)).spans == 1


@virtual_time
async def test_an_image_that_is_opened_while_it_is_evicted_keeps_the_rest() -> None:
    store = FakeStore(evict_s=1.0)
    view = store.add_view(1, size=1 << 40)
    async with evicting(store) as node:
        store.land(view, *range(200))

        async def open_it() -> None:
            await trio.sleep(0.5)
            node.leases.opened(view.number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            with pytest.raises(Leased):
                await node.evictor.evict_image(A)
        assert len(store.here(view)) == 200 - SLICE_SPANS


@virtual_time
async def test_who_asks_and_goes_away_does_not_stop_it_and_who_asks_again_joins() -> None:
    store = FakeStore(evict_s=10.0)
    view = store.add_view(1, size=1 << 40)
    async with evicting(store) as node:
        store.land(view, *range(200))
        with trio.move_on_after(5):
            await node.evictor.evict_image(A)
        asked = await node.evictor.evict_image(A)
        assert asked.spans == 200
        assert len(store.evictions) == -(-200 // SLICE_SPANS)


@virtual_time
async def test_a_failure_while_an_image_is_evicted_is_told() -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with evicting(store) as node:
        store.land(view, 0)
        await quiet()
        store.fails = [OSError(5, "the disk")]
        with pytest.raises(StoreError, match=f"image {A} could not be evicted: .*the disk"):
            await node.evictor.evict_image(A)
        assert (await node.evictor.evict_image(A)).spans == 1


# ── The commands ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sized:
    size: int


def commands_of(node: Node, sizes: dict[str, int], flushes: list[int] | None = None) -> Commands:
    async def lookup(image: str) -> Sized:
        if image not in sizes:
            raise NoEntry(image)
        return Sized(sizes[image])

    async def flush() -> None:
        (flushes if flushes is not None else []).append(1)

    async def prefetch(image: str) -> SizedView:
        raise NoEntry(image)

    def prefetched(image: str) -> SizedView:
        raise NoEntry(image)

    return Commands(node.leases, node.evictor, lookup, flush, prefetch, prefetched)


@virtual_time
async def test_images_are_pinned_unpinned_and_evicted_each_with_its_own_answer() -> None:
    store = FakeStore()
    view, other = store.add_view(1), store.add_view(2)
    flushes: list[int] = []
    async with evicting(store, pinned_max=100 * MIB) as node:
        handlers = commands_of(node, {A: 64 * MIB, B: 64 * MIB}, flushes).handlers()
        store.land(view, 0, 1)
        store.land(other, 0)
        pinned = await handlers["pin"]({"images": [A.upper(), B, image_id(3), "nonsense"]})
        assert [row["error"] is None for row in pinned] == [True, False, False, False]
        assert pinned[0] == {"id": A.upper(), "error": None, "pinned": True, "size": 64 * MIB}
        assert "is not pinned" in pinned[1]["error"]
        assert "no image id" in pinned[3]["error"]
        assert flushes == [1], "what is answered is durable"
        evicted = await handlers["evict"]({"images": [A, B, "nonsense"]})
        assert evicted[0]["error"] == f"image {A} is not evicted: it is pinned (cachefs unpin ends that)"
        assert evicted[1] == {"id": B, "error": None, "spans": 1, "bytes": MIB, "cached": MIB, "done": True}
        assert "no image id" in evicted[2]["error"]
        unpinned = await handlers["unpin"]({"images": [A, A, B]})
        assert [(row["id"], row["was_pinned"]) for row in unpinned] == [(A, True), (B, False)]
        (gone,) = await handlers["evict"]({"images": [A]})
        assert (gone["spans"], gone["bytes"], gone["done"]) == (2, 2 * MIB, True)
        assert node.evictor.status() == {
            "stuck": None,
            "trouble": None,
            "high_watermark": 0.95,
            "low_watermark": 0.85,
            "evicted": {
                "watermark": {"spans": 0, "bytes": 0},
                "full": {"spans": 0, "bytes": 0},
                "ended": {"spans": 0, "bytes": 0},
                "asked": {"spans": 3, "bytes": 3 * MIB},
            },
            "open_handles": 0,
            "pinned_images": 0,
            "pinned_bytes": 0,
        }


@virtual_time
async def test_a_long_eviction_is_answered_before_it_is_done_and_goes_on() -> None:
    store = FakeStore(evict_s=EVICT_WAIT_S * 0.6)
    view = store.add_view(1, size=1 << 40)
    async with evicting(store) as node:
        store.land(view, *range(3 * SLICE_SPANS))
        handlers = commands_of(node, {}).handlers()
        (row,) = await handlers["evict"]({"images": [A]})
        assert (row["spans"], row["done"], row["error"]) == (SLICE_SPANS, False, None)
        (row,) = await handlers["evict"]({"images": [A]})
        assert (row["spans"], row["done"]) == (3 * SLICE_SPANS, True)


@pytest.mark.parametrize("images", [None, [], "x", {}, [A] * (IMAGES_MAX + 1)])
def test_a_request_without_images_is_refused(images: object) -> None:
    @virtual_time
    async def body() -> None:
        async with evicting(FakeStore()) as node:
            for handler in commands_of(node, {}).handlers().values():
                with pytest.raises(ControlError):
                    await handler({"images": images})

    body()


# ── What must always hold ─────────────────────────────────────────────────────────────────────────────

VIEWS, SPANS, LIMIT = 4, 12, 16 * MIB
views = st.integers(0, VIEWS - 1)
spans = st.integers(0, SPANS - 1)
chunks = st.frozensets(st.integers(1, 25), min_size=1, max_size=3)
steps = st.one_of(
    st.tuples(st.just("keep"), views, spans, chunks),
    st.tuples(st.just("keep"), views, spans, chunks),
    st.tuples(st.just("keep"), views, spans, chunks),
    st.tuples(st.just("read"), views),
    st.tuples(st.just("open"), views),
    st.tuples(st.just("close"), views),
    st.tuples(st.just("pin"), views),
    st.tuples(st.just("unpin"), views),
    st.tuples(st.just("end"), views),
    st.tuples(st.just("evict"), views),
    st.tuples(st.just("sleep"), st.sampled_from([1, 7, 100])),
    st.tuples(st.just("away"), st.booleans()),
    st.tuples(st.just("limit"), st.integers(4, 16)),
    st.tuples(st.just("fail")),
)


class Model:
    """A store under eviction, and what this test itself knows of leases and of the bound."""

    def __init__(self, store: FakeStore, node: Node) -> None:
        self.store, self.node = store, node
        self.views: list[FakeView] = [store.add_view(n + 1, size=SPANS * MIB) for n in range(VIEWS)]
        self.open: Counter[ViewNo] = Counter()
        self.pinned: set[str] = set()
        self.images = VIEWS
        self.failing = False
        store.on_evict = self._on_evict

    def leased(self, view: FakeView) -> bool:
        return bool(self.open[view.number]) or view.record.image in self.pinned

    def _on_evict(self, evicted: Sequence[tuple[ViewNo, SpanNo]]) -> None:
        assert 0 < len(evicted) <= SLICE_SPANS
        by_number = {view.number: view for view in self.store.views()}
        for number, _ in evicted:
            assert not self.leased(by_number[number]), "nothing leased is ever dropped"

    async def step(self, kind: str, *operands: Any) -> None:
        store, leases = self.store, self.node.leases
        view = self.views[operands[0]] if kind not in ("sleep", "away", "limit", "fail") else None
        leased_before = {v.number: store.here(v) for v in store.views() if self.leased(v)}
        match kind, view:
            case "keep", FakeView():
                await self._keep(view, *operands[1:])
            case "read", FakeView():
                store.read(view, *store.here(view))
            case "open", FakeView():
                leases.opened(view.number)
                self.open[view.number] += 1
            case "close", FakeView():
                if self.open[view.number]:
                    leases.released(view.number)
                    self.open[view.number] -= 1
            case "pin", FakeView():
                leases.pin(view.record.image, view.record.size)
                self.pinned.add(view.record.image)
            case "unpin", FakeView():
                assert leases.unpin(view.record.image) == (view.record.image in self.pinned)
                self.pinned.discard(view.record.image)
            case "end", FakeView():
                store.end(view)
                self.images += 1
                self.views[operands[0]] = store.add_view(self.images, size=SPANS * MIB)
            case "evict", FakeView():
                await self._evict(view)
            case "sleep", _:
                await trio.sleep(operands[0])
            case "away", _:
                self.node.away[0] = operands[0]
            case "limit", _:
                store.limit = operands[0] * MIB
            case "fail", _:
                store.fails.append(OSError(5, "the disk"))
                self.failing = True
        after = {v.number: store.here(v) for v in store.views()}
        for number, here in leased_before.items():
            if any(v.number == number and self.leased(v) for v in store.views()):
                assert set(here) <= set(after[number])

    async def _keep(self, view: FakeView, span: int, chunks: frozenset[int]) -> None:
        if (view.number, span) in self.store.spans:
            return
        before = self.store.used
        kept = await self.store.keep(view, span, chunks)
        assert self.store.used <= max(self.store.limit, before), "no landing passes the bound"
        if not any(map(self.leased, self.store.views())) and not self.failing:
            assert kept or len(chunks) * MIB > self.store.limit, "with nothing leased there is always room"
        self.failing = self.failing and bool(self.store.fails)

    async def _evict(self, view: FakeView) -> None:
        if self.leased(view):
            with pytest.raises(Leased):
                await self.node.evictor.evict_image(view.record.image)
            return
        try:
            await self.node.evictor.evict_image(view.record.image)
        except StoreError:
            assert self.failing
        else:
            assert self.store.here(view) == []

    async def settle(self) -> None:
        """With nothing leased any more, everything is within its bound soon."""
        self.store.fails.clear()
        for view in self.store.views():
            for _ in range(self.open[view.number]):
                self.node.leases.released(view.number)
        for image in list(self.pinned):
            self.node.leases.unpin(image)
        self.open.clear()
        self.pinned.clear()
        await trio.sleep(STUCK_S + 4 * (PAUSE_S + ROUND_S))
        high = 1.0 if self.node.away[0] else MARKS.high
        assert self.store.used <= high * self.store.limit
        assert {v.number for v in self.store.views()} == {v.number for v in self.views}, (
            "ended views are forgotten"
        )
        assert self.node.evictor.stuck is None
        known = {(v.number, span) for v in self.views for span in self.node.uses.spans(v.number)}
        assert known == set(self.store.spans), "what is known is what is here"


@given(st.lists(steps, max_size=60))
@examples(150)
def test_nothing_leased_is_dropped_and_the_bound_holds(plan: list[tuple[Any, ...]]) -> None:
    @virtual_time
    async def body() -> None:
        store = FakeStore(limit=LIMIT)
        async with evicting(store) as node:
            await node.uses.ready.wait()
            model = Model(store, node)
            for step in plan:
                await model.step(*step)
            await model.settle()

    body()


# ── The real store ────────────────────────────────────────────────────────────────────────────────────


def content(view: int, span: int) -> bytes:
    return random_bytes(1000 * view + span, SPAN)


async def land_spans(store: Store, view: StoredView, number: int, spans: Sequence[int]) -> list[bool]:
    return [await land(store, view, span * SPAN, content(number, span)) for span in spans]


def cached_spans(store: Store, view: StoredView) -> set[int]:
    return {span for number, span in store.resident() if number == view.number}


@virtual_time
async def test_many_spans_pass_through_a_small_store_and_the_bound_holds(tmp_path: Path) -> None:
    most = 24 * SPAN
    async with running(tmp_path, limits=lambda: Limits(most, 0)) as store, evicting(store) as node:
        view = view_of(store, 1, 100 * SPAN)
        for span in range(100):
            assert await land(store, view, span * SPAN, content(1, span)), (
                "with nothing leased there is always room"
            )
            assert store.usage().used <= most
        assert store.writer.not_kept_bytes == 0
        await one_round()
        assert store.usage().used <= 0.95 * most
        evicted = sum(node.count(cause)[0] for cause in Cause)
        here = [span for span in range(100) if await read(view, span * SPAN, SPAN) == content(1, span)]
        assert len(here) == 100 - evicted
        assert here == list(range(evicted, 100)), "the coldest went"
        for span in set(range(100)) - set(here):
            assert await read(view, span * SPAN, 4096) is None
        assert view.cached == len(here) * SPAN


@virtual_time
async def test_leased_images_stay_whole_in_a_small_store_and_the_rest_is_not_kept(tmp_path: Path) -> None:
    most = 16 * SPAN
    async with running(tmp_path, limits=lambda: Limits(most, 0)) as store, evicting(store) as node:
        view, other = view_of(store, 1, 100 * SPAN), view_of(store, 2, 100 * SPAN)
        node.leases.opened(view.number)
        kept = await land_spans(store, view, 1, range(20))
        assert kept[:14] == [True] * 14
        assert kept[-1] is False
        assert store.usage().used <= most
        assert node.evictor.stuck is not None
        for span, is_here in enumerate(kept):
            assert await read(view, span * SPAN, SPAN) == (content(1, span) if is_here else None)
        node.leases.released(view.number)
        await trio.sleep(10)  # While the writer does not try again.
        assert all(await land_spans(store, other, 2, range(3)))
        assert store.usage().used <= most


@virtual_time
async def test_uses_and_pins_of_a_real_store_outlive_it(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        async with evicting(store) as node:
            view, other = view_of(store, 1, 10 * SPAN), view_of(store, 2, 10 * SPAN)
            await land_spans(store, view, 1, range(3))
            await land_spans(store, other, 2, range(2))
            node.uses.set_boot(view.number, [SpanNo(1)])
            node.leases.pin(B, other.size)
            await age()
            assert await read(view, 2 * SPAN, 4096) is not None
            await trio.sleep(LOOK_S + 1)
            known = [
                (node.uses.last_s(view.number, SpanNo(n)), node.uses.flags(view.number, SpanNo(n)))
                for n in range(4)
            ]
        await store.writer.flush()
    assert [flags for _, flags in known] == [0, UseFlag.BOOT, UseFlag.TWICE, 0]
    async with running(tmp_path) as store, evicting(store) as node:
        view = view_of(store, 1, 10 * SPAN)
        await node.uses.ready.wait()
        again = [
            (node.uses.last_s(view.number, SpanNo(n)), node.uses.flags(view.number, SpanNo(n))) for n in range(4)
        ]
        assert again == known
        with pytest.raises(Leased):
            await node.evictor.evict_image(B)
        asked: Asked = await node.evictor.evict_image(A)
        assert (asked.spans, asked.bytes) == (3, 3 * SPAN)
        assert view.cached == 0
        assert cached_spans(store, view) == set()
        assert await node.uses.reconcile() == 0


@virtual_time
async def test_an_image_that_ended_gives_its_space_back(tmp_path: Path) -> None:
    async with running(tmp_path) as store, evicting(store) as node:
        view = view_of(store, 1, 10 * SPAN)
        await land_spans(store, view, 1, range(10))
        await trio.sleep(LOOK_S + 1)
        before = store.usage().used
        store.end_views(A)
        await one_round()
        assert store.usage().used <= before - 9 * SPAN
        assert store.views() == []
        assert node.count(Cause.ENDED) == (10, 10 * SPAN)
