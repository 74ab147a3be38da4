"""Flights: what is asked of the origin, how often, how much at once, and what becomes of it when things fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from cachefs.errors import (
    ImageForbidden,
    ImageGone,
    OriginBusy,
    OriginError,
    OriginLied,
    OriginUnauthorized,
    OriginUnavailable,
    ReadDeadline,
)
from cachefs.fetcher import BACKOFF_FIRST_S, BACKOFF_MAX_S, RETRY_AFTER_JITTER
from cachefs.flights import Flight, Priority
from cachefs.plan.extents import BLOCK, Extent
from cachefs.sources import Sink, Timing
from cachefs.store.format import OriginMode
from cachefs.store.room import Limits
from cachefs.store.view import StoredView
from tests.flow import (
    KIB,
    MIB,
    Act,
    Cut,
    Flow,
    Longer,
    Refuse,
    Request,
    ScriptedSource,
    Slow,
    Stall,
    content,
    flow,
    quiet,
    until,
    virtual_time,
)
from tests.stores import SPAN, running, view_of

SIZE = 8 * MIB
FULL = Limits(0, 0)


def always(act: Act) -> Callable[[Request], Act]:
    return lambda request: act


async def over(flight: Flight) -> None:
    await until(lambda: flight.over)


def fetch(way: Flow, view: StoredView, start: int, end: int, priority: Priority = Priority.DEMAND) -> Flight:
    return way.fetcher.start(view, Extent(start, end), priority)


# ── Retries ───────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_tries_without_progress_are_bounded_and_spaced(tmp_path: Path) -> None:
    source = ScriptedSource(act=always(Refuse(OriginUnavailable)))
    async with flow(tmp_path, source, retries=7) as way:
        await over(fetch(way, way.stored(1, SIZE), 0, BLOCK))  # Nobody waits for it.
        assert way.fetcher.counts.requests == 8
        assert way.fetcher.counts.retries == 7
        assert way.fetcher.counts.failures == 1
        pauses = [after.began_s - before.ended_s for before, after in pairwise(source.requests)]
        for n, pause in enumerate(pauses):
            longest = min(BACKOFF_FIRST_S * 2**n, BACKOFF_MAX_S)
            assert longest / 2 <= pause <= longest + 1e-9


@virtual_time
async def test_an_origin_that_comes_back_before_the_deadline_serves_who_waits(tmp_path: Path) -> None:
    source = ScriptedSource(act=lambda request: Refuse(OriginUnavailable) if request.began_s < 40 else None)
    async with flow(tmp_path, source, retries=1, read_deadline_s=60.0) as way:
        await way.read(1, SIZE, 0, 4096)
        assert way.fetcher.counts.failures == 0
        assert way.fetcher.counts.requests < 40  # The pauses grow.


@virtual_time
async def test_an_origin_that_stays_away_costs_who_waits_the_deadline_and_no_more(tmp_path: Path) -> None:
    source = ScriptedSource(act=always(Refuse(OriginUnavailable)))
    async with flow(tmp_path, source, retries=1, read_deadline_s=60.0) as way:
        began_s = trio.current_time()
        with pytest.raises(ReadDeadline):
            await way.read(1, SIZE, 0, 4096)
        assert trio.current_time() - began_s == pytest.approx(60, abs=0.5)
        asked = len(source.requests)
        await trio.sleep(600)
        assert len(source.requests) <= asked + 1  # Nobody waits any more.


@virtual_time
async def test_pauses_are_jittered(tmp_path: Path) -> None:
    source = ScriptedSource(act=lambda request: Refuse(OriginUnavailable) if request.number < 8 else None)
    async with flow(tmp_path, source) as way, trio.open_nursery() as readers:
        for image in range(1, 9):
            readers.start_soon(way.read, image, SIZE, 0, 4096)
        await trio.sleep(BACKOFF_FIRST_S * 2)
        pauses = {round(r.began_s, 6) for r in source.requests[8:]}
        assert len(pauses) == 8
        assert max(pauses) - min(pauses) > BACKOFF_FIRST_S / 20


@virtual_time
async def test_progress_begins_the_count_of_tries_anew(tmp_path: Path) -> None:
    source = ScriptedSource(act=lambda request: Cut(300 * KIB) if request.extent.length > 300 * KIB else None)
    async with flow(tmp_path, source, retries=1) as way:
        flight = fetch(way, way.stored(1, SIZE), 0, 4 * MIB)
        await over(flight)
        assert flight.error is None
        assert len(source.requests) > 10
        assert all(b.began_s - a.ended_s < BACKOFF_FIRST_S + 1e-6 for a, b in pairwise(source.requests))
        await way.read(1, SIZE, 0, 4 * MIB)


@virtual_time
async def test_less_than_a_block_is_no_progress(tmp_path: Path) -> None:
    source = ScriptedSource(act=always(Cut(BLOCK - 1)))
    async with flow(tmp_path, source, retries=3) as way:
        with pytest.raises(OriginUnavailable):
            await way.read(1, SIZE, 0, 4096)
        assert source.extents == [Extent(0, MIB)] * 4


@virtual_time
async def test_what_came_before_a_cut_is_kept_and_only_the_rest_is_asked_for(tmp_path: Path) -> None:
    source = ScriptedSource(piece=10_000, script={0: Cut(333_333), 1: Cut(200_000)})
    async with flow(tmp_path, source) as way:
        view = way.stored(1, SIZE)
        flight = fetch(way, view, 0, MIB)
        await over(flight)
        await way.settled()
        first, second = 333_333 // BLOCK * BLOCK, (333_333 // BLOCK + 200_000 // BLOCK) * BLOCK
        assert source.extents == [Extent(0, MIB), Extent(first, MIB), Extent(second, MIB)]
        assert not view.absent(Extent(0, MIB))
        await way.read(1, SIZE, 0, MIB)
        assert len(source.requests) == 3


@virtual_time
async def test_what_came_of_a_flight_that_failed_is_kept(tmp_path: Path) -> None:
    source = ScriptedSource(script={0: Cut(5 * BLOCK)}, act=always(Refuse(OriginUnavailable)))
    async with flow(tmp_path, source, retries=1) as way:
        view = way.stored(1, SIZE)
        await over(fetch(way, view, 0, MIB))
        await way.settled()
        await view.load(Extent(0, MIB))
        assert view.absent(Extent(0, MIB)) == [Extent(5 * BLOCK, MIB)]
        await way.read(1, SIZE, 0, 5 * BLOCK)


@virtual_time
async def test_retry_after_is_honoured(tmp_path: Path) -> None:
    source = ScriptedSource(script={0: Refuse(lambda image: OriginBusy(image, "503", 7.5))})
    async with flow(tmp_path, source) as way:
        await way.read(1, SIZE, 0, 4096)
        assert source.requests[1].began_s - source.requests[0].ended_s >= 7.5


@virtual_time
async def test_an_origin_that_asks_all_nodes_for_the_same_pause_does_not_get_them_back_at_once(
    tmp_path: Path,
) -> None:
    busy = Refuse(lambda image: OriginBusy(image, "503", 20.0))
    source = ScriptedSource(act=lambda request: busy if request.number < 8 else None)
    async with flow(tmp_path, source) as way, trio.open_nursery() as readers:
        for image in range(1, 9):
            readers.start_soon(way.read, image, SIZE, 0, 4096)
    asked_s = max(request.ended_s for request in source.requests[:8])
    pauses = [request.began_s - asked_s for request in source.requests[8:]]
    assert len(pauses) == 8
    assert all(20.0 - 0.1 <= pause <= 20.0 * (1 + RETRY_AFTER_JITTER) for pause in pauses)
    assert max(pauses) - min(pauses) > 20.0 * RETRY_AFTER_JITTER / 4


@virtual_time
async def test_refused_credentials_are_tried_once_more_a_second_later(tmp_path: Path) -> None:
    source = ScriptedSource(act=always(Refuse(OriginUnauthorized)))
    async with flow(tmp_path, source, retries=5) as way:
        with pytest.raises(OriginUnauthorized):
            await way.read(1, SIZE, 0, 4096)
        first, second = source.requests
        assert second.began_s - first.ended_s >= 1.0


@pytest.mark.parametrize("error", [ImageGone, ImageForbidden])
@virtual_time
async def test_what_no_retry_can_help_is_not_tried_again(tmp_path: Path, error: type[OriginError]) -> None:
    source = ScriptedSource(act=always(Refuse(error)))
    async with flow(tmp_path, source) as way:
        with pytest.raises(error):
            await way.read(1, SIZE, 0, 4096)
        assert len(source.requests) == 1


@virtual_time
async def test_a_body_that_ends_early_without_a_word_is_a_lie_and_is_asked_for_again(tmp_path: Path) -> None:
    source = ScriptedSource(script={0: Cut(2 * BLOCK, None)})
    async with flow(tmp_path, source) as way:
        await way.read(1, SIZE, 0, MIB)
        assert source.extents == [Extent(0, MIB), Extent(2 * BLOCK, MIB)]


@virtual_time
async def test_a_body_that_goes_on_is_a_lie_and_nothing_of_its_end_is_believed(tmp_path: Path) -> None:
    source = ScriptedSource(act=always(Longer(4096)))
    async with flow(tmp_path, source, retries=0) as way:
        view = way.stored(1, SIZE)
        flight = fetch(way, view, 0, MIB)
        await over(flight)
        assert flight.at == MIB
        assert isinstance(flight.error, OriginLied)
        await way.settled()


@virtual_time
async def test_a_bug_in_a_fetch_is_an_error_of_its_readers_and_of_nobody_else(tmp_path: Path) -> None:
    class Buggy(ScriptedSource):
        async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
            if not self.requests:
                self.requests.append(Request(0, 9, extent, False, 0.0, ended_s=0.0))
                raise KeyError("a bug")
            return await super().fetch(image, size, extent, sink)

    async with flow(tmp_path, Buggy()) as way:
        with pytest.raises(OriginUnavailable):
            await way.read(1, SIZE, 0, 4096)
        await way.read(2, SIZE, 0, 4096)


# ── Slots ─────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_requests_at_once_are_bounded(tmp_path: Path) -> None:
    async with flow(tmp_path, connections=3) as way, trio.open_nursery() as readers:
        for image in range(1, 31):
            readers.start_soon(way.read, image, SIZE, 0, 4096)
    assert way.source.at_once_max == 3
    assert len(way.source.requests) == 30


@virtual_time
async def test_demand_does_not_queue_behind_reading_ahead(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(act=lambda request: Stall(release) if request.extent.start else None)
    async with flow(tmp_path, source, connections=4) as way:
        view = way.stored(1, 64 * MIB)
        ahead = [fetch(way, view, n * 8 * MIB, n * 8 * MIB + BLOCK, Priority.READAHEAD) for n in range(1, 7)]
        await quiet()
        assert sum(flight.started for flight in ahead) == 2  # Two places are for demand.
        with trio.fail_after(1.0):
            await way.read(2, SIZE, 0, 4096)
        release.set()
        for flight in ahead:
            await over(flight)


@virtual_time
async def test_demand_overtakes_reading_ahead_that_waits(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(script={n: Stall(release) for n in range(2)})
    async with flow(tmp_path, source, connections=2) as way:
        view = way.stored(1, 64 * MIB)
        fetch(way, view, 0, BLOCK, Priority.DEMAND)
        fetch(way, view, 8 * MIB, 8 * MIB + BLOCK, Priority.DEMAND)
        await quiet()
        ahead = fetch(way, view, 16 * MIB, 16 * MIB + BLOCK, Priority.READAHEAD)
        demand = fetch(way, view, 24 * MIB, 24 * MIB + BLOCK, Priority.DEMAND)
        await quiet()
        release.set()
        await over(demand)
        await over(ahead)
        assert [r.extent.start // MIB for r in source.requests[2:]] == [24, 16]


@virtual_time
async def test_reading_ahead_that_somebody_waits_for_is_demand(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(act=lambda request: Stall(release) if request.extent.start == 8 * MIB else None)
    async with flow(tmp_path, source, connections=3) as way:
        view = way.stored(1, 64 * MIB)
        fetch(way, view, 8 * MIB, 9 * MIB, Priority.READAHEAD)
        await quiet()
        queued = fetch(way, view, 16 * MIB, 17 * MIB, Priority.READAHEAD)
        await quiet()
        assert not queued.started
        with trio.fail_after(1.0):
            await way.read(1, 64 * MIB, 16 * MIB, 4096)
        release.set()
        await over(queued)


@virtual_time
async def test_demand_that_joins_a_queued_flight_is_not_read_ahead(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(act=lambda request: Stall(release) if request.extent.start == 8 * MIB else None)
    async with flow(tmp_path, source, connections=3) as way:
        view = way.stored(1, 64 * MIB)
        fetch(way, view, 8 * MIB, 9 * MIB, Priority.READAHEAD)
        await quiet()
        fetch(way, view, 16 * MIB, 17 * MIB, Priority.READAHEAD)
        await quiet()
        with trio.fail_after(1.0):  # The miss begins where the queued flight ends.
            await way.read(1, 64 * MIB, 17 * MIB, 4096)
        release.set()
        await way.settled()


@virtual_time
async def test_an_image_that_cannot_be_had_takes_no_place_between_its_tries(tmp_path: Path) -> None:
    source = ScriptedSource(act=lambda request: Refuse(OriginUnavailable) if request.image == 1 else None)
    async with flow(tmp_path, source, connections=4, read_deadline_s=60.0) as way, trio.open_nursery() as readers:
        for n in range(12):
            readers.start_soon(way.read, 1, 64 * MIB, n * 4 * MIB, 4096)
        await trio.sleep(30.0)
        began_s = trio.current_time()
        await way.read(2, SIZE, 0, 4096)
        assert trio.current_time() - began_s < 0.2
        readers.cancel_scope.cancel()


@virtual_time
async def test_an_origin_that_is_away_for_hours_is_tried_on_while_somebody_waits(tmp_path: Path) -> None:
    back_s = 3 * 3600.0
    source = ScriptedSource(act=lambda request: Refuse(OriginUnavailable) if request.began_s < back_s else None)
    async with flow(tmp_path, source, read_deadline_s=2 * back_s) as way:
        await way.read(1, SIZE, 0, 4096)
        assert trio.current_time() == pytest.approx(back_s, abs=BACKOFF_MAX_S + 1)


@virtual_time
async def test_misses_side_by_side_that_wait_become_one_request(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(script={0: Stall(release)})
    async with flow(tmp_path, source, connections=1) as way, trio.open_nursery() as readers:
        readers.start_soon(way.read, 2, SIZE, 0, 4096)
        await quiet()
        for n in range(3):
            readers.start_soon(way.read, 1, 64 * MIB, (16 + n) * MIB, 4096)
            await quiet()
        release.set()
    assert source.extents[1:] == [Extent(16 * MIB, 19 * MIB)]


@virtual_time
async def test_misses_side_by_side_do_not_become_one_endless_request(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(script={0: Stall(release)})
    async with flow(tmp_path, source, connections=1) as way, trio.open_nursery() as readers:
        readers.start_soon(way.read, 2, SIZE, 0, 4096)
        await quiet()
        for n in range(32):
            readers.start_soon(way.read, 1, 64 * MIB, (16 + n) * MIB, 4096)
            await quiet()
        release.set()
    assert max(e.length for e in source.extents) <= 4 * MIB
    assert sum(e.length for e in source.extents[1:]) == 32 * MIB


@virtual_time
async def test_what_is_asked_for_again_is_kept_though_it_was_abandoned_before(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(script={0: Stall(release)})
    async with flow(tmp_path, source, connections=1) as way:
        fetch(way, way.stored(2, SIZE), 0, BLOCK, Priority.DEMAND)
        await quiet()
        view = way.stored(1, 64 * MIB)
        fetch(way, view, 16 * MIB, 17 * MIB, Priority.HYDRATION)
        way.fetcher.abandon(view)
        again = fetch(way, view, 16 * MIB, 17 * MIB, Priority.HYDRATION)
        release.set()
        await over(again)
        await way.settled()
        assert source.extents[1:] == [Extent(16 * MIB, 17 * MIB)]
        assert view.cached == MIB


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_memory_is_bounded_under_many_readers_with_a_slow_store(tmp_path: Path) -> None:
    bound = 4 * SPAN
    async with flow(tmp_path, ScriptedSource(rate=500e6), connections=16, memory_max=bound) as way:
        way.store.late_s = 0.05  # 20 MB/s of disk for 500 MB/s of link.

        async def boot(image: int) -> None:
            read = way.open(image, 3 * MIB + 777)
            for offset in range(0, 3 * MIB + 777, 256 * KIB):
                await read(offset, 256 * KIB)

        async with trio.open_nursery() as readers:
            for image in range(1, 13):
                readers.start_soon(boot, image)
        await way.settled()
        assert bound // 2 < way.watch.memory_max <= bound
        assert all(way.stored(image, 3 * MIB + 777).complete for image in range(1, 13))


@virtual_time
async def test_memory_is_counted_as_it_is_taken(tmp_path: Path) -> None:
    """Slabs of little more than half a span take a whole one."""
    async with flow(tmp_path, connections=16, memory_max=4 * SPAN) as way:
        way.store.late_s = 0.1
        flights = [fetch(way, way.stored(n, SIZE), 0, SPAN // 2 + BLOCK * (n % 2)) for n in range(1, 17)]
        for flight in flights:
            await over(flight)
        await way.settled()


@virtual_time
async def test_no_deadlock_when_every_flight_holds_a_part_and_wants_more(tmp_path: Path) -> None:
    async with flow(tmp_path, connections=16, memory_max=SPAN) as way:
        flights = [fetch(way, way.stored(image, 4 * MIB), 0, 4 * MIB) for image in range(1, 9)]
        for flight in flights:
            await over(flight)
            assert flight.error is None
        await way.settled()


@virtual_time
async def test_no_deadlock_of_streams_and_ranges_in_little_memory(tmp_path: Path) -> None:
    source = ScriptedSource(streams_only={1, 2, 3}, script={1: Cut(700_000), 5: Cut(1_500_000)})
    async with flow(tmp_path, source, connections=4, memory_max=SPAN) as way:
        way.store.late_s = 0.01
        async with trio.open_nursery() as readers:
            for n in range(24):
                readers.start_soon(way.read, n % 6 + 1, 4 * MIB + 5, n * 150_000, 200_000)
        await way.settled()


@virtual_time
async def test_a_bound_smaller_than_a_span_is_a_span(tmp_path: Path) -> None:
    async with flow(tmp_path, memory_max=1) as way:
        await way.read(1, SIZE, 0, 2 * MIB)


@virtual_time
async def test_waiting_for_memory_is_not_taken_for_a_slow_or_fast_link(tmp_path: Path) -> None:
    source = ScriptedSource(cost_s=0.02, rate=50e6)
    async with flow(tmp_path, source, connections=1, memory_max=SPAN) as way:
        way.store.late_s = 1.0
        for image in range(1, 7):
            await over(fetch(way, way.stored(image, SIZE), 0, 2 * MIB))
        assert way.fetcher.link.rate == pytest.approx(50e6, rel=0.1)
        assert way.fetcher.link.cost_s == pytest.approx(0.02 + 64 * KIB / 50e6, rel=0.1)
        await way.settled()


@virtual_time
async def test_demand_gets_memory_before_reading_ahead_that_asked_first(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(script={0: Stall(release, BLOCK)})
    async with flow(tmp_path, source, connections=8, memory_max=SPAN) as way:
        first = fetch(way, way.stored(1, SIZE), 0, SPAN)
        await trio.sleep(0.1)  # It has all memory now.
        asked = []
        for image, priority in (
            (2, Priority.READAHEAD), (3, Priority.READAHEAD), (4, Priority.DEMAND), (5, Priority.DEMAND)
        ):  # fmt: skip
            asked.append(fetch(way, way.stored(image, SIZE), 0, SPAN, priority))
            await trio.sleep(0.1)
        release.set()
        for flight in (first, *asked):
            await over(flight)
        served = sorted(source.requests[1:], key=lambda request: request.first_s)
        assert [request.image for request in served] == [4, 5, 2, 3]
        await way.settled()


@virtual_time
async def test_reading_ahead_that_waits_for_memory_is_demand_when_somebody_waits_for_it(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(script={0: Stall(release, BLOCK)})
    async with flow(tmp_path, source, connections=8, memory_max=SPAN) as way, trio.open_nursery() as readers:
        fetch(way, way.stored(1, SIZE), 0, SPAN)
        await trio.sleep(0.1)
        for image in (2, 3):
            fetch(way, way.stored(image, SIZE), 0, SPAN, Priority.READAHEAD)
            await trio.sleep(0.1)
        readers.start_soon(way.read, 3, SIZE, 0, 4096)
        await trio.sleep(0.1)
        release.set()
        await way.settled()
        served = sorted(source.requests[1:], key=lambda request: request.first_s)
        assert [request.image for request in served] == [3, 2]


# ── The link ──────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_requests_at_once_share_the_link_and_it_is_measured_whole(tmp_path: Path) -> None:
    source = ScriptedSource(rate=80e6)
    async with flow(tmp_path, source) as way:
        flights = [fetch(way, way.stored(image, SIZE), 0, 4 * MIB) for image in range(1, 5)]
        for flight in flights:
            await over(flight)
        assert way.fetcher.link.rate == pytest.approx(80e6, rel=0.4)
        await way.settled()


# ── Streams ───────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_refused_ranges_become_one_stream_that_serves_everybody(tmp_path: Path) -> None:
    source = ScriptedSource(streams_only={1})
    async with flow(tmp_path, source) as way:
        async with trio.open_nursery() as readers:
            for offset in (7 * MIB, 0, 3 * MIB, SIZE - 4096, 3 * MIB + BLOCK):
                readers.start_soon(way.read, 1, SIZE, offset, 4096)
        await way.settled()
        assert [r.extent for r in source.requests if r.stream] == [Extent(0, SIZE)]
        assert way.stored(1, SIZE).complete
        await way.read(1, SIZE, 0, SIZE)
        assert len([r for r in source.requests if r.stream]) == 1


@virtual_time
async def test_a_reader_of_a_stream_has_its_bytes_when_they_pass(tmp_path: Path) -> None:
    source = ScriptedSource(streams_only={1}, rate=1e6)
    async with flow(tmp_path, source) as way:
        await way.read(1, SIZE, MIB, 4096)
        assert trio.current_time() < 2 * 0.02 + (MIB + BLOCK) / 1e6 + 0.01


@virtual_time
async def test_that_an_image_comes_as_a_stream_is_remembered_over_restarts(tmp_path: Path) -> None:
    async with flow(tmp_path, ScriptedSource(streams_only={1})) as way:
        await way.read(1, SIZE, 0, 4096)
        way.stop()
        await trio.lowlevel.cancel_shielded_checkpoint()
    async with running(tmp_path) as store:
        assert view_of(store, 1, SIZE).record.origin is OriginMode.STREAM
    source = ScriptedSource(streams_only={1})
    async with flow(tmp_path, source) as way:
        await way.read(1, SIZE, SIZE - 4096, 4096)
        assert [r.stream for r in source.requests] == [True]


@virtual_time
async def test_that_an_image_gives_ranges_is_remembered(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        await way.read(1, SIZE, 0, 4096)
        await way.settled()
        assert way.stored(1, SIZE).record.origin is OriginMode.RANGES


@virtual_time
async def test_readers_whose_flights_wait_for_a_place_are_served_by_the_stream(tmp_path: Path) -> None:
    source = ScriptedSource(streams_only={1}, rate=1e6)
    async with flow(tmp_path, source, connections=1) as way:
        came: dict[int, float] = {}

        async def reader(offset: int) -> None:
            await way.read(1, SIZE, offset, 4096)
            came[offset] = trio.current_time()

        async with trio.open_nursery() as readers:
            for offset in (0, 2 * MIB, 4 * MIB):
                readers.start_soon(reader, offset)
        assert [r.stream for r in source.requests] == [False, True]
        for offset, at_s in came.items():
            assert at_s == pytest.approx((offset + BLOCK) / 1e6, abs=0.2)


@virtual_time
async def test_a_stream_that_is_cut_begins_again_and_serves_everybody(tmp_path: Path) -> None:
    source = ScriptedSource(streams_only={1}, script={1: Cut(3 * MIB + 100), 2: Cut(5 * MIB)})
    async with flow(tmp_path, source, connections=1) as way:
        async with trio.open_nursery() as readers:
            for offset in range(0, SIZE, MIB):
                readers.start_soon(way.read, 1, SIZE, offset, 200_000)
        assert [r.stream for r in source.requests] == [False, True, True, True]
        await way.settled()
        assert way.stored(1, SIZE).complete


@virtual_time
async def test_a_stream_that_never_gets_further_fails_everybody_in_the_end(tmp_path: Path) -> None:
    source = ScriptedSource(streams_only={1}, act=lambda r: Cut(3 * MIB) if r.stream else None)
    async with flow(tmp_path, source, retries=2) as way:
        await way.read(1, SIZE, 0, 4096)
        with pytest.raises(OriginUnavailable):
            await way.read(1, SIZE, 5 * MIB, 4096)
        assert sum(r.stream for r in source.requests) == 3


@virtual_time
async def test_who_comes_late_to_a_stream_that_began_again_is_served_by_it(tmp_path: Path) -> None:
    """The store keeps nothing, so what passed is gone; the second try brings it once more."""
    source = ScriptedSource(streams_only={1}, script={1: Cut(6 * MIB)}, rate=4e6)
    async with flow(tmp_path, source, limits=lambda: FULL) as way, trio.open_nursery() as readers:
        readers.start_soon(way.read, 1, SIZE, 7 * MIB, 4096)
        await until(lambda: len(source.requests) == 3)
        await way.read(1, SIZE, 4 * MIB, 4096)
        assert sum(r.stream for r in source.requests) == 2


@virtual_time
async def test_a_stream_that_passed_what_is_not_kept_is_asked_for_again(tmp_path: Path) -> None:
    source = ScriptedSource(streams_only={1}, rate=4e6)
    async with flow(tmp_path, source, limits=lambda: FULL, memory_max=SPAN, doubling_allowed=True) as way:
        async with trio.open_nursery() as readers:
            readers.start_soon(way.read, 1, SIZE, 7 * MIB, 4096)
            await trio.sleep(1.0)
            await way.read(1, SIZE, 0, 4096)
        assert sum(r.stream for r in source.requests) == 2
        await way.settled()


@virtual_time
async def test_refused_ranges_while_others_are_under_way_leave_one_stream(tmp_path: Path) -> None:
    """The image's first answers were ranges; then it moved to a store that gives none."""
    release = trio.Event()
    source = ScriptedSource(script={1: Stall(release, 2 * BLOCK)})
    async with flow(tmp_path, source) as way, trio.open_nursery() as readers:
        await way.read(1, SIZE, 0, 4096)
        readers.start_soon(way.read, 1, SIZE, 2 * MIB, 500_000)
        await quiet()
        source.streams_only.add(1)
        for offset in (4 * MIB, 6 * MIB):
            readers.start_soon(way.read, 1, SIZE, offset, 4096)
        await trio.sleep(0.1)
        release.set()
    assert sum(r.stream for r in source.requests) == 1


