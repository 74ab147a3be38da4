"""Fetching all of what is leased, in the background: an instance that has started must not need Glance again.
Rule: whatever a guest waits for goes first; of what nobody leases or asks for nothing is fetched.

An image that is opened, pinned or asked for is fetched to its last byte: the most recently opened first, in long
requests below everything else (`Priority.HYDRATION`), within a bandwidth and a concurrency. While a guest waits,
no request begins, and those that are under way stop taking bytes, so that the link is the guest's.

An image that the store does not take whole stands on Glance: its promise is at risk. That is said once, by name,
and stays in `status` until it is over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from cachefs.blocks import Blocks
from cachefs.errors import OriginError
from cachefs.fetcher import Fetcher
from cachefs.leases import Leases
from cachefs.plan.extents import BLOCK, Extent, subtract
from cachefs.store.content import Store, StoredView
from cachefs.store.format import OriginMode, ViewKind, ViewNo

log = logging.getLogger(__name__)

LOOK_S = 5.0
# One request: long enough that what it costs does not count, short enough that a guest who wants its last byte
# need not wait long for all that comes before it.
REQUEST_BYTES_MAX, REQUEST_BYTES_MIN, REQUEST_S = 16 << 20, 1 << 20, 0.25
# After a failure the image waits, twice as long each time.
AGAIN_S, AGAIN_MAX_S = 10.0, 600.0
# The store has what was fetched some milliseconds later, but for a slow disk.
LANDING_LOOK_S, LANDING_MAX_S = 0.02, 30.0
# An image is gone over so often before it is left alone for a while: others' flights may have been in between.
PASSES_MAX = 3
# While guests wait, it is looked so often whether they still do; but not for longer than this at a time.
COURTESY_S, COURTESY_MAX_S = 0.05, 5.0


@dataclass(eq=False)
class _Job:
    """One view that is to be whole. `since_s`: when somebody last opened it or asked for it, by the loop's clock.
    Nothing is missing before `at`, as far as is known."""

    view: StoredView
    since_s: float
    asked: bool = False
    failures: int = 0
    not_before_s: float = 0.0
    at: int = 0
    passes: int = 0
    claimed: list[Extent] = field(default_factory=list)  # What one of us is about to fetch.
    at_risk: str | None = None


class Hydrator:
    """`run` is the task. `on_open`: a lease is enough; else only `ask` is. `bandwidth` in bytes per second, 0 for
    no bound; `concurrency` requests at once. `settled` is called when a view has become whole."""

    def __init__(
        self,
        store: Store,
        fetcher: Fetcher,
        blocks: Blocks,
        leases: Leases,
        *,
        on_open: bool = True,
        bandwidth: int = 0,
        concurrency: int = 2,
        settled: Callable[[StoredView], None] = lambda view: None,
    ) -> None:
        self._store, self._fetcher, self._blocks, self._leases = store, fetcher, blocks, leases
        self._on_open, self._bandwidth, self._concurrency = on_open, bandwidth, concurrency
        self._settled = settled
        self._jobs: dict[ViewNo, _Job] = {}
        self._wake = trio.Event()
        self._paid_until_s = 0.0
        self.bytes_fetched = 0

    # ── for everybody, on the loop ──

    def opened(self, view: StoredView) -> None:
        """Somebody opened it just now."""
        if self._on_open:
            self._want(view)

    def ask(self, view: StoredView) -> None:
        """It is to be whole, whoever leases it."""
        self._want(view).asked = True

    def _want(self, view: StoredView) -> _Job:
        job = self._jobs.setdefault(view.number, _Job(view, 0.0))
        job.since_s = trio.current_time()
        self._wake.set()
        return job

    @property
    def at_risk(self) -> dict[str, str]:
        """Images that are leased and cannot be held whole, with the reason."""
        return {job.view.record.image: job.at_risk for job in self._jobs.values() if job.at_risk is not None}

    @property
    def backlog(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(max(0, job.view.size - job.view.cached) for job in self._jobs.values())

    def status(self) -> dict[str, object]:
        """For `status`, in bytes."""
        return {
            "images": len(self._jobs),
            "bytes_to_fetch": self.backlog,
            "bytes_fetched": self.bytes_fetched,
            "at_risk": self.at_risk,
        }

    # ── the task ──

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        self._paid_until_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            task_status.started()
            for _ in range(self._concurrency):
                nursery.start_soon(self._work)
            while True:
                self._look()
                await trio.sleep(LOOK_S)

    def _look(self) -> None:
        """Takes up what is leased (also since before the daemon began), and lets go of what is not any more."""
        for view in self._store.views():
            if self._is_worth_it(view) and self._on_open and self._leases.is_leased(view):
                self._jobs.setdefault(view.number, _Job(view, 0.0))
        for number, job in list(self._jobs.items()):
            if job.view.complete:
                self._finish(job)
            elif not self._is_worth_it(job.view) or not (job.asked or self._leases.is_leased(job.view)):
                del self._jobs[number]
        if self._jobs:
            self._wake.set()

    @staticmethod
    def _is_worth_it(view: StoredView) -> bool:
        return view.record.kind in (ViewKind.ORIGINAL, ViewKind.RAW) and not view.complete

    def _finish(self, job: _Job) -> None:
        if self._jobs.pop(job.view.number, None) is not None:
            if job.at_risk is not None:
                log.info("[image %s] is here whole now", job.view.record.image)
            self._settled(job.view)

    async def _work(self) -> None:
        """One of `concurrency`: the next piece of the next image, for ever."""
        while True:
            job = self._next()
            if job is None:
                woken = self._wake
                await woken.wait()
                if self._wake is woken:  # Else another was faster.
                    self._wake = trio.Event()
                continue
            try:
                await self._piece(job)
            except OriginError as error:
                self._failed(job, str(error))
            except Exception:  # A bug in one image's hydration is no reason to stop all.
                log.exception("[image %s] unexpected failure of hydration", job.view.record.image)
                self._failed(job, "unexpected failure")

    def _next(self) -> _Job | None:
        now_s = trio.current_time()
        if not self._store.health.may_write:
            return None  # What would be fetched could not be kept.
        ready = [job for job in self._jobs.values() if job.not_before_s <= now_s and not job.view.complete]
        return max(ready, key=lambda job: job.since_s, default=None)

    def _failed(self, job: _Job, why: str) -> None:
        job.failures += 1
        pause_s = min(AGAIN_S * 2.0 ** (job.failures - 1), AGAIN_MAX_S)
        job.not_before_s = trio.current_time() + pause_s
        self._at_risk(job, why)

    def _at_risk(self, job: _Job, why: str) -> None:
        if job.at_risk is None:
            image = job.view.record.image
            log.warning("[image %s] promise at risk: it is leased and cannot be fetched whole: %s", image, why)
        job.at_risk = why

    # ── one piece ──

    async def _piece(self, job: _Job) -> None:
        view = job.view
        extent = await self._missing(job)
        if extent is None and job.at:
            job.at, job.passes = 0, job.passes + 1
            if job.passes > PASSES_MAX:  # What was fetched goes as the rest comes.
                job.passes = 0
                self._failed(job, "the store does not hold it whole")
                return
            extent = await self._missing(job)
        if extent is None:
            if view.complete:
                self._finish(job)
            elif self._store.writer.trouble is not None:
                self._failed(job, self._store.writer.trouble)
            else:  # All that is missing is on its way for somebody else.
                job.not_before_s = trio.current_time() + 1.0
            return
        job.claimed.append(extent)
        try:
            await self._courtesy(extent.length)
            before = view.cached
            await self._blocks.hydrate(view, extent)
        finally:
            job.claimed.remove(extent)
        await self._until_landed(view, extent)
        self.bytes_fetched += max(view.cached - before, 0)
        if view.absent(extent) and self._fetcher.flight_for(view, extent.start) is None:
            self._failed(job, self._store.writer.trouble or "what was fetched is not kept")
            return
        job.failures, job.at = 0, extent.start
        if job.at_risk is not None and self._store.writer.trouble is None:
            log.info("[image %s] can be fetched again", view.record.image)
            job.at_risk = None

    async def _until_landed(self, view: StoredView, extent: Extent) -> None:
        """Returns when nothing of it is on its way any more; it need not be durable yet."""
        until_s = trio.current_time() + LANDING_MAX_S
        while self._under_way(view, extent) and trio.current_time() < until_s:  # noqa: ASYNC110
            await trio.sleep(LANDING_LOOK_S)

    @property
    def _request_bytes(self) -> int:
        if self._store.writer.trouble is not None:
            return REQUEST_BYTES_MIN  # To see whether it takes bytes again.
        by_rate = int(self._fetcher.link.rate * REQUEST_S) // BLOCK * BLOCK
        wanted = min(max(by_rate, REQUEST_BYTES_MIN), REQUEST_BYTES_MAX)
        return min(wanted, max(self._bandwidth // BLOCK * BLOCK, BLOCK)) if self._bandwidth else wanted

    def _under_way(self, view: StoredView, gap: Extent) -> list[Extent]:
        return subtract(gap, self._fetcher.not_under_way(view, gap))

    async def _missing(self, job: _Job) -> Extent | None:
        """The first stretch from `job.at` that is absent and that nobody brings, of at most one request; the whole
        image where it comes as one stream."""
        view, most = job.view, self._request_bytes
        if view.record.origin is OriginMode.STREAM:
            return None if self._fetcher.flight_for(view, 0) is not None else Extent(0, view.size)
        found: Extent | None = None
        at = job.at
        while at < view.size:
            span = view.span_of(at)
            await self._blocks.load(view, span)
            if at >> 30 != span.end >> 30:
                await trio.lowlevel.checkpoint()  # Maps that are in memory are looked at without one.
            for gap in view.absent(span):
                for free in subtract(gap, job.claimed + self._under_way(view, gap)):
                    if found is not None and free.start != found.end:
                        return found
                    found = free if found is None else Extent(found.start, free.end)
                    if found.length >= most:
                        return Extent(found.start, found.start + most)
            if found is not None and found.end < span.end:
                return found
            at = span.end
        return found

    async def _courtesy(self, length: int) -> None:
        """Returns when the bandwidth allows another request of `length` bytes, and no guest waits."""
        begins_s = max(self._paid_until_s, trio.current_time())
        if self._bandwidth:
            self._paid_until_s = begins_s + length / self._bandwidth
        await trio.sleep_until(begins_s)
        until_s = trio.current_time() + COURTESY_MAX_S
        # Nobody could set an event: many things end a wait.
        while self._blocks.waiting and trio.current_time() < until_s:  # noqa: ASYNC110
            await trio.sleep(COURTESY_S)
