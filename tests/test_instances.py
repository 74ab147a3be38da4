"""What instance disks lease: from look to look, over restarts, clocks that jump and folders that are not there;
and a month of a node that is full.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from cachefs import instances
from cachefs.errors import CachefsError, Leased, NoEntry, OriginUnavailable
from cachefs.evictor import Cause, Evictor, Watermarks
from cachefs.instance_walk import Walker
from cachefs.instances import AGAIN_S, FIRST_LOOK_MAX_S, STALL_S, Instances
from cachefs.leases import DISKS_KEPT, Leases, Reason
from cachefs.plan.instances import Base
from cachefs.store.format import ViewKind
from cachefs.store.room import Limits
from cachefs.uses import Uses
from tests.evictions import EPOCH_S, MIB, FakeStore, FakeView, wall_clock
from tests.flow import until, virtual_time
from tests.instance_disks import make_disk
from tests.stores import SPAN, examples, image_id, land, random_bytes, read, running, view_of

MOUNT: Final = Path("/mnt/cachefs-of-no-test")
A, B = image_id(1), image_id(2)
INTERVAL_S, GRACE_S = 300.0, 86400.0
DAY_S: Final = 86400.0


def raw(image: str = A) -> Path:
    return MOUNT / "raw" / image


@dataclass
class Daemon:
    """What looks at instance disks, as one run of the daemon has it."""

    leases: Leases
    instances: Instances
    store: Any
    taken_up: list[Base] = field(default_factory=list)

    @property
    def named(self) -> dict[str, list[str]]:
        """The images that are leased by disks, with these in words."""
        return {image: [str(lease) for lease in self.leases.of_image(image)] for image in self.leases.named}

    async def look(self) -> None:
        await self.instances.look()

    async def pass_s(self, seconds: float) -> None:
        """So much time goes by, however many looks that are: a day at once, as on a node that was asleep."""
        await jump(seconds)
        await self.look()


async def jump(seconds: float) -> None:
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    clock.jump(seconds)
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def looking(
    store: Any,
    *folders: Path,
    interval_s: float = INTERVAL_S,
    grace_s: float = GRACE_S,
    clock: Callable[[], float] = wall_clock,
    take_up: Callable[[str, ViewKind], None] | None = None,
    walker: Callable[..., Walker] = Walker,
    begin: trio.Event | None = None,
) -> AsyncIterator[Daemon]:
    """One run of the daemon. `take_up` may raise. The first look comes after `begin`."""
    leases = Leases(store, lambda: 1 << 60, clock)
    taken_up: list[Base] = []

    async def take(image: str, kind: ViewKind) -> None:
        if take_up is not None:
            take_up(image, kind)
        taken_up.append(Base(image, kind))

    made = Instances(
        leases, [str(folder) for folder in folders], [str(MOUNT)], interval_s, grace_s,
        is_known=lambda image, kind: take_up is None or Base(image, kind) in taken_up, take_up=take,
        walker=walker, clock=clock,
    )  # fmt: skip
    await leases.load()
    async with trio.open_nursery() as nursery:
        await nursery.start(leases.run)
        if begin is None:
            await nursery.start(made.run)
        else:
            nursery.start_soon(run_after, begin, made)
        yield Daemon(leases, made, store, taken_up)
        nursery.cancel_scope.cancel()
    leases.save()


async def run_after(event: trio.Event, made: Instances) -> None:
    await event.wait()
    await made.run()


@pytest.fixture
def nova(tmp_path: Path) -> Path:
    folder = tmp_path / "instances"
    make_disk(folder / "one" / "disk", raw())
    (folder / "compute_nodes").write_text("{}")
    return folder


def remove(disk: Path) -> None:
    shutil.rmtree(disk.parent)


# ── Which views ───────────────────────────────────────────────────────────────────────────────────────

KINDS: Final = (ViewKind.ORIGINAL, ViewKind.RAW, ViewKind.RESIZED, ViewKind.ENDED)


@pytest.mark.parametrize(
    ("name", "disk_format", "leased"),
    [
        (f"images/{A}", "raw", {ViewKind.ORIGINAL}),
        (f"images/{A}", "qcow2", {ViewKind.ORIGINAL}),
        (f"raw/{A}", "qcow2", {ViewKind.RAW, ViewKind.RESIZED}),
        (f"raw/{A}", "vmdk", {ViewKind.RAW, ViewKind.RESIZED}),
        (f"raw/{A}", "raw", {ViewKind.ORIGINAL, ViewKind.RAW, ViewKind.RESIZED}),
        (f"raw/{A}", None, {ViewKind.ORIGINAL, ViewKind.RAW, ViewKind.RESIZED}),
        (f"resized/{A}/20G", "qcow2", {ViewKind.RAW, ViewKind.RESIZED}),
        (f"resized/{A}/20G", "iso", {ViewKind.ORIGINAL, ViewKind.RAW, ViewKind.RESIZED}),
        (f"images/{B}", "raw", set()),
    ],
)
def test_a_disk_leases_the_view_that_its_base_is_read_from(
    name: str, disk_format: str | None, leased: set[ViewKind], tmp_path: Path
) -> None:
    @virtual_time
    async def body() -> None:
        store = FakeStore()
        views = {kind: store.add_view(1, kind=kind) for kind in KINDS}
        store.images[A]["disk_format"] = disk_format
        make_disk(tmp_path / "disk", MOUNT / name)
        async with looking(store, tmp_path) as daemon:
            await daemon.look()
            assert {kind for kind, view in views.items() if daemon.leases.is_leased(view)} == leased
            assert daemon.leases.leased_views(store.views()) == {views[kind].number for kind in leased}
            for kind, view in views.items():
                reasons = [lease.reason for lease in daemon.leases.of(view)]
                assert reasons == ([Reason.DISK] if kind in leased else [])

    body()


# ── From look to look ─────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_lease_begins_with_a_look_and_says_which_disk(nova: Path) -> None:
    store = FakeStore()
    async with looking(store, nova) as daemon:
        assert not daemon.leases.ready.is_set(), "before the first look nothing is evicted"
        await daemon.leases.ready.wait()
        assert daemon.named == {A: [f"it is named by an instance disk ({nova}/one/disk)"]}
        for number in range(10):
            make_disk(nova / f"i{number}" / "disk", raw(B))
        await trio.sleep(INTERVAL_S + 1)
        assert daemon.named[B] == [
            f"it is named by an instance disk ({nova}/i0/disk, {nova}/i1/disk, {nova}/i2/disk and 7 more)"
        ]
        status = daemon.instances.status()
        assert (status["images"], status["disks"], status["looks"]) == (2, 11, 2)
        (folder,) = status["folders"]
        assert (folder["trouble"], folder["files"], folder["disks"], folder["unread"]) == (None, 12, 11, 0)
        assert status["named"] == {A: f"{nova}/one/disk", B: daemon.named[B][0].partition("(")[2][:-1]}


@virtual_time
async def test_it_ends_after_the_grace_and_never_at_once(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store, nova) as daemon:
        await daemon.look()
        remove(nova / "one" / "disk")
        await daemon.pass_s(30 * DAY_S)
        assert daemon.leases.is_leased(view), "however long nobody looked"
        (lease,) = daemon.leases.of(view)
        assert str(lease) == f"it is named by an instance disk ({nova}/one/disk: gone, for 24 h more)"
        assert lease.until_s == pytest.approx(wall_clock() + GRACE_S)
        await daemon.pass_s(GRACE_S - 60)
        assert daemon.leases.is_leased(view)
        assert str(daemon.leases.of(view)[0]).endswith("gone, for 1 min more)")
        await daemon.pass_s(61)
        assert not daemon.leases.is_leased(view)
        assert store.records == {}, "nothing of it is left"


@virtual_time
async def test_who_comes_back_within_the_grace_has_all_of_it_again(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store, nova) as daemon:
        await daemon.look()
        for _ in range(10):
            remove(nova / "one" / "disk")
            await daemon.pass_s(1)
            await daemon.pass_s(0.9 * GRACE_S)
            assert daemon.leases.is_leased(view)
            make_disk(nova / "one" / "disk", raw())
            await daemon.pass_s(1)
            assert not daemon.leases.named[A].are_gone


@virtual_time
async def test_a_disk_that_stands_on_something_else_now(nova: Path) -> None:
    store = FakeStore()
    first, second = store.add_view(1), store.add_view(2)
    async with looking(store, nova) as daemon:
        await daemon.look()
        make_disk(nova / "one" / "disk", raw(B))
        await daemon.look()
        assert daemon.leases.is_leased(first)
        assert daemon.leases.is_leased(second)
        await daemon.pass_s(GRACE_S + 1)
        assert not daemon.leases.is_leased(first)
        assert daemon.leases.is_leased(second)


def emptied(nova: Path) -> None:
    shutil.rmtree(nova)
    nova.mkdir()


def half_written(nova: Path) -> None:
    (nova / "one" / "disk").write_bytes(b"QFI\xfb\0\0")


def a_file(nova: Path) -> None:
    shutil.rmtree(nova)
    nova.write_text("")


UNSEEN: Final[dict[str, Callable[[Path], None]]] = {
    "it is not there": shutil.rmtree,
    "it is empty": emptied,
    "its header is being written": half_written,
    "it is a file": a_file,
}


@pytest.mark.parametrize("how", UNSEEN)
def test_what_cannot_be_seen_ends_no_lease(how: str, nova: Path) -> None:
    """Neither in a year of one daemon, nor of many."""

    @virtual_time
    async def body() -> None:
        store = FakeStore()
        view = store.add_view(1)
        async with looking(store, nova) as daemon:
            await daemon.look()
            UNSEEN[how](nova)
            for _ in range(10):
                await daemon.pass_s(36 * DAY_S)
                assert daemon.leases.is_leased(view)
        for _ in range(3):
            async with looking(store, nova) as daemon:
                await daemon.pass_s(100 * DAY_S)
                view = store.views()[0]
                assert daemon.leases.is_leased(view)
                assert not daemon.leases.named[A].are_gone

    body()


@virtual_time
async def test_what_cannot_be_read_is_counted_and_said_once(nova: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    caplog.set_level(logging.INFO)
    async with looking(store, nova) as daemon:
        await daemon.look()
        for number in range(3):
            make_disk(nova / f"odd{number}", b"name", version=77)
        for _ in range(3):
            await daemon.look()
        (folder,) = daemon.instances.status()["folders"]
        assert (folder["unread"], folder["trouble"]) == (3, None)
        assert folder["first_error"].endswith("its qcow2 version 77 is neither 2 nor 3")
        assert caplog.text.count("3 files or folders cannot be read") == 1
        os.rename(nova, f"{nova}-away")
        for _ in range(3):
            await daemon.look()
        assert caplog.text.count("it is not there. What they stood on stays leased") == 1
        os.rename(f"{nova}-away", nova)
        for _ in range(3):
            await daemon.look()
        assert caplog.text.count("cannot be read") == 2
        assert caplog.text.count("files, 1 on this mount") == 2


@virtual_time
async def test_a_folder_that_hiccups_stops_the_count(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store, nova) as daemon:
        await daemon.look()
        remove(nova / "one" / "disk")
        await daemon.look()
        for _ in range(20):
            await daemon.pass_s(GRACE_S / 2)
            os.rename(nova, f"{nova}-away")
            await daemon.pass_s(GRACE_S)
            os.rename(f"{nova}-away", nova)
            await daemon.look()
            assert daemon.leases.is_leased(view)
        await daemon.pass_s(GRACE_S + 1)
        assert not daemon.leases.is_leased(view)


@virtual_time
async def test_one_folder_of_two_that_cannot_be_read_keeps_its_own(nova: Path, tmp_path: Path) -> None:
    store = FakeStore()
    first, second = store.add_view(1), store.add_view(2)
    pool = tmp_path / "pool"
    make_disk(pool / "vm.qcow2", raw(B))
    async with looking(store, nova, pool) as daemon:
        await daemon.look()
        assert set(daemon.named) == {A, B}
        remove(nova / "one" / "disk")
        shutil.rmtree(pool)
        await daemon.look()
        await daemon.pass_s(GRACE_S + 1)
        assert not daemon.leases.is_leased(first)
        assert daemon.leases.is_leased(second)
    async with looking(store, nova) as daemon:  # The pool is none of the folders any more: an operator said so.
        await daemon.look()
        assert daemon.leases.is_leased(second)
        await daemon.pass_s(GRACE_S + 1)
        assert not daemon.leases.is_leased(second)


@virtual_time
async def test_without_folders_nothing_is_looked_at_and_what_was_leased_ends(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store, nova) as daemon:
        await daemon.look()
    async with looking(store) as daemon:
        await daemon.look()
        assert daemon.leases.is_leased(view)
        await trio.sleep(GRACE_S + 2 * INTERVAL_S)
        assert not daemon.leases.is_leased(view)


# ── Restarts and clocks ───────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_lease_outlives_the_daemon_before_the_first_look_too(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store, nova) as daemon:
        await daemon.look()
        since_s = daemon.leases.named[A].since_s
    await jump(100 * DAY_S)
    again = Leases(store, lambda: 0, wall_clock)
    await again.load()
    assert again.is_leased(view)
    assert again.named[A].since_s == since_s == EPOCH_S
    remove(nova / "one" / "disk")  # While the daemon was down for a hundred days.
    async with looking(store, nova) as daemon:
        await daemon.look()
        assert daemon.leases.is_leased(view), "never at once"
        await daemon.pass_s(GRACE_S + 1)
        assert not daemon.leases.is_leased(view)


@virtual_time
async def test_the_grace_goes_on_where_the_last_daemon_left_it(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store, nova) as daemon:
        await daemon.look()
        remove(nova / "one" / "disk")
        await daemon.look()
        await daemon.pass_s(GRACE_S * 0.75)
    await jump(10 * DAY_S)
    for _ in range(2):
        async with looking(store, nova) as daemon:
            await daemon.look()
            assert daemon.leases.is_leased(view)
            await daemon.pass_s(GRACE_S / 10)
            assert daemon.leases.is_leased(view)
    async with looking(store, nova) as daemon:
        await daemon.look()
        await daemon.pass_s(GRACE_S / 10)
        assert not daemon.leases.is_leased(view)


@virtual_time
async def test_no_clock_that_jumps_ends_a_lease(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(1)
    now_s = [float(EPOCH_S)]
    jumps = (0.0, 1e12, -1e9, 4e9, 1.0, float(EPOCH_S))
    async with looking(store, nova, clock=lambda: now_s[0]) as daemon:
        await daemon.look()
        remove(nova / "one" / "disk")
        await daemon.look()
        for at_s in jumps:
            now_s[0] = at_s
            await daemon.pass_s(60)
            assert daemon.leases.is_leased(view)
            assert daemon.leases.of(view)
    for at_s in jumps:
        now_s[0] = at_s
        async with looking(store, nova, clock=lambda: now_s[0]) as daemon:
            await daemon.look()
            assert daemon.leases.is_leased(view)


@virtual_time
async def test_of_many_disks_some_are_remembered_and_the_others_are_not_forgotten(
    nova: Path, tmp_path: Path
) -> None:
    """Those whose paths were kept are gone; the others may be where nothing can be seen."""
    store = FakeStore()
    view = store.add_view(1)
    pool = tmp_path / "pool"
    for number in range(DISKS_KEPT):
        make_disk(nova / f"{number}" / "disk", raw())
        make_disk(pool / f"{number}" / "disk", raw())
    async with looking(store, nova, pool) as daemon:
        await daemon.look()
        assert daemon.leases.named[A].count == 2 * DISKS_KEPT + 1
    for number in range(DISKS_KEPT):
        remove(nova / f"{number}" / "disk")
    remove(nova / "one" / "disk")
    pool.rename(tmp_path / "away")
    async with looking(store, nova, pool) as daemon:
        await daemon.look()
        for _ in range(3):
            await daemon.pass_s(2 * GRACE_S)
            assert daemon.leases.is_leased(view)
        (tmp_path / "away").rename(pool)
        await daemon.look()
        assert daemon.leases.named[A].count == DISKS_KEPT


@virtual_time
async def test_a_record_that_cannot_be_read_is_a_lease_until_a_look_says_otherwise(
    nova: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore()
    view = store.add_view(1)
    async with looking(store, nova) as daemon:
        await daemon.look()
    ((table, key),) = store.records
    store.records[table, key] = b"rot"
    async with looking(store, nova) as daemon:
        assert daemon.leases.is_leased(view)
        await daemon.look()
        assert daemon.leases.named[A].count == 1
    assert [r.levelno for r in caplog.records if r.name == "cachefs.leases"] == [logging.ERROR]
    remove(nova / "one" / "disk")
    store.records[table, key] = b"rot"
    async with looking(store, nova) as daemon:
        await daemon.look()
        assert daemon.leases.is_leased(view)
        await daemon.pass_s(GRACE_S + 1)
        assert not daemon.leases.is_leased(view)


steps = st.one_of(
    st.sampled_from(["make", "remove", "away", "back", "restart", "crash"]),
    st.sampled_from([60.0, 0.3 * GRACE_S, 0.6 * GRACE_S, 30 * DAY_S]),
)


@given(st.lists(steps, max_size=25))
@examples(60)
def test_whatever_happens_the_lease_lasts_as_long_as_was_promised(plan: list[str | float]) -> None:
    """A model: so long is left after a look that saw the disk, or could see nothing; only time between two looks
    of one daemon that both must have seen it, and did not, is taken off."""

    @virtual_time
    async def body() -> None:
        store = FakeStore()
        view = store.add_view(1)
        with tempfile.TemporaryDirectory() as made:
            nova = Path(made, "instances")
            (nova / "locks").mkdir(parents=True)
            left_s, absent_s = 0.0, None
            there, here = False, True
            at = 0
            while at <= len(plan):
                async with looking(store, nova) as daemon:
                    await daemon.leases.ready.wait()
                    absent_s = None
                    for step in ["look", *plan[at:]]:
                        at += step != "look"
                        if step in ("restart", "crash"):
                            break
                        now_s = trio.current_time() + (step if isinstance(step, float) else 0.0)
                        if step == "make" and here:
                            make_disk(nova / "one" / "disk", raw())
                            there = True
                        elif step == "remove" and here and there:
                            remove(nova / "one" / "disk")
                            there = False
                        elif step == "away" and here:
                            os.rename(nova, f"{nova}-away")
                            here = False
                        elif step == "back" and not here:
                            os.rename(f"{nova}-away", nova)
                            here = True
                        await daemon.pass_s(step if isinstance(step, float) else 0.0)
                        if here and there:
                            left_s, absent_s = GRACE_S, None
                        elif not here:
                            left_s, absent_s = GRACE_S if left_s > 0 else 0.0, None
                        elif left_s > 0:
                            left_s -= 0.0 if absent_s is None else now_s - absent_s
                            absent_s = now_s
                        assert daemon.leases.is_leased(view) is (left_s > 0), (step, left_s)
                    else:
                        at += 1

    body()


# ── Who asks, and who waits ───────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_what_was_closed_stays_until_disks_were_looked_at(nova: Path) -> None:
    """An instance that was started and stopped between two looks has a disk that nobody has seen."""
    store = FakeStore()
    view, other = store.add_view(2), store.add_view(3)
    async with looking(store, nova, interval_s=10 * DAY_S) as daemon:
        await daemon.look()
        for opened in (view, other):
            daemon.leases.opened(opened.number)
        make_disk(nova / "two" / "disk", raw(B))
        for opened in (view, other):
            daemon.leases.released(opened.number)
        assert daemon.leases.is_leased(view)
        assert [lease.reason for lease in daemon.leases.of(other)] == [Reason.CLOSED]
        assert str(daemon.leases.of(other)[0]) == (
            "it was closed since the last look at instance disks (the next may find one that needs it)"
        )
        await trio.sleep(10)
        assert [lease.reason for lease in daemon.leases.of(view)] == [Reason.DISK]
        assert not daemon.leases.is_leased(other)
        # Who cannot wait for that asks.
        daemon.leases.opened(other.number)
        daemon.leases.released(other.number)
        assert await daemon.leases.settle(daemon.leases.just_closed)
        assert not daemon.leases.is_leased(other)
        assert not await daemon.leases.settle(daemon.leases.just_closed)
        assert await daemon.leases.settle(frozenset({other.number})), "it was, meanwhile"


@virtual_time
async def test_what_is_closed_during_a_look_waits_for_the_next(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(2)

    class Closing(Walker):
        def step(self) -> list[tuple[bytes, Base]]:
            found = super().step()
            trio.from_thread.run_sync(close)
            return found

    def close() -> None:
        if len(closed) < 1:
            closed.append(view)
            daemon.leases.opened(view.number)
            daemon.leases.released(view.number)

    closed: list[FakeView] = []
    async with looking(store, nova, interval_s=10 * DAY_S, walker=Closing) as daemon:
        await daemon.leases.ready.wait()
        assert closed
        assert daemon.leases.is_leased(view)
        await trio.sleep(10)
        assert not daemon.leases.is_leased(view)


@virtual_time
async def test_closing_again_and_again_makes_looks_no_more_often_than_they_may_be(nova: Path) -> None:
    store = FakeStore()
    view = store.add_view(2)
    async with looking(store, nova, interval_s=10 * DAY_S) as daemon:
        await daemon.look()
        for _ in range(1000):
            daemon.leases.opened(view.number)
            daemon.leases.released(view.number)
            await trio.sleep(0.1)
        assert daemon.instances.status()["looks"] <= 2 + 100 / instances.PAUSE_S


@virtual_time
async def test_nothing_is_evicted_before_the_first_look(nova: Path) -> None:
    """What a stopped instance needs is not known to a store that has never heard of it."""
    store = FakeStore(limit=20 * MIB)
    needed, other = store.add_view(1), store.add_view(2)
    begin = trio.Event()
    async with looking(store, nova, begin=begin) as daemon, evicting(store, daemon.leases) as evictor:
        store.land(needed, *range(10))
        store.land(other, *range(20))
        asked = evictor.begin_evicting(A)
        await trio.sleep(20)
        assert len(store.spans) == 30
        assert not asked.done.is_set()
        begin.set()
        await asked.done.wait()
        assert isinstance(asked.error, Leased)
        await trio.sleep(20)
        assert store.here(needed) == list(range(10))
        assert len(store.here(other)) < 10


def test_who_wants_to_evict_does_not_wait_for_a_first_look_for_ever(nova: Path) -> None:
    store = FakeStore(limit=20 * MIB)
    view = store.add_view(2)

    class Slow(Walker):
        def step(self) -> list[tuple[bytes, Base]]:
            trio.from_thread.run(trio.sleep, STALL_S - 1)  # It answers each time.
            return []

    async def main() -> None:
        async with looking(store, nova, walker=Slow) as daemon, evicting(store, daemon.leases):
            store.land(view, *range(30))
            await trio.sleep(FIRST_LOOK_MAX_S - 1)
            assert len(store.here(view)) == 30
            await trio.sleep(20)
            assert len(store.here(view)) < 20

    trio.run(main, clock=MockClock(autojump_threshold=0.05))


@virtual_time
async def test_room_is_made_of_what_was_closed_a_moment_ago_and_no_instance_needs(nova: Path) -> None:
    store = FakeStore(limit=22 * MIB)
    needed, other = store.add_view(2), store.add_view(3)
    async with looking(store, nova, interval_s=10 * DAY_S) as daemon, evicting(store, daemon.leases) as evictor:
        await daemon.look()
        for view in (needed, other):
            daemon.leases.opened(view.number)
            store.land(view, *range(10))
        await trio.sleep(20)
        make_disk(nova / "two" / "disk", raw(B))
        for view in (needed, other):
            daemon.leases.released(view.number)
        late = store.add_view(4)
        store.sizes[99] = 3 * MIB
        assert await store.keep(late, 0, frozenset({99})), "it did not have to wait for a look"
        assert store.here(needed) == list(range(10))
        assert len(store.here(other)) < 10
        assert evictor.stuck is None


@asynccontextmanager
async def evicting(store: Any, leases: Leases) -> AsyncIterator[Evictor]:
    uses = Uses(store, wall_clock)
    evictor = Evictor(store, uses, leases, Watermarks(0.95, 0.85))
    store.on_full = evictor.on_full
    async with trio.open_nursery() as nursery:
        await nursery.start(uses.run)
        await nursery.start(evictor.run)
        yield evictor
        uses.save()
        nursery.cancel_scope.cancel()


@virtual_time
async def test_whoever_asks_gets_a_look_that_begins_afterwards(nova: Path) -> None:
    store = FakeStore()
    async with looking(store, nova, interval_s=10 * DAY_S) as daemon:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                make_disk(nova / f"n{number}" / "disk", raw(image_id(100 + number)))
                nursery.start_soon(asks, daemon, image_id(100 + number))
                await trio.lowlevel.checkpoint()
        assert daemon.instances.status()["looks"] <= 21


async def asks(daemon: Daemon, image: str) -> None:
    await daemon.look()
    assert image in daemon.leases.named


def test_a_folder_that_does_not_answer_keeps_what_it_had_and_holds_up_no_other(nova: Path, tmp_path: Path) -> None:
    """In a thread that really hangs, so with a clock that does not wait for it."""
    store = FakeStore()
    view, other = store.add_view(1), store.add_view(2)
    pool = tmp_path / "pool"
    make_disk(pool / "disk", raw(B))
    hangs = threading.Event()
    begun: list[int] = []

    class Hanging(Walker):
        def step(self) -> list[tuple[bytes, Base]]:
            if self.folder == os.fsencode(nova) and len(begun) < 5:
                begun.append(1)
                self.busy = True
                hangs.wait(30)
                self.busy = False
            return super().step()

    async def main() -> None:
        async with looking(store, nova) as daemon:
            await daemon.look()
        begun.clear()
        async with looking(store, nova, pool, walker=Hanging) as daemon:
            assert daemon.leases.is_leased(view)
            began_s = trio.current_time()
            await daemon.leases.ready.wait()
            assert trio.current_time() - began_s <= min(STALL_S, FIRST_LOOK_MAX_S) + 1
            for _ in range(3):
                await daemon.look()
                assert daemon.leases.is_leased(view)
                assert daemon.leases.is_leased(other)
            assert len(begun) == 1, "it is not walked a second time beside itself"
            first, second = daemon.instances.status()["folders"]
            assert (first["trouble"], second["trouble"]) == ("it does not answer", None)
            hangs.set()
            begun.extend(range(5))
            while daemon.instances.status()["folders"][0]["trouble"] is not None:
                await daemon.look()
            assert daemon.leases.is_leased(view)

    trio.run(main, clock=MockClock(autojump_threshold=0.05))


@virtual_time
async def test_a_walk_with_a_bug_ends_no_lease_and_holds_up_nobody(
    nova: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore()
    view, other = store.add_view(1), store.add_view(2)
    make_disk(tmp_path / "pool" / "disk", raw(B))

    class Odd(Walker):
        def step(self) -> list[tuple[bytes, Base]]:
            if self.folder == os.fsencode(nova):
                raise ZeroDivisionError
            return super().step()

    async with looking(store, nova) as daemon:
        await daemon.look()
    async with looking(store, nova, tmp_path / "pool", walker=Odd) as daemon:
        for _ in range(3):
            await daemon.pass_s(10 * DAY_S)
        assert daemon.leases.is_leased(view)
        assert daemon.leases.is_leased(other)
    assert "unexpected failure" in caplog.text


# ── What was never read here ──────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_named_image_that_nobody_has_read_is_taken_up_when_it_can_be(
    nova: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_disk(nova / "two" / "disk", MOUNT / "images" / B)
    store = FakeStore()
    fails: list[CachefsError] = [OriginUnavailable(A, "away"), NoEntry(A), NoEntry(A)]
    tries = []

    def take_up(image: str, kind: ViewKind) -> None:
        tries.append(image)
        if image == A and fails:
            raise fails.pop(0)

    async with looking(store, nova, interval_s=10 * DAY_S, take_up=take_up) as daemon:
        await daemon.leases.ready.wait()
        await until(lambda: A in tries)
        assert Base(A, ViewKind.RAW) not in daemon.taken_up
        for _ in range(4):
            await daemon.look()
            await trio.sleep(1)
        assert len(tries) <= 4, "what Glance does not have is not asked for at each look"
        for _ in range(3):
            await trio.sleep(AGAIN_S)
            await daemon.look()
            await trio.sleep(1)
        assert sorted(daemon.taken_up) == [Base(A, ViewKind.RAW), Base(B, ViewKind.ORIGINAL)]
        asked = len(tries)
        await daemon.look()
        await trio.sleep(1)
        assert len(tries) == asked, "it is known now"
    assert caplog.text.count("not to be had") == 1


# ── Ten thousand ──────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_ten_thousand_disks(tmp_path: Path) -> None:
    """Half of them on one image."""
    nova = tmp_path / "instances"
    for number in range(10_000):
        make_disk(nova / f"{number // 100}" / f"disk{number}", raw(image_id(min(number + 1, 5000))))
    store = FakeStore()
    views = [store.add_view(1 + number) for number in range(6000)]
    async with looking(store, nova) as daemon:
        await daemon.leases.ready.wait()
        puts = store.puts
        assert puts <= 2 * 5000
        began_s = time.perf_counter()
        leased = [daemon.leases.is_leased(view) for view in views]
        took_s = time.perf_counter() - began_s
        assert leased == [True] * 5000 + [False] * 1000
        assert took_s < 0.1, "some microseconds each"
        await daemon.look()
        assert store.puts == puts, "what did not change is not written"
        status = daemon.instances.status()
        assert (status["images"], status["disks"]) == (5000, 10_000)


# ── A month ───────────────────────────────────────────────────────────────────────────────────────────

BASE_SPANS: Final = 8
STORE_SPANS: Final = 24


@asynccontextmanager
async def node(folder: Path, *folders: Path) -> AsyncIterator[tuple[Any, Daemon, Evictor]]:
    """A store that is soon full, and all that decides what goes."""
    limits = Limits(STORE_SPANS * SPAN, 0)
    async with running(folder, limits=lambda: limits) as store, looking(store, *folders) as daemon:
        async with evicting(store, daemon.leases) as evictor:
            yield store, daemon, evictor
        daemon.leases.save()
        await store.flush()


def content(image: int, span: int) -> bytes:
    return random_bytes(1000 * image + span, SPAN)


async def others_are_read(store: Any, image: int) -> None:
    view = view_of(store, image, STORE_SPANS * SPAN)
    for span in range(STORE_SPANS // 2):
        await land(store, view, span * SPAN, content(image, span))
    assert store.usage().used <= STORE_SPANS * SPAN


async def is_whole(store: Any) -> bool:
    view = view_of(store, 1, BASE_SPANS * SPAN)
    return [await read(view, span * SPAN, SPAN) for span in range(BASE_SPANS)] == [
        content(1, span) for span in range(BASE_SPANS)
    ]


@pytest.mark.parametrize("stopped", [True, False], ids=["a stopped instance", "no instance"])
def test_a_month_on_a_store_under_pressure(stopped: bool, tmp_path: Path) -> None:
    """The base of a stopped instance is there a month later, whatever came and went meanwhile. And without the
    instance it is not: so it was under pressure."""
    nova = tmp_path / "instances"
    (nova / "locks").mkdir(parents=True)

    @virtual_time
    async def body() -> None:
        async with node(tmp_path / "store", nova) as (store, daemon, evictor):
            view = view_of(store, 1, BASE_SPANS * SPAN)
            daemon.leases.opened(view.number)
            if stopped:
                make_disk(nova / "one" / "disk", raw())
            for span in range(BASE_SPANS):
                await land(store, view, span * SPAN, content(1, span))
            daemon.leases.released(view.number)
            for day in range(10):
                await others_are_read(store, 2 + day)
                await daemon.pass_s(DAY_S)
            assert await is_whole(store) is stopped
            assert sum(evictor.evicted[cause].spans for cause in Cause) >= 8 * STORE_SPANS // 2
        if not stopped:
            return
        nova.rename(tmp_path / "not mounted")  # The node boots, and the folder comes late.
        await jump(5 * DAY_S)
        async with node(tmp_path / "store", nova) as (store, daemon, evictor):
            for day in range(15, 18):
                await others_are_read(store, 2 + day)
                await daemon.pass_s(DAY_S)
            (tmp_path / "not mounted").rename(nova)
            for day in range(18, 31):
                await others_are_read(store, 2 + day)
                await daemon.pass_s(DAY_S)
            view = view_of(store, 1, BASE_SPANS * SPAN)
            assert view.complete
            assert await is_whole(store)
            with pytest.raises(Leased, match=f"named by an instance disk .{nova}/one/disk"):
                await evictor.evict_image(A)
            # And when the instance is gone, so is the lease, when its time has come.
            remove(nova / "one" / "disk")
            await daemon.look()
            with pytest.raises(Leased, match="gone, for 24 h more"):
                await evictor.evict_image(A)
            await daemon.pass_s(GRACE_S + 1)
            assert (await evictor.evict_image(A)).spans == BASE_SPANS
            assert view.cached == 0

    body()
