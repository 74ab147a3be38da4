"""Sixteen guests start from one new image at once: Glance gives it once."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

from bench.lab import MIB, Lab
from bench.link import LOOPBACK, Link
from bench.table import Row

PROCESSES = 16
SIZE = 256 * MIB


def run(lab: Lab) -> Iterator[Row]:
    """Buffered, and past the page cache, which would join reads before cachefs sees them. What the origin gave is
    counted on the wire, with everything around the bytes."""
    image = lab.image(SIZE)
    lab.warm_origin(image)
    for kind, flags in (("buffered", []), ("O_DIRECT", ["iflag=direct"])):
        with Link(lab.glance.port) as link, lab.node(f"http://{LOOPBACK}:{link.port}") as node:
            command = ["dd", f"if={node.path(image)}", "of=/dev/null", "bs=1M", "status=none", *flags]
            began_s = time.monotonic()
            readers = [subprocess.Popen(command) for _ in range(PROCESSES)]
            statuses = [reader.wait() for reader in readers]
            if any(statuses):
                raise RuntimeError("a reader failed")
            took_s = time.monotonic() - began_s
            given = link.report().bytes_down
            requests = node.status()["fetcher"]["requests"]
        yield Row(
            "herd",
            f"{PROCESSES} processes read 256 MiB, {kind}: bytes from the origin / image",
            given / SIZE,
            target=1.02,
            samples={"seconds": took_s, "requests": requests, "bytes": given},
        )
