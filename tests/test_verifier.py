"""Whole images against Glance's hash, in virtual time: when, of which bytes, and what comes of it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from cachefs.blocks import Blocks
from cachefs.catalog import Image
from cachefs.leisure import Leisure
from cachefs.plan.windows import Pattern
from cachefs.store.format import SpanNo, ViewKind
from cachefs.store.view import StoredView
from cachefs.verifier import PIECE_BYTES, Verifier
from tests.flow import content, until, virtual_time
from tests.stores import SPAN, image_id
from tests.test_guest_disks import ONE, Den, den

SIZE = 2 * PIECE_BYTES + 3 * SPAN + 12345
FILE = content(ONE, 0, SIZE)


class Hooked(Leisure):
    """Lets something happen before the second piece."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__(blocks, lambda: 0)
        self.pauses = 0
        self.meanwhile: Callable[[], Awaitable[None]] | None = None

    async def pause(self, worked_s: float) -> None:
        self.pauses += 1
        if self.pauses == 2 and self.meanwhile is not None:
            await self.meanwhile()
        await super().pause(worked_s)


@dataclass
class Bench:
    den: Den
    verifier: Verifier
    leisure: Hooked
    view: StoredView

    @property
    def known(self) -> Image:
        found = self.den.catalog.known(image_id(ONE))
        assert found is not None
        return found

    async def read_all(self) -> None:
        pattern = Pattern()
        for at in range(0, SIZE, SPAN):
            length = min(SPAN, SIZE - at)
            await self.den.flow.blocks.read(self.view, at, length, pattern)


@asynccontextmanager
async def bench(folder: Path, file: bytes = FILE, promised: bytes = FILE) -> AsyncIterator[Bench]:
    async with den(folder, {ONE: file}) as here:
        here.upload(ONE, file, disk_format="raw")
        here.registry.has[image_id(ONE)]["os_hash_value"] = hashlib.sha512(promised).hexdigest()
        store, leisure = here.flow.store, Hooked(here.flow.blocks)
        verifier = Verifier(here.catalog, store, leisure)

        def lost(view: StoredView) -> None:
            here.catalog.learn_loss(view.record.image)
            verifier.lost(view)

        store.on_loss, store.on_whole = lost, verifier.settled
        await here.flow.services.start(verifier.run)
        await here.image()
        yield Bench(here, verifier, leisure, store.view(image_id(ONE), ViewKind.ORIGINAL, SIZE))


@virtual_time
async def test_an_image_that_becomes_whole_by_being_read_is_verified_at_once(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.read_all()
        began_s = trio.current_time()
        await until(lambda: here.known.verified)
        assert trio.current_time() < began_s + 1.0
        assert here.verifier.verified == 1


@virtual_time
async def test_what_went_and_came_otherwise_meanwhile_is_not_verified(tmp_path: Path) -> None:
    """Its first bytes were read and right, then dropped, and Glance gave others in their place."""
    async with bench(tmp_path) as here:

        async def meanwhile() -> None:
            await here.den.flow.store.evict([(here.view.number, SpanNo(0))])
            here.den.source.files[ONE] = b"other" + FILE[5:]
            await here.den.flow.blocks.read(here.view, 0, SPAN, Pattern())

        here.leisure.meanwhile = meanwhile
        await here.read_all()
        await until(lambda: here.known.condemned is not None or here.known.verified)
        assert not here.known.verified
        assert here.view.condemned is not None


@virtual_time
async def test_what_went_and_came_again_meanwhile_is_verified_in_the_end(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:

        async def meanwhile() -> None:
            await here.den.flow.store.evict([(here.view.number, SpanNo(0))])
            await here.den.flow.blocks.read(here.view, 0, SPAN, Pattern())

        here.leisure.meanwhile = meanwhile
        await here.read_all()
        await until(lambda: here.known.verified)
        assert here.leisure.pauses > -(-SIZE // PIECE_BYTES), "all of it was read once more"
        assert here.verifier.verified == 1


@virtual_time
async def test_a_loss_takes_the_word_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.read_all()
        await until(lambda: here.known.verified)
        await here.den.flow.store.evict([(here.view.number, SpanNo(1))])
        assert not here.known.verified
        await here.den.flow.blocks.read(here.view, SPAN, SPAN, Pattern())
        await until(lambda: here.known.verified)


@virtual_time
async def test_what_it_reads_counts_as_no_use(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.read_all()
        await here.den.flow.settled()
        for span_map in here.view.maps.values():
            span_map.used = False
        await until(lambda: here.known.verified)
        assert not any(span_map.used for span_map in here.view.maps.values())


@pytest.mark.parametrize("wrong_at", [0, PIECE_BYTES, SIZE - 1])
def test_one_wrong_byte_condemns(tmp_path: Path, wrong_at: int) -> None:
    @virtual_time
    async def main() -> None:
        promised = bytearray(FILE)
        promised[wrong_at] ^= 1
        async with bench(tmp_path, promised=bytes(promised)) as here:
            await here.read_all()
            await until(lambda: here.known.condemned is not None)
            assert here.view.read_now(0, 4096) is None
            await until(lambda: here.view.cached == 0)

    main()
