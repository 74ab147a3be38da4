"""`nova/` as Nova, libvirt and qemu use a `_base` folder: by their own calls and tools, through a real mount. What
needs Glance to be well has a real one; what needs it to be odd a scripted one."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import shutil
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Final

import pytest

from cachefs.namespace import NO_BASE
from tests import disks
from tests.cloud import Glance
from tests.cloud.service import poll_until
from tests.disks import MIB
from tests.hostile import QCOW2
from tests.instance_disks import make_disk
from tests.node import Node, errno_of, read_direct
from tests.origin import Kind, OriginImage, ScriptedOrigin, pattern

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="there is no qemu-img (qemu-utils)"),
]

LIBC: Final = ctypes.CDLL(None, use_errno=True)
NOVA: Final = 4242  # An account that no machine has.
AS_NOVA: Final = ("setpriv", "--reuid", str(NOVA), "--regid", str(NOVA), "--clear-groups")
AS_QEMU: Final = ("setpriv", "--reuid", "4243", "--regid", "4243", "--clear-groups")
SIZE: Final = 6 * MIB
LISTING: Final = 2  # Requests: the images that are hidden are asked for by themselves.
# As `nova.virt.images.qemu_img_info` runs it.
INFO: Final = ("prlimit", "--cpu=30", "--as=2147483648", "env", "LC_ALL=C", "LANG=C", "qemu-img", "info")
A, B, C = (f"70000000-0000-4000-8000-00000000000{n}" for n in (1, 2, 3))
BYTES: Final = pattern(SIZE)(0, SIZE)


def run(*command: str | Path, as_: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*as_, *map(str, command)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def renamed(old: Path, new: Path, flags: int) -> int | None:
    """By the call that has flags. The errno, or None."""
    done = LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags)
    return ctypes.get_errno() if done else None


def sha1(image: str) -> str:
    """As `nova.virt.libvirt.imagecache.get_cache_fname` has it."""
    return hashlib.sha1(image.encode(), usedforsecurity=False).hexdigest()


def base(node: Node, image: str) -> Path:
    return node.mountpoint / "nova" / sha1(image)


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*INFO, path, "--force-share", "--output=json"))
    return found


@contextmanager
def a_node(*endpoints: str, **sections: Any) -> Iterator[Node]:
    """With a mount that other accounts can reach, which pytest's folders are not for."""
    with tempfile.TemporaryDirectory(prefix="cachefs-nova-") as folder:
        os.chmod(folder, 0o755)
        node = Node(Path(folder), *endpoints)
        node.configure(nova={"uid": NOVA, "gid": NOVA}, **sections)
        with node:
            yield node


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is inside of the images: data, a hole, data."""
    path = tmp_path_factory.mktemp("disk") / "raw"
    path.write_bytes(random.Random(5).randbytes(SIZE // 2))
    os.truncate(path, 3 * SIZE)
    with path.open("r+b") as file:
        file.seek(2 * SIZE)
        file.write(random.Random(6).randbytes(SIZE // 2))
    return path


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def image(
    request: pytest.FixtureRequest, glance: Glance, disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("image") / "image"
    run("qemu-img", "convert", "-f", "raw", "-O", request.param, disk, path)
    return glance.upload(f"nova {request.param}", path, disk_format=request.param)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """For who needs nothing of Glance."""
    with ScriptedOrigin([OriginImage.of(A, "one", BYTES)]) as origin, a_node(origin.url) as node:
        yield node


@pytest.fixture(scope="module")
def cloud_node(glance: Glance) -> Iterator[Node]:
    with a_node(glance.endpoint) as node:
        yield node


@pytest.fixture
def path(cloud_node: Node, image: str) -> Path:
    """The base of the image, once it is found: all images are listed once a second at most."""
    found = base(cloud_node, image)
    assert poll_until(found.exists, 10)
    return found


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([OriginImage.of(A, "one", BYTES), OriginImage.of(B, "two", BYTES[::-1])]) as origin:
        yield origin


# ── An image as a base: rows 2, 4 to 8, 10 to 12, 16 ──────────────────────────────────────────────────


def test_a_base_is_there_before_anybody_fetched_it(cloud_node: Node, image: str, disk: Path, path: Path) -> None:
    node = cloud_node
    assert path.stat().st_size == disk.stat().st_size
    assert path.stat().st_ino == (node.mountpoint / "raw" / image).stat().st_ino, "pages are shared, and leases"
    for name in (
        NO_BASE.decode(),
        f"{sha1(image)}_sm",
        f"{sha1(image)}_20",
        sha1("no image"),
        sha1(image).upper(),
    ):
        assert not (node.mountpoint / "nova" / name).exists(), name


def test_a_base_is_all_that_nova_asks_of_it_before_it_makes_a_disk(path: Path, disk: Path, tmp_path: Path) -> None:
    with path.open("rb") as file:  # `get_image_format` reads no more.
        assert file.read(256 << 10) == disk.read_bytes()[: 256 << 10]
    os.utime(path)  # As privsep does it, which is root.
    said = info(path)
    assert (said["format"], said["virtual-size"]) == ("raw", disk.stat().st_size)
    overlay = tmp_path / "disk"
    options = f"backing_file={path},backing_fmt=raw"
    run("qemu-img", "create", "-f", "qcow2", "-o", options, overlay, "1G")
    assert info(overlay)["full-backing-filename"] == str(path)
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", path, "-f", "qcow2", overlay)
    flat = tmp_path / "flat"
    run("qemu-img", "convert", "-t", "none", "-f", "qcow2", "-O", "raw", overlay, flat)
    assert flat.stat().st_size == 1 << 30
    with flat.open("rb") as whole:
        assert whole.read(disk.stat().st_size) == disk.read_bytes()
    copy = tmp_path / "copy"
    run("cp", "-r", path, copy)
    run("qemu-img", "resize", "-f", "raw", copy, "40M")
    assert copy.read_bytes()[: disk.stat().st_size] == disk.read_bytes()


def test_a_base_is_read_as_qemu_does_it(path: Path, disk: Path) -> None:
    """Opened past the page cache, probed, locked, read."""
    assert read_direct(path, 0, 4096) == disk.read_bytes()[:4096]
    file = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        os.fstatvfs(file)
        for byte in (100, 201, 203):
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        with mmap.mmap(-1, 4096) as room:
            assert os.preadv(file, [room], 2 * SIZE) == 4096
            assert room[:] == disk.read_bytes()[2 * SIZE : 2 * SIZE + 4096]
    finally:
        os.close(file)


def test_a_base_refuses_what_libvirt_tries_as_that_tolerates(path: Path) -> None:
    assert errno_of(lambda: os.chown(path, 1234, -1)) == errno.EROFS
    assert errno_of(lambda: os.chown(path, -1, 1234)) == errno.EROFS
    assert errno_of(lambda: os.chmod(path, 0o644)) == errno.EROFS
    assert errno_of(lambda: path.open("r+b")) == errno.EROFS
    assert path.stat().st_mode & 0o004, "the hypervisor reads it as itself"
    run("head", "-c", "4096", path, as_=AS_QEMU)


def test_a_base_that_is_given_to_whom_it_belongs_is_not_refused(path: Path) -> None:
    for one in (path, path.parent):
        is_so = one.stat()
        os.chown(one, is_so.st_uid, is_so.st_gid)
        os.chmod(one, stat.S_IMODE(is_so.st_mode))
        assert errno_of(partial(os.chmod, one, 0o700)) == errno.EROFS
        now = one.stat()
        assert (now.st_mode, now.st_uid, now.st_gid, now.st_mtime) == (
            is_so.st_mode, is_so.st_uid, is_so.st_gid, is_so.st_mtime,
        )  # fmt: skip


def test_who_owns_the_images_may_touch_them_while_glance_is_away(origin: ScriptedOrigin) -> None:
    with a_node(origin.url, mount={"uid": NOVA, "gid": NOVA}) as node:
        path = base(node, A)
        before = path.stat().st_mtime_ns
        origin.stop()
        try:
            run("touch", path, as_=AS_NOVA)
            touched = path.stat().st_mtime_ns
            assert touched > before
            os.utime(path)
            assert path.stat().st_mtime_ns >= touched
            others = subprocess.run([*AS_QEMU, "touch", str(path)], capture_output=True, text=True, check=False)
            assert "Permission denied" in others.stderr
            assert "leased by a touch" in node.cli("image", A, "--json").stdout
            assert not (node.mountpoint / "nova" / sha1(C)).exists()
            assert errno_of(lambda: os.close(os.open(node.mountpoint / "nova" / sha1(C), os.O_CREAT))) is None, (
                "what Nova copies from another host has a place"
            )
        finally:
            origin.start()


# ── What is listed, what is removed: row 14 ───────────────────────────────────────────────────────────


def listed(node: Node) -> set[str]:
    return set(os.listdir(node.mountpoint / "nova"))


def cached(node: Node, image: str) -> int:
    return int(next(row["cached"] for row in node.ask("images") if row["id"] == image))


def test_only_what_was_used_and_is_here_is_listed_and_what_nova_removes_is_dropped(origin: ScriptedOrigin) -> None:
    with a_node(origin.url, leases={"touch_grace": 0}) as node:
        assert listed(node) == set()
        assert base(node, A).read_bytes() == BYTES
        assert listed(node) == set(), "somebody fetched it ahead, or had a look: no business of Nova's"
        asked = len(origin.of_kind(Kind.LIST))
        os.utime(base(node, A))
        os.utime(base(node, B))
        (node.mountpoint / "nova" / "swap_1").write_bytes(b"x")
        # What was touched is listed when its first bytes have come.
        assert poll_until(lambda: listed(node) == {sha1(A), sha1(B), "swap_1"}, 20), listed(node)
        for name in listed(node):  # As the periodic pass looks at each.
            assert os.path.isfile(node.mountpoint / "nova" / name)
            assert os.path.getmtime(node.mountpoint / "nova" / name) > 0
        with base(node, B).open("rb"):
            looks = node.status()["instances"]["looks"]
            node.wait_for_status(lambda now: now["instances"]["looks"] > looks)
            os.remove(base(node, A))
            assert poll_until(lambda: cached(node, A) == 0, 20)
            os.remove(base(node, B))
            assert listed(node) == {"swap_1"}
        assert base(node, A).exists()
        assert listed(node) == {"swap_1"}, "to look is not to use"
        assert cached(node, B) > 0, "it was open"
        os.utime(base(node, B))
        assert listed(node) == {sha1(B), "swap_1"}
        assert base(node, A).read_bytes() == BYTES
        assert listed(node) == {sha1(A), sha1(B), "swap_1"}
        assert len(origin.of_kind(Kind.LIST)) == asked, "Glance was asked for none of this"


def test_what_a_policy_holds_stays_though_nova_removes_it(origin: ScriptedOrigin) -> None:
    held = {"policies": "static", "static_images": A}
    with a_node(origin.url, leases={"touch_grace": 0, "interval": 1}, precache=held) as node:
        assert node.cli("precache").returncode == 0
        assert poll_until(lambda: cached(node, A) == SIZE, 30), node.log
        assert listed(node) == set()
        os.utime(base(node, A))
        assert listed(node) == {sha1(A)}
        os.remove(base(node, A))
        node.wait_for_log("removed from nova/, and kept")
        line = next(line for line in node.log.splitlines() if "removed from nova/" in line)
        assert line.count(A) == 1, "the image is named once"
        assert line.endswith("removed from nova/, and kept: it is held by static: listed")
        assert listed(node) == set()
        assert cached(node, A) == SIZE


def test_that_an_image_cannot_be_written_is_in_the_log_once(origin: ScriptedOrigin) -> None:
    with a_node(origin.url) as node:
        for how in ("r+b", "wb", "ab"):
            assert errno_of(partial(base(node, A).open, how)) == errno.EROFS
        node.wait_for_log("opened for writing")
        said = [line for line in node.log.splitlines() if "opened for writing" in line]
        assert [f"[image {A}]" in line for line in said] == [True]
        assert base(node, A).read_bytes() == BYTES


def test_many_unknown_names_cost_one_listing(origin: ScriptedOrigin) -> None:
    with a_node(origin.url, glance={"negative_ttl": 3600}) as node:
        base(node, A).stat()
        before, began_s = len(origin.of_kind(Kind.LIST)), time.monotonic()
        names = [node.mountpoint / "nova" / sha1(str(n)) for n in range(200)]
        with ThreadPoolExecutor(16) as pool:
            assert not any(pool.map(os.path.exists, names * 3))
        assert len(origin.of_kind(Kind.LIST)) - before <= LISTING * (1 + time.monotonic() - began_s)
        assert origin.of_kind(Kind.IMAGE) == []


# ── Images that may not be had ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("view", ["raw", "images"])
def test_what_is_refused_is_there_and_not_opened_so_that_nova_does_not_fetch_it(view: str, tmp_path: Path) -> None:
    good = tmp_path / "good"
    run("qemu-img", "create", "-q", "-f", "qcow2", good, "16M")
    bad = next(case for case in QCOW2 if case.name == "a backing file").change(good.read_bytes())
    images = [
        OriginImage.of(A, "bad", bad, disk_format="qcow2"),
        OriginImage.of(B, "off", BYTES, status="deactivated"),
    ]
    with ScriptedOrigin(images) as origin, a_node(origin.url) as node:
        node.stop()
        node.configure(nova={"view": view})
        node.start()
        assert base(node, A).exists()
        assert errno_of(lambda: base(node, A).open("rb")) == errno.EPERM
        refused = subprocess.run([*INFO, base(node, A)], capture_output=True, text=True, check=False)
        assert "Operation not permitted" in refused.stderr
        assert base(node, B).exists()
        assert errno_of(lambda: base(node, B).open("rb")) == errno.EACCES


def test_a_base_is_the_original_for_who_does_not_want_raw_ones(glance: Glance, image: str) -> None:
    with a_node(glance.endpoint) as node:
        node.stop()
        node.configure(nova={"view": "images"})
        node.start()
        assert base(node, image).read_bytes() == node.path(image).read_bytes()
        assert base(node, image).stat().st_ino == node.path(image).stat().st_ino


def test_without_it_there_is_none(origin: ScriptedOrigin, tmp_path: Path) -> None:
    node = Node(tmp_path, origin.url)
    node.configure(nova={"enabled": "false"})
    with node:
        assert "nova" not in os.listdir(node.mountpoint)
        assert not (node.mountpoint / "nova").exists()
        assert not (node.store / "nova").exists()
        assert os.statvfs(node.mountpoint).f_bavail == 0
        assert node.status()["nova"] is None


# ── Scratch files: rows 3, 9, 13 ──────────────────────────────────────────────────────────────────────


def test_what_nova_fetches_itself_is_kept_and_served(origin: ScriptedOrigin, disk: Path, tmp_path: Path) -> None:
    """`fetch_to_raw`: an image that this node does not know, as Nova's own account."""
    qcow2 = tmp_path / "image"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, qcow2)
    with a_node(origin.url, glance={"negative_ttl": 0}) as node:
        path = base(node, C)
        part, converted = Path(f"{path}.part"), Path(f"{path}.converted")
        with qcow2.open("rb") as data:
            subprocess.run([*AS_NOVA, "sh", "-c", f"cat > {part} && sync {part}"], stdin=data, check=True)
        assert info(part)["format"] == "qcow2"
        run("qemu-img", "convert", "-t", "none", "-O", "raw", "-f", "qcow2", part, converted, as_=AS_NOVA)
        os.unlink(part)
        assert info(converted)["format"] == "raw"
        run("mv", "-T", converted, path, as_=AS_NOVA)
        assert listed(node) == {sha1(C)}
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOVA, NOVA, 0o644)
        assert found.st_blocks * 512 < 2 * SIZE, "what is a hole takes no room"
        assert path.read_bytes() == disk.read_bytes()
        run("head", "-c", "4096", path, as_=AS_QEMU)
        # Glance shows it now. What Nova wrote and looked at stands before it, over a restart too.
        origin.add(OriginImage.of(C, "late", BYTES))
        assert (node.mountpoint / "images" / C).read_bytes() == BYTES
        assert path.read_bytes() == disk.read_bytes()
        node.stop()
        node.start()
        assert path.read_bytes() == disk.read_bytes()
        assert path.stat().st_ino == found.st_ino
        assert (path.stat().st_uid, path.stat().st_mode) == (NOVA, found.st_mode)
        run("rm", path, as_=AS_NOVA)
        assert path.read_bytes() == BYTES


