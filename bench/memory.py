"""What the daemon takes of a hypervisor's memory while an image streams through it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from uuid import UUID

from bench.lab import GIB, MIB, Lab
from bench.table import Row
from tests.origin import OriginImage, ScriptedOrigin, pattern

SMALL = 2 * GIB
# Of the disk, beyond what is kept.
SPARE = 20 * GIB


def run(lab: Lab) -> Iterator[Row]:
    """The origin computes its bytes. All is kept where the disk has room; otherwise what fits into 1 GiB, and the
    rest is served only."""
    large = 8 * GIB if lab.quick else 20 * GIB
    keep = shutil.disk_usage(lab.folder).free > large + SPARE
    options = {"max_size": "100%" if keep else "1G"}
    peaks = {}
    for size in (SMALL, large // 2, large):
        image = str(UUID(int=size))
        with (
            ScriptedOrigin([OriginImage(image, "stream", size, pattern(size))]) as origin,
            lab.node(origin.url, store=options) as node,
        ):
            began_s = time.monotonic()
            command = ["dd", f"if={node.path(image)}", "of=/dev/null", "bs=1M", "status=none"]
            subprocess.run(command, check=True)
            took_s = time.monotonic() - began_s
            peaks[size] = node.memory_peak()
            lab.say(
                f"memory: {size // GIB} GiB in {took_s:.0f} s, peak {peaks[size] >> 20} MiB, "
                f"now {node.memory() >> 20} MiB of which files {node.memory_of_files() >> 20} MiB, "
                f"{node.status()['store']['bytes_not_kept'] // GIB} GiB not kept"
            )
    kept = "all kept" if keep else "1 GiB kept"
    for size, peak in peaks.items():
        yield Row("memory", f"peak while {size // GIB} GiB stream, {kept}", peak / MIB, "MiB", target=250)
    # Not of the smallest: it is over before all that is bounded (memory for what is on its way, maps) is full.
    grown = peaks[large] / peaks[large // 2]
    yield Row("memory", "  twice the image / half of it", grown, target=1.1)
