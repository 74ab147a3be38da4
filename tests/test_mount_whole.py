"""Images come whole and are compared with Glance's hash, with a real daemon. Rule: what is asserted is bytes,
states, and what the origin was asked for.
"""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cloud.service import poll_until
from tests.instance_disks import make_disk
from tests.node import Node, read_direct
from tests.origin import Kind, OriginImage, ScriptedOrigin, Status, pattern
from tests.qcow2_zoo import missing_qemu, qemu

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE: Final = 24 * MIB + 12345
IMAGES: Final = [f"80000000-0000-4000-8000-00000000000{n}" for n in range(3)]
BYTES = pattern(len(IMAGES) * SIZE)


def content(image: str, offset: int, length: int) -> bytes:
    return BYTES(IMAGES.index(image) * SIZE + offset, min(length, SIZE - offset))


def an_image(image: str) -> OriginImage:
    return OriginImage(image, None, SIZE, partial(content, image))


def state(node: Node, image: str) -> str:
    return os.getxattr(node.path(image), "user.cachefs.state").decode()


def row(node: Node, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.cli("image", image, "--json").stdout)
    return found


EIO: Final = os.strerror(errno.EIO)
ON_OPEN: Final = {"mode": "on-open"}


def test_what_is_open_comes_whole_and_is_verified(tmp_path: Path) -> None:
    with ScriptedOrigin(an_image(image).hashed() for image in IMAGES) as origin:
        node = Node(tmp_path, origin.url)
        node.configure(hydration=ON_OPEN)
        with node:
            with node.path(IMAGES[0]).open("rb") as opened:
                assert opened.read(10) == content(IMAGES[0], 0, 10)
                assert poll_until(lambda: state(node, IMAGES[0]) == "verified", 60)
            assert row(node, IMAGES[0])["verified"] is True
            verification = node.status()["verification"]
            assert [verification[key] for key in ("waiting", "verified", "condemned")] == [0, 1, 0]
            assert state(node, IMAGES[1]) == "absent", "nobody has opened it"
            # From here on the origin is not needed, also after a restart.
            sent = origin.bytes_sent
            assert sent <= SIZE * 1.02 + MIB
            node.stop()
            node.start()
            assert state(node, IMAGES[0]) == "verified"
            origin.stop()
            for offset in range(0, SIZE, MIB):
                assert read_direct(node.path(IMAGES[0]), offset, MIB) == content(IMAGES[0], offset, MIB)


def test_prefetch_brings_what_nobody_has_open(tmp_path: Path) -> None:
    with ScriptedOrigin(an_image(image) for image in IMAGES) as origin, Node(tmp_path, origin.url) as node:
        done = node.cli("prefetch", "--wait", IMAGES[1], IMAGES[2])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{IMAGES[1]}: 24.0 MiB is here\n{IMAGES[2]}: 24.0 MiB is here\n"
        assert [state(node, image) for image in IMAGES] == ["absent", "complete", "complete"], "without a hash"
        assert origin.bytes_sent <= 2 * SIZE * 1.02
        refused = node.cli("prefetch", "80000000-0000-4000-8000-00000000dead")
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)


def test_a_pinned_image_comes_whole_after_a_restart(tmp_path: Path) -> None:
    with ScriptedOrigin([an_image(IMAGES[0])]) as origin:
        node = Node(tmp_path, origin.url)
        with node:
            assert read_direct(node.path(IMAGES[0]), 0, 4096) == content(IMAGES[0], 0, 4096)
            assert node.cli("pin", IMAGES[0]).returncode == 0
            assert state(node, IMAGES[0]) == "partial", "hydration is by hand here"
        node.configure(hydration=ON_OPEN)
        with node:
            assert poll_until(lambda: state(node, IMAGES[0]) == "complete", 90)


def test_an_image_that_is_not_what_glance_promises_is_condemned(tmp_path: Path) -> None:
    rotten = OriginImage.of(IMAGES[0], None, content(IMAGES[0], 0, SIZE)).hashed()
    # The store's file changed behind Glance.
    rotten = OriginImage(
        IMAGES[0], None, SIZE, partial(content, IMAGES[1]),
        os_hash_algo="sha512", os_hash_value=rotten.shown()["os_hash_value"],
    )  # fmt: skip
    with ScriptedOrigin([rotten, an_image(IMAGES[1])]) as origin:
        node = Node(tmp_path, origin.url)
        node.configure(hydration=ON_OPEN)
        with node:
            with node.path(IMAGES[0]).open("rb") as opened:
                opened.read(1)
                assert poll_until(lambda: state(node, IMAGES[0]) == "condemned", 60)
                # What the kernel has of it is its own; nothing more comes.
                with pytest.raises(OSError, match=EIO):
                    read_direct(node.path(IMAGES[0]), 8 * MIB, 4096)
            assert "CONDEMNED" in node.log
            assert poll_until(lambda: node.status()["store"]["bytes_cached"] == 0, 30)
            # Nor is it fetched again, whatever wants it: it would be condemned again, look after look.
            asked = len(origin.of_kind(Kind.DATA, IMAGES[0]))
            refused = node.cli("pin", IMAGES[0])
            assert (refused.returncode, "condemned" in refused.stderr) == (1, True)
            make_disk(tmp_path / "instances" / "disk", node.path(IMAGES[0]))
            assert node.cli("evict", IMAGES[1]).returncode == 0, "which has a look at disks first"
            assert node.status()["instances"]["images"] == 1
            os.utime(node.path(IMAGES[0]))
            os.utime(node.path(IMAGES[1]))  # The next in line.
            assert poll_until(lambda: state(node, IMAGES[1]) == "complete", 60)
            assert len(origin.of_kind(Kind.DATA, IMAGES[0])) == asked
            assert node.status()["verification"]["condemned"] == 1
            node.stop()
            node.start()
            with pytest.raises(OSError, match=EIO):
                node.path(IMAGES[0]).open("rb")
            assert state(node, IMAGES[0]) == "condemned"