# ── Ending ────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_shutdown_with_flights_under_way_is_prompt_and_keeps_what_came(tmp_path: Path) -> None:
    source = ScriptedSource(act=lambda r: Stall(trio.Event(), 3 * BLOCK) if r.image < 3 else Slow(1e6))
    async with flow(tmp_path, source, connections=4) as way, trio.open_nursery() as readers:
        for image in range(1, 9):
            readers.start_soon(way.read, image, SIZE, 0, MIB)
            await quiet()
        await trio.sleep(0.3)
        stopped_s = trio.current_time()
        readers.cancel_scope.cancel()
        way.stop()
    assert trio.current_time() - stopped_s < 0.1
    async with running(tmp_path) as store:
        view = view_of(store, 1, SIZE)
        assert await view.read(0, 3 * BLOCK) == content(1, 0, 3 * BLOCK)
        await view.load(Extent(0, MIB))
        assert view.absent(Extent(0, MIB)) == [Extent(3 * BLOCK, MIB)]


@dataclass
class LeavesThreads(ScriptedSource):
    """Like a source of threads: a cancelled request leaves its sink in somebody's hands."""

    sinks: list[Sink] = field(default_factory=list)

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        self.sinks.append(sink)
        return await super().fetch(image, size, extent, sink)


@virtual_time
async def test_a_thread_that_a_flight_left_behind_can_do_no_harm(tmp_path: Path) -> None:
    source = LeavesThreads(act=lambda r: Stall(trio.Event(), SPAN if r.extent.length > SPAN else BLOCK))
    async with flow(tmp_path, source) as way:
        fetch(way, way.stored(1, SIZE), 0, 2 * MIB)
        fetch(way, way.stored(2, SIZE), 0, MIB)
        await trio.sleep(1.0)
        way.stop()
        with trio.CancelScope(shield=True):
            await quiet()
            for sink in source.sinks:
                with pytest.raises(OriginUnavailable):
                    await sink.room()
                with pytest.raises(AssertionError):
                    sink.arrived(1)
            await quiet()
            assert way.fetcher.memory_used == 0
