"""`newest`: the newest image of each family. Rule: only trusted images have a say, or anybody could put one of
their own in the place of a family's newest.

A family is one `os_distro` on one `architecture`; or, with option `pattern`, what this regular expression finds in
the name: its group `family`, or its first group, or all of it. Hidden images are of none. Option `count`: how many
of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from cachefs.policies import Decision, Image, Keep, Node


class Newest:
    """The `count` newest of each family by `created_s`, families in alphabetical order."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._count = int(options.get("count", "1"))
        pattern = options.get("pattern", "")
        try:
            self._pattern = re.compile(pattern) if pattern else None
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None

    def decide(self, node: Node) -> Iterator[Decision]:
        families: dict[str, list[Image]] = {}
        for image in node.images:
            family = self._family(image) if image.trusted and not image.hidden else None
            if family:
                families.setdefault(family, []).append(image)
        for family, images in sorted(families.items()):
            images.sort(key=lambda image: (-image.created_s, image.id))
            for image in images[: self._count]:
                yield Decision(image.id, Keep.HOLD, f"the newest of {family}", owners_word=True)

    def _family(self, image: Image) -> str | None:
        if self._pattern is None:
            distro = image.properties.get("os_distro", "").strip().lower()
            return f"{distro} {image.properties.get('architecture', '').strip()}".strip() if distro else None
        found = self._pattern.search(image.name)
        if found is None:
            return None
        return found.groupdict().get("family") or (found.group(1) if found.re.groups else found.group())
