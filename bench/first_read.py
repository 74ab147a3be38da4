"""What it costs that a chunk is compared with its digest when it is first read after a start, against a daemon
that does not (`verify_first_read` off). No target: it is the figure to decide by.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from uuid import UUID

from bench.lab import GIB, MIB, Lab
from bench.node import Node, drop_cache, read_all
from bench.table import Row, interleaved, ratio
from cachefs.plan.extents import BLOCK, PAGE
from cachefs.store.format import SPAN_SIZE_DEFAULT
from tests.origin import OriginImage, ScriptedOrigin, pattern

READS = 2000


def run(lab: Lab) -> Iterator[Row]:
    """Each sample has a new daemon, whose maps of all spans are in memory before it begins. Random reads are of
    4 KiB, O_DIRECT, one at a time, and each of another block of 64 KiB, so nearly each of another chunk."""
    size = GIB if lab.quick else 2 * GIB
    image = OriginImage(str(UUID(int=1)), "first-read", size, pattern(size))
    repetitions = 3 if lab.quick else 7
    with ScriptedOrigin([image]) as origin, lab.node(origin.url, scrub={"interval": 0}) as node:
        read_all(node.path(image.id))
        node.wait_idle()
        for cache, warm in (("in the page cache", True), ("on the disk only", False)):
            verified, plain = interleaved(
                repetitions,
                partial(_random, node, image, warm, True),
                partial(_random, node, image, warm, False),
            )
            samples = {"verified_s": verified, "plain_s": plain}
            yield Row("first-read", f"4 KiB, {cache}: verified", median(verified) * 1e6, "µs", samples=samples)
            yield Row("first-read", "  not verified", median(plain) * 1e6, "µs")
            yield Row("first-read", "  ratio", ratio(verified, plain))
            verified, plain = interleaved(
                repetitions,
                partial(_whole, node, image, warm, True),
                partial(_whole, node, image, warm, False),
            )
            samples = {"verified_s": verified, "plain_s": plain}
            speed = size / MIB / median(verified)
            yield Row("first-read", f"dd of {size // GIB} GiB, {cache}: verified", speed, "MiB/s", samples=samples)
            yield Row("first-read", "  not verified", size / MIB / median(plain), "MiB/s")
            yield Row("first-read", "  time / time not verified", ratio(verified, plain))


def _start(node: Node, image: OriginImage, warm: bool, verify: bool) -> None:
    node.configure(store={"verify_first_read": verify})
    node.restart()
    page = mmap.mmap(-1, PAGE)
    file = os.open(node.path(image.id), os.O_RDONLY | os.O_DIRECT)
    try:
        for offset in range(0, image.size or 0, SPAN_SIZE_DEFAULT):
            os.preadv(file, [page], offset)
    finally:
        os.close(file)
    drop_cache(node.segments())
    if warm:
        for segment in node.segments():
            read_all(segment)


def _random(node: Node, image: OriginImage, warm: bool, verify: bool) -> float:
    """Seconds: the median of first reads."""
    _start(node, image, warm, verify)
    assert image.size is not None
    offsets = [block * BLOCK for block in random.sample(range(image.size // BLOCK), READS)]
    page = mmap.mmap(-1, PAGE)  # O_DIRECT wants it aligned.
    file = os.open(node.path(image.id), os.O_RDONLY | os.O_DIRECT)
    took_s = []
    try:
        for offset in offsets:
            began_s = time.perf_counter()
            if os.preadv(file, [page], offset) != PAGE:
                raise RuntimeError(f"a short read at {offset}")
            took_s.append(time.perf_counter() - began_s)
    finally:
        os.close(file)
    return median(took_s)


def _whole(node: Node, image: OriginImage, warm: bool, verify: bool) -> float:
    """Seconds for all of it, from the first byte to the last."""
    _start(node, image, warm, verify)
    began_s = time.monotonic()
    read_all(node.path(image.id))
    return time.monotonic() - began_s
