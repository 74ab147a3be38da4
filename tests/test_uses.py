"""What is known of the use of spans: first and second touch, boot sets, over restarts, and beside the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from cachefs import uses as module
from cachefs.plan.eviction import Group
from cachefs.store import format as f
from cachefs.store.format import USES_SPANS, SpanNo, Table, UseFlag, UsesRecord, ViewNo
from cachefs.uses import BOOT_BYTES_MAX, LOOK_S, RETOUCH_S, SAVE_S, SETTLED_S, Uses
from tests.evictions import EPOCH_S, FakeStore, FakeView, wall_clock
from tests.flow import virtual_time

NONE, TWICE, BOOT = UseFlag(0), UseFlag.TWICE, UseFlag.BOOT


def last(uses: Uses, view: FakeView, span: int) -> int:
    """Seconds since the test's beginning; -EPOCH_S when it is not here."""
    return uses.last_s(view.number, SpanNo(span)) - EPOCH_S


def flags(uses: Uses, view: FakeView, span: int) -> UseFlag:
    return uses.flags(view.number, SpanNo(span))


@asynccontextmanager
async def looking(store: FakeStore) -> AsyncIterator[Uses]:
    """Uses whose loop runs; saved at the end."""
    uses = Uses(store, wall_clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(uses.run)
        await uses.ready.wait()
        yield uses
        uses.save()
        nursery.cancel_scope.cancel()


# ── Touches ───────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_what_lands_is_known_and_touched_once() -> None:
    store = FakeStore()
    view = store.add_view(1)
    uses = Uses(store, wall_clock)
    await trio.sleep(7)
    store.land(view, 3, 300)
    assert uses.spans(view.number) == []
    uses.look()
    assert uses.spans(view.number) == [3, 300]
    assert (last(uses, view, 3), flags(uses, view, 3)) == (7, NONE)
    assert last(uses, view, 4) == -EPOCH_S
    assert not any(span_map.used for span_map in view.maps.values())


@virtual_time
async def test_a_reader_that_passes_over_a_span_touches_it_once_whatever_it_reads() -> None:
    store = FakeStore()
    view = store.add_view(1)
    uses = Uses(store, wall_clock)
    store.land(view, 0)
    for _ in range(RETOUCH_S // 10):
        uses.look()
        await trio.sleep(10)
        store.read(view, 0)
    assert flags(uses, view, 0) == NONE
    uses.look()  # A minute after it came.
    assert (last(uses, view, 0), flags(uses, view, 0)) == (RETOUCH_S, TWICE)


@virtual_time
async def test_after_the_second_touch_the_last_use_is_known_to_the_look() -> None:
    store = FakeStore()
    view = store.add_view(1)
    uses = Uses(store, wall_clock)
    store.land(view, 0)
    uses.look()
    for at in (100, 110, 5000):
        await trio.sleep(at - trio.current_time())
        store.read(view, 0)
        uses.look()
        assert (last(uses, view, 0), flags(uses, view, 0)) == (at, TWICE)
    await trio.sleep(1000)
    uses.look()  # Nobody has read it since.
    assert last(uses, view, 0) == 5000


@virtual_time
async def test_a_read_writes_nothing_and_is_seen_within_seconds() -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store) as uses:
        store.land(view, 0)
        await trio.sleep(LOOK_S + 1)
        assert uses.spans(view.number) == [0]
        for _ in range(25):
            store.read(view, 0)
            await trio.sleep(LOOK_S)
        assert flags(uses, view, 0) == TWICE
        assert store.puts == 0


@virtual_time
async def test_a_map_that_was_forgotten_before_anybody_looked_counts() -> None:
    store = FakeStore()
    view = store.add_view(1)
    uses = Uses(store, wall_clock)
    store.land(view, 5)
    del view.maps[5]
    store.used_and_forgotten.append((view.number, 5))
    uses.look()
    assert uses.spans(view.number) == [5]
    assert not store.used_and_forgotten


@virtual_time
async def test_a_clock_that_was_set_back_makes_nothing_immortal() -> None:
    store = FakeStore()
    view = store.add_view(1)
    ahead = 10**6
    uses = Uses(store, lambda: wall_clock() + ahead)
    store.land(view, 0)
    uses.look()
    uses.save()
    ahead = 0
    store.read(view, 0)
    uses.look()
    assert last(uses, view, 0) == 0
    again = Uses(store, wall_clock)
    await again.load()
    assert last(again, view, 0) == 0


@pytest.mark.parametrize(("clock_s", "kept_s"), [(-5.0, 1), (0.0, 1), (1 << 40, (1 << 32) - 1)])
def test_no_clock_makes_a_span_that_is_here_look_absent(clock_s: float, kept_s: int) -> None:
    store = FakeStore()
    view = store.add_view(1)
    store.land(view, 0)

    @virtual_time
    async def body() -> None:
        uses = Uses(store, lambda: clock_s)
        uses.look()
        assert uses.last_s(view.number, SpanNo(0)) == kept_s

    body()


@virtual_time
async def test_an_image_that_only_claims_to_be_large_costs_nothing() -> None:
    store = FakeStore()
    view = store.add_view(1, size=(1 << 63) - 1)
    uses = Uses(store, wall_clock)
    store.land(view, 0, (1 << 32) - 1)
    uses.look()
    assert len(uses.groups(view.number)) == 2
    assert uses.spans(view.number) == [0, (1 << 32) - 1]


# ── Boot sets ─────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_boot_set_is_noted_before_its_spans_come() -> None:
    store = FakeStore()
    view = store.add_view(1)
    uses = Uses(store, wall_clock)
    uses.set_boot(view.number, [SpanNo(9)])
    assert uses.spans(view.number) == []
    store.land(view, 9)
    uses.look()
    assert (last(uses, view, 9), flags(uses, view, 9)) == (0, BOOT)
    await trio.sleep(RETOUCH_S)
    store.read(view, 9)
    uses.look()
    assert flags(uses, view, 9) == BOOT | TWICE


def boot_set(uses: Uses, view: FakeView) -> set[int]:
    return {
        group.first + i for group in uses.groups(view.number) for i, flag in enumerate(group.flags) if flag & BOOT
    }


def numbers(*spans: int) -> list[SpanNo]:
    return list(map(SpanNo, spans))


@virtual_time
async def test_a_boot_set_takes_the_place_of_the_one_before() -> None:
    store = FakeStore()
    view, other = store.add_view(1), store.add_view(2)
    uses = Uses(store, wall_clock)
    store.land(view, 1, 2)
    uses.look()
    uses.set_boot(view.number, numbers(1, 40))
    uses.set_boot(other.number, numbers(1))
    uses.set_boot(view.number, numbers(40, 2))
    assert (boot_set(uses, view), boot_set(uses, other)) == ({2, 40}, {1})
    assert last(uses, view, 1) == 0, "it is here all the same"
    uses.forget(view.number, SpanNo(2))
    assert boot_set(uses, view) == {40}
    uses.set_boot(view.number, numbers(2))
    assert boot_set(uses, view) == {2}
    uses.set_boot(view.number, [])
    assert boot_set(uses, view) == set()
    uses.save()
    again = Uses(store, wall_clock)
    await again.load()
    assert (boot_set(again, view), boot_set(again, other)) == (set(), {1})
    again.set_boot(other.number, numbers(7))
    assert boot_set(again, other) == {7}, "what was set before the restart is known"


@virtual_time
async def test_a_boot_set_is_bounded_for_each_view() -> None:
    store = FakeStore()
    view = store.add_view(1, size=4 << 30)
    uses = Uses(store, wall_clock)
    most = BOOT_BYTES_MAX // store.span_size
    assert uses.boot_spans_max == most
    uses.set_boot(view.number, numbers(*range(most + 5, 0, -1)))
    assert boot_set(uses, view) == set(range(6, most + 6)), "the first of them"


@virtual_time
async def test_all_boot_sets_together_are_bounded_by_a_share_of_the_store() -> None:
    store = FakeStore()
    views = [store.add_view(n) for n in range(1, 6)]
    room = 10 * store.span_size
    uses = Uses(store, wall_clock, boot_max=lambda: room)
    for view in views[:3]:
        uses.set_boot(view.number, numbers(1, 2, 3, 4))
    assert [len(boot_set(uses, view)) for view in views] == [0, 4, 4, 0, 0], "the oldest is none any more"
    uses.set_boot(views[1].number, numbers(1, 2, 3, 4))
    uses.set_boot(views[3].number, numbers(1, 2, 3, 4))
    assert [len(boot_set(uses, view)) for view in views] == [0, 4, 0, 4, 0]
    uses.set_boot(views[4].number, numbers(*range(30)))
    assert [len(boot_set(uses, view)) for view in views] == [0, 0, 0, 0, 10]
    room = 0
    uses.set_boot(views[0].number, numbers(5, 6))
    assert [len(boot_set(uses, view)) for view in views] == [1, 0, 0, 0, 0], "one span is always spared"


# ── Over restarts ─────────────────────────────────────────────────────────────────────────────────────


def known(uses: Uses, view: FakeView) -> dict[int, tuple[int, int]]:
    return {
        group.first + i: (last_s, flag)
        for group in uses.groups(view.number)
        for i, (last_s, flag) in enumerate(zip(group.last_s, group.flags, strict=True))
        if last_s or flag
    }


@virtual_time
async def test_what_is_known_outlives_the_daemon() -> None:
    store = FakeStore()
    view, other = store.add_view(1, size=1 << 30), store.add_view(2)
    async with looking(store) as uses:
        store.land(view, 0, 255, 256, 700)
        uses.set_boot(view.number, [SpanNo(255)])
        await trio.sleep(100)
        store.read(view, 0)
        store.land(other, 1)
    before = known(uses, view), known(uses, other)
    assert {span: flag for span, (_, flag) in before[0].items()} == {0: TWICE, 255: BOOT, 256: NONE, 700: NONE}
    assert len(store.items(Table.USES)) == 4
    await trio.sleep(3600)
    async with looking(store) as again:
        assert (known(again, view), known(again, other)) == before
        store.read(other, 1)
        await trio.sleep(LOOK_S + 1)
        assert flags(again, other, 1) == TWICE, "it came before the restart, and is used after it"


@virtual_time
async def test_only_what_changed_is_saved_and_not_often() -> None:
    store = FakeStore()
    view = store.add_view(1, size=1 << 40)
    async with looking(store):
        store.land(view, 0, 1, 1000)
        await trio.sleep(SAVE_S - LOOK_S)
        assert store.puts == 0
        await trio.sleep(2 * LOOK_S)
        assert store.puts == 2
        await trio.sleep(3 * SAVE_S)
        assert store.puts == 2
        for _ in range(int(2 * SAVE_S / LOOK_S)):
            store.read(view, 1000)
            await trio.sleep(LOOK_S)
        assert store.puts == 4
    assert store.puts <= 5


@virtual_time
async def test_many_groups_are_saved_and_loaded() -> None:
    store = FakeStore()
    view = store.add_view(1, size=1 << 40)
    uses = Uses(store, wall_clock)
    store.land(view, *range(0, 200 * USES_SPANS, USES_SPANS))
    uses.look()
    uses.save()
    assert len(store.items(Table.USES)) == 200
    again = Uses(store, wall_clock)
    await again.load()
    assert again.spans(view.number) == uses.spans(view.number)


@virtual_time
async def test_the_record_of_a_group_that_is_empty_goes() -> None:
    store = FakeStore()
    view = store.add_view(1)
    uses = Uses(store, wall_clock)
    store.land(view, 1)
    uses.look()
    uses.save()
    assert len(store.items(Table.USES)) == 1
    uses.forget(view.number, SpanNo(1))
    uses.save()
    assert store.items(Table.USES) == []


@virtual_time
async def test_a_view_that_the_store_forgot_is_forgotten() -> None:
    store = FakeStore()
    view = store.add_view(1)
    uses = Uses(store, wall_clock)
    store.land(view, 1)
    uses.look()
    uses.save()
    store.end(view)
    await store.evict([(view.number, SpanNo(1))])
    store.forget_view(view.number)
    uses.save()
    assert store.items(Table.USES) == []
    assert uses.groups(view.number) == []


BAD_RECORDS: list[tuple[bytes, bytes]] = [
    (f.uses_key(ViewNo(1), 0), b""),
    (f.uses_key(ViewNo(1), 0), b"x" * 1288),
    (f.uses_key(ViewNo(1), 0), UsesRecord((9,) * 256, (1,) * 256).encode(f.uses_key(ViewNo(1), 1))),
    (f.uses_key(ViewNo(1), 0), f.seal(Table.USES, f.uses_key(ViewNo(1), 0), b"short")),
    (b"odd", f.seal(Table.USES, b"odd", b"")),
]


@pytest.mark.parametrize(("key", "record"), BAD_RECORDS)
def test_a_record_that_cannot_be_read_is_as_good_as_none(
    key: bytes, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    @virtual_time
    async def body() -> None:
        store = FakeStore()
        view = store.add_view(1)
        store.land(view, 2)
        view.maps.clear()
        store.put(Table.USES, key, record)
        await trio.sleep(50)
        async with looking(store) as uses:
            assert known(uses, view) == {2: (EPOCH_S + 50, NONE)}, "it is here, and counts as used at the start"
        saved = store.records[Table.USES, f.uses_key(view.number, 0)]
        assert UsesRecord.decode(f.uses_key(view.number, 0), saved).last_s[2] == EPOCH_S + 50

    body()
    assert "cannot be read" in caplog.text


# ── Beside the store ──────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_what_is_here_and_not_known_counts_as_used_at_the_start() -> None:
    store = FakeStore()
    view = store.add_view(1)
    store.land(view, 0, 1)
    uses = Uses(store, wall_clock)
    uses.look()
    uses.save()
    store.land(view, 2)  # And a crash before that was seen.
    view.maps.clear()
    await trio.sleep(1000)
    async with looking(store) as again:
        assert known(again, view) == {0: (EPOCH_S, NONE), 1: (EPOCH_S, NONE), 2: (EPOCH_S + 1000, NONE)}
        assert await again.reconcile() == 0


@virtual_time
async def test_what_is_known_and_not_here_is_forgotten_unless_it_has_just_come() -> None:
    store = FakeStore()
    view = store.add_view(1)
    store.land(view, 0, 1)
    uses = Uses(store, wall_clock)
    uses.look()
    uses.set_boot(view.number, [SpanNo(1)])
    store.spans.clear()
    await trio.sleep(SETTLED_S)
    assert await uses.reconcile() == 0
    assert uses.spans(view.number) == [0, 1], "it may be here, and not committed yet"
    await trio.sleep(1)
    await uses.reconcile()
    assert known(uses, view) == {}


@virtual_time
async def test_what_changes_while_the_store_is_compared_stands() -> None:
    store = FakeStore()
    view = store.add_view(1)
    store.land(view, 0, 1)
    store.land(view, 2)
    uses = Uses(store, wall_clock)
    view.maps[2].used = False
    uses.look()
    await trio.sleep(SETTLED_S + 1)
    del store.spans[view.number, SpanNo(0)]

    def resident() -> Any:
        spans = list(store.spans)
        # Meanwhile, on the loop: 0 comes again, and 2 is read.
        trio.from_thread.run_sync(store.land, view, 0)
        trio.from_thread.run_sync(store.read, view, 2)
        trio.from_thread.run_sync(uses.look)
        yield from spans

    store.resident = resident  # type: ignore[method-assign]
    await uses.reconcile()
    assert uses.spans(view.number) == [0, 1, 2]
    assert last(uses, view, 0) == last(uses, view, 2) == SETTLED_S + 1


@virtual_time
async def test_a_span_that_was_not_evicted_after_all_is_as_before() -> None:
    store = FakeStore()
    view = store.add_view(1)
    store.land(view, 0)
    uses = Uses(store, wall_clock)
    uses.set_boot(view.number, [SpanNo(0)])
    uses.look()
    before = known(uses, view)
    was = uses.forget(view.number, SpanNo(0))
    assert known(uses, view) == {}
    uses.restore(view.number, SpanNo(0), was)
    assert known(uses, view) == before
    await trio.sleep(30)
    was = uses.forget(view.number, SpanNo(0))
    store.read(view, 0)
    uses.look()
    uses.restore(view.number, SpanNo(0), was)
    assert known(uses, view) == {0: (EPOCH_S + 30, BOOT)}, "what was learnt meanwhile stands"


@virtual_time
async def test_a_store_that_cannot_say_what_it_has_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    view = store.add_view(1)
    store.land(view, 0)

    def resident() -> Any:
        raise OSError(5, "the disk is gone")
        yield

    store.resident = resident  # type: ignore[method-assign]
    async with looking(store) as uses:
        assert "what was used before is not known" in caplog.text
        await trio.sleep(LOOK_S + 1)
        assert uses.spans(view.number) == [0]
        await trio.sleep(2 * module.RECONCILE_S)
        assert "unexpected failure of keeping uses" in caplog.text


@virtual_time
async def test_it_compares_now_and_then_by_itself() -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store) as uses:
        store.land(view, 0)
        view.maps.clear()  # Nobody saw it come.
        await trio.sleep(module.RECONCILE_S + 2 * LOOK_S)
        assert uses.spans(view.number) == [0]


def test_a_group_is_five_bytes_a_span() -> None:
    made = Group.empty(0)
    assert made.last_s.itemsize * len(made.last_s) + len(made.flags) == 5 * USES_SPANS
