"""When a disk is trusted, when it is spared, when it is left alone. Time is virtual; what hangs are threads."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from cachefs.plan.extents import PAGE
from cachefs.store.health import (
    AT_ONCE,
    BAD_PROBES,
    ERRORS_MAX,
    ERRORS_S,
    GOOD_PROBES,
    PROBE_DOWN_S,
    PROBE_LIMIT_S,
    PROBE_S,
    READ_LIMIT_DEGRADED_S,
    READ_LIMIT_S,
    RELAPSE_S,
    WRITE_LIMIT_S,
    DiskUnusable,
    Health,
    Side,
    State,
    is_disk_fault,
    read_probe,
    write_probe,
)

HEALTHY, DEGRADED, DOWN = State


class ScriptedDisk:
    """Works, fails or hangs. It is its own `to_thread`: the clock jumps while its threads hang, and not before
    they do."""

    def __init__(self) -> None:
        self.fails: OSError | None = None
        self.hangs = False
        self.operations = self.hanging = self.most_hanging = 0
        self._let_go = threading.Event()
        self._went_on = trio.Event()
        self._moved = threading.Condition()

    def work(self) -> str:
        with self._moved:
            self.operations += 1
            if self.hangs:
                self.hanging += 1
                self.most_hanging = max(self.most_hanging, self.hanging)
                self._moved.notify_all()
        if self.hangs:
            assert self._let_go.wait(20)
            with self._moved:
                self.hanging -= 1
                self._moved.notify_all()
        if self.fails is not None:
            raise self.fails
        return "bytes"

    async def __call__(
        self, work: Callable[..., Any], *args: Any, abandon_on_cancel: bool = False, limiter: Any = None
    ) -> Any:
        await trio.lowlevel.checkpoint()
        outcome: list[Any] = []

        def in_thread() -> None:
            try:
                outcome.append(work(*args))
            except OSError as error:
                outcome.append(error)
            with self._moved:
                self._moved.notify_all()

        before = self.hanging
        thread = threading.Thread(target=in_thread)
        thread.start()
        with self._moved:
            assert self._moved.wait_for(lambda: outcome or self.hanging > before, 20)
        if not outcome:
            with trio.CancelScope(shield=not abandon_on_cancel):
                await self._went_on.wait()
        thread.join()
        if isinstance(outcome[0], OSError):
            raise outcome[0]
        return outcome[0]

    async def let_go(self) -> None:
        """What hangs comes back, and nothing hangs any more."""
        self.hangs = False
        self._let_go.set()
        with self._moved:
            assert self._moved.wait_for(lambda: not self.hanging, 20)
        self._went_on.set()
        await trio.testing.wait_all_tasks_blocked()
        self._let_go, self._went_on = threading.Event(), trio.Event()


def virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**fixtures: Any) -> None:
        async def main() -> None:
            await test(**fixtures)

        trio.run(main, clock=MockClock(autojump_threshold=0))

    return run


@asynccontextmanager
async def watched(disk: ScriptedDisk) -> AsyncIterator[Health]:
    """A health whose tasks run; probes go to the same disk."""
    health = Health(to_thread=disk)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(health.run, disk.work, disk.work)
        yield health
        await disk.let_go()
        nursery.cancel_scope.cancel()


def eio() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


async def attempt(side: Side, disk: ScriptedDisk) -> str | None:
    """What it gives; None when it is unusable."""
    try:
        return await side.attempt("a page", disk.work)
    except DiskUnusable:
        return None


async def fail(side: Side, disk: ScriptedDisk, times: int) -> None:
    disk.fails = eio()
    for _ in range(times):
        assert await attempt(side, disk) is None
    disk.fails = None


@pytest.fixture
def changes(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged so far, one word for each change."""
    caplog.set_level(logging.INFO, "cachefs.store.health")
    words = ("healthy again", "degraded", "down")

    def said() -> list[str]:
        return [next(word for word in words if word in record.getMessage()) for record in caplog.records]

    return said


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_few_errors_are_nothing(changes: Callable[[], list[str]]) -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:
        await fail(health.reads, disk, ERRORS_MAX - 1)
        await trio.sleep(ERRORS_S)
        await fail(health.reads, disk, ERRORS_MAX - 1)
        assert health.state is HEALTHY
        assert health.reads.errors == 2 * (ERRORS_MAX - 1)
    assert changes() == []


