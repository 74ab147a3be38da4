"""Why something may not be evicted: open handles and pins, their bound, and what outlives the daemon."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import trio

from cachefs import touches
from cachefs.errors import Leased, PinRefused
from cachefs.leases import SAVE_S, Lease, Leases, NamedBy, Reason
from cachefs.store import format as f
from cachefs.store.format import DiskEntry, LeaseReason, LeaseRecord, Table, ViewKind, ViewNo
from cachefs.touches import File
from tests.evictions import EPOCH_S, MIB, FakeStore, wall_clock
from tests.flow import virtual_time
from tests.stores import image_id

A, B, C = image_id(1), image_id(2), image_id(3)


def leases_of(store: FakeStore, pinned_max: int = 100 * MIB) -> Leases:
    return Leases(store, lambda: pinned_max, wall_clock)


async def restarted(store: FakeStore, pinned_max: int = 100 * MIB) -> Leases:
    leases = leases_of(store, pinned_max)
    await leases.load()
    return leases


# ── Open handles ──────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_view_is_leased_until_its_last_handle_is_released() -> None:
    store = FakeStore()
    view, other = store.add_view(1), store.add_view(2)
    leases = leases_of(store)
    leases.opened(view.number)
    await trio.sleep(10)
    leases.opened(view.number)
    assert leases.of(view) == [Lease(Reason.OPEN, EPOCH_S, None, "2 handles")]
    assert leases.leased_views(store.views()) == {view.number}
    assert leases.handles == 2
    leases.released(view.number)
    assert leases.is_leased(view)
    assert not leases.is_leased(other)
    leases.released(view.number)
    assert not leases.is_leased(view)
    assert leases.of(view) == []
    leases.opened(view.number)
    assert leases.of(view) == [Lease(Reason.OPEN, EPOCH_S + 10, None, "1 handle")]


@virtual_time
async def test_an_ended_view_is_leased_while_it_is_open_and_its_successor_is_not() -> None:
    store = FakeStore()
    old = store.add_view(1)
    store.end(old)
    new = store.add_view(1)
    leases = leases_of(store)
    leases.opened(old.number)
    assert leases.leased_views(store.views()) == {old.number}
    assert not leases.is_leased(new)


@virtual_time
async def test_it_is_known_how_long_ago_a_view_was_opened() -> None:
    leases = leases_of(FakeStore())
    view = ViewNo(1)
    assert not leases.opened_within(view, 60)
    leases.opened(view)
    await trio.sleep(59)
    leases.opened(view)
    assert leases.opened_within(view, 60)
    await trio.sleep(1)
    assert not leases.opened_within(view, 60), "the first handle counts"


@virtual_time
async def test_a_handle_cannot_be_released_twice() -> None:
    leases = leases_of(FakeStore())
    leases.opened(ViewNo(1))
    leases.released(ViewNo(1))
    with pytest.raises(AssertionError):
        leases.released(ViewNo(1))


@virtual_time
async def test_handles_do_not_outlive_the_daemon() -> None:
    store = FakeStore()
    view = store.add_view(1)
    leases_of(store).opened(view.number)
    assert store.puts == 0
    assert not (await restarted(store)).is_leased(view)


# ── Pins ──────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_pin_leases_every_view_of_its_image_and_outlives_the_daemon() -> None:
    store = FakeStore()
    view, twin, other = store.add_view(1), store.add_view(1), store.add_view(2)
    leases = leases_of(store)
    await trio.sleep(5)
    leases.pin(A, view.record.size)
    for known in (leases, await restarted(store)):
        assert known.leased_views(store.views()) == {view.number, twin.number}
        assert known.of(view) == [Lease(Reason.PIN, EPOCH_S + 5)]
        assert not known.is_leased(other)
        assert known.pinned == [A]
        assert known.pinned_bytes == 64 * MIB


@virtual_time
async def test_an_unpinned_image_is_unpinned_after_a_restart_too() -> None:
    store = FakeStore()
    view = store.add_view(1)
    leases = leases_of(store)
    leases.pin(A, view.record.size)
    assert leases.unpin(A)
    assert not leases.unpin(A)
    assert not leases.is_leased(view)
    assert not store.records
    assert not (await restarted(store)).is_leased(view)


@virtual_time
async def test_pins_are_bounded_by_the_whole_sizes_of_their_images() -> None:
    store = FakeStore()
    for number, size in ((1, 60 * MIB), (2, 40 * MIB), (3, 1)):
        store.add_view(number, size)
    leases = leases_of(store, 100 * MIB)
    leases.pin(A, 60 * MIB)
    leases.pin(B, 40 * MIB)
    why = f"image {C} is not pinned: it has 1 B, and pins have 0 B left of 100.0 MiB"
    with pytest.raises(PinRefused, match=why) as refused:
        leases.pin(C, 1)
    assert (refused.value.size, refused.value.pinned, refused.value.pinned_max) == (1, 100 * MIB, 100 * MIB)
    assert str(refused.value.again()) == str(refused.value)
    leases.pin(A, 60 * MIB)  # It is pinned already: that takes no more.
    assert leases.pinned == [A, B]
    leases.unpin(B)
    leases.pin(C, 1)
    assert leases.pinned_bytes == 60 * MIB + 1


@virtual_time
async def test_an_image_that_was_never_read_counts_with_its_size() -> None:
    store = FakeStore(images={A: {"size": 90 * MIB}})
    leases = leases_of(store, 100 * MIB)
    leases.pin(A, 90 * MIB)
    assert (await restarted(store)).pinned_bytes == 90 * MIB
    with pytest.raises(PinRefused):
        leases.pin(B, 11 * MIB)


@virtual_time
async def test_an_image_that_glance_has_no_more_stays_pinned_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    view = store.add_view(1)
    leases_of(store).pin(A, view.record.size)
    store.end(view)
    leases = await restarted(store)
    assert leases.is_leased(view)
    assert leases.pinned_bytes == 64 * MIB
    assert leases.unpin(A)
    assert not leases.is_leased(view)


@virtual_time
async def test_a_store_that_shrank_keeps_its_pins_and_takes_no_more(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    store.add_view(1)
    leases_of(store).pin(A, 64 * MIB)
    leases = await restarted(store, 10 * MIB)
    assert leases.pinned == [A]
    assert "more than the" in caplog.text
    with pytest.raises(PinRefused):
        leases.pin(B, 1)


@virtual_time
async def test_a_lease_with_an_end_ends_by_itself() -> None:
    store = FakeStore()
    view = store.add_view(1)
    leases = leases_of(store, 64 * MIB)
    leases.pin(A, 64 * MIB, until_s=EPOCH_S + 100)
    after = await restarted(store, 64 * MIB)
    await trio.sleep(99)
    assert leases.is_leased(view)
    assert after.is_leased(view)
    await trio.sleep(1)
    for known in (leases, after):
        assert not known.is_leased(view)
        assert known.pinned == []
        assert known.of(view) == []
        assert not known.unpin(A)
    leases.pin(B, 64 * MIB)  # What it claimed is free.


@virtual_time
async def test_pinning_again_changes_the_end_and_not_the_beginning() -> None:
    store = FakeStore()
    view = store.add_view(1)
    leases = leases_of(store)
    leases.pin(A, 64 * MIB, until_s=EPOCH_S + 100)
    await trio.sleep(50)
    assert leases.pin(A, 64 * MIB) == Lease(Reason.PIN, EPOCH_S)
    await trio.sleep(100)
    assert leases.is_leased(view)


# ── Touches ───────────────────────────────────────────────────────────────────────────────────────────

ORIGINAL, RAW, BIG = File(ViewKind.ORIGINAL), File(ViewKind.RAW), File(ViewKind.RESIZED, 20 << 30)
GRACE_S = 86400.0


def touching(store: FakeStore, now_s: Callable[[], float] = trio.current_time) -> Leases:
    return Leases(store, lambda: 0, wall_clock, touch_grace_s=GRACE_S, now_s=now_s)


@virtual_time
async def test_a_touch_is_a_lease_for_a_while_and_its_times_are_remembered() -> None:
    store = FakeStore()
    view, other = store.add_view(1), store.add_view(2)
    leases = touching(store)
    leases.touch(A, ORIGINAL, 1, -2)
    (lease,) = leases.of(view)
    assert lease == Lease(Reason.TOUCH, EPOCH_S, EPOCH_S + GRACE_S, "for 24 h more")
    assert leases.is_leased(view)
    assert leases.keeps(A)
    assert not leases.is_leased(other)
    await trio.sleep(GRACE_S - 1)
    assert leases.is_leased(view)
    assert str(leases.of(view)[0]) == "it is leased by a touch (for 0 min more)"
    leases.touch(A, ORIGINAL, 3, 4)
    await trio.sleep(GRACE_S - 1)
    assert leases.is_leased(view), "from the last touch on"
    await trio.sleep(1)
    assert not leases.is_leased(view)
    assert leases.of(view) == []
    assert not leases.keeps(A)
    touch = leases.touches.of(A, ORIGINAL)
    assert touch is not None
    assert (touch.atime_ns, touch.mtime_ns) == (3, 4)
    leases.forget(A)
    assert leases.touches.of(A, ORIGINAL) is None
    assert store.records == {}


@virtual_time
async def test_a_touch_is_of_one_file_and_leases_what_that_is_read_from() -> None:
    store = FakeStore()
    original, raw = store.add_view(1), store.add_view(1, kind=ViewKind.RAW)
    store.images[A]["disk_format"] = "qcow2"
    leases = touching(store)
    leases.touch(A, BIG, 5, 6)
    assert leases.leased_views(store.views()) == {raw.number}
    leases.touch(A, ORIGINAL, 7, 8)
    assert leases.leased_views(store.views()) == {original.number, raw.number}
    assert leases.touches.of(A, RAW) is None
    assert [leases.touches.of(A, file) is not None for file in (ORIGINAL, BIG, File(ViewKind.RESIZED, 1))] == [
        True, True, False,
    ]  # fmt: skip


@virtual_time
async def test_touches_outlive_the_daemon_with_what_they_have_left() -> None:
    store = FakeStore()
    view = store.add_view(1)
    leases = touching(store)
    leases.touch(A, ORIGINAL, 1, 2)
    leases.touch(A, BIG, 3, 4)
    await trio.sleep(GRACE_S / 2)
    leases.save()
    await trio.sleep(100 * GRACE_S)
    again = touching(store)
    await again.load()
    found = again.touches.of(A, BIG)
    assert found is not None
    assert (found.atime_ns, found.mtime_ns) == (3, 4)
    await trio.sleep(GRACE_S / 2 - 1)
    assert again.is_leased(view)
    await trio.sleep(1)
    assert not again.is_leased(view)
    again.save()
    last = touching(store)
    await last.load()
    assert not last.is_leased(view)
    found = last.touches.of(A, ORIGINAL)
    assert found is not None
    assert (found.atime_ns, found.mtime_ns) == (1, 2)


@virtual_time
async def test_what_touches_have_left_is_saved_now_and_then_and_only_while_they_have() -> None:
    store = FakeStore()
    view = store.add_view(1)
    leases = touching(store)
    async with trio.open_nursery() as nursery:
        await nursery.start(leases.run)
        leases.touch(A, ORIGINAL, 1, 2)
        await trio.sleep(GRACE_S / 2)
        crashed = touching(store)  # Without a last word.
        await crashed.load()
        await trio.sleep(GRACE_S / 2 + SAVE_S)
        assert not crashed.is_leased(view)
        assert not leases.is_leased(view)
        await trio.sleep(2 * SAVE_S)
        puts = store.puts
        await trio.sleep(100 * SAVE_S)
        assert store.puts == puts
        nursery.cancel_scope.cancel()


@virtual_time
async def test_no_date_makes_or_keeps_or_ends_a_lease() -> None:
    store = FakeStore()
    view = store.add_view(1)
    leases = touching(store)
    for ns in (0, -(1 << 80), 1 << 80, (1 << 63) - 1):
        leases.touch(A, ORIGINAL, ns, ns)
        assert leases.is_leased(view)
    again = touching(store)
    await again.load()
    await trio.sleep(GRACE_S - 1)
    assert again.is_leased(view)
    await trio.sleep(1)
    assert not again.is_leased(view)


@virtual_time
async def test_the_oldest_of_too_many_touches_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(touches, "TOUCHED_MAX", 10)
    store = FakeStore()
    leases = touching(store)
    for number in range(30):
        for size in range(3):
            leases.touch(image_id(number), File(ViewKind.RESIZED, size), 1, 1)
    assert leases.touches.images() == [image_id(n) for n in (27, 28, 29)]
    assert len(store.records) == 9


@virtual_time
async def test_a_touch_that_cannot_be_read_is_one_of_now(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    view = store.add_view(1)
    touching(store).touch(A, ORIGINAL, 1, 2)
    store.put(Table.LEASES, f.touch_key(A, *ORIGINAL), b"rot")
    store.put(Table.LEASES, f.touch_key(A, *ORIGINAL)[:-1], b"rot")  # And a key that nobody can have written.
    leases = touching(store)
    await leases.load()
    assert leases.is_leased(view)
    found = leases.touches.of(A, ORIGINAL)
    assert found is not None
    assert found.mtime_ns // 10**9 == int(wall_clock())
    assert [r.levelno for r in caplog.records] == [logging.ERROR]


@virtual_time
async def test_all_reasons_of_an_image_and_their_numbers() -> None:
    store = FakeStore()
    view, twin = store.add_view(1), store.add_view(1, kind=ViewKind.RAW)
    leases = Leases(store, lambda: 1 << 60, wall_clock)
    leases.opened(view.number)
    leases.opened(twin.number)
    leases.opened(twin.number)
    leases.pin(A, 1)
    leases.touch(A, ORIGINAL, 1, 1)
    leases.name(A, NamedBy((DiskEntry(b"/i/disk", ViewKind.RAW, 1),), 4, EPOCH_S, 1.0))
    assert [str(lease) for lease in leases.of_image(A)] == [
        "it is open (1 handle)",
        "it is open (2 handles)",
        "it is pinned",
        "it is leased by a touch (for 24 h more)",
        "it is named by an instance disk (/i/disk and 3 more)",
    ]
    leases.touch(B, ORIGINAL, 1, 1)
    assert leases.leased_images() == {A, B}
    assert leases.counts() == {"open": 3, "pinned": 1, "leased by a touch": 2, "named by an instance disk": 1}
    assert leases.of_image(C) == []


# ── What is stored ────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_reason_of_a_later_cachefs_is_left_alone() -> None:
    store = FakeStore()
    view = store.add_view(1)
    later = f.lease_key(A, LeaseReason.PIN)[:16] + bytes((9,))
    store.put(Table.LEASES, later, b"whatever it is")
    leases = await restarted(store)
    assert not leases.is_leased(view)
    leases.pin(A, 1)
    leases.unpin(A)
    assert store.items(Table.LEASES) == [(later, b"whatever it is")]


@pytest.mark.parametrize(
    "record", [b"", b"x" * 24, f.seal(Table.LEASES, f.lease_key(A, LeaseReason.PIN), b"short")]
)
def test_a_pin_that_cannot_be_read_is_a_pin(record: bytes, caplog: pytest.LogCaptureFixture) -> None:
    @virtual_time
    async def body() -> None:
        store = FakeStore()
        view = store.add_view(1)
        key = f.lease_key(A, LeaseReason.PIN)
        store.put(Table.LEASES, key, record)
        leases = await restarted(store)
        assert leases.is_leased(view)
        assert LeaseRecord.decode(key, store.records[Table.LEASES, key]) == LeaseRecord(EPOCH_S)

    body()
    assert [r.levelno for r in caplog.records] == [logging.ERROR]


@virtual_time
async def test_a_key_that_is_none_is_passed_over() -> None:
    store = FakeStore()
    for key in (b"", b"short", b"x" * 16):
        store.put(Table.LEASES, key, b"")
    assert (await restarted(store)).pinned == []


def test_why_something_is_leased_is_said_in_words() -> None:
    reasons = tuple(str(lease) for lease in (Lease(Reason.OPEN, 0.0, None, "2 handles"), Lease(Reason.PIN, 0.0)))
    assert str(Leased(A, reasons)) == f"image {A} is not evicted: it is open (2 handles), it is pinned"
