"""A store on a small filesystem which others fill and empty meanwhile: readers hear nothing of it, and the store
keeps to its limits at every moment, and gives way."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from cachefs.store.check import check
from cachefs.store.writer import GROUP_BYTES
from tests import disks, stores
from tests.cloud.service import poll_until
from tests.disks import MIB
from tests.node import Node, read_direct
from tests.origin import OriginImage, ScriptedOrigin, pattern

pytestmark = [pytest.mark.mount, pytest.mark.loop]

DISK: Final = 256 * MIB
MAX_SIZE, MIN_FREE = 96 * MIB, 48 * MIB
IMAGE_SIZE: Final = 24 * MIB
IMAGES: Final = [f"60000000-0000-4000-8000-{n:012d}" for n in range(16)]
CONTENTS: Final = {image: pattern(IMAGE_SIZE, seed=n) for n, image in enumerate(IMAGES)}
READERS: Final = 6
READ: Final = MIB
# What may be on its way when the limit is met: one group that lands, what the filesystem needs to note it, and
# what was granted before others took it (an eighth of what was left).
IN_FLIGHT: Final = GROUP_BYTES + 4 * MIB + MAX_SIZE // 8
INDEX_PAGES: Final = 1 * MIB
RUN_S: Final = 20.0 * stores.HUNT
GIVES_WAY_S: Final = 60.0


@pytest.fixture
def filesystem(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of DISK bytes, on a loop device over memory."""
    with disks.small_ext4(tmp_path / "disk", DISK) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def origin() -> Iterator[ScriptedOrigin]:
    images = [OriginImage(image, None, IMAGE_SIZE, content) for image, content in CONTENTS.items()]
    with ScriptedOrigin(images) as origin:
        yield origin


@pytest.fixture
def node(tmp_path: Path, filesystem: Path, origin: ScriptedOrigin) -> Node:
    limits = {"max_size": MAX_SIZE, "min_free": MIN_FREE}
    return Node(tmp_path, origin.url, store={"path": filesystem / "store", **limits})


@dataclass(frozen=True)
class Sample:
    """Bytes, by the filesystem's own word."""

    used: int
    free: int

    @property
    def limit(self) -> int:
        return min(MAX_SIZE, self.used + self.free - MIN_FREE)


def sample(store: Path) -> Sample:
    used = sum(
        path.stat().st_blocks * 512 for path in (*(store / "segments").glob("*.seg"), store / "index" / "data.mdb")
    )
    found = os.statvfs(store)
    return Sample(used, found.f_bavail * found.f_frsize)


class Neighbour:
    """Somebody else's file on the same filesystem."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ballast"
        self.size = 0

    def resize(self, size: int) -> None:
        """As large as `size` bytes, or as the filesystem can take."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, min(size, os.fstat(file).st_size))
            step = MIB
            while step >= 4096 and (at := os.fstat(file).st_size) < size:
                try:
                    os.posix_fallocate(file, at, min(step, size - at))
                except OSError:  # Full: to the last page.
                    step //= 2
        finally:
            self.size = os.fstat(file).st_size
            os.close(file)


@contextmanager
def going_on(*works: Callable[[], None]) -> Iterator[None]:
    """Repeats each work in a thread of its own until the end, which raises what one of them raised."""
    over = threading.Event()

    def again(work: Callable[[], None]) -> int:
        times = 0
        while not over.is_set():
            work()
            times += 1
        return times

    with ThreadPoolExecutor(len(works)) as pool:
        threads = [pool.submit(again, work) for work in works]
        try:
            yield
        finally:
            over.set()
        assert all(thread.result() for thread in threads)


def reader(node: Node, number: int) -> Callable[[], None]:
    """A guest that boots from one image after another."""
    rng = random.Random(number)

    def read_some() -> None:
        image = rng.choice(IMAGES)
        for _ in range(8):
            offset = rng.randrange(IMAGE_SIZE // READ) * READ
            assert read_direct(node.path(image), offset, READ) == CONTENTS[image](offset, READ), (image, offset)

    return read_some


def test_others_fill_the_disk_and_leave_it_again(filesystem: Path, node: Node) -> None:
    rng = random.Random(1)
    neighbour = Neighbour(filesystem)
    samples: list[Sample] = []

    def look() -> None:
        samples.append(sample(node.store))
        time.sleep(0.02)

    with node:
        with going_on(look, *(reader(node, n) for n in range(READERS))):
            until = time.monotonic() + RUN_S
            while time.monotonic() < until:
                neighbour.resize(rng.choice((0, DISK // 4, DISK // 2, DISK * 3 // 4, DISK)))
                time.sleep(rng.uniform(0.1, 1.0))
            # Whoever stays is made room for, while everybody reads on.
            neighbour.resize(0)
            neighbour.resize(DISK - MAX_SIZE)
            assert poll_until(lambda: sample(node.store).free >= MIN_FREE, GIVES_WAY_S), sample(node.store)
        assert poll_until(lambda: sample(node.store).used <= sample(node.store).limit, GIVES_WAY_S)
        assert max(found.used for found in samples) > MAX_SIZE // 2, "there was something to bound"
        print(f"at most {max(found.used - found.limit for found in samples) >> 10} KiB above the limit")
        assert max(found.used for found in samples) <= MAX_SIZE + IN_FLIGHT
        for before, after in pairwise(samples):
            grew = after.used - before.used
            # Evicting writes some pages of the index before it frees any.
            assert grew <= INDEX_PAGES or before.used <= before.limit + IN_FLIGHT, "it grows where nothing is left"
        # Space comes back for the store, too.
        neighbour.resize(0)
        node.wait_for_status(lambda now: now["store"]["trouble"] is None, 60)
    report = check(node.store)
    assert report.sound, [str(finding) for finding in report.findings]


def test_others_take_the_last_byte_and_keep_it(filesystem: Path, node: Node) -> None:
    """To free anything takes a commit, and a commit takes room."""
    neighbour = Neighbour(filesystem)
    with node:
        for image in IMAGES[:3]:
            for offset in range(0, IMAGE_SIZE, READ):
                assert read_direct(node.path(image), offset, READ) == CONTENTS[image](offset, READ)
        with going_on(*(reader(node, n) for n in range(READERS))):
            neighbour.resize(DISK)
            assert poll_until(lambda: sample(node.store).free >= MIN_FREE // 2, GIVES_WAY_S), sample(node.store)
    report = check(node.store)
    assert report.sound, [str(finding) for finding in report.findings]


def test_a_limit_that_many_writers_meet(node: Node) -> None:
    """The bound holds at every moment, and what was read last is there."""
    samples: list[Sample] = []

    def look() -> None:
        samples.append(sample(node.store))
        time.sleep(0.005)

    with node:
        with going_on(look), ThreadPoolExecutor(READERS) as pool:

            def read_whole(image: str) -> None:
                for offset in range(0, IMAGE_SIZE, READ):
                    assert read_direct(node.path(image), offset, READ) == CONTENTS[image](offset, READ)

            list(pool.map(read_whole, IMAGES * 2))
        print(f"at most {max(found.used for found in samples) - MAX_SIZE >> 10} KiB above max_size")
        assert MAX_SIZE // 2 < max(found.used for found in samples) <= MAX_SIZE + IN_FLIGHT
        assert min(found.free for found in samples) >= MIN_FREE - IN_FLIGHT
        assert node.status()["store"]["bytes_cached"] > MAX_SIZE // 2
    report = check(node.store)
    assert report.sound, [str(finding) for finding in report.findings]