def test_renamed_over_an_image_it_stands_before_it(origin: ScriptedOrigin) -> None:
    """rsync from another host."""
    with a_node(origin.url) as node:
        path = base(node, A)
        os.utime(path)
        with path.open("rb") as guest:
            assert guest.read(4096) == BYTES[:4096]
            part = path.with_name(f".{path.name}.a1b2c3")
            part.write_bytes(b"other")
            os.rename(part, path)
            assert path.read_bytes() == b"other"
            assert listed(node) == {sha1(A)}
            assert guest.read() == BYTES[4096:], "who has the image open reads on"
        assert (node.mountpoint / "raw" / A).read_bytes() == BYTES
        os.unlink(path)
        assert path.read_bytes() == BYTES
        (path.parent / "x").write_bytes(b"x")
        assert errno_of(lambda: os.rename(path, path.parent / "y")) == errno.EROFS
        assert errno_of(lambda: os.rename(path.parent / "x", node.mountpoint / "x")) == errno.EROFS
        assert errno_of(lambda: os.rename(path.parent / "x", node.folder / "x")) == errno.EXDEV
        assert (path.parent / "x").read_bytes() == b"x"
        # By renameat2: not over anything, an image's name included; and no exchange.
        (path.parent / "y").write_bytes(b"y")
        for name in ("y", path.name):
            assert renamed(path.parent / "x", path.parent / name, RENAME_NOREPLACE) == errno.EEXIST
        assert renamed(path.parent / "x", path.parent / "y", RENAME_EXCHANGE) == errno.EINVAL
        assert renamed(path.parent / "x", path.parent / "z", RENAME_NOREPLACE) is None
        assert [(path.parent / name).read_bytes() for name in ("y", "z")] == [b"y", b"x"]
        assert path.read_bytes() == BYTES


