"""Boot traces: how first touches become one, what two recordings come to, and in which requests one is fetched.
Rule: pure; a trace says what was read first of some bytes, never of whom, nor where they are kept.

A trace is a list of runs of blocks (64 KiB) in the order of need: each block is in it once, and the times never
fall. A recording that touched at least half as much as what is known is believed: its order counts, and what only
earlier ones touched follows, until AGE_MAX recordings in a row have done without it. One that touched less
(somebody looked at the header) only adds what is new, at the end.

Who reads on and on (`dd`, `qemu-img convert`, a backup) boots nothing: see `is_scan`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from uuid import UUID

from cachefs.plan.extents import BLOCK, Extent, ceil
from cachefs.store.format import SpanNo, TraceRecord, TraceRun, ViewKind

# A boot that reads many files touches 300 MiB in blocks (design §4), in some thousand runs.
BLOCKS_MAX = 16384
RUNS_MAX = 8192
RUN_BLOCKS_MAX = AT_MAX = (1 << 16) - 1
BLOCK_NO_MAX = (1 << 32) - 1
AGE_MAX = 3
# Blocks that follow each other within a second (in tenths) are one run.
RUN_AT_MAX = 10

# Views that have a boot; a resized view has that of the disk under it.
KINDS = (ViewKind.ORIGINAL, ViewKind.RAW)


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────

_HASH = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}:(?:[0-9a-f]{2}){16,128}")
_BY_ID = "image:"


def content_names(image: str, algorithm: str | None, value: str | None) -> tuple[str, ...]:
    """What the bytes of an image are called in traces, the best name first: by Glance's hash, so that whoever has
    the same bytes has the same trace, and by the image's id, as they are called until the hash is known."""
    by_hash = f"{algorithm}:{value}".lower()
    by_id = _BY_ID + image
    return (by_hash, by_id) if algorithm and value and is_content(by_hash) else (by_id,)


def is_content(name: str) -> bool:
    """Whether it is such a name."""
    if not name.startswith(_BY_ID):
        return _HASH.fullmatch(name) is not None
    try:
        return str(UUID(name.removeprefix(_BY_ID))) == name.removeprefix(_BY_ID)
    except ValueError:
        return False


# ── Recordings ────────────────────────────────────────────────────────────────────────────────────────

# So much, read in order by one reader, and most of what lies between its first and its last byte.
SCAN_BLOCKS = 1024
_SCAN_REORDER = 256  # qemu-img convert reads with 8 requests of 2 MiB at once.
_SCAN_IN_ORDER, _SCAN_DENSITY = 0.9, 0.5


def is_scan(blocks: Sequence[int]) -> bool:
    """Whether these blocks, in the order in which they were first touched, are those of somebody who reads all
    there is. Small images may well be read whole by a boot."""
    if len(blocks) < SCAN_BLOCKS:
        return False
    if len(blocks) < _SCAN_DENSITY * (max(blocks) - min(blocks) + 1):
        return False
    in_order, front = 0, blocks[0]
    for block in blocks:
        in_order += front - _SCAN_REORDER <= block <= front + _SCAN_REORDER
        front = max(front, block)
    return in_order >= _SCAN_IN_ORDER * len(blocks)


def recorded(readers: Iterable[Mapping[int, int]]) -> tuple[TraceRun, ...]:
    """What several readers touched first: each a mapping of blocks, in the order of their touches, to tenths of a
    second. Empty where that is no boot."""
    first: dict[int, int] = {}
    touches = ((at, block) for reader in readers for block, at in reader.items())
    for at, block in sorted(touches, key=itemgetter(0)):
        first.setdefault(block, at)
    return () if is_scan(list(first)) else _bounded(_runs((block, at, 0) for block, at in first.items()))


