"""Leases by use, with a real daemon: what is touched, and what the disks of instances stand on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from cachefs.store.check import check
from tests.cloud.service import poll_until
from tests.node import Node, read_buffered, read_direct
from tests.origin import Kind, OriginImage, ScriptedOrigin, pattern

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE: Final = 4 * MIB
A, B, C = (f"60000000-0000-4000-8000-00000000000{n}" for n in (1, 2, 3))
QCOW2: Final = "60000000-0000-4000-8000-000000000009"
SEEDS: Final = {A: 1, B: 2, C: 3}
BYTES = pattern(8 * SIZE)


def content(image: str, offset: int, length: int) -> bytes:
    return BYTES(SEEDS[image] * SIZE + offset, min(length, SIZE - offset))


@pytest.fixture(scope="module")
def qcow2(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of C as a qcow2."""
    folder = tmp_path_factory.mktemp("qcow2")
    (folder / "raw").write_bytes(content(C, 0, SIZE))
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(folder / "raw"), str(folder / "qcow2")]
    subprocess.run(convert, check=True)
    return (folder / "qcow2").read_bytes()


@pytest.fixture
def origin(qcow2: bytes) -> Iterator[ScriptedOrigin]:
    images = [OriginImage(image, None, SIZE, partial(content, image), disk_format="raw") for image in SEEDS]
    images.append(
        OriginImage(QCOW2, None, len(qcow2), lambda at, n: qcow2[at : at + n], disk_format="qcow2").hashed()
    )
    with ScriptedOrigin(images) as running:
        yield running


def disk_on(base: Path, disk: Path, *options: str, size: str | None = None) -> Path:
    """As Nova makes one. With a `size` nobody looks at the base."""
    disk.parent.mkdir(parents=True, exist_ok=True)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), *options, str(disk)]
    create += [] if size is None else ["-u", size]
    subprocess.run(create, check=True)
    return disk


def reasons(node: Node, image: str) -> list[str]:
    found: dict[str, Any] = json.loads(node.cli("image", image, "--json").stdout)
    return list(found["leases"])


def times(path: Path) -> tuple[int, int]:
    now = path.stat()
    return now.st_atime_ns, now.st_mtime_ns


def test_a_touch_sets_the_times_of_one_file_and_is_a_lease(origin: ScriptedOrigin, tmp_path: Path) -> None:
    with Node(tmp_path, origin.url) as node:
        path, disk, big = node.path(A), node.mountpoint / "raw" / A, node.mountpoint / "resized" / A / "1G"
        updated = times(path)
        assert read_buffered(path, 0, SIZE) == content(A, 0, SIZE)
        seen = node.requests_seen()
        os.utime(path)  # Nova's own way.
        assert times(path)[1] > updated[1]
        assert times(disk) == times(big) == updated
        for command, changed in (("-a", 0), ("-m", 1)):
            before = times(path)
            subprocess.run(["touch", command, "-d", "2001-02-03 04:05:06.789012345 UTC", path], check=True)
            assert times(path)[changed] == 981173106789012345
            assert times(path)[1 - changed] == before[1 - changed]
        os.utime(disk, ns=(-1, 1 << 62))
        subprocess.run(["touch", big], check=True)
        assert times(disk) == (-1, 1 << 62)
        shown = times(path), times(disk), times(big)
        assert poll_until(lambda: times(path) == shown[0], 3)
        assert read_buffered(path, 0, SIZE) == content(A, 0, SIZE)
        assert node.requests_seen() == seen, "the kernel kept its pages"
        refused = node.cli("evict", A, B)
        assert refused.stderr == (
            f"cachefs: image {A} is not evicted: it is leased by a touch (for 24 h more) "
            "(it ends by itself, or with cachefs evict --touched)\n"
        )
        assert reasons(node, A) == ["it is leased by a touch (for 24 h more)"]
        assert node.status()["leases"]["leased by a touch"] == 1
        node.kill()  # What was answered a moment ago may be lost in a crash; what was committed is not.
        node.start()
        assert (times(path), times(disk), times(big)) == shown
        assert node.cli("evict", A).returncode == 1
        node.stop()
        node.configure(leases={"touch_grace": 0})
        node.start()
        assert (times(path), times(disk), times(big)) == shown
        assert node.cli("evict", A).stdout == f"{A}: evicted; 4.0 MiB freed\n"
        os.utime(path)
        assert node.cli("evict", A).returncode == 0, "times are taken, and are no lease"
    assert check(node.store).sound


def test_a_lease_by_touch_can_be_ended(origin: ScriptedOrigin, tmp_path: Path) -> None:
    with Node(tmp_path, origin.url) as node:
        path = node.path(A)
        assert read_buffered(path, 0, SIZE) == content(A, 0, SIZE)
        os.utime(path)
        shown = path.stat().st_mtime_ns
        with path.open("rb"):
            assert "it is open" in node.cli("evict", "--touched", A).stderr
        assert node.cli("evict", A).returncode == 1, "what is leased otherwise keeps its touch"
        assert node.cli("evict", "--touched", A).stdout == f"{A}: evicted; 4.0 MiB freed\n"
        assert reasons(node, A) == []
        node.stop()
        node.start()
        assert reasons(node, A) == [], "for good"
        assert path.stat().st_mtime_ns == shown, "the time that was set stays"


