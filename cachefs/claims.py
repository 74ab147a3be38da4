"""Who needs an image on this node, whatever Glance says of it. Rule: nothing is decided here; `catalog` asks, and
decides what may be opened.
"""

from __future__ import annotations

from cachefs.leases import Leases, Reason
from cachefs.store.content import Store
from cachefs.store.format import ViewKind
from cachefs.store.view import StoredView


class ByLeases:
    """Claims by leases (see `catalog.Claims`). Cheap: it asks dicts in memory."""

    def __init__(self, leases: Leases, store: Store) -> None:
        self._leases, self._store = leases, store

    def leased(self, image: str) -> bool:
        """Whether anything leases it, or that is not known yet."""
        if not self._leases.ready.is_set() or self._leases.keeps(image):
            return True
        return any(self._leases.is_leased(view) for view in self._views(image))

    def keeps(self, image: str) -> bool:
        """Whether a pin, a touch or an instance disk does."""
        return self._leases.keeps(image)

    def started(self, image: str) -> bool:
        """Whether an instance's disk names it, and what that is read from is all here."""
        return any(
            view.complete and any(lease.reason is Reason.DISK for lease in self._leases.of(view))
            for view in self._views(image)
        )

    def _views(self, image: str) -> list[StoredView]:
        both = (self._store.known_view(image, kind) for kind in (ViewKind.ORIGINAL, ViewKind.RAW))
        return [view for view in both if view is not None]
