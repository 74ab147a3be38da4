"""Makes room: in the background between the watermarks, at once when a landing met the limit, and when asked.
Rule: nothing is handed to the store to be dropped but what was found not leased in the same step of the loop.

Every few seconds the loop asks the filesystem how full the store is, and has `plan.eviction` say how much is to
go and what. The plan is made in a thread and stands for some seconds; it is performed in slices, and before each
slice leases and uses are looked at again. How much came back is what the store says of each slice, and then the
filesystem of all of them: spans share chunks, so they free less than they seem to hold, or nothing.

A landing that met the limit waits (`on_full`): for it room is made before anything else, and below the watermarks
too. Where nothing may be dropped it is told so (`no_room`): its bytes are served and not kept. That is a condition
and no failure: it is logged once, and stands in `status` until it is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import trio

from cachefs import logs
from cachefs.errors import CachefsError, Leased, StoreError
from cachefs.leases import SETTLE_MAX_S, LeasedView, Leases
from cachefs.plan import eviction
from cachefs.plan.eviction import Priority, Standing, Victim, ViewUse
from cachefs.store.format import SpanNo, ViewKind, ViewNo
from cachefs.uses import Uses
from cachefs.words import counted

log = logs.get(__name__)

ROUND_S = 5.0
PAUSE_S = 5.0  # After a failure of the store.
ROOM_MAX_S = 10.0  # Whoever writes a scratch file waits for room no longer than this.
# One slice is one commit: long enough to be worth its syncs, short enough that leases are looked at often, and
# that who waits for room gets some soon.
SLICE_SPANS = 64
# A plan names that many victims, 16 GiB of them; making one takes a tenth of a second of a store of 1 TiB.
PLAN_SPANS = 4096
PLAN_KEPT_S = 10.0
# In the background the filesystem is asked again after so much.
STEP_BYTES = 1 << 30
# "Nothing can be evicted" is over when for so long it was not so: else it would be said again and again.
STUCK_S = 60.0
# Spans of which nothing is known are looked for at most that often.
SEARCH_S = 60.0


class Cause(StrEnum):
    """What made spans go. The value is the word in `status`."""

    WATERMARK = "watermark"
    FULL = "full"
    ENDED = "ended"
    ASKED = "asked"


class EvictableView(LeasedView, Protocol):
    """What is looked at of a view."""

    @property
    def cached(self) -> int: ...


class EvictableStore(Protocol):
    """What is asked of the store; `usage` in a thread."""

    @property
    def span_size(self) -> int: ...

    def usage(self) -> eviction.Space: ...

    def views(self) -> Sequence[EvictableView]: ...

    async def evict(self, spans: Sequence[tuple[ViewNo, SpanNo]]) -> int: ...

    def forget_view(self, view: ViewNo) -> None: ...

    def no_room(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Shares of what the store may hold: above `high` the background begins, down to `low`."""

    high: float
    low: float


@dataclass
class Evicted:
    """What went: spans, and the bytes that came back for them."""

    spans: int = 0
    bytes: int = 0


@dataclass(eq=False)
class Asked(Evicted):
    """One image that somebody wants dropped. `done` is set when it is, or could not be (`error`). `cached`: how
    much of it was here; what is shared with others, or zeros, gives nothing back."""

    image: str = ""
    cached: int = 0
    done: trio.Event = field(default_factory=trio.Event)
    error: CachefsError | None = None


