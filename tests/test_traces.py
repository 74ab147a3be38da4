"""Boot traces in virtual time: what is recorded, what a replay asks the origin for and when, and that neither is
in anybody's way. Rule: bytes, requests and records.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs import traces as module
from cachefs.blocks import Buffer
from cachefs.errors import OriginUnavailable, TraceRefused
from cachefs.hydrator import Hydrator
from cachefs.leases import Leases
from cachefs.plan import trace
from cachefs.plan.extents import BLOCK, Extent
from cachefs.plan.trace_file import NamedTrace, to_fields
from cachefs.plan.windows import Link
from cachefs.store import format as f
from cachefs.store.format import SpanNo, Table, TraceRecord, TraceRun, UseFlag, ViewKind
from cachefs.store.room import Limits
from cachefs.store.view import StoredView
from cachefs.traces import AGAIN_S, Traces
from cachefs.uses import Uses
from cachefs.views import View
from cachefs.views.recording import RecordingFile
from cachefs.views.stored import StoredFile
from tests.evictions import wall_clock
from tests.flow import MIB, Flow, Refuse, ScriptedSource, Stall, content, flow, until, virtual_time
from tests.stores import SPAN, image_id

SIZE = 64 * MIB
SECONDS = 30.0
# Blocks that a guest reads, in this order: far apart, close together, and not in the order of the disk.
BOOT = [0, 700, 701, 702, 40, 300, 303, 39, 900, 1000, 500, 501, 41, 999, 100, 250, 251, 252, 800, 20]
# As they lie: with the link of `ScriptedSource` a gap of two blocks is worth its bytes.
HASHES = {1: "sha512:" + "11" * 64, 2: "sha512:" + "11" * 64, 3: "sha512:" + "33" * 64}


@dataclass
class Handle:
    """One open file, as the mount has it: what it reads by may be replaced."""

    image: int
    view: View
    stored: StoredView
    size: int = SIZE

    async def read(self, offset: int, length: int) -> bytes:
        now: Buffer | None = self.view.read_now(offset, length)
        data = bytes(now) if now is not None else bytes(await self.view.read(offset, length))
        assert data == content(self.image, offset, min(offset + length, self.size))
        return data

    async def boot(self, blocks: Iterable[int] = BOOT, think_s: float = 0.1) -> None:
        for block in blocks:
            await self.read(block * BLOCK + 512, 4096)
            await trio.sleep(think_s)

    @property
    def is_recorded(self) -> bool:
        return isinstance(self.view, RecordingFile)


@dataclass
class Node:
    """A flow with traces beside it."""

    way: Flow
    leases: Leases
    uses: Uses
    traces: Traces
    names: dict[int, str] = field(default_factory=lambda: dict(HASHES))

    @property
    def source(self) -> ScriptedSource:
        return self.way.source

    def open(self, image: int = 1, size: int = SIZE) -> Handle:
        stored = self.way.stored(image, size)
        plain = StoredFile(stored, self.way.blocks)
        handle = Handle(image, plain, stored, size)

        def done() -> None:
            handle.view = plain

        handle.view = self.traces.opened(stored, plain, done)
        self.leases.opened(stored.number)
        return handle

    def close(self, handle: Handle) -> None:
        self.leases.released(handle.stored.number)

    async def record(self, image: int = 1, blocks: Sequence[int] = BOOT, think_s: float = 0.01) -> Handle:
        """Boots once and waits until that is a trace."""
        recorded = self.traces.recorded
        handle = self.open(image)
        await handle.boot(blocks, think_s)
        await until(lambda: self.traces.recorded > recorded)
        await self.way.settled()
        return handle

    async def evict(self, image: int = 1) -> None:
        view = self.way.stored(image, SIZE)
        await self.way.store.evict([(view.number, SpanNo(span)) for span in range(view.spans)])
        assert view.cached == 0

    async def calm(self) -> None:
        await until(lambda: not self.traces.status()["replaying"])
        await self.way.settled()

    async def blocks_known(self, image: int = 1) -> list[int]:
        """Of its trace, in order, as the store has it."""
        await self.way.store.flush()
        key = f.trace_key(self.names[image], ViewKind.ORIGINAL)
        record = self.way.store.get(Table.TRACES, key)
        assert record is not None
        return list(trace.blocks_of(TraceRecord.decode(key, record).runs))


@asynccontextmanager
async def node(
    folder: Path, source: ScriptedSource | None = None, *, seconds: float = SECONDS, **how: Any
) -> AsyncIterator[Node]:
    async with flow(folder, source, **how) as way:
        leases = Leases(way.store, lambda: 1 << 60)
        uses = Uses(way.store, wall_clock)
        names = dict(HASHES)

        def names_of(image: str) -> Sequence[str]:
            number = next((n for n in range(1, 100) if image_id(n) == image), 0)
            by_id = f"image:{image}"
            return (names[number], by_id) if number in names else (by_id,)

        traces = Traces(
            way.store, way.fetcher, way.blocks, uses, leases,
            seconds=seconds, names_of=names_of, images=lambda: [image_id(n) for n in names], clock=wall_clock,
        )  # fmt: skip
        way.fetcher.give_way(way.blocks, way.blocks.beside_traces)
        await way.services.start(traces.run)
        yield Node(way, leases, uses, traces, names)
        way.stop()
        traces.save()


def asked_blocks(source: ScriptedSource, since: int = 0) -> list[int]:
    return [
        block
        for request in source.requests[since:]
        for block in range(request.extent.start // BLOCK, -(-request.extent.end // BLOCK))
    ]


# ── Recording ─────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_the_order_of_first_touches_is_recorded_hits_too(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        handle = here.open()
        assert handle.is_recorded
        await handle.boot([5, 6, 900, 5, 7, 6])  # After the first one, hits of its window.
        assert here.source.times_asked(1, 6) == here.source.times_asked(1, 7) == 1
        await until(lambda: here.traces.recorded == 1)
        assert not handle.is_recorded, "the handle reads by the plain file again"
        await handle.boot([8])
        await here.way.settled()
        assert await here.blocks_known() == [5, 6, 900, 7]


@virtual_time
async def test_all_handles_are_one_recording_and_what_comes_late_is_none(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        first = here.open()
        await first.boot([1, 2])
        second = here.open()
        await second.boot([3, 2])
        await first.boot([4])
        here.close(second)
        await until(lambda: here.traces.recorded == 1)
        late = here.open()
        await late.boot([9])
        assert await here.blocks_known() == [1, 2, 3, 4]


@virtual_time
async def test_nothing_is_recorded_when_it_is_off(tmp_path: Path) -> None:
    async with node(tmp_path, seconds=0) as here:
        handle = here.open()
        assert type(handle.view) is StoredFile
        await handle.boot()
        await trio.sleep(1000)
        assert here.traces.status()["known"] == 0


@virtual_time
async def test_who_reads_all_of_an_image_is_no_boot_and_no_burden(tmp_path: Path) -> None:
    size = 128 * MIB
    async with node(tmp_path) as here:
        guest, copier = here.open(1, size), here.open(1, size)
        for offset in range(0, size, MIB):
            await copier.read(offset, MIB)
            if offset % (8 * MIB) == 0:
                await guest.read((offset * 7919) % size // BLOCK * BLOCK, 4096)
        assert not copier.is_recorded, "long before the end"
        assert guest.is_recorded
        await until(lambda: here.traces.recorded == 1)
        assert len(await here.blocks_known()) == 16, "what the guest read"


@virtual_time
async def test_a_scan_alone_leaves_no_trace(tmp_path: Path) -> None:
    size = 128 * MIB
    async with node(tmp_path) as here:
        copier = here.open(1, size)
        for offset in range(0, size, MIB):
            await copier.read(offset, MIB)
        await trio.sleep(2 * SECONDS)
        assert here.traces.status() | {"known": 0, "recorded": 0, "recording": 0} == here.traces.status()


@virtual_time
async def test_a_warm_image_with_a_trace_is_not_recorded_and_one_without_is(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        full = [*range(0, 1000, 10)]
        await here.record(blocks=full)
        again = here.open()
        assert type(again.view) is StoredFile
        other = here.open(3)
        await other.boot([1])
        await until(lambda: here.traces.recorded == 2)
        assert here.open(3).is_recorded, "that was a look at its header"


@virtual_time
async def test_what_is_recorded_at_the_end_of_the_daemon_is_kept(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        handle = here.open()
        await handle.boot()
        assert here.traces.recorded == 0
    async with node(tmp_path) as again:
        assert again.traces.status()["known"] == 1
        assert await again.blocks_known() == BOOT


@virtual_time
async def test_a_resized_end_is_not_recorded(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        stored = here.way.stored(1, 100_000)
        from cachefs.views.resized import ResizedFile

        view = here.traces.opened(stored, ResizedFile(stored, here.way.blocks, 10 * MIB), lambda: None)
        assert view.size == 10 * MIB
        for offset in (5 * MIB, 90_000, 9 * MIB):
            now = view.read_now(offset, 20_000)
            data = bytes(now) if now is not None else bytes(await view.read(offset, 20_000))
            inside = content(1, offset, 100_000) if offset < 100_000 else b""
            assert data == inside + bytes(20_000 - len(inside))
        await until(lambda: here.traces.recorded == 1)
        assert await here.blocks_known() == [1]


# ── Replaying ─────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_the_next_cold_open_has_the_trace_in_few_requests_in_order(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        here.close(await here.record())
        assert await here.blocks_known() == BOOT
        await here.evict()
        asked = len(here.source.requests)
        here.open()
        await here.calm()
        requests = here.source.requests[asked:]
        blocks = asked_blocks(here.source, asked)
        assert set(BOOT) <= set(blocks)
        assert len(set(blocks)) == len(blocks)
        assert len(blocks) <= len(BOOT) + 6, "what lies between two that are close, and no more"
        assert len(requests) <= 12
        first_need = [
            min(BOOT.index(b) for b in range(r.extent.start // BLOCK, r.extent.end // BLOCK) if b in BOOT)
            for r in requests
        ]
        assert first_need == sorted(first_need)
        assert here.source.at_once_max > 2
        assert here.traces.status() | {"replayed": 1} == here.traces.status()
        # And then the guest needs nothing else.
        await here.open().boot()
        assert len(here.source.requests) == asked + len(requests)


@virtual_time
async def test_a_guest_is_as_fast_as_its_trace(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        began_s = trio.current_time()
        guest = here.open()
        await guest.boot(think_s=0.001)
        cold_s = trio.current_time() - began_s
        await until(lambda: here.traces.recorded == 1)
        here.close(guest)
        await here.way.settled()
        await here.evict()
        began_s = trio.current_time()
        await here.open().boot(think_s=0.001)
        assert trio.current_time() - began_s < cold_s / 2


@virtual_time
async def test_it_outlives_the_daemon_and_is_replayed_once(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        here.close(await here.record())
        await here.evict()
    async with node(tmp_path) as again:
        handle = again.open()
        again.open()
        await again.calm()
        again.open()
        await again.calm()
        blocks = asked_blocks(again.source)
        assert set(BOOT) <= set(blocks)
        assert len(set(blocks)) == len(blocks)
        await handle.boot()
        assert asked_blocks(again.source) == blocks


@virtual_time
async def test_another_image_of_the_same_bytes_has_the_same_trace(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        await here.record(1)
        here.open(2)
        await here.calm()
        assert {r.image for r in here.source.requests} == {1, 2}
        assert set(BOOT) <= {
            b for r in here.source.of(2) for b in range(r.extent.start // BLOCK, r.extent.end // BLOCK)
        }
        here.open(3)
        await trio.sleep(10)
        assert not here.source.of(3)


@virtual_time
async def test_a_trace_of_another_size_is_not_used(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        await here.record(1)
        here.open(2, SIZE + BLOCK)
        await trio.sleep(10)
        assert not here.source.of(2)


@virtual_time
async def test_a_trace_by_id_goes_on_under_the_hash(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        name = here.names.pop(1)
        await here.record(1, [1, 2, 3])
        here.names[1] = name
        here.close(await here.record(1, [4, 5, 6]))
        assert here.traces.status()["known"] == 1
        assert await here.blocks_known() == [4, 5, 6, 1, 2, 3]


@virtual_time
async def test_only_what_is_absent_is_fetched(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        here.close(await here.record())
        # The span of blocks 700 to 702 goes, and of 300 to 303.
        view = here.way.stored(1, SIZE)
        gone = [SpanNo(b * BLOCK // SPAN) for b in (700, 300)]
        await here.way.store.evict([(view.number, span) for span in gone])
        asked = len(here.source.requests)
        await trio.sleep(AGAIN_S)
        here.open()
        await here.calm()
        assert set(asked_blocks(here.source, asked)) <= {700, 701, 702, 300, 301, 302, 303}
        assert set(asked_blocks(here.source, asked)) >= {700, 701, 702, 300, 303}


@virtual_time
async def test_a_guest_joins_the_request_that_is_to_bring_its_block(tmp_path: Path) -> None:
    """Also one that waits for its turn; and then it is first."""
    source = ScriptedSource(rate=2e6)
    far = [n * 50 for n in range(1, 20)]
    async with node(tmp_path, source, connections=4) as here:
        here.close(await here.record(blocks=far))
        await here.evict()
        asked = len(source.requests)
        guest = here.open()
        await until(lambda: len(source.requests) > asked)
        assert len(source.requests) - asked <= 3, "the rest waits for a place"
        began_s = trio.current_time()
        await guest.read(far[-1] * BLOCK, 4096)
        took_s = trio.current_time() - began_s
        assert took_s < 4 * BLOCK / 2e6 + 0.1
        await here.calm()
        assert sorted(asked_blocks(source, asked)) == far, "each once"
        assert source.requests[asked + 3].extent.start == far[-1] * BLOCK, "in the place that is kept for guests"


@virtual_time
async def test_it_gives_way_to_a_guest_who_wants_something_else(tmp_path: Path) -> None:
    rate = 5e6
    source = ScriptedSource(rate=rate, piece=8 << 10)
    far = [first + n for first in range(0, 1000, 100) for n in range(16)]
    async with node(tmp_path, source) as here:
        here.close(await here.record(blocks=far))
        await here.evict()
        began_s = trio.current_time()
        await here.way.read(10, BLOCK, 0, 4096)
        alone_s = trio.current_time() - began_s
        await here.way.settled()
        asked = len(source.requests)
        guest = here.open()
        await until(lambda: any(r.got for r in source.requests[asked:]))
        beside = []
        for n in range(5):
            began_s = trio.current_time()
            await here.way.read(11 + n, BLOCK, 0, 4096)
            beside.append(trio.current_time() - began_s)
            await trio.sleep(0.1)
        assert any(r.running for r in source.requests[asked:] if r.image == 1), "it was under way all the time"
        assert max(beside) <= 2 * alone_s + 0.02
        # A guest of the boot itself is no reason to.
        began_s, at = trio.current_time(), sum(r.got for r in source.of(1))
        await guest.read(far[-1] * BLOCK, 4096)
        assert sum(r.got for r in source.of(1)) - at >= 0.8 * rate * (trio.current_time() - began_s) - 8 * BLOCK


@virtual_time
async def test_who_closes_at_once_has_nothing_fetched(tmp_path: Path) -> None:
    source = ScriptedSource(rate=1e6)
    far = [n * 50 for n in range(1, 20)]
    async with node(tmp_path, source, connections=4) as here:
        here.close(await here.record(blocks=far))
        await here.evict()
        asked = len(source.requests)
        handle = here.open()
        await until(lambda: len(source.requests) > asked)
        here.close(handle)
        await here.calm()
        assert len(source.requests) - asked <= 4, "what had begun"
        here.open()
        await here.calm()
        assert sorted(asked_blocks(source, asked)) == far, "the next one has it all"


@virtual_time
async def test_an_origin_that_fails_is_not_asked_for_the_rest(tmp_path: Path) -> None:
    away = False
    source = ScriptedSource(act=lambda request: Refuse(OriginUnavailable) if away else None)
    far = [n * 20 for n in range(1, 50)]
    async with node(tmp_path, source, retries=1) as here:
        here.close(await here.record(blocks=far))
        await here.evict()
        away = True
        asked = len(source.requests)
        guest = here.open()
        await here.calm()
        assert len(source.requests) - asked <= 3 * 12, "three tries of those that have a place, not of all 49"
        away = False
        await guest.boot(far[:3])


@virtual_time
async def test_a_store_that_takes_nothing_is_not_asked_to_hold_a_trace(tmp_path: Path) -> None:
    limits = [Limits(1 << 62, 0)]
    async with node(tmp_path, limits=lambda: limits[0]) as here:
        here.close(await here.record())
        await here.evict()
        limits[0] = Limits(0, 0)
        guest = here.open()
        await here.calm()
        asked = len(here.source.requests)
        assert asked < 60
        for _ in range(20):
            here.close(guest)
            guest = here.open()
            await here.calm()
        assert len(here.source.requests) == asked, "not fetched at each open"
        await guest.boot()


@virtual_time
async def test_an_image_that_comes_as_one_stream_is_left_to_it(tmp_path: Path) -> None:
    source = ScriptedSource()
    async with node(tmp_path, source) as here:
        here.close(await here.record(1))
        await here.evict(1)
        source.streams_only.add(1)
        here.way.store.set_origin(here.way.stored(1, SIZE), f.OriginMode.STREAM)
        asked = len(source.requests)
        guest = here.open(1)
        await here.calm()
        assert len(source.requests) == asked
        await guest.boot()
        assert [r.stream for r in source.requests[asked:]] == [True]


@virtual_time
async def test_an_image_that_turns_out_to_be_one_stream_is_fetched_once(tmp_path: Path) -> None:
    source = ScriptedSource(streams_only={2})
    async with node(tmp_path, source) as here:
        await here.record(1)
        guest = here.open(2)
        await guest.boot()
        await here.calm()
        assert sum(r.stream for r in source.of(2)) == 1


@virtual_time
async def test_what_the_link_carries_is_learnt_before_the_rest_is_cut(tmp_path: Path) -> None:
    source = ScriptedSource(rate=200e6, cost_s=0.05)
    dense = [first + n for first in range(0, 1000, 8) for n in range(3)]
    async with node(tmp_path, source) as here:
        here.close(await here.record(blocks=dense))
        await here.evict()
    source = ScriptedSource(rate=200e6, cost_s=0.05)
    async with node(tmp_path, source) as again:
        again.open()
        await again.calm()
        assert set(dense) <= set(asked_blocks(source))
        lengths = [extent.length for extent in source.extents]
        assert max(lengths[len(lengths) // 2 :]) > 1.5 * max(lengths[:5])


@virtual_time
async def test_a_link_that_was_taken_for_a_faster_one_is_noticed_on_the_way(tmp_path: Path) -> None:
    """On a fast link the gaps cost less than requests of their own, and nearly all of the image would come."""
    sparse = list(range(0, SIZE // BLOCK, 8))
    async with node(tmp_path) as here:
        here.close(await here.record(blocks=sparse))
        await here.evict()
    source = ScriptedSource(rate=25e6, cost_s=0.02)
    async with node(tmp_path, source) as again:
        again.way.fetcher.link.observe(0.1, 100 * MIB, 100 * MIB / 1e9)
        again.open()
        await again.calm()
        assert set(sparse) <= set(asked_blocks(source))
        assert not source.doubled
        first = source.extents[0]
        assert first.length > 2 * MIB, "as on a fast link"
        assert sum(extent.length for extent in source.extents) < 0.75 * SIZE
        assert source.extents[-1].length == BLOCK, "as on this one"
        assert again.traces.bytes_replayed == sum(extent.length for extent in source.extents)


class Swinging(Link):
    """It is said to carry something else at each look."""

    @property
    def rate(self) -> float:
        self.looks = getattr(self, "looks", 0) + 1
        return (20e6, 200e6)[self.looks % 2]

    @rate.setter
    def rate(self, measured: float) -> None:
        pass


@virtual_time
async def test_what_is_here_already_is_no_end_of_a_replay_when_the_link_changes(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        here.close(await here.record())
        view = here.way.stored(1, SIZE)
        await here.way.store.evict([(view.number, SpanNo(span)) for span in range(1, view.spans)])
    source = ScriptedSource()
    async with node(tmp_path, source) as again:
        again.way.fetcher.link = Swinging()
        again.open()
        await again.calm()
        assert {block for block in BOOT if block * BLOCK >= SPAN} <= set(asked_blocks(source))


@virtual_time
async def test_a_link_that_swings_without_end_is_not_followed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = list(range(0, SIZE // BLOCK, 20))
    plans = 0

    def planned(needed: Iterable[Extent], pace: trace.Pace) -> list[Extent]:
        nonlocal plans
        plans += 1
        return requests(needed, pace)

    requests = trace.requests
    async with node(tmp_path) as here:
        here.close(await here.record(blocks=far))
        await here.evict()
    monkeypatch.setattr(trace, "requests", planned)
    source = ScriptedSource(cost_s=5.0)
    async with node(tmp_path, source) as again:
        again.way.fetcher.link = Swinging()
        again.open()
        await again.calm()
        assert set(far) <= set(asked_blocks(source))
        assert not source.doubled
        assert again.traces.bytes_replayed == sum(extent.length for extent in source.extents)
        assert 1 < plans <= module.PLANS_MAX


@virtual_time
async def test_an_image_that_is_condemned_ends_its_replay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = list(range(0, SIZE // BLOCK, 5))
    async with node(tmp_path) as here:
        here.close(await here.record(blocks=far))
        await here.evict()
        asked = len(here.source.requests)
        here.way.fetcher.link.observe(0.02, 100 * MIB, 20.0)  # Slow: each is a request of its own.
        guest = here.open()
        await until(lambda: guest.stored.cached > 0)
        guest.stored.condemn("its hash is another")
        await here.calm()
        assert len(here.source.requests) - asked < len(far) // 2
    # Of this module alone: what other tests repeated may be said any moment.
    mine = [record for record in caplog.records if record.name == module.__name__]
    assert not [record for record in mine if record.levelname == "ERROR"]


@virtual_time
async def test_a_miss_behind_the_trace_is_a_miss_as_ever(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        here.close(await here.record())
        await here.evict()
        guest = here.open()
        async with trio.open_nursery() as readers:
            for block in (600, 601, 60, *BOOT):
                readers.start_soon(guest.read, block * BLOCK, 4096)
        await here.calm()
        assert not here.source.doubled


# ── Before hydration ──────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_hydration_is_told_what_the_trace_lacks(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        assert list(here.traces.before_hydration(here.way.stored(3, SIZE))) == []
        handle = await here.record()
        assert list(here.traces.before_hydration(handle.stored)) == []
        here.close(handle)
        await here.evict()
    source = ScriptedSource()
    async with node(tmp_path, source) as again:
        view = again.way.stored(1, SIZE)
        lacking = list(again.traces.before_hydration(view))
        assert lacking[:2] == [Extent(0, BLOCK), Extent(700 * BLOCK, 703 * BLOCK)]
        assert len(lacking) < len(BOOT)
        for extent in lacking:
            await again.way.blocks.hydrate(view, extent)
        await again.way.settled()
        assert set(BOOT) <= set(asked_blocks(source))
        assert len(source.requests) == len(lacking)
        assert list(again.traces.before_hydration(view)) == []


@virtual_time
async def test_while_it_is_replayed_hydration_is_told_nothing(tmp_path: Path) -> None:
    source = ScriptedSource(rate=1e6)
    async with node(tmp_path, source) as here:
        here.close(await here.record())
        await here.evict()
        here.open()
        view = here.way.stored(1, SIZE)
        assert here.traces.is_replaying(view), "from the open on"
        assert list(here.traces.before_hydration(view)) == []
        await here.calm()
        assert not here.traces.is_replaying(view)


@virtual_time
async def test_a_whole_hydration_comes_after_the_trace(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        here.close(await here.record())
        await here.evict()
        asked = len(here.source.requests)
        handle = here.open()
        hydrator = Hydrator(
            here.way.store,
            here.way.fetcher,
            here.way.blocks,
            here.leases,
            before_hydration=here.traces.before_hydration,
            is_replaying=here.traces.is_replaying,
        )
        here.traces.on_replayed = hydrator.look
        await here.way.services.start(hydrator.run)
        hydrator.opened(handle.stored)
        await until(lambda: handle.stored.complete)
        blocks = asked_blocks(here.source, asked)
        assert len(blocks) == len(set(blocks)) == SIZE // BLOCK
        last_of_trace = max(blocks.index(block) for block in BOOT)
        early = [b for b in blocks[:last_of_trace] if b not in BOOT]
        assert len(early) <= 6, "and what lies between two blocks of one request"


# ── Boot sets ─────────────────────────────────────────────────────────────────────────────────────────


def boot_set(here: Node, view: StoredView) -> set[int]:
    return {span for span in range(view.spans) if here.uses.flags(view.number, SpanNo(span)) & UseFlag.BOOT}


@virtual_time
async def test_the_trace_is_what_eviction_spares_last(tmp_path: Path) -> None:
    spans = {block * BLOCK // SPAN for block in BOOT}
    async with node(tmp_path) as here:
        handle = await here.record()
        assert boot_set(here, handle.stored) == spans
        here.uses.forget(handle.stored.number, SpanNo(0))
        here.close(handle)
        await trio.sleep(AGAIN_S)
        here.open()
        await here.calm()
        assert boot_set(here, handle.stored) == spans, "it is again, once somebody opens it"


# ── Import and export ─────────────────────────────────────────────────────────────────────────────────


async def ask(here: Node, command: str, **operands: Any) -> Any:
    return await here.traces.handlers()[command]({"command": command, **operands})


@virtual_time
async def test_a_trace_travels_to_another_store(tmp_path: Path) -> None:
    async with node(tmp_path / "one") as here:
        await here.record()
        (row,) = await ask(here, "trace-list")
        assert row["content"] == HASHES[1]
        assert row["images"] == [image_id(1), image_id(2)]
        assert (row["kind"], row["size"], row["blocks"]) == ("original", SIZE, len(BOOT))
        fields = await ask(here, "trace-export", content=row["content"], kind=row["kind"])
    source = ScriptedSource()
    async with node(tmp_path / "two", source) as there:
        assert await ask(there, "trace-import", traces=[fields]) == 1
        assert (await ask(there, "trace-export", content=HASHES[1], kind="original")) == fields
    async with node(tmp_path / "two", source) as there:
        guest = there.open(2)
        assert guest.is_recorded, "it is cold, and may differ here"
        await there.calm()
        assert set(BOOT) <= set(asked_blocks(source))
        asked = len(source.requests)
        await guest.boot()
        assert len(source.requests) == asked


def named(content_: str, *blocks: int, size: int = SIZE) -> dict[str, Any]:
    runs = tuple(TraceRun(block, 1, 0) for block in blocks)
    return to_fields(NamedTrace(content_, ViewKind.ORIGINAL, TraceRecord(size, 1.0, 1.0, 0, runs)))


@virtual_time
async def test_of_a_request_with_one_bad_trace_nothing_is_taken(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        good, bad = named(HASHES[1], 1), named(HASHES[3], 1) | {"runs": [[1, 2, 0], [2, 1, 0]]}
        with pytest.raises(TraceRefused, match="twice"):
            await ask(here, "trace-import", traces=[good, bad])
        assert here.traces.status()["known"] == 0


@virtual_time
async def test_what_is_imported_takes_the_place_of_what_was_known(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        await here.record()
        await ask(here, "trace-import", traces=[named(HASHES[1], 7, 3)])
        assert await here.blocks_known() == [7, 3]


@virtual_time
async def test_the_number_of_traces_and_their_bytes_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRACES_MAX", 5)
    async with node(tmp_path) as here:
        for n in range(8):
            await ask(here, "trace-import", traces=[named(f"sha512:{n:0128x}", n)])
            await trio.sleep(10)
        rows = await ask(here, "trace-list")
        assert [row["content"] for row in rows] == [f"sha512:{n:0128x}" for n in range(3, 8)]
        assert len(here.way.store.items(Table.TRACES)) == 5
        monkeypatch.setattr(module, "RECORDS_BYTES_MAX", 60)
        await ask(here, "trace-import", traces=[named(HASHES[1], 1)])
        (row,) = await ask(here, "trace-list")
        assert row["content"] == HASHES[1], "the last one stays"


@pytest.mark.parametrize("record", [b"", b"x" * 50, f.seal(Table.TRACES, b"\x01" + HASHES[1].encode(), b"short")])
def test_a_record_that_cannot_be_read_is_forgotten(tmp_path: Path, record: bytes) -> None:
    @virtual_time
    async def body() -> None:
        key = b"\x01" + HASHES[1].encode()
        async with node(tmp_path) as here:
            here.way.store.put(Table.TRACES, key, record)
        async with node(tmp_path) as again:
            assert again.traces.status()["known"] == 0
            again.open()
        async with node(tmp_path) as third:
            assert third.way.store.get(Table.TRACES, key) is None

    body()


@virtual_time
async def test_a_record_that_nobody_could_have_made_is_forgotten_when_it_is_used(tmp_path: Path) -> None:
    key = f.trace_key(HASHES[1], ViewKind.ORIGINAL)
    twice = TraceRecord(SIZE, 1.0, 1.0, 1, (TraceRun(1, 2, 0), TraceRun(2, 1, 0)))
    async with node(tmp_path) as here:
        here.way.store.put(Table.TRACES, key, twice.encode(key))
    async with node(tmp_path) as again:
        assert again.traces.status()["known"] == 1
        guest = again.open()
        await again.calm()
        assert again.traces.status()["known"] == 0
        assert not again.source.requests
        await guest.boot()
        await until(lambda: again.traces.recorded == 1)
        assert await again.blocks_known() == BOOT


# ── What goes wrong ───────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_image_that_ends_while_it_is_recorded_and_replayed(tmp_path: Path) -> None:
    source = ScriptedSource(rate=1e6)
    async with node(tmp_path, source) as here:
        here.close(await here.record())
        await here.evict()
        asked = len(source.requests)
        guest = here.open()
        assert guest.is_recorded
        await until(lambda: len(source.requests) > asked)
        here.way.store.end_views(image_id(1))
        await here.calm()
        await trio.sleep(2 * SECONDS)
        assert here.traces.status()["recording"] == 0
        assert await here.blocks_known() == BOOT, "what was known of its content stays"
        assert not guest.is_recorded


@virtual_time
async def test_the_daemon_may_end_at_any_moment_of_a_replay(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        here.close(await here.record())
        await here.evict()
    for moment in (0, 1, 5, 6, 8):
        source = ScriptedSource(script={moment: Stall(trio.Event(), 100)})
        async with node(tmp_path, source) as here:
            here.open()
            await until(lambda source=source, moment=moment: len(source.requests) > moment)  # type: ignore[misc]
            await here.evict()
    async with node(tmp_path) as last:
        assert await last.blocks_known() == BOOT
        await last.open().boot()


@virtual_time
async def test_many_handles_and_images_at_once_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECORDINGS_MAX", 4)
    monkeypatch.setattr(module, "FILES_MAX", 3)
    async with node(tmp_path) as here:
        handles = [here.open(image) for image in range(10, 20)]
        assert [handle.is_recorded for handle in handles] == [True] * 4 + [False] * 6
        await handles[0].boot([5, 6, 7], 0)
        lookers = [here.open(10) for _ in range(20)]
        for handle in [*handles, *lookers]:
            await handle.boot([1], 0)
        assert handles[0].is_recorded, "the guest"
        assert [handle.is_recorded for handle in lookers] == [False] * 18 + [True] * 2
        await until(lambda: here.traces.recorded == 4)
        assert not any(handle.is_recorded for handle in [*handles, *lookers])


@virtual_time
async def test_what_all_may_note_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTED_MAX", trace.SCAN_BLOCKS + 10)
    size = 1024 * MIB
    async with node(tmp_path, ScriptedSource(rate=1e9, cost_s=0.0001)) as here:
        guests = [here.open(1, size), here.open(1, size)]
        for n in range(trace.SCAN_BLOCKS + 100):
            for guest in guests:
                await guest.read(n * 7919 % (size // BLOCK) * BLOCK, 512)
        assert not any(guest.is_recorded for guest in guests)
        await until(lambda: here.traces.recorded == 1)


@virtual_time
async def test_a_bug_refuses_no_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with node(tmp_path) as here:

        def names_of(image: str) -> Sequence[str]:
            raise RuntimeError("a bug")

        here.traces._names_of = names_of
        guest = here.open()
        assert type(guest.view) is StoredFile
        await guest.boot([1])
        assert "unexpected failure of a boot trace" in caplog.text
