"""Which spans go first, as a table, and how much is to go. Hypothesis for what must hold of any store."""

from __future__ import annotations

import time
import tracemalloc
from array import array
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.plan.eviction import (
    SLACK_BYTES,
    Group,
    Priority,
    Standing,
    Victim,
    ViewUse,
    goal,
    over,
    room,
    standing,
    victims,
)
from cachefs.store.format import USES_SPANS, SpanNo, UseFlag, ViewNo
from tests.stores import examples

LOW, NORMAL, CRITICAL = Priority
ONCE, TWICE, BOOT = 0, int(UseFlag.TWICE), int(UseFlag.BOOT)
GIB = 1 << 30


@dataclass(frozen=True)
class Usage:
    used: int
    limit: int


def group(first: int, spans: dict[int, tuple[int, int]]) -> Group:
    """`spans` by number: (last use, flags)."""
    made = Group.empty(first)
    for span, (last_s, flags) in spans.items():
        made.last_s[span - first], made.flags[span - first] = last_s, flags
    return made


def one(
    number: int,
    last_s: int,
    flags: int = ONCE,
    *,
    ended: bool = False,
    leased: bool = False,
    priority: Priority = NORMAL,
    held: bool = False,
) -> ViewUse:
    """A view with one span, so that the order of views is the order of spans."""
    return ViewUse(ViewNo(number), [group(0, {0: (last_s, flags)})], ended, leased, priority, held)


def order(*views: ViewUse) -> list[int]:
    """The views' numbers, in the order in which their spans go."""
    return [victim.view for victim in victims(views, 100)]


# ── Who goes first ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("why", "views", "goes"),
    [
        ("the coldest of a class", [one(1, 30), one(2, 10), one(3, 20)], [2, 3, 1]),
        ("an ended image, however hot", [one(1, 10), one(2, 99, ended=True)], [2, 1]),
        ("an ended image's boot set, too", [one(1, 10), one(2, 99, BOOT | TWICE, ended=True)], [2, 1]),
        ("touched once before touched twice, however hot", [one(1, 10, TWICE), one(2, 99)], [2, 1]),
        ("the boot set last, however cold", [one(1, 10, BOOT), one(2, 99, TWICE), one(3, 99)], [3, 2, 1]),
        ("a boot set that was used again is one", [one(1, 10, BOOT | TWICE), one(2, 99, TWICE)], [2, 1]),
        ("the coldest boot set", [one(1, 20, BOOT), one(2, 10, BOOT | TWICE)], [2, 1]),
        (
            "low priority within a class, then normal, then critical",
            [one(1, 10, priority=CRITICAL), one(2, 20), one(3, 30, priority=LOW)],
            [3, 2, 1],
        ),
        ("the coldest of one priority", [one(1, 20, priority=LOW), one(2, 10, priority=LOW)], [2, 1]),
        (
            "passed over once, though critical, before a boot set of low priority",
            [one(1, 10, BOOT, priority=LOW), one(2, 99, ONCE, priority=CRITICAL)],
            [2, 1],
        ),
        ("what is held after all that is not, boot sets too", [one(1, 10, held=True), one(2, 99, BOOT)], [2, 1]),
        (
            "what is held in the order of all others",
            [one(1, 10, BOOT, held=True), one(2, 99, held=True), one(3, 98, priority=LOW, held=True)],
            [3, 2, 1],
        ),
        ("an ended image is nothing to hold", [one(1, 10), one(2, 99, BOOT, ended=True, held=True)], [2, 1]),
        ("never what is leased", [one(1, 10, leased=True), one(2, 20)], [2]),
        ("never what is leased, though it has ended", [one(1, 10, ended=True, leased=True)], []),
        ("nothing that is not here", [one(1, 0), one(2, 0, BOOT), one(3, 5)], [3]),
        ("whatever flags of a later cachefs say", [one(1, 20, 0x80), one(2, 30, 0x81), one(3, 10)], [3, 1, 2]),
        ("equals in their own order", [one(1, 10), one(2, 10), one(3, 10)], [1, 2, 3]),
        ("nothing of no views", [], []),
    ],
)  # fmt: skip
def test_what_goes_first(why: str, views: list[ViewUse], goes: list[int]) -> None:
    assert order(*views) == goes, why


def test_a_whole_image_read_flushes_itself_and_not_what_guests_live_on() -> None:
    guests = ViewUse(ViewNo(1), [group(0, {0: (10, BOOT), 1: (11, BOOT | TWICE), 2: (12, TWICE)})])
    scan = ViewUse(ViewNo(2), [group(0, {span: (1000 + span, ONCE) for span in range(200)})])
    found = victims([guests, scan], 203)
    assert [v.view for v in found] == [2] * 200 + [1] * 3
    assert [v.span for v in found[200:]] == [2, 0, 1]


