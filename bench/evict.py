"""Giving back what is cached, while a guest reads from what stays. Targets: at least 1 GiB of small chunks a
second, and a 99th percentile of warm reads that is at most doubled meanwhile.

Chunks are of 64 KiB on average, and lie in a segment in two ways. `side by side`: as an image's do that came as
one; neighbours become one hole. `every other`: between chunks that stay, so that nearly each becomes a hole by
itself.

What the filesystem and the machine have to do with that is measured beside it: the same reads while a process that
knows nothing of cachefs gives back as much at 1 GiB/s, where it can, in holes as large.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from uuid import UUID

import trio

from bench import punching
from bench.bare import fill
from bench.lab import GIB, MIB, Lab
from bench.latency import Latencies, reading
from bench.node import Node, drop_cache, read_all
from bench.table import Bound, Row
from cachefs.plan.cutting import ZERO_PAGE
from cachefs.plan.extents import BLOCK, PAGE
from cachefs.store.format import SPAN_SIZE_DEFAULT, Punch, SpanNo, ViewKind
from cachefs.store.segments import Segments
from tests.origin import Content, OriginImage, ScriptedOrigin, pattern
from tests.stores import running

READ_SIZE = 256 * MIB
RATE_MIN, P99_MAX = 1.0, 2.0
CALM_S = 5.0
# Far more than eviction in the background does at once.
BARE_SPANS = 256
HOLES_IN_BYTES = 512 * MIB


def run(lab: Lab) -> Iterator[Row]:
    """Through a mount: fetched, evicted by the command, and fetched again, with one reader from just before each
    eviction to its end. Then the store alone, where nothing reads and nothing else runs."""
    count, repetitions = (2, 1) if lab.quick else (4, 3)
    for layout, size in (("side by side", GIB), ("every other", GIB)):
        victims = [_image(n + 1, size, pattern(size, n + 1)) for n in range(count)]
        kept = []
        if layout == "every other":
            kept = [_image(n + 101, size, _every_other(pattern(size, n + 1))) for n in range(count)]
            victims = [_image(n + 1, size, _apart(pattern(size, n + 1))) for n in range(count)]
        yield from _mounted(lab, layout, victims, kept, repetitions)
        yield from _bare(lab, layout, victims[:2], kept[:2])


# ── contents ──


def _image(number: int, size: int, content: Content) -> OriginImage:
    return OriginImage(str(UUID(int=number)), f"evict-{number}", size, content)


def _apart(content: Content) -> Content:
    """The last page of each block is zero, which ends a chunk wherever it stands."""
    return partial(_blanked, content, every=1)


def _every_other(content: Content) -> Content:
    """The same, but every other block is zero as a whole: what it has of chunks, `_apart` has as well."""
    return partial(_blanked, content, every=2)


def _blanked(content: Content, offset: int, length: int, *, every: int) -> bytes:
    first = offset - offset % BLOCK
    data = bytearray(content(first, offset + length - first))
    for at in range(0, len(data), BLOCK):
        blank = bytes(BLOCK) if (first + at) // BLOCK % every else ZERO_PAGE
        begin = at + BLOCK - len(blank)
        data[begin : at + BLOCK] = blank[: max(0, len(data) - begin)]
    return bytes(data[offset - first :])


# ── through a mount ──


def _mounted(
    lab: Lab, layout: str, victims: Sequence[OriginImage], kept: Sequence[OriginImage], repetitions: int
) -> Iterator[Row]:
    read = _image(999, READ_SIZE, pattern(READ_SIZE, 999))
    rates, calm, busy, bare = [], [], [], []
    hole = SPAN_SIZE_DEFAULT if layout == "side by side" else BLOCK - PAGE
    with (
        ScriptedOrigin([*victims, *kept, read]) as origin,
        lab.node(origin.url, scrub={"interval": 0}) as node,
        lab.scratch() as folder,
    ):
        for _ in range(repetitions):
            for image in (*victims, *kept, read):
                read_all(node.path(image.id))
            node.wait_idle()
            node.restart()  # All is committed.
            drop_cache(node.segments())  # Victims are cold.
            read_all(node.path(read.id))
            before = node.segments_bytes()
            _written(punched := folder / "punched", HOLES_IN_BYTES * 2)
            with reading(node.path(read.id), folder) as reader:
                began_s = time.time()
                time.sleep(CALM_S)
                evicting_s = time.time()
                _evict(node, [image.id for image in victims])
                ended_s = time.time()
                time.sleep(CALM_S)  # What eviction left to the filesystem's journal is not to be counted again.
                punching_s = time.time()
                punching.beside(punched, hole, RATE_MIN * GIB)
                punched_s = time.time()
            shutil.rmtree(punched)
            freed = before - node.segments_bytes()
            rates.append(freed / (ended_s - evicting_s) / GIB)
            calm.append(reader.latencies.between(began_s, evicting_s))
            busy.append(reader.latencies.between(evicting_s, ended_s))
            bare.append(reader.latencies.between(punching_s, punched_s))
            lab.say(f"evict: {layout}, {freed // MIB} MiB in {ended_s - evicting_s:.2f} s, {len(busy[-1])} reads")
            if freed < sum(image.size or 0 for image in victims) * 0.4:
                raise RuntimeError(f"only {freed // MIB} MiB came back")
    name = f"chunks {layout}"
    yield Row("evict", f"freed while a guest reads, {name}", median(rates), "GiB/s", Bound.AT_LEAST, RATE_MIN)
    yield from _percentile("meanwhile", 50, calm, busy)
    yield from _percentile("meanwhile", 99, calm, busy, P99_MAX)
    yield from _percentile("while a process punches such holes", 99, calm, bare)


def _percentile(
    when: str, percent: int, calm: list[Latencies], busy: list[Latencies], target: float | None = None
) -> Iterator[Row]:
    before = [samples.percentile(percent / 100) for samples in calm]
    during = [samples.percentile(percent / 100) for samples in busy]
    what = f"  {when} p{percent} of warm 4 KiB reads ({median(during) * 1e6:.0f} µs) / p{percent} before it"
    ratio = median(d / b for d, b in zip(during, before, strict=True))
    yield Row("evict", what, ratio, target=target, samples={"before_s": before, "during_s": during})


def _evict(node: Node, images: Sequence[str]) -> None:
    """Returns when their space is back."""
    while True:
        answers = node.ask("evict", images=list(images))
        for answer in answers:
            if answer["error"] is not None:
                raise RuntimeError(f"image {answer['id']} is not evicted: {answer['error']}")
        if all(answer["done"] for answer in answers):
            return


# ── the store alone ──


def _bare(lab: Lab, layout: str, victims: Sequence[OriginImage], kept: Sequence[OriginImage]) -> Iterator[Row]:
    with lab.scratch() as folder:
        freed, took_s = trio.run(_evict_bare, folder, victims, kept)
    yield Row("evict", f"  by the store alone, {BARE_SPANS} spans at once", freed / took_s / GIB, "GiB/s")
    if kept:
        with lab.scratch() as folder:
            yield Row("evict", "  by fallocate alone, such holes one by one", _punch_bare(folder) / GIB, "GiB/s")


async def _evict_bare(
    folder: Path, victims: Sequence[OriginImage], kept: Sequence[OriginImage]
) -> tuple[int, float]:
    """Bytes, and seconds."""
    async with running(folder, span_size=None) as store:
        views = [store.view(image.id, ViewKind.ORIGINAL, image.size or 0) for image in (*victims, *kept)]
        for view, image in zip(views, (*victims, *kept), strict=True):
            await fill(store, view, image.content)
        drop_cache((folder / "segments").iterdir())
        before = store.segments.blocks_bytes()
        began_s = time.monotonic()
        for view in views[: len(victims)]:
            spans = [SpanNo(n) for n in range(-(-view.size // store.span_size))]
            for first in range(0, len(spans), BARE_SPANS):
                await store.evict([(view.number, span) for span in spans[first : first + BARE_SPANS]])
        took_s = time.monotonic() - began_s
        return before - store.segments.blocks_bytes(), took_s


def _punch_bare(folder: Path) -> float:
    """Bytes per second: what the filesystem gives back when every other chunk of a segment goes."""
    hole, number = BLOCK - PAGE, punching.SEGMENT
    _written(folder, HOLES_IN_BYTES)
    segments = Segments(folder)
    segments.open(number)
    try:
        offsets = range(0, HOLES_IN_BYTES, 2 * hole)
        began_s = time.monotonic()
        for offset in offsets:
            segments.punch(Punch(number, offset, hole))
        return len(offsets) * hole / (time.monotonic() - began_s)
    finally:
        segments.close()


def _written(folder: Path, size: int) -> None:
    """A segment of so many bytes, which are on the disk and nowhere else."""
    folder.mkdir(exist_ok=True)
    segments = Segments(folder)
    segments.open(punching.SEGMENT, create=True)
    try:
        for offset in range(0, size, MIB):
            segments.append(punching.SEGMENT, offset, [memoryview(os.urandom(MIB))])
    finally:
        segments.close()
    drop_cache(folder.iterdir())
