"""What the store promises, one test for each promise. See test_store_model.py for all of them at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from cachefs.errors import Absent, StoreError, StoreFormat, StoreLocked, StoreUnusable
from cachefs.plan.cutting import CHUNK_PAGES_MAX
from cachefs.plan.extents import BLOCK, PAGE, Extent
from cachefs.store import format as f
from cachefs.store.check import check
from cachefs.store.content import Store
from cachefs.store.format import OriginMode, Table, ViewKind
from cachefs.store.index import Index, WriteSet
from cachefs.store.ledger import CANDIDATES_MAX
from cachefs.store.recover import open_store
from cachefs.store.room import Limits
from cachefs.store.writer import BACKOFF_S
from tests import stores
from tests.stores import (
    SPAN,
    UNLIMITED,
    Crash,
    Edge,
    Edges,
    Fate,
    chunks_of,
    flip,
    image_id,
    land,
    land_all,
    padded,
    patchwork,
    random_bytes,
    read,
    running,
    segment_file,
    view_of,
)
from tests.xxh3_twin import twin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_what_has_landed_is_read_at_once_and_after_a_restart(folder: Path) -> None:
    content = patchwork(1, 2 * SPAN + 12345)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            assert await read(view, 0, 1) is None
            await land_all(store, view, content)
            assert view.complete
            assert await read(view, 0, len(content)) == content
        async with running(folder) as store:
            known = store.known_view(image_id(1), ViewKind.ORIGINAL)
            assert known is not None
            assert known.complete
            assert await read(known, SPAN - 5, 10) == content[SPAN - 5 : SPAN + 5]

    trio.run(main)
    report = check(folder)
    assert report.sound, report.findings
    assert report.spans == 3


def test_a_hit_takes_no_checkpoint(folder: Path) -> None:
    content = patchwork(2, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            await land_all(store, view, content)
            now = view.read_now(BLOCK - 100, 300)
            if now is None:
                pytest.skip("this filesystem does not read without waiting")
            assert bytes(now) == content[BLOCK - 100 : BLOCK + 200]
            assert store.disk_reads.borrowed_tokens == 0

    trio.run(main)


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, SPAN, SPAN + 1])
def test_views_of_any_size(folder: Path, size: int) -> None:
    content = random_bytes(3, size)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, size)
            assert view.complete == (size == 0)
            await land_all(store, view, content)
            assert view.cached == size
            if size:
                assert await read(view, 0, size) == content
                assert await read(view, size - 1, 1) == content[-1:]
        async with running(folder) as store:
            assert view_of(store, 1, size).cached == size

    trio.run(main)
    assert check(folder).sound


def test_only_what_is_absent_is_asked_for(folder: Path) -> None:
    content = random_bytes(4, 2 * SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            whole = Extent(0, len(content))
            await view.load(whole)
            assert view.absent(whole) == [whole]
            await land(store, view, 3 * BLOCK, padded(content, 3 * BLOCK, 5 * BLOCK))
            await land(store, view, SPAN - PAGE, padded(content, SPAN - PAGE, SPAN))
            assert view.absent(whole) == [Extent(0, 3 * BLOCK), Extent(5 * BLOCK, 2 * SPAN)]
            assert view.absent(Extent(2 * BLOCK + 7, 3 * BLOCK + 1)) == [Extent(2 * BLOCK, 3 * BLOCK)]
            with pytest.raises(Absent) as failure:
                await view.read(4 * BLOCK, 2 * BLOCK)
            assert failure.value.offset == 5 * BLOCK
            assert view.present_at(3 * BLOCK)
            assert view.present_at(0) is False

    trio.run(main)


# ── sharing ──


def test_holes_store_nothing(folder: Path) -> None:
    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, 3 * SPAN)
            await land_all(store, view, bytes(3 * SPAN))
            assert view.complete
            assert await read(view, 17, SPAN) == bytes(SPAN)
            assert store.segments.files == {}

    trio.run(main)
    assert chunks_of(folder) == {}


def test_the_same_bytes_in_two_views_are_stored_once(folder: Path) -> None:
    content = random_bytes(5, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            for number in (1, 2):
                view = view_of(store, number, len(content))
                await land_all(store, view, content)
                assert await read(view, 0, len(content)) == content
            assert store.writer.lander.bytes_shared == len(content)
            assert segment_file(folder).stat().st_size == len(content)

    trio.run(main)
    assert {chunk.refs for chunk in chunks_of(folder).values()} == {2}
    assert check(folder).sound


def test_a_forged_pair_is_two_chunks_with_one_digest(folder: Path) -> None:
    victim = random_bytes(6, 16 * PAGE)
    forged = twin(victim, payload=b"#!/bin/sh\nevil\n")
    assert f.digest_of(victim) == f.digest_of(forged)

    async def main() -> None:
        async with running(folder) as store:
            good, evil = view_of(store, 1, len(victim)), view_of(store, 2, len(forged))
            await land_all(store, evil, forged)
            await land_all(store, good, victim)
            for _ in range(2):  # From the ledger, and from the index.
                assert await read(good, 0, len(victim)) == victim
                assert await read(evil, 0, len(forged)) == forged
                await store.writer.flush()
        async with running(folder) as store:
            good, evil = view_of(store, 1, len(victim)), view_of(store, 2, len(forged))
            assert await read(good, 0, len(victim)) == victim
            assert await read(evil, 0, len(forged)) == forged

    trio.run(main)
    by_digest = Counter(chunk.digest for chunk in chunks_of(folder).values())
    assert set(by_digest.values()) <= {1, 2}
    assert 2 in by_digest.values()
    assert check(folder).sound


def test_a_forged_pair_within_one_landing(folder: Path) -> None:
    victim = random_bytes(7, 4 * PAGE)
    content = victim + bytes(PAGE) + twin(victim) + bytes(PAGE) + victim

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            await land_all(store, view, content)
            assert await read(view, 0, len(content)) == content

    trio.run(main)
    assert sorted(chunk.refs for chunk in chunks_of(folder).values()) == [1, 2]


def test_an_image_full_of_twins_costs_no_more_than_a_few_comparisons_each(folder: Path) -> None:
    victim = random_bytes(8, PAGE)
    forged = [twin(victim, payload=n.to_bytes(4, "big")) for n in range(100)]
    content = b"".join(page + bytes(PAGE) for page in forged)
    edges = Edges()
    reads: list[int] = []

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, len(content))
            await land_all(store, view, content)
            await store.writer.flush()
            edges.on_read = lambda _, offset: reads.append(offset)
            other = view_of(store, 2, len(content))
            await land_all(store, other, content)
            edges.on_read = lambda _, offset: None
            assert await read(other, 0, len(content)) == content

    trio.run(main)
    assert len(reads) <= CANDIDATES_MAX * len(forged)


def test_a_span_that_came_in_pieces_shares_with_another_build(folder: Path) -> None:
    """The same file at another offset: cut as a whole once the span is whole, whatever the pieces were."""
    shared = random_bytes(9, 200 * PAGE)
    first = random_bytes(10, 7 * PAGE) + shared + random_bytes(11, 49 * PAGE)
    second = random_bytes(12, 20 * PAGE) + shared + random_bytes(13, 36 * PAGE)
    assert len(first) == len(second) == SPAN

    async def main() -> None:
        async with running(folder) as store:
            one, other = view_of(store, 1, SPAN), view_of(store, 2, SPAN)
            await land_all(store, one, first, piece=BLOCK)
            order = list(range(0, SPAN, BLOCK))
            for start in order[::2] + order[1::2]:
                assert await land(store, other, start, padded(second, start, start + BLOCK))
            await store.writer.flush()
            assert await read(one, 0, SPAN) == first
            assert await read(other, 0, SPAN) == second

    trio.run(main)
    assert check(folder).sound
    stored = sum(chunk.length for chunk in chunks_of(folder).values())
    assert stored < 2 * SPAN - 100 * PAGE, "most of the 200 shared pages are stored once"
    assert stores.leaked(folder) == [], "what the pieces took was given back"


def test_a_whole_span_that_lands_over_a_part_is_cut_as_a_whole(folder: Path) -> None:
    content = random_bytes(14, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            clean, patched = view_of(store, 1, SPAN), view_of(store, 2, SPAN)
            await land_all(store, clean, content)
            assert await land(store, patched, 37 * PAGE, padded(content, 37 * PAGE, 50 * PAGE))
            await land_all(store, patched, content)
            assert await read(patched, 0, SPAN) == content

    trio.run(main)
    assert {chunk.refs for chunk in chunks_of(folder).values()} == {2}


def test_landing_again_what_is_there_does_nothing(folder: Path) -> None:
    content = random_bytes(15, SPAN)
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, SPAN)
            await land_all(store, view, content)
            await store.writer.flush()
            before = list(edges.passed)
            await land_all(store, view, content)
            await land_all(store, view, content, piece=BLOCK)
            await store.writer.flush()
            assert edges.passed == before

    trio.run(main)


def test_bytes_that_are_there_are_never_replaced(folder: Path) -> None:
    content = random_bytes(16, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            await land(store, view, 0, padded(content, 0, SPAN // 2))
            await land(store, view, 0, bytes(SPAN // 2) + content[SPAN // 2 :])
            assert await read(view, 0, SPAN) == content

    trio.run(main)


# ── opening ──


def test_a_second_open_is_refused(folder: Path) -> None:
    store = Store.open(folder, span_size=SPAN)
    try:
        with pytest.raises(StoreLocked, match=f"in use by process {os.getpid()}"):
            Store.open(folder)
    finally:
        store.close()
    Store.open(folder).close()


def test_another_process_is_refused_and_a_dead_ones_lock_is_gone(folder: Path) -> None:
    code = f"""