class Evictor:
    """See the module. `run` is its task. `origin_is_well` says whether what is dropped could be fetched again;
    `priority_of` what an operator says of an image; `is_held` whether a policy holds it."""

    def __init__(
        self,
        store: EvictableStore,
        uses: Uses,
        leases: Leases,
        watermarks: Watermarks,
        origin_is_well: Callable[[], bool] = lambda: True,
        priority_of: Callable[[str], Priority] = lambda image: Priority.NORMAL,
        is_held: Callable[[str], bool] = lambda image: False,
    ) -> None:
        self._store, self._uses, self._leases, self._watermarks = store, uses, leases, watermarks
        self._origin_is_well, self._priority_of, self._is_held = origin_is_well, priority_of, is_held
        self._wake = trio.Event()
        self._wanted = self._freed = 0
        self._tried = trio.Event()
        self._asked: dict[str, Asked] = {}
        self._nursery: trio.Nursery | None = None
        self.before_asked: Callable[[str], Awaitable[None]] = _nothing  # Whoever fetches an image lets go of it.
        self._plan: deque[Victim] = deque()
        self._planned_came = 0
        self._planned_s = self._searched_s = self._stuck_s = -float("inf")
        self.stuck: str | None = None  # Why nothing more can be evicted, for `status`.
        self.trouble: str | None = None  # What the store failed with last, until it does not.
        self.evicted = {cause: Evicted() for cause in Cause}

    # ── for everybody, on the loop ──

    def on_full(self, wanted: int) -> None:
        """A landing met the limit, wants `wanted` bytes and waits: for space to come back, or for `no_room`."""
        self._wanted = max(self._wanted, wanted, 1)
        self._wake.set()

    async def make_room(self, wanted: int) -> bool:
        """For others than the store, who met the end of its filesystem and want `wanted` bytes. Returns when it
        was tried: whether anything came back."""
        self.on_full(wanted)
        with trio.move_on_after(ROOM_MAX_S):
            await self._tried.wait()
            return self._freed > 0
        return False

    async def evict_image(self, image: str) -> Asked:
        """Drops all that is cached of `image`. The work is not the caller's: it goes on when the caller is
        cancelled. Raises Leased; StoreError when the store failed."""
        asked = self.begin_evicting(image)
        await asked.done.wait()
        if asked.error is not None:
            raise asked.error.again()
        return asked

    def begin_evicting(self, image: str, *, looked: bool = True) -> Asked:
        """The same without waiting; whoever asks for it again meanwhile gets the same. `looked`: instance disks
        were looked at just now; else they are first, and where that takes too long the image is left alone.
        Raises Leased."""
        asked = self._asked.get(image)
        if asked is None:
            assert self._nursery is not None, "the evictor is not running"
            self._refuse_leased(image)
            asked = self._asked[image] = Asked(image=image)
            self._nursery.start_soon(self._evict_asked, asked, looked)
        return asked

    def status(self) -> dict[str, Any]:
        """For `status`: counts since the start."""
        return {
            "stuck": self.stuck,
            "trouble": self.trouble,
            "high_watermark": self._watermarks.high,
            "low_watermark": self._watermarks.low,
            "evicted": {cause.value: asdict(evicted) for cause, evicted in self.evicted.items()},
            "open_handles": self._leases.handles,
            "pinned_images": len(self._leases.pinned),
            "pinned_bytes": self._leases.pinned_bytes,
        }

    # ── the task ──

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._uses.ready.wait()
            await self._leases.ready.wait()
            while True:
                try:
                    await self._round()
                    self.trouble = None
                    await self._pause()
                except (CachefsError, OSError) as error:
                    if self.trouble is None:
                        log.error("eviction failed, and will be tried again: %s", error)
                    await self._after(error)
                except Exception as error:  # Whatever it was, the store is to be kept within its bounds later.
                    log.exception("unexpected failure of eviction")
                    await self._after(error)

    async def _pause(self) -> None:
        """Until the next round is due, or somebody wants room."""
        with trio.move_on_after(ROUND_S):
            await self._wake.wait()
        self._wake = trio.Event()

    async def _after(self, error: Exception) -> None:
        """Lets go of who waits, and the store recover."""
        self.trouble = str(error) or type(error).__name__
        self._plan.clear()
        self._wanted = 0
        self._refuse_waiting()
        self._note_tried(0)
        await trio.sleep(PAUSE_S)

    def _refuse_waiting(self) -> None:
        try:
            self._store.no_room()
        except Exception:
            log.exception("unexpected failure of refusing what waits for room")

    def _note_stuck(self) -> None:
        self._stuck_s = trio.current_time()
        leased = {v.record.image for v in self._store.views() if v.cached and self._leases.is_leased(v)}
        pinned = len(leased.intersection(self._leases.pinned))
        if leased:
            stuck = (
                f"everything that is cached is leased ({counted(len(leased), 'image')}, {pinned} of them pinned)"
            )
        else:
            stuck = "nothing that is cached is left to evict"
        if self.stuck is None:
            log.warning("the store is full and stays so: %s; what does not fit is served and not kept", stuck)
        self.stuck = stuck

    def _note_unstuck(self) -> None:
        if self.stuck is not None and trio.current_time() >= self._stuck_s + STUCK_S:
            log.info("the store has room again")
            self.stuck = None

    async def _round(self) -> None:
        while wanted := self._wanted:
            self._wanted = 0
            await self._make_room(wanted)
        await self._drop_ended()
        await self._keep_below_watermark()

    async def _make_room(self, wanted: int) -> None:
        usage = await trio.to_thread.run_sync(self._store.usage)
        freed = await self._free(eviction.room(usage, wanted), Cause.FULL)
        if freed == 0:
            self._note_stuck()
            self._store.no_room()
        self._note_tried(freed)

    def _note_tried(self, freed: int) -> None:
        self._freed = freed
        self._tried.set()
        self._tried = trio.Event()

    async def _keep_below_watermark(self) -> None:
        while not self._wanted:
            usage = await trio.to_thread.run_sync(self._store.usage)
            goal = eviction.goal(
                usage, self._watermarks.high, self._watermarks.low, origin_is_well=self._origin_is_well()
            )
            if goal == 0:
                self._note_unstuck()
                return
            spans = self.evicted[Cause.WATERMARK].spans
            await self._free(min(goal, STEP_BYTES), Cause.WATERMARK)
            if self.evicted[Cause.WATERMARK].spans == spans:
                self._note_stuck()
                return

    async def _drop_ended(self) -> None:
        """What nobody can open any more is no use to anybody, however much room there is."""
        views = [v for v in self._store.views() if v.record.kind is ViewKind.ENDED]
        for view in views:
            if self._leases.is_leased(view):
                continue
            victims = deque((view.number, span) for span in self._uses.spans(view.number))
            while victims and not self._leases.is_leased(view):
                part = [victims.popleft() for _ in range(min(SLICE_SPANS, len(victims)))]
                await self._evict(part, self.evicted[Cause.ENDED])
            if not self._leases.is_leased(view) and not view.cached:
                self._store.forget_view(view.number)

    # ── planning, then performing ──

    async def _free(self, goal: int, cause: Cause) -> int:
        """Evicts until `goal` bytes came back, or nothing is left that may go. Returns how many did."""
        freed = 0
        while freed < goal:
            part = await self._next_slice(goal - freed)
            if not part:
                break
            freed += await self._evict(part, self.evicted[cause])
        return freed

    async def _next_slice(self, goal: int) -> list[tuple[ViewNo, SpanNo]]:
        """What to evict next for `goal` bytes, looked at in this step of the loop; empty when nothing is left."""
        most = min(max(-(-goal // self._store.span_size), 1), SLICE_SPANS)
        if trio.current_time() < self._planned_s + PLAN_KEPT_S:
            self._uses.look()
            part = self._take(most)
            if part:
                return part
        while True:
            closed = self._leases.just_closed
            if not await self._make_plan() and not (await self._leases.settle(closed) and await self._plan_anew()):
                return []
            part = self._take(most)
            if part:
                return part

    async def _make_plan(self) -> bool:
        """Whether there are any victims."""
        if await self._plan_anew():
            return True
        # Nothing may go, by what is known. A span may have come unseen (see `Uses`): then it is found now.
        now_s = trio.current_time()
        if now_s < self._searched_s + SEARCH_S:
            return False
        self._searched_s = now_s
        return bool(await self._uses.reconcile()) and await self._plan_anew()

    async def _plan_anew(self) -> bool:
        self._uses.look()
        came = self._uses.came
        views = [
            ViewUse(
                view.number,
                self._uses.groups(view.number),
                ended=view.record.kind is ViewKind.ENDED,
                leased=self._leases.is_leased(view),
                priority=self._priority_of(view.record.image),
                held=self._is_held(view.record.image),
            )
            for view in self._store.views()
        ]
        self._plan = deque(await trio.to_thread.run_sync(eviction.victims, views, PLAN_SPANS))
        self._planned_s, self._planned_came = trio.current_time(), came
        return bool(self._plan)

    def _take(self, most: int) -> list[tuple[ViewNo, SpanNo]]:
        """The next of the plan that are still neither leased nor used since. No await may come between this and
        the store's `evict`."""
        views = {view.number: view for view in self._store.views()}
        leased: dict[ViewNo, bool] = {}
        part: list[tuple[ViewNo, SpanNo]] = []
        while self._plan and len(part) < most:
            late = self._plan[0].standing > Standing.ONCE or self._plan[0].held
            if late and self._uses.came != self._planned_came:
                break  # What came since the plan was made stands before this.
            number, span, last_s, _, _ = self._plan.popleft()
            if number not in leased:
                leased[number] = number not in views or self._leases.is_leased(views[number])
            if not leased[number] and self._uses.last_s(number, span) == last_s:
                part.append((number, span))
        return part

    async def _evict(self, spans: Sequence[tuple[ViewNo, SpanNo]], count: Evicted) -> int:
        # Forgotten first: what lands in them while they go is a new use, and is to be seen.
        known = [(view, span, self._uses.forget(view, span)) for view, span in spans]
        try:
            freed = await self._store.evict(spans)
        except BaseException:
            for view, span, was in known:
                self._uses.restore(view, span, was)
            raise
        count.spans += len(spans)
        count.bytes += freed
        return freed

    # ── when asked ──

    async def _evict_asked(self, asked: Asked, looked: bool) -> None:
        try:
            await self._uses.ready.wait()
            await self._leases.ready.wait()
            if not looked:
                await self._look_first(asked.image)
            await self.before_asked(asked.image)
            await self._uses.reconcile()
            self._uses.look()
            views = self._views_of(asked.image)
            asked.cached = sum(view.cached for view in views)
            spans = [(view.number, span) for view in views for span in self._uses.spans(view.number)]
            for at in range(0, len(spans), SLICE_SPANS):
                self._refuse_leased(asked.image)
                part = spans[at : at + SLICE_SPANS]
                freed = await self._evict(part, self.evicted[Cause.ASKED])
                asked.spans += len(part)
                asked.bytes += freed
        except CachefsError as error:
            asked.error = error
        except OSError as error:
            asked.error = _store_failed(asked.image, error)
        except Exception as error:  # A bug in answering one command is no reason to take the mount down.
            log.exception("unexpected failure of eviction", image=asked.image)
            asked.error = _store_failed(asked.image, error)
        finally:
            del self._asked[asked.image]
            asked.done.set()

    async def _look_first(self, image: str) -> None:
        """A disk may have come that nobody saw yet. Raises Leased."""
        try:
            with trio.move_on_after(SETTLE_MAX_S) as patience:
                await self._leases.look()
            if patience.cancelled_caught:
                raise Leased(image, ("instance disks are still being looked at",))
            self._refuse_leased(image)
        except Leased as error:
            log.info("kept: %s", error.why, image=image)
            raise

    def _views_of(self, image: str) -> list[EvictableView]:
        return [view for view in self._store.views() if view.record.image == image]

    def _refuse_leased(self, image: str) -> None:
        reasons = [lease.with_mend for view in self._views_of(image) for lease in self._leases.of(view)]
        if reasons:
            raise Leased(image, tuple(dict.fromkeys(reasons)))


async def _nothing(image: str) -> None:
    """Nobody fetches it."""


def _store_failed(image: str, error: Exception) -> StoreError:
    return StoreError(f"image {image} could not be evicted: {error}")
