"""What is counted on the way to the origin, and when hits are timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pyfuse3
import pytest
import trio
from trio.testing import MockClock

from cachefs.config import MountConfig
from cachefs.errors import ImageGone, OriginBusy, OriginError, OriginUnavailable
from cachefs.fuse import Filesystem
from cachefs.hit_times import EVERY_S, SAMPLE_HITS, HitTimes
from cachefs.plan.extents import Extent
from cachefs.sources import Sink, Timing
from cachefs.sources.measured import Asked, Measured
from tests.test_glance_source import Collected

SIZE = 1000


@dataclass
class Origin:
    """Gives `gives` bytes after `first_s`, then the rest of `whole_s` passes; or fails with `error` then."""

    gives: int = SIZE
    first_s: float = 1.0
    whole_s: float = 3.0
    error: Exception | None = None
    asked: list[Extent] = field(default_factory=list)

    async def fetch(self, image: str, size: int, extent: Extent, sink: Sink) -> Timing:
        self.asked.append(extent)
        await trio.sleep(self.first_s)
        room = await sink.room()
        room[: self.gives] = b"x" * self.gives
        sink.arrived(self.gives)
        await trio.sleep(self.whole_s - self.first_s)
        if self.error is not None:
            raise self.error
        return Timing(self.first_s, self.whole_s - self.first_s)

    async def stream(self, image: str, size: int, sink: Sink) -> Timing:
        return await self.fetch(image, size, Extent(0, size), sink)

    async def images(self) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        return [{"id": "a"}]

    async def image(self, image: str) -> dict[str, Any]:
        return {"id": image}


def run(main: Any) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_what_goes_well_is_timed_and_passed_on() -> None:
    async def main() -> None:
        origin, sink = Origin(), Collected()
        measured = Measured(origin)
        assert await measured.fetch("i", SIZE, Extent(0, SIZE), sink) == Timing(1.0, 2.0)
        assert len(sink.data) == SIZE
        await measured.stream("i", SIZE, Collected())
        assert await measured.images() == [{"id": "a"}]
        assert await measured.image("i") == {"id": "i"}
        assert dict(measured.requests) == {(asked, "ok"): 1 for asked in Asked}
        assert dict(measured.bytes) == {Asked.RANGE: SIZE, Asked.STREAM: SIZE}
        assert measured.seconds[Asked.RANGE].now().sum == pytest.approx(3.0)
        assert measured.first_byte[Asked.STREAM].now().sum == pytest.approx(1.0)
        assert not any(measured.under_way.values())

    run(main)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OriginUnavailable("i", "cut"), "origin_unavailable"),
        (OriginBusy("i", "later", 7.0), "origin_busy"),
        (ImageGone("i"), "image_gone"),
        (ValueError("a bug"), "unexpected"),
    ],
)
def test_what_fails_is_counted_by_its_kind_and_raised_as_it_is(error: Exception, word: str) -> None:
    async def main() -> None:
        measured = Measured(Origin(gives=300, error=error))
        for ask in (
            lambda: measured.fetch("i", SIZE, Extent(0, SIZE), Collected()),
            lambda: measured.images(),
        ):
            with pytest.raises(type(error)) as caught:
                await ask()
            assert caught.value is error
        assert dict(measured.requests) == {(Asked.RANGE, word): 1, (Asked.IMAGES, word): 1}
        assert measured.bytes[Asked.RANGE] == 300, "what came before is counted"
        assert measured.seconds[Asked.RANGE].count == 0, "a failure is no latency"
        assert not any(measured.under_way.values())

    run(main)


def test_what_nobody_waits_for_any_more_is_abandoned() -> None:
    async def main() -> None:
        measured = Measured(Origin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(measured.fetch, "i", SIZE, Extent(0, SIZE), Collected())
            await trio.sleep(0.5)
            assert measured.under_way[Asked.RANGE] == 1
            nursery.cancel_scope.cancel()
        assert dict(measured.requests) == {(Asked.RANGE, "abandoned"): 1}
        assert measured.under_way[Asked.RANGE] == 0

    run(main)


# ── Hits ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Opened:
    """What stands behind a handle."""

    view: Any


class View:
    def __init__(self) -> None:
        self.present = True
        self.failure: OriginError | None = None

    def read_now(self, offset: int, length: int) -> bytes | None:
        return b"x" * length if self.present else None

    async def read(self, offset: int, length: int) -> bytes:
        if self.failure is not None:
            raise self.failure
        return b"y" * length


def filesystem(view: View) -> Filesystem:
    nothing = cast(Any, None)
    made = Filesystem(MountConfig("/m", True, 0, 0, 0o444, 1.0), nothing, nothing, nothing, nothing, nothing, 1.0)
    made._open[7] = cast(Any, Opened(view))
    return made


def test_as_many_hits_are_timed_as_were_asked_for_and_no_more() -> None:
    async def main() -> None:
        view = View()
        fs = filesystem(view)
        plain = fs.read
        for _ in range(5):
            assert await fs.read(7, 0, 10) == b"x" * 10
        assert fs.timed_hits.seconds.count == 0
        fs.time_hits(3)
        assert fs.read != plain
        view.present = False
        assert await fs.read(7, 0, 10) == b"y" * 10, "a miss is no hit"
        view.present = True
        for _ in range(10):
            assert await fs.read(7, 0, 10) == b"x" * 10
        assert (fs.timed_hits.seconds.count, fs.timed_hits.bytes) == (3, 30)
        assert fs.hits == 15, "all are counted"
        assert fs.read == plain, "it is as if nothing had been"
        fs.time_hits(2)
        fs.time_hits(4)
        for _ in range(10):
            await fs.read(7, 0, 10)
        assert fs.timed_hits.seconds.count == 7
        assert fs.read == plain

    run(main)


def test_a_read_that_fails_is_counted_by_why_timed_or_not() -> None:
    async def main() -> None:
        view = View()
        fs = filesystem(view)
        view.present, view.failure = False, OriginBusy("i", "later")
        for timed in (False, True):
            if timed:
                fs.time_hits(1)
            with pytest.raises(pyfuse3.FUSEError):
                await fs.read(7, 0, 10)
        assert dict(fs.failed_reads) == {"origin_busy": 2}
        assert fs.timed_hits.seconds.count == 0

    run(main)


def test_hits_are_timed_now_and_then_and_not_in_step_with_a_clock() -> None:
    asked: list[tuple[float, int]] = []

    class Sampled:
        def time_hits(self, hits: int) -> None:
            asked.append((trio.current_time(), hits))

    async def main() -> None:
        with trio.move_on_after(200 * EVERY_S):
            await HitTimes(Sampled()).run()

    run(main)
    assert {hits for _, hits in asked} == {SAMPLE_HITS}
    assert 150 < len(asked) < 260
    pauses = [round(later - sooner, 3) for (sooner, _), (later, _) in pairwise(asked)]
    assert len(set(pauses)) > 100
