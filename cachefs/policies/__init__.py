"""What a policy is given, and what it answers: the interface of plug-ins (`docs/precaching.md`). Rule: values
only; a policy asks nothing, fetches nothing and keeps nothing, so it can be tried on paper.

A plug-in is an entry point in `NAMESPACE`: a callable that takes the options of its policy and returns a `Policy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

NAMESPACE = "cachefs.precache.policies"


class Keep(StrEnum):
    """How firmly an image is to be held: fetched whole and given up last, or never given up while this stands."""

    HOLD = "hold"
    PIN = "hold and pin"


@dataclass(frozen=True, slots=True)
class Image:
    """One active image. Sizes in bytes, times in seconds since 1970 (0 for never or unknown); "" where Glance says
    nothing. Of tags and properties, `docs/precaching.md` says which are there."""

    id: str
    name: str
    size: int
    disk_format: str
    owner: str
    visibility: str
    hidden: bool  # Glance's `os_hidden`: superseded, as a rule.
    tags: frozenset[str]
    properties: Mapping[str, str]
    created_s: int
    updated_s: int
    trusted: bool  # Whether name, tags and properties come from somebody whom `trust_properties` trusts.
    priority: str  # critical, normal or low.
    # Here:
    cached: int
    used_s: int
    opens: float  # Of late, in about: an open counts half after a week, a quarter after two.
    leased: bool  # In use, pinned, or a disk's base: it stays anyway.
    pinned: bool  # By a human.
    held: bool  # By a policy.


@dataclass(frozen=True, slots=True)
class Node:
    """This node at one moment. `share_bytes`: what all policies together may hold, by the whole sizes of
    images."""

    images: tuple[Image, ...]
    now_s: float
    share_bytes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """`image` (its id) is to be held, for a `reason` in words. `owners_word`: the reason is something that the
    image's owner chose (its name, its tags, its properties), so it counts only where those are trusted."""

    image: str
    keep: Keep
    reason: str
    owners_word: bool = False


class Policy(Protocol):
    """What a plug-in makes."""

    def decide(self, node: Node) -> Iterable[Decision]:
        """What the node should hold, the most wanted first. Called in a thread, with a time limit."""
        ...


# ── For the policies here ─────────────────────────────────────────────────────────────────────────────

PIN_MARK = "pin:"


def listed(options: Mapping[str, str], name: str) -> list[tuple[str, Keep]]:
    """An option that is a list with commas: each entry, and how firmly (`pin:` before it) it is to be held."""
    entries = [entry.strip() for entry in options.get(name, "").split(",")]
    return [
        (entry.removeprefix(PIN_MARK).strip(), Keep.PIN if entry.startswith(PIN_MARK) else Keep.HOLD)
        for entry in entries
        if entry.removeprefix(PIN_MARK).strip()
    ]
