"""Hydration in virtual time: what is fetched, in what order, and who goes first. Rule: bytes and requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.errors import OriginUnavailable, PrefetchEnded
from cachefs.fetcher import MEMORY_MAX
from cachefs.hydrator import AGAIN_S, LOOK_S, Hydrator
from cachefs.leases import Leases
from cachefs.plan.extents import BLOCK, Extent
from cachefs.plan.windows import Pattern
from cachefs.store.format import SpanNo
from cachefs.store.room import Limits
from cachefs.store.view import StoredView
from tests.flow import Act, Flow, Refuse, Request, ScriptedSource, flow, until, virtual_time
from tests.stores import SPAN, image_id

SIZE = 6 * SPAN + 12345


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@dataclass
class Hydrated:
    """A flow with a hydrator beside it."""

    flow: Flow
    leases: Leases
    hydrator: Hydrator
    whole: list[StoredView]

    def open(self, image: int, size: int = SIZE) -> StoredView:
        view = self.flow.stored(image, size)
        self.leases.opened(view.number)
        self.hydrator.opened(view)
        return view


@asynccontextmanager
async def hydrating(
    folder: Path,
    source: ScriptedSource,
    *,
    on_open: bool = True,
    bandwidth: int = 0,
    concurrency: int = 2,
    limits: Limits | None = None,
    connections: int = 8,
    memory_max: int = MEMORY_MAX,
    read_deadline_s: float = 600.0,
    **more: Any,
) -> AsyncIterator[Hydrated]:
    bounds: dict[str, Any] = {} if limits is None else {"limits": lambda: limits}
    bounds |= {"connections": connections, "memory_max": memory_max, "read_deadline_s": read_deadline_s}
    async with flow(folder, source, **bounds) as made:
        leases = Leases(made.store, lambda: 1 << 60)
        await leases.load()
        whole: list[StoredView] = []
        hydrator = Hydrator(
            made.store, made.fetcher, made.blocks, leases,
            on_open=on_open, bandwidth=bandwidth, concurrency=concurrency, **more,
        )  # fmt: skip

        def became_whole(view: StoredView) -> None:
            whole.append(view)
            hydrator.became_whole(view)

        made.store.on_whole = became_whole
        made.fetcher.give_way(made.blocks)
        made.blocks.on_miss = hydrator.missed
        await made.services.start(hydrator.run)
        yield Hydrated(made, leases, hydrator, whole)


def asked_once(source: ScriptedSource, image: int, size: int = SIZE) -> bool:
    return all(source.times_asked(image, block) == 1 for block in range(-(-size // 65536)))


@virtual_time
async def test_what_is_open_comes_whole_and_each_block_once(folder: Path) -> None:
    source = ScriptedSource()
    async with hydrating(folder, source) as now:
        view = now.open(1)
        await until(lambda: view.complete)
        await until(lambda: now.whole == [view])
        assert asked_once(source, 1)
        assert max(extent.length for extent in source.extents) >= SPAN, "in long requests"
        assert now.hydrator.status()["images"] == 0
        await trio.sleep(10 * LOOK_S)
        assert asked_once(source, 1), "and then no more"


@virtual_time
async def test_what_nobody_leases_is_let_go(folder: Path) -> None:
    source = ScriptedSource(rate=1e6)
    async with hydrating(folder, source, concurrency=1) as now:
        view = now.open(1)
        await until(lambda: len(source.requests) == 2)
        now.leases.released(view.number)
        await trio.sleep(60)
        asked = len(source.requests)
        assert not view.complete
        await trio.sleep(600)
        assert len(source.requests) == asked
        # Whoever asks for it has it, leased or not.
        now.hydrator.ask(view)
        await until(lambda: view.complete)


@virtual_time
async def test_by_hand_only_what_is_asked_for_comes(folder: Path) -> None:
    source = ScriptedSource()
    async with hydrating(folder, source, on_open=False) as now:
        opened, asked = now.open(1), now.flow.stored(2, SIZE)
        now.hydrator.ask(asked)
        await until(lambda: asked.complete)
        await trio.sleep(60)
        assert opened.cached == 0


@virtual_time
async def test_the_one_opened_last_comes_first(folder: Path) -> None:
    source = ScriptedSource(rate=5e6)
    async with hydrating(folder, source, concurrency=1) as now:
        first = now.open(1)
        await until(lambda: len(source.requests) == 1)
        second = now.open(2)
        await until(lambda: second.complete)
        assert first.cached < SIZE // 2
        await until(lambda: first.complete)


@virtual_time
async def test_a_guest_goes_first(folder: Path) -> None:
    """A miss takes as long as it would without hydration, but for what was in the air."""
    source = ScriptedSource(rate=5e6, piece=65536)
    async with hydrating(folder, source) as now:
        alone_s = await timed_miss(now, 9)
        now.open(1, 64 * SPAN)
        await until(lambda: source.requests[-1].got > 0 and source.requests[-1].image == 1)
        beside = [await timed_miss(now, image) for image in range(10, 20)]
        assert max(beside) <= 2 * alone_s
        assert len(source.of(1)) >= 1


async def timed_miss(now: Hydrated, image: int) -> float:
    view = now.flow.stored(image, SPAN)
    began_s = trio.current_time()
    await now.flow.blocks.read(view, 0, 4096, Pattern())
    took_s = trio.current_time() - began_s
    await trio.sleep(1.0)
    return took_s


@virtual_time
async def test_a_guest_who_wants_what_is_being_hydrated_has_it_at_once(folder: Path) -> None:
    source = ScriptedSource(rate=2e6)
    async with hydrating(folder, source, concurrency=1) as now:
        view = now.open(1)
        await until(lambda: bool(source.requests) and source.requests[0].got > 0)
        first = source.requests[0].extent
        data = await now.flow.blocks.read(view, first.end - 4096, 4096, Pattern())
        assert bytes(data) == source.bytes_of(1, first.end - 4096, first.end)
        assert source.times_asked(1, (first.end - 1) // 65536) == 1, "the flight that was to bring it did"


@virtual_time
async def test_what_lies_around_a_guests_misses_comes_before_the_rest(folder: Path) -> None:
    source = ScriptedSource(rate=5e6)
    async with hydrating(folder, source, concurrency=1) as now:
        view = now.open(1, 16 * SPAN)
        await until(lambda: len(source.requests) == 1)
        for span in (9, 12):
            await now.flow.blocks.read(view, span * SPAN + SPAN // 2, 4096, Pattern())
        await until(lambda: not view.absent(Extent(12 * SPAN, 13 * SPAN)))
        assert view.absent(Extent(9 * SPAN, 10 * SPAN)), "the last one first"
        await until(lambda: not view.absent(Extent(9 * SPAN, 10 * SPAN)))
        behind = Extent(14 * SPAN, 16 * SPAN)
        assert view.absent(behind) == [behind], "the windows of the misses, and no more"
        await until(lambda: view.complete)
        assert asked_once(source, 1, 16 * SPAN)


@virtual_time
async def test_what_cannot_be_had_around_a_miss_keeps_nobody_from_the_rest(folder: Path) -> None:
    def act(request: Request) -> Act | None:
        return Refuse(OriginUnavailable) if request.extent.start >= 12 * SPAN and not there else None

    there = True
    source = ScriptedSource(rate=5e6, act=act)
    async with hydrating(folder, source, concurrency=1) as now:
        view = now.open(1, 16 * SPAN)
        await until(lambda: len(source.requests) == 1)
        await now.flow.blocks.read(view, 12 * SPAN + SPAN // 2, 4096, Pattern())
        there = False
        await until(lambda: not view.absent(Extent(0, 12 * SPAN)))
        assert view.absent(Extent(12 * SPAN, 13 * SPAN))
        there = True
        await until(lambda: view.complete)


@virtual_time
async def test_within_a_bandwidth(folder: Path) -> None:
    source = ScriptedSource(rate=1e9)
    async with hydrating(folder, source, bandwidth=1 << 20) as now:
        view = now.open(1)
        began_s = trio.current_time()
        await until(lambda: view.complete)
        took_s = trio.current_time() - began_s
        assert SIZE / (1 << 20) - 2 <= took_s <= SIZE / (1 << 20) + 2


@virtual_time
async def test_a_stream_is_kept_whole(folder: Path) -> None:
    source = ScriptedSource(streams_only={1})
    async with hydrating(folder, source) as now:
        view = now.open(1)
        await until(lambda: view.complete)
        assert sum(request.stream for request in source.requests) == 1


@virtual_time
async def test_an_origin_that_fails_is_asked_again_later_and_the_risk_is_said(folder: Path) -> None:
    away = True
    source = ScriptedSource(act=lambda request: Refuse(OriginUnavailable) if away else None)
    async with hydrating(folder, source) as now:
        view = now.open(1)
        await until(lambda: bool(now.hydrator.at_risk))
        asked = len(source.requests)
        await trio.sleep(AGAIN_S / 2)
        assert len(source.requests) <= asked + 8, "it does not hammer"
        away = False
        await until(lambda: view.complete)
        assert now.hydrator.at_risk == {}


@virtual_time
async def test_a_store_that_is_too_small_is_a_risk_and_no_loop(folder: Path) -> None:
    source = ScriptedSource()
    async with hydrating(folder, source, limits=Limits(2 * SPAN + SPAN // 2, 0)) as now:
        now.open(1)
        await until(lambda: bool(now.hydrator.at_risk))
        await trio.sleep(3600)
        fetched = sum(request.got for request in source.requests)
        assert fetched <= 20 * SIZE, "ever more seldom"


# ── In what order ─────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_important_images_come_before_those_opened_later(folder: Path) -> None:
    ranks = {image_id(1): 1, image_id(2): 0, image_id(3): 2}
    source = ScriptedSource(rate=5e6)
    async with hydrating(folder, source, concurrency=1, priority=ranks.__getitem__) as now:
        views = {number: now.open(number) for number in (2, 1, 3)}
        await until(lambda: views[2].complete)
        assert views[1].cached + views[3].cached <= SIZE
        await until(lambda: views[1].complete)
        assert views[3].cached <= SIZE // 2
        await until(lambda: views[3].complete)


@virtual_time
async def test_boot_sets_of_all_images_come_before_the_rest_of_any(folder: Path) -> None:
    """In their order, and in whole blocks within the image."""
    boots = [Extent(5 * SPAN + 10, 5 * SPAN + 20), Extent(SPAN, SPAN + 2 * BLOCK), Extent(SIZE - 1, SIZE + 100)]
    source = ScriptedSource(rate=5e6)
    async with hydrating(folder, source, concurrency=1, before_hydration=lambda view: boots) as now:
        views = [now.open(1), now.open(2)]
        await until(lambda: all(view.complete for view in views))
        expected = [
            Extent(5 * SPAN, 5 * SPAN + BLOCK), Extent(SPAN, SPAN + 2 * BLOCK), Extent(SIZE // BLOCK * BLOCK, SIZE)
        ]  # fmt: skip
        assert [(r.image, r.extent) for r in source.requests[:6]] == [(n, e) for n in (1, 2) for e in expected]
        assert asked_once(source, 1)
        assert asked_once(source, 2)


@virtual_time
async def test_what_is_leased_is_taken_up_again_after_a_restart(folder: Path) -> None:
    source = ScriptedSource(rate=5e6)
    async with hydrating(folder, source) as now:
        view = now.open(1)
        now.leases.pin(image_id(1), SIZE)
        await until(lambda: view.cached > SIZE // 3)
        now.leases.released(view.number)
    async with hydrating(folder, source) as now:
        view = now.flow.stored(1, SIZE)
        assert not view.complete
        await until(lambda: view.complete)
        # What had arrived and was not handed on is fetched twice, no more.
        assert sum(request.got for request in source.requests) < 1.7 * SIZE


@virtual_time
async def test_what_comes_for_a_reader_is_waited_for_without_looking_all_the_time(folder: Path) -> None:
    source = ScriptedSource(rate=1e5, streams_only={1})
    async with hydrating(folder, source) as now:
        view = now.open(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(now.flow.blocks.read, view, 0, 4096, Pattern())
            await until(lambda: view.complete)
        assert sum(request.stream for request in source.requests) == 1


# ── Nothing that demand needs is held ─────────────────────────────────────────────────────────────────


@virtual_time
async def test_with_one_connection_a_guest_waits_for_one_short_request(folder: Path) -> None:
    source = ScriptedSource(rate=5e6, piece=65536)
    async with hydrating(folder, source, connections=1, read_deadline_s=4.0) as now:
        alone_s = await timed_miss(now, 9)
        now.open(1, 64 * SPAN)
        await until(lambda: source.requests[-1].got > 0 and source.requests[-1].image == 1)
        beside = [await timed_miss(now, image) for image in range(10, 20)]
        assert max(beside) <= alone_s + (1 << 20) / source.rate + 0.1


@virtual_time
async def test_memory_that_hydration_has_filled_is_no_guests_deadline(folder: Path) -> None:
    source = ScriptedSource(rate=5e6, piece=65536)
    async with hydrating(
        folder, source, concurrency=8, connections=12, memory_max=4 * SPAN, read_deadline_s=4.0
    ) as now:
        for image in range(1, 9):
            now.open(image, 16 * SPAN)
        await until(lambda: now.flow.fetcher.memory_used == 4 * SPAN)
        for image in range(10, 16):
            view = now.flow.stored(image, SPAN)
            data = await now.flow.blocks.read(view, 0, 4096, Pattern())
            assert bytes(data) == source.bytes_of(image, 0, 4096)


# ── Promises at risk ──────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_image_larger_than_the_store_is_said_to_be_before_anything_fails(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ScriptedSource(rate=1e4)
    async with hydrating(folder, source, limits=Limits(4 * SPAN, 0)) as now:
        now.open(1)
        await until(lambda: bool(now.hydrator.at_risk))
        assert trio.current_time() < 1.0
        assert "more than the store may hold" in now.hydrator.at_risk[image_id(1)]
        await trio.sleep(10 * LOOK_S)
        assert caplog.text.count("promise at risk") == 1


@virtual_time
async def test_of_images_that_do_not_fit_together_one_comes_whole(folder: Path) -> None:
    source = ScriptedSource(rate=20e6)
    async with hydrating(folder, source, limits=Limits(SIZE + 4 * SPAN, 0)) as now:
        first = now.open(1)
        await trio.sleep(0.01)
        second = now.open(2)
        await until(lambda: bool(now.hydrator.at_risk))
        assert "beside what else is leased" in now.hydrator.at_risk[image_id(1)]
        await until(lambda: second.complete)
        await trio.sleep(60)
        assert list(now.hydrator.at_risk) == [image_id(1)]
        now.leases.released(first.number)
        await trio.sleep(2 * LOOK_S)
        assert now.hydrator.at_risk == {}


@virtual_time
async def test_an_image_that_glance_has_no_more_is_an_alarm_at_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone: set[str] = set()
    source = ScriptedSource(rate=1e5)
    async with hydrating(folder, source, is_gone=gone.__contains__) as now:
        view = now.open(1)
        await until(lambda: view.cached > 0)
        gone.add(image_id(1))
        now.hydrator.gone(image_id(1))
        assert "Glance has it no more" in now.hydrator.at_risk[image_id(1)]
        assert caplog.text.count("promise at risk") == 1
        asked = len(source.requests)
        await trio.sleep(100)
        assert len(source.requests) <= asked + 1, "nobody asks for it any more"
        assert list(now.hydrator.at_risk) == [image_id(1)]
        now.leases.released(view.number)
        await trio.sleep(2 * LOOK_S)
        assert now.hydrator.at_risk == {}


@virtual_time
async def test_an_image_that_is_whole_needs_no_glance(folder: Path) -> None:
    gone: set[str] = set()
    async with hydrating(folder, ScriptedSource(), is_gone=gone.__contains__) as now:
        view = now.open(1)
        await until(lambda: view.complete)
        gone.add(image_id(1))
        now.hydrator.gone(image_id(1))
        await trio.sleep(10 * LOOK_S)
        assert now.hydrator.at_risk == {}


# ── Asked for ─────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_what_can_never_fit_is_not_fetched_for_who_asks(folder: Path) -> None:
    source = ScriptedSource()
    async with hydrating(folder, source, on_open=False, limits=Limits(4 * SPAN, 0)) as now:
        view = now.flow.stored(1, SIZE)
        now.hydrator.ask(view)
        await trio.sleep(0.1)
        with pytest.raises(PrefetchEnded, match="more than the store may hold"):
            now.hydrator.progress(view)
        fetched = sum(request.got for request in source.requests)
        await trio.sleep(1000)
        assert sum(request.got for request in source.requests) <= fetched + SIZE
        assert now.hydrator.at_risk == {}, "nobody was promised anything"


@virtual_time
async def test_what_does_not_fit_beside_what_is_leased_ends_for_who_asked(folder: Path) -> None:
    source = ScriptedSource()
    async with hydrating(folder, source, limits=Limits(SIZE + 3 * SPAN, 0)) as now:
        leased = now.open(1)
        await until(lambda: leased.complete)
        view = now.flow.stored(2, SIZE)
        now.hydrator.ask(view)

        def has_ended() -> bool:
            try:
                now.hydrator.progress(view)
            except PrefetchEnded:
                return True
            return False

        await until(has_ended)
        assert not view.complete


@virtual_time
async def test_an_image_that_is_dropped_is_not_fetched_any_more(folder: Path) -> None:
    source = ScriptedSource(rate=5e6)
    async with hydrating(folder, source, on_open=False) as now:
        view = now.flow.stored(1, 64 * SPAN)
        now.hydrator.ask(view)
        await until(lambda: view.cached > 4 * SPAN)
        await now.hydrator.let_go(image_id(1))
        await now.flow.store.evict([(view.number, SpanNo(span)) for span in range(view.spans)])
        await now.flow.settled()
        asked = len(source.requests)
        with pytest.raises(PrefetchEnded, match="evicted"):
            now.hydrator.progress(view)
        await trio.sleep(100)
        assert view.cached == 0, "nothing that was on its way came after"
        assert len(source.requests) == asked
        now.hydrator.ask(view)
        now.hydrator.progress(view)
        await until(lambda: view.complete)
