"""What it costs hits that a daemon is watched: one without metrics against one with them, asked or not. The target
is 2 % of the daemon's processor time for a hit.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from uuid import UUID

from bench.lab import MIB, Lab
from bench.node import Node, read_all
from bench.table import Row, interleaved, ratio
from cachefs.plan.extents import PAGE
from tests.origin import OriginImage, ScriptedOrigin, pattern

SIZE = 8 * MIB
READS = 40_000
SCRAPE_EVERY_S = 1.0  # Prometheus' default is a minute.


def run(lab: Lab) -> Iterator[Row]:
    """Both daemons run at once and are read in turn, 4 KiB with O_DIRECT, all hits. The time is that of all of a
    daemon's threads, which other work on the machine disturbs less than the clock's."""
    image = OriginImage(str(UUID(int=1)), "metrics", SIZE, pattern(SIZE))
    repetitions = 7 if lab.quick else 31
    with ExitStack() as stack:
        origin = stack.enter_context(ScriptedOrigin([image]))
        plain = stack.enter_context(lab.node(origin.url, metrics={"listen": ""}))
        watched = stack.enter_context(lab.node(origin.url, metrics={"listen": "127.0.0.1:0"}))
        watched.wait_for_log("metrics on http://")
        found = re.search(r"metrics on (http://\S+)", watched.log)
        assert found is not None
        for node in (plain, watched):
            read_all(node.path(image.id))
            node.wait_idle()
        off, on, asked = interleaved(
            repetitions,
            partial(_hits, plain, image.id),
            partial(_hits, watched, image.id),
            partial(_asked_hits, watched, image.id, found[1]),
        )
        samples = {"off_s": off, "on_s": on, "asked_s": asked}
        yield Row("metrics", "CPU of a hit, without metrics", median(off) * 1e6, "µs", samples=samples)
        yield Row("metrics", "with them, nobody asks: ratio", ratio(on, off), target=1.02)
        yield Row("metrics", "with them, asked each second: ratio", ratio(asked, off), target=1.02)


def _hits(node: Node, image: str) -> float:
    """Seconds of processor time for a hit."""
    file = os.open(node.path(image), os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as page:
            before_s = _cpu_s(node.pid)
            for number in range(READS):
                os.preadv(file, [page], number * PAGE % SIZE)
            return (_cpu_s(node.pid) - before_s) / READS
    finally:
        os.close(file)


def _asked_hits(node: Node, image: str, url: str) -> float:
    over = threading.Event()

    def ask() -> None:
        while True:
            with urllib.request.urlopen(url, timeout=30) as answer:
                answer.read()
            if over.wait(SCRAPE_EVERY_S):
                return

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        return _hits(node, image)
    finally:
        over.set()
        thread.join()


def _cpu_s(pid: int) -> float:
    """Of all threads that it has."""
    spent_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            spent_ns += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            pass  # It has just ended.
    return spent_ns / 1e9
