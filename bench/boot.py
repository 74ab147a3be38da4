"""Guests boot from an image that the node does not have: a recorded boot replayed through the mount, against the
download that it need not wait for. Rule: both sides take the same link, and every replay reads the right bytes.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from bench import boot_list
from bench.boot_replay import Replaying, replay
from bench.lab import MIB, Lab
from bench.link import LOOPBACK, Link
from bench.node import Node
from bench.table import Row

LINKS = (("200 Mbit/s, 30 ms", 200e6, 0.030, 0.35), ("2.5 Gbit/s, 1 ms", 2.5e9, 0.001, 0.75))
TRACE_TARGET, GUESTS, GUESTS_TARGET = 1.2, 4, 1.2
# Over the fast link a boot from a local file alone takes longer than that.
PACKED_TARGETS = (0.5, None)
# As it is delivered, and without what is fetched besides: so what the origin gave can be compared.
ON_OPEN: dict[str, Any] = {"hydration": {"mode": None}}
MANUAL: dict[str, Any] = {"hydration": {"mode": "manual"}}


@dataclass(frozen=True)
class Local:
    """A replay from a file of this machine: seconds, and the checksum that every replay is to have."""

    took_s: float
    checksum: int


@dataclass(frozen=True)
class Cold:
    """A replay from an image that was not here. `fetched` bytes and `requests` when the last guest was done."""

    took_s: float
    fetched: int
    requests: int
    slowest_s: float


def cold(lab: Lab) -> Iterator[Row]:
    """Each try has a new daemon with an empty store, as it is delivered: it also fetches the rest of the image."""
    image = raw_image(lab)
    for where, rate, round_trip_s, target in LINKS:
        with Link(lab.glance.port, rate, round_trip_s) as link:
            whole_s = _downloaded(lab, link, image)
            tries = [_cold(lab, link, "images", image) for _ in range(1 if lab.quick else 3)]
        took_s = median(each.took_s for each in tries)
        there_s = whole_s + local(lab).took_s
        yield Row(
            "boot-cold",
            f"{where}: boot of an image that is not here: {took_s:.1f} s / download and boot: {there_s:.1f} s",
            took_s / there_s,
            target=target,
            samples=_samples(tries, download_s=whole_s, local_s=local(lab).took_s),
        )


def four(lab: Lab) -> Iterator[Row]:
    """Four guests start from one image at once, and one alone. Without hydration, so that what came is what they
    needed."""
    image = raw_image(lab)
    for where, rate, round_trip_s, _ in LINKS:
        with Link(lab.glance.port, rate, round_trip_s) as link:
            one, many = [
                [_cold(lab, link, "images", image, guests, MANUAL) for _ in range(1 if lab.quick else 3)]
                for guests in (1, GUESTS)
            ]
        for what, ratio in (
            ("time / one's", median(t.took_s for t in many) / median(t.took_s for t in one)),
            ("bytes from the origin / one's", median(t.fetched for t in many) / median(t.fetched for t in one)),
        ):
            samples = {"one": _samples(one), "four": _samples(many)}
            yield Row(
                "boot-four",
                f"{where}: {GUESTS} boots at once: {what}",
                ratio,
                target=GUESTS_TARGET,
                samples=samples,
            )


def packed(lab: Lab) -> Iterator[Row]:
    """The same disk as a zlib qcow2, booted through raw/; and downloaded, converted and booted."""
    image = packed_image(lab)
    for (where, rate, round_trip_s, _), target in zip(LINKS, PACKED_TARGETS, strict=True):
        with Link(lab.glance.port, rate, round_trip_s) as link:
            whole_s = _downloaded(lab, link, image, convert=True)
            tries = [_cold(lab, link, "raw", image) for _ in range(1 if lab.quick else 3)]
        took_s = median(each.took_s for each in tries)
        there_s = whole_s + local(lab).took_s
        yield Row(
            "boot-qcow2",
            f"{where}: boot from a zlib qcow2: {took_s:.1f} s / download, convert and boot: {there_s:.1f} s",
            took_s / there_s,
            target=target,
            samples=_samples(tries, download_s=whole_s, local_s=local(lab).took_s),
        )
        yield Row("boot-qcow2", "  a local boot alone / download, convert and boot", local(lab).took_s / there_s)


def traced(lab: Lab) -> Iterator[Row]:
    """The node knows what a boot reads from a trace that another node has recorded and exported. It is as
    delivered, and also fetches the rest of the image."""
    image = raw_image(lab)
    exported, size = _trace_of(lab, image)
    warm_s: list[float] = []
    for where, rate, round_trip_s, _ in LINKS:
        tries = []
        with Link(lab.glance.port, rate, round_trip_s) as link:
            for _ in range(1 if lab.quick else 3):
                with lab.node(f"http://{LOOPBACK}:{link.port}", **ON_OPEN) as node:
                    _said(node.cli("trace", "import", str(exported)))
                    tries.append(boot(lab, node, "images", image))
                    warm_s.append(boot(lab, node, "images", image).took_s)
        took_s, least_s = median(each.took_s for each in tries), max(size * 8 / rate, local(lab).took_s)
        yield Row(
            "boot-trace",
            f"{where}: boot with an imported trace of {size // MIB} MiB: {took_s:.1f} s / the longer of its way "
            f"over the link and a local boot: {least_s:.1f} s",
            took_s / least_s,
            target=TRACE_TARGET,
            samples=_samples(tries, trace_bytes=size, local_s=local(lab).took_s),
        )
    yield Row(
        "boot-trace",
        f"the next boot from the mount, while the rest is fetched: {median(warm_s):.1f} s / a local boot",
        median(warm_s) / local(lab).took_s,
        samples={"warm_s": warm_s},
    )


def _trace_of(lab: Lab, image: str) -> tuple[Path, int]:
    """A trace's file, and the bytes of the image that it names: recorded by another node, close to Glance."""
    exported = lab.folder / "boot.trace"
    with lab.node(lab.glance.url, **MANUAL) as node:
        boot(lab, node, "images", image)
        node.restart()  # What is being recorded is written down.
        _said(node.cli("trace", "export", image, "-o", str(exported)))
        blocks = sum(row["blocks"] for row in node.ask("trace-list") if image in row["images"])
    lab.say(f"a trace of {blocks} blocks, a file of {exported.stat().st_size / 1024:.1f} KiB")
    return exported, blocks * boot_list.BLOCK