@virtual_time
async def test_several_errors_within_a_minute_degrade_and_probes_restore(
    changes: Callable[[], list[str]],
) -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:
        await fail(health.reads, disk, ERRORS_MAX)
        assert health.state is health.reads.state is DEGRADED
        assert "Input/output error" in str(health.why)
        assert health.writes.state is HEALTHY
        before = disk.operations
        await trio.sleep(GOOD_PROBES * PROBE_S - 0.1)
        assert (health.state, disk.operations - before) == (DEGRADED, GOOD_PROBES - 1)
        await trio.sleep(0.2)
        assert (health.state, disk.operations - before, health.why) == (HEALTHY, GOOD_PROBES, None)
        await trio.sleep(1000)
        assert disk.operations - before == GOOD_PROBES  # No probes while all is well.
    assert changes() == ["degraded", "healthy again"]


@virtual_time
async def test_an_error_in_between_begins_the_good_probes_anew() -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:
        await fail(health.reads, disk, ERRORS_MAX)
        await trio.sleep(2.5 * PROBE_S)
        await fail(health.reads, disk, 1)
        await trio.sleep((GOOD_PROBES - 1) * PROBE_S)
        assert health.state is DEGRADED
        await trio.sleep(PROBE_S)
        assert health.state is HEALTHY


@virtual_time
async def test_what_goes_on_failing_is_down_and_comes_back_over_degraded(
    changes: Callable[[], list[str]],
) -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:
        disk.fails = eio()
        for _ in range(ERRORS_MAX):
            await attempt(health.reads, disk)
        await trio.sleep(BAD_PROBES * PROBE_S + 0.1)
        assert health.state is DOWN
        before = disk.operations
        assert await attempt(health.reads, disk) is None
        assert disk.operations == before, "a disk that is down is left alone"
        await trio.sleep(10 * PROBE_DOWN_S)
        assert disk.operations - before == 10
        disk.fails = None
        await trio.sleep(PROBE_DOWN_S)
        assert health.state is DEGRADED
        assert await attempt(health.reads, disk) == "bytes"
        await trio.sleep((GOOD_PROBES - 1) * PROBE_S)
        assert health.state is HEALTHY
    assert changes() == ["degraded", "down", "degraded", "healthy again"]


@virtual_time
async def test_who_fails_again_soon_must_be_good_for_longer() -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:

        async def seconds_to_recover() -> float:
            await fail(health.reads, disk, ERRORS_MAX)
            began_s, recovered = trio.current_time(), trio.Event()
            health.on_change = recovered.set
            await recovered.wait()
            return trio.current_time() - began_s

        assert [round(await seconds_to_recover()) for _ in range(3)] == [3, 6, 12]
        await trio.sleep(RELAPSE_S)
        assert round(await seconds_to_recover()) == 3


@virtual_time
async def test_a_full_disk_is_no_bad_disk() -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:
        disk.fails = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for _ in range(3 * ERRORS_MAX):
            with pytest.raises(OSError, match="No space"):
                await health.reads.attempt("a page", disk.work)
            with pytest.raises(OSError, match="No space"):
                await health.writes.patiently("a commit", disk.work)
        assert health.state is HEALTHY


def test_whose_fault_an_error_is() -> None:
    blamed = (errno.EIO, errno.EROFS, errno.ENXIO, errno.EUCLEAN, errno.EBADMSG, errno.ENOTCONN, errno.ESTALE)
    assert all(is_disk_fault(OSError(code, "")) for code in blamed)
    others = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EBADF, errno.ENOMEM, errno.EMFILE)
    assert not any(is_disk_fault(OSError(code, "")) for code in others)


# ── Hanging ───────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_readers_of_a_disk_that_hangs_wait_once_and_not_again() -> None:
    disk = ScriptedDisk()
    waited: list[float] = []

    async def reader(side: Side) -> None:
        for _ in range(10):
            began_s = trio.current_time()
            assert await attempt(side, disk) is None
            waited.append(trio.current_time() - began_s)

    async with watched(disk) as health:
        disk.hangs = True
        async with trio.open_nursery() as readers:
            for _ in range(20):
                readers.start_soon(reader, health.reads)
        assert health.state is DEGRADED
        assert "hangs" in str(health.why)
        assert sum(seconds > 0.5 for seconds in waited) == 20, "each waits once"
        assert max(waited) == pytest.approx(READ_LIMIT_S)
        assert health.reads.hung == 20
        await trio.sleep(PROBE_S + PROBE_LIMIT_S + BAD_PROBES * PROBE_S)
        assert health.state is DOWN
        await disk.let_go()
        assert health.reads.hung == 0


@virtual_time
async def test_a_degraded_side_admits_few_at_once() -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:
        await fail(health.reads, disk, ERRORS_MAX)
        disk.hangs = True
        got: list[str | None] = []

        async def reader() -> None:
            got.append(await attempt(health.reads, disk))

        async with trio.open_nursery() as readers:
            for _ in range(10):
                readers.start_soon(reader)
            await trio.sleep(READ_LIMIT_DEGRADED_S / 2)
            assert got == [None] * (10 - AT_ONCE), "who is not admitted does not wait"
            assert not health.may_read
        assert health.reads.hung == AT_ONCE
        await disk.let_go()
        assert health.may_read


