"""A daemon whose store lies on a disk that fails, hangs, or does not take writes: its readers get their bytes in
time, from Glance where need be, and what the kernel has cached at once. The disk is real to the kernel."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from cachefs.store.check import check
from cachefs.store.health import BAD_PROBES, GOOD_PROBES
from tests import disks, impatient
from tests.disks import MIB, Disk, Does, Fault, On
from tests.impatient import PATIENCE
from tests.node import Node, NodeFailed, drop_pages, read_direct
from tests.origin import OriginImage, ScriptedOrigin, pattern
from tests.resident import held

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(disks.missing_for_disks() is not None, reason=str(disks.missing_for_disks())),
]

IMAGE: Final = "50000000-0000-4000-8000-000000000001"
SIZE: Final = 512 * MIB
BYTES: Final = pattern(SIZE, seed=5)
STORED: Final = 32 * MIB  # This much of the image is in the store when the disk turns bad;
HOT: Final = 2 * MIB  # and this much of that in the page cache.
KIB: Final = 1 << 10
READ: Final = 128 * KIB
GUESTS: Final = 8
DEADLINE_S: Final = 20.0
# A guest may wait for the disk once, and once more where a read of its own helped to find out.
SLOW_S: Final = 2 * PATIENCE.read_s + 3
DOWN_S: Final = PATIENCE.probe_s + (BAD_PROBES + 1) * PATIENCE.probe_every_s + 10
WELL_S: Final = PATIENCE.probe_down_every_s + PATIENCE.probe_s + GOOD_PROBES * PATIENCE.probe_every_s + 10


@pytest.fixture(scope="module")
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([OriginImage(IMAGE, "image", SIZE, BYTES)]) as origin:
        yield origin


@pytest.fixture(params=[True], ids=["journal"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    with Disk(tmp_path, 192 * MIB, journal=request.param) as disk:
        yield disk


without_journal = pytest.mark.parametrize("disk", [False], ids=["no journal"], indirect=True)


@contextmanager
def node_on(disk: Disk, folder: Path, origin: ScriptedOrigin) -> Iterator[Node]:
    """A daemon with its store on the disk, the first STORED bytes of the image in it."""
    with disk.mounted() as mounted:
        node = Node(
            folder,
            origin.url,
            store={"path": mounted / "store", "max_size": "90%"},
            mount={"read_deadline": int(DEADLINE_S)},
            program=impatient.__name__,
        )
        with node:
            for offset in range(0, STORED, MIB):
                assert read_direct(node.path(IMAGE), offset, MIB) == BYTES(offset, MIB)
            node.wait_for_status(lambda now: now["store"]["bytes_cached"] >= STORED)
        with node:  # All of that is committed now.
            assert node.status()["store"]["bytes_cached"] >= STORED
            try:
                yield node
            finally:
                disk.heal()  # Before the end of the node, which may hang in it.


def cool(node: Node) -> list[Path]:
    """The page cache keeps HOT bytes of what is stored, and nothing else; the segments that these are of."""
    # Nobody else's filesystem. One that went read-only says so, and has nothing to write.
    subprocess.run(["sync", "--file-system", str(node.store)], check=False, capture_output=True)
    segments = sorted((node.store / "segments").glob("*.seg"))
    for path in segments:
        drop_pages(path)
    for offset in range(0, HOT, READ):
        assert read(node, offset) < DEADLINE_S
    return segments


@contextmanager
def cooled(node: Node) -> Iterator[None]:
    """The same, and for as long as this lasts the kernel takes none of them back."""
    with ExitStack() as holding:
        assert HOT <= sum(holding.enter_context(held(path)) for path in cool(node)) < STORED // 2
        yield


def read(node: Node, offset: int, length: int = READ) -> float:
    """One read, whose bytes are compared; how long it took, in seconds."""
    began_s = time.monotonic()
    assert read_direct(node.path(IMAGE), offset, length) == BYTES(offset, length), offset
    return time.monotonic() - began_s


def guests(node: Node, start: int, end: int, count: int = 12) -> list[float]:
    """Many guests at once, each with reads of its own, one after the other; how long each of these took."""

    def guest(number: int) -> list[float]:
        rng = random.Random(number)
        return [read(node, rng.randrange(start // READ, end // READ) * READ) for _ in range(count)]

    with ThreadPoolExecutor(GUESTS) as pool:
        return [took_s for times in pool.map(guest, range(GUESTS)) for took_s in times]


def disk_state(now: dict[str, Any]) -> str:
    return str(now["store"]["disk"]["state"])


def wait_for(node: Node, state: str, timeout_s: float) -> dict[str, Any]:
    return node.wait_for_status(lambda now: disk_state(now) == state, timeout_s)


def assert_hits_are_quick(node: Node, origin: ScriptedOrigin) -> None:
    """What the kernel has cached needs neither the disk nor Glance."""
    before = origin.data_requests
    slowest = max(read(node, offset) for offset in range(0, HOT, READ))
    assert slowest < 1.0
    assert origin.data_requests == before


def assert_recovered(node: Node, disk: Disk, origin: ScriptedOrigin, *, lost: int = 0) -> None:
    """The way back: everything that is stored comes from the disk again, but for what `lost` chunks held."""
    disk.heal()
    wait_for(node, "healthy", WELL_S)
    assert node.status()["store"]["rotten_chunks_found"] <= lost
    for offset in range(0, STORED, MIB):
        assert read(node, offset, MIB) < DEADLINE_S
    node.wait_for_status(lambda now: now["store"]["disk"]["why"] is None)
    before = origin.data_requests
    for offset in range(0, STORED, MIB):
        assert read(node, offset, MIB) < SLOW_S
    assert origin.data_requests == before


# ── Reads ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_disk_whose_reads_fail(disk: Disk, tmp_path: Path, origin: ScriptedOrigin) -> None:
    with node_on(disk, tmp_path, origin) as node, cooled(node):
        disk.fault(Fault(On.READ))
        assert max(guests(node, HOT, STORED)) < SLOW_S
        assert disk_state(node.status()) in ("degraded", "down")
        assert_hits_are_quick(node, origin)
        found = wait_for(node, "down", DOWN_S)
        assert found["store"]["disk"]["why"]
        assert max(guests(node, HOT, STORED)) < SLOW_S
        assert max(guests(node, 2 * STORED, SIZE)) < SLOW_S  # What the store never had.
        assert_hits_are_quick(node, origin)
        # The first errors are taken for those of single places, which are fetched again.
        assert_recovered(node, disk, origin, lost=GUESTS + 5)
        said = [line for line in node.log.splitlines() if "of the store's disk" in line]
        assert 3 <= len(said) <= 8, said
    assert_sound(disk, node)


def test_a_disk_that_fails_now_and_then(disk: Disk, tmp_path: Path, origin: ScriptedOrigin) -> None:
    with node_on(disk, tmp_path, origin) as node:
        cool(node)
        disk.fault(Fault(On.READ, probability=0.3))
        for _ in range(4):
            assert max(guests(node, HOT, STORED)) < SLOW_S
        assert disk_state(node.status()) != "healthy"
        assert_recovered(node, disk, origin, lost=100)
    assert_sound(disk, node)


def test_a_disk_whose_reads_hang(disk: Disk, tmp_path: Path, origin: ScriptedOrigin) -> None:
    with node_on(disk, tmp_path, origin) as node, cooled(node):
        disk.fault(Fault(On.READ, Does.HANG))
        took_s = guests(node, HOT, STORED)
        assert max(took_s) < SLOW_S
        assert sum(one_s > PATIENCE.read_s / 2 for one_s in took_s) <= 2 * GUESTS, "nobody waits again and again"
        assert_hits_are_quick(node, origin)
        found = wait_for(node, "down", DOWN_S)
        assert found["store"]["disk"]["reads"]["hung"] > 0
        assert max(guests(node, HOT, STORED)) < PATIENCE.read_s
        assert_hits_are_quick(node, origin)
        assert_recovered(node, disk, origin)
    assert_sound(disk, node)


def test_the_end_of_a_daemon_whose_disk_hangs(disk: Disk, tmp_path: Path, origin: ScriptedOrigin) -> None:
    with node_on(disk, tmp_path, origin) as node:
        cool(node)
        disk.fault(Fault(On.READ, Does.HANG), Fault(On.WRITE, Does.HANG), Fault(On.FLUSH, Does.HANG))
        assert max(guests(node, HOT, STORED, count=2)) < SLOW_S
        assert max(guests(node, 2 * STORED, SIZE, count=2)) < SLOW_S
        os.kill(node.pid, signal.SIGTERM)
        wait_until_unmounted(node, PATIENCE.stop_s)
        # A thread that waits for the disk to take something cannot be ended by anybody: the process goes with it.
        try:
            node.wait_for_end(PATIENCE.stop_s + 5)
        except NodeFailed:
            disk.heal()
            node.wait_for_end(5)
        node.kill()
    assert_sound(disk, node)


def wait_until_unmounted(node: Node, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while node.mounted:
        assert time.monotonic() < until, node.log
        time.sleep(0.05)


# ── Writes ────────────────────────────────────────────────────────────────────────────────────────────


@without_journal
def test_a_disk_that_takes_no_writes(disk: Disk, tmp_path: Path, origin: ScriptedOrigin) -> None:
    with node_on(disk, tmp_path, origin) as node:
        disk.fault(Fault(On.WRITE), Fault(On.FLUSH))
        rise = offsets_from(2 * STORED)
        read_until(node, rise, lambda now: now["store"]["disk"]["writes"]["state"] == "down", 90)
        assert node.status()["store"]["disk"]["reads"]["state"] == "healthy"
        before = origin.data_requests
        assert max(guests(node, 0, STORED)) < 1.0, "what is stored is read"
        assert origin.data_requests == before
        disk.heal()
        wait_for(node, "healthy", WELL_S)
        kept = node.status()["store"]["bytes_cached"]
        read_until(node, rise, lambda now: now["store"]["bytes_cached"] > kept, 60)
    assert_sound(disk, node)


def test_a_filesystem_that_went_read_only_gives_what_it_has(
    disk: Disk, tmp_path: Path, origin: ScriptedOrigin
) -> None:
    """What ext4 does when its journal cannot be written. Only a mount mends that."""
    with node_on(disk, tmp_path, origin) as node:
        disk.fault(Fault(On.WRITE))
        rise = offsets_from(2 * STORED)
        read_until(node, rise, lambda now: now["store"]["disk"]["writes"]["state"] == "down", 90)
        disk.heal()
        cool(node)
        before = origin.data_requests
        assert max(guests(node, 0, STORED)) < SLOW_S
        assert origin.data_requests == before
        assert node.status()["store"]["disk"]["reads"]["state"] == "healthy"


def test_a_disk_that_never_ends_a_flush(disk: Disk, tmp_path: Path, origin: ScriptedOrigin) -> None:
    """Far more is read than memory holds of what waits to be kept."""
    with node_on(disk, tmp_path, origin) as node:
        disk.fault(Fault(On.FLUSH, Does.HANG), Fault(On.WRITE, Does.HANG))
        began_s = time.monotonic()
        slowest = 0.0
        for offset in offsets_from(2 * STORED):
            slowest = max(slowest, read(node, offset, MIB))
            if time.monotonic() > began_s + PATIENCE.write_s + 10:
                break
        assert slowest < DEADLINE_S
        found = node.status()["store"]["disk"]["writes"]
        assert (found["state"], found["hung"]) != ("healthy", 0)
        assert max(guests(node, 0, STORED)) < SLOW_S
        disk.heal()
        wait_for(node, "healthy", WELL_S)
    assert_sound(disk, node)


def offsets_from(start: int) -> Iterator[int]:
    """Of MiBs, for ever."""
    while True:
        yield from range(start, SIZE, MIB)


def read_until(
    node: Node, offsets: Iterator[int], holds: Callable[[dict[str, Any]], bool], timeout_s: float
) -> None:
    """Reads what the store does not have, all of it right and in time, until the status says so."""
    until = time.monotonic() + timeout_s
    while not holds(now := node.status()):
        assert time.monotonic() < until, f"status {now}\n{node.log}"
        assert read(node, next(offsets), MIB) < DEADLINE_S


def assert_sound(disk: Disk, node: Node) -> None:
    with disk.mounted():
        report = check(node.store)
    assert report.sound, [str(finding) for finding in report.findings]
