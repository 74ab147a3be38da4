"""How important images are, and who may say so: tables of images and rules; what of metadata is kept at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cachefs.bounds import HEAD_START_S, Bound
from cachefs.flights import Flight
from cachefs.flights import Priority as Urgency
from cachefs.plan.eviction import Priority
from cachefs.plan.extents import Extent
from cachefs.plan.metadata import (
    BYTES_MAX,
    COUNT_MAX,
    VALUE_BYTES_MAX,
    epoch_s,
    properties_of,
    tags_of,
)
from cachefs.plan.priorities import Rule, Rules, parse_trust
from cachefs.plan.windows import Pattern
from tests.flow import ScriptedSource, flow, quiet, virtual_time
from tests.stores import SPAN, examples, image_id

CRITICAL, NORMAL, LOW = Priority.CRITICAL, Priority.NORMAL, Priority.LOW


@dataclass(frozen=True)
class Described:
    """An image of a tenant, unless it is said to be another."""

    id: str = "11111111-1111-4111-8111-111111111111"
    name: str | None = "ubuntu-24.04"
    owner: str | None = "tenant"
    visibility: str | None = "private"
    tags: tuple[str, ...] = ()
    properties: tuple[tuple[str, str], ...] = ()


def says(priority: str) -> tuple[tuple[str, str], ...]:
    return (("cachefs_priority", priority),)


def rules(trust: str = "public", **written: str) -> Rules:
    """As they are written in the configuration."""
    parsed = {name: tuple(map(Rule.parse, text.split(","))) for name, text in written.items()}
    return Rules(**parsed, trust=tuple(map(parse_trust, trust.split(","))) if trust else ())


PUBLIC: dict[str, Any] = {"visibility": "public"}


@pytest.mark.parametrize(
    ("why", "image", "by", "priority"),
    [
        ("nobody says anything", Described(), rules(), NORMAL),
        # ── the property ──
        ("a public image says so", Described(**PUBLIC, properties=says("critical")), rules(), CRITICAL),
        ("in any case of letters", Described(**PUBLIC, properties=says(" Critical ")), rules(), CRITICAL),
        ("a tenant's own image says so", Described(properties=says("critical")), rules(), NORMAL),
        ("a shared one", Described(visibility="shared", properties=says("critical")), rules(), NORMAL),
        ("a community image, which anybody makes", Described(visibility="community", properties=says("critical")),
         rules(), NORMAL),
        ("of a trusted owner", Described(properties=says("critical")), rules("owner:tenant"), CRITICAL),
        ("of another than the trusted owner", Described(properties=says("critical")), rules("owner:ten"), NORMAL),
        ("nobody is trusted", Described(**PUBLIC, properties=says("critical")), rules(""), NORMAL),
        ("all are", Described(properties=says("critical")), rules("all"), CRITICAL),
        ("an image without an owner is not of owner:", Described(owner=None, properties=says("critical")),
         rules("owner:None"), NORMAL),
        ("low is for everybody to say", Described(properties=says("low")), rules(""), LOW),
        ("no word that there is", Described(**PUBLIC, properties=says("high")), rules(), NORMAL),
        ("nor a number", Described(**PUBLIC, properties=says("2")), rules(), NORMAL),
        # ── the configuration ──
        ("its owner is critical", Described(), rules(critical="owner:tenant"), CRITICAL),
        ("owners are whole ids", Described(), rules(critical="owner:ten"), NORMAL),
        ("its id is", Described(), rules(critical="id:11111111-1111-4111-8111-111111111111"), CRITICAL),
        ("a tenant takes a critical name", Described(), rules(critical="name:ubuntu-*"), NORMAL),
        ("a public image has it", Described(**PUBLIC), rules(critical="name:ubuntu-*"), CRITICAL),
        ("patterns are of whole names", Described(**PUBLIC), rules(critical="name:ubuntu"), NORMAL),
        ("an image without a name", Described(**PUBLIC, name=None), rules(critical="name:*"), NORMAL),
        ("a tenant takes a critical tag", Described(tags=("gold",)), rules(critical="tag:gold"), NORMAL),
        ("a public image has it", Described(**PUBLIC, tags=("gold",)), rules(critical="tag:gold"), CRITICAL),
        ("a low name is for everybody", Described(name="ci-1"), rules(low="name:ci-*"), LOW),
        ("critical comes first", Described(**PUBLIC), rules(critical="name:u*", low="owner:tenant"), CRITICAL),
        ("then normal", Described(**PUBLIC), rules(normal="name:u*", low="owner:tenant"), NORMAL),
        ("a tenant cannot rise from low by a name", Described(), rules(normal="name:u*", low="owner:tenant"), LOW),
        ("the second rule fits", Described(), rules(critical="id:x,owner:tenant"), CRITICAL),
        ("configuration wins over the property, down", Described(**PUBLIC, properties=says("critical")),
         rules(low="owner:tenant"), LOW),
        ("configuration wins over the property, up", Described(properties=says("low")),
         rules(critical="owner:tenant"), CRITICAL),
        ("configuration wins over the property, to normal", Described(properties=says("low")),
         rules(normal="owner:tenant"), NORMAL),
    ],
)  # fmt: skip
def test_how_important_an_image_is(why: str, image: Described, by: Rules, priority: Priority) -> None:
    ranking = by.rank(image)
    assert ranking.priority is priority, why
    assert ranking.why


def test_an_ignored_word_is_said_to_be() -> None:
    why = rules().rank(Described(properties=says("critical"))).why
    assert why == "cachefs_priority=critical is not trusted of this image"


@pytest.mark.parametrize("text", ["", "owner", "owner:", "owner: ", "colour:red", "gold", "Owner:x"])
def test_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match="is no rule"):
        Rule.parse(text)


@pytest.mark.parametrize("text", ["", "none", "owner:", "private", "Public"])
def test_nobody_to_trust(text: str) -> None:
    with pytest.raises(ValueError, match="is nobody to trust"):
        parse_trust(text)


words = st.text(max_size=20)


@given(
    st.builds(
        Described,
        name=st.none() | words,
        owner=st.none() | words,
        visibility=st.sampled_from(["private", "shared", "community"]),
        tags=st.lists(words, max_size=3).map(tuple),
        properties=words.map(says) | st.sampled_from(["critical", "normal", "low"]).map(says),
    ),
    st.lists(st.builds("{}:{}".format, st.sampled_from(["tag", "name"]), st.sampled_from("*abc")), max_size=3),
)
@examples(100)
def test_nothing_that_a_tenant_writes_makes_an_image_critical(image: Described, written: list[str]) -> None:
    parsed = tuple(map(Rule.parse, written))
    assert Rules(critical=parsed).rank(image).priority < CRITICAL
    low = Rules(low=(Rule.parse("owner:x"),), normal=parsed).rank(Described(**{**vars(image), "owner": "x"}))
    assert low.priority is LOW


# ── What is kept ──────────────────────────────────────────────────────────────────────────────────────


def test_what_policies_go_by_is_kept_and_nothing_else() -> None:
    answer = {
        "id": "x", "tags": ["b", "a", "a"], "os_distro": "ubuntu", "os_version": "24.04", "architecture": "x86_64",
        "cachefs_precache": "true", "cachefs_team": "blue", "hw_disk_bus": "scsi", "cachefs_n": 5,
        "os_admin_user": None,
    }  # fmt: skip
    assert tags_of(answer) == ("a", "b")
    assert dict(properties_of(answer)) == {
        "os_distro": "ubuntu", "os_version": "24.04", "architecture": "x86_64", "cachefs_precache": "true",
        "cachefs_team": "blue",
    }  # fmt: skip


def test_what_counts_is_kept_first_where_there_is_too_much() -> None:
    many = {f"cachefs_{n:03}": "v" * 100 for n in range(100)}
    kept = dict(properties_of({**many, "os_distro": "ubuntu", "cachefs_priority": "low", "cachefs_x": "y" * 300}))
    assert kept["os_distro"] == "ubuntu"
    assert kept["cachefs_priority"] == "low"
    assert "cachefs_x" not in kept, "cut short it would say something else"
    assert "cachefs_000" in kept
    tags = tags_of({"tags": [f"a{n:03}" for n in range(128)] + ["cachefs_precache"]})
    assert "cachefs_precache" in tags
    assert len(tags) == COUNT_MAX


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.none() | st.text())))
@examples(100)
def test_whatever_glance_answers_little_is_kept(answer: dict[str, object]) -> None:
    hostile = {f"cachefs_{name}": value for name, value in answer.items()} | {"tags": answer.get("", answer)}
    for kept in ([(tag, "") for tag in tags_of(hostile)], list(properties_of(hostile))):
        sizes = [len(text.encode(errors="surrogatepass")) for pair in kept for text in pair]
        assert len(kept) <= COUNT_MAX
        assert sum(sizes) <= BYTES_MAX
        assert max(sizes, default=0) <= VALUE_BYTES_MAX
        assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2026-01-02T03:04:05Z", 1767323045), ("2026-01-02T03:04:05", 1767323045), (None, 0), ("soon", 0), (5, 0)],
)
def test_times(text: object, seconds: int) -> None:
    assert epoch_s(text) == seconds


# ── Who is served first ───────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_demand_before_background_then_the_important_then_the_first(tmp_path: Path) -> None:
    async with flow(tmp_path / "store", ScriptedSource()) as made:
        view = made.stored(1, SPAN)
        served: list[str] = []
        bound = Bound(1)

        async def take(name: str, urgency: Urgency, rank: int) -> None:
            await bound.take(Flight(view, Extent(0, 65536), urgency, rank=rank))
            served.append(name)

        async with trio.open_nursery() as nursery:
            assert bound.take_now(1)
            for name, urgency, rank in (
                ("critical, ahead", Urgency.READAHEAD, 0),
                ("low", Urgency.DEMAND, 2),
                ("normal", Urgency.DEMAND, 1),
                ("critical", Urgency.DEMAND, 0),
                ("critical, later", Urgency.DEMAND, 0),
                ("critical, in the background", Urgency.HYDRATION, 0),
            ):
                nursery.start_soon(take, name, urgency, rank)
                await quiet()
            for _ in range(6):
                bound.give_back()
                await quiet()
        assert served == [
            "critical", "critical, later", "normal", "low", "critical, ahead", "critical, in the background",
        ]  # fmt: skip


@virtual_time
async def test_nobody_waits_for_ever_behind_the_important(tmp_path: Path) -> None:
    """One that came so much earlier goes first, whatever its image."""
    async with flow(tmp_path / "store", ScriptedSource()) as made:
        view = made.stored(1, SPAN)
        served: list[int] = []
        bound = Bound(1)

        async def take(rank: int) -> None:
            await bound.take(Flight(view, Extent(0, 65536), Urgency.DEMAND, rank=rank))
            served.append(rank)

        async with trio.open_nursery() as nursery:
            assert bound.take_now(1)
            nursery.start_soon(take, 2)
            await trio.sleep(2 * HEAD_START_S - 1)
            nursery.start_soon(take, 0)
            await trio.sleep(2)
            nursery.start_soon(take, 0)
            await quiet()
            for _ in range(3):
                bound.give_back()
                await quiet()
        assert served == [0, 2, 0]


@virtual_time
async def test_the_link_is_the_important_images_first_where_it_is_short(tmp_path: Path) -> None:
    source = ScriptedSource(rate=5e6)
    async with flow(tmp_path / "store", source, connections=1) as made:
        ranks = {image_id(2): 2, image_id(3): 1, image_id(4): 0}
        made.fetcher.rank_of = lambda image: ranks.get(image, 1)
        async with trio.open_nursery() as nursery:
            for image in (1, 2, 3, 4):  # The first one has the link.
                view = made.stored(image, SPAN)
                nursery.start_soon(made.blocks.read, view, 0, 4096, Pattern())
                await quiet()
        assert [request.image for request in source.requests] == [1, 4, 3, 2]
