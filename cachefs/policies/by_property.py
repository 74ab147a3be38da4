"""`property`: images whose metadata asks for it, by the property or the tag `cachefs_precache`. Rule: what it says
is the image's owner's word, and is answered as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cachefs.policies import Decision, Keep, Node

NAME = "cachefs_precache"
YES = ("true", "yes", "on", "1", "hold")


class ByProperty:
    """`cachefs_precache=true` holds, `=pin` holds and pins, anything else does not, whatever the tags say."""

    def __init__(self, options: Mapping[str, str]) -> None:
        pass

    def decide(self, node: Node) -> Iterator[Decision]:
        for image in node.images:
            said = image.properties.get(NAME)
            if said is None:
                if NAME in image.tags:
                    yield Decision(image.id, Keep.HOLD, f"tag {NAME}", owners_word=True)
                continue
            word = said.strip().lower()
            if word in YES or word == "pin":
                keep = Keep.PIN if word == "pin" else Keep.HOLD
                yield Decision(image.id, keep, f"property {NAME}={word}", owners_word=True)
