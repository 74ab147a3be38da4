"""How much to ask for: the window of a random miss, and the growing one of sequential reading. Rule: pure; the
link's measures are given, never taken here.

A request costs the same whatever its size (design §4: 15–20 ms of Glance, and the link's round trip), and a
byte costs what the link takes for it. Asking for as many bytes as the link carries in the time of one request
costs at most twice the best choice, whether the neighbours are wanted (the best would have asked for all) or
not (the best would have asked for one block). It costs less in practice: a reader is answered when its own
block is there, and its next request travels while the rest of the window arrives.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cachefs.plan.extents import BLOCK, Extent, ceil

RANDOM_MIN, RANDOM_MAX = BLOCK, 4 << 20
# Windows begin at the miss and end at what is there already, so many are cut short; and their tails travel
# while the reader works. With half as much again the worst case, sparse or dense, is best (the benchmark
# `random-cold` shows both).
EQUAL_COSTS = 1.5
# Before anything is measured: what a request of 20 ms and a link of 50 MB/s would give.
RANDOM_FIRST = 1 << 20
SEQUENTIAL_MAX = 32 << 20  # With the next one on its way, what is fetched ahead still fits into memory.
# A random miss in the middle of somebody's window waits for the half before it: no window lasts longer than this.
SEQUENTIAL_S = 0.5
# The kernel reads ahead with several requests at once, which may reach us in another order.
REORDER = 1 << 20

# A shorter body arrives in one burst and says nothing of the rate.
_RATE_BYTES_MIN = 256 << 10
# And so may a longer one, of bytes that waited in the kernel while Python was busy (seen: 15 times what the link
# carried). So the last bodies count together, each for as long as it took.
_BODIES_KEPT, _RATE_S_MIN = 8, 0.003
# The tail of the last window delays the next first byte, so most measures of the cost are too high, and a larger
# window would make them higher still: the least of the last ones is believed.
_COSTS_KEPT = 16


@dataclass
class Link:
    """What a request costs (seconds until its first byte) and what the link carries (bytes per second)."""

    cost_s: float = 0.0
    rate: float = 0.0
    _bodies: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_BODIES_KEPT), repr=False)
    _costs_s: deque[float] = field(default_factory=lambda: deque(maxlen=_COSTS_KEPT), repr=False)

    def observe(self, first_byte_s: float, length: int, body_s: float) -> None:
        """Learns from one request: its first byte came after `first_byte_s`, and the whole link carried
        `length` bytes in the `body_s` from there to its last."""
        self._costs_s.append(first_byte_s)
        self.cost_s = min(self._costs_s)
        if length < _RATE_BYTES_MIN or body_s <= 0:
            return
        self._bodies.append((length, body_s))
        took_s = sum(body_s for _, body_s in self._bodies)
        if took_s >= _RATE_S_MIN:
            self.rate = sum(length for length, _ in self._bodies) / took_s

    @property
    def random_window(self) -> int:
        """The equal-cost window: bytes, whole blocks, within RANDOM_MIN and RANDOM_MAX."""
        if not self.rate:
            return RANDOM_FIRST
        return min(max(ceil(int(EQUAL_COSTS * self.cost_s * self.rate), BLOCK), RANDOM_MIN), RANDOM_MAX)


NEVER, NOWHERE = 1 << 62, -(1 << 62)


@dataclass
class Pattern:
    """How one open file is being read. What was asked for it ends at `expected`, where a sequential reader will
    miss next, and began at `since`; reading at `mark` or beyond is the moment to read ahead; `window` is the last
    one's size. All in bytes."""

    expected: int = NOWHERE
    since: int = NOWHERE
    window: int = 0
    mark: int = NEVER

    def is_next(self, offset: int) -> bool:
        """Whether a miss at `offset` goes on where the last window ended."""
        return self.expected - REORDER <= offset <= self.expected + REORDER

    def covers(self, offset: int) -> bool:
        """Whether the byte at `offset` was asked for already."""
        return self.since <= offset < self.expected

    def follow(self, extent: Extent, sequential: bool) -> None:
        """The reader's next bytes are on their way as `extent`, which it may share with others. Asking again
        from the middle keeps the link busy while the reader works."""
        self.window = max(extent.length, self.window) if sequential else extent.length
        self.since = self.since if sequential and self.covers(extent.start - 1) else extent.start
        self.expected = extent.end
        self.mark = extent.end - extent.length // 2 if sequential else NEVER


def window(link: Link, pattern: Pattern, offset: int) -> tuple[int, bool]:
    """(bytes to ask for from `offset`, whether this is sequential reading)."""
    if not pattern.is_next(offset):
        return link.random_window, False
    longest = SEQUENTIAL_MAX
    if link.rate:
        longest = min(max(ceil(int(link.rate * SEQUENTIAL_S), BLOCK), RANDOM_MAX), SEQUENTIAL_MAX)
    return min(max(2 * pattern.window, link.random_window), longest), True


def request(miss: Extent, absent: list[Extent], want: int) -> Extent | None:
    """The range to ask for: it begins where `miss` does, so that the reader's own block comes first, is at
    least `miss` long, and goes on for `want` bytes, but not past the first byte that is not `absent`. None when
    the first byte of `miss` is not: it is here, or on its way."""
    for gap in absent:
        if gap.start <= miss.start < gap.end:
            return Extent(miss.start, min(max(miss.start + want, miss.end), gap.end))
    return None