@virtual_time
async def test_there_is_one_probe_at_a_time_however_long_it_hangs() -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:
        await fail(health.reads, disk, ERRORS_MAX)
        disk.hangs = True
        await trio.sleep(PROBE_S + PROBE_LIMIT_S + BAD_PROBES * PROBE_S)
        assert health.state is DOWN
        await trio.sleep(100 * PROBE_DOWN_S)
        assert disk.most_hanging == 1
        await disk.let_go()
        await trio.sleep(PROBE_DOWN_S + GOOD_PROBES * PROBE_S)
        assert health.state is HEALTHY


@virtual_time
async def test_a_commit_that_hangs_is_waited_for_by_nobody_else() -> None:
    disk = ScriptedDisk()
    said: list[tuple[State, bool]] = []
    async with watched(disk) as health, trio.open_nursery() as nursery:
        health.on_change = lambda: said.append((health.writes.state, health.may_write))
        disk.hangs = True
        nursery.start_soon(health.writes.patiently, "a commit", disk.work)
        await trio.sleep(WRITE_LIMIT_S - 1)
        assert health.may_write
        await trio.sleep(2)
        assert not health.may_write
        assert (health.reads.state, health.writes.state, health.may_read) == (HEALTHY, DEGRADED, True)
        assert said == [(DEGRADED, False)]
        await disk.let_go()
        assert health.may_write
        await trio.sleep(PROBE_LIMIT_S + (GOOD_PROBES + 1) * PROBE_S)
        assert health.state is HEALTHY


@virtual_time
async def test_who_gave_up_before_the_limit_leaves_a_thread_that_is_noticed() -> None:
    """Reads have deadlines of their own, which may be shorter than ours."""
    disk = ScriptedDisk()
    async with watched(disk) as health:
        disk.hangs = True
        with trio.move_on_after(READ_LIMIT_S / 5) as deadline:
            await attempt(health.reads, disk)
        assert deadline.cancelled_caught
        await trio.sleep(READ_LIMIT_S)
        assert health.state is DEGRADED


@virtual_time
async def test_who_waits_for_a_turn_only_is_not_under_way() -> None:
    limiter = trio.CapacityLimiter(1)
    side = Side("reads", READ_LIMIT_S, READ_LIMIT_DEGRADED_S)
    await limiter.acquire_on_behalf_of("another")
    with trio.move_on_after(1):
        await side.attempt("a page", lambda: None, limiter=limiter)
    assert side.under_way == set()


# ── Both sides ────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_disk_that_only_reads_goes_on_giving() -> None:
    disk = ScriptedDisk()
    health = Health(to_thread=disk)
    async with trio.open_nursery() as nursery:

        def refuse() -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        nursery.start_soon(health.run, disk.work, refuse)
        for _ in range(ERRORS_MAX):
            with pytest.raises(OSError, match="Read-only"):
                await health.writes.patiently("a commit", refuse)
        await trio.sleep(BAD_PROBES * PROBE_S + 0.1)
        assert (health.reads.state, health.writes.state, health.state) == (HEALTHY, DOWN, DOWN)
        assert (health.may_read, health.may_look_up, health.may_write) == (True, True, False)
        assert "Read-only" in str(health.why)
        status = health.status()
        assert (status["state"], status["reads"]["state"], status["writes"]["state"]) == (
            "down",
            "healthy",
            "down",
        )
        nursery.cancel_scope.cancel()


@virtual_time
async def test_without_reads_nothing_is_written_either() -> None:
    disk = ScriptedDisk()
    async with watched(disk) as health:
        await fail(health.reads, disk, ERRORS_MAX)
        assert (health.writes.state, health.may_look_up, health.may_write) == (HEALTHY, False, False)


# ── Probes ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "1.seg").write_bytes(bytes(5 * PAGE + 1))
    file = os.open(tmp_path / "1.seg", os.O_RDWR)
    yield file
    os.close(file)


def test_probes_of_a_good_disk(tmp_path: Path, segment: int) -> None:
    files = len(os.listdir("/proc/self/fd"))
    read_probe({})
    read_probe({1: segment})
    write_probe(tmp_path)
    write_probe(tmp_path)
    assert (tmp_path / "probe").stat().st_size == PAGE
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_probe_of_a_folder_that_is_gone_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_probe(tmp_path / "gone")


def test_a_probe_of_a_removed_segment(tmp_path: Path, segment: int) -> None:
    (tmp_path / "1.seg").unlink()
    read_probe({1: segment})
