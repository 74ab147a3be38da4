"""Random reads of a cold image, one at a time: cachefs's window against the best fixed one. Rule: both take the
same way; a fixed window is a `Link` that answers the same whatever it observes.

Windows are tried in process (Store, Fetcher, Blocks and Glance, as the daemon builds them, below FUSE), because
the daemon has no option to fix them, and needs none.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import trio

from bench.lab import KIB, MIB, Lab
from bench.link import LOOPBACK, Link
from bench.node import Node
from bench.table import Row
from cachefs import config, daemon
from cachefs.blocks import Blocks
from cachefs.fetcher import Fetcher
from cachefs.plan import windows
from cachefs.sources.glance import Glance
from cachefs.store.content import Store
from cachefs.store.format import ViewKind
from cachefs.store.room import Limits
from cachefs.views.stored import StoredFile

SIZE = 256 * MIB
LINKS = (("200 Mbit/s, 30 ms", 200e6, 0.030), ("2.5 Gbit/s, 1 ms", 2.5e9, 0.001))
FIXED = (16 * MIB, 4 * MIB, MIB, 256 * KIB, 64 * KIB)
READS_FEW, READS_MANY = 60, 1500
# A fixed window that is slower than this, relative to the best so far, cannot become the best.
GIVE_UP = 1.1


class FixedLink(windows.Link):
    """Learns, and asks for `fixed` bytes all the same."""

    fixed = 0

    @property
    def random_window(self) -> int:
        return self.fixed


def run(lab: Lab) -> Iterator[Row]:
    """Each try has an empty store and an unmeasured link; all tries of one repetition read the same offsets."""
    image = lab.image(SIZE)
    lab.warm_origin(image)
    sys.setswitchinterval(daemon.SWITCH_INTERVAL_S)
    for where, rate, round_trip_s in LINKS:
        for reads in (READS_FEW, READS_MANY // 2 if lab.quick else READS_MANY):
            yield _compared(lab, image, where, rate, round_trip_s, reads)


def _compared(lab: Lab, image: str, where: str, rate: float, round_trip_s: float, reads: int) -> Row:
    tries: dict[int | None, list[float]] = {window: [] for window in (None, *FIXED)}
    repetitions = 1 if lab.quick else 3
    with Link(lab.glance.port, rate, round_trip_s) as link:
        for repetition in range(repetitions):
            offsets = [random.randrange(SIZE // 4096) * 4096 for _ in range(reads)]
            best_s = math.inf
            for window in tries if repetition % 2 == 0 else reversed(tries):
                if window is not None and tries[window] and tries[window][-1] == math.inf:
                    continue  # It was far from the best one before.
                with lab.scratch() as folder:
                    arguments = (folder, f"http://{LOOPBACK}:{link.port}", image, offsets, window)
                    limit_s = math.inf if window is None else GIVE_UP * best_s
                    took_s = trio.run(_read, *arguments, limit_s)
                tries[window].append(took_s)
                if window is not None:
                    best_s = min(best_s, took_s)
                lab.say(f"random-cold: {where}, {reads} reads, {window and window // KIB} KiB: {took_s:.2f} s")
    ours = median(tries.pop(None))
    best, best_s = min(((w, median(t)) for w, t in tries.items() if w and t), key=lambda pair: pair[1])
    return Row(
        "random-cold",
        f"{reads} reads of {SIZE // MIB} MiB, {where}: {ours:.1f} s / {best_s:.1f} s with {best // KIB} KiB",
        ours / best_s,
        target=2,
        samples={"cachefs_s": ours, **{f"{w and w // KIB} KiB": t for w, t in tries.items()}},
    )


async def _read(
    folder: Path, endpoint: str, image: str, offsets: Sequence[int], window: int | None, limit_s: float
) -> float:
    """How long the reads took, or infinity when they took longer than `limit_s`."""
    loaded = config.load([str(Node(folder, endpoint).config_file)], [], {})
    store = Store.open(folder / "store", lambda: Limits(1 << 62, 0), None, loaded.store.commit_interval)
    try:
        fetcher = Fetcher(Glance(loaded.glance.auth), store, loaded.glance.connections, loaded.glance.retries)
        if window is not None:
            fetcher.link = FixedLink()
            fetcher.link.fixed = window
        blocks = Blocks(fetcher, loaded.mount.read_deadline)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            await nursery.start(fetcher.run)
            view = StoredFile(store.view(image, ViewKind.ORIGINAL, SIZE), blocks)
            took_s = await _read_each(view, offsets, limit_s)
            nursery.cancel_scope.cancel()
    finally:
        store.close()
    return took_s


async def _read_each(view: StoredFile, offsets: Sequence[int], limit_s: float) -> float:
    began_s = time.monotonic()
    for offset in offsets:
        data = view.read_now(offset, 4096)
        if data is None:
            data = await view.read(offset, 4096)
        if len(data) != 4096:
            raise RuntimeError(f"{len(data)} bytes at {offset}")
        if time.monotonic() - began_s > limit_s:
            return math.inf
    return time.monotonic() - began_s
