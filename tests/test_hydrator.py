"""Hydration in virtual time: what is fetched, in what order, and who goes first. Rule: bytes and requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from cachefs.errors import OriginUnavailable
from cachefs.hydrator import AGAIN_S, LOOK_S, Hydrator
from cachefs.leases import Leases
from cachefs.plan.windows import Pattern
from cachefs.store.content import Limits, StoredView
from tests.flow import Flow, Refuse, ScriptedSource, flow, until, virtual_time
from tests.stores import SPAN

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
) -> AsyncIterator[Hydrated]:
    bounds = {} if limits is None else {"limits": lambda: limits}
    async with flow(folder, source, **bounds) as made:  # type: ignore[arg-type]
        leases = Leases(made.store, lambda: 1 << 60)
        whole: list[StoredView] = []
        hydrator = Hydrator(
            made.store, made.fetcher, made.blocks, leases,
            on_open=on_open, bandwidth=bandwidth, concurrency=concurrency, settled=whole.append,
        )  # fmt: skip
        made.fetcher.give_way(lambda: bool(made.blocks.waiting))
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
