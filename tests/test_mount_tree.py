"""The tree that people see: names, attributes, extended attributes and refusals, as design §3 has them."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest

from tests.cloud.service import poll_until
from tests.node import Node, errno_of, read_buffered, read_direct
from tests.origin import Kind, OriginImage, ScriptedOrigin, Status, pattern

pytestmark = pytest.mark.mount

KIB, MIB = 1 << 10, 1 << 20
SIZE: Final = 3 * MIB + 17
BYTES: Final = pattern(SIZE)
DEBIAN: Final = "10000000-0000-4000-8000-000000000001"
DEACTIVATED: Final = "10000000-0000-4000-8000-000000000002"
QUEUED: Final = "10000000-0000-4000-8000-000000000003"
SAVING: Final = "10000000-0000-4000-8000-000000000004"
KILLED: Final = "10000000-0000-4000-8000-000000000005"
UNKNOWN: Final = "10000000-0000-4000-8000-00000000dead"
UPDATED: Final = datetime(2026, 2, 28, 23, 59, 58, tzinfo=UTC)


def id_of(number: int) -> str:
    return f"20000000-0000-4000-8000-{number:012d}"


def image(image_id: str, name: str | None, status: str = "active", size: int | None = SIZE) -> OriginImage:
    return OriginImage(
        image_id, name, size, BYTES, status=status, disk_format="qcow2", updated_at="2026-02-28T23:59:58Z"
    )


@pytest.fixture(scope="module")
def origin() -> Iterator[ScriptedOrigin]:
    images = [
        image(DEBIAN, "debian 13"),
        image(DEACTIVATED, "deactivated", "deactivated"),
        image(QUEUED, "queued", "queued", size=None),
        image(SAVING, "saving", "saving"),
        image(KILLED, "killed", "killed"),
    ]
    with ScriptedOrigin(images) as origin:
        yield origin


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, origin: ScriptedOrigin) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node"), origin.url) as node:
        yield node


# ── Layout and attributes ─────────────────────────────────────────────────────────────────────────────


def test_the_layout(node: Node) -> None:
    assert sorted(os.listdir(node.mountpoint)) == ["by-name", "images", "nova", "raw", "resized"]
    assert sorted(os.listdir(node.mountpoint / "images")) == [DEBIAN, DEACTIVATED]
    assert sorted(os.listdir(node.mountpoint / "by-name")) == ["deactivated", "debian 13"]


def test_the_attributes_of_an_image(node: Node) -> None:
    found = node.path(DEBIAN).stat()
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o444
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
    assert (found.st_size, found.st_nlink) == (SIZE, 1)
    assert found.st_mtime_ns == int(UPDATED.timestamp()) * 10**9


def test_the_attributes_of_folders(node: Node) -> None:
    for folder in (node.mountpoint, node.mountpoint / "images", node.mountpoint / "by-name"):
        found = folder.stat()
        assert stat.S_ISDIR(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o555
        assert found.st_dev == node.mountpoint.stat().st_dev


def test_the_configured_owner_and_mode(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Node(tmp_path, origin.url, mount={"uid": 4242, "gid": 2424, "file_mode": "0440"}) as node:
        found = node.path(DEBIAN).stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (4242, 2424, 0o440)


def test_listings_and_lookups_agree_on_inodes(node: Node) -> None:
    for folder in (node.mountpoint, node.mountpoint / "images", node.mountpoint / "by-name"):
        for entry in os.scandir(folder):
            assert entry.inode() == entry.stat(follow_symlinks=False).st_ino
            assert entry.is_dir() == (folder == node.mountpoint)
            assert entry.is_symlink() == (folder.name == "by-name")


def test_a_file_keeps_its_inode_in_the_next_daemon(tmp_path: Path, origin: ScriptedOrigin) -> None:
    node = Node(tmp_path, origin.url)
    with node:
        before = [node.path(id_).stat().st_ino for id_ in (DEBIAN, DEACTIVATED)]
    with node:
        assert [node.path(id_).stat().st_ino for id_ in (DEACTIVATED, DEBIAN)] == before[::-1]


def test_blocks_tell_what_is_cached(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Node(tmp_path, origin.url) as node:
        path = node.path(DEBIAN)
        assert path.stat().st_blocks == 1, "nothing; but 0 is what tools take for a file of zeros"
        read_direct(path, 0, 4096)
        # The kernel may show a partly cached image's attributes for a second before it asks again.
        assert poll_until(lambda: path.stat().st_blocks > 1, 10)
        assert path.stat().st_blocks * 512 < SIZE
        path.read_bytes()
        assert poll_until(lambda: path.stat().st_blocks == -(-SIZE // 512), 10)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar")
@pytest.mark.parametrize("way", ["seek", "raw"])
def test_an_archive_of_sparse_files_has_the_bytes_of_what_is_not_here_yet(
    tmp_path: Path, origin: ScriptedOrigin, way: str
) -> None:
    with Node(tmp_path, origin.url) as node:
        path = node.path(DEBIAN)
        folder, name = str(path.parent), path.name
        command = ["tar", "--create", "--sparse", f"--hole-detection={way}", "-C", folder, name]
        made = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout
        read = subprocess.run(["tar", "-xO"], input=made, stdout=subprocess.PIPE, check=True, timeout=60).stdout
        assert read == path.read_bytes()


def test_space_is_that_of_the_images_and_what_is_free_for_scratch_files(node: Node) -> None:
    os.listdir(node.mountpoint / "images")
    found, disk = os.statvfs(node.mountpoint), os.statvfs(node.store)
    assert found.f_blocks - found.f_bfree == 2 * SIZE // found.f_frsize
    free, there = found.f_bavail * found.f_frsize, disk.f_bavail * disk.f_frsize
    assert abs(free - there) < 512 * MIB, "others write on this disk, too"
    assert (found.f_bfree, found.f_files) == (found.f_bavail, 2)
    assert not found.f_flag & os.ST_RDONLY, "or the kernel would keep touches from the daemon"


def test_other_accounts_read(origin: ScriptedOrigin) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-") as folder:
        os.chmod(folder, 0o755)  # pytest's folders are for their owner alone.
        with Node(Path(folder), origin.url) as node:
            read = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "cat"]
            done = subprocess.run([*read, str(node.path(DEBIAN))], capture_output=True, check=True)
            assert done.stdout == BYTES(0, SIZE)
            node.stop()
            node.configure(mount={"allow_other": "false"})
            node.start()
            done = subprocess.run([*read, str(node.path(DEBIAN))], capture_output=True, check=False)
            assert (done.returncode, done.stdout) == (1, b"")


# ── Extended attributes ───────────────────────────────────────────────────────────────────────────────


def xattr(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.cachefs.{name}").decode()


def test_extended_attributes(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Node(tmp_path, origin.url) as node:
        path = node.path(DEBIAN)
        names = ["id", "name", "disk_format", "state", "cached_bytes", "in_use", "pinned", "priority"]
        assert sorted(os.listxattr(path)) == sorted(f"user.cachefs.{name}" for name in names)
        values = [DEBIAN, "debian 13", "qcow2", "absent", "0", "0", "0", "normal"]
        assert [xattr(path, name) for name in names] == values
        with path.open("rb") as file:
            assert xattr(path, "in_use") == "1"
            file.read(1)
        assert poll_until(lambda: xattr(path, "in_use") == "0", 10)  # The kernel releases when it likes.
        assert poll_until(lambda: xattr(path, "state") == "partial", 10)
        assert 0 < int(xattr(path, "cached_bytes")) < SIZE
        path.read_bytes()
        assert poll_until(lambda: xattr(path, "state") == "complete", 10)
        assert xattr(path, "cached_bytes") == str(SIZE)


def test_what_has_no_extended_attributes(node: Node) -> None:
    for name in ("user.cachefs.nothing", "user.other", "security.selinux", "trusted.libvirt.security.dac"):
        found = errno_of(functools.partial(os.getxattr, node.path(DEBIAN), name))
        assert found in (errno.ENODATA, errno.EOPNOTSUPP)
    for path in (node.mountpoint, node.mountpoint / "images", node.mountpoint / "by-name" / "debian 13"):
        assert os.listxattr(path, follow_symlinks=False) == []


# ── by-name ───────────────────────────────────────────────────────────────────────────────────────────

SHOWN_NAMES: Final = [
    "plain", "with space", " ", "-rf", "new\nline", "\x1b[31mred", "größer", "名前", "a" * 255, "ü" * 127,
    "...", ".hidden", "%2e%2e%2f", "*", "\\", "cachefs", "\U0001f4bf",
]  # fmt: skip
UNSHOWN_NAMES: Final = [
    "twice", "twice", "a/b", "/", "../../etc/passwd", ".", "..", "", None, "nul\0in", "a" * 256, "ü" * 128,
    "lone \ud800 surrogate",
]  # fmt: skip


def test_by_name(tmp_path: Path) -> None:
    names = [*SHOWN_NAMES, *UNSHOWN_NAMES]
    images = [image(id_of(number), name) for number, name in enumerate(names)]
    with ScriptedOrigin(images) as origin, Node(tmp_path, origin.url) as node:
        folder = node.mountpoint / "by-name"
        assert sorted(os.listdir(folder)) == sorted(SHOWN_NAMES)
        for number, name in enumerate(SHOWN_NAMES):
            assert os.readlink(folder / name) == f"../images/{id_of(number)}"
            assert os.lstat(folder / name).st_size == len(os.readlink(folder / name))
            assert os.path.samefile(folder / name, node.path(id_of(number)))
        assert (folder / "plain").read_bytes() == BYTES(0, SIZE)
        assert errno_of((folder / "twice").stat) == errno.ENOENT
        assert errno_of((folder / "no such name").stat) == errno.ENOENT
        assert len(os.listdir(node.mountpoint / "images")) == len(names)
        shown = {row["id"]: row["name"] for row in node.ask("images")}
        assert [shown[id_of(number)] for number in range(len(names))] == names
        for number in range(len(names)):  # No name keeps an image from being told of.
            assert os.getxattr(node.path(id_of(number)), "user.cachefs.id").decode() == id_of(number)
            os.getxattr(node.path(id_of(number)), "user.cachefs.name")
        assert xattr(node.path(id_of(names.index("名前"))), "name") == "名前"
        table = node.cli("images")
        assert table.returncode == 0
        assert "\x1b" not in table.stdout
        assert len(table.stdout.splitlines()) == 1 + len(names)


def test_a_link_appears_and_goes_with_its_images_name(tmp_path: Path) -> None:
    first, second = id_of(1), id_of(2)
    with (
        ScriptedOrigin([image(first, "one")]) as origin,
        Node(tmp_path, origin.url, glance={"listing_ttl": 0}) as node,
    ):
        folder = node.mountpoint / "by-name"
        assert os.listdir(folder) == ["one"]
        origin.add(image(second, "two"))
        assert sorted(os.listdir(folder)) == ["one", "two"]
        origin.change(second, name="one")
        assert os.listdir(folder) == []
        origin.change(first, name="three")
        assert sorted(os.listdir(folder)) == ["one", "three"]
        assert os.readlink(folder / "three") == f"../images/{first}"


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_image_is_asked_for_once(node: Node, origin: ScriptedOrigin) -> None:
    for _ in range(3):
        assert errno_of(node.path(UNKNOWN).stat) == errno.ENOENT
        assert errno_of(lambda: node.path(UNKNOWN).open("rb")) == errno.ENOENT
    assert len(origin.of_kind(Kind.IMAGE, UNKNOWN)) == 1


def test_many_who_ask_for_an_unknown_image_share_one_question(node: Node, origin: ScriptedOrigin) -> None:
    unknown = id_of(99)
    asking = [subprocess.Popen(["test", "-e", str(node.path(unknown))]) for _ in range(10)]
    assert [process.wait() for process in asking] == [1] * 10
    assert len(origin.of_kind(Kind.IMAGE, unknown)) == 1


@pytest.mark.parametrize(
    "name",
    [
        "debian 13", UNKNOWN.upper(), DEBIAN.replace("-", ""), f"{{{DEBIAN}}}", f"urn:uuid:{DEBIAN}", "_base",
        "%2e%2e", "a" * 255, "da39a3ee5e6b4b0d3255bfef95601890afd80709", UNKNOWN[:-1], f" {DEBIAN}",
    ],
)  # fmt: skip
def test_what_is_no_image_id_is_never_asked_for(node: Node, origin: ScriptedOrigin, name: str) -> None:
    before = len(origin.requests)
    assert errno_of((node.mountpoint / "images" / name).stat) == errno.ENOENT
    assert errno_of((node.mountpoint / name).stat) == errno.ENOENT
    assert len(origin.requests) == before


@pytest.mark.parametrize("image_id", [QUEUED, SAVING, KILLED], ids=["queued", "saving", "killed"])
def test_what_is_not_active_does_not_exist(node: Node, image_id: str) -> None:
    assert errno_of(node.path(image_id).stat) == errno.ENOENT
    assert errno_of(lambda: node.path(image_id).open("rb")) == errno.ENOENT


def test_an_image_that_becomes_active_appears(tmp_path: Path) -> None:
    with (
        ScriptedOrigin([image(DEBIAN, None, "queued", size=None)]) as origin,
        Node(tmp_path, origin.url, glance={"negative_ttl": 0}) as node,
    ):
        assert errno_of(node.path(DEBIAN).stat) == errno.ENOENT
        origin.change(DEBIAN, status="active", size=SIZE)
        assert node.path(DEBIAN).read_bytes() == BYTES(0, SIZE)


def test_a_deactivated_image_is_seen_and_not_opened(node: Node, origin: ScriptedOrigin) -> None:
    assert node.path(DEACTIVATED).stat().st_size == SIZE
    assert errno_of(lambda: node.path(DEACTIVATED).open("rb")) == errno.EACCES
    assert origin.of_kind(Kind.DATA, DEACTIVATED) == []


def test_an_image_is_deactivated_and_reactivated(tmp_path: Path) -> None:
    """Also one whose bytes are all cached, and for an account that could still read them."""
    with (
        ScriptedOrigin([image(DEBIAN, None)], admin=True) as origin,
        Node(tmp_path, origin.url, glance={"listing_ttl": 0}) as node,
    ):
        path = node.path(DEBIAN)
        assert path.read_bytes() == BYTES(0, SIZE)
        with path.open("rb") as opened:
            origin.change(DEBIAN, status="deactivated")
            assert errno_of(lambda: path.open("rb")) == errno.EACCES
            assert opened.read() == BYTES(0, SIZE)  # An instance that has started keeps its base.
        origin.change(DEBIAN, status="active")
        assert path.read_bytes() == BYTES(0, SIZE)


def test_a_deleted_image_goes_and_its_open_file_stays(tmp_path: Path) -> None:
    with (
        ScriptedOrigin([image(DEBIAN, "debian")]) as origin,
        Node(tmp_path, origin.url, glance={"listing_ttl": 0}) as node,
    ):
        path = node.path(DEBIAN)
        with path.open("rb") as opened:
            assert opened.read() == BYTES(0, SIZE)
            origin.remove(DEBIAN)
            assert errno_of(lambda: path.open("rb")) == errno.ENOENT
            # The kernel is told to forget the name, which nobody waits for.
            assert poll_until(lambda: errno_of(path.stat) == errno.ENOENT, 10)
            assert os.listdir(node.mountpoint / "images") == []
            assert os.listdir(node.mountpoint / "by-name") == []
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            opened.seek(0)
            assert opened.read() == BYTES(0, SIZE)


ACL: Final = struct.pack("<I" + "HHI" * 3, 2, *(1, 4, 0xFFFFFFFF), *(4, 4, 0xFFFFFFFF), *(32, 4, 0xFFFFFFFF))
WRITES: Final[dict[str, Callable[[Path], object]]] = {
    "open to write": lambda at: os.open(at / DEBIAN, os.O_WRONLY),
    "open to read and write": lambda at: os.open(at / DEBIAN, os.O_RDWR),
    "open to append": lambda at: os.open(at / DEBIAN, os.O_WRONLY | os.O_APPEND),
    "truncate while opening": lambda at: os.open(at / DEBIAN, os.O_RDONLY | os.O_TRUNC),
    "create what is there": lambda at: os.open(at / DEBIAN, os.O_CREAT | os.O_WRONLY),
    "truncate what is there": lambda at: os.open(at / DEBIAN, os.O_CREAT | os.O_WRONLY | os.O_TRUNC),
    "open a disk to write": lambda at: os.open(at.parent / "raw" / DEBIAN, os.O_RDWR),
    "truncate": lambda at: os.truncate(at / DEBIAN, 0),
    "create": lambda at: os.open(at / "new", os.O_CREAT | os.O_WRONLY),
    "create in the root": lambda at: os.open(at.parent / "new", os.O_CREAT | os.O_WRONLY),
    "create a size": lambda at: os.open(at.parent / "resized" / DEBIAN / "x", os.O_CREAT | os.O_WRONLY),
    "create by name": lambda at: os.open(at.parent / "by-name" / "new", os.O_CREAT | os.O_WRONLY),
    "unlink": lambda at: os.unlink(at / DEBIAN),
    "unlink a link": lambda at: os.unlink(at.parent / "by-name" / "debian 13"),
    "mkdir": lambda at: os.mkdir(at / "new"),
    "rmdir": lambda at: os.rmdir(at),
    "rename": lambda at: os.rename(at / DEBIAN, at / "new"),
    "rename over another": lambda at: os.rename(at / DEBIAN, at / DEACTIVATED),
    "rename a folder": lambda at: os.rename(at, at.parent / "new"),
    "exchange": lambda at: exchange(at / DEBIAN, at / DEACTIVATED),
    "link": lambda at: os.link(at / DEBIAN, at / "new"),
    "symlink": lambda at: os.symlink("x", at / "new"),
    "mkfifo": lambda at: os.mkfifo(at / "new"),
    "mknod": lambda at: os.mknod(at / "new", stat.S_IFREG | 0o600),
    "bind a socket": lambda at: bind(at / "new"),
    "chmod": lambda at: os.chmod(at / DEBIAN, 0o666),
    "chmod a folder": lambda at: os.chmod(at, 0o777),
    "chown": lambda at: os.chown(at / DEBIAN, 1, 1),
    "chown a link": lambda at: os.lchown(at.parent / "by-name" / "debian 13", 1, 1),
    "utime of a folder": lambda at: os.utime(at),
    "utime of the root": lambda at: os.utime(at.parent),
    "utime of the folder of sizes": lambda at: os.utime(at.parent / "resized" / DEBIAN),
    "utime of a link": lambda at: os.utime(at.parent / "by-name" / "debian 13", follow_symlinks=False),
    "setxattr": lambda at: os.setxattr(at / DEBIAN, "user.cachefs.name", b"x"),
    "setxattr of a folder": lambda at: os.setxattr(at, "user.x", b"x"),
    "setxattr as libvirt does": lambda at: os.setxattr(at / DEBIAN, "trusted.libvirt.security.dac", b"x"),
    "setxattr as SELinux does": lambda at: os.setxattr(at / DEBIAN, "security.selinux", b"x"),
    "setxattr of an ACL": lambda at: os.setxattr(at / DEBIAN, "system.posix_acl_access", ACL),
    "removexattr": lambda at: os.removexattr(at / DEBIAN, "user.cachefs.name"),
}


def bind(path: Path) -> None:
    """Makes a socket there."""
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # The whole path may be longer than an address.
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        raise OSError(ctypes.get_errno(), "renameat2")


@pytest.mark.parametrize("way", list(WRITES))
def test_every_change_is_refused(node: Node, way: str) -> None:
    (node.mountpoint / "images" / DEBIAN).stat()
    (node.mountpoint / "raw" / DEBIAN).stat()
    before = tree(node)
    assert errno_of(lambda: WRITES[way](node.mountpoint / "images")) == errno.EROFS
    assert tree(node) == before


def tree(node: Node) -> dict[str, tuple[int, ...]]:
    """All that is there, and what a change would change."""
    found: dict[str, tuple[int, ...]] = {}
    for folder in (node.mountpoint, node.mountpoint / "images", node.mountpoint / "by-name"):
        for name in sorted(os.listdir(folder)):
            now = (folder / name).lstat()
            found[f"{folder}/{name}"] = (now.st_ino, now.st_mode, now.st_uid, now.st_gid, now.st_mtime_ns)
    return found


def test_changes_that_are_not_offered_at_all(node: Node) -> None:
    """By any filesystem of this kind."""
    images = node.mountpoint / "images"
    assert errno_of(lambda: os.open(images, os.O_TMPFILE | os.O_RDWR)) == errno.EOPNOTSUPP
    with (images / DEBIAN).open("rb") as file:
        assert errno_of(lambda: os.write(file.fileno(), b"x")) == errno.EBADF
        assert errno_of(lambda: os.ftruncate(file.fileno(), 0)) == errno.EINVAL
        assert errno_of(lambda: os.posix_fallocate(file.fileno(), 0, 4096)) == errno.EBADF
        assert errno_of(lambda: os.fchmod(file.fileno(), 0o666)) == errno.EROFS
        os.fsync(file.fileno())  # There is nothing to sync.


def test_another_account_may_change_nothing_either(origin: ScriptedOrigin) -> None:
    """What the mode forbids, the kernel refuses before anybody is asked."""
    with tempfile.TemporaryDirectory(prefix="cachefs-") as folder:
        os.chmod(folder, 0o755)
        with Node(Path(folder), origin.url) as node:
            path = node.path(DEBIAN)
            before = path.stat().st_mtime_ns
            nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
            for command, said in (
                (["touch", path], "Permission denied"),
                (["touch", "-d", "2001-01-01", path], "Operation not permitted"),
                (["chmod", "666", path], "Operation not permitted"),
                (["rm", "-f", path], "Permission denied"),
                (["mkdir", path.parent / "x"], "Permission denied"),
                (["truncate", "-s", "0", path], "Permission denied"),
            ):
                done = subprocess.run([*nobody, *map(str, command)], capture_output=True, text=True, check=False)
                assert done.returncode == 1
                assert said in done.stderr or "Permission denied" in done.stderr
            assert path.stat().st_mtime_ns == before
            assert node.status()["leases"]["leased by a touch"] == 0


# ── Listings ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_listing_asks_once_per_ttl(tmp_path: Path, origin: ScriptedOrigin) -> None:
    def pages(node: Node) -> int:
        """So far, with what the daemon greets Glance with at its start, which is over then."""
        node.wait_for_status(lambda now: now["images"]["glance_reached"])
        return len(origin.of_kind(Kind.LIST))

    with Node(tmp_path, origin.url, glance={"listing_ttl": 3600}) as node:
        before = pages(node)
        os.listdir(node.mountpoint / "images")
        once = pages(node) - before
        for _ in range(3):
            os.listdir(node.mountpoint / "images")
            os.listdir(node.mountpoint / "by-name")
            node.ask("images")
            (node.mountpoint / "by-name" / "debian 13").read_bytes()
        assert pages(node) - before == once > 0
        node.stop()
        node.configure(glance={"listing_ttl": 0})
        node.start()
        before = pages(node)
        os.listdir(node.mountpoint / "images")
        os.listdir(node.mountpoint / "images")
        assert pages(node) - before == 2 * once


def test_opening_asks_once_per_ttl(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Node(tmp_path, origin.url, glance={"listing_ttl": 3600}) as node:
        origin.clear()
        for _ in range(5):
            read_buffered(node.path(DEBIAN), 0, 1)
        assert len(origin.of_kind(Kind.IMAGE, DEBIAN)) == 1


def test_three_thousand_images(tmp_path: Path) -> None:
    ids = [id_of(number) for number in range(3000)]
    with ScriptedOrigin([image(id_, f"image {id_}") for id_ in ids]) as origin, Node(tmp_path, origin.url) as node:
        assert sorted(os.listdir(node.mountpoint / "images")) == ids
        assert sorted(os.listdir(node.mountpoint / "by-name")) == [f"image {id_}" for id_ in ids]
        assert {entry.stat().st_size for entry in os.scandir(node.mountpoint / "images")} == {SIZE}
        assert origin.of_kind(Kind.IMAGE) == []


def test_known_images_are_listed_and_opened_without_glance(tmp_path: Path, origin: ScriptedOrigin) -> None:
    node = Node(tmp_path, origin.url, mount={"read_deadline": 2}, glance={"listing_ttl": 0, "retries": 0})
    with node:
        listed = sorted(os.listdir(node.mountpoint / "images"))
        assert node.path(DEBIAN).read_bytes() == BYTES(0, SIZE)
    origin.stop()
    try:
        with node:
            assert sorted(os.listdir(node.mountpoint / "images")) == listed
            assert sorted(os.listdir(node.mountpoint / "by-name")) == ["deactivated", "debian 13"]
            assert node.path(DEBIAN).read_bytes() == BYTES(0, SIZE)
            assert errno_of(lambda: node.path(DEACTIVATED).open("rb")) == errno.EACCES
            # Nobody can say whether there is one: that is no "no".
            assert errno_of(node.path(UNKNOWN).stat) == errno.EIO
            assert node.status()["images"]["glance_trouble"]
    finally:
        origin.start()


def test_an_origin_that_cannot_list_keeps_what_is_known(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Node(tmp_path, origin.url, glance={"listing_ttl": 0}) as node:
        listed = sorted(os.listdir(node.mountpoint / "images"))
        origin.fault(*[Status(500)] * 4, kind=Kind.LIST)
        assert sorted(os.listdir(node.mountpoint / "images")) == listed
