"""`most-used`: what this node opens most. Rule: it goes by what was done here, never by what an image says of
itself.

Option `count`: how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cachefs.policies import Decision, Keep, Node

OPENS_MIN = 0.5  # Opened once, and that a week ago: no sign of use any more.


class MostUsed:
    """The `count` most used, the most used first."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._count = int(options.get("count", "5"))

    def decide(self, node: Node) -> Iterator[Decision]:
        used = sorted((image for image in node.images if image.opens >= OPENS_MIN), key=lambda i: (-i.opens, i.id))
        for place, image in enumerate(used[: self._count], 1):
            yield Decision(image.id, Keep.HOLD, f"number {place} of the most used here: {image.opens:.1f} opens")
