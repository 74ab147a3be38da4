"""Reads of what is cached, and in the page cache, against the least that a pyfuse3 filesystem can do."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from bench.baseline import mounted
from bench.lab import GIB, KIB, MIB, Lab
from bench.node import cpu_s, read_all
from bench.table import Bound, Row, interleaved, ratio

JOBS = (
    ("4 KiB random O_DIRECT, depth 1", "randread", 4 * KIB, 1),
    ("4 KiB random O_DIRECT, depth 16", "randread", 4 * KIB, 16),
    ("1 MiB sequential O_DIRECT, depth 4", "read", MIB, 4),
)


def run(lab: Lab) -> Iterator[Row]:
    """The baseline serves Glance's own file of the same image. Short runs and many, because the machine's own
    speed changes meanwhile; the processor's time for one request changes least."""
    size = GIB if lab.quick else 2 * GIB
    image = lab.image(size)
    seconds, repetitions = (1, 5) if lab.quick else (2, 9)
    with (
        lab.node(lab.glance.url) as node,
        lab.scratch() as folder,
        mounted(lab.warm_origin(image), folder / "mnt") as (least, least_pid),
    ):
        read_all(node.path(image))
        status = node.wait_idle()
        if status["store"]["bytes_cached"] != size:
            raise RuntimeError(f"the image is not warm: {status['store']}")
        node.wait_verified()
        for segment in node.segments():
            read_all(segment)
        for what, pattern, length, depth in JOBS:
            our_cpu_s: list[float] = []
            their_cpu_s: list[float] = []
            ours, theirs = interleaved(
                repetitions,
                partial(iops, node.path(image), pattern, length, depth, seconds, node.pid, our_cpu_s),
                partial(iops, least, pattern, length, depth, seconds, least_pid, their_cpu_s),
            )
            unit, scale = ("MiB/s", length / MIB) if length >= MIB else ("kIOPS", 1e-3)
            yield Row("warm", what, median(ours) * scale, unit)
            yield Row("warm", "  a read that is one os.pread", median(theirs) * scale, unit)
            samples = {"cachefs_iops": ours, "least_iops": theirs, "cachefs_cpu_s": our_cpu_s}
            samples |= {"least_cpu_s": their_cpu_s}
            share = ratio(ours, theirs)
            yield Row("warm", "  speed / its speed", share, "", Bound.AT_LEAST, 0.75, samples)
            cpu = f"  its processor time for a request ({median(their_cpu_s) * 1e6:.1f} µs) / ours"
            yield Row("warm", cpu, ratio(their_cpu_s, our_cpu_s))


def iops(
    path: Path,
    pattern: str,
    length: int,
    depth: int,
    seconds: int,
    pid: int,
    cpus: list[float],
    size: int | None = None,
) -> float:
    """Requests per second, within the first `size` bytes; adds to `cpus` what one of them cost the process `pid`,
    seconds."""
    command = ["fio", "--name=warm", f"--filename={path}", "--readonly", f"--rw={pattern}", f"--bs={length}"]
    command += ["--direct=1", "--ioengine=libaio", f"--iodepth={depth}", "--norandommap", "--randrepeat=0"]
    command += [f"--size={size}"] if size is not None else []
    command += ["--time_based", f"--runtime={seconds}", "--output-format=json"]
    before_s = cpu_s(pid)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    read = json.loads(done.stdout)["jobs"][0]["read"]
    cpus.append((cpu_s(pid) - before_s) / read["total_ios"])
    return float(read["iops"])
