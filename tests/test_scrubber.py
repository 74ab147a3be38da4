"""When a scrub works, and what comes of what it finds."""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from cachefs import scrubber as loop
from cachefs.config import ScrubConfig
from cachefs.option_types import Hours
from cachefs.plan.extents import PAGE
from cachefs.scrubber import AWAY_S, COURTESY_S, GATHER_S, QUIET_S, Around, Fate, Scrubber
from cachefs.store import format as f
from cachefs.store import scrub as looking
from cachefs.store.check import check
from cachefs.store.content import Store
from cachefs.store.format import ChunkId, ScrubRecord, SpanNo, Table, ViewNo
from cachefs.store.view import StoredView
from tests.stores import (
    SPAN,
    chunks_of,
    flip,
    image_id,
    land,
    land_all,
    patchwork,
    put,
    random_bytes,
    read,
    running,
    segment_file,
    view_of,
)

SEED = 20261122
CONTENTS = [patchwork(i, 6 * SPAN + 7 * PAGE + 13) for i in range(3)]
PIECEWISE = random_bytes(99, 300 * PAGE)  # Of which every other page is landed: a chunk each.
ASKED = ScrubConfig(interval=0.0, bandwidth=0, hours=None)
WEEK_S = 7 * 86400.0
NOON_S = time.mktime((2026, 11, 22, 12, 0, 0, 0, 0, -1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    async def main() -> None:
        async with running(tmp_path / "store") as store:
            for number, content in enumerate(CONTENTS, 1):
                await land_all(store, view_of(store, number, len(content)), content)
            view = view_of(store, 4, len(PIECEWISE))
            for at in range(0, len(PIECEWISE), 2 * PAGE):
                await land(store, view, at, PIECEWISE[at : at + PAGE])

    trio.run(main)
    return tmp_path / "store"


def wall() -> float:
    """The loop's clock, from noon on."""
    return NOON_S + trio.current_time()


@asynccontextmanager
async def scrubbing(
    folder: Path, config: ScrubConfig = ASKED, around: Around | None = None, **more: Any
) -> AsyncIterator[tuple[Store, Scrubber]]:
    async with running(folder) as store:
        scrubber = Scrubber(store, store.index, config, around, wall=wall, **more)
        store.on_rot = scrubber.rot_found
        async with trio.open_nursery() as nursery:
            await nursery.start(scrubber.run)
            yield store, scrubber
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], what: str = "") -> None:
    """Polls in virtual time, less and less often. Bounded, so that a bug ends the test."""
    for n in range(2000):
        if condition():
            return
        await trio.sleep(min(0.1 * 1.02**n, 10))
    raise AssertionError(what or "it did not come about")


async def finished(scrubber: Scrubber, run: int) -> dict[str, Any]:
    await until(lambda: scrubber.status()["finished"] >= run)
    last = scrubber.status()["last"]
    assert last is not None
    return dict(last)


def go(main: Callable[[], Any]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0.01))


def rot(folder: Path, count: int, seed: int = SEED) -> set[ChunkId]:
    """Flips a bit in each of `count` chunks."""
    rng = random.Random(seed)
    chunks = chunks_of(folder)
    hit = set(rng.sample(sorted(chunks), min(count, len(chunks))))
    for chunk_id in hit:
        chunk = chunks[chunk_id]
        flip(segment_file(folder, chunk.segment), chunk.offset + rng.randrange(chunk.length))
    return hit


async def rotten_bytes(store: Store) -> int:
    """Reads everything that the store gives, page by page; how many bytes are absent. None may be wrong."""
    absent = 0
    for number, content in enumerate(CONTENTS, 1):
        view = view_of(store, number, len(content))
        for at in range(0, len(content), PAGE):
            n = min(PAGE, len(content) - at)
            found = await read(view, at, n)
            assert found is None or found == content[at : at + n], f"view {number}, offset {at}"
            absent += n if found is None else 0
    return absent


# ── finding and healing ──