def test_an_image_that_changes_at_its_origin_after_it_was_verified(tmp_path: Path) -> None:
    image = IMAGES[0]
    with ScriptedOrigin([an_image(image).hashed()]) as origin:
        node = Node(tmp_path, origin.url)
        path = node.path(image)
        node.configure(hydration=ON_OPEN)
        with node, path.open("rb") as opened:
            opened.read(1)
            assert poll_until(lambda: node.status()["verification"]["with_digests"] == 1, 60)
            assert state(node, image) == "verified"
        node.configure(hydration={"mode": "manual"})
        with node:
            assert poll_until(lambda: node.cli("evict", image).returncode == 0, 30)
            origin.change(image, content=partial(content, IMAGES[1]))
            for _ in range(3):
                with pytest.raises(OSError, match=EIO):
                    read_direct(path, 8 * MIB, 4096)
            assert node.log.count("CHANGED AT ITS ORIGIN") == 1
            assert node.status()["store"]["bytes_cached"] == 0
            assert list(node.status()["verification"]["origin_changed"]) == [image]
            assert "what was verified" in row(node, image)["origin_changed"]
            node.stop()
            node.start()
            with pytest.raises(OSError, match=EIO):
                read_direct(path, 0, 4096)
            assert state(node, image) == "absent"
            node.stop()
            # Whoever looks after Glance has brought the bytes back.
            origin.change(image, content=partial(content, image))
            node.start()
            assert node.cli("prefetch", "--wait", image).returncode == 0
            assert poll_until(lambda: state(node, image) == "verified", 60)
            assert row(node, image)["origin_changed"] is None
            for offset in range(0, SIZE, MIB):
                assert read_direct(path, offset, MIB) == content(image, offset, MIB)


def test_a_store_that_cannot_hold_what_is_leased_says_so_once(tmp_path: Path) -> None:
    with ScriptedOrigin(an_image(image) for image in IMAGES) as origin:
        node = Node(tmp_path, origin.url, store={"max_size": "32M", "span_size": "1M"})
        node.configure(hydration=ON_OPEN)
        with node, node.path(IMAGES[0]).open("rb"), node.path(IMAGES[1]).open("rb"):
            now = node.wait_for_status(lambda now: now["hydration"]["at_risk"], 60)
            (at_risk,) = now["hydration"]["at_risk"]
            assert at_risk in IMAGES[:2]
            assert node.log.count("promise at risk") == 1
            for image in IMAGES[:2]:
                for offset in range(0, SIZE, MIB):
                    assert read_direct(node.path(image), offset, MIB) == content(image, offset, MIB)


def test_an_origin_that_is_away_is_asked_again(tmp_path: Path) -> None:
    with ScriptedOrigin([an_image(IMAGES[0])]) as origin:
        node = Node(tmp_path, origin.url, glance={"retries": 0})
        node.configure(hydration=ON_OPEN)
        with node, node.path(IMAGES[0]).open("rb") as opened:
            assert opened.read(1) == content(IMAGES[0], 0, 1)
            origin.fault(*[Status(500)] * 2)
            assert poll_until(lambda: state(node, IMAGES[0]) == "complete", 90)


# ── Disks inside images ───────────────────────────────────────────────────────────────────────────────


def raw_state(node: Node, image: str) -> str:
    return os.getxattr(node.mountpoint / "raw" / image, "user.cachefs.state").decode()


