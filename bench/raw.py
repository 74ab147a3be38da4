"""Guests' disks: the first read of a cold qcow2, a whole compressed one against a download that is converted, and
warm reads against those of the image itself.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from bench.lab import GIB, KIB, MIB, Lab
from bench.node import Node, read_all
from bench.table import Bound, Row, interleaved, ratio
from bench.warm import JOBS, iops

BLOCK, TABLES, FIRST_BLOCK = 64 * KIB, 2 * 64 * KIB, 64 * KIB
READS = 8


def first(lab: Lab) -> Iterator[Row]:
    """Each read is the first of a new daemon: 4 KiB somewhere in the disk, O_DIRECT."""
    disk, size = guest_disk(lab)
    for kind, flags in (("zlib", ["-c"]), ("uncompressed", [])):
        image = uploaded(lab, disk, flags)
        requests, fetched, took_s, allowed = [], [], [], []
        for _ in range(READS // 2 if lab.quick else READS):
            with lab.node(lab.glance.url) as node:
                began_s = time.monotonic()
                _read_4k(_raw(node, image), random.randrange(size // 4 // 4096) * 4096)
                took_s.append(time.monotonic() - began_s)
                window = node.status()["fetcher"]["random_window"]
                counts = node.wait_idle()["fetcher"]
                requests.append(counts["requests"])
                fetched.append(counts["bytes_fetched"])
                # The header, two tables, the disk's own first block, and a window.
                allowed.append(BLOCK + TABLES + FIRST_BLOCK + max(window, MIB))
        samples = {"requests": requests, "bytes": fetched, "allowed": allowed, "answered_s": took_s}
        yield Row(
            "raw-first", f"4 KiB of a cold {kind} qcow2: bytes, most", max(fetched) / MIB, "MiB", samples=samples
        )
        most = max(a / b for a, b in zip(fetched, allowed, strict=True))
        yield Row("raw-first", "  bytes / header, two tables and a window", most, target=1)
        yield Row("raw-first", "  data requests, median", median(requests))
        yield Row("raw-first", "  look-up, open and read", median(took_s) * 1e3, "ms")
    disk.unlink()


def sequential(lab: Lab) -> Iterator[Row]:
    """Each repetition has a new daemon with an empty store. Both sides write the disk to the same disk of ours."""
    disk, size = guest_disk(lab)
    image = uploaded(lab, disk, ["-c"])
    packed = lab.warm_origin(image).stat().st_size
    cpu_s: list[float] = []

    def cachefs() -> float:
        with lab.node(lab.glance.url) as node:
            command = ["dd", f"if={_raw(node, image)}", "of=/dev/null", "bs=1M", "status=none"]
            took_s = _timed(command)
            cpu_s.append(node.cpu_s())
        _settle()
        return took_s

    def curl_and_convert() -> float:
        with lab.scratch() as folder:
            url, file = f"{lab.glance.url}/v2/images/{image}/file", folder / "image"
            took_s = _timed(["curl", "-sSf", "-o", str(file), url])
            took_s += _timed(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(file), str(folder / "raw")])
        _settle()
        return took_s

    disk.unlink()
    ours, theirs = interleaved(3 if lab.quick else 5, cachefs, curl_and_convert)
    samples = {"cachefs_s": ours, "curl_and_convert_s": theirs, "cachefs_cpu_s": cpu_s, "packed": [packed]}
    what = f"dd of a disk of {size // MIB} MiB in a zlib qcow2 of {packed // MIB} MiB"
    yield Row("raw-sequential", what, size / MIB / median(ours), "MiB/s", samples=samples)
    yield Row("raw-sequential", "  curl to a file and qemu-img convert", size / MIB / median(theirs), "MiB/s")
    yield Row("raw-sequential", "  processor time of the daemon", median(cpu_s), "s")
    yield Row("raw-sequential", "  time / their time", ratio(ours, theirs), target=1)


def warm(lab: Lab) -> Iterator[Row]:
    """One store has the disk as a raw image and as a qcow2, all in the page cache."""
    disk, size = guest_disk(lab)
    plain, image = lab.glance.upload("disk", disk), uploaded(lab, disk, ["-c"])
    disk.unlink()
    seconds, repetitions = (1, 5) if lab.quick else (2, 9)
    with lab.node(lab.glance.url) as node:
        larger = node.mountpoint / "resized" / image / str(size + GIB)
        for path in (node.path(plain), _raw(node, image)):
            read_all(path)
        node.wait_idle()
        node.wait_verified()
        for segment in node.segments():
            read_all(segment)
        for what, pattern, length, depth in JOBS:
            base, raw, resized = interleaved(
                repetitions,
                *(
                    partial(iops, path, pattern, length, depth, seconds, node.pid, [], size)
                    for path in (node.path(plain), _raw(node, image), larger)
                ),
            )
            unit, scale = ("MiB/s", length / MIB) if length >= MIB else ("kIOPS", 1e-3)
            yield Row("raw-warm", f"images/: {what}", median(base) * scale, unit)
            for name, samples in (("raw/", raw), ("resized/", resized)):
                both = {"images_iops": base, "iops": samples}
                yield Row(
                    "raw-warm",
                    f"  {name}: speed / its speed",
                    ratio(samples, base),
                    "",
                    Bound.AT_LEAST,
                    0.95,
                    both,
                )


# ── What is read ──────────────────────────────────────────────────────────────────────────────────────


def guest_disk(lab: Lab) -> tuple[Path, int]:
    """A file like the disk of a system: this machine's own programs and libraries, and a quarter of nothing."""
    size = GIB // 2 if lab.quick else GIB
    path = lab.folder / f"guest-disk-{time.monotonic_ns()}"
    with path.open("wb") as made:
        made.truncate(size)
        for source in _files(Path("/usr")):
            data = source.read_bytes()
            if made.tell() + len(data) > size * 3 // 4:
                break
            made.write(data)
            made.seek(-made.tell() % 4096, os.SEEK_CUR)
    return path, size


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 64 * MIB:
                yield path


def uploaded(lab: Lab, disk: Path, flags: list[str]) -> str:
    packed = lab.folder / "packed"
    command = ["qemu-img", "convert", *flags, "-f", "raw", "-O", "qcow2", str(disk), str(packed)]
    subprocess.run(command, check=True)
    image = lab.glance.upload("guest", packed, disk_format="qcow2")
    packed.unlink()
    lab.warm_origin(image)
    return image


def _raw(node: Node, image: str) -> Path:
    return node.mountpoint / "raw" / image


def _read_4k(path: Path, offset: int) -> None:
    page = mmap.mmap(-1, 4096)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        if os.preadv(file, [page], offset) != 4096:
            raise RuntimeError(f"a short read at {offset}")
    finally:
        os.close(file)


def _timed(command: list[str]) -> float:
    began_s = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - began_s


def _settle() -> None:
    """What one side has still to write must not slow the other one down."""
    subprocess.run(["sync"], check=True)