def merged(known: Sequence[TraceRun], new: Sequence[TraceRun]) -> tuple[TraceRun, ...]:
    """What is known after one more recording; see the module."""
    there, came = set(blocks_of(known)), set(blocks_of(new))
    if 2 * len(came) < len(there):
        return _bounded(_runs([*_touches(known), *(t for t in _touches(new) if t[0] not in there)]))
    older = ((block, at, age + 1) for block, at, age in _touches(known) if block not in came and age < AGE_MAX)
    return _bounded(_runs([*_touches(new), *older]))


def _touches(runs: Iterable[TraceRun]) -> Iterator[tuple[int, int, int]]:
    """(block, at, age) of each block."""
    return ((block, at, age) for first, n, at, age in runs for block in range(first, first + n))


def _runs(touches: Iterable[tuple[int, int, int]]) -> Iterator[TraceRun]:
    """The times of what follows are those of what comes before it, if they were less."""
    run: TraceRun | None = None
    for block, at, age in touches:
        at = min(max(at, run.at if run is not None else 0), AT_MAX)
        if (
            run is not None
            and block == run.first + run.blocks
            and at <= run.at + RUN_AT_MAX
            and age == run.age
            and run.blocks < RUN_BLOCKS_MAX
        ):
            run = run._replace(blocks=run.blocks + 1)
            continue
        if run is not None:
            yield run
        run = TraceRun(block, 1, at, age)
    if run is not None:
        yield run


def _bounded(runs: Iterable[TraceRun]) -> tuple[TraceRun, ...]:
    """The first of them, as far as a trace may go."""
    kept: list[TraceRun] = []
    left = BLOCKS_MAX
    for run in runs:
        if not left or len(kept) == RUNS_MAX or run.first + run.blocks > BLOCK_NO_MAX:
            break
        kept.append(run._replace(blocks=min(run.blocks, left)))
        left -= kept[-1].blocks
    return tuple(kept)


def blocks_of(runs: Iterable[TraceRun]) -> Iterator[int]:
    """Each block, in the order of need."""
    return (block for run in runs for block in range(run.first, run.first + run.blocks))


def fault(record: TraceRecord) -> str | None:
    """Why nobody could have recorded this trace; None where somebody could."""
    if not 0 < record.size < 1 << 63:
        return "the size of its image cannot be"
    if not all(0 <= moment_s < 1e12 for moment_s in (record.recorded_s, record.used_s)):
        return "its times cannot be"
    if not 0 < len(record.runs) <= RUNS_MAX:
        return f"it has {len(record.runs)} runs, and may have from 1 to {RUNS_MAX}"
    end = ceil(record.size, BLOCK) // BLOCK
    before = 0
    for run in record.runs:
        is_inside = 0 <= run.first < run.first + run.blocks <= min(end, BLOCK_NO_MAX)
        if not is_inside or run.blocks > RUN_BLOCKS_MAX:
            return f"a run of {run.blocks} blocks from block {run.first} on does not lie in its image"
        if not before <= run.at <= AT_MAX or not 0 <= run.age <= AGE_MAX:
            return "its runs are not in the order of their times"
        before = run.at
    if sum(run.blocks for run in record.runs) > BLOCKS_MAX:
        return f"it has more than {BLOCKS_MAX} blocks"
    places = sorted((run.first, run.first + run.blocks) for run in record.runs)
    if any(end > start for (_, end), (start, _) in pairwise(places)):
        return "a block is in it twice"
    return None


# ── Replays ───────────────────────────────────────────────────────────────────────────────────────────


def extents(runs: Iterable[TraceRun], size: int) -> list[Extent]:
    """The bytes of each run, in the order of need, as far as a view of `size` bytes has them."""
    found = (Extent(run.first * BLOCK, min((run.first + run.blocks) * BLOCK, size)) for run in runs)
    return [extent for extent in found if extent.start < extent.end]


