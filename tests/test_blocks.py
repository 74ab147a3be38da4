"""Readers: each gets its own bytes, as soon as they are there, whatever everybody else reads, waits for or
breaks. Every read in here is compared with what the image has there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import ImageGone, OriginError, OriginLied, OriginUnavailable, ReadDeadline
from cachefs.plan.extents import BLOCK, Extent, ceil
from cachefs.plan.windows import EQUAL_COSTS, RANDOM_FIRST, RANDOM_MAX, SEQUENTIAL_MAX
from cachefs.store.format import SegmentNo
from cachefs.store.health import State
from cachefs.store.room import Limits
from tests.flow import (
    KIB,
    MIB,
    Cut,
    Flow,
    Reader,
    Refuse,
    ScriptedSource,
    Stall,
    flow,
    quiet,
    virtual_time,
)
from tests.stores import SPAN, UNLIMITED, Edge, Edges, Fate, examples, segment_file

SIZE = 8 * MIB
FULL = Limits(0, 0)

# ── One flight ────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_one_request_for_everybody_who_wants_a_block(tmp_path: Path) -> None:
    async with flow(tmp_path) as way, trio.open_nursery() as readers:
        await way.stored(1, SIZE).load(Extent(0, SIZE))
        for n in range(50):
            readers.start_soon(way.read, 1, SIZE, n * 1000, 4096)
    assert source_extents(way) == [Extent(0, MIB)]


def source_extents(way: Flow) -> list[Extent]:
    return way.source.extents


@virtual_time
async def test_who_comes_while_it_flies_joins(tmp_path: Path) -> None:
    async with flow(tmp_path, ScriptedSource(rate=1e6)) as way, trio.open_nursery() as readers:
        for offset in (0, 900 * KIB, 500 * KIB, 100 * KIB, 0):
            readers.start_soon(way.read, 1, SIZE, offset, 4096)
            await trio.sleep(0.11)
    assert source_extents(way) == [Extent(0, MIB)]


@virtual_time
async def test_a_reader_has_its_bytes_before_the_flight_ends(tmp_path: Path) -> None:
    source = ScriptedSource(cost_s=0.02, rate=1e6)
    async with flow(tmp_path, source) as way:
        await way.read(1, SIZE, 100, 4096)
        assert trio.current_time() == pytest.approx(0.02 + BLOCK / 1e6, abs=1e-3)
        assert source.requests[0].running
        await way.read(1, SIZE, 3 * BLOCK, BLOCK)
        assert trio.current_time() == pytest.approx(0.02 + 4 * BLOCK / 1e6, abs=1e-3)
        assert source.requests[0].running


@virtual_time
async def test_a_reader_who_gives_up_stops_nobody(tmp_path: Path) -> None:
    async with flow(tmp_path, ScriptedSource(rate=1e6)) as way:
        async with trio.open_nursery() as readers:
            first = trio.CancelScope()

            async def impatient() -> None:
                with first:
                    await way.read(1, SIZE, 0, BLOCK)

            readers.start_soon(impatient)
            await quiet()
            readers.start_soon(way.read, 1, SIZE, 0, 4 * BLOCK)
            await quiet()
            first.cancel()
        assert first.cancelled_caught
        await way.settled()
        assert source_extents(way) == [Extent(0, MIB)]
        assert way.blocks.waiting == 0


@virtual_time
async def test_a_failing_flight_fails_each_waiter_with_an_error_of_its_own(tmp_path: Path) -> None:
    source = ScriptedSource(act=lambda r: Refuse(ImageGone))
    async with flow(tmp_path, source) as way:
        await way.stored(1, SIZE).load(Extent(0, SIZE))
        errors: list[OriginError] = []

        async def reader() -> None:
            with pytest.raises(ImageGone) as caught:
                await way.read(1, SIZE, 0, 4096)
            errors.append(caught.value)

        async with trio.open_nursery() as readers:
            for _ in range(20):
                readers.start_soon(reader)
        assert len({id(error) for error in errors}) == 20
        assert len(source.requests) == 1


@virtual_time
async def test_a_failure_is_not_remembered(tmp_path: Path) -> None:
    source = ScriptedSource(script={0: Refuse(ImageGone)})
    async with flow(tmp_path, source) as way:
        with pytest.raises(ImageGone):
            await way.read(1, SIZE, 0, 4096)
        await way.read(1, SIZE, 0, 4096)


@virtual_time
async def test_readers_of_what_came_before_a_failure_have_it(tmp_path: Path) -> None:
    source = ScriptedSource(script={0: Cut(4 * BLOCK)}, act=lambda r: Refuse(OriginLied))
    async with flow(tmp_path, source, retries=1) as way:
        outcome: dict[int, bool] = {}

        async def reader(block: int) -> None:
            try:
                await way.read(1, SIZE, block * BLOCK, BLOCK)
                outcome[block] = True
            except OriginLied:
                outcome[block] = False

        async with trio.open_nursery() as readers:
            for block in range(8):
                readers.start_soon(reader, block)
                await quiet()
        assert {block for block, had in outcome.items() if had} == {0, 1, 2, 3}


@virtual_time
async def test_two_misses_whose_windows_meet_are_not_fetched_twice(tmp_path: Path) -> None:
    """The second one's map is read while the first one's flight begins, and the other way round."""
    for seed in range(20):
        async with flow(tmp_path / str(seed), ScriptedSource(piece=10_000)) as way:
            rng = random.Random(seed)
            async with trio.open_nursery() as readers:
                for _ in range(12):
                    readers.start_soon(way.read, 1, SIZE, rng.randrange(SIZE - MIB), rng.randrange(1, MIB))
            await way.settled()
            asked = [way.source.times_asked(1, block) for block in range(SIZE // BLOCK)]
            assert max(asked) == 1


# ── Deadlines ─────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_reader_waits_for_its_deadline_and_the_flight_goes_on(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(script={0: Stall(release)})
    async with flow(tmp_path, source, read_deadline_s=20.0) as way:
        with pytest.raises(ReadDeadline):
            await way.read(1, SIZE, 2 * BLOCK, 4096)
        assert trio.current_time() == pytest.approx(20.0, abs=0.01)
        await way.read(1, SIZE, 0, 2 * BLOCK)  # It asked from its own block on.
        release.set()
        await way.read(1, SIZE, 2 * BLOCK, 4096)
        assert len(source.requests) == 2
        assert way.blocks.waiting == 0


@virtual_time
async def test_an_origin_that_is_away_for_less_than_the_deadline_is_not_noticed(tmp_path: Path) -> None:
    source = ScriptedSource(act=lambda r: Refuse(OriginUnavailable) if r.began_s < 15.0 else None)
    async with flow(tmp_path, source, read_deadline_s=30.0, retries=10) as way:
        await way.read(1, SIZE, 0, 4096)


# ── Hits ──────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_500_blocked_misses_delay_no_hit(tmp_path: Path) -> None:
    never = trio.Event()
    source = ScriptedSource(act=lambda r: Stall(never) if r.image == 2 else None)
    async with flow(tmp_path, source) as way, trio.open_nursery() as readers:
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        for n in range(500):
            readers.start_soon(way.read, 2, 600 * MIB, n * MIB + 512 * KIB, 4096)
        await quiet()
        assert way.blocks.waiting == 500
        began_s = trio.current_time()
        hit = way.open(1, SIZE)
        for offset in range(0, SIZE, BLOCK):
            await hit(offset, BLOCK)
            assert len(await way.stored(1, SIZE).read(offset, 4096)) == 4096  # As when the disk is needed.
        assert trio.current_time() == began_s
        readers.cancel_scope.cancel()


@virtual_time
async def test_what_was_fetched_is_not_fetched_again(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        asked = len(way.source.requests)
        for offset in range(0, SIZE, 300_000):
            await way.read(1, SIZE, offset, 300_000)
        assert len(way.source.requests) == asked


@virtual_time
async def test_what_was_fetched_is_there_after_a_restart(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        await way.read(1, SIZE, MIB - 4096, 2 * MIB)
        await way.settled()
    async with flow(tmp_path) as way:  # No map is in memory yet.
        await way.read(1, SIZE, MIB - 4096, 2 * MIB)
        assert not way.source.requests


@virtual_time
async def test_any_number_of_readers_find_a_map_that_is_not_in_memory(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
    async with flow(tmp_path) as way, trio.open_nursery() as readers:
        for n in range(500):
            readers.start_soon(way.read, 1, SIZE, n * 16_000, 100_000)
    assert not way.source.requests


# ── Sizes ─────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_image_of_nothing(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        assert await way.read(1, 0, 0, 4096) == b""
        assert await way.read(1, 0, 5, 4096) == b""
        assert way.stored(1, 0).complete
        assert not way.source.requests


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "size",
    [1, 4095, 4096, 4097, BLOCK - 1, BLOCK + 1, SPAN - 1, SPAN, SPAN + 1, SPAN + BLOCK + 4095, 3 * SPAN - 4097],
)
@virtual_time
async def test_the_last_block_may_be_short(tmp_path: Path, size: int, streams: bool) -> None:
    source = ScriptedSource(piece=7777, streams_only={1} if streams else set())
    async with flow(tmp_path, source) as way:
        assert await way.read(1, size, size - 1, 4096) == await way.read(1, size, size - 1, 1)
        await way.read(1, size, 0, size + 100)
        assert await way.read(1, size, size, 1) == b""
        await way.settled()
        assert way.stored(1, size).complete
    async with flow(tmp_path) as way:
        await way.read(1, size, 0, size)
        assert not way.source.requests


@virtual_time
async def test_a_size_of_odd_bytes_survives_a_cut_in_its_last_block(tmp_path: Path) -> None:
    size = 2 * MIB + BLOCK + 1234
    source = ScriptedSource(script={0: Cut(200)})
    async with flow(tmp_path, source) as way:
        await way.read(1, size, 2 * MIB + BLOCK, 5000)
        await way.settled()
        assert way.stored(1, size).cached == 1234


# ── Mixed ranges ──────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_read_over_spans_that_are_here_on_their_way_and_absent(tmp_path: Path) -> None:
    release = trio.Event()
    source = ScriptedSource(script={1: Stall(release, 2 * BLOCK)})
    async with flow(tmp_path, source) as way:
        await way.read(1, SIZE, 0, BLOCK)  # Request 0: the first MiB.
        await way.settled()
        async with trio.open_nursery() as readers:
            readers.start_soon(way.read, 1, SIZE, MIB + 4 * BLOCK, 8 * BLOCK)  # Request 1: on its way.
            await quiet()
            readers.start_soon(way.read, 1, SIZE, MIB - 100, 3 * MIB)
            await trio.sleep(1.0)
            release.set()
        await way.settled()
        assert all(way.source.times_asked(1, block) <= 1 for block in range(SIZE // BLOCK))


@virtual_time
async def test_two_images_at_once_do_not_mix(tmp_path: Path) -> None:
    async with flow(tmp_path, ScriptedSource(streams_only={2}), memory_max=2 * SPAN) as way:
        rng = random.Random(1)

        async def reader(image: int) -> None:
            read = way.open(image, 3 * MIB + 5 * image)
            for _ in range(20):
                await read(rng.randrange(3 * MIB), rng.randrange(1, 300_000))

        async with trio.open_nursery() as readers:
            for n in range(12):
                readers.start_soon(reader, n % 3 + 1)


@given(st.data())
@examples(25)
def test_any_readers_of_any_image_read_what_it_has(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any sizes, offsets, faults and bounds: what is answered is right, and everybody is answered."""
    size = data.draw(st.integers(1, 3 * MIB), "size")
    acts = st.one_of(
        st.integers(0, 2 * MIB).map(Cut),
        st.just(Refuse(OriginUnavailable)),
        st.integers(0, MIB).map(lambda after: Cut(after, None)),
    )
    source = ScriptedSource(
        piece=data.draw(st.sampled_from([5000, 64 * KIB, 300_000]), "piece"),
        streams_only=data.draw(st.sampled_from([set(), {1}])),
        script=data.draw(st.dictionaries(st.integers(0, 6), acts, max_size=4), "script"),
    )
    reads = data.draw(
        st.lists(st.tuples(st.integers(0, size), st.integers(1, 400_000), st.floats(0, 0.3))), "reads"
    )
    limits = data.draw(st.sampled_from([UNLIMITED, FULL, Limits(1 << 20, 0)]), "limits")
    late_s = data.draw(st.sampled_from([0.0, 0.03]), "late_s")
    connections = data.draw(st.integers(1, 5), "connections")

    @virtual_time
    async def main() -> None:
        folder = tmp_path_factory.mktemp("any")
        async with flow(
            folder, source, connections=connections, retries=10, memory_max=SPAN, limits=lambda: limits,
            doubling_allowed=bool(source.streams_only),
        ) as way:  # fmt: skip
            way.store.late_s = late_s
            read = way.open(1, size)

            async def reader(offset: int, length: int, after_s: float) -> None:
                await trio.sleep(after_s)
                await read(offset, length)

            async with trio.open_nursery() as readers:
                for one in reads:
                    readers.start_soon(reader, *one)
            await way.settled()

    main()


