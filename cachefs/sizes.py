"""Which number a resized view has: that of the store where it was opened once, else one of its own for now.
Rule: a number means one image and one size as long as the daemon runs, unless that image is gone.
"""

from __future__ import annotations

from cachefs.errors import NoEntry
from cachefs.store.content import Store
from cachefs.store.format import ViewKind, ViewNo

SIZES_MAX = 10_000


class Sizes:
    """What was looked up and not opened is remembered in memory, the last `SIZES_MAX` of them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._numbers: dict[tuple[str, int], ViewNo] = {}
        self._meant: dict[ViewNo, tuple[str, int]] = {}

    def number(self, image: str, size: int) -> ViewNo:
        """Of the image's disk with so many bytes."""
        known = self._store.known_view(image, ViewKind.RESIZED, size)
        if known is not None:
            return known.number
        number = self._numbers.get((image, size))
        if number is None:
            if len(self._numbers) >= SIZES_MAX:
                oldest = next(iter(self._numbers))
                self._meant.pop(self._numbers.pop(oldest), None)
            number = self._numbers[image, size] = self._store.new_view_number()
            self._meant[number] = (image, size)
        return number

    def meant(self, number: int) -> tuple[str, int]:
        """Image and size. Raises NoEntry."""
        view = self._store.view_by_number(ViewNo(number))
        if view is not None and view.record.kind is ViewKind.RESIZED:
            return view.record.image, view.size
        found = self._meant.get(ViewNo(number))
        if found is None:
            raise NoEntry(number)
        return found

    def end(self, image: str) -> None:
        """The image is gone: its sizes are none of another image's that gets its id."""
        for key in [key for key in self._numbers if key[0] == image]:
            self._meant.pop(self._numbers.pop(key), None)