def test_a_listing_that_began_before_a_rename_does_not_bring_back_what_was_there(origin: ScriptedOrigin) -> None:
    """A listing says which file each name is, and the kernel believes that for a minute."""
    with a_node(origin.url) as node:
        path, part = base(node, A), base(node, A).with_name("part")
        os.utime(path)
        assert path.read_bytes() == BYTES
        part.write_bytes(b"first")
        with os.scandir(path.parent) as entries:
            os.rename(part, path)
            assert sorted(entry.name for entry in entries) == [path.name]
        assert path.read_bytes() == b"first", "not the image"
        assert not part.exists()
        with os.scandir(path.parent) as entries, path.open("rb") as opened:
            part.write_bytes(b"second")
            os.rename(part, path)
            assert sorted(entry.name for entry in entries) == [path.name]
            assert (path.read_bytes(), opened.read()) == (b"second", b"first")
        with os.scandir(path.parent) as entries, path.open("rb"):
            os.unlink(path)
            assert list(entries) == []
        assert path.read_bytes() == BYTES


def test_copied_from_another_host_in_place(origin: ScriptedOrigin, disk: Path) -> None:
    """scp writes to the name itself."""
    with a_node(origin.url) as node:
        run("cp", disk, base(node, C))
        assert base(node, C).read_bytes() == disk.read_bytes()


