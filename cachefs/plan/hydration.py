"""Whose next piece is fetched in the background, and for which images there is no room. Rule: pure; it orders what
it is given, and fetches nothing.

What guests boot from comes before everything else, of all images: little, and what their next guests wait for.
Then whole images: those for which there is room before those that would only take room from others, the important
before the less so, and among equals the one that was opened last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A view of which something is to be fetched. `priority`: lower first. `since_s`: when somebody last opened
    it. `boots`: what guests boot from is not all here."""

    number: int
    priority: int
    since_s: float
    boots: bool = False
    fits: bool = True


def first(candidates: Iterable[Candidate]) -> Candidate | None:
    return min(candidates, key=_rank, default=None)


def _rank(candidate: Candidate) -> tuple[bool, bool, int, float, int]:
    return not candidate.boots, not candidate.fits, candidate.priority, -candidate.since_s, candidate.number


class Claim(NamedTuple):
    """What one leased view has of the store and wants of it, in bytes of the view. `missing` is 0 for what is not
    to be fetched."""

    number: int
    image: str
    cached: int
    missing: int
    priority: int
    since_s: float


def without_room(claims: Sequence[Claim], limit: int, density: float) -> dict[int, str]:
    """The views that a store of `limit` bytes cannot hold whole beside what else is leased, with the reason.
    `density`: bytes that the store occupies for one of a view, by what it has; nobody knows how dense what comes
    will be, so that counts whole."""
    held = sum(claim.cached for claim in claims) * density
    reasons: dict[int, str] = {}
    for claim in sorted(claims, key=lambda claim: (claim.priority, -claim.since_s, claim.number)):
        if not claim.missing:
            continue
        if claim.cached * density + claim.missing > limit:
            reasons[claim.number] = (
                f"its {claim.missing} bytes that are not here are more than the store may hold ({limit})"
            )
        elif held + claim.missing > limit:
            reasons[claim.number] = (
                f"its {claim.missing} bytes that are not here do not fit into the store ({limit}) beside what "
                "else is leased"
            )
        else:
            held += claim.missing
    return reasons
