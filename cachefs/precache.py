"""Which images this node holds though nobody asked for them yet: policies are asked, and what they decide is done.
Rule: nothing is held at the cost of what is leased, and where it is not known what to hold, what is held stays.

Once in an interval, give or take a tenth, one listing is taken from Glance, with this node's own credentials. The
policies get it as values, with what is known of the node, and answer with decisions (`cachefs/policies/`); what of
these fits, `plan.holding` says. Then an image that is held is fetched whole in the background, and is evicted
after everything that is not held; one that is pinned as well has a lease of the policies, which ends when none of
them wants it any more. A human's pin is not touched.

A policy that fails is named, and counts as if it had decided what it decided last. When Glance does not answer
nothing changes. What is held outlives a restart, without Glance too.
"""

from __future__ import annotations

import random
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import trio

from cachefs import logs, policies
from cachefs.catalog import Catalog, Image
from cachefs.control import Handler
from cachefs.errors import ControlError, OriginError, RecordCorrupt
from cachefs.leases import Lease, Leases, Reason
from cachefs.opens import Opens
from cachefs.plan.holding import Bounds, Row, plan
from cachefs.policies import Decision, Keep, Node
from cachefs.policy_host import PolicyFailed, printable
from cachefs.ranks import Ranks
from cachefs.store import format as f
from cachefs.store.content import Store
from cachefs.store.format import HoldRecord, PrecacheKind, Table, ViewKind
from cachefs.store.view import StoredView
from cachefs.uses import Uses

log = logs.get(__name__)

# The first time after a start: a thousand nodes that start at once do not all ask at once.
FIRST_S = (5.0, 60.0)
JITTER = 0.1
# While Glance does not answer, it is asked again so often.
AGAIN_S = 300.0
SAVE_S = 300.0
# What Glance lists no more, and nobody has said to be gone, is held so much longer.
UNLISTED_S = 86400.0
REPORTS_MAX = 8
ROWS_MAX = 2000  # In a report.
LOGGED_MAX = 20  # Images at a time.
_PIECE = 20  # Images that are described between two checkpoints: some 1 ms.


@dataclass(frozen=True, slots=True)
class Hold:
    """An image that is held. `since_s` in seconds since 1970."""

    keep: Keep
    policies: tuple[str, ...]
    reason: str
    since_s: float
    name: str = ""


@dataclass(eq=False)
class Run:
    """One time that the policies are asked. `rows` are what was decided, `let_go` what is held no more, `failed`
    the policies that were skipped and why; `error` why nothing was decided at all."""

    number: int
    dry: bool
    began_s: float
    rows: list[Row] = field(default_factory=list)
    let_go: dict[str, Hold] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    share: int = 0
    done: trio.Event = field(default_factory=trio.Event)

    @property
    def held(self) -> list[Row]:
        return [row for row in self.rows if row.refused is None]

    def answer(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "run": self.number,
            "finished": self.done.is_set(),
            "dry_run": self.dry,
            "began": self.began_s,
            "error": self.error,
            "failed": self.failed,
            "share": self.share,
            "held_images": len(self.held),
            "held_bytes": sum(row.size for row in self.held),
            "cost": sum(row.cost for row in self.held),
            "rows": [asdict(row) for row in self.rows[:ROWS_MAX]],
            "rows_left_out": max(len(self.rows) - ROWS_MAX, 0),
            "let_go": [{"image": image, **asdict(hold)} for image, hold in self.let_go.items()],
        }


class Host(Protocol):
    """One policy of the configuration."""

    @property
    def name(self) -> str: ...

    async def ask(self, node: Node) -> tuple[Decision, ...]:
        """What it decides. Raises PolicyFailed."""
        ...