def _said(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise RuntimeError(f"{done.args}: {done.stdout}{done.stderr}")


# ── What is booted ────────────────────────────────────────────────────────────────────────────────────


@cache
def recorded() -> boot_list.Boot:
    return boot_list.load(boot_list.DEBIAN)


@cache
def raw_image(lab: Lab) -> str:
    """In Glance, in its page cache."""
    lab.say(f"making a disk: {boot_list.summary(recorded())}")
    image = lab.glance.upload("boot", _disk(lab))
    lab.warm_origin(image)
    return image


@cache
def packed_image(lab: Lab) -> str:
    file = lab.folder / "boot.qcow2"
    _run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", _disk(lab), file)
    image = lab.glance.upload("boot", file, disk_format="qcow2")
    lab.say(f"{file.stat().st_size // MIB} MiB as a zlib qcow2")
    file.unlink()
    lab.warm_origin(image)
    return image


@cache
def local(lab: Lab) -> Local:
    """The median of three."""
    tries = [replay(_disk(lab)) for _ in range(3)]
    return Local(median(each.took_s for each in tries), tries[0].checksum)


@cache
def _disk(lab: Lab) -> Path:
    path = lab.folder / "boot.raw"
    boot_list.make_image(recorded(), path)
    return path


# ── Boots ─────────────────────────────────────────────────────────────────────────────────────────────


def _cold(lab: Lab, link: Link, view: str, image: str, guests: int = 1, sections: Any = ON_OPEN) -> Cold:
    with lab.node(f"http://{LOOPBACK}:{link.port}", **sections) as node:
        return boot(lab, node, view, image, guests)


def boot(lab: Lab, node: Node, view: str, image: str, guests: int = 1) -> Cold:
    """Each guest is a process of its own; the time is the slowest's, from its open on."""
    path = node.mountpoint / view / image
    done = [guest.finish() for guest in [Replaying(path) for _ in range(guests)]]
    if any(each.checksum != local(lab).checksum for each in done):
        raise RuntimeError("a replay read something else than the disk")
    counts = node.status()["fetcher"]
    took_s = max(each.took_s for each in done)
    slowest_s = max(max(each.reads_s) for each in done)
    lab.say(
        f"{guests} × {view}: {took_s:.2f} s, {counts['bytes_fetched'] / MIB:.0f} MiB in {counts['requests']} "
        f"requests, slowest read {slowest_s:.2f} s"
    )
    return Cold(took_s, counts["bytes_fetched"], counts["requests"], slowest_s)


def _downloaded(lab: Lab, link: Link, image: str, convert: bool = False) -> float:
    """Seconds until a file of this machine has the disk."""
    with lab.scratch() as folder:
        url = f"http://{LOOPBACK}:{link.port}/v2/images/{image}/file"
        began_s = time.monotonic()
        _run("curl", "-sSf", "-o", folder / "image", url)
        if convert:
            _run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", folder / "image", folder / "raw")
        took_s = time.monotonic() - began_s
        lab.say(f"{'downloaded and converted' if convert else 'downloaded'} in {took_s:.1f} s")
    _run("sync")
    return took_s


def _samples(tries: list[Cold], **more: float) -> dict[str, Any]:
    return {"tries": [vars(each) for each in tries], **more}


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)
