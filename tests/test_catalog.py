"""What is known of images, and what Glance can and cannot make this node forget."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.catalog import (
    BASES_EVERY_S,
    CONFIRM_EVERY_S,
    CONFIRMED_MAX,
    GONE,
    LISTING_WAIT_S,
    LOOK_S,
    NEGATIVES_MAX,
    OPEN_WAIT_S,
    UNKNOWN_WAIT_S,
    UNWELL_S,
    Catalog,
    Image,
    from_glance,
)
from cachefs.errors import (
    ImageForbidden,
    ImageGone,
    NoEntry,
    NotPermitted,
    OriginBusy,
    OriginError,
    OriginLied,
    OriginUnauthorized,
    OriginUnavailable,
)
from cachefs.namespace import NO_BASE, base_name
from cachefs.store.content import Store
from cachefs.store.format import ViewKind
from tests.flow import quiet, virtual_time
from tests.stores import image_id, running

TTL_S, NEGATIVE_S = 60.0, 10.0
UNWELL = [OriginUnavailable, OriginBusy, OriginUnauthorized, OriginLied, ImageForbidden]

A, B = image_id(1), image_id(2)


def answer(image: str, **fields: Any) -> dict[str, Any]:
    """As Glance describes an image."""
    return {
        "id": image, "name": f"image {image[-1]}", "size": 1000, "status": "active", "disk_format": "raw",
        "container_format": "bare", "checksum": "c" * 32, "os_hash_algo": "sha512", "os_hash_value": "a" * 128,
        "owner": "o", "visibility": "public", "updated_at": "2026-01-02T03:04:05Z", "tags": [], "min_ram": 0,
        **fields,
    }  # fmt: skip


@dataclass
class ScriptedRegistry:
    """A Registry. `has` is what Glance has; `fails` makes every answer an error; an answer takes `cost_s`, or
    until `holds` is set. `asked` is each question, "" for a listing, with its virtual time."""

    has: dict[str, dict[str, Any]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    fails: type[OriginError] | None = None
    holds: trio.Event | None = None
    cost_s: float = 0.05
    asked: list[tuple[str, float]] = field(default_factory=list)
    forbidden: set[str] = field(default_factory=set)

    async def images(self) -> list[dict[str, Any]]:
        snapshot = [dict(a) for a in self.has.values() if a["id"] not in self.hidden]
        await self._answer("")
        return snapshot

    async def image(self, image: str) -> dict[str, Any]:
        await self._answer(image)
        if image in self.forbidden:
            raise ImageForbidden(image)
        if image not in self.has:
            raise ImageGone(image)
        return dict(self.has[image])

    async def _answer(self, question: str) -> None:
        self.asked.append((question, trio.current_time()))
        await trio.sleep(self.cost_s)
        if self.holds is not None:
            await self.holds.wait()
        if self.fails is not None:
            raise self.fails(question)

    def count(self, question: str) -> int:
        return sum(1 for asked, _ in self.asked if asked == question)


@dataclass
class ScriptedClaims:
    """Who needs an image: `open` handles, something that `firm`ly keeps it, an instance that `stands` on it."""

    open: set[str] = field(default_factory=set)
    firm: set[str] = field(default_factory=set)
    stands: set[str] = field(default_factory=set)

    def leased(self, image: str) -> bool:
        return image in self.open | self.firm | self.stands

    def keeps(self, image: str) -> bool:
        return image in self.firm | self.stands

    def started(self, image: str) -> bool:
        return image in self.stands


@dataclass
class World:
    registry: ScriptedRegistry
    store: Store
    catalog: Catalog
    claims: ScriptedClaims
    gone: list[Image] = field(default_factory=list)
    let_go: list[Image] = field(default_factory=list)


@asynccontextmanager
async def world(
    folder: Path, *images: dict[str, Any], claims: ScriptedClaims | None = None
) -> AsyncIterator[World]:
    """A store with a catalog, and a Glance that has `images`."""
    registry = ScriptedRegistry({image["id"]: image for image in images})
    async with running(folder) as store, trio.open_nursery() as nursery:
        catalog = Catalog(registry, store, TTL_S, NEGATIVE_S)
        made = World(registry, store, catalog, claims or ScriptedClaims())
        catalog.claims = made.claims
        catalog.on_gone, catalog.on_let_go = made.gone.append, made.let_go.append
        await nursery.start(catalog.run)
        yield made
        nursery.cancel_scope.cancel()


def ids(images: list[Image]) -> list[str]:
    return [image.id for image in images]


async def gathered(count: int, ask: Callable[[], Any]) -> list[Any]:
    """What so many concurrent askers get: an answer, or an error."""
    got: list[Any] = []

    async def one() -> None:
        try:
            got.append(await ask())
        except (OriginError, NoEntry, NotPermitted) as error:
            got.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return got


# ── Asking ────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_one_listing_per_ttl_however_many_ask(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        for _ in range(3 * 6):
            assert ids(await w.catalog.listing()) == [A, B]
            await trio.sleep(TTL_S / 6)
        assert w.registry.count("") == 3


@virtual_time
async def test_concurrent_askers_share_one_question(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        listings = await gathered(20, w.catalog.listing)
        assert [ids(listing) for listing in listings] == [[A]] * 20
        w.registry.has[B] = answer(B)
        assert {image.id for image in await gathered(20, lambda: w.catalog.lookup(B))} == {B}
        assert w.registry.asked == [("", 0.0), (B, pytest.approx(0.05, abs=1e-3))]


@virtual_time
async def test_concurrent_askers_of_a_failing_glance_have_errors_of_their_own(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.registry.fails = OriginUnavailable
        errors = await gathered(5, lambda: w.catalog.lookup(A))
        assert [type(error) for error in errors] == [OriginUnavailable] * 5
        assert len({id(error) for error in errors}) == 5
        assert w.registry.count(A) == 1


@virtual_time
async def test_an_asker_who_gives_up_stops_nobody(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()

            async def impatient() -> None:
                with first:
                    await w.catalog.lookup(A)

            nursery.start_soon(impatient)
            await quiet()
            nursery.start_soon(w.catalog.lookup, A)
            await quiet()
            first.cancel()
        assert w.registry.count(A) == 1


@virtual_time
async def test_a_known_image_is_looked_up_without_asking(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        await w.catalog.listing()
        await trio.sleep(10 * TTL_S)
        assert (await w.catalog.lookup(A)).size == 1000
        assert w.registry.asked == [("", 0.0)]


@virtual_time
async def test_unknown_is_remembered_for_its_time(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for _ in range(4):
            with pytest.raises(NoEntry):
                await w.catalog.lookup(A)
            await trio.sleep(NEGATIVE_S / 4)
        assert w.registry.count(A) == 1
        w.registry.has[A] = answer(A)
        await trio.sleep(NEGATIVE_S / 4)
        assert (await w.catalog.lookup(A)).id == A
        assert w.registry.count(A) == 2


@virtual_time
async def test_what_is_remembered_as_unknown_is_bounded(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.registry.cost_s = 0.0
        async with trio.open_nursery() as nursery:

            async def ask(first: int) -> None:
                for n in range(first, first + NEGATIVES_MAX // 10 + 2):
                    with pytest.raises(NoEntry):
                        await w.catalog.lookup(image_id(n))

            for tenth in range(10):
                nursery.start_soon(ask, 10 + tenth * NEGATIVES_MAX)
        assert w.registry.count(image_id(10)) == 1
        with pytest.raises(NoEntry):
            await w.catalog.lookup(image_id(10))
        assert w.registry.count(image_id(10)) == 2  # It was let go for others.


@virtual_time
async def test_a_name_of_novas_is_found_by_a_listing_and_then_without_one(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as it:
        assert (await it.catalog.lookup_base(base_name(A))).id == A
        assert it.registry.asked == [("", 0.0)]
        it.registry.fails = OriginUnavailable
        await trio.sleep(1000)
        assert (await it.catalog.lookup_base(base_name(A))).id == A
        assert it.catalog.id_of_base(base_name(A)) == A
        assert len(it.registry.asked) == 1


@virtual_time
async def test_unknown_names_of_novas_cost_a_listing_now_and_then_however_many_they_are(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as it:
        await it.catalog.listing()
        it.registry.cost_s = 0.0
        for _ in range(1000):
            for number in range(20):
                with pytest.raises(NoEntry):
                    await it.catalog.lookup_base(base_name(f"nobody's {number}"))
            for odd in (NO_BASE, b"", b"swap_1", base_name(A).upper(), base_name(A) + b"_sm"):
                with pytest.raises(NoEntry):
                    await it.catalog.lookup_base(odd)
            await trio.sleep(0.01)
        # Ten seconds. Each name may have one, and they have it together.
        assert it.registry.count("") == len(it.registry.asked) <= 1 + 10 / BASES_EVERY_S
        # Where a listing is dear there are fewer.
        it.registry.cost_s = 10.0
        before = it.registry.count("")
        for number in range(1000):
            with pytest.raises(NoEntry):
                await it.catalog.lookup_base(base_name(f"another {number}"))
            await trio.sleep(1)
        assert it.registry.count("") - before <= 1000 / 30


@virtual_time
async def test_an_image_that_was_just_made_is_found_by_novas_name(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as it:
        with pytest.raises(NoEntry):
            await it.catalog.lookup_base(base_name(B))
        it.registry.has[B] = answer(B)
        await trio.sleep(NEGATIVE_S)
        assert (await it.catalog.lookup_base(base_name(B))).id == B


@virtual_time
async def test_novas_names_while_glance_does_not_answer(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as it:
        await it.catalog.listing()
        it.registry.holds = trio.Event()
        await trio.sleep(5)
        began_s = trio.current_time()
        for number in range(10):
            with pytest.raises(NoEntry):
                await it.catalog.lookup_base(base_name(f"nobody's {number}"))
        assert trio.current_time() - began_s < LISTING_WAIT_S + 1, "the first waits, and that not for long"
        assert (await it.catalog.lookup_base(base_name(A))).id == A


@virtual_time
async def test_the_name_of_an_image_that_ended_is_of_nobody(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as it:
        await it.catalog.lookup_base(base_name(A))
        del it.registry.has[A]
        it.claims.firm.add(A)
        it.catalog.ended(A)
        assert (await it.catalog.lookup_base(base_name(A))).status == GONE, "what an instance stands on"
        it.claims.firm.clear()
        with pytest.raises(NoEntry):
            await it.catalog.lookup_base(base_name(A))
        assert it.catalog.id_of_base(base_name(A)) is None


@virtual_time
async def test_an_image_that_is_listed_is_not_unknown_any_more(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        with pytest.raises(NoEntry):
            await w.catalog.lookup(A)
        w.registry.has[A] = answer(A)
        await w.catalog.listing()
        assert (await w.catalog.lookup(A)).id == A


# ── Only an authoritative 404 ─────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_404_ends_an_image(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        await w.catalog.listing()
        gone: list[Image] = []
        w.catalog.on_gone = gone.append
        number = (await w.catalog.lookup(A)).number
        del w.registry.has[A]
        await trio.sleep(TTL_S)
        with pytest.raises(NoEntry):
            await w.catalog.openable(A)
        assert ids(gone) == [A]
        assert w.catalog.known(A) is None
        assert w.catalog.by_number(number) is None
        assert ids(w.catalog.shown()) == [B]
        assert b"image 1" not in w.catalog.links
    async with world(tmp_path) as w:
        assert w.catalog.known(A) is None
        assert w.catalog.known(B) is not None


@pytest.mark.parametrize("error", UNWELL)
@virtual_time
async def test_nothing_else_ends_an_image(tmp_path: Path, error: type[OriginError]) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        await w.catalog.listing()
        w.registry.fails = error
        for _ in range(3):
            await trio.sleep(2 * TTL_S)
            assert ids(await w.catalog.listing()) == [A, B]
            assert (await w.catalog.openable(A)).id == A
            assert (await w.catalog.lookup(B)).id == B
            assert set(w.catalog.links) == {b"image 1", b"image 2"}


@virtual_time
async def test_an_image_that_is_not_listed_is_not_shown_and_can_be_opened(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        await w.catalog.listing()
        w.registry.hidden.add(A)
        await trio.sleep(TTL_S)
        assert ids(await w.catalog.listing()) == [B]
        assert (await w.catalog.lookup(A)).id == A
        asked = w.registry.count(A)
        assert (await w.catalog.openable(A)).id == A
        assert w.registry.count(A) == asked + 1  # It may have gone: that is asked.


@virtual_time
async def test_known_images_are_there_after_a_restart_without_glance(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        numbers = {image.id: image.number for image in await w.catalog.listing()}
    async with world(tmp_path) as w:
        w.registry.fails = OriginUnavailable
        assert {image.id: image.number for image in await w.catalog.listing()} == numbers
        assert (await w.catalog.openable(A)) == w.catalog.known(A)
        assert (await w.catalog.lookup(B)).name == "image 2"
        assert len(w.catalog) == 2


# ── Images that Glance has no more, and that are leased ──


async def deleted(w: World, image: str) -> None:
    """Glance has it no more, and is asked for it."""
    w.registry.has.pop(image, None)
    await trio.sleep(TTL_S)
    try:
        await w.catalog.openable(image)
    except NoEntry:
        pass


@virtual_time
async def test_what_an_instance_stands_on_is_found_and_opened_though_glance_has_it_no_more(tmp_path: Path) -> None:
    claims = ScriptedClaims(firm={A})
    async with world(tmp_path, answer(A), answer(B), claims=claims) as w:
        await w.catalog.listing()
        number = (await w.catalog.lookup(A)).number
        w.store.view(A, ViewKind.ORIGINAL, 1000)
        await deleted(w, A)
        assert [(image.id, image.status) for image in w.gone] == [(A, GONE)], "it is told of, once"
        for _ in range(3):
            found = await w.catalog.openable(A)
            assert (found.status, found.number, found.size) == (GONE, number, 1000)
            assert w.catalog.by_number(number) == await w.catalog.lookup(A) == found
            assert ids(await w.catalog.listing()) == [B], "it is not listed"
            assert b"image 1" not in w.catalog.links
            await trio.sleep(2 * TTL_S)
        assert ids(w.catalog.gone()) == [A]
        assert w.store.known_view(A, ViewKind.ORIGINAL) is not None
        assert len(w.gone) == 1
    async with world(tmp_path, answer(B), claims=claims) as w:  # After a restart, with Glance there.
        assert ids(w.catalog.shown()) == [B]
        assert (await w.catalog.openable(A)).status == GONE
        assert ids(await w.catalog.listing()) == [B]
        claims.firm.clear()
        await trio.sleep(LOOK_S + 1)
        assert ids(w.let_go) == [A]
        with pytest.raises(NoEntry):
            await w.catalog.openable(A)
        assert w.store.known_view(A, ViewKind.ORIGINAL) is None
    async with world(tmp_path) as w:
        assert w.catalog.known(A) is None


@virtual_time
async def test_what_is_only_open_is_found_by_nobody_else_until_something_firm_leases_it(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), claims=ScriptedClaims(open={A})) as w:
        number = (await w.catalog.openable(A)).number
        await deleted(w, A)
        for ask in (w.catalog.lookup, w.catalog.openable):
            with pytest.raises(NoEntry):
                await ask(A)
        assert w.catalog.by_number(number) is not None, "who has it open asks by its number"
        w.claims.firm.add(A)  # Its disk was seen a minute later.
        assert (await w.catalog.openable(A)).status == GONE
        w.claims.firm.clear()
        w.claims.open.clear()
        with pytest.raises(NoEntry):
            await w.catalog.lookup(A)
        assert ids(w.let_go) == [A]
        assert w.catalog.by_number(number) is None


@virtual_time
async def test_an_image_that_is_there_again_is_the_same_only_by_its_hash(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B, os_hash_value=None, checksum=None)) as w:
        w.claims.firm |= {A, B}
        await w.catalog.listing()
        await deleted(w, A)
        await deleted(w, B)
        w.registry.has |= {A: answer(A), B: answer(B)}
        await trio.sleep(TTL_S)
        await w.catalog.listing()
        assert (await w.catalog.openable(A)).status == "active"
        assert (await w.catalog.openable(B)).status == GONE
        assert ids(await w.catalog.listing()) == [A]
        assert ids(w.let_go) == []


@virtual_time
async def test_an_id_that_means_another_image_is_given_to_it_where_only_handles_keep_the_old_one(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, answer(A), claims=ScriptedClaims(open={A})) as w:
        first = await w.catalog.openable(A)
        view = w.store.view(A, ViewKind.ORIGINAL, 1000)
        await deleted(w, A)
        w.registry.has[A] = answer(A, os_hash_value="b" * 128, checksum="d" * 32)
        await trio.sleep(NEGATIVE_S)
        second = await w.catalog.openable(A)
        assert second.number > first.number
        assert ids(w.let_go) == [A]
        assert view.record.kind is ViewKind.ENDED, "who has it open reads on, by a view of its own"
        assert w.store.known_view(A, ViewKind.ORIGINAL) is None


@virtual_time
async def test_glance_says_that_it_is_gone_when_its_bytes_are_asked_for(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        await w.catalog.listing()
        w.claims.firm.add(A)
        for image in (A, B, image_id(77)):
            w.catalog.ended(image)
        assert ids(w.gone) == [A, B]
        assert ids(w.let_go) == [B]
        assert (await w.catalog.lookup(A)).status == GONE


@pytest.mark.parametrize("status", ["deleted", "pending_delete"])
@virtual_time
async def test_the_status_deleted_ends_an_image_too(tmp_path: Path, status: str) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        w.claims.firm.add(A)
        await w.catalog.listing()
        for image in (A, B):
            w.registry.has[image]["status"] = status
        await trio.sleep(TTL_S)
        assert await w.catalog.listing() == []
        assert (await w.catalog.openable(A)).status == GONE
        with pytest.raises(NoEntry):
            await w.catalog.openable(B)


@virtual_time
async def test_what_a_listing_lacks_is_asked_for_by_itself_where_it_is_leased(tmp_path: Path) -> None:
    images = [image_id(n) for n in range(1, CONFIRMED_MAX + 21)]
    unleased, ended, forbidden = images[0], images[1], images[-1]
    async with world(tmp_path, *(answer(image) for image in images)) as w:
        await w.catalog.listing()
        w.claims.firm |= set(images) - {unleased}
        w.registry.hidden |= set(images)  # A listing that lacks all of them,
        w.registry.forbidden.add(forbidden)
        del w.registry.has[unleased], w.registry.has[ended]  # of which two are gone.
        await trio.sleep(TTL_S)
        assert await w.catalog.listing() == []
        await trio.sleep(TTL_S)
        assert len([1 for question, _ in w.registry.asked if question]) == CONFIRMED_MAX
        for _ in range(3):
            await w.catalog.listing()
            await trio.sleep(TTL_S)
        assert ids(w.gone) == [ended]
        assert len(w.catalog) == len(images), "nothing is lost by a listing"
        assert w.registry.count(unleased) == 0
        asked = len(w.registry.asked)
        assert max(w.registry.count(image) for image in images) == 1
        await w.catalog.listing()
        assert len(w.registry.asked) == asked + 1, "each of them not again so soon"
        await trio.sleep(CONFIRM_EVERY_S)
        for _ in range(2):
            await w.catalog.listing()
            await trio.sleep(TTL_S)
        assert w.registry.count(forbidden) == 2


@virtual_time
async def test_a_deactivated_image_is_opened_by_who_stands_on_it_only(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        await w.catalog.openable(A)
        w.registry.has[A]["status"] = "deactivated"
        await trio.sleep(TTL_S)
        for set_ in (w.claims.open, w.claims.firm):
            set_.add(A)
            with pytest.raises(NotPermitted):
                await w.catalog.openable(A)
        w.claims.stands.add(A)
        assert (await w.catalog.openable(A)).status == "deactivated"


# ── How long somebody waits ───────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_known_image_opens_though_glance_does_not_answer(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        await w.catalog.listing()
        await trio.sleep(TTL_S)
        w.registry.holds = trio.Event()
        began_s = trio.current_time()
        assert len(await gathered(10, lambda: w.catalog.openable(A))) == 10
        assert trio.current_time() - began_s == pytest.approx(OPEN_WAIT_S, abs=0.01)
        again_s = trio.current_time()
        assert (await w.catalog.openable(A)).id == A
        assert trio.current_time() == again_s  # Not again so soon.
        assert w.registry.count(A) == 1


@virtual_time
async def test_glance_is_asked_again_after_it_was_unwell(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        await w.catalog.listing()
        await trio.sleep(TTL_S)
        w.registry.fails = OriginUnavailable
        await w.catalog.openable(A)
        w.registry.fails = None
        await w.catalog.openable(A)
        assert w.registry.count(A) == 1
        await trio.sleep(UNWELL_S)
        await w.catalog.openable(A)
        assert w.registry.count(A) == 2
        assert w.catalog.last_error is None


@virtual_time
async def test_a_listing_waits_so_long_and_shows_what_is_known(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        await w.catalog.listing()
        await trio.sleep(TTL_S)
        w.registry.has[B] = answer(B)
        w.registry.holds = trio.Event()
        began_s = trio.current_time()
        assert ids(await w.catalog.listing()) == [A]
        assert trio.current_time() - began_s == pytest.approx(LISTING_WAIT_S, abs=0.01)
        w.registry.holds.set()
        await trio.sleep(0.1)
        assert ids(await w.catalog.listing()) == [A, B]  # The question had gone on.
        assert w.registry.count("") == 2


@virtual_time
async def test_an_unknown_image_is_waited_for_longer_and_then_an_error(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.registry.holds = trio.Event()
        with pytest.raises(OriginUnavailable):
            await w.catalog.lookup(A)
        assert trio.current_time() == pytest.approx(UNKNOWN_WAIT_S, abs=0.01)


@virtual_time
async def test_an_opened_image_is_checked_once_per_ttl(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        for _ in range(12):
            await w.catalog.openable(A)
            await trio.sleep(TTL_S / 4)
        assert w.registry.count(A) == 3


# ── States ────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_deactivated_image_is_there_and_may_not_be_opened(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        await w.catalog.openable(A)
        w.registry.has[A]["status"] = "deactivated"
        await trio.sleep(TTL_S)
        with pytest.raises(NotPermitted):
            await w.catalog.openable(A)
        assert (await w.catalog.lookup(A)).status == "deactivated"
        assert ids(await w.catalog.listing()) == [A]
        w.registry.has[A]["status"] = "active"
        await trio.sleep(TTL_S)
        assert (await w.catalog.openable(A)).id == A


@pytest.mark.parametrize("status", ["queued", "saving", "uploading", "importing", "killed", "deleted", "", None])
@virtual_time
async def test_an_image_that_is_not_active_is_not_there(tmp_path: Path, status: str | None) -> None:
    async with world(tmp_path, answer(A, status=status, size=None)) as w:
        with pytest.raises(NoEntry):
            await w.catalog.lookup(A)
        with pytest.raises(NoEntry):
            await w.catalog.openable(A)
        assert await w.catalog.listing() == []
        w.registry.has[A] = answer(A)
        await trio.sleep(NEGATIVE_S)
        assert (await w.catalog.openable(A)).id == A


@pytest.mark.parametrize(
    "change", [{"size": 1001}, {"size": 0}, {"os_hash_value": "b" * 128}, {"checksum": "d" * 32}]
)
@virtual_time
async def test_an_image_that_is_said_to_have_other_bytes_is_not_believed(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    async with world(tmp_path, answer(A)) as w:
        before = await w.catalog.openable(A)
        w.registry.has[A].update(change, name="another")
        await trio.sleep(TTL_S)
        assert await w.catalog.openable(A) == before
        assert await w.catalog.listing() == [before]
    async with world(tmp_path) as w:
        assert w.catalog.known(A) == before


@virtual_time
async def test_a_hash_may_come_late(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A, os_hash_value=None, checksum=None)) as w:
        await w.catalog.openable(A)
        w.registry.has[A] = answer(A)
        await trio.sleep(TTL_S)
        assert (await w.catalog.openable(A)).os_hash_value == "a" * 128


@virtual_time
async def test_a_hash_that_is_known_is_not_forgotten(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        await w.catalog.openable(A)
        w.registry.has[A] = answer(A, os_hash_value=None, checksum=None)
        await trio.sleep(TTL_S)
        await w.catalog.openable(A)
        w.registry.has[A] = answer(A, os_hash_value="b" * 128, checksum="d" * 32)
        await trio.sleep(TTL_S)
        assert (await w.catalog.openable(A)).os_hash_value == "a" * 128


@virtual_time
async def test_a_new_name_is_believed_and_linked(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        await w.catalog.listing()
        assert set(w.catalog.links) == {b"image 1", b"image 2"}
        w.registry.has[A]["name"] = "image 2"
        await trio.sleep(TTL_S)
        await w.catalog.listing()
        assert w.catalog.links == {}
        w.registry.has[B]["name"] = "other"
        await trio.sleep(TTL_S)
        await w.catalog.listing()
        assert set(w.catalog.links) == {b"image 2", b"other"}


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_numbers_are_never_given_twice(tmp_path: Path) -> None:
    seen: set[int] = set()
    for round_ in range(3):
        images = [answer(image_id(100 * round_ + n)) for n in range(1, 4)]
        async with world(tmp_path, *images) as w:
            new = {(await w.catalog.lookup(image["id"])).number for image in images}
            assert len(new) == 3
            assert min(new) >= 1
            assert not new & seen
            seen |= new
            w.registry.has.clear()
            await trio.sleep(TTL_S)
            for image in images:
                with pytest.raises(NoEntry):
                    await w.catalog.openable(image["id"])


@virtual_time
async def test_an_image_that_came_back_has_another_number(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        first = (await w.catalog.lookup(A)).number
        del w.registry.has[A]
        await trio.sleep(TTL_S)
        with pytest.raises(NoEntry):
            await w.catalog.openable(A)
        w.registry.has[A] = answer(A)
        await trio.sleep(NEGATIVE_S)
        assert (await w.catalog.lookup(A)).number > first


@virtual_time
async def test_the_store_is_written_only_when_something_changed(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        await w.catalog.listing()
        await trio.sleep(5.0)
        commits = w.store.writer.commits
        for _ in range(3):
            await trio.sleep(TTL_S)
            await w.catalog.listing()
        assert w.store.writer.commits == commits


# ── Races ─────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_image_found_while_a_listing_was_under_way_is_shown(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        await w.catalog.listing()
        await trio.sleep(TTL_S)
        w.registry.cost_s = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.catalog.listing)
            await quiet()
            w.registry.has[B] = answer(B)
            w.registry.cost_s = 0.05
            nursery.start_soon(w.catalog.lookup, B)
        assert ids(w.catalog.shown()) == [A, B]


@virtual_time
async def test_an_image_that_ended_while_a_listing_was_under_way_stays_gone(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A), answer(B)) as w:
        await w.catalog.listing()
        await trio.sleep(TTL_S)
        w.registry.cost_s = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.catalog.listing)
            await quiet()
            del w.registry.has[A]
            w.registry.cost_s = 0.05
            with pytest.raises(NoEntry):
                await w.catalog.openable(A)
        assert ids(w.catalog.shown()) == [B]
        with pytest.raises(NoEntry):
            await w.catalog.lookup(A)


@virtual_time
async def test_what_single_answers_say_while_a_long_listing_is_taken_counts(tmp_path: Path) -> None:
    """A listing is taken in pieces; between them others are answered, by what is newer."""
    many = [answer(image_id(n)) for n in range(1, 1001)]
    async with world(tmp_path, *many) as w:
        await w.catalog.listing()
        await trio.sleep(TTL_S + 1)
        ended = [image_id(1), image_id(500), image_id(1000)]

        async def ends(image: str) -> None:
            with pytest.raises(NoEntry):
                await w.catalog.openable(image)

        w.registry.holds = trio.Event()  # The listing and the questions are answered at one moment.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.catalog.fresh_listing)
            await quiet()
            for image in ended:
                del w.registry.has[image]
                nursery.start_soon(ends, image)
            await trio.sleep(1)
            w.registry.holds.set()
        assert set(ids(w.catalog.shown())) == {image["id"] for image in many} - set(ended)
        assert [w.catalog.known(image) for image in ended] == [None] * 3


# ── What is kept of metadata ──────────────────────────────────────────────────────────────────────────


def test_tags_and_properties_are_kept_over_a_restart_and_not_written_again(tmp_path: Path) -> None:
    said = answer(
        A, tags=["gold", "blue"], os_distro="ubuntu", cachefs_priority="critical", hw_disk_bus="scsi",
        os_hidden=True, created_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    found: list[Image] = []

    @virtual_time
    async def once() -> None:
        async with world(tmp_path, said, answer(B)) as w:
            known = w.catalog.known(A)
            if found:
                assert known == found[0]
                stored = dict(w.store.images)
                await w.catalog.fresh_listing()
                assert all(w.store.images[image] is stored[image] for image in stored), "nothing was put again"
                assert w.catalog.known(A) is known, "what was derived from it stands"
            (image, plain) = await w.catalog.listing()
            found.append(image)
            assert (image.tags, image.hidden, image.created_s) == (("blue", "gold"), True, 1767225600)
            assert dict(image.properties) == {"os_distro": "ubuntu", "cachefs_priority": "critical"}
            assert not plain.to_fields().keys() & {"tags", "properties", "hidden", "created_s"}, "nothing to say"

    once()
    once()


@virtual_time
async def test_a_fresh_listing_is_fresh_or_an_error(tmp_path: Path) -> None:
    async with world(tmp_path, answer(A)) as w:
        assert ids(await w.catalog.fresh_listing()) == [A]
        assert ids(await w.catalog.fresh_listing()) == [A]
        assert w.registry.count("") == 1, "within the TTL it is one"
        await trio.sleep(TTL_S)
        w.registry.fails = OriginUnavailable
        with pytest.raises(OriginUnavailable):
            await w.catalog.fresh_listing()
        assert ids(await w.catalog.listing()) == [A]
        w.registry.fails = None
        w.registry.cost_s = 10 * LISTING_WAIT_S
        w.registry.has[B] = answer(B)
        assert ids(await w.catalog.fresh_listing()) == [A, B], "a slow Glance is waited for"


# ── What Glance may say ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [None, -1, "1000", 1.5])
def test_a_size_that_is_none_is_no_image(size: object) -> None:
    assert from_glance(answer(A, size=size), 1) is None


@pytest.mark.parametrize(
    "id_", ["", "..", "../../etc", "a/b", "0B5CF0D3-6B5A-4F0E-9A0D-2F1F6CF1AB42", "x" * 300, None, 7]
)
def test_an_id_that_cannot_be_a_file_is_no_image(id_: object) -> None:
    assert from_glance(answer(A, id=id_), 1) is None


def test_an_answer_without_an_id_is_no_image() -> None:
    said = answer(A)
    del said["id"]
    assert from_glance(said, 1) is None


@pytest.mark.parametrize("name", ["../x", "a/b", "\0", "x" * 4096, "two\nlines", "", None, "\udcff"])
@virtual_time
async def test_a_hostile_name_harms_nobody(tmp_path: Path, name: str | None) -> None:
    async with world(tmp_path, answer(A, name=name), answer(B)) as w:
        assert ids(await w.catalog.listing()) == [A, B]
        assert b"image 2" in w.catalog.links
    async with world(tmp_path) as w:
        assert len(w.catalog) == 2


@pytest.mark.parametrize(
    ("text", "epoch_s"),
    [
        ("2026-01-02T03:04:05Z", 1767323045),
        ("2026-01-02T03:04:05", 1767323045),
        ("yesterday", 0),
        (None, 0),
        (5, 0),
    ],
)
def test_times(text: object, epoch_s: int) -> None:
    image = from_glance(answer(A, updated_at=text), 1)
    assert image is not None
    assert image.updated_s == epoch_s
