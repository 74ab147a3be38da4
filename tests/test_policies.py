"""What policies decide, and what of it a node does: tables of images and statistics to decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.plan.holding import UNTRUSTED, Bounds, Row, plan
from cachefs.policies import Decision, Image, Keep, Node, Policy
from cachefs.policies.by_name import ByName
from cachefs.policies.by_property import ByProperty
from cachefs.policies.most_used import MostUsed
from cachefs.policies.newest import Newest
from cachefs.policies.static import Static
from tests.stores import examples, image_id

GIB = 1 << 30
HOLD, PIN = Keep.HOLD, Keep.PIN
DAY_S = 86400


def an(
    number: int,
    name: str = "",
    *,
    properties: dict[str, str] | None = None,
    tags: Sequence[str] = (),
    created_s: int = 0,
    opens: float = 0.0,
    trusted: bool = True,
    hidden: bool = False,
    priority: str = "normal",
    size: int = GIB,
    cached: int = 0,
    leased: bool = False,
    pinned: bool = False,
) -> Image:
    """An image as policies see it."""
    return Image(
        id=image_id(number), name=name, size=size, disk_format="qcow2", owner="o", visibility="public",
        hidden=hidden, tags=frozenset(tags), properties=MappingProxyType(properties or {}),
        created_s=created_s, updated_s=0,
        trusted=trusted, priority=priority, cached=cached, used_s=0, opens=opens, leased=leased, pinned=pinned,
        held=False,
    )  # fmt: skip


def linux(number: int, day: int, distro: str = "ubuntu", arch: str = "x86_64", **more: object) -> Image:
    made = an(number, created_s=day * DAY_S, properties={"os_distro": distro, "architecture": arch})
    return replace(made, **more)  # type: ignore[arg-type]


def asks(value: str) -> dict[str, str]:
    return {"cachefs_precache": value}


Expected = list[tuple[int, Keep]]


@pytest.mark.parametrize(
    ("why", "policy", "images", "decides"),
    [
        # ── property ──
        ("who asks is held", ByProperty({}), [an(1, properties=asks("true")), an(2)], [(1, HOLD)]),
        ("or pinned", ByProperty({}), [an(1, properties=asks("pin"))], [(1, PIN)]),
        ("in any case of letters", ByProperty({}), [an(1, properties=asks(" PIN "))], [(1, PIN)]),
        ("false is no", ByProperty({}), [an(1, properties=asks("false"))], []),
        ("nor is anything else", ByProperty({}), [an(1, properties=asks("please")), an(2, properties=asks(""))],
         []),
        ("a tag will do", ByProperty({}), [an(1, tags=["x", "cachefs_precache"]), an(2, tags=["y"])], [(1, HOLD)]),
        ("the property says no, whatever the tag", ByProperty({}),
         [an(1, tags=["cachefs_precache"], properties=asks("false"))], []),
        ("the property pins, the tag as well", ByProperty({}),
         [an(1, tags=["cachefs_precache"], properties=asks("pin"))], [(1, PIN)]),
        # ── name ──
        ("names like a pattern", ByName({"patterns": "ubuntu-*"}), [an(1, "ubuntu-24"), an(2, "debian")],
         [(1, HOLD)]),
        ("whole names", ByName({"patterns": "ubuntu"}), [an(1, "ubuntu-24"), an(2, "my ubuntu")], []),
        ("in the order of patterns, the first decides", ByName({"patterns": "pin:*-lts, ubuntu-*"}),
         [an(1, "ubuntu-x"), an(2, "ubuntu-lts")], [(2, PIN), (1, HOLD)]),
        ("letters as they are", ByName({"patterns": "Ubuntu"}), [an(1, "ubuntu")], []),
        ("no name is like *", ByName({"patterns": "*"}), [an(1)], []),
        # ── most-used ──
        ("the most used first", MostUsed({"count": "2"}), [an(1, opens=1), an(2, opens=9), an(3, opens=4)],
         [(2, HOLD), (3, HOLD)]),
        ("what is hardly used is not", MostUsed({"count": "5"}), [an(1, opens=0.4), an(2)], []),
        ("equals in the order of their ids", MostUsed({"count": "1"}), [an(2, opens=3), an(1, opens=3)],
         [(1, HOLD)]),
        ("also what nobody trusts: it goes by use", MostUsed({}), [an(1, opens=3, trusted=False)], [(1, HOLD)]),
        # ── newest ──
        ("the newest of each family", Newest({}),
         [linux(1, 1), linux(2, 3), linux(3, 2), linux(4, 1, "debian"), linux(5, 9, arch="aarch64")],
         [(4, HOLD), (5, HOLD), (2, HOLD)]),
        ("two of each", Newest({"count": "2"}), [linux(1, 1), linux(2, 3), linux(3, 2)], [(2, HOLD), (3, HOLD)]),
        ("a hidden one is superseded", Newest({}), [linux(1, 1), linux(2, 3, hidden=True)], [(1, HOLD)]),
        ("a tenant's is in no family", Newest({}), [linux(1, 1), linux(2, 3, trusted=False)], [(1, HOLD)]),
        ("no distro, no family", Newest({}), [an(1), an(2, properties={"architecture": "x86_64"})], []),
        ("families by name", Newest({"pattern": r"^(\w+)-\d"}),
         [an(1, "ubuntu-22", created_s=1), an(2, "ubuntu-24", created_s=2), an(3, "win-11", created_s=1),
          an(4, "x")],
         [(2, HOLD), (3, HOLD)]),
        ("by a named group", Newest({"pattern": r"(\d+)-(?P<family>\w+)"}),
         [an(1, "1-a", created_s=1), an(2, "2-a", created_s=2)], [(2, HOLD)]),
        ("by all that is found", Newest({"pattern": r"[a-z]+"}),
         [an(1, "a-1", created_s=1), an(2, "a-2", created_s=2)], [(2, HOLD)]),
        ("a group that found nothing", Newest({"pattern": r"a(b)?"}), [an(1, "a")], []),
        # ── static ──
        ("by id and by name, in order", Static({"images": f"golden, pin:{image_id(1)}"}), [an(1), an(2, "golden")],
         [(2, HOLD), (1, PIN)]),
        ("every image of a name", Static({"images": "golden"}), [an(2, "golden"), an(1, "golden")],
         [(2, HOLD), (1, HOLD)]),
        ("no images at all", ByProperty({}), [], []),
    ],
)  # fmt: skip
def test_what_policies_decide(why: str, policy: Policy, images: list[Image], decides: Expected) -> None:
    decisions = list(policy.decide(Node(tuple(images), 100 * DAY_S, 10 * GIB)))
    assert [(d.image, d.keep) for d in decisions] == [(image_id(number), keep) for number, keep in decides], why
    assert all(decision.reason for decision in decisions)


@pytest.mark.parametrize(
    ("policy", "theirs"),
    [
        (ByProperty({}), True),
        (ByName({"patterns": "golden"}), True),
        (MostUsed({}), False),
        (Newest({}), True),
        (Static({"images": "golden"}), True),
        (Static({"images": image_id(1)}), False),
    ],
)
def test_what_goes_by_the_owners_word_says_so(policy: Policy, theirs: bool) -> None:
    image = replace(linux(1, 1, opens=5.0), name="golden", tags=frozenset(["cachefs_precache"]))
    (decision,) = policy.decide(Node((image,), 0.0, GIB))
    assert decision.owners_word is theirs


def test_what_is_listed_and_is_not_there_is_answered_too() -> None:
    decisions = list(Static({"images": f"golden, {image_id(7)}"}).decide(Node((), 0.0, GIB)))
    assert [decision.image for decision in decisions] == ["golden", image_id(7)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ByName({}), lambda: ByName({"patterns": " , pin:"}), lambda: Static({"images": ""}),
        lambda: Newest({"pattern": "(("}), lambda: MostUsed({"count": "many"}),
    ],
)  # fmt: skip
def test_options_that_cannot_be(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError):  # noqa: PT011  # Each says it in its own words.
        make()


# ── What of it is done ────────────────────────────────────────────────────────────────────────────────

ROOMY = Bounds(share=1 << 50, room=1 << 50, pins=1 << 50)


def wants(number: int, keep: Keep = HOLD, reason: str = "r", *, owners_word: bool = False) -> Decision:
    return Decision(image_id(number), keep, reason, owners_word)


def rows(
    said: list[tuple[str, list[Decision]]],
    images: list[Image],
    bounds: Bounds = ROOMY,
    unlisted: Sequence[Row] = (),
) -> list[Row]:
    return plan(said, {image.id: image for image in images}, unlisted, bounds)


def number_of(row: Row) -> int:
    return int(row.image.replace("-", ""), 16)


@pytest.mark.parametrize(
    ("why", "said", "images", "bounds", "outcome"),
    [
        ("what fits is held", [("p", [wants(1), wants(2)])], [an(1), an(2)], ROOMY, {1: HOLD, 2: HOLD}),
        ("up to the share, by whole sizes, whatever is here", [("p", [wants(1), wants(2)])],
         [an(1, cached=GIB), an(2, cached=GIB)], ROOMY._replace(share=GIB), {1: HOLD, 2: "share"}),
        ("a smaller one may still fit", [("p", [wants(1), wants(2), wants(3)])],
         [an(1), an(2, size=2 * GIB), an(3)], ROOMY._replace(share=2 * GIB), {1: HOLD, 2: "share", 3: HOLD}),
        ("in the order of the policies", [("p", [wants(2)]), ("q", [wants(1)])], [an(1), an(2)],
         ROOMY._replace(share=GIB), {2: HOLD, 1: "share"}),
        ("critical ones before all others", [("p", [wants(1)]), ("q", [wants(2)])],
         [an(1), an(2, priority="critical")], ROOMY._replace(share=GIB), {2: HOLD, 1: "share"}),
        ("low ones after all others", [("p", [wants(1)]), ("q", [wants(2)])], [an(1, priority="low"), an(2)],
         ROOMY._replace(share=GIB), {2: HOLD, 1: "share"}),
        ("pins before holds", [("p", [wants(1)]), ("q", [wants(2, PIN)])], [an(1), an(2)],
         ROOMY._replace(share=GIB), {2: PIN, 1: "share"}),
        ("the firmest counts", [("p", [wants(1)]), ("q", [wants(1, PIN)])], [an(1)], ROOMY, {1: PIN}),
        ("what is leased leaves little room", [("p", [wants(1)])], [an(1)], ROOMY._replace(room=GIB - 1),
         {1: "leased and held"}),
        ("what is leased itself needs none", [("p", [wants(1)])], [an(1, leased=True)], ROOMY._replace(room=0),
         {1: HOLD}),
        ("but counts in the share", [("p", [wants(1)])], [an(1, leased=True)], ROOMY._replace(share=0),
         {1: "share"}),
        ("beyond pin_share it is held only", [("p", [wants(1, PIN), wants(2, PIN)])], [an(1), an(2)],
         ROOMY._replace(pins=GIB), {1: PIN, 2: HOLD}),
        ("what a human has pinned costs no more", [("p", [wants(1, PIN)])], [an(1, pinned=True, leased=True)],
         ROOMY._replace(pins=0), {1: PIN}),
        ("a full store fetches nothing", [("p", [wants(1), wants(2)])], [an(1, cached=GIB), an(2)],
         ROOMY._replace(full="all is leased"), {1: HOLD, 2: "all is leased"}),
        ("a tenant's word is not enough", [("p", [wants(1, owners_word=True)])], [an(1, trusted=False)], ROOMY,
         {1: UNTRUSTED}),
        ("a trusted owner's is", [("p", [wants(1, owners_word=True)])], [an(1)], ROOMY, {1: HOLD}),
        ("nor does a tenant's word firm up another", [("p", [wants(1)]), ("q", [wants(1, PIN, owners_word=True)])],
         [an(1, trusted=False)], ROOMY, {1: HOLD}),
        ("what nobody knows", [("p", [wants(7)])], [an(1)], ROOMY, {7: "no such"}),
        ("nothing is wanted", [("p", [])], [an(1)], ROOMY, {}),
    ],
)  # fmt: skip
def test_what_is_held(
    why: str,
    said: list[tuple[str, list[Decision]]],
    images: list[Image],
    bounds: Bounds,
    outcome: dict[int, Keep | str],
) -> None:
    found = rows(said, images, bounds)
    assert {number_of(row) for row in found} == set(outcome), why
    for row in found:
        expected = outcome[number_of(row)]
        if isinstance(expected, Keep):
            assert (row.refused, row.keep) == (None, expected), why
        else:
            assert row.refused is not None
            assert expected in row.refused, why


def test_a_row_says_all_of_it() -> None:
    said = [("most-used", [wants(1, reason="used")]), ("static", [wants(1, PIN, "listed")])]
    (row,) = rows(said, [an(1, "golden", cached=GIB // 4)])
    assert row == Row(image_id(1), "golden", PIN, ("static", "most-used"), "listed", GIB, GIB * 3 // 4)


def test_a_pin_that_does_not_fit_says_so() -> None:
    (row,) = rows([("p", [wants(1, PIN)])], [an(1)], ROOMY._replace(pins=GIB // 2))
    assert row.note == "not pinned: only 512.0 MiB are left of [store] pin_share"


def test_what_is_not_listed_any_more_stays_first() -> None:
    stays = Row(image_id(9), "old", PIN, ("p",), "r", GIB)
    found = rows([("p", [wants(1)])], [an(1)], ROOMY._replace(share=GIB), [stays])
    assert [(number_of(row), row.refused is None) for row in found] == [(9, True), (1, False)]


some_images = st.lists(
    st.builds(
        an,
        st.integers(1, 8),
        size=st.integers(0, 10),
        cached=st.integers(0, 10),
        trusted=st.booleans(),
        leased=st.booleans(),
        pinned=st.booleans(),
        priority=st.sampled_from(["critical", "normal", "low"]),
    ),
    max_size=8,
    unique_by=lambda image: image.id,
)
some_wishes = st.lists(
    st.builds(wants, st.integers(1, 9), st.sampled_from(Keep), owners_word=st.booleans()), max_size=8
)


@given(
    some_images,
    some_wishes,
    some_wishes,
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 40),
    st.booleans(),
)
@examples(200)
def test_whatever_is_wanted_the_bounds_hold(
    images: list[Image], one: list[Decision], two: list[Decision], share: int, room: int, pins: int, full: bool
) -> None:
    bounds = Bounds(share, room, pins, "full" if full else None)
    found = rows([("one", one), ("two", two)], images, bounds)
    by_id = {image.id: image for image in images}
    held = [(row, by_id[row.image]) for row in found if row.refused is None]
    assert len({row.image for row in found}) == len(found) == len({d.image for d in one + two})
    assert sum(image.size for _, image in held) <= share
    assert sum(image.size for _, image in held if not image.leased) <= room
    assert sum(image.size for row, image in held if row.keep is PIN and not image.pinned) <= pins
    for row, image in held:
        wishes = [w for w in one + two if w.image == image.id and (image.trusted or not w.owners_word)]
        assert wishes, "somebody who counts wanted it"
        assert row.keep is HOLD or any(wish.keep is PIN for wish in wishes)
        assert not (full and image.cached < image.size)