@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="there is no mkfs.ext4 (e2fsprogs)")
def test_an_ephemeral_disk_and_a_swap(node: Node, tmp_path: Path) -> None:
    folder = node.mountpoint / "nova"
    ephemeral, swap = folder / "ephemeral_1_0706d66", folder / "swap_64"
    run("qemu-img", "create", "-f", "raw", ephemeral, "1G", as_=AS_NOVA)
    run("mkfs.ext4", "-F", "-q", "-L", "ephemeral0", ephemeral)
    run("qemu-img", "create", "-f", "raw", swap, "64M", as_=AS_NOVA)
    run("mkswap", swap)
    assert ephemeral.stat().st_size == 1 << 30
    assert ephemeral.stat().st_blocks * 512 < 256 * MIB
    run("e2fsck", "-fn", ephemeral)
    os.utime(ephemeral)
    overlay = tmp_path / "disk.eph0"
    run("qemu-img", "create", "-f", "qcow2", "-o", f"backing_file={ephemeral},backing_fmt=raw", overlay)
    flat = tmp_path / "flat"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, flat)
    run("cmp", flat, ephemeral)
    # libvirt gives it to the hypervisor's account, and takes it back.
    os.chown(ephemeral, 4243, 4243)
    os.chmod(ephemeral, 0o600)
    run("head", "-c", "1", ephemeral, as_=AS_QEMU)
    done = subprocess.run([*AS_NOVA, "head", "-c", "1", str(ephemeral)], capture_output=True, check=False)
    assert done.returncode == 1
    assert node.store.joinpath("nova", ephemeral.name).stat().st_uid == os.geteuid(), (
        "on the disk it is the daemon's"
    )
    with ephemeral.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        with ephemeral.open("r+b") as other:
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
            assert errno_of(lambda: fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)) == errno.EAGAIN
    totals = node.status()["nova"]
    assert (totals["files"], totals["strangers"]) == (2, 0)
    assert totals["bytes"] == ephemeral.stat().st_blocks * 512 + swap.stat().st_blocks * 512
    os.unlink(ephemeral)
    os.unlink(swap)
    assert node.status()["nova"]["bytes"] == 0