def spans(runs: Iterable[TraceRun], span_size: int, most: int) -> list[SpanNo]:
    """The first `most` spans that hold blocks of the trace, in the order of need."""
    per_span = span_size // BLOCK
    found: dict[SpanNo, None] = {}
    for run in runs:
        for span in range(run.first // per_span, (run.first + run.blocks - 1) // per_span + 1):
            found[SpanNo(span)] = None
        if len(found) >= most:
            break
    return list(found)[:most]


@dataclass(frozen=True, slots=True)
class Pace:
    """What a request costs (seconds), how many travel side by side, and what the link carries (bytes of the view
    per second)."""

    cost_s: float
    rate: float
    at_once: int

    def is_like(self, other: Pace) -> bool:
        """Whether what was planned for one will do for the other."""
        return self.rate <= _ALIKE * other.rate and other.rate <= _ALIKE * self.rate

    @property
    def cost_bytes(self) -> float:
        """What the link carries in the time that one request more takes."""
        return self.cost_s * self.rate / self.at_once

    @property
    def request_max(self) -> int:
        """Bytes of one request: a guest may come to wait for its last block."""
        return min(max(ceil(int(self.rate * _REQUEST_S), BLOCK), _REQUEST_MIN), _REQUEST_MAX)

    @property
    def horizon(self) -> int:
        """Bytes that are fetched before others that are needed after them, wherever they lie."""
        return min(max(int(self.rate), _HORIZON_MIN), _HORIZON_MAX)


_ALIKE = 1.5
_REQUEST_S, _REQUEST_MIN, _REQUEST_MAX = 0.1, 512 << 10, 4 << 20
_HORIZON_MIN, _HORIZON_MAX = 16 << 20, 256 << 20
# Before anything is measured: as `plan.windows` takes it to be.
UNMEASURED = Pace(0.02, 50e6, 4)
_GAPS = tuple(n * BLOCK for n in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64))


def requests(needed: Iterable[Extent], pace: Pace) -> list[Extent]:
    """What to ask for so that all of `needed` comes, in the order in which it is given: extents that lie close
    together are one request where the gap costs less than another. A request comes when the first of its parts is
    needed; what is needed much later goes along only where it costs less than a request of its own."""
    cut = [part for extent in needed for part in _cut(extent, pace.request_max)]
    by_place = sorted(range(len(cut)), key=cut.__getitem__)
    gap = best_gap([cut[i] for i in by_place], pace)
    request_max, cost_bytes = pace.request_max, pace.cost_bytes
    planned: list[Extent] = []
    taken = bytearray(len(cut))
    for upto in _horizons(cut, pace.horizon):
        group_start = group_end = 0
        found: list[tuple[int, Extent]] = []  # Each with the number of its part that comes first.
        for i in by_place:
            if taken[i]:
                continue
            start, end = cut[i]
            is_near = found and start <= group_end + gap and end <= group_start + request_max
            if is_near and (i < upto or end - start <= cost_bytes):
                found[-1] = (min(found[-1][0], i), Extent(group_start, end))
            elif i < upto:
                found.append((i, cut[i]))
                group_start = start
            else:
                continue
            group_end = end
            taken[i] = 1
        planned.extend(extent for _, extent in sorted(found))
    return planned


def _cut(extent: Extent, most: int) -> Iterator[Extent]:
    for start in range(extent.start, extent.end, most):
        yield Extent(start, min(start + most, extent.end))


def _horizons(needed: Sequence[Extent], horizon: int) -> Iterator[int]:
    """Up to which number they are needed soon, again and again, until all are."""
    total = 0
    for i, extent in enumerate(needed):
        if total and total + extent.length > horizon:
            yield i
            total = 0
        total += extent.length
    yield len(needed)


def best_gap(by_place: Sequence[Extent], pace: Pace) -> int:
    """Bytes that two extents may lie apart to be one request, so that all of them are here soonest: bytes and
    requests travel side by side, and the slower of the two counts."""

    request_max = pace.request_max

    def takes_s(gap: int) -> float:
        total = count = end = 0
        until = -1  # Where the request that is being put together must end.
        for first, last in by_place:
            if first <= end + gap and last <= until:
                total += last - end
            else:
                count += 1
                total += last - first
                until = first + request_max
            end = last
        return max(total / pace.rate, count * pace.cost_s / pace.at_once)

    return min(_GAPS, key=takes_s)
