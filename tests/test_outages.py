"""A real Glance that stops, is killed, restarts, refuses, deletes, deactivates and lies in the middle of a guest's
reads: right bytes, or EIO by the deadline; what is leased and here whole never notices.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests import cloud
from tests.cloud.service import poll_until
from tests.conftest import KeystoneCloud
from tests.node import Node, errno_of, read_direct
from tests.origin import pattern

pytestmark = [pytest.mark.cloud, pytest.mark.mount]

MIB: Final = 1 << 20
BLOCK: Final = 64 << 10
SIZE: Final = 8 * MIB
DEADLINE_S: Final = 5.0
FAR: Final = 6 * MIB


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloud.Glance]:
    """A Glance to stop, kill and start again; it runs when a test ends."""
    with cloud.Glance(tmp_path_factory.mktemp("glance")) as glance:
        yield glance


def data_of(seed: int) -> bytes:
    return pattern(SIZE, 4000 + seed)(0, SIZE)


class Guest:
    """One who reads an image block by block, past the page cache, over and over, in a thread of its own. What was
    wrong stands in `failures`; `slowest_s` is of one read."""

    def __init__(self, path: Path, data: bytes, *, step: int = BLOCK, pause_s: float = 0.0) -> None:
        self._path, self._data, self._step, self._pause_s = path, data, step, pause_s
        self.slowest_s, self.reads = 0.0, 0
        self.failures: list[str] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Guest:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._ends.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def has_read(self, times: int) -> bool:
        return self.reads >= times

    def _run(self) -> None:
        file = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, BLOCK) as room:
                while not self._ends.is_set():
                    for offset in range(0, SIZE, self._step):
                        self._read(file, room, offset)
                        if self._ends.wait(self._pause_s):
                            return
        finally:
            os.close(file)

    def _read(self, file: int, room: mmap.mmap, offset: int) -> None:
        began_s = time.monotonic()
        try:
            n = os.preadv(file, [room], offset)
        except OSError as error:
            self.failures.append(f"{errno.errorcode[error.errno or 0]} at {offset}")
        else:
            if room[:n] != self._data[offset : offset + n]:
                self.failures.append(f"wrong bytes at {offset}")
        self.reads += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)


@contextmanager
def open_direct(path: Path) -> Iterator[Callable[[int], bytes]]:
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as room:
            yield lambda offset: room[: os.preadv(file, [room], offset)]
    finally:
        os.close(file)


def eio_by_the_deadline(read: Callable[[], object]) -> float:
    """How long it took."""
    began_s = time.monotonic()
    assert errno_of(read) == errno.EIO
    took_s = time.monotonic() - began_s
    assert took_s < DEADLINE_S + 3
    return took_s


def held_whole(node: Node, image: str, *, pin: bool = True) -> None:
    """All of it is here and was compared with its hash."""
    if pin:
        assert node.cli("pin", image).returncode == 0
    assert node.cli("prefetch", "--wait", image).returncode == 0
    assert poll_until(lambda: state_of(node, image) == "verified", 30)


def state_of(node: Node, image: str) -> str:
    return os.getxattr(node.path(image), "user.cachefs.state").decode()


def test_a_glance_that_stops_is_killed_and_restarts_while_guests_read(tmp_path: Path, own: cloud.Glance) -> None:
    glance = own
    cold, warm = glance.upload("cold", data_of(1)), glance.upload("warm", data_of(2))
    node = Node(tmp_path, glance.endpoint, mount={"read_deadline": 60}, glance={"connections": 2})
    with node:
        held_whole(node, warm)
        read_direct(node.path(cold), 0, 4096)
        with (
            Guest(node.path(warm), data_of(2), pause_s=0.001) as well,
            Guest(node.path(cold), data_of(1), pause_s=0.05) as waits,
        ):
            for end in (glance.stop, glance.kill):
                end()
                node.wait_for_log("left alone after")
                glance.start()
                seen = waits.reads
                assert poll_until(partial(waits.has_read, seen + 4), 60), node.log
            assert poll_until(partial(waits.has_read, SIZE // BLOCK), 60)
        assert (well.failures, waits.failures) == ([], [])
        assert well.slowest_s < 5, "it waits for nobody"
        assert state_of(node, warm) == "verified"


def test_a_glance_that_stays_away(tmp_path: Path, own: cloud.Glance) -> None:
    """Miss after miss fails by the deadline, with a reason; a restarted daemon lists and reads what is here."""
    glance = own
    cold, warm = glance.upload("cold", data_of(3)), glance.upload("warm", data_of(4))
    node = Node(tmp_path, glance.endpoint, mount={"read_deadline": DEADLINE_S}, glance={"connections": 2})
    with node:
        held_whole(node, warm)
        with open_direct(node.path(cold)) as read:
            assert read(0) == data_of(3)[:4096]
            node.wait_for_status(lambda now: now["fetcher"]["flights"] == 0)
            glance.stop()
            assert eio_by_the_deadline(lambda: read(FAR)) > DEADLINE_S / 2, "a guest would rather wait"
            assert read(0) == data_of(3)[:4096]
            (endpoint,) = node.status()["origin"]["endpoints"]
            assert endpoint["state"] in ("open", "half-open")
            assert "refused" in endpoint["last_error"]
            assert "is left alone" in node.cli("status").stdout
        assert node.log.count("left alone after") == 1, node.log
    with node:
        began_s = time.monotonic()
        assert {cold, warm} <= set(os.listdir(node.mountpoint / "images"))
        assert node.path(warm).read_bytes() == data_of(4)
        assert time.monotonic() - began_s < 8
        assert read_direct(node.path(cold), 0, 4096) == data_of(3)[:4096]
        eio_by_the_deadline(lambda: read_direct(node.path(cold), FAR, 4096))
        unknown = "60000000-0000-4000-8000-00000000dead"
        assert errno_of(node.path(unknown).stat) == errno.EIO
        glance.start()
        node.wait_for_status(lambda now: now["origin"]["endpoints"][0]["state"] == "closed")
        assert read_direct(node.path(cold), FAR, 4096) == data_of(3)[FAR : FAR + 4096]
        assert poll_until(lambda: errno_of(node.path(unknown).stat) == errno.ENOENT, 30)


def test_credentials_are_revoked_while_guests_read(tmp_path: Path, keystone_cloud: KeystoneCloud) -> None:
    keystone, glance = keystone_cloud.keystone, keystone_cloud.glance
    cold = glance.upload("revoked cold", data_of(5), visibility="community")
    warm = glance.upload("revoked warm", data_of(6), visibility="community")
    options = keystone.application_credential_options("cachefs")
    node = Node(tmp_path, mount={"read_deadline": DEADLINE_S}, glance=options | {"connections": 2})
    with node:
        held_whole(node, warm)
        with (
            open_direct(node.path(cold)) as read,
            Guest(node.path(warm), data_of(6), pause_s=0.001) as well,
        ):
            assert read(0) == data_of(5)[:4096]
            node.wait_for_status(lambda now: now["fetcher"]["flights"] == 0)
            keystone.delete_application_credential("cachefs", options["application_credential_id"])
            keystone.revoke_tokens("cachefs")
            for _ in range(3):
                eio_by_the_deadline(lambda: read(FAR))
            assert read(0) == data_of(5)[:4096]
            origin = node.status()["origin"]
            assert origin["identity"]["trouble"]
            assert [endpoint["state"] for endpoint in origin["endpoints"]] == ["closed"]
            assert "no token that is good" in node.log
        assert well.failures == []
        assert cold in os.listdir(node.mountpoint / "images")
        with open_direct(node.path(warm)) as read:
            assert read(FAR) == data_of(6)[FAR : FAR + 4096]
        assert node.log.count("no token that is good") == 1


def overlay(folder: Path, backing: Path, name: str) -> Path:
    """The disk of an instance that stands on `backing`."""
    folder.mkdir(parents=True, exist_ok=True)
    disk = folder / name
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(backing), str(disk), "64M"]
    subprocess.run(command, check=True, capture_output=True)
    return disk


def is_named(node: Node, image: str) -> bool:
    """Whether a disk was seen that stands on it."""
    return "named by an instance disk" in str(node.ask("image", image=image)["leases"])


def test_an_image_that_is_deleted_is_still_what_its_instances_stand_on(
    tmp_path: Path, glance: cloud.Glance
) -> None:
    """By a pin, and by the disk of an instance that is stopped; also after a restart, with Glance there."""
    pinned, stands, part = (glance.upload(f"ends {n}", data_of(n)) for n in (10, 11, 12))
    instances = tmp_path / "instances"
    node = Node(tmp_path, glance.endpoint, mount={"read_deadline": DEADLINE_S}, glance={"listing_ttl": 0})
    node.configure(leases={"folders": instances, "interval": 1})
    with node:
        held_whole(node, pinned)
        held_whole(node, stands, pin=False)
        overlay(instances / "one", node.path(stands), "disk")
        assert poll_until(lambda: is_named(node, stands), 30)
        assert node.cli("pin", part).returncode == 0
        read_direct(node.path(part), 0, 4096)
        with Guest(node.path(stands), data_of(11), pause_s=0.001) as running:
            for image in (pinned, stands, part):
                glance.delete(image)
                errno_of(partial(read_direct, node.path(image), 0, 4096))
        assert running.failures == []
        for image, n in ((pinned, 10), (stands, 11)):
            assert node.path(image).read_bytes() == data_of(n)
            assert state_of(node, image) == "gone"
            assert image not in os.listdir(node.mountpoint / "images")
        assert eio_by_the_deadline(lambda: read_direct(node.path(part), FAR, 4096)) < 5, "it is known to be gone"
        assert "gone" in node.cli("images").stdout
    node.configure(hydration={"mode": "on-open"})
    with node:
        for image, n in ((pinned, 10), (stands, 11)):
            assert read_direct(node.path(image), FAR, 4096) == data_of(n)[FAR : FAR + 4096]
            assert state_of(node, image) == "gone"
        node.wait_for_status(lambda now: part in now["hydration"]["at_risk"])
        assert node.cli("unpin", pinned).returncode == 0
        assert poll_until(lambda: errno_of(lambda: read_direct(node.path(pinned), 0, 4096)) == errno.ENOENT, 30)
        assert read_direct(node.path(stands), FAR, 4096) == data_of(11)[FAR : FAR + 4096]


def test_a_deactivated_image_is_opened_again_by_the_instance_that_stands_on_it(
    tmp_path: Path, keystone_cloud: KeystoneCloud
) -> None:
    glance = keystone_cloud.glance
    stands = glance.upload("stands", data_of(20), visibility="community")
    pinned = glance.upload("only pinned", data_of(21), visibility="community")
    instances = tmp_path / "instances"
    options = keystone_cloud.keystone.password_options("cachefs")
    node = Node(tmp_path, mount={"read_deadline": DEADLINE_S}, glance=options | {"listing_ttl": 0})
    node.configure(leases={"folders": instances, "interval": 1})
    with node:
        held_whole(node, stands, pin=False)
        held_whole(node, pinned)
        overlay(instances / "one", node.path(stands), "disk")
        assert poll_until(lambda: is_named(node, stands), 30)
        with Guest(node.path(pinned), data_of(21), pause_s=0.001) as had_it_open:
            for image in (stands, pinned):
                glance.deactivate(image)
            assert errno_of(lambda: read_direct(node.path(pinned), 0, 4096)) == errno.EACCES
            assert read_direct(node.path(stands), FAR, 4096) == data_of(20)[FAR : FAR + 4096]
        assert had_it_open.failures == []


def test_an_upload_that_was_corrupted_is_condemned_and_nothing_of_it_served(
    tmp_path: Path, glance: cloud.Glance
) -> None:
    image = glance.upload("corrupted", data_of(30))
    file = glance.data_path(image)
    corrupted = bytearray(data_of(30))
    corrupted[FAR + 17] ^= 0x40
    file.write_bytes(corrupted)
    with Node(tmp_path, glance.endpoint, mount={"read_deadline": DEADLINE_S}) as node:
        path = node.path(image)
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert os.pread(opened.fileno(), MIB, 0) == data_of(30)[:MIB]  # The kernel has these now.
            assert mapped[:4096] == data_of(30)[:4096]
            node.cli("prefetch", "--wait", image)
            node.wait_for_log("CONDEMNED")
            assert image in next(line for line in node.log.splitlines() if "CONDEMNED" in line)
            assert poll_until(lambda: errno_of(lambda: os.pread(opened.fileno(), 4096, 0)) == errno.EIO, 10)
            for offset in range(0, SIZE, MIB):
                assert errno_of(partial(os.pread, opened.fileno(), 4096, offset)) == errno.EIO
        assert errno_of(lambda: read_direct(path, 0, 4096)) == errno.EIO
        assert state_of(node, image) == "condemned"
        assert node.status()["verification"]["condemned"] == 1
        assert poll_until(lambda: node.status()["store"]["bytes_cached"] == 0, 30)
    with node:  # It stays condemned, and is not fetched again.
        assert errno_of(lambda: read_direct(path, 0, 4096)) == errno.EIO
        assert node.status()["fetcher"]["requests"] == 0
