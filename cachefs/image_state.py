"""How much of an image is here, in one word. Rule: says what is known, and asks nobody."""

from __future__ import annotations

from cachefs.catalog import GONE, Image
from cachefs.store.format import ViewKind
from cachefs.store.view import StoredView


def state_of(stored: StoredView | None, image: Image) -> str:
    """`absent`, `partial`, `complete`, `verified`, `condemned` or `gone`."""
    if image.condemned is not None:
        return "condemned"
    if image.status == GONE:
        return GONE
    if stored is not None and stored.complete and _is_verified(stored, image):
        return "verified"
    if image.size == 0 or (stored is not None and stored.complete):
        return "complete"
    return "partial" if stored is not None and stored.cached else "absent"


def _is_verified(stored: StoredView, image: Image) -> bool:
    if stored.record.kind is ViewKind.ORIGINAL:
        return image.verified
    return stored.record.kind is ViewKind.RAW and image.disk is not None and image.disk.verified