def test_spans_of_one_view_stand_where_each_of_them_stands() -> None:
    view = ViewUse(
        ViewNo(7), [group(256, {300: (5, TWICE), 256: (9, ONCE)}), group(0, {0: (3, TWICE), 9: (8, ONCE)})]
    )
    assert victims([view], 10) == [
        Victim(ViewNo(7), SpanNo(9), 8, Standing.ONCE),
        Victim(ViewNo(7), SpanNo(256), 9, Standing.ONCE),
        Victim(ViewNo(7), SpanNo(0), 3, Standing.TWICE),
        Victim(ViewNo(7), SpanNo(300), 5, Standing.TWICE),
    ]


def test_only_as_many_are_named_as_were_asked_for() -> None:
    view = ViewUse(ViewNo(1), [group(0, {span: (1000 - span, ONCE) for span in range(USES_SPANS)})])
    assert [v.span for v in victims([view], 3)] == [255, 254, 253]
    assert victims([view], 0) == []


views_of_any_kind = st.lists(
    st.builds(
        one,
        st.integers(1, 1000),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, 255),
        ended=st.booleans(),
        leased=st.booleans(),
        priority=st.sampled_from(Priority),
        held=st.booleans(),
    ),
    max_size=30,
)


@given(views_of_any_kind, st.integers(0, 40))
@examples(200)
def test_the_order_is_held_then_class_then_priority_then_last_use(views: list[ViewUse], most: int) -> None:
    def key(view: ViewUse) -> tuple[bool, Standing, Priority, int]:
        stands = standing(view.groups[0].flags[0], view.ended)
        return view.held and not view.ended, stands, view.priority, view.groups[0].last_s[0]

    here = [view for view in views if view.groups[0].last_s[0] and not view.leased]
    expected = [
        (view.view, 0, view.groups[0].last_s[0], key(view)[1], key(view)[0]) for view in sorted(here, key=key)
    ]
    assert victims(views, most) == expected[:most]


def test_a_store_of_one_tebibyte_is_ranked_soon_and_in_little_memory() -> None:
    spans = (1 << 40) // (4 << 20)
    last_s = array("I", (1_800_000_000 + i * 7919 % 10_000_000 for i in range(USES_SPANS)))
    groups = [Group(first, last_s, bytearray(USES_SPANS)) for first in range(0, spans, USES_SPANS)]
    began_s = time.process_time()
    found = victims([ViewUse(ViewNo(1), groups)], 4096)
    took_s = time.process_time() - began_s
    assert len(found) == 4096
    assert took_s < 1.0, "0.1 s of a processor is usual"
    tracemalloc.start()
    victims([ViewUse(ViewNo(1), groups)], 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# ── How much ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("used", "limit", "well", "bytes_to_free"),
    [
        (0, 1000, True, 0),
        (950, 1000, True, 0),  # At the high watermark is not above it.
        (951, 1000, True, 101),
        (1000, 1000, True, 150),
        (1200, 1000, True, 350),
        (500, 0, True, 500),  # Others have taken more than there was.
        (0, 0, True, 0),
        (951, 1000, False, 0),  # What cannot be fetched again does not go for a watermark...
        (1000, 1000, False, 0),
        (1200, 1000, False, 200),  # ...but the limit holds.
    ],
)
def test_how_much_goes_in_the_background(used: int, limit: int, well: bool, bytes_to_free: int) -> None:
    assert goal(Usage(used, limit), 0.95, 0.85, origin_is_well=well) == bytes_to_free


@pytest.mark.parametrize(
    ("used", "limit", "wanted", "bytes_to_free"),
    [
        (100 * GIB, 100 * GIB, 16 << 20, (16 << 20) + SLACK_BYTES),
        (90 * GIB, 100 * GIB, 16 << 20, (16 << 20) + SLACK_BYTES),  # Whoever was refused knows better.
        (101 * GIB, 100 * GIB, 16 << 20, GIB + (16 << 20) + SLACK_BYTES),
        (320, 320, 7, 17),  # A small store is not emptied for a little more.
        (5, 0, 7, 12),
    ],
)
def test_how_much_goes_for_a_landing(used: int, limit: int, wanted: int, bytes_to_free: int) -> None:
    assert room(Usage(used, limit), wanted) == bytes_to_free


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50), st.floats(0.5, 1), st.floats(0, 0.49), st.booleans())
@examples(200)
def test_freeing_the_goal_is_enough_and_never_more_than_there_is(
    used: int, limit: int, high: float, low: float, well: bool
) -> None:
    found = goal(Usage(used, limit), high, low, origin_is_well=well)
    assert 0 <= found <= used
    after = Usage(used - found, limit)
    assert goal(after, high, low, origin_is_well=well) == 0
    assert over(after) == 0


def test_more_groups_than_a_rank_has_places_are_no_failure() -> None:
    """A span here and there of disks of many TiB."""
    used = Group.empty(0)
    used.last_s[0] = 1
    empty = Group.empty(USES_SPANS)
    many = ViewUse(ViewNo(1), [empty] * (1 << 20) + [used] * 10)
    assert [victim.span for victim in victims([many], 3)] == [0, 0, 0]
    full = ViewUse(ViewNo(2), [used] * ((1 << 20) + 10))
    assert len(victims([full], 5)) == 5