def test_who_owns_the_files_may_touch_them(origin: ScriptedOrigin) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-") as folder:
        os.chmod(folder, 0o755)  # pytest's folders are for their owner alone.
        with Node(Path(folder), origin.url, mount={"uid": 65534, "gid": 65534}) as node:
            touch = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "touch"]
            subprocess.run([*touch, str(node.path(A))], check=True)
            assert node.status()["leases"]["leased by a touch"] == 1


def test_a_touch_is_word_that_it_will_be_needed(origin: ScriptedOrigin, tmp_path: Path) -> None:
    """Whole, then, though nobody has opened it: the file, or the disk inside."""
    node = Node(tmp_path, origin.url)
    node.configure(hydration={"mode": "on-open"})
    with node:
        os.utime(node.path(A))
        os.utime(node.mountpoint / "raw" / QCOW2)
        node.wait_for_status(lambda now: now["store"]["bytes_cached"] >= 2 * SIZE)
        node.wait_for_status(lambda now: now["hydration"]["images"] == 0)
        origin.stop()
        assert read_direct(node.path(A), 0, SIZE) == content(A, 0, SIZE)
        assert read_direct(node.mountpoint / "raw" / QCOW2, 0, SIZE) == content(C, 0, SIZE)


def test_the_base_of_a_stopped_instance_outlives_everything(origin: ScriptedOrigin, tmp_path: Path) -> None:
    node = Node(tmp_path, origin.url, mount={"read_deadline": 2}, glance={"retries": 0, "listing_ttl": 0})
    nova = tmp_path / "instances"
    with node:
        assert "it is not there" in node.cli("status").stdout
        for image in SEEDS:
            assert read_direct(node.path(image), 0, SIZE) == content(image, 0, SIZE)
        first = disk_on(node.mountpoint / "resized" / A / "1G", nova / "one" / "disk")
        second = disk_on(node.path(B), nova / "two" / "disk")
        disk_on(second, nova / "two" / "snapshot", "-F", "qcow2")
        # Made a moment ago: who wants to evict has them looked at first.
        done = node.cli("evict", A, B, C)
        assert done.stdout == f"{C}: evicted; 4.0 MiB freed\n"
        assert done.stderr == (
            f"cachefs: image {A} is not evicted: it is named by an instance disk ({first})\n"
            f"cachefs: image {B} is not evicted: it is named by an instance disk ({second})\n"
        )
        assert reasons(node, A) == [f"it is named by an instance disk ({first})"]
        status = node.cli("status").stdout
        assert "instances:   2 disks stand on 2 images\n" in status
    origin.stop()
    with node:  # The node boots, Glance is away, and Nova's folder is not mounted yet.
        nova.rename(tmp_path / "away")
        assert node.cli("evict", A).returncode == 1
        assert "what they stood on stays leased" in node.log.lower()
        (tmp_path / "away").rename(nova)
        assert node.cli("evict", B).returncode == 1
        info = json.loads(
            subprocess.run(
                ["qemu-img", "info", "--backing-chain", "--output=json", nova / "two" / "snapshot"],
                check=True, capture_output=True,
            ).stdout
        )  # fmt: skip
        assert [layer["filename"] for layer in info][-1] == str(node.path(B))
        whole = tmp_path / "whole"
        subprocess.run(["qemu-img", "convert", "-O", "raw", nova / "two" / "snapshot", whole], check=True)
        assert whole.read_bytes() == content(B, 0, SIZE)
        shutil.rmtree(nova / "one")
        refused = node.cli("evict", A).stderr
        assert refused.endswith(f"named by an instance disk ({first}: gone, for 24 h more)\n")
        origin.start()
        # Glance has it no more; the instance does not notice.
        origin.remove(B)
        assert os.listdir(node.mountpoint / "images")
        assert poll_until(lambda: B not in os.listdir(node.mountpoint / "images"), 10)
        subprocess.run(["qemu-img", "convert", "-O", "raw", nova / "two" / "snapshot", whole], check=True)
        assert whole.read_bytes() == content(B, 0, SIZE)
        node.stop()
        node.start()
        assert read_direct(node.path(B), 0, SIZE) == content(B, 0, SIZE)
    assert check(node.store).sound


def test_what_a_disk_names_and_nobody_has_opened_comes_whole(origin: ScriptedOrigin, tmp_path: Path) -> None:
    """An instance that came here stopped; also after the daemon was started anew."""
    node = Node(tmp_path, origin.url)
    node.configure(hydration={"mode": "on-open", "bandwidth": "1M"}, leases={"interval": 1})
    nova = tmp_path / "instances"
    disk_on(node.mountpoint / "raw" / QCOW2, nova / "one" / "disk", size="1G")
    disk_on(node.path(A), nova / "two" / "disk", size="1G")
    with node:
        node.wait_for_status(lambda now: now["hydration"]["images"] == 2)
        node.stop()
        node.configure(hydration={"bandwidth": 0})
        node.start()
        node.wait_for_status(lambda now: now["store"]["bytes_cached"] >= 2 * SIZE)
        node.wait_for_status(lambda now: now["hydration"]["images"] == 0)
        origin.stop()
        assert read_direct(node.path(A), 0, SIZE) == content(A, 0, SIZE)
        assert read_direct(node.mountpoint / "raw" / QCOW2, 0, SIZE) == content(C, 0, SIZE)
        assert origin.of_kind(Kind.DATA, B) == []
    assert check(node.store).sound
