"""What it costs hits that a daemon is watched: one without metrics against one with them, asked or not. The target
is 2 % of the daemon's processor time for a hit.

A difference of 2 % is less than that between two daemons of one kind, and than what else a machine does in a
second. So many short rounds are compared in pairs, a moment apart; daemons are started anew several times; and one
more daemon without metrics is compared with the first in the same way, which says what the comparison is worth.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from uuid import UUID

from bench.lab import MIB, Lab
from bench.node import Node, read_all
from bench.table import Row
from cachefs.plan.extents import PAGE
from tests.origin import OriginImage, ScriptedOrigin, pattern

SIZE = 8 * MIB
READS = 4_000  # A round: some 0.2 s.
SCRAPE_EVERY_S = 1.0  # Prometheus' default is a minute.
DRAWS = 2_000  # Of the bootstrap.
TARGET = 1.02

Side = Callable[[], float]


def run(lab: Lab) -> Iterator[Row]:
    """All daemons run at once and are read in turn, 4 KiB with O_DIRECT, all hits. The time is the processor's, of
    all of a daemon's threads. The ratios of neighbouring rounds are the samples; what is said of them is their
    median, and between which values it lies in 95 of 100 draws of whole sets of daemons and of rounds within."""
    sets, rounds = (3, 40) if lab.quick else (6, 150)
    off: list[float] = []
    ratios: dict[str, list[list[float]]] = {name: [] for name in _NAMES}
    for number in range(sets):
        lab.say(f"metrics: daemons {number + 1} of {sets}")
        plain_s, found = _set(lab, rounds, watched_first=number % 2 == 1)
        off += plain_s
        for name, some in found.items():
            ratios[name].append(some)
    yield Row("metrics", "CPU of a hit, without metrics", median(off) * 1e6, "µs", samples={"off_s": off})
    for name, words in _NAMES.items():
        low, high = interval(ratios[name])
        yield Row(
            "metrics", f"{words}: ratio (95 %: {low:.3f} to {high:.3f})", _middle(ratios[name]),
            target=None if name == "other" else TARGET, samples={"ratios": ratios[name]},
        )  # fmt: skip


_NAMES = {
    "other": "another daemon without them",
    "on": "with them, nobody asks",
    "asked": "with them, asked each second",
}


def _set(lab: Lab, rounds: int, *, watched_first: bool) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of a hit without metrics, and the ratios of the others to them, from daemons of their own."""
    image = OriginImage(str(UUID(int=1)), "metrics", SIZE, pattern(SIZE))
    with ExitStack() as stack:
        origin = stack.enter_context(ScriptedOrigin([image]))
        listen = ["127.0.0.1:0", "", ""] if watched_first else ["", "", "127.0.0.1:0"]
        nodes = [stack.enter_context(lab.node(origin.url, metrics={"listen": where})) for where in listen]
        watched, other, plain = nodes if watched_first else reversed(nodes)
        watched.wait_for_log("metrics on http://")
        found = re.search(r"metrics on (http://\S+)", watched.log)
        assert found is not None
        for node in nodes:
            read_all(node.path(image.id))
            node.wait_idle()
        reads = {node: stack.enter_context(_hits(node, image.id)) for node in nodes}
        plain_s: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in _NAMES}
        for _ in range(rounds):
            for name, node in (("other", other), ("on", watched)):
                _compare(reads[plain], reads[node], plain_s, ratios[name])
        with _asking(found[1]):
            for _ in range(rounds):
                _compare(reads[plain], reads[watched], plain_s, ratios["asked"])
    return plain_s, ratios


def _compare(plain: Side, side: Side, plain_s: list[float], ratios: list[float]) -> None:
    """One before, one after, so that what drifts meets both alike."""
    before_s, took_s, after_s = plain(), side(), plain()
    plain_s += [before_s, after_s]
    ratios.append(took_s / ((before_s + after_s) / 2))


def _middle(sets: Sequence[Sequence[float]]) -> float:
    """Each set of daemons counts alike."""
    return sum(map(median, sets)) / len(sets)


def interval(sets: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Where `_middle` lies in 95 of 100 draws."""
    rng = random.Random(1)
    drawn = sorted(
        _middle([rng.choices(some, k=len(some)) for some in rng.choices(sets, k=len(sets))]) for _ in range(DRAWS)
    )
    return drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS) - 1]


@contextmanager
def _hits(node: Node, image: str) -> Iterator[Side]:
    """A round: seconds of processor time for a hit."""
    file = os.open(node.path(image), os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as page:

            def round_() -> float:
                before_s = _cpu_s(node.pid)
                for number in range(READS):
                    os.preadv(file, [page], number * PAGE % SIZE)
                return (_cpu_s(node.pid) - before_s) / READS

            yield round_
    finally:
        os.close(file)


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Somebody asks, for the length of a `with`."""
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
        yield
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