import sys
from math import inf
from pathlib import Path
from cachefs.store.content import Store
store = Store.open(Path({str(folder)!r}))
print("open", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked, match=f"in use by process {holder.pid}"):
            Store.open(folder)
        with pytest.raises(StoreLocked):
            check(folder)
        holder.kill()
    Store.open(folder).close()


def test_a_newer_format_is_refused_with_one_clear_line(folder: Path) -> None:
    Store.open(folder).close()
    newer = f.MAGIC + (2).to_bytes(4, "little") + b"whatever format 2 has here"
    stores.put(folder, Table.META, f.STORE_KEY, newer)
    for refused in (Store.open, check):
        with pytest.raises(StoreFormat) as failure:
            refused(folder)
        line = (
            f"store {folder}: it has format 2; this cachefs reads format 1: upgrade cachefs, or use another path"
        )
        assert str(failure.value) == line
    with stores.index_of(folder) as index, index.reading() as snapshot:
        assert snapshot.get(Table.META, f.STORE_KEY) == newer, "and it was left as it was"


def test_another_users_store_is_refused(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    Store.open(folder).close()
    os.chown(folder, 12345, 12345)
    for refused in (Store.open, check):
        with pytest.raises(StoreUnusable, match="belongs to user 12345, and this is user 0"):
            refused(folder)


def test_a_foreign_folder_is_refused_and_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "lock").write_text("somebody else's")
    (folder / "thesis.txt").write_text("precious")
    for refused in (Store.open, check):
        with pytest.raises(StoreFormat, match=r"holds no cachefs store|not a cachefs store"):
            refused(folder)
    assert sorted(os.listdir(folder)) == ["lock", "thesis.txt"]
    assert (folder / "lock").read_text() == "somebody else's"


