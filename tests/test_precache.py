"""Pre-caching in virtual time: when policies are asked, what becomes of what they say, and of policies that break.
Rule: what is asserted is what is held, leased, fetched and asked for."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.catalog import Catalog
from cachefs.errors import OriginUnavailable, PrefetchEnded
from cachefs.evictor import Evictor, Watermarks
from cachefs.leases import Leases
from cachefs.opens import APART_S, HALF_LIFE_S, Opens
from cachefs.plan.priorities import Rules
from cachefs.policies import Decision, Keep, Node
from cachefs.policy_host import PolicyFailed
from cachefs.precache import AGAIN_S, FIRST_S, JITTER, UNLISTED_S, Around, Precache, Run
from cachefs.ranks import Ranks
from cachefs.store import format as f
from cachefs.store.content import Store
from cachefs.store.format import Table, ViewKind
from cachefs.store.room import Limits
from cachefs.store.view import StoredView
from cachefs.uses import Uses
from tests.evictions import FakeStore, wall_clock
from tests.flow import ScriptedSource, quiet, until, virtual_time
from tests.stores import SPAN, image_id, land_all, put, random_bytes, running
from tests.test_catalog import ScriptedRegistry, answer
from tests.test_hydrator import asked_once, hydrating

A, B, C = (image_id(n) for n in (1, 2, 3))
HOLD, PIN = Keep.HOLD, Keep.PIN
INTERVAL_S = 3600.0
MIB = 1 << 20


@dataclass
class Scripted:
    """A policy that says what a test wants: `says` of the node, or fails."""

    name: str
    says: Callable[[Node], list[Decision]] = lambda node: []
    fails: str | None = None
    seen: list[Node] = field(default_factory=list)

    async def ask(self, node: Node) -> tuple[Decision, ...]:
        self.seen.append(node)
        await trio.sleep(1)
        if self.fails is not None:
            raise PolicyFailed(self.fails)
        return tuple(self.says(node))


def always(name: str, *wanted: tuple[str, Keep]) -> Scripted:
    return Scripted(name, lambda node: [Decision(image, keep, f"{name} says so") for image, keep in wanted])


@dataclass
class World:
    registry: ScriptedRegistry
    store: Store
    catalog: Catalog
    leases: Leases
    uses: Uses
    precache: Precache
    asked: list[str]
    fetching: set[str]

    @property
    def held(self) -> dict[str, Keep]:
        return {image: hold.keep for image, hold in self.precache.held.items()}

    def view(self, image: str, size: int = 1000) -> StoredView:
        return self.store.view(image, ViewKind.ORIGINAL, size)

    async def once(self, *, dry: bool = False) -> Run:
        """The policies are asked, now."""
        run = self.precache.begin(dry=dry)
        await run.done.wait()
        return run


@asynccontextmanager
async def world(
    folder: Path,
    hosts: list[Scripted],
    *images: dict[str, Any],
    share: float = 0.5,
    limit: int = 1 << 40,
    pins_max: int = 1 << 62,
    full: str | None = None,
    rules: Rules | None = None,
    fails: type[OriginUnavailable] | None = None,
) -> AsyncIterator[World]:
    """A store, a catalog and a Glance that has `images`; the loop runs."""
    registry = ScriptedRegistry({image["id"]: image for image in images}, fails=fails)
    bound = Limits(limit, 0)
    async with running(folder, limits=lambda: bound) as store, trio.open_nursery() as nursery:
        catalog = Catalog(registry, store, 60.0, 10.0)
        leases, uses = Leases(store, lambda: pins_max, wall_clock), Uses(store, wall_clock)
        asked: list[str] = []
        fetching: set[str] = set()

        def ask(view: StoredView) -> None:
            asked.append(view.record.image)
            fetching.add(view.record.image)

        around = Around(ask, lambda view: view.record.image in fetching, lambda: pins_max, 0.85, lambda: full)
        ranks = Ranks(catalog, rules or Rules())
        precache = Precache(
            hosts, INTERVAL_S, share, catalog, store, uses, leases, ranks, around, wall_clock
        )  # fmt: skip
        await nursery.start(catalog.run)
        await leases.load()
        await precache.load()
        await nursery.start(precache.run)
        yield World(registry, store, catalog, leases, uses, precache, asked, fetching)
        precache.opens.save()
        nursery.cancel_scope.cancel()


# ── When ──────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_soon_after_the_start_and_then_in_each_interval_from_one_listing(tmp_path: Path) -> None:
    policy = always("p", (A, HOLD))
    other = always("q", (B, HOLD))
    async with world(tmp_path, [policy, other], *(answer(image_id(n)) for n in range(1, 50))) as w:
        await trio.sleep(FIRST_S[1] + 5)
        assert len(policy.seen) == len(other.seen) == 1
        assert w.held == {A: HOLD, B: HOLD}
        await trio.sleep(10 * INTERVAL_S)
        assert 9 <= len(policy.seen) - 1 <= 11
        assert w.registry.count("") == len(w.registry.asked) == len(policy.seen), "no request but one listing each"
        times = [at for _, at in w.registry.asked]
        pauses = [b - a for a, b in pairwise(times[1:])]
        assert all(INTERVAL_S * (1 - JITTER) <= pause <= INTERVAL_S * (1 + JITTER) + 10 for pause in pauses)
        assert len({round(pause) for pause in pauses}) > 1, "not all nodes at one moment"


@virtual_time
async def test_without_policies_nobody_is_asked(tmp_path: Path) -> None:
    async with world(tmp_path, [], answer(A)) as w:
        await trio.sleep(10 * INTERVAL_S)
        assert w.registry.asked == []
        assert (await w.once()).error == "[precache] policies names none"


@virtual_time
async def test_policies_see_the_images_and_what_the_node_has_of_them(tmp_path: Path) -> None:
    policy = always("p")
    tagged = answer(
        A, tags=["b", "a"], cachefs_team="blue", os_distro="ubuntu", hw_x="y", os_hidden=True, size=2 * SPAN,
        created_at="2026-01-01T00:00:00Z", visibility="public",
    )  # fmt: skip
    inactive = answer(C, status="deactivated")
    async with world(tmp_path, [policy], tagged, answer(B, visibility="private"), inactive) as w:
        view = w.view(A, 2 * SPAN)
        await land_all(w.store, view, random_bytes(1, SPAN) + bytes(SPAN))
        w.leases.pin(A, 2 * SPAN)
        w.uses.look()
        for _ in range(3):
            w.precache.opens.note(A)
            await trio.sleep(APART_S + 1)
        await w.once()
        seen = {image.id: image for image in policy.seen[-1].images}
        assert set(seen) == {A, B}, "what may not be opened is none of theirs"
        first, second = seen[A], seen[B]
        assert first.tags == frozenset("ab")
        assert dict(first.properties) == {"cachefs_team": "blue", "os_distro": "ubuntu"}
        assert (first.hidden, first.visibility, first.trusted) == (True, "public", True)
        assert (first.created_s, first.size, first.cached) == (1767225600, 2 * SPAN, 2 * SPAN)
        assert (first.leased, first.pinned, first.held) == (True, True, False)
        assert first.opens == pytest.approx(3, abs=0.01)
        assert first.used_s > 0
        assert (second.trusted, second.cached, second.opens, second.leased) == (False, 0, 0.0, False)


# ── What becomes of it ────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_what_is_held_is_fetched_once_and_what_is_pinned_is_leased(tmp_path: Path) -> None:
    policy = always("p", (A, HOLD), (B, PIN))
    async with world(tmp_path, [policy], answer(A), answer(B), answer(C)) as w:
        await w.once()
        assert w.held == {A: HOLD, B: PIN}
        assert w.asked == [A, B], "pins go first, and the last that is asked for comes first"
        assert not w.leases.is_leased(w.view(A))
        assert [str(lease) for lease in w.leases.of(w.view(B))] == ["it is pinned by a policy (p)"]
        assert [w.precache.is_only_held(image) for image in (A, B, C)] == [True, True, False]
        w.leases.opened(w.view(B).number)
        assert not w.precache.is_only_held(B), "somebody uses it now"
        w.leases.released(w.view(B).number)
        await trio.sleep(3 * INTERVAL_S)
        assert w.asked == [A, B], "what was asked for is not asked for again: it would overtake others"
        # It came, and went again: it is wanted once more.
        await land_all(w.store, w.view(A), random_bytes(1, 1000))
        w.fetching.discard(A)
        await w.once()
        assert w.asked == [A, B]
        await w.store.evict([(w.view(A).number, f.SpanNo(0))])
        await w.once()
        assert w.asked == [A, B, A]


@virtual_time
async def test_what_no_policy_wants_any_more_is_let_go_and_a_humans_pin_stays(tmp_path: Path) -> None:
    policy = always("p", (A, PIN), (B, PIN))
    async with world(tmp_path, [policy], answer(A), answer(B)) as w:
        w.leases.pin(A, 1000)
        await w.once()
        assert set(w.leases.by_policy) == {A, B}
        policy.says = lambda node: []
        run = await w.once()
        assert set(run.let_go) == {A, B}
        assert w.held == {} == w.leases.by_policy
        assert w.leases.pinned == [A]
        assert not w.leases.is_leased(w.view(B))


@virtual_time
async def test_a_dry_run_says_all_and_does_nothing(tmp_path: Path) -> None:
    policy = always("p", (A, HOLD), (B, PIN))
    async with world(tmp_path, [policy], answer(A), answer(B), answer(C)) as w:
        await w.once()
        policy.says = lambda node: [Decision(C, PIN, "now this"), Decision(A, HOLD, "as before")]
        run = await w.once(dry=True)
        said = run.answer()
        assert [(row["image"], row["keep"], row["cost"]) for row in said["rows"]] == [
            (C, PIN, 1000),
            (A, HOLD, 1000),
        ]
        assert [row["image"] for row in said["let_go"]] == [B]
        assert (said["held_images"], said["held_bytes"], said["cost"], said["dry_run"]) == (2, 2000, 2000, True)
        assert w.held == {A: HOLD, B: PIN}
        assert set(w.leases.by_policy) == {B}
        assert C not in w.asked
        # Nor is it remembered for when the policy breaks.
        policy.fails = "broken"
        await w.once()
        assert w.held == {A: HOLD, B: PIN}


@virtual_time
async def test_within_the_share_and_beside_what_is_leased(tmp_path: Path) -> None:
    policy = always("p", (A, HOLD), (B, HOLD), (C, HOLD))
    images = [answer(image, size=300 * MIB) for image in (A, B, C)]
    async with world(tmp_path, [policy], *images, limit=1000 * MIB, share=0.7) as w:
        run = await w.once()
        assert w.held == {A: HOLD, B: HOLD}
        assert run.rows[2].refused == "300.0 MiB do not fit into the 100.0 MiB left of [precache] share"
        # Somebody opens C: 850 MiB of the store are for all, and C comes whole.
        view = w.view(C, 300 * MIB)
        w.leases.opened(view.number)
        run = await w.once()
        assert w.held == {A: HOLD, C: HOLD}, "what is leased takes no room from itself"
        refused = {row.image: row.refused for row in run.rows}
        assert refused[B] == "300.0 MiB do not fit into the 250.0 MiB that leased and held images leave"
        assert w.precache.status()["held_bytes"] == 600 * MIB


@virtual_time
async def test_a_store_that_is_full_of_leases_fetches_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, [always("p", (A, HOLD))], answer(A), full="all of it is leased") as w:
        run = await w.once()
        assert (w.held, w.asked) == ({}, [])
        assert run.rows[0].refused == "the store is full: all of it is leased"


@virtual_time
async def test_an_image_that_ends_while_policies_think_is_not_held(tmp_path: Path) -> None:
    policy = always("p", (A, PIN), (B, PIN))
    async with world(tmp_path, [policy], answer(A), answer(B)) as w:
        run = w.precache.begin(dry=False)
        await trio.sleep(0.5)
        del w.registry.has[A]
        w.registry.has[B]["status"] = "deactivated"
        for image in (A, B):
            await w.catalog._ask_one(image)
        await run.done.wait()
        assert (w.held, w.leases.by_policy, w.asked) == ({}, {}, [])


@virtual_time
async def test_a_store_that_is_short_keeps_what_is_leased_and_what_is_held_and_fetches_each_byte_once(
    tmp_path: Path,
) -> None:
    """All of it together, for some rounds: hydration, eviction, and policies that want more than there is room."""
    source, often_s = ScriptedSource(), 120.0
    registry = ScriptedRegistry({image_id(n): answer(image_id(n), size=2 * SPAN) for n in range(1, 6)})
    registry.has[A]["size"] = 6 * SPAN
    limit = Limits(12 * SPAN, 0)
    async with hydrating(tmp_path, source, limits=limit) as now:
        store, services = now.flow.store, now.flow.services
        catalog = Catalog(registry, store, 60.0, 10.0)
        uses = Uses(store, wall_clock)
        everything = Scripted("p", lambda node: [Decision(image.id, HOLD, "all") for image in node.images])
        precache: Precache

        def is_held(image: str) -> bool:
            return precache.is_held(image)

        def is_asked(view: StoredView) -> bool:
            try:
                now.hydrator.progress(view)
            except PrefetchEnded:
                return False
            return True

        evictor = Evictor(store, uses, now.leases, Watermarks(0.95, 0.85), is_held=is_held)
        store.on_full = evictor.on_full
        around = Around(now.hydrator.ask, is_asked, lambda: 1 << 60, 0.85, lambda: evictor.stuck)
        ranks = Ranks(catalog, Rules())
        precache = Precache(
            [everything], often_s, 0.6, catalog, store, uses, now.leases, ranks, around, wall_clock
        )
        for loop in (catalog, uses, evictor, precache):
            await services.start(loop.run)
        await catalog.listing()
        leased = now.open(1, 6 * SPAN)
        await until(lambda: leased.complete)
        for _ in range(8):
            await trio.sleep(often_s)
            assert leased.complete, "what is leased is never pushed out"
        # 10.2 spans are for all; the leased image has 6 of them, and counts in the share of 7.2 by itself.
        assert precache.held.keys() == {A}
        now.leases.released(leased.number)
        await trio.sleep(3 * often_s)
        assert precache.held.keys() == {A}
        everything.says = lambda node: [Decision(image.id, HOLD, "all") for image in node.images[1:]]
        await trio.sleep(3 * often_s)
        held = [store.view(image_id(n), ViewKind.ORIGINAL, 2 * SPAN) for n in (2, 3, 4)]
        assert precache.held.keys() == {view.record.image for view in held}
        assert all(view.complete for view in held)
        await trio.sleep(8 * often_s)
        assert all(view.complete for view in held)
        for number, size in ((1, 6), (2, 2), (3, 2), (4, 2)):
            assert asked_once(source, number, size * SPAN), "nothing goes round in circles"
        assert source.of(5) == []


# ── What breaks ───────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_policy_that_breaks_is_named_and_skipped_and_its_word_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = always("good", (A, HOLD)), always("bad", (B, PIN))
    async with world(tmp_path, [good, bad], answer(A), answer(B), answer(C)) as w:
        await w.once()
        bad.fails = "ZeroDivisionError: division by zero"
        good.says = lambda node: [Decision(C, HOLD, "now")]
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                run = await w.once()
        assert run.failed == {"bad": "ZeroDivisionError: division by zero"}
        assert w.precache.status()["failed"] == run.failed
        assert w.held == {B: PIN, C: HOLD}, "what it decided last stands, and the others go on"
        told = [record.message for record in caplog.records if "bad" in record.message]
        assert told == [
            "pre-caching: policy bad failed, what it decided last stands: ZeroDivisionError: division by zero"
        ], "said once"
        bad.fails = None
        await w.once()
        assert w.precache.status()["failed"] == {}


@virtual_time
async def test_with_glance_away_nothing_changes_and_it_is_asked_again_soon(tmp_path: Path) -> None:
    policy = always("p", (A, PIN), (B, HOLD))
    async with world(tmp_path, [policy], answer(A), answer(B)) as w:
        await w.once()
        w.registry.fails = OriginUnavailable
        policy.says = lambda node: []
        before = len(policy.seen)
        await trio.sleep(3 * INTERVAL_S)
        assert len(policy.seen) == before
        assert w.held == {A: PIN, B: HOLD}
        assert "Glance does not say" in w.precache.status()["error"]
        w.registry.fails = None
        await trio.sleep(AGAIN_S * 1.2)
        assert w.held == {}
        assert w.precache.status()["error"] is None


@virtual_time
async def test_what_is_not_listed_any_more_is_held_on_for_a_while_unless_it_is_gone(tmp_path: Path) -> None:
    policy = Scripted("p", lambda node: [Decision(image.id, PIN, "all") for image in node.images])
    async with world(tmp_path, [policy], answer(A), answer(B), answer(C)) as w:
        await w.once()
        assert set(w.held) == {A, B, C}
        w.registry.hidden = {A}  # The account lost its right, or the answer lacks something.
        del w.registry.has[B]
        await trio.sleep(100)
        await w.catalog._ask_one(B)
        run = await w.once()
        assert w.held == {A: PIN, C: PIN}
        assert run.rows[0].note is not None
        assert run.rows[0].note.startswith("Glance does not list it since")
        await trio.sleep(UNLISTED_S + 2 * INTERVAL_S)
        assert w.held == {C: PIN}
        w.registry.hidden = set()
        await trio.sleep(100)
        await w.once()
        assert w.held == {A: PIN, C: PIN}


@virtual_time
async def test_an_unexpected_failure_ends_one_run_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = always("p", (A, HOLD))
    async with world(tmp_path, [policy], answer(A)) as w:

        def breaks(node: Node) -> list[Decision]:
            raise ZeroDivisionError  # What no host lets through.

        policy.says = breaks
        run = await w.once()
        assert run.error == "unexpected failure; the log says more"
        policy.says = lambda node: [Decision(A, HOLD, "r")]
        await w.once()
        assert w.held == {A: HOLD}


# ── Over restarts ─────────────────────────────────────────────────────────────────────────────────────


def test_what_is_held_outlives_a_restart_without_glance(tmp_path: Path) -> None:
    hosts = [always("p", (A, PIN), (B, HOLD)), always("q", (B, HOLD), (C, HOLD))]

    @virtual_time
    async def before() -> None:
        async with world(tmp_path, hosts, answer(A), answer(B), answer(C)) as w:
            w.precache.opens.note(A)
            await w.once()

    @virtual_time
    async def after() -> None:
        broken = Scripted("p", fails="broken")
        async with world(tmp_path, [broken], answer(A), answer(B), answer(C), fails=OriginUnavailable) as w:
            assert w.held == {A: PIN, B: HOLD}, "from the first moment, and of the policies that there still are"
            assert w.leases.is_leased(w.view(A))
            assert w.precache.opens.of(A) == pytest.approx(1, abs=0.01)
            await trio.sleep(INTERVAL_S)
            assert w.held == {A: PIN, B: HOLD}
            # Glance is back, and the policy is broken: its word stands, over the restart.
            w.registry.fails = None
            await w.once()
            assert w.held == {A: PIN, B: HOLD}
            assert w.precache.why(A) == "held and pinned by p: p says so"

    @virtual_time
    async def without() -> None:
        async with world(tmp_path, [], answer(A)) as w:
            assert w.held == {}
            assert w.leases.by_policy == {}
            await w.store.flush()
            held = w.store.items(Table.PRECACHE, bytes((f.PrecacheKind.HOLD,)))
            assert held == []

    before()
    after()
    without()


def test_records_that_cannot_be_read_are_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @virtual_time
    async def made() -> None:
        async with world(tmp_path, [always("p", (A, PIN), (B, HOLD))], answer(A), answer(B)) as w:
            w.precache.opens.note(A)
            await w.once()

    @virtual_time
    async def again() -> None:
        async with world(tmp_path, [always("p")], fails=OriginUnavailable) as w:
            assert w.held == {B: HOLD}
            assert w.precache.opens.of(A) == 0.0
            await w.store.flush()
            assert len(w.store.items(Table.PRECACHE)) == 1

    made()
    put(tmp_path, Table.PRECACHE, f.hold_key(A, "p"), b"rot")
    put(tmp_path, Table.PRECACHE, f.opens_key(A), b"rotten too")
    with caplog.at_level(logging.WARNING):
        again()
    assert len([record for record in caplog.records if "forgotten" in record.message]) == 2


# ── Opens ─────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_open_counts_half_after_a_week_and_one_boot_once() -> None:
    store = FakeStore()
    opens = Opens(store, wall_clock)
    for _ in range(20):
        opens.note(A)
        await trio.sleep(1)
    assert opens.of(A) == pytest.approx(1, abs=0.001)
    await trio.sleep(APART_S)
    opens.note(A)
    assert opens.of(A) == pytest.approx(2, abs=0.001)
    await trio.sleep(HALF_LIFE_S)
    assert opens.of(A) == pytest.approx(1, abs=0.001)
    opens.save()
    again = Opens(store, wall_clock)
    await again.load()
    assert again.of(A) == pytest.approx(opens.of(A))
    await trio.sleep(10 * HALF_LIFE_S)
    again.save()
    assert store.records == {}, "what counts for nothing is forgotten"


@virtual_time
async def test_opens_of_many_images_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.opens.IMAGES_MAX", 100)
    opens = Opens(FakeStore(), wall_clock)
    opens.note(A)
    await trio.sleep(APART_S + 1)
    opens.note(A)
    for n in range(100, 1100):
        opens.note(image_id(n))
    assert sum(opens.of(image_id(n)) > 0 for n in range(1100)) <= 100
    assert opens.of(A) > 1.9, "the most used stays"


@virtual_time
async def test_a_clock_that_goes_back_makes_nothing_more_used() -> None:
    now = [1e9]
    store = FakeStore()
    opens = Opens(store, lambda: now[0])
    opens.note(A)
    opens.save()
    now[0] -= 100 * HALF_LIFE_S
    assert opens.of(A) == 1.0
    again = Opens(store, lambda: now[0])
    await again.load()
    assert again.of(A) == 1.0
    now[0] += HALF_LIFE_S
    assert again.of(A) == 0.5
    await quiet()