def test_a_sound_store_is_scrubbed_with_nothing_to_say(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    total = sum(chunk.length for chunk in chunks_of(folder).values())

    async def main() -> None:
        async with scrubbing(folder) as (_, scrubber):
            last = await finished(scrubber, scrubber.start())
            assert last["exit_status"] == 0
            assert last["bytes_verified"] == total
            assert (last["rotten"], last["healed"], last["lost"], last["faults"]) == (0, 0, 0, [])
            assert last["counts_compared"]
            assert scrubber.status()["state"] == "idle"

    with caplog.at_level(logging.INFO):
        go(main)
    assert [record.levelname for record in caplog.records if record.message.startswith("scrub: ")] == ["INFO"]


def test_how_far_a_scrub_is_goes_by_bytes_that_there_are(folder: Path) -> None:
    """Numbers of chunks that went long ago pass in no time, and say nothing of how long the rest takes."""
    total = sum(chunk.length for chunk in chunks_of(folder).values())
    seen: list[dict[str, Any]] = []

    async def main() -> None:
        around = Around(live_bytes=lambda: 2 * total)  # As if half of it were yet to be read.
        slow = replace(ASKED, bandwidth=total // 10)
        async with scrubbing(folder, slow, around) as (_, scrubber):
            number = scrubber.start()
            while scrubber.status()["finished"] < number:
                seen.append(scrubber.status())
                await trio.sleep(0.5)
            assert scrubber.status()["bytes_total"] is None

    go(main)
    read = [now for now in seen if now["state"].startswith("reading") and now["bytes_verified"]]
    assert read, "it was looked at while it read"
    for now in read:
        assert (now["share"], now["bytes_total"]) == (round(now["bytes_verified"] / (2 * total), 4), 2 * total)


def test_the_store_knows_the_bytes_of_its_chunks(folder: Path) -> None:
    total = sum(chunk.length for chunk in chunks_of(folder).values())

    async def main() -> None:
        async with running(folder) as store:
            assert store.live_bytes() == total

    go(main)


def test_hundreds_of_flipped_bits_are_found_by_one_scrub_healed_and_never_served(folder: Path) -> None:
    hit = rot(folder, 240)
    assert len(hit) == 240

    async def main() -> None:
        async with scrubbing(folder) as (store, scrubber):
            last = await finished(scrubber, scrubber.start())
            assert last["exit_status"] == 1
            assert last["rotten"] == len(hit)
            assert (last["lost"], last["waiting"], last["faults"]) == (0, 0, [])
            assert last["healed"] > 0
            assert await rotten_bytes(store) > 0
            for number, content in enumerate(CONTENTS, 1):
                await land_all(store, view_of(store, number, len(content)), content)
            assert await rotten_bytes(store) == 0
            last = await finished(scrubber, scrubber.start())
            assert last["exit_status"] == 0
            assert last["bytes_verified"] > 0

    go(main)
    assert check(folder).sound
    assert not hit & set(chunks_of(folder))


def test_healed_spans_of_leased_images_are_fetched_at_once_and_of_others_not(folder: Path) -> None:
    rot(folder, 200)
    fetched: list[tuple[ViewNo, SpanNo]] = []
    around = Around(
        leased=lambda view: view.number == 2, refetch=lambda view, span: fetched.append((view.number, span))
    )

    async def main() -> None:
        async with scrubbing(folder, around=around) as (_, scrubber):
            await finished(scrubber, scrubber.start())

    go(main)
    assert fetched
    assert {view for view, _ in fetched} == {2}


def test_rot_that_a_reader_met_is_mended_without_a_scrub(folder: Path) -> None:
    (victim,) = rot(folder, 1)

    async def main() -> None:
        async with scrubbing(folder) as (store, scrubber):
            assert await store.quarantine([victim]) == [victim]  # As a reader that doubts it does.
            await trio.sleep(GATHER_S + 1)
            await until(lambda: scrubber.status()["healed"] > 0)
            assert scrubber.status()["finished"] == 0

    go(main)
    assert victim not in chunks_of(folder)
    assert check(folder).sound


# ── what cannot be fetched ──


def test_while_glance_is_away_nothing_is_dropped_and_then_it_is_healed(folder: Path) -> None:
    hit = rot(folder, 20)
    away = True

    async def fate(view: StoredView) -> Fate:
        return Fate.AWAY if away else Fate.FETCHABLE

    async def main() -> None:
        nonlocal away
        async with scrubbing(folder, around=Around(fate=fate)) as (store, scrubber):
            before = {view.number: view.cached for view in store.views()}
            last = await finished(scrubber, scrubber.start())
            assert last["exit_status"] == 1
            assert (last["rotten"], last["healed"], last["lost"]) == (len(hit), 0, 0)
            assert last["waiting"] > 0
            await trio.sleep(10 * AWAY_S)
            await store.writer.flush()
            assert {view.number: view.cached for view in store.views()} == before
            with store.index.reading() as snapshot:
                for chunk_id in hit:
                    chunk = snapshot.chunk(chunk_id)
                    assert chunk is not None
                    assert chunk.rotten
            away = False
            await trio.sleep(2 * AWAY_S)
            await until(lambda: scrubber.status()["to_mend"] == 0 and scrubber.status()["healed"] > 0)

    go(main)
    assert not hit & set(chunks_of(folder))
    assert check(folder).sound


def test_what_glance_has_no_more_is_lost_loudly_and_keeps_its_bytes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hit = rot(folder, 30)

    async def main() -> None:
        async with scrubbing(folder) as (store, scrubber):
            for number in (1, 2, 3, 4):
                store.end_views(image_id(number))
            before = {view.number: view.cached for view in store.views()}
            last = await finished(scrubber, scrubber.start())
            assert last["exit_status"] == 2
            assert last["healed"] == 0
            assert last["lost"] > 0
            await store.writer.flush()
            assert {view.number: view.cached for view in store.views()} == before
            again = await finished(scrubber, scrubber.start())
            assert again["lost"] == last["lost"]  # It stays lost, and is said again.

    go(main)
    assert hit <= set(chunks_of(folder))
    lines = [record for record in caplog.records if "LOST" in record.message]
    assert lines
    assert all(record.levelname == "ERROR" and getattr(record, "image", "").startswith("0") for record in lines)


def test_a_damaged_index_is_reported_with_what_to_do(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = max(chunks_of(folder).items(), key=lambda item: item[1].refs)
    put(folder, Table.CHUNKS, f.chunk_key(one[0]), one[1].with_refs(one[1].refs + 1).encode(one[0]))

    async def main() -> None:
        async with scrubbing(folder) as (_, scrubber):
            last = await finished(scrubber, scrubber.start())
            assert last["exit_status"] == 2
            assert last["faults"] == ["chunks count other references than recipes have"]

    go(main)
    assert any("cachefs check --repair" in record.message for record in caplog.records)


# ── pace ──


def test_bandwidth_bounds_what_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "WINDOW", 16)
    total = sum(chunk.length for chunk in chunks_of(folder).values())

    async def main() -> None:
        async with scrubbing(folder, replace(ASKED, bandwidth=1 << 20)) as (_, scrubber):
            began_s = trio.current_time()
            await finished(scrubber, scrubber.start())
            took_s = trio.current_time() - began_s
            assert total / (1 << 20) - 2 <= took_s

    go(main)


def test_guests_that_wait_hold_a_scrub_up_but_not_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "WINDOW", 16)

    class Guest:
        """Waits for Glance."""

        def __init__(self) -> None:
            self.waiting = 1
            self.calm = trio.Event()

        async def until_calm(self, at_most_s: float) -> None:
            with trio.move_on_after(at_most_s):
                await self.calm.wait()

    async def main() -> None:
        guest = Guest()
        async with scrubbing(folder, around=Around(guests=guest)) as (_, scrubber):
            scrubber.start()
            await trio.sleep(COURTESY_S / 2)
            assert scrubber.status()["bytes_verified"] == 0
            assert scrubber.status()["state"] == "reading, waits for guests"
            await trio.sleep(4 * COURTESY_S)
            assert scrubber.status()["bytes_verified"] > 0
            assert scrubber.status()["finished"] == 0
            guest.waiting = 0
            guest.calm.set()
            assert (await finished(scrubber, 1))["exit_status"] == 0

    go(main)


def test_a_disk_that_is_unwell_is_waited_for_before_anything_is_called_rotten(folder: Path) -> None:
    ill = True
    noted: list[OSError] = []

    def open_file(path: Path, flags: int) -> int:
        if ill:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return os.open(path, flags)

    around = Around(disk_unwell=lambda: bool(noted) and ill, note_error=noted.append)

    total = sum(chunk.length for chunk in chunks_of(folder).values())

    async def main() -> None:
        nonlocal ill
        async with scrubbing(folder, around=around, open_file=open_file) as (_, scrubber):
            number = scrubber.start()
            await until(lambda: scrubber.status()["state"] == "reading, waits for the disk")
            ill = False
            last = await finished(scrubber, number)
            assert (last["rotten"], last["exit_status"]) == (0, 0)
            assert last["bytes_verified"] == total

    go(main)
    assert noted


# ── when ──


def test_a_run_by_interval_begins_an_interval_after_the_last_one_began(folder: Path) -> None:
    async def main() -> None:
        async with scrubbing(folder, replace(ASKED, interval=WEEK_S)) as (_, scrubber):
            assert scrubber.status()["finished"] == 0
            await trio.sleep(QUIET_S - 1)
            assert scrubber.status()["began"] is None
            await finished(scrubber, 1)
            first_s = scrubber.status()["began"]
            assert QUIET_S <= first_s - NOON_S < QUIET_S + 60
            assert scrubber.status()["next"] == first_s + WEEK_S
            await trio.sleep(WEEK_S - 120)
            assert scrubber.status()["finished"] == 1
            await trio.sleep(240)
            await finished(scrubber, 2)
            assert WEEK_S <= scrubber.status()["began"] - first_s < WEEK_S + 60

    go(main)


def test_hours_bind_a_run_by_interval_and_not_one_that_is_asked_for(folder: Path) -> None:
    config = ScrubConfig(interval=WEEK_S, bandwidth=0, hours=Hours(22, 6))

    async def main() -> None:
        async with scrubbing(folder, config) as (_, scrubber):
            await trio.sleep(9 * 3600)
            assert scrubber.status()["finished"] == 0  # It is 21:00.
            await trio.sleep(3600 + 700)
            await finished(scrubber, 1)
            assert (scrubber.status()["began"] - NOON_S) // 3600 == 10
        async with scrubbing(folder, config) as (_, scrubber):
            await trio.sleep(12 * 3600)  # Towards noon again.
            assert (await finished(scrubber, scrubber.start()))["exit_status"] == 0

    go(main)


def test_a_run_goes_on_after_a_restart_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "WINDOW", 16)
    total = sum(chunk.length for chunk in chunks_of(folder).values())
    half = 0

    async def first() -> None:
        nonlocal half
        async with scrubbing(folder, replace(ASKED, bandwidth=1 << 20)) as (_, scrubber):
            scrubber.start()
            await until(lambda: scrubber.status()["bytes_verified"] > total // 2)
            half = scrubber.status()["bytes_verified"]
            assert scrubber.status()["finished"] == 0

    async def second() -> None:
        async with scrubbing(folder) as (_, scrubber):
            await until(lambda: scrubber.status()["bytes_verified"] == half, "it was kept")
            await trio.sleep(QUIET_S + 60)
            last = await finished(scrubber, 1)
            assert last["bytes_verified"] == total  # Here windows are single reads: none was read twice.

    go(first)
    go(second)
    assert 0 < half < total


def test_asking_twice_is_asking_once(folder: Path) -> None:
    async def main() -> None:
        async with scrubbing(folder) as (_, scrubber):
            handlers = scrubber.handlers()
            assert await handlers["scrub"]({}) == {"run": 1, "was_running": False}
            assert await handlers["scrub"]({}) == {"run": 1, "was_running": True}
            await finished(scrubber, 1)
            await trio.sleep(3600)
            assert (await handlers["scrub-status"]({}))["finished"] == 1

    go(main)


def test_a_scrub_that_fails_does_not_take_the_daemon_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with scrubbing(folder) as (store, scrubber):

            async def fail(chunks: object) -> list[ChunkId]:
                raise RuntimeError("a bug")

            monkeypatch.setattr(store, "quarantine", fail)
            number = scrubber.start()
            await until(lambda: scrubber.status()["finished"] >= number)
            assert scrubber.status()["last"] is None
            monkeypatch.undo()
            await trio.sleep(loop.FAILED_S + 60)  # It goes on by itself.
            assert (await finished(scrubber, number + 1))["exit_status"] == 1

    rot(folder, 3)
    go(main)
    assert any("unexpected failure of a scrub" in record.message for record in caplog.records)


def test_a_record_that_cannot_be_read_is_as_good_as_none(folder: Path) -> None:
    put(folder, Table.META, f.SCRUB_KEY, b"x" + ScrubRecord(5, 9).encode()[1:])

    async def main() -> None:
        async with scrubbing(folder) as (_, scrubber):
            assert (await finished(scrubber, scrubber.start()))["exit_status"] == 0

    go(main)


def test_what_the_writer_still_finds_whole_is_shown_to_it_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a commit fails just then."""
    hit = rot(folder, 5)
    asked = 0

    async def main() -> None:
        async with scrubbing(folder) as (store, scrubber):
            really = store.quarantine

            async def refuse_twice(chunks: Sequence[ChunkId], seen: Any) -> list[ChunkId]:
                nonlocal asked
                asked += 1
                return [] if asked <= 2 else await really(chunks, seen)

            monkeypatch.setattr(store, "quarantine", refuse_twice)
            last = await finished(scrubber, scrubber.start())
            assert (last["rotten"], last["exit_status"]) == (len(hit), 1)

    go(main)
    assert asked > 2
    assert check(folder).sound


def test_rot_that_cannot_be_quarantined_is_not_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rot(folder, 5)

    async def refuse(chunks: Sequence[ChunkId], seen: Any) -> list[ChunkId]:
        return []

    async def main() -> None:
        async with scrubbing(folder) as (store, scrubber):
            monkeypatch.setattr(store, "quarantine", refuse)
            last = await finished(scrubber, scrubber.start())
            assert (last["rotten"], last["unsettled"], last["exit_status"]) == (0, 5, 1)

    go(main)