def test_the_root_of_a_filesystem_of_its_own_will_do(folder: Path) -> None:
    (folder / "lost+found").mkdir(parents=True)
    content = random_bytes(1, SPAN)

    async def main() -> None:
        for _ in range(2):
            async with running(folder) as store:
                view = view_of(store, 1, SPAN)
                await land_all(store, view, content)
                assert await read(view, 0, SPAN) == content

    trio.run(main)
    assert check(folder).sound


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match="cannot be made"):
        Store.open(tmp_path / "file" / "store")


def test_another_span_size_is_refused(folder: Path) -> None:
    Store.open(folder, span_size=SPAN).close()
    with pytest.raises(StoreUnusable, match=f"made with span_size {SPAN} and is configured with {2 * SPAN}"):
        Store.open(folder, span_size=2 * SPAN)
    store = Store.open(folder)
    assert store.span_size == SPAN
    store.close()


def test_an_interrupted_making_is_finished(folder: Path) -> None:
    folder.mkdir()
    (folder / "index").mkdir()
    store = Store.open(folder)
    uuid = store.uuid
    store.close()
    store = Store.open(folder)
    assert store.uuid == uuid
    store.close()


# ── what is remembered ──


def test_images_and_origins_are_remembered(folder: Path) -> None:
    fields = {"name": "debian", "number": 1, "size": 5}

    async def main() -> None:
        async with running(folder) as store:
            assert store.new_image_number() == 1
            store.put_image(image_id(1), fields)
            store.put_image(image_id(2), {"number": store.new_image_number()})
            store.drop_image(image_id(2))
            store.set_origin(view_of(store, 1, 5), OriginMode.STREAM)
        async with running(folder) as store:
            assert store.images == {image_id(1): fields}
            assert store.new_image_number() == 3, "no number is given twice"
            assert view_of(store, 1, 5).record.origin is OriginMode.STREAM
            with pytest.raises(StoreError, match="had 5 bytes and is said to have 6"):
                view_of(store, 1, 6)

    trio.run(main)
    assert check(folder).sound