def test_it_is_an_ordinary_file(node: Node) -> None:
    """Against one on the disk, by the same calls."""
    seen = []
    for folder in (node.folder, node.mountpoint / "nova"):
        path, rng = folder / "ordinary", random.Random(7)
        with path.open("w+b", buffering=0) as file:
            for _ in range(60):
                at, length = rng.randrange(3 * MIB), rng.randrange(1, 300_000)
                match rng.randrange(4):
                    case 0 | 1:
                        os.pwrite(file.fileno(), rng.randbytes(length), at)
                    case 2:
                        os.ftruncate(file.fileno(), at)
                    case 3:
                        os.fsync(file.fileno())
        with path.open("ab") as file:
            file.write(b"at the end")
        direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
        with mmap.mmap(-1, 8192) as room:
            room[:] = bytes(range(256)) * 32
            assert os.pwritev(direct, [room], 4096) == 8192
        os.close(direct)
        os.utime(path, ns=(1, 981173106789012345))
        emptied = folder / "emptied"
        emptied.write_bytes(b"x")
        os.close(os.open(emptied, os.O_RDONLY | os.O_TRUNC))  # POSIX leaves it open, Linux empties it.
        assert emptied.stat().st_size == 0
        emptied.unlink()
        found = path.stat()
        seen.append((path.read_bytes(), found.st_size, found.st_atime_ns, found.st_mtime_ns, found.st_nlink))
        with path.open("r+b", buffering=0) as file:
            os.unlink(path)
            file.write(b"gone")
            os.ftruncate(file.fileno(), 2)
            os.fchmod(file.fileno(), 0o640)
            assert os.fstat(file.fileno()).st_size == 2
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o640
            assert os.pread(file.fileno(), 9, 0) == b"go"
        assert not path.exists()
        assert errno_of(partial(path.open, "rb")) == errno.ENOENT
    assert seen[0] == seen[1]