# ── Reading patterns ──────────────────────────────────────────────────────────────────────────────────


async def in_order(read: Reader, size: int, piece: int, think_s: float = 0.0) -> None:
    for offset in range(0, size, piece):
        await read(offset, piece)
        if think_s:
            await trio.sleep(think_s)


def idle_s(way: Flow) -> float:
    """How long between the first request and the last no request was under way."""
    busy_until, idle = way.source.requests[0].began_s, 0.0
    for request in way.source.requests:
        idle += max(0.0, request.began_s - busy_until)
        busy_until = max(busy_until, request.ended_s)
    return idle


@pytest.mark.parametrize(("cost_s", "rate"), [(0.02, 312e6), (0.05, 50e6), (0.2, 312e6)])
@virtual_time
async def test_sequential_reading_keeps_the_link_busy(tmp_path: Path, cost_s: float, rate: float) -> None:
    size = 96 * MIB
    async with flow(tmp_path, ScriptedSource(cost_s=cost_s, rate=rate, piece=256 * KIB)) as way:
        await in_order(way.open(1, size), size, 128 * KIB)
        took_s = trio.current_time()
        await way.settled()
        assert took_s < size / rate + 8 * cost_s
        assert len(way.source.requests) <= 9


@virtual_time
async def test_sequential_windows_grow_to_the_maximum(tmp_path: Path) -> None:
    size = 320 * MIB
    async with flow(tmp_path, ScriptedSource(rate=312e6, piece=MIB), limits=lambda: FULL) as way:
        await in_order(way.open(1, size), size, MIB)
        lengths = [r.extent.length for r in way.source.requests]
        assert max(lengths) == SEQUENTIAL_MAX
        assert idle_s(way) == 0.0
        for before, after in pairwise(way.source.requests):
            assert after.began_s <= before.ended_s


