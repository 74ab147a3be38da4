"""Presentations of an image behind one interface. Rule: a view knows sizes and offsets, never Glance or LMDB."""

from __future__ import annotations

from typing import Protocol

from cachefs.blocks import Buffer

__all__ = ["Buffer", "View"]


class View(Protocol):
    """One opened file. `size` in bytes, final."""

    size: int

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """The bytes, fewer at the end of the file, if they can be had without waiting; else None. Good until
        the next await."""
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes, fewer at the end of the file. Raises OriginError or StoreError."""
        ...
