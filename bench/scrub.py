"""The scrubber with nothing to hold it back, against dd of the same files. Target: at least 0.7 of its speed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from uuid import UUID

from bench.lab import GIB, MIB, Lab
from bench.node import Node, drop_cache, read_all
from bench.table import Bound, Row, interleaved, ratio
from tests.node import ROOT
from tests.origin import OriginImage, ScriptedOrigin, pattern


def run(lab: Lab) -> Iterator[Row]:
    """The segments are out of the page cache before both. No bound on bandwidth, and nobody reads through the
    mount, so that the scrubber never waits. The command's own start is part of its time."""
    size = (2 if lab.quick else 6) * GIB
    image = OriginImage(str(UUID(int=1)), "scrub", size, pattern(size))
    with ScriptedOrigin([image]) as origin, lab.node(origin.url, scrub={"interval": 0, "bandwidth": 0}) as node:
        read_all(node.path(image.id))
        node.wait_idle()
        node.restart()  # All is committed.
        scrubs, dds = interleaved(3 if lab.quick else 5, lambda: _scrub(node), lambda: _dd(node))
        stored = node.segments_bytes()
    yield Row("scrub", f"cold {stored / GIB:.1f} GiB verified", stored / MIB / median(scrubs), "MiB/s")
    yield Row("scrub", "  dd bs=1M of the same segments", stored / MIB / median(dds), "MiB/s")
    yield Row(
        "scrub",
        "  speed / its speed",
        ratio(dds, scrubs),
        bound=Bound.AT_LEAST,
        target=0.7,
        samples={"scrub_s": scrubs, "dd_s": dds},
    )


def _scrub(node: Node) -> float:
    drop_cache(node.segments())
    began_s = time.monotonic()
    command = [sys.executable, "-m", "cachefs.cli", "scrub", "--wait", "--config-file", str(node.config_file)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began_s


def _dd(node: Node) -> float:
    drop_cache(node.segments())
    began_s = time.monotonic()
    for segment in node.segments():
        read_all(segment)
    return time.monotonic() - began_s