def test_views_and_images_survive_a_failed_commit(folder: Path) -> None:
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            store.put_image(image_id(1), {"number": store.new_image_number()})
            view = view_of(store, 1, SPAN)
            store.set_origin(view, OriginMode.RANGES)
            edges.arm(Fate.FAIL, Edge.COMMIT)
            await store.writer.flush()
            assert edges.failed == [Edge.COMMIT]
            assert store.known_view(image_id(1), ViewKind.ORIGINAL) is view
            assert view.record.origin is OriginMode.RANGES
        async with running(folder) as store:
            assert store.images == {image_id(1): {"number": 1}}
            assert view_of(store, 1, SPAN).record.origin is OriginMode.RANGES
            assert view_of(store, 2, SPAN).number == 2

    trio.run(main)


def test_the_index_grows_as_it_needs(folder: Path) -> None:
    tiny = 128 << 10

    async def main() -> None:
        async with running(folder, map_size=tiny) as store:
            view = view_of(store, 1, SPAN)
            content = random_bytes(17, SPAN)
            await land_all(store, view, content)
            for n in range(300):
                store.put_image(image_id(n + 1), {"name": "x" * 3000, "number": n + 1})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer.flush)
                for _ in range(20):
                    view.forget_maps()
                    assert await read(view, 5, 1000) == content[5:1005]
            assert store.writer.trouble is None
        async with running(folder, map_size=tiny) as store:
            assert len(store.images) == 300
            assert await read(view_of(store, 1, SPAN), 0, SPAN) == content

    trio.run(main)


@contextmanager
def last_write_fails(path: Path) -> Iterator[None]:
    """The write that completes a commit of LMDB goes to a full device: it has a descriptor of its own."""
    files = [int(name) for name in os.listdir("/proc/self/fd")]
    of_index = [file for file in files if os.path.realpath(f"/proc/self/fd/{file}") == str(path.resolve())]
    assert len(of_index) == 2
    last, full = max(of_index), os.open("/dev/full", os.O_WRONLY)
    saved = os.dup(last)
    os.dup2(full, last)
    try:
        yield
    finally:
        if os.path.realpath(f"/proc/self/fd/{last}") == "/dev/full":
            os.dup2(saved, last)
        os.close(saved)
        os.close(full)


def test_an_index_that_lmdb_has_given_up_is_opened_again(folder: Path) -> None:
    folder.mkdir()
    index = Index(folder)
    writes = WriteSet()
    writes.put(Table.META, b"key", b"committed")
    index.commit(writes)
    writes.put(Table.META, b"key", b"lost")
    with last_write_fails(folder / "data.mdb"), pytest.raises(OSError, match="could not be written"):
        index.commit(writes)
    with index.reading() as snapshot:
        assert snapshot.get(Table.META, b"key") == b"committed"
    writes.put(Table.META, b"key", b"again")
    index.commit(writes)
    with index.reading() as snapshot:
        assert snapshot.get(Table.META, b"key") == b"again"
    index.close()