@virtual_time
async def test_a_slow_sequential_reader_finds_everything_there_already(tmp_path: Path) -> None:
    size = 32 * MIB
    async with flow(tmp_path, ScriptedSource(rate=312e6)) as way:
        read = way.open(1, size)
        waits: list[float] = []
        for offset in range(0, size, 128 * KIB):
            began_s = trio.current_time()
            await read(offset, 128 * KIB)
            waits.append(trio.current_time() - began_s)
            await trio.sleep(0.005)  # 26 MB/s
        assert sum(1 for wait in waits if wait > 0.001) <= 4
        assert len(way.source.requests) <= 8


@virtual_time
async def test_sequential_reading_by_many_small_reads_at_once(tmp_path: Path) -> None:
    """As the kernel reads ahead: several requests of one file, in any order."""
    size = 32 * MIB
    async with flow(tmp_path, ScriptedSource(rate=100e6)) as way:
        read = way.open(1, size)
        for start in range(0, size, MIB):
            async with trio.open_nursery() as readers:
                for offset in range(start, start + MIB, 128 * KIB):
                    readers.start_soon(read, offset, 128 * KIB)
        assert len(way.source.requests) <= 16  # In the worst order the first MiB comes in pieces.
        assert trio.current_time() < size / 100e6 + 8 * 0.02


