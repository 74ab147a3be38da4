"""Whether a node can be asked while 500 reads wait for a Glance that takes connections and never answers. Target:
`cachefs status` within 0.1 s.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from uuid import UUID

from bench.lab import GIB, Lab
from bench.node import Node
from bench.table import Row
from cachefs import asking
from tests.cloud.service import poll_until
from tests.origin import Fault, Kind, OriginImage, Request, ScriptedOrigin, Stall, pattern

READS = 500
SIZE = 16 * GIB
TARGET_S = 0.1
WAIT_MAX_S = 60
# Longer than the benchmark: nobody gives up.
PATIENCE = {"mount": {"read_deadline": 300}, "glance": {"read_timeout": 300}}


def run(lab: Lab) -> Iterator[Row]:
    """A real mount; each read is a thread of another process, at a place of its own. The command is timed in
    whole, as a shell would see it, and the question alone, over the socket; both also with nobody waiting."""
    image = OriginImage(str(UUID(int=1)), "outage", SIZE, pattern(SIZE))
    stall = Stall(after=0)

    def dead(request: Request) -> Fault | None:
        return stall if request.kind is Kind.DATA else None

    times = 20 if lab.quick else 100
    with ScriptedOrigin([image], script=dead) as origin, lab.node(origin.url, **PATIENCE) as node:
        calm = _times(node, times)
        with _reads(node, image.id):
            before_s = _cpu_s()
            outage = _times(node, times)
            cpu_s = _cpu_s() - before_s
            waiting = node.status()["reads"]["waiting"]
            stall.release.set()  # Who waits for a mount cannot even be killed.
        if waiting != READS:
            raise RuntimeError(f"{waiting} reads waited, not {READS}")
    python = [_seconds([sys.executable, "-c", "pass"]) for _ in range(times)]
    samples = {"calm": calm, "outage": outage, "python": python}
    for at, what in enumerate(("the daemon's answer over the socket", "the command, from its start to its end")):
        name = f"{READS} reads wait: {what}"
        yield Row("status-outage", name, median(outage[at]), "s", target=TARGET_S, samples=samples)
        yield Row("status-outage", f"  slowest of {times}", max(outage[at]), "s", target=TARGET_S)
        yield Row("status-outage", "  nobody waits", median(calm[at]), "s")
    yield Row("status-outage", "  of the command, Python's own start and end", median(python), "s")
    yield Row("status-outage", "  processor time of a command", cpu_s / times, "s")


def _times(node: Node, times: int) -> tuple[list[float], list[float]]:
    """Seconds of so many answers, and of so many commands."""
    program = str(Path(sys.executable).with_name("cachefs"))
    command = [program, "status", "--config-file", str(node.config_file)]
    _seconds(command)  # What is compiled once.
    answers = [_took(lambda: asking.ask(str(node.socket), "status")) for _ in range(times)]
    return answers, [_seconds(command) for _ in range(times)]


def _cpu_s() -> float:
    """Of all commands that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _seconds(command: list[str]) -> float:
    return _took(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def _took(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


@contextmanager
def _reads(node: Node, image: str) -> Iterator[None]:
    """READS reads that wait, for the length of a `with`."""
    child = subprocess.Popen([sys.executable, "-m", "bench.waiting_reads", str(node.path(image)), str(READS)])
    try:
        if not poll_until(lambda: node.status()["reads"]["waiting"] == READS, WAIT_MAX_S):
            raise RuntimeError(f"only {node.status()['reads']['waiting']} reads wait")
        yield
        if not poll_until(lambda: not node.status()["reads"]["waiting"], WAIT_MAX_S):
            raise RuntimeError("reads still wait, and Glance answers")
    finally:
        child.kill()  # If they wait still, it ends with the mount.