def test_what_there_is_none_of(node: Node) -> None:
    folder, path = node.mountpoint / "nova", base(node, A)
    assert path.exists()
    tries: list[Callable[[], object]] = [
        lambda: os.mkdir(folder / "x"),
        lambda: os.symlink("x", folder / "x"),
        lambda: os.link(path, folder / "x"),
        lambda: os.mkfifo(folder / "x"),
        lambda: os.rmdir(path),
    ]
    for attempt in tries:
        assert errno_of(attempt) in (errno.EROFS, errno.EPERM, errno.ENOTDIR)
    assert "x" not in listed(node)
    for elsewhere in ("images", "raw", "by-name", "."):
        assert errno_of(partial(os.mknod, node.mountpoint / elsewhere / "x")) == errno.EROFS


def test_others_may_not_write_there(node: Node) -> None:
    folder = node.mountpoint / "nova"
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (NOVA, 0o755)
    (folder / "file").write_bytes(b"x")
    for script in (f"echo > {folder}/other", f"rm -f {folder}/file", f"mv {folder}/file {folder}/other"):
        done = subprocess.run([*AS_QEMU, "sh", "-c", script], capture_output=True, check=False)
        assert done.returncode != 0
    assert (folder / "file").read_bytes() == b"x"
    os.unlink(folder / "file")


# ── Hostile ones ──────────────────────────────────────────────────────────────────────────────────────


def test_names_as_strange_as_they_come(node: Node) -> None:
    folder = os.fsencode(node.mountpoint / "nova")
    names = [b"a\nb", b"\xff\xfe", b"..x", b" ", b"x" * 255, "ünï".encode(), b"-rf", b"%s%n"]
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(name)
    assert set(names) <= set(os.listdir(folder))
    node.stop()
    node.start()
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            assert file.read() == name
        os.unlink(os.path.join(folder, name))
    for name in (b"x" * 256, b"../x", b"a/b"):
        assert errno_of(partial(os.open, os.path.join(folder, name), os.O_CREAT)) is not None
    assert sorted(os.listdir(node.store)) == ["index", "lock", "nova", "segments"]


