"""A guest's misses while another image is fetched in the background at full speed, against the same misses on an
idle link. Rule: a miss is one: no two come within what one request may bring.
"""

from __future__ import annotations

import math
import mmap
import os
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

from bench.lab import GIB, MIB, Lab
from bench.link import LOOPBACK, Link
from bench.node import Node
from bench.table import Row

# Where, bits per second, round trip, and the longest that the guest thinks before the next one: the link is to be
# full again when it comes.
LINKS = (("200 Mbit/s, 30 ms", 200e6, 0.030, 0.4), ("2.5 Gbit/s, 1 ms", 2.5e9, 0.001, 0.06))
SIZE = 2 * GIB
APART = 8 * MIB  # More than a window.
MISSES = 200
UNDER_WAY = 32 * MIB


def run(lab: Lab) -> Iterator[Row]:
    """4 KiB each, O_DIRECT, one at a time. Both sides read the same places after the same pauses."""
    guest, other = lab.image(SIZE), lab.image(SIZE + APART)
    for image in (guest, other):
        lab.warm_origin(image)
    for where, rate, round_trip_s, pause_s in LINKS:
        count = MISSES // 2 if lab.quick else MISSES
        places = random.sample(range(SIZE // APART), count)
        pauses_s = [random.uniform(0, pause_s) for _ in places]
        with Link(lab.glance.port, rate, round_trip_s) as link:
            url = f"http://{LOOPBACK}:{link.port}"
            alone_s: list[float] = []
            beside_s: list[float] = []
            at_s: list[float] = []
            for _ in range(1 if lab.quick else 2):
                with lab.node(url) as node:
                    alone_s += _missed(node, guest, places, pauses_s)[0]
                with lab.node(url) as node:
                    node.ask("prefetch", images=[other])
                    node.wait_for_status(lambda status: status["fetcher"]["bytes_fetched"] > UNDER_WAY)
                    took_s, between = _missed(node, guest, places, pauses_s, other)
                    beside_s, at_s = beside_s + took_s, at_s + between
        samples: dict[str, Any] = {"alone_s": alone_s, "beside_s": beside_s, "hydrated_bytes_per_s": at_s}
        for what, number in (("median", 0.5), ("p99", 0.99)):
            alone, beside = quantile(alone_s, number), quantile(beside_s, number)
            yield Row(
                "hydration",
                f"{where}: {what} of {len(beside_s)} misses beside hydration / alone: "
                f"{beside * 1e3:.0f} ms / {alone * 1e3:.0f} ms",
                beside / alone,
                target=2 if what == "p99" else None,
                samples=samples,
            )
        yield Row("hydration", "  fetched in between, median / the link's rate", median(at_s) / (rate / 8))


def _missed(
    node: Node, image: str, places: list[int], pauses_s: list[float], other: str | None = None
) -> tuple[list[float], list[float]]:
    """What each miss took; and how fast `other` came between two of them, bytes per second. Ends early when
    `other` is here."""
    file = os.open(node.path(image), os.O_RDONLY | os.O_DIRECT)
    took_s: list[float] = []
    seen: list[tuple[float, int]] = []
    try:
        page = mmap.mmap(-1, 4096)
        for place, pause_s in zip(places, pauses_s, strict=True):
            time.sleep(pause_s)
            if other is not None:
                cached = int(node.ask("prefetch", images=[other], begun=True)[0]["cached"])
                seen.append((time.monotonic(), cached))
                if cached == SIZE + APART:
                    break
            began_s = time.monotonic()
            if os.preadv(file, [page], place * APART) != 4096:
                raise RuntimeError(f"a short read at {place * APART}")
            took_s.append(time.monotonic() - began_s)
    finally:
        os.close(file)
    return took_s, [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(seen)]


def quantile(samples: list[float], which: float) -> float:
    """By the nearest rank: of 100, the 99th is p99."""
    return sorted(samples)[math.ceil(len(samples) * which) - 1]
