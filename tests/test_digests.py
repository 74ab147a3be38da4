"""Digests of verified blocks: an image that was verified, evicted and fetched again is what it was, or an error of
its origin. What the origin gives is scripted; reads are compared with what the image had when it was verified."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from cachefs.arriving import ASKED_MAX, REFUSED_MAX, REFUSED_S
from cachefs.errors import OriginChanged, OriginUnavailable
from cachefs.flights import Priority
from cachefs.plan.extents import BLOCK, Extent, pieces
from cachefs.store import format as f
from cachefs.store.check import Severity, check
from cachefs.store.digests import ROOM_BYTES
from cachefs.store.format import SpanNo, Table
from cachefs.store.recover import repair_store
from cachefs.store.room import Limits
from cachefs.store.view import StoredView
from tests import test_qcow2 as qcow2
from tests.flow import MIB, Cut, Flow, ScriptedSource, Stall, flow, until, virtual_time
from tests.stores import SPAN, Crash, Edge, Edges, Fate, index_of, put
from tests.test_derivation import home
from tests.test_guest_disks import converted
from tests.test_hydrator import hydrating

stock = qcow2.stock  # The fixture.

SIZE = 8 * MIB + 5000  # The last block is cut short.
BAD = 37  # A block in the middle of a span and of a window.
BLOCKS = -(-SIZE // BLOCK)
FULL = Limits(0, 0)


@dataclass
class ChangedSource(ScriptedSource):
    """An origin that has something else in the blocks of `changed`, for the first `times` that it is asked."""

    changed: set[int] = field(default_factory=set)
    times: float = float("inf")

    def bytes_of(self, image: int, start: int, end: int) -> bytes:
        given = bytearray(super().bytes_of(image, start, end))
        for block in self.changed:
            met = Extent(block * BLOCK + 4711, block * BLOCK + 4712).clamp(Extent(start, end))
            if met.length > 0 and self.times_asked(image, block) <= self.times:
                given[met.start - start] ^= 1
        return bytes(given)


def everywhere() -> set[int]:
    return set(range(BLOCKS))


async def remember(way: Flow, view: StoredView, *, until: int = SIZE, piece: int = 3 * MIB) -> bool:
    """Reads the view up to `until` as whoever verifies does; whether it is trusted."""
    passed = way.store.digests.begin(view)
    for part in pieces(Extent(0, until), piece):
        await view.load(part)
        passed.note(part.start, passed.digests(memoryview(await view.read(part.start, part.length))))
    return await passed.trust()


async def verify(way: Flow, image: int = 1) -> StoredView:
    """Fetches an image whole, and remembers its digests."""
    view = way.stored(image, SIZE)
    await way.read(image, SIZE, 0, SIZE)
    await way.settled()
    assert view.complete
    assert await remember(way, view)
    return view


async def evict(way: Flow, view: StoredView, first: int = 0) -> None:
    """All spans from `first` on."""
    await way.store.evict([(view.number, SpanNo(span)) for span in range(first, view.spans)])


async def prepare(folder: Path, source: ScriptedSource | None = None) -> None:
    """A store with the digests of an image, of which nothing is cached."""
    async with flow(folder, source) as way:
        await evict(way, await verify(way))
        await way.store.flush()


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The errors that were logged, by their image."""
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    return [(getattr(record, "image", ""), record.getMessage()) for record in errors]


# ── What is refused ───────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_id_that_ended_and_means_another_image_is_told_of_anew(tmp_path: Path) -> None:
    source = ChangedSource()
    told: list[int] = []
    async with flow(tmp_path, source) as way:
        way.store.digests.on_changed = lambda view, offset: told.append(view.number)
        numbers = []
        for _ in range(2):
            source.changed = set()
            view = await verify(way)
            numbers.append(view.number)
            await evict(way, view)
            source.changed = everywhere()
            with pytest.raises(OriginChanged):
                await way.read(1, SIZE, 0, 4096)
            await way.settled()
            assert way.store.digests.status()["origin_changed"]
            way.store.end_views(view.record.image)
            assert not way.store.digests.status()["origin_changed"]
        assert told == numbers
        assert len(set(told)) == 2


