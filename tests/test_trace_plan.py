"""What first touches come to, what two recordings do, and in which requests a trace is fetched: tables and
properties.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.plan import trace
from cachefs.plan.extents import BLOCK, Extent, coalesce
from cachefs.plan.trace import AGE_MAX, BLOCKS_MAX, RUNS_MAX, SCAN_BLOCKS, Pace
from cachefs.store.format import TraceRecord, TraceRun
from tests.stores import examples, image_id

MIB = 1 << 20
HASH = "ab" * 64


def runs(*wanted: tuple[int, int] | tuple[int, int, int] | tuple[int, int, int, int]) -> tuple[TraceRun, ...]:
    return tuple(TraceRun(*(*run, *(0, 0)[len(run) - 2 :])) for run in wanted)


def of_blocks(*blocks: int, age: int = 0) -> tuple[TraceRun, ...]:
    """Each a run of its own, all at once."""
    return tuple(TraceRun(block, 1, 0, age) for block in blocks)


def blocks_of(found: Sequence[TraceRun]) -> list[int]:
    return list(trace.blocks_of(found))


def record(found: Sequence[TraceRun], size: int = 1 << 40) -> TraceRecord:
    return TraceRecord(size, 5.0, 6.0, 1, tuple(found))


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("algorithm", "value", "names"),
    [
        ("sha512", HASH, (f"sha512:{HASH}", f"image:{image_id(1)}")),
        ("SHA512", HASH.upper(), (f"sha512:{HASH}", f"image:{image_id(1)}")),
        ("sha3-512", HASH, (f"sha3-512:{HASH}", f"image:{image_id(1)}")),
        (None, HASH, (f"image:{image_id(1)}",)),
        ("sha512", None, (f"image:{image_id(1)}",)),
        ("sha512", "", (f"image:{image_id(1)}",)),
        ("sha512", "../../etc", (f"image:{image_id(1)}",)),
        ("sha512", "ab" * 400, (f"image:{image_id(1)}",)),
        ("sha 512", HASH, (f"image:{image_id(1)}",)),
    ],
)
def test_content_is_named_by_its_hash_where_that_is_one(
    algorithm: str | None, value: str | None, names: tuple[str, ...]
) -> None:
    assert trace.content_names(image_id(1), algorithm, value) == names
    assert all(map(trace.is_content, names))


@pytest.mark.parametrize(
    "name", ["", "image:", "image:1", f"image:{image_id(1).upper()}x", "sha512:", "x", "a:zz"]
)
def test_what_names_no_content(name: str) -> None:
    assert not trace.is_content(name)


# ── Recordings ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("readers", "expected"),
    [
        ([], ()),
        ([{}], ()),
        ([{5: 0}], runs((5, 1))),
        ([{5: 0, 6: 0, 7: 3}], runs((5, 3))),
        ([{5: 0, 7: 0, 6: 0}], runs((5, 1), (7, 1), (6, 1))),
        ([{5: 0, 6: 11}], runs((5, 1), (6, 1, 11))),
        ([{5: 0, 9: 20}, {7: 10, 5: 15}], runs((5, 1), (7, 1, 10), (9, 1, 20))),
        ([{7: 10}, {5: 2, 7: 3}], runs((5, 1, 2), (7, 1, 3))),
    ],
)
def test_first_touches_become_runs_in_the_order_of_need(
    readers: list[dict[int, int]], expected: tuple[TraceRun, ...]
) -> None:
    assert trace.recorded(readers) == expected


def shuffled(blocks: range, seed: int = 1) -> list[int]:
    mixed = list(blocks)
    random.Random(seed).shuffle(mixed)
    return mixed


def by_eights(blocks: range) -> list[int]:
    """As eight requests of 2 MiB at once do, of which the last may come first."""
    pieces = [list(blocks[at : at + 32]) for at in range(0, len(blocks), 32)]
    groups = [pieces[at : at + 8] for at in range(0, len(pieces), 8)]
    return [block for group in groups for piece in reversed(group) for block in piece]


MANY = range(SCAN_BLOCKS)
SCANS: dict[str, tuple[Sequence[int], bool]] = {
    "dd": (MANY, True),
    "a part of dd, from the middle": (range(5000, 5000 + SCAN_BLOCKS), True),
    "qemu-img convert": (by_eights(range(4 * SCAN_BLOCKS)), True),
    "dd of every other block": (range(0, 2 * SCAN_BLOCKS, 2), True),
    "dd, and a boot before it": ([*shuffled(range(50_000, 60_000))[:50], *range(20_000)], False),
    "a small image, whole": (range(SCAN_BLOCKS - 1), False),
    "all of an image at random": (shuffled(range(4 * SCAN_BLOCKS)), False),
    "far apart, in order": (range(0, 100 * SCAN_BLOCKS, 100), False),
    "a boot": (shuffled(range(32768))[:2000], False),
}


@pytest.mark.parametrize("name", SCANS)
def test_who_reads_on_and_on_boots_nothing(name: str) -> None:
    blocks, is_scan = SCANS[name]
    assert trace.is_scan(list(blocks)) is is_scan
    assert (trace.recorded([dict.fromkeys(blocks, 0)]) == ()) is is_scan


def test_a_recording_is_bounded_and_its_beginning_kept() -> None:
    apart = [block * 3 for block in shuffled(range(2 * RUNS_MAX))]
    kept = trace.recorded([dict.fromkeys(apart, 0)])
    assert len(kept) == RUNS_MAX
    assert blocks_of(kept) == apart[:RUNS_MAX]
    by_fours = [block for first in shuffled(range(2 * RUNS_MAX)) for block in range(5 * first, 5 * first + 4)]
    kept = trace.recorded([dict.fromkeys(by_fours, 0)])
    assert blocks_of(kept) == by_fours[:BLOCKS_MAX]
    assert trace.fault(record(kept)) is None


def test_what_two_recordings_come_to() -> None:
    first, second = of_blocks(1, 2, 3, 4), of_blocks(9, 3, 8)
    assert trace.merged(first, second) == (
        *runs((9, 1), (3, 1), (8, 1)), *runs((1, 2, 0, 1), (4, 1, 0, 1)),
    )  # fmt: skip
    # Somebody looked at the header, and at something else.
    assert blocks_of(trace.merged(first, of_blocks(7))) == [1, 2, 3, 4, 7]
    assert {run.age for run in trace.merged(first, of_blocks(7))} == {0}
    assert trace.merged((), second) == second


def test_what_no_guest_touches_any_more_is_forgotten() -> None:
    known, always = of_blocks(*range(0, 20, 2)), of_blocks(*range(1, 21, 2))
    for n in range(AGE_MAX):
        known = trace.merged(known, always)
        assert len(blocks_of(known)) == 20, n
    assert trace.merged(known, always) == always
    # Touched once more, it is as young as the others.
    assert {run.age for run in trace.merged(known, of_blocks(*range(20)))} == {0}


touches = st.dictionaries(st.integers(0, 500), st.integers(0, 3000), max_size=60)


@given(st.lists(touches, max_size=3))
def test_a_recording_has_each_block_once_at_its_first_time(readers: list[dict[int, int]]) -> None:
    found = trace.recorded(readers)
    blocks = blocks_of(found)
    assert sorted(blocks) == sorted({block for reader in readers for block in reader})
    assert len(set(blocks)) == len(blocks)
    if found:
        assert trace.fault(record(found)) is None
    first = {block: min(reader[block] for reader in readers if block in reader) for block in blocks}
    for run in found:
        assert first[run.first] == run.at
        assert all(run.at <= first[run.first + n] <= run.at + 10 for n in range(run.blocks))


@given(st.lists(touches, min_size=1, max_size=6))
def test_recordings_add_up_to_a_trace(recordings: list[dict[int, int]]) -> None:
    known: tuple[TraceRun, ...] = ()
    for one in recordings:
        new = trace.recorded([one])
        before, known = known, trace.merged(known, new)
        if known:
            assert trace.fault(record(known)) is None
        assert set(blocks_of(new)) <= set(blocks_of(known)) <= set(blocks_of(new)) | set(blocks_of(before))
        if 2 * len(one) >= len(blocks_of(before)):
            assert blocks_of(known)[: len(one)] == blocks_of(new), "its order counts"
        else:
            assert blocks_of(known)[: len(blocks_of(before))] == blocks_of(before)


# ── What nobody could have recorded ───────────────────────────────────────────────────────────────────

SOUND = record(runs((5, 3), (1, 2, 4), (100, 1, 4)))
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no runs": ({"runs": ()}, "has 0 runs"),
    "too many runs": ({"runs": of_blocks(*range(RUNS_MAX + 1))}, "runs, and may have"),
    "too many blocks": ({"runs": runs((0, 60000))}, f"more than {BLOCKS_MAX} blocks"),
    "a block twice": ({"runs": runs((5, 3), (7, 1))}, "twice"),
    "beyond the end": ({"size": 101 * BLOCK, "runs": runs((100, 2))}, "does not lie in its image"),
    "no blocks": ({"runs": runs((5, 0))}, "does not lie"),
    "a negative block": ({"runs": runs((-1, 3))}, "does not lie"),
    "an enormous run": ({"runs": runs((0, 1 << 20))}, "does not lie"),
    "an enormous block": ({"size": 1 << 62, "runs": runs((1 << 33, 1))}, "does not lie"),
    "times that fall": ({"runs": runs((5, 1, 7), (6, 1, 6))}, "order of their times"),
    "a negative time": ({"runs": runs((5, 1, -1))}, "order of their times"),
    "an enormous time": ({"runs": runs((5, 1, 1 << 16))}, "order of their times"),
    "an enormous age": ({"runs": runs((5, 1, 0, 200))}, "order of their times"),
    "no size": ({"size": 0}, "size"),
    "a negative size": ({"size": -1}, "size"),
    "an enormous size": ({"size": 1 << 63}, "size"),
    "no time": ({"recorded_s": float("nan")}, "times"),
    "a time before all": ({"used_s": -1.0}, "times"),
    "a time after all": ({"used_s": float("inf")}, "times"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_nobody_could_have_recorded_is_found(name: str) -> None:
    assert trace.fault(SOUND) is None
    changes, says = FAULTS[name]
    assert says in (trace.fault(replace(SOUND, **changes)) or "")


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────────

# One request costs as much as 2.5 blocks, four travel side by side.
SLOW = Pace(0.02, 2.5 * BLOCK / 0.02 * 4, 4)


def at(*blocks: int | tuple[int, int]) -> list[Extent]:
    pairs = [(b, 1) if isinstance(b, int) else b for b in blocks]
    return [Extent(first * BLOCK, (first + n) * BLOCK) for first, n in pairs]


def test_the_bytes_of_a_trace_end_with_its_view() -> None:
    size = 10 * BLOCK + 17
    found = trace.extents(runs((9, 2), (0, 1), (11, 1)), size)
    assert found == [Extent(9 * BLOCK, size), Extent(0, BLOCK)]


def test_spans_come_in_the_order_of_need_and_are_bounded() -> None:
    found = runs((100, 1), (0, 1), (17, 40), (101, 1))
    assert trace.spans(found, 16 * BLOCK, 9) == [6, 0, 1, 2, 3]
    assert trace.spans(found, 16 * BLOCK, 3) == [6, 0, 1]


@pytest.mark.parametrize(
    ("needed", "pace", "expected"),
    [
        ([], SLOW, []),
        (at(5), SLOW, at(5)),
        (at(5, 6), SLOW, at((5, 2))),
        (at(6, 5), SLOW, at((5, 2))),
        (at(900, 5, 6, 500), SLOW, at(900, (5, 2), 500)),
        (at(5, 900, 7), Pace(1.0, 50e6, 4), at((5, 3), 900)),
        (at(5, 900, 7), Pace(0.0001, 1e6, 4), at(5, 900, 7)),
        (at((0, 200)), Pace(0.02, 10e6, 4), at(*((n * 16, 16) for n in range(12)), (192, 8))),
    ],
)
def test_extents_that_lie_close_are_one_request(needed: list[Extent], pace: Pace, expected: list[Extent]) -> None:
    assert trace.requests(needed, pace) == expected


def test_what_is_needed_much_later_does_not_hold_up_what_is_needed_now() -> None:
    pace = Pace(0.02, 50e6, 4)
    now, later = at(*((1000 + 100 * n, 16) for n in range(60))), at(*((1016 + 100 * n, 8) for n in range(60)))
    assert pace.horizon < sum(extent.length for extent in now + later)
    planned = trace.requests(now + later, pace)
    # Adjacent, but no smaller than what a request costs.
    assert planned[: 16 << 20 >> 20] == now[:16]
    # A single block goes along.
    small = at(*(1016 + 100 * n for n in range(60)))
    assert len(trace.requests(now + small, pace)) == len(now)


@pytest.mark.parametrize(("rate", "cost_s"), [(25e6, 0.05), (312e6, 0.02), (50e6, 0.02), (1e9, 0.0005)])
def test_few_requests_for_a_boot_and_not_much_more_than_its_bytes(rate: float, cost_s: float) -> None:
    rng = random.Random(3)
    boot = [
        Extent(n * BLOCK, (n + k) * BLOCK)
        for n, k in ((rng.randrange(2000) * 16, rng.choice((1, 2, 6))) for _ in range(700))
    ]
    needed = list(dict.fromkeys(boot))
    needed = [e for i, e in enumerate(needed) if all(not e.meets(other) for other in needed[:i])]
    pace = Pace(cost_s, rate, 6)
    planned = trace.requests(needed, pace)

    def takes_s(extents: Sequence[Extent]) -> float:
        return max(sum(e.length for e in extents) / rate, len(extents) * cost_s / 6)

    one_by_one, all_of_it = takes_s(needed), takes_s([Extent(0, 2 << 30)])
    assert takes_s(planned) <= min(one_by_one, all_of_it) * 1.02
    assert len(planned) <= len(needed)


extents = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 20)), max_size=40).map(
    lambda pairs: [e for i, e in enumerate(at(*pairs)) if all(not e.meets(other) for other in at(*pairs)[:i])]
)
paces = st.builds(Pace, st.floats(0, 1), st.floats(1e3, 1e10), st.integers(1, 64))


@examples(200)
@given(extents, paces)
def test_requests_bring_all_once_in_the_order_of_need(needed: list[Extent], pace: Pace) -> None:
    planned = trace.requests(needed, pace)
    together = coalesce(planned)
    assert sum(e.length for e in together) == sum(e.length for e in planned), "nothing twice"
    for extent in needed:
        assert any(whole.start <= extent.start and extent.end <= whole.end for whole in together)
    gap = trace.best_gap(sorted(needed), pace)
    for request in planned:
        parts = sorted(e.clamp(request) for e in needed if e.meets(request))
        assert request.length <= pace.request_max
        assert (parts[0].start, max(p.end for p in parts)) == request
        assert all(later.start - earlier.end <= gap for earlier, later in pairwise(parts))
    if sum(e.length for e in needed) <= pace.horizon:
        first_needed = [min(i for i, e in enumerate(needed) if e.meets(request)) for request in planned]
        assert first_needed == sorted(first_needed)
