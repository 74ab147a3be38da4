"""A guest's read of 4 KiB that nobody has read before: one request, one window, and no wait for its end."""

from __future__ import annotations

import http.client
import os
import random
import time
from collections.abc import Iterator
from statistics import median

from bench.lab import GIB, KIB, MIB, Lab
from bench.link import LOOPBACK, Link
from bench.node import Node
from bench.table import Row

RATE_BITS_PER_S, ROUND_TRIP_S = 200e6, 0.030
READS = 12
BLOCK_BYTES, WINDOW_MAX_BYTES = 64 * KIB, 4 * MIB


def run(lab: Lab) -> Iterator[Row]:
    """Reads far apart from each other, each on a file as cold as the first: all but the first with a link that was
    measured."""
    size = 2 * GIB
    image = lab.image(size)
    lab.warm_origin(image)
    pitch = size // READS
    offsets = [i * pitch + random.randrange(pitch // 2 // 4096) * 4096 for i in range(READS)]
    random.shuffle(offsets)
    answered, over, plain, requests, fetched = [], [], [], [], []
    with (
        Link(lab.glance.port, RATE_BITS_PER_S, ROUND_TRIP_S) as link,
        lab.node(f"http://{LOOPBACK}:{link.port}") as node,
    ):
        connection = http.client.HTTPConnection(LOOPBACK, link.port)
        _ranged_get(connection, image, 0)  # The connection is made.
        file = os.open(node.path(image), os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            for offset in offsets:
                before = node.status()["fetcher"]
                began_s = time.monotonic()
                os.pread(file, 4096, offset)
                answered.append(time.monotonic() - began_s)
                over.append(_over_s(node) - began_s)
                after = node.wait_idle()["fetcher"]
                requests.append(after["requests"] - before["requests"])
                fetched.append(after["bytes_fetched"] - before["bytes_fetched"])
                plain.append(_ranged_get(connection, image, offset - offset % BLOCK_BYTES))
        finally:
            os.close(file)
            connection.close()
    samples = {"answered_s": answered, "over_s": over, "plain_get_s": plain, "bytes": fetched}
    where = "200 Mbit/s, 30 ms"
    yield Row("cold-4k", "data requests of one 4 KiB read, most", max(requests), target=1, samples=samples)
    yield Row("cold-4k", "bytes it fetched, most", max(fetched) / MIB, "MiB", target=WINDOW_MAX_BYTES / MIB)
    yield Row("cold-4k", f"first read of a new daemon answered ({where})", answered[0] * 1e3, "ms")
    yield Row("cold-4k", f"read answered, median ({where})", median(answered) * 1e3, "ms")
    yield Row("cold-4k", "  last byte of its window arrived", median(over) * 1e3, "ms")
    yield Row("cold-4k", "  plain ranged GET of its 64 KiB", median(plain) * 1e3, "ms")
    yield Row("cold-4k", "read answered / last byte arrived", median(answered) / median(over), target=0.99)


def _over_s(node: Node) -> float:
    """When nothing is under way any more (monotonic)."""
    while node.status()["fetcher"]["flights"]:
        time.sleep(0.001)
    return time.monotonic()


def _ranged_get(connection: http.client.HTTPConnection, image: str, offset: int) -> float:
    began_s = time.monotonic()
    headers = {"Range": f"bytes={offset}-{offset + BLOCK_BYTES - 1}"}
    connection.request("GET", f"/v2/images/{image}/file", headers=headers)
    answer = connection.getresponse()
    if answer.status != 206 or len(answer.read()) != BLOCK_BYTES:
        raise RuntimeError(f"Glance answered {answer.status}")
    return time.monotonic() - began_s
