"""Which of the images that policies want a node may hold. Rule: pure; what is refused is refused in words, and
nothing of what is decided here costs an image that is leased its place.

Policies answer with decisions; each image becomes one row, as firm as the firmest of them. Rows are fitted in one
after the other: critical before normal before low, pinned before held, then in the order in which the policies are
configured and answered. An image counts by its whole size, whatever is here of it: that is what it grows to. Three
bounds hold:

    share   all that is held, of what the store may hold
    room    what is held and not leased, beside all that is leased
    pins    what policies pin beside what people have pinned; what is beyond that is held without a pin

What was held and is not listed by Glance any more, though nobody said that it is gone, is held on for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cachefs.policies import Decision, Image, Keep

_PRIORITIES = {"critical": 0, "normal": 1, "low": 2}
UNTRUSTED = "its owner's word is not trusted ([priorities] trust_properties)"


class Bounds(NamedTuple):
    """In bytes. `full`: why nothing can be fetched now, if so."""

    share: int
    room: int
    pins: int
    full: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What is decided of one image. `policies` want it, the one whose `reason` it is first. `size` in bytes, and
    `cost`, what is to be fetched. `refused`: why it is not held. `note`: what else is to be known."""

    image: str
    name: str
    keep: Keep
    policies: tuple[str, ...]
    reason: str
    size: int = 0
    cost: int = 0
    refused: str | None = None
    note: str | None = None


Said = Sequence[tuple[str, Sequence[Decision]]]
"""What each policy decided, in the order of the configuration."""


def plan(said: Said, images: Mapping[str, Image], unlisted: Iterable[Row], bounds: Bounds) -> list[Row]:
    """A row for each image that a policy names, in the order in which they were fitted in. `images` are all that
    may be held; `unlisted` are rows that stand on."""
    rows = [_row(image, wanted, images.get(image)) for image, wanted in _by_image(said).items()]
    stay = [row for row in unlisted if row.image not in images]
    named = {row.image for row in stay}
    rows = stay + sorted((row for row in rows if row.image not in named), key=lambda row: _order(row, images))
    left = bounds
    fitted = []
    for row in rows:
        row, left = _fit(row, images.get(row.image), left)
        fitted.append(row)
    return fitted


def _by_image(said: Said) -> dict[str, list[tuple[str, Decision]]]:
    wanted: dict[str, list[tuple[str, Decision]]] = {}
    for policy, decisions in said:
        for decision in decisions:
            wanted.setdefault(decision.image, []).append((policy, decision))
    return wanted


def _row(image_id: str, wanted: list[tuple[str, Decision]], image: Image | None) -> Row:
    """The firmest of those that count; of equals, the first."""
    counted = [w for w in wanted if image is not None and (image.trusted or not w[1].owners_word)]
    chosen = counted or wanted
    policy, decision = max(chosen, key=lambda w: w[1].keep is Keep.PIN)
    policies = tuple(dict.fromkeys([policy, *(name for name, _ in chosen)]))
    row = Row(image_id, "", decision.keep, policies, decision.reason)
    if image is None:
        return replace(row, refused="Glance lists no such active image")
    row = replace(row, name=image.name, size=image.size, cost=max(image.size - image.cached, 0))
    return row if counted else replace(row, refused=UNTRUSTED)


def _order(row: Row, images: Mapping[str, Image]) -> tuple[int, bool]:
    image = images.get(row.image)
    priority = _PRIORITIES[image.priority] if image is not None else len(_PRIORITIES)
    return priority, row.keep is not Keep.PIN


def _fit(row: Row, image: Image | None, left: Bounds) -> tuple[Row, Bounds]:
    """The row, refused where it does not fit into what is `left`, and what is left then."""
    if row.refused is not None:
        return row, left
    needs_room = 0 if image is not None and image.leased else row.size
    refused = None
    if row.size > left.share:
        refused = f"{_size(row.size)} do not fit into the {_size(left.share)} left of [precache] share"
    elif needs_room > left.room:
        refused = f"{_size(row.size)} do not fit into the {_size(left.room)} that leased and held images leave"
    elif row.cost and left.full is not None:
        refused = f"the store is full: {left.full}"
    if refused is not None:
        return replace(row, refused=refused), left
    left = left._replace(share=left.share - row.size, room=left.room - needs_room)
    if row.keep is Keep.PIN and not (image is not None and image.pinned):
        if row.size > left.pins:
            note = f"not pinned: only {_size(left.pins)} are left of [store] pin_share"
            return replace(row, keep=Keep.HOLD, note=note), left
        left = left._replace(pins=left.pins - row.size)
    return row, left


def _size(n: int) -> str:
    """Bytes for people."""
    value = float(max(n, 0))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