# ── recovery ──


def test_recovery_cuts_what_lies_beyond_the_committed_end(folder: Path) -> None:
    content = random_bytes(18, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            await land_all(store, view_of(store, 1, SPAN), content)

    trio.run(main)
    with segment_file(folder).open("ab") as file:
        file.write(b"never committed" * 1000)
    segment_file(folder, 7).write_bytes(b"a stray")
    assert check(folder).sound
    opened = open_store(folder)
    assert opened.cut_bytes == 15000
    opened.close()
    assert segment_file(folder).stat().st_size == SPAN
    assert not segment_file(folder, 7).exists()

    async def again() -> None:
        async with running(folder) as store:
            assert await read(view_of(store, 1, SPAN), 0, SPAN) == content

    trio.run(again)


def test_recovery_does_the_punches_that_were_noted(folder: Path) -> None:
    async def main() -> None:
        async with running(folder) as store:
            await land_all(store, view_of(store, 1, 2 * SPAN), random_bytes(19, 2 * SPAN))

    trio.run(main)
    stores.drop_span(folder, f.ViewNo(1), f.SpanNo(0), punch=False)
    assert sum(e.length for _, e in stores.leaked(folder)) == SPAN
    assert check(folder).sound
    opened = open_store(folder)
    assert opened.punches_done == 1
    opened.close()
    assert stores.leaked(folder) == []
    assert check(folder).findings == []


def test_a_punch_gives_blocks_back(folder: Path) -> None:
    async def main() -> None:
        async with running(folder) as store:
            await land_all(store, view_of(store, 1, 2 * SPAN), random_bytes(20, 2 * SPAN))

    trio.run(main)
    before = segment_file(folder).stat().st_blocks * 512
    stores.drop_span(folder, f.ViewNo(1), f.SpanNo(1))
    after = segment_file(folder).stat()
    assert before - after.st_blocks * 512 >= SPAN - 2 * PAGE
    assert after.st_size == 2 * SPAN, "and the file is as long as before"


def test_a_punch_that_failed_is_done_at_the_next_start(folder: Path) -> None:
    content = random_bytes(21, SPAN)
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, SPAN)
            edges.arm(Fate.FAIL, Edge.PUNCH, times=5)
            await land_all(store, view, content, piece=BLOCK)

    trio.run(main)
    assert Edge.PUNCH in edges.failed
    assert stores.leaked(folder) != []
    opened = open_store(folder)
    assert opened.punches_done > 0
    opened.close()
    assert stores.leaked(folder) == []
    assert check(folder).sound