@virtual_time
async def test_an_image_that_changed_is_refused_and_what_is_cached_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ChangedSource()
    told: list[tuple[int, int]] = []
    async with flow(tmp_path, source) as way:
        way.store.digests.on_changed = lambda view, offset: told.append((view.number, offset))
        view = await verify(way)
        await evict(way, view, first=2)
        source.changed = everywhere()
        with pytest.raises(OriginChanged) as failure:
            await way.read(1, SIZE, 3 * MIB, 4096)
        assert failure.value.offset == 3 * MIB
        await way.settled()
        assert view.cached == 2 * SPAN
        assert await way.read(1, SIZE, 0, 2 * SPAN)
        with pytest.raises(OriginChanged):
            await way.read(1, SIZE, 2 * SPAN - 4096, 8192)
        await way.settled()
        assert view.cached == 2 * SPAN
        assert told == [(view.number, 3 * MIB)]
        assert list(way.store.digests.status()["origin_changed"].values()) == [3 * MIB]
    ((image, line),) = said(caplog)
    assert image == view.record.image
    assert str(3 * MIB) in line
    assert check(tmp_path).sound


@virtual_time
async def test_a_restart_does_not_forget(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with flow(tmp_path, ChangedSource(changed={0, BLOCKS - 1})) as way:
        view = way.stored(1, SIZE)
        assert way.store.digests.trusted(view)
        for offset in (0, SIZE - 10):
            with pytest.raises(OriginChanged):
                await way.read(1, SIZE, offset, 10)
        await way.read(1, SIZE, BLOCK, SIZE - 2 * BLOCK)
        await way.settled()
        assert view.absent(Extent(0, SIZE)) == [Extent(0, BLOCK), Extent(8 * MIB, SIZE)]


@virtual_time
async def test_an_image_that_is_as_it_was_is_fetched_as_ever(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with flow(tmp_path) as way:
        view = way.stored(1, SIZE)
        async with trio.open_nursery() as readers:
            for offset in range(0, SIZE, 300_001):
                readers.start_soon(way.read, 1, SIZE, offset, 250_000)
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        assert view.complete
        assert max(way.source.times_asked(1, block) for block in range(BLOCKS)) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["ranges", "stream"])
@virtual_time
async def test_one_block_in_the_middle_of_a_flight(tmp_path: Path, stream: bool) -> None:
    streams = {1} if stream else set()
    await prepare(tmp_path, ScriptedSource(streams_only=streams))
    async with flow(tmp_path, ChangedSource(changed={BAD}, streams_only=streams, rate=5e6)) as way:
        view = way.stored(1, SIZE)
        failures: list[tuple[int, int]] = []

        async def read(block: int) -> None:
            try:
                await way.read(1, SIZE, block * BLOCK + 1, min(BLOCK, SIZE - block * BLOCK) - 1)
            except OriginChanged as error:
                failures.append((block, error.offset))

        flight = way.fetcher.start(view, Extent(0, SIZE), Priority.DEMAND)
        async with trio.open_nursery() as readers:
            for block in range(BLOCKS):
                readers.start_soon(read, block)
        assert failures == [(BAD, BAD * BLOCK)]
        await way.settled()
        assert isinstance(flight.error, OriginChanged)
        # All else was kept, and needed no second request; that block was asked for once more, where that is cheap.
        assert view.absent(Extent(0, SIZE)) == [Extent(BAD * BLOCK, (BAD + 1) * BLOCK)]
        assert len([r for r in way.source.requests if r.stream]) == (1 if stream else 0)
        if not stream:
            assert way.source.times_asked(1, BAD) == ASKED_MAX
            assert max(way.source.times_asked(1, block) for block in everywhere() - {BAD}) == 1
        assert way.fetcher.memory_used == 0


@virtual_time
async def test_a_block_that_was_refused_is_left_alone_for_a_while(tmp_path: Path) -> None:
    await prepare(tmp_path)
    source = ChangedSource(changed={BAD})
    async with flow(tmp_path, source) as way:
        for _ in range(20):
            with pytest.raises(OriginChanged):
                await way.read(1, SIZE, BAD * BLOCK, 4096)
        assert source.times_asked(1, BAD) == ASKED_MAX
        source.changed.clear()
        await trio.sleep(REFUSED_S)
        await way.read(1, SIZE, BAD * BLOCK, 4096)


@virtual_time
async def test_an_image_that_was_brought_back_is_as_if_nothing_had_been(tmp_path: Path) -> None:
    await prepare(tmp_path)
    source = ChangedSource(changed={BAD})
    async with flow(tmp_path, source) as way:
        view = way.stored(1, SIZE)
        with pytest.raises(OriginChanged):
            await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        assert list(way.store.digests.changed) == [view.record.image]
        source.changed.clear()
        await trio.sleep(REFUSED_S)
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        assert await remember(way, view)
        assert not way.store.digests.changed


@virtual_time
async def test_bytes_that_were_damaged_on_the_way_are_asked_for_again(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with flow(tmp_path, ChangedSource(changed={BAD}, times=1)) as way:
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        assert way.stored(1, SIZE).complete
        assert way.source.times_asked(1, BAD) == 2


@virtual_time
async def test_a_flight_of_nothing_but_other_bytes_is_given_up(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with flow(tmp_path, ChangedSource(changed=everywhere(), rate=5e6)) as way:
        view = way.stored(1, SIZE)
        flight = way.fetcher.start(view, Extent(0, SIZE), Priority.HYDRATION)
        await flight.ended.wait()
        assert isinstance(flight.error, OriginChanged)
        assert flight.at <= (REFUSED_MAX + 1) * BLOCK
        await way.settled()
        assert view.cached == 0
        assert way.fetcher.memory_used == 0


@virtual_time
async def test_who_wants_a_good_block_of_a_flight_that_was_given_up_gets_it(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with flow(tmp_path, ChangedSource(changed=set(range(REFUSED_MAX)), rate=5e6)) as way:
        way.fetcher.start(way.stored(1, SIZE), Extent(0, SIZE), Priority.DEMAND)
        await way.read(1, SIZE, (REFUSED_MAX + 5) * BLOCK, 4096)


@virtual_time
async def test_a_full_store_serves_nothing_else_either(tmp_path: Path) -> None:
    await prepare(tmp_path)
    async with flow(tmp_path, ChangedSource(changed={BAD}), limits=lambda: FULL, memory_max=SPAN) as way:
        for block in range(BLOCKS):
            if block != BAD:
                await way.read(1, SIZE, block * BLOCK, 4096)
        with pytest.raises(OriginChanged):
            await way.read(1, SIZE, BAD * BLOCK, 4096)


@pytest.mark.parametrize("stream", [False, True], ids=["ranges", "stream"])
@virtual_time
async def test_hydration_goes_on_behind_blocks_that_changed(tmp_path: Path, stream: bool) -> None:
    streams = {1} if stream else set()
    await prepare(tmp_path, ScriptedSource(streams_only=streams))
    changed = {5, BAD, BAD + 1}
    async with hydrating(tmp_path, ChangedSource(changed=changed, streams_only=streams), concurrency=1) as now:
        view = now.open(1, SIZE)
        lacking = Extent(5 * BLOCK, 6 * BLOCK), Extent(BAD * BLOCK, (BAD + 2) * BLOCK)
        await until(lambda: view.absent(Extent(0, SIZE)) == list(lacking))
        (why,) = now.hydrator.at_risk.values()
        assert "not what was verified" in why
        # And the origin is not asked all the time.
        asked = len(now.flow.source.requests)
        await trio.sleep(3600)
        assert len(now.flow.source.requests) <= asked + 20


@pytest.mark.parametrize("seed", range(8))
@virtual_time
async def test_readers_of_an_origin_that_changed_here_and_there(tmp_path: Path, seed: int) -> None:
    """Whatever comes in which pieces: who wants a changed block gets an error, all others the right bytes."""
    rng = random.Random(seed)
    streams = {1} if seed % 4 == 3 else set()
    await prepare(tmp_path, ScriptedSource(streams_only=streams))
    changed = {0, BLOCKS - 1} if seed == 0 else set(rng.sample(range(BLOCKS), rng.randrange(1, 12)))
    source = ChangedSource(
        changed=changed,
        streams_only=streams,
        rate=2e7,
        piece=rng.choice((999, 10_000, 64_000, BLOCK, 3 * MIB)),
        script={rng.randrange(12): Cut(rng.randrange(MIB)) for _ in range(0 if streams else 5)},
    )
    async with flow(tmp_path, source, memory_max=rng.choice((SPAN, 64 * MIB))) as way:
        view = way.stored(1, SIZE)

        async def read(offset: int, length: int) -> None:
            await trio.sleep(rng.random())
            wanted = set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
            try:
                await way.read(1, SIZE, offset, length)
            except OriginChanged as error:
                failed.append((error.offset // BLOCK, wanted))
            else:
                assert not wanted & changed

        failed: list[tuple[int, set[int]]] = []
        async with trio.open_nursery() as readers:
            for _ in range(60):
                length = rng.choice((1, 4096, 128 << 10, MIB))
                readers.start_soon(read, rng.randrange(SIZE - length), length)
        assert all(block in wanted & changed for block, wanted in failed)
        await way.settled()
        for block in everywhere() - changed:
            await way.read(1, SIZE, block * BLOCK, min(BLOCK, SIZE - block * BLOCK))
        await way.settled()
        here = {block for block in everywhere() if view.present_at(block * BLOCK)}
        assert here == everywhere() - changed
        assert way.fetcher.memory_used == 0
    assert check(tmp_path).sound


@qcow2.needs_qemu
@virtual_time
async def test_the_disk_inside_a_file_that_changed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its clusters come through the file's own view, where they are compared, once the file was verified."""
    folder = tmp_path_factory.mktemp("disk")
    file, disk = converted(folder)
    async with home(folder / "store", file) as here:
        view = await here.open()
        await here.verified()
        await until(lambda: here.den.flow.store.digests.trusted(here.original))
        here.leases.released(here.raw.number)
        store = here.den.flow.store
        for gone in (here.raw, here.original):
            await store.evict([(gone.number, SpanNo(span)) for span in range(gone.spans)])
        place = file.index(disk[MIB : MIB + 512])  # Where its second MiB begins.
        here.den.source.files[1] = file[:place] + bytes(512) + file[place + 512 :]
        right = wrong = 0
        for offset in range(0, len(disk), BLOCK):
            try:
                found = bytes(await view.read(offset, BLOCK))
            except OriginChanged:
                wrong += 1
            else:
                right += 1
                assert found == disk[offset : offset + BLOCK]
        assert 1 <= wrong <= 2
        assert right + wrong == len(disk) // BLOCK
        assert [block for block in here.original.absent(Extent(0, len(file))) if block.start <= place < block.end]


# ── When bytes can be seen ────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_block_comes_when_it_was_compared_and_not_before(tmp_path: Path) -> None:
    await prepare(tmp_path)
    go_on = trio.Event()
    source = ScriptedSource(script={0: Stall(go_on, after=BLOCK + BLOCK // 2)}, piece=10_000)
    got: list[int] = []
    async with flow(tmp_path, source) as way:
        view = way.stored(1, SIZE)
        way.fetcher.start(view, Extent(0, MIB), Priority.DEMAND)

        async def read(offset: int) -> None:
            await way.read(1, SIZE, offset, 4096)
            got.append(offset)

        async with trio.open_nursery() as readers:
            for offset in (0, BLOCK - 4096, BLOCK, 2 * BLOCK):
                readers.start_soon(read, offset)
            await trio.sleep(1)
            assert source.requests[0].got == BLOCK + BLOCK // 2
            assert sorted(got) == [0, BLOCK - 4096]  # Half of the second one is here.
            assert way.blocks.arrived(view, BLOCK, 4096) is None
            go_on.set()
        assert sorted(got) == [0, BLOCK - 4096, BLOCK, 2 * BLOCK]


@virtual_time
async def test_a_body_that_is_cut_short_goes_on_behind_what_was_compared(tmp_path: Path) -> None:
    await prepare(tmp_path)
    cut = {n: Cut(3 * BLOCK + 1000) for n in range(3)}
    async with flow(tmp_path, ScriptedSource(script=dict(cut)), retries=1) as way:
        view = way.stored(1, SIZE)
        flight = way.fetcher.start(view, Extent(0, MIB), Priority.DEMAND)
        await flight.ended.wait()
        assert flight.error is None
        assert [r.extent.start for r in way.source.requests] == [0, 3 * BLOCK, 6 * BLOCK, 9 * BLOCK]
        await way.settled()
        assert view.absent(Extent(0, MIB)) == []


@virtual_time
async def test_a_reader_that_goes_away_and_an_end_in_the_middle_leave_nothing_behind(tmp_path: Path) -> None:
    await prepare(tmp_path)
    source = ScriptedSource(script={0: Stall(trio.Event(), after=MIB + 100)})
    async with flow(tmp_path, source) as way:
        view = way.stored(1, SIZE)
        way.fetcher.start(view, Extent(0, SIZE), Priority.DEMAND)
        with trio.move_on_after(5):
            await way.read(1, SIZE, 2 * MIB, 4096)
        await way.read(1, SIZE, MIB - 4096, 4096)
        way.stop()
        await trio.lowlevel.checkpoint_if_cancelled()
    assert check(tmp_path).sound


@virtual_time
async def test_without_digests_nothing_is_compared(tmp_path: Path) -> None:
    async with flow(tmp_path, ChangedSource(changed={BAD})) as way:
        view = way.stored(1, SIZE)
        await way.fetcher.start(view, Extent(0, SIZE), Priority.DEMAND).ended.wait()
        await way.settled()
        assert view.complete
        assert not way.store.digests.trusted(view)


# ── What is believed ──────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_pass_that_is_broken_off_leaves_nothing_to_be_believed(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        view = way.stored(1, SIZE)
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        assert not await remember(way, view, until=6 * MIB)
        assert not way.store.digests.trusted(view)
    async with flow(tmp_path, ChangedSource(changed={3})) as way:
        view = way.stored(1, SIZE)
        assert not way.store.digests.trusted(view)
        await evict(way, view)
        await way.blocks.fetch(view, Extent(0, SIZE))
        await way.settled()
        assert view.complete  # It has other bytes by now, and there is nothing to tell.
        assert await remember(way, view)  # As if it had the promised hash: what was left behind does not count.
        await evict(way, view)
        await way.blocks.fetch(view, Extent(0, SIZE))
        await way.settled()
        assert view.complete
    assert check(tmp_path).findings == []


@pytest.mark.parametrize(
    "notes",
    [
        pytest.param([(0, MIB), (2 * MIB, SIZE)], id="a gap"),
        pytest.param([(0, 4 * MIB), (4 * MIB, SIZE), (0, MIB)], id="something again"),
        pytest.param([(MIB, SIZE)], id="no beginning"),
        pytest.param([], id="nothing"),
    ],
)
@virtual_time
async def test_a_pass_is_of_all_of_the_view_in_order(tmp_path: Path, notes: list[tuple[int, int]]) -> None:
    async with flow(tmp_path) as way:
        view = way.stored(1, SIZE)
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        passed = way.store.digests.begin(view)
        for start, end in notes:
            passed.note(start, f.block_digests(await view.read(start, end - start)))
        assert not await passed.trust()
        assert not way.store.digests.trusted(view)


@virtual_time
async def test_a_view_that_ends_during_the_pass_is_not_believed(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        view = way.stored(1, SIZE)
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        data = await view.read(0, SIZE)
        passed = way.store.digests.begin(view)
        passed.note(0, f.block_digests(data[:MIB]))
        way.store.end_views(view.record.image)
        await evict(way, view)
        way.store.forget_view(view.number)
        passed.note(MIB, f.block_digests(data[MIB:]))
        assert not await passed.trust()
        await way.store.flush()
        assert way.store.items(Table.BLOCK_DIGESTS) == []


@pytest.mark.parametrize("fate", [Fate.CRASH, Fate.CRASH_LATE])
def test_a_crash_before_the_mark_is_durable(tmp_path: Path, fate: Fate) -> None:
    edges = Edges()

    @virtual_time
    async def main() -> None:
        async with flow(tmp_path, edges=edges) as way:
            view = way.stored(1, SIZE)
            await way.read(1, SIZE, 0, SIZE)
            await way.settled()
            await way.store.flush()
            edges.arm(fate, Edge.COMMIT)
            await remember(way, view)

    @virtual_time
    async def after() -> None:
        async with flow(tmp_path) as way:
            view = way.stored(1, SIZE)
            # All of it is there, or nothing is believed.
            assert way.store.digests.trusted(view) == (fate is Fate.CRASH_LATE)
            assert len(way.store.items(Table.BLOCK_DIGESTS)) == (view.spans + 1 if fate is Fate.CRASH_LATE else 0)

    with pytest.raises((Crash, BaseExceptionGroup)):
        main()
    assert edges.dead
    after()


@virtual_time
async def test_a_commit_that_fails_is_made_up_for(tmp_path: Path) -> None:
    edges = Edges()
    async with flow(tmp_path, edges=edges) as way:
        view = way.stored(1, SIZE)
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        await way.store.flush()
        edges.arm(Fate.FAIL, Edge.COMMIT)
        assert not await remember(way, view)
        assert not way.store.digests.trusted(view)
        assert view.complete
    async with flow(tmp_path) as way:
        assert way.store.digests.trusted(way.stored(1, SIZE))


@virtual_time
async def test_a_disk_without_room_gets_no_digests(tmp_path: Path) -> None:
    left = 1 << 40
    async with flow(tmp_path, limits=lambda: Limits(1 << 62, usage_free(tmp_path) - left)) as way:
        view = way.stored(1, SIZE)
        await way.read(1, SIZE, 0, SIZE)
        await way.settled()
        left = ROOM_BYTES // 2
        assert not await remember(way, view)
        await way.store.flush()
        assert way.store.items(Table.BLOCK_DIGESTS) == []
        left = 2 * ROOM_BYTES
        assert await remember(way, view)


def usage_free(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


@virtual_time
async def test_digests_that_are_believed_are_never_written_again(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        view = await verify(way)
        before = way.store.items(Table.BLOCK_DIGESTS)
        passed = way.store.digests.begin(view)
        passed.note(0, bytes(len(f.block_digests(await view.read(0, MIB)))))
        assert passed.digests(memoryview(b"anything")) == b""  # Not even hashed.
        await way.store.flush()
        assert way.store.items(Table.BLOCK_DIGESTS) == before
        assert len(before) == view.spans + 1


@virtual_time
async def test_they_go_with_the_view(tmp_path: Path) -> None:
    async with flow(tmp_path) as way:
        views = [await verify(way, image) for image in (1, 2)]
        await evict(way, views[0])
        way.store.end_views(views[0].record.image)
        way.store.forget_view(views[0].number)
        await way.store.flush()
        assert not way.store.digests.trusted(views[0])
        assert {key[:4] for key, _ in way.store.items(Table.BLOCK_DIGESTS)} == {f.view_key(views[1].number)}
        # The id has come to mean another image.
        other = way.stored(1, SIZE)
        assert not way.store.digests.trusted(other)


@virtual_time
async def test_a_span_of_zeros_takes_next_to_nothing(tmp_path: Path) -> None:
    @dataclass
    class Zeros(ScriptedSource):
        def bytes_of(self, image: int, start: int, end: int) -> bytes:
            return bytes(end - start) if start < 6 * MIB else super().bytes_of(image, start, end)

    source = Zeros()
    async with flow(tmp_path, source) as way:
        view = way.stored(1, SIZE)
        await way.blocks.fetch(view, Extent(0, SIZE))
        await way.settled()
        assert await remember(way, view)
        sizes = [len(record) for key, record in way.store.items(Table.BLOCK_DIGESTS) if len(key) == 8]
        assert sizes == [8] * 6 + [16 * 16 + 8] * 2 + [16 + 8]
        await evict(way, view)
        await way.blocks.fetch(view, Extent(0, SIZE))
        await way.settled()
        assert view.complete
        await evict(way, view)
        way.source.bytes_of = ScriptedSource().bytes_of  # type: ignore[method-assign]
        with pytest.raises(OriginChanged):
            await way.blocks.read_just(view, Extent(MIB, MIB + 10))


# ── Records that are lost, rotten or stray ────────────────────────────────────────────────────────────


def rotten(record: bytes) -> bytes:
    return bytes([record[0] ^ 1]) + record[1:]


@pytest.mark.parametrize("damage", [lambda record: None, rotten], ids=["lost", "rotten"])
def test_digests_that_are_lost_cost_no_more_than_their_protection(
    tmp_path: Path, damage: Callable[[bytes], bytes | None]
) -> None:
    virtual_time(prepare)(tmp_path)
    key = f.span_key(f.ViewNo(1), SpanNo(2))
    with index_of(tmp_path) as index, index.reading() as snapshot:
        record = snapshot.get(Table.BLOCK_DIGESTS, key)
    assert record is not None
    put(tmp_path, Table.BLOCK_DIGESTS, key, damage(record))
    report = check(tmp_path)
    assert report.sound
    assert len(report.findings) == (damage is rotten)

    @virtual_time
    async def main() -> None:
        block = 2 * SPAN // BLOCK + 1
        async with flow(tmp_path, ChangedSource(changed={0, block})) as way:
            view = way.stored(1, SIZE)
            await way.blocks.read_just(view, Extent(2 * SPAN, 3 * SPAN))
            await way.settled()
            assert view.absent(Extent(2 * SPAN, 3 * SPAN)) == []
            with pytest.raises(OriginChanged):
                await way.read(1, SIZE, 0, 4096)

    main()


def test_a_mark_that_has_rotted_is_no_mark(tmp_path: Path) -> None:
    virtual_time(prepare)(tmp_path)
    put(tmp_path, Table.BLOCK_DIGESTS, f.view_key(f.ViewNo(1)), rotten(f.encode_digests_mark(f.ViewNo(1), SIZE)))
    assert check(tmp_path).sound

    @virtual_time
    async def main() -> None:
        async with flow(tmp_path) as way:
            assert not way.store.digests.trusted(way.stored(1, SIZE))
            view = await verify(way)  # From the beginning.
            assert way.store.digests.trusted(view)

    main()
    assert check(tmp_path).findings == []


def test_repair_drops_what_means_nothing_and_leaves_the_rest(tmp_path: Path) -> None:
    virtual_time(prepare)(tmp_path)
    strange: list[tuple[bytes, bytes]] = [
        (f.span_key(f.ViewNo(1), SpanNo(9)), bytes(16)),  # Behind the image's end.
        (f.span_key(f.ViewNo(1), SpanNo(3)), bytes(15 * 16)),  # One too few.
        (f.span_key(f.ViewNo(77), SpanNo(0)), bytes(16)),
        (f.view_key(f.ViewNo(77)), bytes(8)),
        (b"?", b""),
    ]
    for key, payload in strange:
        put(tmp_path, Table.BLOCK_DIGESTS, key, f.seal(Table.BLOCK_DIGESTS, key, payload))
    damaged = f.span_key(f.ViewNo(1), SpanNo(2))
    put(tmp_path, Table.BLOCK_DIGESTS, damaged, b"rotten")
    report = check(tmp_path)
    assert report.sound
    assert [finding.severity for finding in report.findings] == [Severity.NOTE] * 6
    done = repair_store(tmp_path)[1]
    assert done is not None
    assert done.records_dropped == 6
    assert check(tmp_path).findings == []

    @virtual_time
    async def main() -> None:
        async with flow(tmp_path, ChangedSource(changed={0})) as way:
            assert len(way.store.items(Table.BLOCK_DIGESTS)) == way.stored(1, SIZE).spans + 1 - 2
            with pytest.raises(OriginChanged):
                await way.read(1, SIZE, 0, 4096)

    main()


@virtual_time
async def test_an_index_that_cannot_be_asked_now_holds_up_nobody(tmp_path: Path) -> None:
    await prepare(tmp_path)
    edges = Edges()
    async with flow(tmp_path, edges=edges) as way:
        view = way.stored(1, SIZE)
        for _ in range(5):
            way.store.health.reads.note_error("a read: no")
        assert not way.store.health.may_look_up
        looked_up: list[int] = []
        edges.on_look_up = lambda: looked_up.append(1)  # It could end the process.
        await way.read(1, SIZE, 0, 4096)
        assert not looked_up
        assert view.cached == 0  # What was not compared is not kept either.


@virtual_time
async def test_what_is_cached_of_digests_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await prepare(tmp_path)
    monkeypatch.setattr("cachefs.store.digests.CACHED_BYTES_MAX", 3 * 16 * 16)
    async with flow(tmp_path) as way:
        view = way.stored(1, SIZE)
        for span in map(SpanNo, range(view.spans)):
            assert await way.store.digests.load(view, span) is not None
        here = [span for span in map(SpanNo, range(view.spans)) if way.store.digests.of(view, span) is not None]
        assert here == [SpanNo(6), SpanNo(7), SpanNo(8)]


@virtual_time
async def test_a_comparison_that_fails_by_itself_is_an_error_and_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare(tmp_path)

    def broken(data: memoryview, digests: bytes) -> int | None:
        raise MemoryError

    async with flow(tmp_path, retries=0) as way:
        monkeypatch.setattr("cachefs.arriving.first_difference", broken)
        view = way.stored(1, SIZE)
        flight = way.fetcher.start(view, Extent(0, MIB), Priority.HYDRATION)
        await flight.ended.wait()
        assert isinstance(flight.error, OriginUnavailable)
        await way.settled()
        assert view.cached == 0
        assert way.fetcher.memory_used == 0
