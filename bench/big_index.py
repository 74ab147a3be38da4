"""A daemon on a store of 16 million chunks (1 TiB): how soon it is ready, how soon an image is open, and what it
takes of a hypervisor's memory. Targets: 3 s, 5 ms, 400 MiB.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from bench.big_store import SPAN_SIZE, BigStore
from bench.lab import MIB, Lab
from bench.node import Node, drop_cache
from bench.table import Row
from cachefs.plan.cutting import ZERO_PAGE
from tests.origin import ScriptedOrigin

IMAGES, IMAGES_QUICK = 256, 16
STARTS = 3
SPANS_SOME = 512
RESIDENT_MAX = 400
# What is opened was asked about when it was listed: Glance has no part in what is measured.
OPTIONS = {"listing_ttl": 86400}


def run(lab: Lab) -> Iterator[Row]:
    """The store is made once. Each start has its index out of the page cache, and then in it. Spans are read where
    they can be verified, one page of each; all of them are as many as maps are kept in memory. Resident is what
    the kernel counts: pages of the index that were looked at among it."""
    made = BigStore(IMAGES_QUICK if lab.quick else IMAGES)
    with lab.scratch() as folder, ScriptedOrigin(made.origin_images) as origin:
        node = Node(folder, origin.url, glance=OPTIONS, scrub={"interval": 0})
        began_s = time.monotonic()
        made.make(node.store, lab.say)
        index = node.store / "index" / "data.mdb"
        took_s = time.monotonic() - began_s
        lab.say(f"big-index: {made.chunks} chunks in {took_s:.0f} s, an index of {index.stat().st_size >> 20} MiB")
        yield from _measure(made, node, index)


def _measure(made: BigStore, node: Node, index: Path) -> Iterator[Row]:
    chunks = f"{made.chunks / 1e6:.3g} million chunks"
    cold, warm = [], []
    for _ in range(STARTS):
        drop_cache([index])
        cold.append(_start(node))
        node.stop()
        warm.append(_start(node))
        node.stop()
    yield Row(
        "big-index",
        f"from start to READY, {chunks}, index not in the page cache",
        median(cold),
        "s",
        target=3,
        samples={"cold_s": cold, "warm_s": warm},
    )
    yield Row("big-index", "  index in the page cache", median(warm), "s", target=3)
    drop_cache([index])
    with node:
        yield _resident(node, "after the start")
        _list(node, made)
        opened = [_open(node, made.image_id(number)) for number in range(1, made.images + 1)]
        yield Row(
            "big-index",
            "open(2) of an image never asked for, slowest",
            max(opened) * 1e3,
            "ms",
            target=5,
            samples={"open_s": opened},
        )
        yield Row("big-index", "  median", median(opened) * 1e3, "ms")
        yield _resident(node, "after opening every image")
        some = _read(node, made.readable[:SPANS_SOME])
        yield Row("big-index", "first 4 KiB of a span, median", median(some) * 1e3, "ms", samples={"read_s": some})
        yield _resident(node, f"after reading {len(some)} spans")
        rest = _read(node, made.readable[SPANS_SOME:])
        yield _resident(node, f"after reading {len(some) + len(rest)} spans")
        status = node.status()
        if status["store"]["rotten_chunks_found"] or status["fetcher"]["bytes_fetched"]:
            raise RuntimeError(f"what was read was not what is stored: {status}")


def _start(node: Node) -> float:
    began_s = time.monotonic()
    node.start()
    return time.monotonic() - began_s


def _resident(node: Node, when: str) -> Row:
    total, files = node.memory(), node.memory_of_files()
    return Row(
        "big-index",
        f"resident {when} (of which {files // MIB} MiB are pages of files)",
        total / MIB,
        "MiB",
        target=RESIDENT_MAX,
        samples={"files_bytes": files, "peak_bytes": node.memory_peak()},
    )


def _list(node: Node, made: BigStore) -> None:
    """Has Glance listed, so that no open asks it."""
    if len(node.ask("images")) != made.images:
        raise RuntimeError(f"{node.known_images()} of {made.images} images are known")


def _open(node: Node, image: str) -> float:
    path = os.path.join(node.mountpoint, "images", image)
    began_s = time.perf_counter()
    file = os.open(path, os.O_RDONLY)
    took_s = time.perf_counter() - began_s
    os.close(file)
    return took_s


_page = mmap.mmap(-1, 4096)  # O_DIRECT wants it aligned.


def _read(node: Node, spans: Sequence[tuple[str, int]]) -> list[float]:
    """Seconds for a page of each; raises RuntimeError where it is not the zeros that it should be."""
    files: dict[str, int] = {}
    took_s = []
    try:
        for image, span in spans:
            if image not in files:
                files[image] = os.open(node.path(image), os.O_RDONLY | os.O_DIRECT)
            began_s = time.perf_counter()
            got = os.preadv(files[image], [_page], span * SPAN_SIZE)
            took_s.append(time.perf_counter() - began_s)
            if got != 4096 or _page[:] != ZERO_PAGE:
                raise RuntimeError(f"span {span} of image {image} is not as it was made")
    finally:
        for file in files.values():
            os.close(file)
    return took_s
