"""`static`: the images of a list. Rule: what is listed and is not there is answered too, so that somebody notices.

Option `images`: ids or names with commas; `pin:` before one pins it. An id is the operator's word, a name that of
whoever owns the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cachefs.policies import Decision, Node, listed


class Static:
    """In the order of the list."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._wanted = listed(options, "images")
        if not self._wanted:
            raise ValueError("it has no images")

    def decide(self, node: Node) -> Iterator[Decision]:
        ids = {image.id for image in node.images}
        by_name: dict[str, list[str]] = {}
        for image in node.images:
            by_name.setdefault(image.name, []).append(image.id)
        for wanted, keep in self._wanted:
            if wanted.lower() in ids or wanted not in by_name:
                yield Decision(wanted.lower() if wanted.lower() in ids else wanted, keep, "listed")
                continue
            for image_id in by_name[wanted]:
                yield Decision(image_id, keep, f"listed as {wanted}", owners_word=True)
