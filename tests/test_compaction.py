"""Segments with little life left: which are moved, and that nothing else changes. Rule: bytes, blocks, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from cachefs.compactor import BATCH, COMPACT_EVERY_S, LOOK_S, Compactor
from cachefs.plan import compaction
from cachefs.plan.compaction import AT_ONCE, EXTENTS_MAX, SPARE, Sealed
from cachefs.plan.extents import PAGE
from cachefs.store.check import check
from cachefs.store.format import SEGMENT_SIZE, SegmentNo, SpanNo
from tests import stores
from tests.stores import SPAN, land_all, random_bytes, read, running, segment_file, view_of

GIB = 1 << 30


def sealed(*rows: tuple[int, int, int]) -> dict[SegmentNo, Sealed]:
    return {SegmentNo(n): Sealed(end, live, extents) for n, (end, live, extents) in enumerate(rows, 1)}


@pytest.mark.parametrize(
    ("segments", "live", "moved"),
    [
        pytest.param(sealed(), 0, [], id="nothing"),
        pytest.param(sealed(*[(GIB, PAGE, 1)] * SPARE), SPARE * PAGE, [], id="few enough"),
        pytest.param(sealed(*[(GIB, PAGE, 1)] * (SPARE + 3)), PAGE, [1, 2], id="those that are too many"),
        pytest.param(
            sealed((GIB, 9, 1), (GIB, 5, 1), *[(GIB, GIB, 1)] * 99), 9, [2, 1], id="the least alive first"
        ),
        pytest.param(sealed(*[(GIB, GIB // 2 + 1, 1)] * 30), 9, [], id="half alive stays"),
        pytest.param(sealed(*[(GIB, 0, 1)] * 30), 9, [], id="the lifeless are removed, not moved"),
        pytest.param(sealed((GIB, 9, EXTENTS_MAX), (GIB, 99, EXTENTS_MAX + 1)), GIB, [2], id="too many extents"),
        pytest.param(sealed((GIB, GIB, EXTENTS_MAX + 1)), GIB, [], id="extents of what is alive"),
        pytest.param(sealed(*[(GIB, 9, 1)] * 99), 9, list(range(1, AT_ONCE + 1)), id="not all at once"),
        pytest.param(sealed(*[(GIB, GIB // 4, 1)] * 28), 7 * GIB, list(range(1, 8)), id="by what is alive"),
    ],
)
def test_what_is_worth_moving(segments: dict[SegmentNo, Sealed], live: int, moved: list[int]) -> None:
    assert compaction.worth_moving(segments, live) == moved


def test_the_bound_is_twice_what_is_needed() -> None:
    assert compaction.segments_max(0) == SPARE
    assert compaction.segments_max(10 * SEGMENT_SIZE + 1) == 22 + SPARE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def never(*_: object) -> bool:
    return False


def test_a_store_of_leftovers_is_compacted_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("store.landing", "plan.compaction"):
        monkeypatch.setattr(f"cachefs.{module}.SEGMENT_SIZE", 4 * SPAN)
    content = random_bytes(1, 64 * SPAN)
    kept = range(0, 64, 8)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            await land_all(store, view, content)
            assert len(store.segments.files) == 16
            await store.evict([(view.number, SpanNo(n)) for n in range(64) if n not in kept])
            assert await store.remove_lifeless() == 7, "to the last one something may be appended"
            compactor = Compactor(store, never)
            async with trio.open_nursery() as nursery:

                async def read_on() -> None:
                    while True:
                        for n in kept:
                            assert await read(view, n * SPAN, SPAN) == content[n * SPAN :][:SPAN]
                            await trio.lowlevel.checkpoint()

                nursery.start_soon(read_on)
                assert await compactor.compact() == 0, "9 segments are within the bound"
                monkeypatch.setattr("cachefs.plan.compaction.SPARE", 0)
                while await compactor.compact():
                    pass
                nursery.cancel_scope.cancel()
            assert len(store.segments.files) <= compaction.segments_max(8 * SPAN)
            assert compactor.moved_bytes >= 4 * SPAN
            assert store.usage().used <= 9 * SPAN
            for n in range(64):
                assert await read(view, n * SPAN, SPAN) == (content[n * SPAN :][:SPAN] if n in kept else None)

    trio.run(main)
    assert check(folder).findings == []
    assert stores.leaked(folder) == []


def test_extents_are_counted(folder: Path) -> None:
    content = random_bytes(2, 4 * SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            await land_all(store, view, content)
            await store.writer.flush()
            before = store.segments.extents(SegmentNo(1))
            await store.evict([(view.number, SpanNo(n)) for n in (0, 2)])
            assert before >= 1
            assert store.segments.extents(SegmentNo(1)) >= 2
            assert store.segments.extents(SegmentNo(99)) == 0
            rows, live = store.sealed_segments()
            assert (rows, live) == ({}, 2 * SPAN), "the one that is appended to is not sealed"

    trio.run(main)


def test_moving_waits_while_guests_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("store.landing", "plan.compaction"):
        monkeypatch.setattr(f"cachefs.{module}.SEGMENT_SIZE", 4 * SPAN)
    monkeypatch.setattr("cachefs.plan.compaction.SPARE", 0)
    monkeypatch.setattr("cachefs.plan.compaction.segments_max", lambda live: 1)
    content = random_bytes(4, 12 * SPAN)
    waiting = True

    async def main() -> None:
        nonlocal waiting
        async with running(folder) as store, trio.open_nursery() as nursery:
            view = view_of(store, 1, len(content))
            await land_all(store, view, content)
            await store.evict([(view.number, SpanNo(n)) for n in range(10) if n % 4])
            busy: Callable[[], bool] = lambda: waiting  # noqa: E731
            compactor = Compactor(store, busy)
            await nursery.start(compactor.run)
            await trio.sleep(COMPACT_EVERY_S + 2 * LOOK_S)
            assert compactor.moved_bytes == 0
            waiting = False
            await trio.sleep(2 * LOOK_S)
            assert compactor.removed_segments == 2
            assert compactor.moved_bytes == 2 * SPAN
            assert not segment_file(folder, 1).exists()
            assert BATCH * 16 * PAGE >= 2 * SPAN, "about 4 MiB at once"
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0.05))
    assert check(folder).sound