@pytest.fixture(scope="module")
def qcow2_and_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A compressed image, and its disk: 24 MiB that say where they belong, at the end of 2 GiB of zeros."""
    if missing_qemu is not None:
        pytest.skip(f"there is no {missing_qemu} (qemu-utils)")
    folder = tmp_path_factory.mktemp("qcow2")
    with (folder / "disk").open("wb") as file:
        file.write(content(IMAGES[0], 0, MIB))
        file.seek(2048 * MIB)
        file.write(content(IMAGES[0], 0, 24 * MIB))
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", folder / "disk", folder / "image")
    return (folder / "image").read_bytes(), content(IMAGES[0], 0, 24 * MIB)


def test_a_disk_that_is_open_comes_whole_is_verified_and_outlives_the_origin(
    tmp_path: Path, qcow2_and_disk: tuple[bytes, bytes]
) -> None:
    file, disk = qcow2_and_disk
    image = OriginImage.of(IMAGES[0], None, file, disk_format="qcow2")
    with ScriptedOrigin([image]) as origin:
        node = Node(tmp_path, origin.url)
        node.configure(hydration=ON_OPEN)
        with node:
            path = node.mountpoint / "raw" / IMAGES[0]
            with path.open("rb") as opened:
                assert opened.read(10) == disk[:10]
                assert poll_until(lambda: raw_state(node, IMAGES[0]) == "verified", 90)
                assert origin.bytes_sent <= len(file) * 1.02 + MIB, "once, and no more"
                assert node.status()["hydration"] == {
                    "images": 0, "bytes_to_fetch": 0, "at_risk": {},
                    "bytes_fetched": node.status()["hydration"]["bytes_fetched"],
                }  # fmt: skip
            # Its file may go: the disk stays what it is, over a restart, without anybody else.
            assert node.status()["store"]["bytes_zero"] >= 2047 * MIB
            node.stop()
            node.start()
            origin.stop()
            assert raw_state(node, IMAGES[0]) == "verified"
            for offset in range(0, 24 * MIB, MIB):
                assert read_direct(path, 2048 * MIB + offset, MIB) == disk[offset : offset + MIB]
            assert read_direct(path, 1024 * MIB, MIB) == bytes(MIB)


def test_a_disk_whose_file_was_prefetched_costs_the_origin_nothing(
    tmp_path: Path, qcow2_and_disk: tuple[bytes, bytes]
) -> None:
    file, disk = qcow2_and_disk
    image = OriginImage.of(IMAGES[0], None, file, disk_format="qcow2")
    with ScriptedOrigin([image]) as origin, Node(tmp_path, origin.url) as node:
        assert node.cli("prefetch", "--wait", IMAGES[0]).returncode == 0
        path, sent = node.mountpoint / "raw" / IMAGES[0], origin.bytes_sent
        assert (row(node, IMAGES[0])["disk_cached"], path.stat().st_blocks) == (None, 1), "it is no disk yet"
        for offset in range(0, 24 * MIB, MIB):
            assert read_direct(path, 2048 * MIB + offset, MIB) == disk[offset : offset + MIB]
        assert origin.bytes_sent == sent
        assert row(node, IMAGES[0])["disk_cached"] >= 24 * MIB
        assert poll_until(lambda: path.stat().st_blocks * 512 >= 24 * MIB, 10)


def test_a_wrong_upload_of_a_qcow2_is_condemned_though_only_its_disk_was_opened(
    tmp_path: Path, qcow2_and_disk: tuple[bytes, bytes]
) -> None:
    file, disk = qcow2_and_disk
    other = OriginImage.of(IMAGES[0], None, file[:-1] + b"x", disk_format="qcow2").shown()["os_hash_value"]
    image = OriginImage(
        IMAGES[0], None, len(file), lambda offset, length: file[offset : offset + length],
        disk_format="qcow2", os_hash_algo="sha512", os_hash_value=other,
    )  # fmt: skip
    with ScriptedOrigin([image]) as origin:
        node = Node(tmp_path, origin.url)
        node.configure(hydration=ON_OPEN)
        with node:
            path = node.mountpoint / "raw" / IMAGES[0]
            with path.open("rb") as opened:
                assert opened.read(10) == disk[:10]
                assert poll_until(lambda: raw_state(node, IMAGES[0]) == "condemned", 60)
                with pytest.raises(OSError, match=EIO):
                    read_direct(path, 2060 * MIB, 4096)
            for folder in ("raw", "images"):
                with pytest.raises(OSError, match=EIO):
                    (node.mountpoint / folder / IMAGES[0]).open("rb")
            assert node.log.count("CONDEMNED") == 1
            assert poll_until(lambda: node.status()["store"]["bytes_cached"] == 0, 30)


# ── Asked for ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_prefetch_that_can_never_end_says_so(tmp_path: Path) -> None:
    small = {"max_size": "20M", "span_size": "1M"}
    with ScriptedOrigin([an_image(IMAGES[0])]) as origin, Node(tmp_path, origin.url, store=small) as node:
        done = node.cli("prefetch", "--wait", IMAGES[0])
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1
        assert f"image {IMAGES[0]} is not fetched whole" in done.stderr
        assert "more than the store may hold" in done.stderr
        assert node.status()["hydration"]["images"] == 0


def test_evicting_an_image_ends_its_prefetch(tmp_path: Path) -> None:
    with ScriptedOrigin(an_image(image) for image in IMAGES) as origin:
        node = Node(tmp_path, origin.url)
        node.configure(hydration={"mode": "manual", "bandwidth": "4M"})
        with node:
            with ThreadPoolExecutor(1) as threads:
                waiting = threads.submit(node.cli, "prefetch", "--wait", IMAGES[0])
                assert poll_until(lambda: row(node, IMAGES[0])["cached"] > 0, 30)
                assert node.cli("evict", IMAGES[0]).returncode == 0
                done = waiting.result()
            assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
            assert "evicted" in done.stderr
            assert row(node, IMAGES[0])["cached"] == 0
            assert node.status()["hydration"]["images"] == 0