@dataclass(frozen=True)
class Around:
    """What pre-caching needs of the rest. `ask` has all of a view fetched; `is_asked`: somebody had that asked,
    and it is under way. `pins_max` is what pins may claim now, in bytes; `low_watermark` the share down to which
    the store is emptied; `full` why nothing can be kept now, if so."""

    ask: Callable[[StoredView], None]
    is_asked: Callable[[StoredView], bool]
    pins_max: Callable[[], int]
    low_watermark: float
    full: Callable[[], str | None] = lambda: None


class Precache:
    """See the module. `run` is its task; everything else is called on the loop. The `hosts` are asked each
    `interval_s` and may hold `share` of what the store may hold. `clock` gives the seconds since 1970."""

    def __init__(
        self,
        hosts: Sequence[Host],
        interval_s: float,
        share: float,
        catalog: Catalog,
        store: Store,
        uses: Uses,
        leases: Leases,
        ranks: Ranks,
        around: Around,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._hosts, self._interval_s, self._share = list(hosts), interval_s, share
        self._catalog, self._store, self._uses = catalog, store, uses
        self._leases, self._ranks, self._around, self._clock = leases, ranks, around, clock
        self.opens = Opens(store, clock)
        self.held: dict[str, Hold] = {}
        self._said: dict[str, tuple[Decision, ...]] = {}
        self._records: dict[bytes, bytes] = {}
        self._unlisted_since_s: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        self._error: str | None = None
        self._last: Run | None = None
        self._wanted: deque[Run] = deque()
        self._runs: dict[int, Run] = {}
        self._number = 0
        self._wake = trio.Event()

    # ── for everybody, on the loop ──

    def is_held(self, image: str) -> bool:
        """Whether a policy holds it."""
        return image in self.held

    def why(self, image: str) -> str | None:
        """How firmly, by which policies and why, in words; None where it is not held."""
        hold = self.held.get(image)
        if hold is None:
            return None
        return f"{_PAST[hold.keep]} by {', '.join(hold.policies)}: {hold.reason}"

    def is_only_held(self, image: str) -> bool:
        """Whether nothing but policies wants it: it comes after whatever is in use."""
        if image not in self.held:
            return False
        views = (self._store.known_view(image, kind) for kind in (ViewKind.ORIGINAL, ViewKind.RAW))
        return not any(view is not None and self._is_leased_by_others(view) for view in views)

    def begin(self, *, dry: bool) -> Run:
        """Has the policies asked soon; what they decide is only told when it is `dry`."""
        self._number += 1
        run = Run(self._number, dry, self._clock())
        self._runs[run.number] = run
        for number in list(self._runs)[:-REPORTS_MAX]:
            if self._runs[number].done.is_set():
                del self._runs[number]
        self._wanted.append(run)
        self._wake.set()
        return run

    def handlers(self) -> dict[str, Handler]:
        return {"precache": self._begin_asked, "precache-run": self._tell}

    async def _begin_asked(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`run`, the number to ask with. Several who ask meanwhile share one."""
        dry = request.get("dry_run") is True
        waiting = next((run for run in self._wanted if run.dry is dry), None)
        return {"run": (waiting or self.begin(dry=dry)).number}

    async def _tell(self, request: Mapping[str, Any]) -> dict[str, Any]:
        number = request.get("run")
        run = self._runs.get(number) if isinstance(number, int) else None
        if run is None:
            raise ControlError("precache", "nothing is known of that run any more")
        return run.answer()

    def status(self) -> dict[str, Any]:
        """For `status`: sizes in bytes, times in seconds since 1970."""
        views = {image: self._store.known_view(image, ViewKind.ORIGINAL) for image in self.held}
        return {
            "policies": [host.name for host in self._hosts],
            "failed": dict(self._failed),
            "error": self._error,
            "last": self._last.began_s if self._last is not None else None,
            "held_images": len(self.held),
            "pinned_images": len(self._leases.by_policy),
            "held_bytes": sum(self._size(image) for image in self.held),
            "cached_bytes": sum(view.cached for view in views.values() if view is not None),
            "share": self._last.share if self._last is not None else None,
        }

    def _size(self, image: str) -> int:
        known = self._catalog.known(image)
        return known.size if known is not None else 0

    # ── the task ──

    async def load(self) -> None:
        """Takes up what was held before. To be awaited before anything is evicted."""
        await self.opens.load()
        prefix = bytes((PrecacheKind.HOLD,))
        names = {host.name for host in self._hosts}
        said: dict[str, list[Decision]] = {}
        for key, record in await trio.to_thread.run_sync(self._store.items, Table.PRECACHE, prefix):
            try:
                _, image, policy = f.split_precache_key(key)
                hold = HoldRecord.decode(key, record)
            except (RecordCorrupt, ValueError, struct.error) as error:
                log.warning("what a policy held is forgotten: %s", error)
                self._store.put(Table.PRECACHE, key, None)
                continue
            if policy not in names:
                self._store.put(Table.PRECACHE, key, None)
                continue
            self._records[key] = record
            keep = Keep.PIN if hold.pinned else Keep.HOLD
            said.setdefault(policy, []).append(Decision(image, keep, hold.reason, hold.owners_word))
            known = self.held.get(image)
            if known is None or keep is Keep.PIN:
                self.held[image] = Hold(keep, (policy,), hold.reason, hold.since_s)
        self._said = {policy: tuple(decisions) for policy, decisions in said.items()}
        self._lease()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._save_now_and_then)
            due_s = trio.current_time() + random.uniform(*FIRST_S) if self._hosts else float("inf")
            while True:
                with trio.move_on_at(due_s):
                    await self._wake.wait()
                self._wake = trio.Event()
                if trio.current_time() >= due_s:
                    self.begin(dry=False)
                while self._wanted:
                    run = self._wanted.popleft()
                    await self._perform_whole(run)
                    if not run.dry and self._hosts:
                        due_s = trio.current_time() + self._pause_s(run)

    def _pause_s(self, run: Run) -> float:
        pause_s = self._interval_s if run.error is None else min(AGAIN_S, self._interval_s)
        return pause_s * random.uniform(1 - JITTER, 1 + JITTER)

    async def _save_now_and_then(self) -> None:
        while True:
            await trio.sleep(SAVE_S)
            try:
                self.opens.save()
            except Exception:  # A hint that is not kept is no reason to take the mount down.
                log.exception("unexpected failure of keeping opens")

    async def _perform_whole(self, run: Run) -> None:
        try:
            await self._decide(run)
            if not run.dry and run.error is None:
                await self._hold(run)
                await self._keep_records()
                await self._fetch()
        except Exception:  # Whatever is wrong here is no reason to take the mount down.
            log.exception("unexpected failure of pre-caching")
            run.error = "unexpected failure; the log says more"
        finally:
            run.done.set()
        if not run.dry:
            self._note(run)

    def _note(self, run: Run) -> None:
        """Says in the log what has changed since the last time."""
        self._last = run if run.error is None else self._last
        if run.error is not None:
            if self._error is None:
                log.warning("pre-caching: nothing changes: %s", run.error)
            self._error = run.error
            return
        self._error = None
        for name, why in run.failed.items():
            if self._failed.get(name) != why:
                log.error("pre-caching: policy %s failed, what it decided last stands: %s", name, why)
        for name in self._failed.keys() - run.failed.keys():
            log.info("pre-caching: policy %s answers again", name)
        self._failed = dict(run.failed)

    # ── deciding ──

    async def _decide(self, run: Run) -> None:
        if not self._hosts:
            run.error = "[precache] policies names none"
            return
        try:
            listed = await self._catalog.fresh_listing()
        except OriginError as error:
            run.error = f"Glance does not say which images there are: {error}"
            return
        try:
            usage = await trio.to_thread.run_sync(self._store.usage)
        except OSError as error:
            run.error = f"the store's disk does not say how full it is: {error.strerror}"
            return
        run.share = int(self._share * max(usage.limit, 0))
        node = Node(tuple(await self._describe(listed)), self._clock(), run.share)
        said = []
        for host in self._hosts:
            try:
                decisions = await host.ask(node)
            except PolicyFailed as error:
                run.failed[host.name] = str(error)
                decisions = self._said.get(host.name, ())
            else:
                if not run.dry:
                    self._said[host.name] = decisions
            said.append((host.name, decisions))
        images = {image.id: image for image in node.images}
        bounds = Bounds(
            share=run.share,
            room=await self._room(usage.used, max(usage.limit, 0)),
            pins=max(self._around.pins_max() - self._leases.pinned_bytes, 0),
            full=self._around.full(),
        )
        unlisted = self._unlisted(listed)
        run.rows = await trio.to_thread.run_sync(plan, said, images, unlisted, bounds)
        held = {row.image for row in run.held}
        run.let_go = {image: hold for image, hold in self.held.items() if image not in held}

    async def _describe(self, listed: Sequence[Image]) -> list[policies.Image]:
        """The images that may be held, as policies see them."""
        views: dict[str, list[StoredView]] = {}
        for view in self._store.views():
            views.setdefault(view.record.image, []).append(view)
        pinned = set(self._leases.pinned)
        found = []
        for at, image in enumerate(listed):
            if at % _PIECE == _PIECE - 1:
                await trio.lowlevel.checkpoint()
            if image.status != "active" or image.condemned is not None:
                continue
            of_it = [view for view in views.get(image.id, ()) if view.record.kind is not ViewKind.ENDED]
            found.append(self._described(image, of_it, image.id in pinned))
            if len(of_it) > 1 or (of_it and of_it[0].size > 1 << 40):
                await trio.lowlevel.checkpoint()  # Its uses were many to look at.
        return found

    def _described(self, image: Image, views: Sequence[StoredView], pinned: bool) -> policies.Image:
        original = next((view for view in views if view.record.kind is ViewKind.ORIGINAL), None)
        return policies.Image(
            id=image.id,
            name=image.name or "",
            size=image.size,
            disk_format=image.disk_format or "",
            owner=image.owner or "",
            visibility=image.visibility or "",
            hidden=image.hidden,
            tags=frozenset(image.tags),
            properties=MappingProxyType(dict(image.properties)),
            created_s=image.created_s,
            updated_s=image.updated_s,
            trusted=self._ranks.trusts(image),
            priority=self._ranks.ranking(image).priority.name.lower(),
            cached=original.cached if original is not None else 0,
            used_s=max((max(g.last_s) for view in views for g in self._uses.groups(view.number)), default=0),
            opens=self.opens.of(image.id),
            # Not what the policies themselves lease: they would go by their own word.
            leased=pinned or any(self._is_leased_by_others(view) for view in views),
            pinned=pinned,
            held=image.id in self.held,
        )

    def _is_leased_by_others(self, view: StoredView) -> bool:
        return any(lease.reason is not Reason.POLICY for lease in self._leases.of(view))

    async def _room(self, used: int, limit: int) -> int:
        """What may be held beside all that is leased, in bytes. What is leased comes whole, and takes as much of
        the disk of each byte as what is here does: holes and shared chunks take none."""
        cached, leased = 0, Counter[str]()
        for at, view in enumerate(self._store.views()):
            if at % _PIECE == _PIECE - 1:
                await trio.lowlevel.checkpoint()
            if view.record.kind is ViewKind.RESIZED:
                continue
            cached += view.cached
            if self._is_leased_by_others(view):
                leased[view.record.image] += view.size
        density = min(used / cached, 1.0) if cached > 1 << 26 else 1.0
        return max(int(self._around.low_watermark * limit - density * leased.total()), 0)

    def _unlisted(self, listed: Iterable[Image]) -> list[Row]:
        """What is held, is known and active, and was not listed: it stays for a while."""
        there = {image.id for image in listed}
        now_s = trio.current_time()
        rows = []
        for image, hold in self.held.items():
            known = self._catalog.known(image)
            if image in there or known is None or not self._is_there(image):
                self._unlisted_since_s.pop(image, None)
                continue
            since_s = self._unlisted_since_s.setdefault(image, now_s)
            if now_s < since_s + UNLISTED_S:
                row = Row(image, known.name or "", hold.keep, hold.policies, hold.reason, known.size)
                rows.append(replace(row, note=f"Glance does not list it since {int(now_s - since_s)} s"))
        return rows

    # ── doing it ──

    async def _hold(self, run: Run) -> None:
        now_s, before = self._clock(), self.held
        wanted = {}
        for at, row in enumerate(run.held):
            if at % _PIECE == _PIECE - 1:
                await trio.lowlevel.checkpoint()
            known = before.get(row.image)
            since_s = known.since_s if known is not None else now_s
            wanted[row.image] = Hold(row.keep, row.policies, row.reason, since_s, printable(row.name, 255))
        # From here on without an await: what was told of images while policies were asked counts.
        self.held = {image: hold for image, hold in wanted.items() if self._is_there(image)}
        self._unlisted_since_s = {i: s for i, s in self._unlisted_since_s.items() if i in self.held}
        self._lease()
        self._log(before, self.held)

    def _is_there(self, image: str) -> bool:
        """Whether it may be held, as far as is known now."""
        known = self._catalog.known(image)
        return known is not None and known.status == "active" and known.condemned is None

    @staticmethod
    def _log(before: Mapping[str, Hold], held: Mapping[str, Hold]) -> None:
        come = [(image, held[image]) for image in held if image not in before]
        gone = [image for image in before if image not in held]
        for image, hold in come[:LOGGED_MAX]:
            log.info("%s by %s: %s", _PAST[hold.keep], ", ".join(hold.policies), hold.reason, image=image)
        for image in gone[:LOGGED_MAX]:
            log.info("not held any more", image=image)
        if more := max(len(come) - LOGGED_MAX, 0) + max(len(gone) - LOGGED_MAX, 0):
            log.info("pre-caching: and %d more images come and go", more)

    def _lease(self) -> None:
        self._leases.by_policy = {
            image: Lease(Reason.POLICY, hold.since_s, detail=", ".join(hold.policies))
            for image, hold in self.held.items()
            if hold.keep is Keep.PIN
        }

    async def _keep_records(self) -> None:
        """What changed, for the store's next commit."""
        said = {
            policy: {decision.image: decision for decision in reversed(decisions)}
            for policy, decisions in self._said.items()
        }
        records = {}
        for at, (image, hold) in enumerate(self.held.items()):
            if at % _PIECE == _PIECE - 1:
                await trio.lowlevel.checkpoint()
            for policy in hold.policies:
                decision = said.get(policy, {}).get(image)
                if decision is not None:
                    key = f.hold_key(image, policy)
                    pinned = decision.keep is Keep.PIN
                    record = HoldRecord(pinned, decision.owners_word, hold.since_s, decision.reason)
                    records[key] = record.encode(key)
        for key in self._records.keys() - records.keys():
            self._store.put(Table.PRECACHE, key, None)
        for key, encoded in records.items():
            if self._records.get(key) != encoded:
                self._store.put(Table.PRECACHE, key, encoded)
        self._records = records

    async def _fetch(self) -> None:
        """Has what is held and not here fetched. What was asked for before is not asked for again: it would come
        before what others have opened since."""
        for at, image in enumerate(reversed(self.held)):  # The last that is asked for comes first.
            if at % _PIECE == _PIECE - 1:
                await trio.lowlevel.checkpoint()
            known = self._catalog.known(image)
            if known is None or not self._is_there(image):
                continue
            view = self._store.view(image, ViewKind.ORIGINAL, known.size)
            if not view.complete and not self._around.is_asked(view):
                self._around.ask(view)


_PAST = {Keep.HOLD: "held", Keep.PIN: "held and pinned"}
