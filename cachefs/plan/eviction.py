"""Which spans go first when room is needed, and how much room that is. Rule: pure; nothing here knows how a span
is dropped, nor asks whether it still is as it was said to be.

A span stands in one of four classes, and everything of a class goes before anything of the next:

    0 ENDED  its image is gone from Glance for good: nobody will open it again
    1 ONCE   it came, and was not used again: where whole-image reads (hydration, `qemu-img convert`, a backup)
             leave what they pass over, so that they flush each other and not what guests live on
    2 TWICE  it was used again a minute or more after it came: somebody comes back to it
    3 BOOT   it holds blocks of its image's boot trace: the next guest of that image will wait for just these bytes

Spans of an image that a policy holds (see `plan.holding`) go after everything that is not held, in the same order
among themselves. Within a class the image's priority decides, low before normal before critical, and then the last
use, coldest first. So priority never lifts what was passed over once above what guests boot from, and among equals
an operator's word counts for more than the clock. Spans of leased views are in no class: they are never named.
Size does not change the order (spans are of one size but for the last of a view): it tells the one who evicts how
many to take at a time. What a span really frees is known only afterwards, because its chunks may be shared.

A rank is one integer, held, class and priority above the last use above the span's place, so that a store of 1 TiB
(262,144 spans) is ranked in an array of 2 MiB; only as many ranks as are asked for become objects.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from heapq import nsmallest
from itertools import count
from typing import NamedTuple, Protocol

from cachefs.store.format import USES_SPANS, SpanNo, UseFlag, ViewNo


class Priority(IntEnum):
    """What an operator says of an image: which goes first among equals."""

    LOW = 0
    NORMAL = 1
    CRITICAL = 2


class Standing(IntEnum):
    """The classes of the module's docstring, in the order in which they go."""

    ENDED = 0
    ONCE = 1
    TWICE = 2
    BOOT = 3


class Group(NamedTuple):
    """`USES_SPANS` neighbouring spans of a view from `first`: when each was last used (seconds since 1970, 0 when
    it is not here) and its `UseFlag`s. Both are changed in place by whoever keeps them."""

    first: int
    last_s: array[int]
    flags: bytearray

    @classmethod
    def empty(cls, first: int) -> Group:
        return cls(first, array("I", bytes(4 * USES_SPANS)), bytearray(USES_SPANS))


@dataclass(frozen=True, slots=True)
class ViewUse:
    """What is known of one view's spans. Those that have no group are not here."""

    view: ViewNo
    groups: Sequence[Group]
    ended: bool = False
    leased: bool = False
    priority: Priority = Priority.NORMAL
    held: bool = False


class Victim(NamedTuple):
    """A span to drop. Whoever does so later looks whether it was used meanwhile: `last_s` is what it was."""

    view: ViewNo
    span: SpanNo
    last_s: int
    standing: Standing
    held: bool = False


_KNOWN_FLAGS = int(UseFlag.TWICE | UseFlag.BOOT)  # As a number: an enum's arithmetic takes ten times as long.
_PLACE_BITS, _LAST_BITS, _PRIORITY_BITS, _STANDING_BITS = 27, 32, 2, 2
_HEAD_BITS = _PLACE_BITS + _LAST_BITS
_PLACE_MASK, _LAST_MASK = (1 << _PLACE_BITS) - 1, (1 << _LAST_BITS) - 1


def standing(flags: int, ended: bool) -> Standing:
    if ended:
        return Standing.ENDED
    if flags & UseFlag.BOOT:
        return Standing.BOOT
    return Standing.TWICE if flags & UseFlag.TWICE else Standing.ONCE


def victims(views: Iterable[ViewUse], most: int) -> list[Victim]:
    """The first `most` spans that should go, in order. Takes about 0.1 s for 262,144: not for the loop."""
    ranks = array("Q")
    places: list[tuple[ViewNo, int]] = []
    for view in views:
        if view.leased:
            continue
        heads = _heads(view)
        for group in view.groups:
            place = len(places) * USES_SPANS
            if place + USES_SPANS > _PLACE_MASK:
                break  # Half a million groups: there are victims enough among these.
            if not any(group.last_s):
                continue
            places.append((view.view, group.first))
            ranks.extend(
                [
                    heads[flags & _KNOWN_FLAGS] | last_s << _PLACE_BITS | at
                    for at, last_s, flags in zip(count(place), group.last_s, group.flags, strict=False)
                    if last_s
                ]
            )
    return [_victim(rank, places) for rank in nsmallest(most, ranks)]


def _heads(view: ViewUse) -> list[int]:
    """The upper bits of the ranks of a view's spans, by their flags."""
    held = (view.held and not view.ended) << _STANDING_BITS
    return [
        ((held | standing(flags, view.ended)) << _PRIORITY_BITS | view.priority) << _HEAD_BITS
        for flags in range(_KNOWN_FLAGS + 1)
    ]


def _victim(rank: int, places: Sequence[tuple[ViewNo, int]]) -> Victim:
    group, within = divmod(rank & _PLACE_MASK, USES_SPANS)
    view, first = places[group]
    last_s = rank >> _PLACE_BITS & _LAST_MASK
    held, standing_ = divmod(rank >> _HEAD_BITS + _PRIORITY_BITS, 1 << _STANDING_BITS)
    return Victim(view, SpanNo(first + within), last_s, Standing(standing_), bool(held))


# ── How much ──────────────────────────────────────────────────────────────────────────────────────────


class Space(Protocol):
    """What a store uses and may use at this moment, in bytes, by the filesystem's word."""

    @property
    def used(self) -> int: ...

    @property
    def limit(self) -> int: ...


# A landing that found the store full makes room for those behind it, too: that much more than it needs, or this
# share of a small store.
SLACK_BYTES = 64 << 20
_SLACK_SHARE = 32


def goal(space: Space, high: float, low: float, *, origin_is_well: bool = True) -> int:
    """Bytes to free in the background: down to `low` of the limit once `high` of it is passed, 0 below.
    What cannot be fetched again is not given away for a watermark: while the origin is away only what is over
    the limit itself goes. Freeing does not move the limit (what was used is free then), others who fill the
    filesystem do."""
    if not origin_is_well:
        return over(space)
    return space.used - int(low * space.limit) if space.used > high * space.limit else 0


def over(space: Space) -> int:
    """Bytes by which the limit itself is passed: others took the space, or `max_size` was lowered."""
    return max(0, space.used - space.limit)


def room(space: Space, wanted: int) -> int:
    """Bytes to free for a landing that met the limit and wants `wanted`, whatever the watermarks say. Never 0:
    the one who was refused knows better than a measure taken later."""
    return over(space) + wanted + min(SLACK_BYTES, space.limit // _SLACK_SHARE)
