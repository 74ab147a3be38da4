"""Opening a warm image where ten thousand are known, against one where few are."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from statistics import median
from uuid import UUID

from bench.lab import KIB, Lab
from bench.node import Node
from bench.table import Row, interleaved, ratio
from tests.origin import OriginImage, ScriptedOrigin, pattern

MANY, FEW = 10_000, 256
SIZE = 64 * KIB
REPETITIONS = 7
OPENS = 2000
LISTING_MAX_S = 120

# What is opened was asked about when it was listed: Glance has no part in what is measured.
OPTIONS = {"listing_ttl": 86400}


def run(lab: Lab) -> Iterator[Row]:
    """All reads are O_DIRECT, so that the daemon is asked for each open and each read; and for each name once,
    in the second measurement, whose mounts are new."""
    content = pattern(SIZE)
    images = [OriginImage(str(UUID(int=i + 1)), f"image-{i}", SIZE, content) for i in range(MANY)]
    few = [image.id for image in images[:FEW]]
    with (
        ScriptedOrigin(images[:1]) as of_one,
        ScriptedOrigin(images[:FEW]) as of_few,
        ScriptedOrigin(images) as of_many,
        lab.node(of_one.url, glance=OPTIONS) as one,
        lab.node(of_few.url, glance=OPTIONS) as some,
        lab.node(of_many.url, glance=OPTIONS) as many,
    ):
        for node, known in ((one, 1), (some, FEW), (many, MANY)):
            _list(node, known)
            lab.say(f"many-images: {known} are known, the daemon has {node.memory() >> 20} MiB")
            for image in few[:known]:
                _open_and_read(node, image)
            node.wait_idle()
        opens = OPENS // 4 if lab.quick else OPENS
        with_one, with_many = interleaved(
            REPETITIONS, lambda: _again(one, few[0], opens), lambda: _again(many, few[0], opens)
        )
        yield Row("many-images", "open, read 4 KiB, close: 1 image known", median(with_one) * 1e6, "µs")
        yield Row("many-images", "  10,000 known", median(with_many) * 1e6, "µs")
        yield Row(
            "many-images",
            "  ratio",
            ratio(with_many, with_one),
            target=1.2,
            samples={"one_s": with_one, "many_s": with_many},
        )
        with_few, with_many = interleaved(
            1 if lab.quick else 3, lambda: _anew(some, few, FEW), lambda: _anew(many, few, MANY)
        )
        yield Row("many-images", f"the same by names never asked for: {FEW} known", median(with_few) * 1e6, "µs")
        yield Row("many-images", "  10,000 known", median(with_many) * 1e6, "µs")
        yield Row(
            "many-images",
            "  ratio",
            ratio(with_many, with_few),
            target=1.2,
            samples={"few_s": with_few, "many_s": with_many},
        )


def _list(node: Node, known: int) -> None:
    """Has Glance listed. Not through the mount: readdirplus would tell the kernel all names."""
    deadline_s = time.monotonic() + LISTING_MAX_S
    while len(node.ask("images")) != known:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{node.known_images()} of {known} images are known")
        time.sleep(0.1)


def _again(node: Node, image: str, opens: int) -> float:
    return median(_open_and_read(node, image) for _ in range(opens))


def _anew(node: Node, images: list[str], known: int) -> float:
    node.restart()
    _list(node, known)
    return median(_open_and_read(node, image) for image in images)


_page = mmap.mmap(-1, 4096)  # O_DIRECT wants it aligned.


def _open_and_read(node: Node, image: str) -> float:
    path = os.path.join(node.mountpoint, "images", image)
    began_s = time.perf_counter()
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        if os.preadv(file, [_page], 0) != 4096:
            raise RuntimeError("a short read")
    finally:
        os.close(file)
    return time.perf_counter() - began_s