@virtual_time
async def test_two_sequential_readers_of_one_image_ask_once(tmp_path: Path) -> None:
    size = 32 * MIB
    async with flow(tmp_path, ScriptedSource(rate=100e6)) as way:
        async with trio.open_nursery() as readers:
            for n in range(2):
                readers.start_soon(in_order, way.open(1, size), size, 128 * KIB, 0.001 * n)
        await way.settled()
        assert all(way.source.times_asked(1, block) == 1 for block in range(size // BLOCK))


@pytest.mark.parametrize(("cost_s", "rate"), [(0.02, 312.5e6), (0.05, 25e6), (0.02, 50e6), (0.002, 10e6)])
@virtual_time
async def test_random_misses_use_the_equal_cost_window(tmp_path: Path, cost_s: float, rate: float) -> None:
    size = 4096 * MIB
    async with flow(tmp_path, ScriptedSource(cost_s=cost_s, rate=rate), limits=lambda: FULL) as way:
        read = way.open(1, size)
        for offset in _far_apart(size, 12):
            await read(offset, 4096)
            await way.settled()
        first_byte_s = cost_s + 64 * KIB / rate
        equal = min(max(EQUAL_COSTS * first_byte_s * rate, BLOCK), RANDOM_MAX)
        assert way.source.requests[0].extent.length == RANDOM_FIRST
        assert way.source.requests[-1].extent.length == pytest.approx(ceil(int(equal), BLOCK), rel=0.15, abs=BLOCK)


def _far_apart(size: int, count: int) -> Iterator[int]:
    step = size // count
    order = list(range(count))
    random.Random(5).shuffle(order)
    return (n * step // 4096 * 4096 for n in order)


@virtual_time
async def test_a_random_reader_never_asks_for_more_than_the_bound(tmp_path: Path) -> None:
    size = 4096 * MIB
    async with flow(tmp_path, ScriptedSource(cost_s=0.5, rate=1e9, piece=4 * MIB), limits=lambda: FULL) as way:
        async with trio.open_nursery() as readers:

            async def reader(seed: int) -> None:
                read = way.open(1, size)
                for n in random.Random(seed).sample(range(128), 6):
                    await read(n * 32 * MIB + seed * 4096, 4096)

            for seed in range(6):
                readers.start_soon(reader, seed)
        await way.settled()
        assert max(e.length for e in way.source.extents) <= RANDOM_MAX


@virtual_time
async def test_sequential_reading_goes_on_over_what_is_here_already(tmp_path: Path) -> None:
    size = 48 * MIB
    async with flow(tmp_path, ScriptedSource(rate=312e6)) as way:
        for start in range(6 * MIB, size, 8 * MIB):
            await way.read(1, size, start, 2 * MIB)
        await way.settled()
        before = len(way.source.requests)
        began_s = trio.current_time()
        await in_order(way.open(1, size), size, 128 * KIB)
        absent = size - 6 * 2 * MIB
        assert trio.current_time() - began_s < absent / 312e6 + 8 * 0.02
        assert len(way.source.requests) - before <= 12


# ── A store that keeps nothing, or rots ───────────────────────────────────────────────────────────────


@virtual_time
async def test_a_full_store_serves_and_keeps_nothing(tmp_path: Path) -> None:
    async with flow(tmp_path, limits=lambda: FULL) as way:
        await way.read(1, SIZE, 0, 300_000)
        await way.settled()
        assert way.stored(1, SIZE).cached == 0
        asked = len(way.source.requests)
        await way.read(1, SIZE, 0, 300_000)
        assert len(way.source.requests) == asked  # There was memory for it.


@virtual_time
async def test_what_a_full_store_refused_makes_way_for_what_is_needed(tmp_path: Path) -> None:
    async with flow(tmp_path, limits=lambda: FULL, memory_max=2 * SPAN) as way:
        for image in (1, 2, 3, 4):
            await way.read(image, SIZE, 0, SIZE)
            await way.settled()
        asked = len(way.source.requests)
        await way.read(1, SIZE, 0, 4096)
        assert len(way.source.requests) == asked + 1


@virtual_time
async def test_a_slow_sequential_reader_of_a_full_store_fetches_each_byte_once(tmp_path: Path) -> None:
    async with flow(tmp_path, limits=lambda: FULL) as way:
        read = way.open(1, SIZE)
        for offset in range(0, SIZE, 128 * KIB):
            await read(offset, 128 * KIB)
            await trio.sleep(0.05)
        assert way.fetcher.counts.bytes_fetched == SIZE


@virtual_time
async def test_a_store_with_room_again_keeps_again(tmp_path: Path) -> None:
    limits = FULL
    async with flow(tmp_path, limits=lambda: limits) as way:
        await way.read(1, SIZE, 0, 4096)
        await way.settled()
        limits = UNLIMITED
        await trio.sleep(10.0)
        await way.read(1, SIZE, 4 * MIB, 4096)
        await way.settled()
        view = way.stored(1, SIZE)
        assert not view.absent(Extent(0, BLOCK))  # What had been refused, as well.
        assert not view.absent(Extent(4 * MIB, 4 * MIB + BLOCK))


@virtual_time
async def test_a_long_read_is_served_by_a_store_that_keeps_nothing(tmp_path: Path) -> None:
    async with flow(tmp_path, ScriptedSource(rate=500e6), limits=lambda: FULL, memory_max=SPAN) as way:
        await way.read(1, SIZE, 100, SIZE - 200)


@virtual_time
async def test_bytes_of_a_segment_that_is_lost_are_doubted_and_fetched_again(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        await way.read(1, SIZE, 0, 2 * MIB)
        await way.settled()
    segment_file(tmp_path).unlink()
    async with flow(tmp_path) as way:
        async with trio.open_nursery() as readers:
            for offset in range(0, 2 * MIB, 90_000):
                readers.start_soon(way.read, 1, SIZE, offset, 100_000)
        assert way.store.writer.lander.rotten_found > 0
        # What came with its neighbours was never doubted; one by one all of it is.
        for _ in range(3):
            await way.read(1, SIZE, 0, 2 * MIB)
            await way.settled()
        asked = len(way.source.requests)
        await way.read(1, SIZE, 0, 2 * MIB)
        assert len(way.source.requests) == asked


@virtual_time
async def test_bytes_of_a_lost_segment_that_cannot_be_fetched_are_an_error(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        await way.read(1, SIZE, 0, MIB)
    segment_file(tmp_path).unlink()
    async with flow(tmp_path, ScriptedSource(act=lambda r: Refuse(ImageGone))) as way:
        with pytest.raises(ImageGone):
            await way.read(1, SIZE, 0, 4096)


@virtual_time
async def test_what_a_failed_commit_lost_is_fetched_again(tmp_path: Path) -> None:
    edges = Edges()
    async with flow(tmp_path, edges=edges) as way:
        await way.read(1, SIZE, 0, MIB)
        await way.settled()
        edges.arm(Fate.FAIL, Edge.SYNC)
        await trio.sleep(3.0)
        assert way.stored(1, SIZE).cached == 0
        await way.read(1, SIZE, 0, MIB)
        await trio.sleep(10.0)
        await way.read(1, SIZE, 2 * MIB, MIB)
        await way.settled()
        assert way.stored(1, SIZE).cached >= MIB
    async with flow(tmp_path) as way:
        await way.read(1, SIZE, 2 * MIB, MIB)
        assert not way.source.requests
        await way.read(1, SIZE, 0, MIB)


@virtual_time
async def test_a_disk_that_is_full_at_the_first_byte_is_no_error_of_a_reader(tmp_path: Path) -> None:
    edges = Edges()
    edges.arm(Fate.FAIL, Edge.APPEND, times=3)
    async with flow(tmp_path, edges=edges) as way:
        for _ in range(6):
            await way.read(1, SIZE, 0, MIB)
            await way.settled()
            await trio.sleep(11.0)
        assert way.stored(1, SIZE).cached >= MIB


@virtual_time
async def test_readers_while_commits_fail_now_and_then(tmp_path: Path) -> None:
    edges = Edges()
    async with flow(tmp_path, ScriptedSource(rate=4e6), edges=edges) as way:
        for after in (1, 2, 3):
            edges.arm(Fate.FAIL, Edge.SYNC, Edge.COMMIT, after=after)
        async with trio.open_nursery() as readers:
            for n in range(6):
                readers.start_soon(in_order, way.open(1, SIZE), SIZE, 200_000 + n, 0.05 * n)


@virtual_time
async def test_a_place_that_the_disk_does_not_give_is_fetched_and_nothing_else_is(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
    edges = Edges()
    async with flow(tmp_path, edges=edges) as way:
        # Some places far from each other: fewer than make the whole disk suspect.
        edges.bad.extend((SegmentNo(1), Extent(at, at + 512)) for at in (MIB - 700, 3 * MIB + 4096, 5 * MIB))
        for _ in range(2):
            for offset in range(0, SIZE, 4 * MIB):
                await way.read(1, SIZE, offset, 4 * MIB)
            await way.settled()
        assert 3 <= way.fetcher.counts.requests <= 6
        assert way.fetcher.counts.bytes_fetched <= 3 * 6 * BLOCK
        assert way.store.health.state is State.HEALTHY
