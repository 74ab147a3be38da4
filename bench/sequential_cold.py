"""A whole image that nobody has read before, from its first byte to its last, against curl of the same image."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from statistics import median

from bench.lab import GIB, MIB, Lab
from bench.table import Bound, Row, interleaved, ratio


def run(lab: Lab) -> Iterator[Row]:
    """Each repetition has a new daemon with an empty store. Both write the image to the same disk."""
    size = GIB if lab.quick else 2 * GIB
    image = lab.image(size)
    lab.warm_origin(image)

    def cachefs() -> float:
        with lab.node(lab.glance.url) as node:
            node.path(image).stat()
            command = ["dd", f"if={node.path(image)}", "of=/dev/null", "bs=1M", "status=none"]
            took_s = _timed(command)
        _settle()
        return took_s

    def curl() -> float:
        with lab.scratch() as folder:
            url = f"{lab.glance.url}/v2/images/{image}/file"
            took_s = _timed(["curl", "-sSf", "-o", str(folder / "image"), url])
        _settle()
        return took_s

    ours, theirs = interleaved(3 if lab.quick else 5, cachefs, curl)
    rates = {"cachefs": size / MIB / median(ours), "curl": size / MIB / median(theirs)}
    yield Row("sequential-cold", f"dd of {size // GIB} GiB through the mount", rates["cachefs"], "MiB/s")
    yield Row("sequential-cold", "curl to a file", rates["curl"], "MiB/s")
    yield Row(
        "sequential-cold",
        "speed / curl's speed",
        ratio(theirs, ours),
        bound=Bound.AT_LEAST,
        target=0.8,
        samples={"cachefs_s": ours, "curl_s": theirs},
    )


def _timed(command: list[str]) -> float:
    began_s = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - began_s


def _settle() -> None:
    """What one side has still to write must not slow the other one down."""
    subprocess.run(["sync"], check=True)
