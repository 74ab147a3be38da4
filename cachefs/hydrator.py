"""Fetching all of what is leased, in the background: an instance that has started must not need Glance again.
Rule: whatever a guest waits for goes first; of what nobody leases or asks for nothing is fetched.

An image that is opened, pinned or asked for is fetched to its last byte, in the order of `plan.hydration`, in
long requests below everything else (`Priority.HYDRATION`), within a bandwidth and a concurrency. While a guest
waits, no request begins, and those that are under way stop taking bytes, so that the link is the guest's. First
come the spans in which guests missed something, the last one first: what a guest reads next lies often close to
what it read (a boot of Debian touches 111 MiB in blocks of 64 KiB, and they lie in 96 spans of 512).

The disk inside a qcow2 stands on its file: the file is fetched whole and compared with Glance's hash, and the
disk is made of what is here then (`Derivation`). From the moment that the disk is wanted until it is made, its
file is spared by eviction, and what guests miss of the disk meanwhile is kept as the file's bytes too: so each
byte is fetched once.

An image that the store does not take whole stands on Glance: its promise is at risk. That is said once, by name,
and stays in `status` until it is over: at once where sizes say so or Glance has the image no more, else when a
fetch fails.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from cachefs import logs
from cachefs.blocks import Blocks
from cachefs.errors import ImageRefused, OriginChanged, OriginError, PrefetchEnded, StoreError
from cachefs.fetcher import Fetcher
from cachefs.leases import Leases
from cachefs.leisure import COURTESY_S
from cachefs.plan import hydration
from cachefs.plan.extents import BLOCK, Extent, aligned, subtract
from cachefs.plan.hydration import Candidate, Claim
from cachefs.store.content import Store
from cachefs.store.format import OriginMode, ViewKind, ViewNo
from cachefs.store.room import Usage
from cachefs.store.view import StoredView

log = logs.get(__name__)

LOOK_S = 5.0
LOOKED_AT_ONCE = 256
# One request: long enough that what it costs does not count, short enough that a guest who wants its last byte
# need not wait long for all that comes before it.
REQUEST_BYTES_MAX, REQUEST_BYTES_MIN, REQUEST_S = 16 << 20, 1 << 20, 0.25
# After a failure the image waits, twice as long each time.
AGAIN_S, AGAIN_MAX_S = 10.0, 600.0
# What is on its way for somebody else is looked at again when that has landed, at the latest after this.
OTHERS_MAX_S = 30.0
# An image is gone over so often before it is left alone for a while: others' flights may have been in between.
PASSES_MAX = 3
# Of a boot set; more is not one.
BOOT_EXTENTS_MAX = 65_536
# Whoever drops an image waits so long for what is under way of it.
LET_GO_S = 10.0
ENDED_MAX = 1000
# With less in the store nothing can be said of how dense it is.
DENSITY_FROM_BYTES = 256 << 20


class Disks(Protocol):
    """What is known of disks that are made of a file which is here. `Derivation` is it."""

    def original_of(self, view: StoredView) -> StoredView | None: ...

    def is_wanted(self, view: StoredView) -> bool: ...

    def is_ready(self, view: StoredView) -> bool: ...

    async def derive(self, view: StoredView, goes_on: Callable[[], bool]) -> None: ...


@dataclass(eq=False)
class _Job:
    """One view that is to be whole. `since_s`: when somebody last opened it or asked for it, by the loop's clock.
    `original`: what it is made of, if it is. Nothing is missing before `at`, as far as is known."""

    view: StoredView
    since_s: float
    original: StoredView | None = None
    asked: bool = False
    failures: int = 0
    not_before_s: float = 0.0
    at: int = 0
    passes: int = 0
    boots: list[Extent] | None = None  # What is fetched first, and is not known to be here; None: not asked yet.
    near: OrderedDict[int, None] = field(default_factory=OrderedDict)  # Spans of misses, the last one last.
    claimed: list[Extent] = field(default_factory=list)  # What one of us is about to fetch.
    waits: bool = False  # All that is left is on its way.
    deriving: bool = False
    over: bool = False  # Nobody wants it any more.
    idle: trio.Event = field(default_factory=trio.Event)  # Set when nobody works on it after it was over.
    no_room: str | None = None
    trouble: str | None = None
    said: bool = False  # That it is at risk.

    @property
    def at_risk(self) -> str | None:
        return self.trouble or self.no_room

    @property
    def is_busy(self) -> bool:
        return self.deriving or bool(self.claimed)

    def note_idle(self) -> None:
        if self.over and not self.is_busy:
            self.idle.set()


class Hydrator:
    """`run` is the task. `on_open`: a lease is enough; else only `ask` is. `bandwidth` in bytes per second, 0 for
    no bound; `concurrency` requests at once. `priority` of an image: lower first. `before_hydration` gives what is
    fetched of a view before all else, in its order; while `is_replaying` somebody else does that, and nothing of
    the view is fetched here. `is_gone`: whether Glance has an image no more. `disks` None: none are made of
    files."""

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
        priority: Callable[[str], int] = lambda image: 0,
        before_hydration: Callable[[StoredView], Sequence[Extent]] = lambda view: (),
        is_replaying: Callable[[StoredView], bool] = lambda view: False,
        is_gone: Callable[[str], bool] = lambda image: False,
        disks: Disks | None = None,
    ) -> None:
        self._store, self._fetcher, self._blocks, self._leases = store, fetcher, blocks, leases
        self._on_open, self._bandwidth, self._concurrency = on_open, bandwidth, concurrency
        self._priority, self._before_hydration = priority, before_hydration
        self._is_replaying = is_replaying
        self._is_gone, self._disks = is_gone, disks
        self._jobs: dict[ViewNo, _Job] = {}
        self._gone: dict[str, str] = {}  # Images that Glance has no more, leased and not whole.
        self._ended: OrderedDict[str, str] = (
            OrderedDict()
        )  # Why an image that was asked for is not fetched any more.
        self._wake = trio.Event()
        self._look_now = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._paid_until_s = 0.0
        self.bytes_fetched = 0

    # ── for everybody, on the loop ──

    def opened(self, view: StoredView) -> None:
        """Somebody opened it just now."""
        if self._on_open and self._is_wanted(view) and self._can_come(view):
            self._want(view)

    def ask(self, view: StoredView) -> None:
        """It is to be whole, whoever leases it."""
        self._ended.pop(view.record.image, None)
        if self._is_wanted(view):
            self._want(view).asked = True

    def progress(self, view: StoredView) -> None:
        """Raises PrefetchEnded when it was asked for, and is neither whole nor fetched any more."""
        job = self._jobs.get(view.number)
        if view.complete or (job is not None and job.asked):
            return
        raise PrefetchEnded(view.record.image, self._ended.get(view.record.image, "nobody asks for it any more"))

    async def let_go(self, image: str) -> None:
        """It is about to be dropped: whoever asked for it is told, and unless it is leased nothing more comes."""
        jobs = [job for job in self._jobs.values() if job.view.record.image == image]
        for job in sorted(jobs, key=lambda job: job.original is None):  # A disk before its file, which it needs.
            self._end_asking(job, "it was evicted")
        going = [job for job in jobs if job.over]
        for job in going:
            self._fetcher.abandon(job.view)
        with trio.move_on_after(LET_GO_S):
            for job in going:
                await job.idle.wait()

    def missed(self, view: StoredView, offset: int) -> None:
        """A guest waits for what lies there, and is likely to want next what lies around it."""
        job = self._jobs.get(view.number)
        if job is not None:
            at = view.span_of(offset).start
            job.near[at] = None
            job.near.move_to_end(at)

    def look(self) -> None:
        """Something that is waited for may have come: a file was verified, or leases changed."""
        self._look_now.set()

    def origin_is_well(self) -> None:
        """Somebody answers again: what failed meanwhile is tried at once."""
        for job in self._jobs.values():
            job.not_before_s = 0.0
        self._wake.set()

    def became_whole(self, view: StoredView) -> None:
        """Its last byte is here."""
        job = self._jobs.get(view.number)
        if job is not None and not self._is_wanted(view):
            self._finish(job)
        self.look()

    def gone(self, image: str) -> None:
        """Glance has it no more. What is leased of it and not here will never be."""
        for job in [job for job in self._jobs.values() if job.view.record.image == image]:
            self._end_if_gone(job)
        leased = [v for v in self._store.views() if v.record.image == image and self._is_leased(v)]
        self._note_gone(image, leased)

    @property
    def at_risk(self) -> dict[str, str]:
        """Images that are leased and cannot be held whole, with the reason."""
        risks = {job.view.record.image: job.at_risk for job in self._jobs.values() if job.said and job.at_risk}
        return risks | self._gone

    @property
    def backlog(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(max(0, job.view.size - job.view.cached) for job in self._jobs.values() if not job.original)

    def status(self) -> dict[str, object]:
        """For `status`, in bytes."""
        return {
            "images": len({job.view.record.image for job in self._jobs.values()}),
            "bytes_to_fetch": self.backlog,
            "bytes_fetched": self.bytes_fetched,
            "at_risk": self.at_risk,
        }

    # ── jobs ──

    def _want(self, view: StoredView) -> _Job:
        job = self._take_up(view)
        job.since_s = trio.current_time()
        if job.original is not None and job.original.number in self._jobs:
            self._jobs[job.original.number].since_s = job.since_s
        self._look_now.set()
        self._wake.set()
        return job

    def _take_up(self, view: StoredView) -> _Job:
        job = self._jobs.get(view.number)
        if job is None:
            job = self._jobs[view.number] = _Job(view, 0.0, self._original_of(view))
        if job.original is not None:
            self._leases.needed.add(job.original.number)
            if self._is_wanted(job.original):
                self._take_up(job.original)
        return job

    def _original_of(self, view: StoredView) -> StoredView | None:
        return self._disks.original_of(view) if self._disks is not None else None

    def _is_wanted(self, view: StoredView) -> bool:
        """Whether something of it is left to be done."""
        if view.condemned is not None:
            return False
        if self._disks is not None and self._disks.original_of(view) is not None:
            return self._disks.is_wanted(view)
        return view.record.kind in (ViewKind.ORIGINAL, ViewKind.RAW) and not view.complete

    def _is_leased(self, view: StoredView) -> bool:
        return self._on_open and self._leases.is_leased(view)

    def _can_come(self, view: StoredView) -> bool:
        """Whether Glance has it, or it can be made of what is here."""
        if not self._is_gone(view.record.image):
            return True
        original = self._original_of(view)
        return original is not None and original.complete

    def _end_if_gone(self, job: _Job) -> bool:
        """Whether it ends here."""
        if self._can_come(job.view):
            return False
        self._end_asking(job, "Glance has it no more")
        self._drop(job)
        return True

    def _drop(self, job: _Job) -> None:
        if self._jobs.pop(job.view.number, None) is None:
            return
        job.over = True
        job.note_idle()
        if job.original is not None:
            self._leases.needed.discard(job.original.number)
            self.look()  # Its file may be wanted by nobody now.

    def _finish(self, job: _Job) -> None:
        if job.said and job.view.complete:
            log.info("is here whole now", image=job.view.record.image)
        self._drop(job)

    def _end_asking(self, job: _Job, why: str) -> None:
        """Who asked for it is told; it goes on as long as it is leased."""
        if job.asked:
            job.asked = False
            self._ended[job.view.record.image] = why
            while len(self._ended) > ENDED_MAX:
                self._ended.popitem(last=False)
        if not self._is_leased(job.view):
            self._drop(job)

    # ── looking ──

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        self._paid_until_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            for _ in range(self._concurrency):
                nursery.start_soon(self._work)
            while True:
                self._look_now = trio.Event()
                await self._look()
                with trio.move_on_after(LOOK_S):
                    await self._look_now.wait()

    async def _look(self) -> None:
        """Takes up what is leased (also since before the daemon began), and lets go of what is not any more."""
        gone: dict[str, list[StoredView]] = {}
        leased: list[StoredView] = []
        cached = 0
        for count, view in enumerate(self._store.views(), 1):
            if count % LOOKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            cached += view.cached
            if not self._is_leased(view):
                continue
            leased.append(view)
            if self._is_gone(view.record.image):
                gone.setdefault(view.record.image, []).append(view)
            if view.number not in self._jobs and self._is_wanted(view) and self._can_come(view):
                self._take_up(view)
        for image in [image for image in self._gone if image not in gone]:
            del self._gone[image]
        for image, views in gone.items():
            self._note_gone(image, views)
        for job in list(self._jobs.values()):
            if not self._is_wanted(job.view):
                self._finish(job)
            elif self._end_if_gone(job):
                pass
            elif not (job.asked or self._is_leased(job.view)):
                self._drop(job)
            elif job.original is not None and self._is_wanted(job.original):
                self._take_up(job.original).since_s = job.since_s  # Something of it went.
        if self._jobs:
            await self._judge_room(leased, cached)
            self._wake.set()

    async def _judge_room(self, leased: Sequence[StoredView], cached: int) -> None:
        """Which of what is leased does not fit, by its size: a risk before anything has failed. `cached`: bytes of
        all views, leased or not."""
        usage = await trio.to_thread.run_sync(self._store.usage)
        density = min(usage.used / cached, 1.0) if cached >= DENSITY_FROM_BYTES else 1.0
        reasons = hydration.without_room(self._claims(leased), usage.limit, density)
        for number, job in list(self._jobs.items()):
            job.no_room = reasons.get(number)
            if (
                job.no_room is not None
                and job.asked
                and not self._is_leased(job.view)
                and self._never_fits(job, usage)
            ):
                self._end_asking(job, job.no_room)
            else:
                self._note(job)

    @staticmethod
    def _never_fits(job: _Job, usage: Usage) -> bool:
        return job.view.size - job.view.cached > usage.limit

    def _claims(self, leased: Sequence[StoredView]) -> list[Claim]:
        """Of every view that is leased, or asked for."""
        claims = []
        asked = [job.view for job in self._jobs.values()]
        for view in dict.fromkeys([*asked, *(view for view in leased if view.cached)]):
            job = self._jobs.get(view.number)
            # A disk that is made of a file needs no Glance: where it has no room, its file is here.
            missing = view.size - view.cached if job is not None and job.original is None else 0
            image = view.record.image
            since_s = job.since_s if job is not None else 0.0
            claims.append(Claim(view.number, image, view.cached, missing, self._priority(image), since_s))
        return claims

    # ── risks ──

    def _note(self, job: _Job) -> None:
        """Says once that a promise is at risk, and once that it is not any more."""
        image = job.view.record.image
        stands_on_glance = job.original is None or not job.original.complete
        if job.at_risk is not None and not job.said and stands_on_glance and self._is_leased(job.view):
            job.said = True
            log.warning("promise at risk: it is leased and cannot be held whole: %s", job.at_risk, image=image)
        elif job.said and not self._is_leased(job.view):
            job.said = False
        elif job.said and job.at_risk is None:
            job.said = False
            log.info("can be held whole again, as it seems", image=image)

    def _note_gone(self, image: str, leased: Sequence[StoredView]) -> None:
        """`leased`: its views that are. One that is whole is enough: a disk is made of its file."""
        views = [view for view in leased if view.record.kind in (ViewKind.ORIGINAL, ViewKind.RAW)]
        views += [original for view in views if (original := self._original_of(view)) is not None]
        if not views or any(view.complete or view.condemned is not None for view in views):
            self._gone.pop(image, None)
            return
        missing = min(view.size - view.cached for view in views)
        if image not in self._gone:
            log.error(
                "promise at risk: it is leased, Glance has it no more, and %d bytes of it are not here",
                missing,
                image=image,
            )
        self._gone[image] = f"Glance has it no more, and {missing} bytes of it are not here"

    def _failed(self, job: _Job, why: str) -> None:
        job.failures += 1
        pause_s = min(AGAIN_S * 2.0 ** (job.failures - 1), AGAIN_MAX_S)
        job.not_before_s = trio.current_time() + pause_s
        job.trouble = why
        self._note(job)

    def _went_well(self, job: _Job) -> None:
        job.failures = 0
        if self._store.writer.trouble is None:
            job.trouble = None
            self._note(job)

    # ── work ──

    async def _work(self) -> None:
        """One of `concurrency`: the next piece of the next image, for ever."""
        while True:
            job = self._next()
            if job is None:
                woken = self._wake
                with trio.move_on_at(self._due_s()):
                    await woken.wait()
                if self._wake is woken:  # Else another was faster.
                    self._wake = trio.Event()
                continue
            try:
                await (self._derive(job) if self._is_to_derive(job) else self._piece(job))
            except ImageRefused as error:
                self._end_asking(job, str(error))
                if self._is_wanted(job.view):
                    self._failed(job, str(error))
                else:
                    self._drop(job)
            except (OriginError, StoreError) as error:
                self._failed(job, str(error))
            except Exception:  # A bug in one image's hydration is no reason to stop all.
                log.exception("unexpected failure of hydration", image=job.view.record.image)
                self._failed(job, "unexpected failure")
            job.note_idle()

    def _next(self) -> _Job | None:
        now_s = trio.current_time()
        if not self._store.health.may_write:
            return None  # What would be fetched could not be kept.
        candidates = []
        others = any(job.at_risk is None and job.original is None for job in self._jobs.values())
        for job in self._jobs.values():
            if job.not_before_s <= now_s and not job.waits and self._is_ready(job):
                if self._is_replaying(job.view):
                    continue  # It would be in the way of its guest.
                image = job.view.record.image
                boots = bool(job.boots) or job.boots is None
                fits = job.no_room is None
                if not fits and others and not boots:
                    continue  # It would take the room that is theirs.
                candidates.append(Candidate(job.view.number, self._priority(image), job.since_s, boots, fits))
        found = hydration.first(candidates)
        return None if found is None else self._jobs[ViewNo(found.number)]

    def _is_ready(self, job: _Job) -> bool:
        if job.original is None:
            return not job.view.complete
        assert self._disks is not None, "somebody told what it is made of"
        boots = (job.boots is None or bool(job.boots)) and not job.view.complete
        return not job.deriving and (boots or self._disks.is_ready(job.view))

    def _is_to_derive(self, job: _Job) -> bool:
        return job.original is not None and self._disks is not None and self._disks.is_ready(job.view)

    def _due_s(self) -> float:
        """When a job that waits may go on."""
        now_s = trio.current_time()
        return min((j.not_before_s for j in self._jobs.values() if j.not_before_s > now_s), default=float("inf"))

    async def _derive(self, job: _Job) -> None:
        assert self._disks is not None, "it is ready"
        job.deriving = True
        try:
            await self._disks.derive(job.view, lambda: not job.over)
        finally:
            job.deriving = False
        if job.over:
            return
        if not self._is_wanted(job.view):
            self._finish(job)
        elif self._is_to_derive(job):
            self._failed(job, "what was made of its disk went again")

    # ── one piece ──

    async def _piece(self, job: _Job) -> None:
        view = job.view
        if job.boots is None or job.boots:
            extent = await self._missing_of_boot(job)
            if extent is None:
                return  # It stands in line with the others now.
            in_order = False
        else:
            extent = await self._missing_near(job)
            in_order = extent is None
            if extent is None:
                extent = await self._next_missing(job)
        if extent is None:
            self._without_piece(job)
            return
        job.claimed.append(extent)
        try:
            await self._courtesy(extent.length)
            if job.over:
                return
            before = view.cached
            brought = await self._blocks.hydrate(view, extent)
        except OriginError as error:
            job.near.clear()  # Nobody is to be kept from the rest by what cannot be had.
            if isinstance(error, OriginChanged):
                job.boots, job.at = [], extent.end  # What lies behind may be as it was.
            raise
        finally:
            job.claimed.remove(extent)
            self._look_again(job)
        self.bytes_fetched += max(view.cached - before, 0)
        if job.over:
            return
        if brought is None:
            self._let_others(job)
            return
        if self._is_lost(view, brought):
            why = self._store.writer.trouble or "what was fetched is not kept"
            self._failed(job, why)
            if job.asked and not self._is_leased(view):
                self._end_asking(job, why)
            return
        if in_order:
            job.at = extent.start
        self._went_well(job)

    def _is_lost(self, view: StoredView, extent: Extent) -> bool:
        """Whether something of it came and is not here."""
        return any(self._fetcher.not_under_way(view, gap) for gap in view.absent(extent))

    def _without_piece(self, job: _Job) -> None:
        """Nothing is to be fetched of it at this moment."""
        if not self._is_wanted(job.view):
            self._finish(job)
        elif job.passes > PASSES_MAX:  # What was fetched goes as the rest comes.
            job.passes = 0
            why = "the store does not hold it whole"
            self._failed(job, why)
            if job.asked and not self._is_leased(job.view):
                self._end_asking(job, why)
        elif self._store.writer.trouble is not None:
            self._failed(job, self._store.writer.trouble)
        elif job.original is None:
            self._let_others(job)

    def _let_others(self, job: _Job) -> None:
        """All that is left is on its way, for one of us or for somebody else."""
        job.waits = True
        if not job.claimed:
            assert self._nursery is not None, "it runs"
            self._nursery.start_soon(self._wait_for_others, job)

    async def _wait_for_others(self, job: _Job) -> None:
        with trio.move_on_after(OTHERS_MAX_S):
            if not await self._fetcher.until_one_landed(job.view):
                await trio.sleep(LOOK_S)  # It landed meanwhile, or nobody can tell what is missing.
        self._look_again(job)

    def _look_again(self, job: _Job) -> None:
        job.waits = False
        self._wake.set()

    @property
    def _request_bytes(self) -> int:
        if self._store.writer.trouble is not None or self._fetcher.connections == 1:
            return REQUEST_BYTES_MIN  # To see whether it takes bytes again; and a guest waits for the only place.
        by_rate = int(self._fetcher.link.rate * REQUEST_S) // BLOCK * BLOCK
        wanted = min(max(by_rate, REQUEST_BYTES_MIN), REQUEST_BYTES_MAX)
        return min(wanted, max(self._bandwidth // BLOCK * BLOCK, BLOCK)) if self._bandwidth else wanted

    def _under_way(self, view: StoredView, gap: Extent) -> list[Extent]:
        return subtract(gap, self._fetcher.not_under_way(view, gap))

    async def _next_missing(self, job: _Job) -> Extent | None:
        """What to fetch next of it; the whole image where it comes as one stream."""
        view = job.view
        if view.record.origin is OriginMode.STREAM:
            return None if self._fetcher.is_under_way(view) else Extent(0, view.size)
        if job.original is not None:
            return None
        extent = await self._missing(job)
        if extent is None and job.at:
            job.at, job.passes = 0, job.passes + 1
            extent = await self._missing(job) if job.passes <= PASSES_MAX else None
        return extent

    async def _missing_of_boot(self, job: _Job) -> Extent | None:
        view = job.view
        if view.record.origin is OriginMode.STREAM:
            job.boots = []  # It comes in its own order.
        if job.boots is None:
            told = self._before_hydration(view)[:BOOT_EXTENTS_MAX]
            whole = Extent(0, view.size)
            job.boots = [
                part for one in reversed(told) if (part := aligned(one.clamp(whole), BLOCK, view.size)).length
            ]
        while job.boots:
            one = job.boots[-1]
            await self._blocks.load(view, one)
            if not job.boots or job.boots[-1] is not one:
                continue  # Another of us was faster.
            for gap in view.absent(one):
                for free in subtract(gap, job.claimed + self._under_way(view, gap)):
                    return Extent(free.start, min(free.start + self._request_bytes, free.end))
            job.boots.pop()
        return None

    async def _missing_near(self, job: _Job) -> Extent | None:
        """The first stretch that is missing of a span in which a guest missed something; of the last such span."""
        view, most = job.view, self._request_bytes
        if view.record.origin is OriginMode.STREAM or job.original is not None:
            job.near.clear()
        while job.near:
            at = next(reversed(job.near))
            span = view.span_of(at)
            await self._blocks.load(view, span)
            for gap in view.absent(span):
                for free in subtract(gap, job.claimed + self._under_way(view, gap)):
                    return Extent(free.start, min(free.start + most, free.end))
            job.near.pop(at, None)
        return None

    async def _missing(self, job: _Job) -> Extent | None:
        """The first stretch from `job.at` that is absent and that nobody brings, of at most one request."""
        view, most = job.view, self._request_bytes
        found: Extent | None = None
        at = job.at
        while at < view.size:
            span = view.span_of(at)
            await self._blocks.load(view, span)
            if at >> 28 != span.end >> 28:
                await trio.lowlevel.checkpoint()  # Maps that are in memory are looked at without one.
            for gap in view.absent(Extent(at, span.end)):
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
        await self._blocks.until_calm(COURTESY_S)