def test_a_missing_segment_is_absent_and_lands_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = random_bytes(22, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            await land_all(store, view_of(store, 1, SPAN), content)
        segment_file(folder).unlink()
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            whole = Extent(0, SPAN)
            await view.load(whole)
            assert await read(view, 0, SPAN) is None
            assert view.read_now(0, 10) is None
            for offset in range(0, SPAN, PAGE):
                await view.doubt(offset)
            await view.load(whole)
            assert view.absent(whole) == [whole]
            await land_all(store, view, content)
            assert await read(view, 0, SPAN) == content
        async with running(folder) as store:
            assert await read(view_of(store, 1, SPAN), 0, SPAN) == content

    trio.run(main)
    assert "segment 1 is missing" in caplog.text
    report = check(folder)
    assert [finding.what for finding in report.findings] == ["its file is missing"]


def test_what_a_shortened_segment_lost_is_absent_and_never_zeros(folder: Path) -> None:
    content = random_bytes(35, 2 * SPAN)

    async def main() -> None:
        async with running(folder) as store:
            await land_all(store, view_of(store, 1, len(content)), content[:SPAN])
        os.truncate(segment_file(folder), SPAN // 2)
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            for _ in range(2):  # Also after something was appended.
                kept = SPAN // 2 - CHUNK_PAGES_MAX * PAGE  # Of the chunk that was cut nothing can be verified.
                assert await read(view, 0, kept) == content[:kept]
                assert await read(view, SPAN // 2, 1) is None
                assert await read(view, SPAN - 1, 1) is None
                assert await land(store, view, SPAN, content[SPAN:])
            assert await read(view, SPAN, SPAN) == content[SPAN:]

    trio.run(main)


@pytest.mark.parametrize("edge", [Edge.CREATE, Edge.APPEND, Edge.SYNC, Edge.COMMIT])
@pytest.mark.parametrize("fate", [Fate.CRASH, Fate.CRASH_TORN, Fate.CRASH_LATE])
def test_a_crash_at_any_edge_leaves_a_sound_store(folder: Path, edge: Edge, fate: Fate) -> None:
    content = random_bytes(23, 2 * SPAN)
    edges = Edges()

    async def crashing() -> None:
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, len(content))
            if edge is not Edge.CREATE:
                await land_all(store, view, content[:SPAN])
                await store.writer.flush()
            edges.arm(fate, edge)
            await land(store, view, SPAN, content[SPAN:])
            await store.writer.flush()

    with pytest.raises(BaseExceptionGroup) as failure:
        trio.run(crashing)
    assert failure.value.split(Crash)[1] is None
    edges.lose_unsynced(folder, random.Random(1))
    assert check(folder).sound

    async def again() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            if edge is not Edge.CREATE:
                assert await read(view, 0, SPAN) == content[:SPAN]
            assert await read(view, SPAN, SPAN) in (None, content[SPAN:])
            await land_all(store, view, content)
            assert await read(view, 0, len(content)) == content

    trio.run(again)
    assert check(folder).sound


# ── rot ──


def test_rot_is_quarantined_and_fetched_again(folder: Path) -> None:
    content = random_bytes(24, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            await land_all(store, view, content)
            flip(segment_file(folder), 300_000)
            await view.doubt(300_000)
            assert store.writer.lander.rotten_found == 1
            await view.load(Extent(0, SPAN))
            assert not view.present_at(300_000)
            assert await read(view, 300_000, 1) is None
            gaps = view.absent(Extent(0, SPAN))
            assert sum(gap.length for gap in gaps) <= 5 * BLOCK + 2 * BLOCK
            for gap in gaps:
                await land(store, view, gap.start, padded(content, *gap))
            assert await read(view, 0, SPAN) == content

    trio.run(main)
    report = check(folder)
    assert report.sound, report.findings


def test_rot_is_never_shared(folder: Path) -> None:
    content = random_bytes(25, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            one, other = view_of(store, 1, SPAN), view_of(store, 2, SPAN)
            await land_all(store, one, content)
            flip(segment_file(folder), 500_000)
            await land_all(store, other, content)
            assert await read(other, 0, SPAN) == content
            assert store.writer.lander.rotten_found == 1
            assert await read(one, 500_000, 1) is None, "who met it tells the others"

    trio.run(main)


def test_rot_does_not_become_truth_when_a_span_is_cut_anew(folder: Path) -> None:
    content = random_bytes(26, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            await land(store, view, 0, padded(content, 0, SPAN // 2))
            flip(segment_file(folder), 5)
            await land(store, view, SPAN // 2, padded(content, SPAN // 2, SPAN))
            assert await read(view, 0, 1) is None
            await land_all(store, view, content)
            assert await read(view, 0, SPAN) == content

    trio.run(main)
    assert check(folder).sound


# ── room ──


def test_a_full_store_keeps_nothing_more_and_serves_what_it_has(folder: Path) -> None:
    content = random_bytes(27, 3 * SPAN)
    room = [Limits(2 * SPAN + SPAN // 2, 0)]  # The index counts too.

    async def main() -> None:
        async with running(folder, limits=lambda: room[0], commit_interval_s=inf) as store:
            view = view_of(store, 1, len(content))
            for start in (0, SPAN):
                assert await land(store, view, start, content[start : start + SPAN])
            assert not await land(store, view, 2 * SPAN, content[2 * SPAN :])
            assert store.writer.trouble == f"no room for {SPAN} bytes"
            assert store.writer.not_kept_bytes == SPAN
            assert await read(view, 0, 2 * SPAN) == content[: 2 * SPAN]
            room[0] = UNLIMITED
            assert not await land(store, view, 2 * SPAN, content[2 * SPAN :]), "it does not try again at once"
            await trio.sleep(BACKOFF_S + 1)
            assert await land(store, view, 2 * SPAN, content[2 * SPAN :])
            assert store.writer.trouble is None

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert check(folder).sound


@contextmanager
def small_filesystem(tmp_path: Path, size: int) -> Iterator[Path]:
    """An ext4 of `size` bytes in a file."""
    disk, mounted = tmp_path / "disk", tmp_path / "mounted"
    with disk.open("wb") as file:
        file.truncate(size)
    mounted.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", disk, mounted], check=True, capture_output=True)  # Detached with it.
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True, capture_output=True)


@pytest.mark.loop
def test_on_a_full_disk_reads_go_on_and_nothing_breaks(tmp_path: Path) -> None:
    content = random_bytes(28, 128 << 20)

    async def main(folder: Path) -> None:
        kept = 0
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            for start in range(0, len(content), SPAN):
                if not await land(store, view, start, content[start : start + SPAN]):
                    break
                kept = start + SPAN
            assert 16 * SPAN < kept < 64 * SPAN
            assert store.writer.trouble is not None
            assert not await land(store, view, kept, content[kept : kept + SPAN])
            await store.writer.flush()
            got = await read(view, 0, SPAN)
            assert got in (None, content[:SPAN])
            for start in range(0, kept, SPAN):
                assert await read(view, start, SPAN) in (None, content[start : start + SPAN])
            # What lands again after the disk is full is refused again, and harms nothing.
            await trio.sleep(BACKOFF_S + 1)
            await land(store, view, 100 * SPAN, content[100 * SPAN : 101 * SPAN])
            await store.writer.flush()
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            for start in range(0, len(content), SPAN):
                assert await read(view, start, SPAN) in (None, content[start : start + SPAN])

    with small_filesystem(tmp_path, 64 << 20) as mounted:
        folder = mounted / "store"
        trio.run(main, folder, clock=MockClock(autojump_threshold=0))
        assert check(folder).sound


# ── races ──


class _Gate:
    """Holds whoever passes until it is opened; `reached` tells that somebody is there."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(20)


async def in_thread(wait: Callable[[float], bool]) -> None:
    assert await trio.to_thread.run_sync(wait, 20)


def test_a_racing_reader_never_sees_what_was_punched(folder: Path) -> None:
    content = random_bytes(29, SPAN)
    gate, edges = _Gate(), Edges()

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, SPAN)
            for start in (0, SPAN // 2 + PAGE):
                await land(store, view, start, padded(content, start, start + SPAN // 2 - PAGE))
            await store.writer.flush()
            held = [gate]
            edges.on_read = lambda segment, offset: held.pop()() if held else None
            got: list[bytes] = []

            async def reader() -> None:
                got.append(bytes(await view.read(0, SPAN // 2 - PAGE)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await in_thread(gate.reached.wait)
                # Recut as a whole, committed, and the old chunks punched, all under the reader's hands.
                await land(store, view, SPAN // 2 - PAGE, padded(content, SPAN // 2 - PAGE, SPAN // 2 + PAGE))
                await store.writer.flush()
                gate.opened.set()
            assert got == [content[: SPAN // 2 - PAGE]]

    trio.run(main)
    assert stores.leaked(folder) == []


def test_two_who_load_one_map_do_not_overrule_each_other_for_ever(folder: Path) -> None:
    turns = [_Gate() for _ in range(8)]
    edges = Edges()
    loads: list[_Gate] = []

    def look_up() -> None:
        loads.append(turns[len(loads)])
        loads[-1]()

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, SPAN)
            await store.writer.flush()
            edges.on_look_up = look_up
            async with trio.open_nursery() as nursery:
                for turn in turns[:2]:
                    nursery.start_soon(view.load, Extent(0, 1))
                    await in_thread(turn.reached.wait)
                turns[0].opened.set()
                # Whoever were to begin anew would do so before the second one ends.
                await trio.to_thread.run_sync(turns[2].reached.wait, 0.2)
                for turn in turns[1:]:
                    turn.opened.set()
            assert len(loads) == 2

    trio.run(main)


def test_a_map_that_was_being_loaded_when_its_span_was_cut_anew_is_not_believed(folder: Path) -> None:
    content = random_bytes(32, SPAN)
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, SPAN)
            await land(store, view, 0, padded(content, 0, SPAN - 3 * PAGE))
            await store.writer.flush()
            view.forget_maps()
            turns = [_Gate() for _ in range(8)]
            left = list(turns)
            edges.on_look_up = lambda: left.pop(0)() if left else None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(view.load, Extent(0, SPAN))
                # It has looked up the recipe and some chunks, which are soon no more.
                for turn in turns[:-1]:
                    await in_thread(turn.reached.wait)
                    turn.opened.set()
                await in_thread(turns[-1].reached.wait)
                await land(store, view, SPAN - 3 * PAGE, padded(content, SPAN - 3 * PAGE, SPAN))
                await store.writer.flush()
                view.forget_map(0)  # As when there are too many maps.
                turns[-1].opened.set()
            assert await read(view, 0, SPAN) == content

    trio.run(main)


def test_a_map_that_was_being_loaded_when_a_commit_failed_is_not_believed(folder: Path) -> None:
    content = random_bytes(33, SPAN)
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, SPAN)
            await land(store, view, 0, padded(content, 0, 4 * PAGE))
            await store.writer.flush()
            await land(store, view, 4 * PAGE, padded(content, 4 * PAGE, 50 * PAGE))
            view.forget_maps()
            gate = _Gate()
            left = [gate]
            edges.on_look_up = lambda: left.pop()() if left else None
            edges.arm(Fate.FAIL, Edge.SYNC)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(view.load, Extent(0, SPAN))
                await in_thread(gate.reached.wait)  # It has the recipe that will be lost.
                await store.writer.flush()
                edges.lose_doomed(folder)
                gate.opened.set()
            assert view.present_at(4 * PAGE) is False
            assert await read(view, 4 * PAGE, 46 * PAGE) is None
            assert await read(view, 0, 4 * PAGE) == content[: 4 * PAGE]

    trio.run(main)


def test_offsets_are_not_used_again_after_a_failed_commit(folder: Path) -> None:
    content = random_bytes(34, 2 * SPAN)
    edges = Edges()

    async def main() -> None:
        async with running(folder) as store:
            await land_all(store, view_of(store, 1, 2 * SPAN), content[:SPAN])
        async with running(folder, edges=edges, commit_interval_s=inf) as store:
            view = view_of(store, 1, 2 * SPAN)
            assert await land(store, view, SPAN, content[SPAN:])
            edges.arm(Fate.FAIL, Edge.COMMIT)
            await store.writer.flush()
            await trio.sleep(BACKOFF_S)
            assert await land(store, view, SPAN, content[SPAN:])

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert {chunk.segment for chunk in chunks_of(folder).values()} == {1, 2}
    assert segment_file(folder, 1).stat().st_size == SPAN


def test_a_map_forgotten_while_another_is_loaded_is_loaded_again(folder: Path) -> None:
    content = random_bytes(30, 2 * SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, 2 * SPAN)
            await land_all(store, view, content)
            for _ in range(20):
                view.forget_map(1)
                async with trio.open_nursery() as nursery:

                    async def reader() -> None:
                        assert await view.read(SPAN - 10, 20) == content[SPAN - 10 : SPAN + 10]

                    nursery.start_soon(reader)
                    await trio.lowlevel.checkpoint()
                    store.rot_found([])

    trio.run(main)


def test_totals_are_told_while_the_writer_works(folder: Path) -> None:
    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            await land_all(store, view, random_bytes(31, SPAN))
            await store.writer.flush()
            totals = store.totals()
            assert totals["bytes_cached"] == totals["bytes_landed"] == SPAN
            assert totals["commits"] >= 1
            assert totals["trouble"] is None

    trio.run(main)
