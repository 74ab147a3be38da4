"""How large the store may grow, and whether more may be added now. Rule: what is used and what is free is told by
whoever can count it; nothing here asks the filesystem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# What is kept free on the filesystem for the index, so that a full store can still write down what it evicts.
INDEX_RESERVE = 4 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """How large the store may grow, in bytes: `max_size` of segments and index, `min_free` left on the
    filesystem."""

    max_size: int
    min_free: int


@dataclass(frozen=True, slots=True)
class Usage:
    """In bytes: what the store occupies by the filesystem's own count (`used`, with what is removed and not back
    yet), what the filesystem has left (`free`), and the limits."""

    used: int
    free: int
    max_size: int
    min_free: int

    @property
    def limit(self) -> int:
        """What the store may hold, as full as the filesystem is now."""
        return max(0, min(self.max_size, self.used + self.free - self.min_free))

    @property
    def left(self) -> int:
        """What may be added; negative where the limit is passed."""
        return min(self.max_size - self.used, self.free - self.min_free)


class Room:
    """Whether bytes may be added: judged by real blocks and `statvfs`, asked anew for every 64 MiB, and more often
    where little is left."""

    _ASK_EVERY = 64 << 20

    def __init__(self, usage: Callable[[], Usage]) -> None:
        self._usage = usage
        self._left = self._unasked = 0

    def __call__(self, wanted: int) -> bool:
        """Takes `wanted` bytes of what is left; False, and nothing taken, when that is too much."""
        if wanted > min(self._left, self._unasked):
            usage = self._usage()
            self._left = min(usage.left, usage.free - usage.min_free - INDEX_RESERVE)
            self._unasked = max(min(self._ASK_EVERY, self._left // 8), wanted)
        if wanted > self._left:
            return False
        self._left -= wanted
        self._unasked -= wanted
        return True
