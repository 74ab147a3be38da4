"""How soon a node can be used after its start: from the start of the process to READY, with a store of 100 GiB of
chunks. Target: 1 s.

The store's index is as cachefs writes it, for 1.6 million chunks in use; its segments are sparse files of the
right sizes, of which a start reads nothing (`bench.big_store`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from bench.big_index import OPTIONS
from bench.big_store import IMAGE_SIZE, BigStore
from bench.lab import GIB, Lab
from bench.node import Node, drop_cache
from bench.table import Row
from tests.origin import ScriptedOrigin

STORE_BYTES = 100 * GIB
STARTS, STARTS_QUICK = 15, 5
TARGET_S = 1.0
METRICS = {"listen": "127.0.0.1:0"}  # On, as they are by default.


def run(lab: Lab) -> Iterator[Row]:
    """The store is made once. Each start has the index out of the page cache, and then in it; Python's own modules
    are in it always. Beside it: what an empty store takes, and importing alone."""
    made = BigStore(STORE_BYTES // IMAGE_SIZE)
    starts = STARTS_QUICK if lab.quick else STARTS
    with lab.scratch() as folder, ScriptedOrigin(made.origin_images) as origin:
        node = Node(folder, origin.url, glance=OPTIONS, scrub={"interval": 0}, metrics=METRICS)
        made.make(node.store, lab.say)
        index = node.store / "index" / "data.mdb"
        what = f"{made.chunks / 1e6:.3g} million chunks of {STORE_BYTES // GIB} GiB"
        _start(node)  # Python compiles what it has not seen yet.
        cold: list[Start] = []
        warm: list[Start] = []
        imports: list[float] = []
        for _ in range(starts):
            drop_cache([index])
            cold.append(_start(node))
            warm.append(_start(node))
            imports.append(_importing())
        samples = {"cold": cold, "warm": warm, "imports_s": imports}
        took = [start.took_s for start in cold]
        yield Row("start", f"to READY, {what}, its index not in the page cache", median(took), "s",
                  target=TARGET_S, samples=samples)  # fmt: skip
        yield Row("start", f"  fastest of {starts}", min(took), "s")
        yield Row("start", f"  slowest of {starts}", max(took), "s")
        yield Row("start", "  its index in the page cache", median(s.took_s for s in warm), "s", target=TARGET_S)
        yield Row("start", "  processor time of it", median(start.cpu_s for start in cold), "s")
    with lab.scratch() as folder, ScriptedOrigin([]) as origin:
        empty = Node(folder, origin.url, metrics=METRICS)
        none = [_start(empty) for _ in range(starts)]
        yield Row("start", "  an empty store", median(s.took_s for s in none), "s", samples={"empty": none})
    yield Row("start", "  Python and what it imports, alone", median(imports), "s")


class Start(NamedTuple):
    """How long it took by the clock, and of a processor."""

    took_s: float
    cpu_s: float


def _start(node: Node) -> Start:
    began_s = time.monotonic()
    node.start()
    took = Start(time.monotonic() - began_s, node.cpu_s())
    node.stop()
    return took


def _importing() -> float:
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-c", "import cachefs.cli, cachefs.config, cachefs.daemon"], check=True)
    return time.monotonic() - began_s
