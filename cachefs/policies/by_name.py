"""`name`: images whose names are like one of some patterns. Rule: a name is its owner's word, and is answered as
such.

Option `patterns`: shell patterns with commas, in order of preference; `pin:` before one pins what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from cachefs.policies import Decision, Node, listed


class ByName:
    """The first pattern that fits decides."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._patterns = listed(options, "patterns")
        if not self._patterns:
            raise ValueError("it has no patterns")

    def decide(self, node: Node) -> Iterator[Decision]:
        found: set[str] = set()
        for pattern, keep in self._patterns:
            for image in node.images:
                if image.name and image.id not in found and fnmatchcase(image.name, pattern):
                    found.add(image.id)
                    yield Decision(image.id, keep, f"its name is like {pattern}", owners_word=True)
