"""A store below the mount: contents landed into it as fast as it takes them. Rule: whole spans only, as a
stream from the origin would bring them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from cachefs.plan.extents import PAGE, ceil
from cachefs.store.content import Store
from cachefs.store.view import StoredView
from tests.stores import land

SPANS_WAITING_MAX = 8


async def fill(store: Store, view: StoredView, read: Callable[[int, int], bytes]) -> None:
    """Lands all of the view; `read(offset, length)` gives its bytes. Returns when they are durable. Raises
    RuntimeError when one was not kept."""
    limit = trio.CapacityLimiter(SPANS_WAITING_MAX)

    async def one(offset: int, data: bytes) -> None:
        async with limit:
            if not await land(store, view, offset, data.ljust(ceil(len(data), PAGE), b"\0")):
                raise RuntimeError(f"the store did not keep the bytes at {offset}: {store.writer.trouble}")

    async with trio.open_nursery() as nursery:
        for offset in range(0, view.size, store.span_size):
            async with limit:  # There is room for one more.
                pass
            length = min(store.span_size, view.size - offset)
            nursery.start_soon(one, offset, await trio.to_thread.run_sync(read, offset, length))
    await store.writer.flush()


async def fill_from(store: Store, view: StoredView, path: Path) -> None:
    """The same with the bytes of a file."""
    with path.open("rb", buffering=0) as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            data = file.read(length)
            assert data is not None
            return data

        await fill(store, view, read)
