"""How important each image is, by its id, as far as this node knows the image. Rule: asked by the loops that order
their work, so an answer is found once for what is known of an image, and remembered until that changes.
"""

from __future__ import annotations

from cachefs.catalog import Catalog, Image
from cachefs.plan.eviction import Priority
from cachefs.plan.priorities import Ranking, Rules

_SLACK = 1000


class Ranks:
    """`rules` over what `catalog` knows. What it does not know is normal."""

    def __init__(self, catalog: Catalog, rules: Rules) -> None:
        self._catalog, self.rules = catalog, rules
        self._found: dict[str, tuple[Image, Ranking]] = {}

    def of(self, image: str) -> Priority:
        """By its id."""
        known = self._catalog.known(image)
        if known is None:
            self._found.pop(image, None)
            return Priority.NORMAL
        return self.ranking(known).priority

    def ranking(self, image: Image) -> Ranking:
        """And why."""
        found = self._found.get(image.id)
        if found is None or found[0] is not image:
            if len(self._found) > 2 * len(self._catalog) + _SLACK:
                self._found.clear()  # Most of these images are gone.
            found = self._found[image.id] = image, self.rules.rank(image)
        return found[1]

    def trusts(self, image: Image) -> bool:
        """Whether what its owner wrote of it counts."""
        return self.rules.trusts(image)