def test_what_somebody_planted_is_not_followed(origin: ScriptedOrigin, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    with a_node(origin.url) as node:
        inside, folder = node.store / "nova", node.mountpoint / "nova"
        (folder / "real").write_bytes(b"real")
        node.stop()
        (inside / "link").symlink_to(secret)
        os.mkfifo(inside / "fifo")
        (inside / "folder").mkdir()
        hard = node.folder / "hard"
        hard.write_bytes(b"hard")
        os.link(hard, inside / "hard")
        node.start()
        assert listed(node) == {"real"}
        assert node.status()["nova"]["strangers"] == 4
        assert "4 things that are no plain files" in node.cli("doctor").stdout
        for name in ("link", "fifo", "folder", "hard"):
            assert errno_of(partial((folder / name).open, "rb")) == errno.ENOENT
            assert errno_of(partial((folder / name).write_bytes, b"x")) == errno.EEXIST
            assert errno_of(partial(os.rename, folder / "real", folder / name)) == errno.EEXIST
        # And in the place of a file that was known.
        os.unlink(inside / "real")
        (inside / "real").symlink_to(secret)
        assert errno_of(lambda: (folder / "real").write_bytes(b"x")) == errno.ESTALE
        os.unlink(inside / "real")
        os.link(hard, inside / "real")
        assert errno_of(lambda: (folder / "real").read_bytes()) == errno.ESTALE
        assert (secret.read_bytes(), hard.read_bytes()) == (b"secret", b"hard")
        assert base(node, A).read_bytes() == BYTES


def test_two_writers_and_a_race_of_renames(node: Node) -> None:
    folder = node.mountpoint / "nova"
    target = folder / sha1("raced")
    pieces = [bytes([n]) * 100_000 for n in range(8)]

    def writer(n: int) -> None:
        for turn in range(12):
            part = folder / f"{n}.part"
            part.write_bytes(pieces[n])
            os.rename(part, target)
            if turn % 3 == 0:
                with_errno = errno_of(lambda: os.unlink(target))
                assert with_errno in (None, errno.ENOENT)

    def reader(_: int) -> None:
        for _ in range(60):
            try:
                found = target.read_bytes()
            except OSError as error:  # The kernel asks again where a file went while it was opened: once.
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                continue
            assert found in pieces, "all of one writer's"

    with ThreadPoolExecutor(10) as pool:
        done = [pool.submit(writer, n) for n in range(8)] + [pool.submit(reader, n) for n in range(2)]
        for one in done:
            one.result()
    assert not [name for name in listed(node) if name.endswith(".part")]
    target.unlink(missing_ok=True)
    both = folder / "both"
    with both.open("wb") as left, both.open("r+b") as right:
        left.write(b"1" * 4096)
        right.seek(4096)
        right.write(b"2" * 4096)
    assert both.read_bytes() == b"1" * 4096 + b"2" * 4096
    both.unlink()
    assert os.listdir(node.store / "nova") == []


def test_who_opens_scratch_files_without_end_takes_nothing_from_images(origin: ScriptedOrigin) -> None:
    few = ("prlimit", "--nofile=256")
    with tempfile.TemporaryDirectory() as folder, Node(Path(folder), origin.url, wrapper=few) as node:
        path = node.mountpoint / "nova" / "file"
        path.write_bytes(b"x")
        for image, its_bytes in ((A, BYTES), (B, BYTES[::-1])):
            with ExitStack() as opened:
                for _ in range(64):
                    opened.enter_context(path.open("rb"))
                assert errno_of(lambda: path.open("rb")) == errno.ENFILE
                assert errno_of(lambda: os.open(path.with_name("other"), os.O_CREAT)) == errno.ENFILE
                assert node.path(image).read_bytes() == its_bytes, "which takes connections, and a segment"
                assert node.cli("status").returncode == 0
                assert (listed(node), path.stat().st_size) == ({"file"}, 1)
            assert poll_until(lambda: errno_of(lambda: path.open("rb")) is None, 10)


# ── Room ──────────────────────────────────────────────────────────────────────────────────────────────

DISK_SIZE: Final = 192 * MIB


def taken_by(file: FileIO, data: bytes) -> int:
    """How much of it a full disk takes."""
    try:
        return file.write(data)
    except OSError:
        return 0


BIG: Final = pattern(48 * MIB)


@contextmanager
def a_node_on_a_small_disk(folder: Path, **store: object) -> Iterator[Node]:
    """An ext4 of DISK_SIZE bytes, of which A takes a quarter once it was read."""
    images = [OriginImage(A, "one", 48 * MIB, BIG), OriginImage.of(B, "two", BYTES)]
    with ExitStack() as stack:
        mounted = stack.enter_context(disks.small_ext4(folder / "disk", DISK_SIZE))
        origin = stack.enter_context(ScriptedOrigin(images))
        settings = {"path": mounted / "store", "max_size": "100%", "commit_interval": 0.1} | store
        node = stack.enter_context(Node(folder, origin.url, store=settings))
        assert node.path(A).read_bytes() == BIG(0, 48 * MIB)
        node.wait_for_status(lambda now: now["instances"]["looks"] > 1)
        assert cached(node, A) == 48 * MIB
        yield node


@pytest.mark.loop
def test_who_writes_has_room_made(tmp_path: Path) -> None:
    """Where the background sees no need for it: no room is to be kept."""
    with a_node_on_a_small_disk(tmp_path, min_free=0, high_watermark="100%", low_watermark="99%") as node:
        kept = random.Random(8).randbytes(MIB)
        free = os.statvfs(node.mountpoint).f_bavail * os.statvfs(node.mountpoint).f_frsize // MIB
        with (node.mountpoint / "nova" / "file").open("wb", buffering=0) as scratch:
            for _ in range(free + 24):
                assert scratch.write(kept) == MIB
        assert cached(node, A) < 48 * MIB
        assert node.status()["evictor"]["evicted"]["full"]["bytes"] >= 20 * MIB
        assert (node.mountpoint / "nova" / "file").read_bytes() == kept * (free + 24)
        assert node.path(A).read_bytes() == BIG(0, 48 * MIB)


@pytest.mark.loop
def test_on_a_full_disk_the_writer_hears_of_it_and_nothing_is_lost(tmp_path: Path) -> None:
    with a_node_on_a_small_disk(tmp_path, min_free="48M") as node:
        store = node.store
        # Scratch files take the room, and what is cached gives way.
        first = node.mountpoint / "nova" / "first"
        kept = random.Random(9).randbytes(MIB)
        with first.open("wb", buffering=0) as scratch:
            for _ in range(80):
                assert scratch.write(kept) == MIB
            os.fsync(scratch.fileno())
        assert poll_until(lambda: cached(node, A) < 48 * MIB, 30), "eviction gives way"
        second, written = node.mountpoint / "nova" / "second", 0
        with second.open("wb", buffering=0) as scratch:
            while written < DISK_SIZE and (took := taken_by(scratch, kept)) > 0:
                written += took
            assert errno_of(lambda: scratch.write(kept)) == errno.ENOSPC
        assert written > 16 * MIB
        assert second.stat().st_size == written
        assert second.read_bytes() == (kept * (written // MIB + 1))[:written]
        assert first.read_bytes() == kept * 80
        assert base(node, B).read_bytes() == BYTES, "what has no room is served all the same"
        assert errno_of(lambda: (node.mountpoint / "nova" / "third").write_bytes(kept)) == errno.ENOSPC
        second.unlink()
        os.unlink(node.mountpoint / "nova" / "third")
        with second.open("wb", buffering=0) as scratch:
            assert scratch.write(kept) == MIB
        node.stop()
        checked = node.cli("check", "--repair")
        assert checked.returncode in (0, 1), checked.stderr
        assert (store / "nova" / "first").read_bytes() == kept * 80, "no business of a check or a repair"
        node.start()
        assert first.read_bytes() == kept * 80


# ── Disks of instances: rows 13 and 17 ────────────────────────────────────────────────────────────────


def named(node: Node, image: str) -> bool:
    return "named by an instance disk" in node.cli("image", image, "--json").stdout


def test_what_nova_removes_is_kept_for_a_disk_that_nobody_saw_yet(origin: ScriptedOrigin) -> None:
    """One that came with a migration, between two looks: its base was not opened here."""
    with a_node(origin.url, leases={"interval": 86400, "touch_grace": 0}) as node:
        for image in (A, B):
            assert base(node, image).read_bytes() in (BYTES, BYTES[::-1])
        node.wait_for_status(lambda now: now["instances"]["looks"] > 1)
        make_disk(node.folder / "instances" / "1" / "disk", base(node, A))
        os.unlink(base(node, A))
        node.wait_for_log("kept: it is named by an instance disk")
        os.unlink(base(node, B))
        assert poll_until(lambda: cached(node, B) == 0, 20)
        assert (named(node, A), cached(node, A)) == (True, SIZE)


def test_a_disk_that_names_a_base_by_a_link_to_novas_folder_leases_the_image(origin: ScriptedOrigin) -> None:
    """Where instances lie on another disk, and `/var/lib/nova/instances` is a link to it."""
    with a_node(origin.url, leases={"interval": 1}) as node:
        real, instances = node.folder / "disk" / "instances", node.folder / "instances"
        (real / "_base").mkdir(parents=True)
        instances.symlink_to(real)
        bound = instances / "_base"
        subprocess.run(["mount", "--bind", node.mountpoint / "nova", bound], check=True)
        try:
            assert (bound / sha1(A)).read_bytes() == BYTES
            make_disk(instances / "1" / "disk", bound / sha1(A))
            assert poll_until(lambda: named(node, A), 30), node.log
        finally:
            subprocess.run(["umount", bound], check=True)


def test_a_disk_that_names_a_base_by_novas_path_leases_the_image(origin: ScriptedOrigin) -> None:
    with a_node(origin.url, leases={"interval": 1}) as node:
        instances = node.folder / "instances"
        bound = instances / "_base"
        bound.mkdir(parents=True)
        subprocess.run(["mount", "--bind", node.mountpoint / "nova", bound], check=True)
        try:
            with (bound / sha1(A)).open("rb") as file:
                assert file.read() == BYTES
            make_disk(instances / "1" / "disk", bound / sha1(A))
            make_disk(instances / "2" / "disk", node.mountpoint / "nova" / sha1(B))
            # One on what Nova fetched itself: no image is meant by it.
            (bound / sha1(C)).write_bytes(b"scratch")
            make_disk(instances / "3" / "disk", bound / sha1(C))
            origin.add(OriginImage.of(C, "late", BYTES))
            os.listdir(node.mountpoint / "images")
            assert poll_until(lambda: named(node, A) and named(node, B), 30), node.log
            assert (node.mountpoint / "images" / C).exists()
            looks = node.status()["instances"]["looks"]
            node.wait_for_status(lambda now: now["instances"]["looks"] > looks + 1)
            assert not named(node, C)
            assert "_base" not in str(node.status()["instances"]["folders"][0]["first_error"])
            os.unlink(bound / sha1(A))  # Nova thinks that nobody uses it: it may be another host's instance.
            assert cached(node, A) == SIZE
            assert node.cli("evict", A).returncode == 1
        finally:
            subprocess.run(["umount", bound], check=True)
        # Without the bind it is a name like any other. What was leased by it stays so for the time of grace.
        node.wait_for_status(lambda now: now["instances"]["looks"] > looks + 4)
        assert named(node, A)
