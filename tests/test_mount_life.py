"""How a daemon begins and ends: in order, by surprise, and not at all. What it leaves is judged by `check`."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import select
import selectors
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from cachefs import __version__
from cachefs.store import format as f
from cachefs.store.check import check
from cachefs.store.index import Index, WriteSet
from tests.cloud.service import clean_environment, poll_until
from tests.node import ROOT, Node, errno_of, mounts_at, read_buffered, read_direct, run_command, unmount
from tests.origin import Content, Fault, Kind, OriginImage, Request, ScriptedOrigin, Stall, pattern

pytestmark = pytest.mark.mount

KIB, MIB = 1 << 10, 1 << 20
IMAGE: Final = "30000000-0000-4000-8000-000000000001"
TWIN: Final = "30000000-0000-4000-8000-000000000002"
STALLED: Final = "30000000-0000-4000-8000-000000000003"
UNKNOWN: Final = "30000000-0000-4000-8000-00000000dead"
SIZE: Final = 400 * MIB + 4711
# How far the twin's bytes lie behind those of the image: chunks are shared, spans are not the same.
SHIFT: Final = 5 * 64 * KIB
ABORTED: Final = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)


def with_holes(size: int, shift: int) -> Content:
    """Pattern, with a run of zeros in every MiB."""
    bytes_of = pattern(size + shift)

    def read(offset: int, length: int) -> bytes:
        data = bytearray(bytes_of(offset + shift, min(length, size - offset)))
        first = offset + shift
        for start in range(first - first % MIB + 256 * KIB, first + len(data), MIB):
            low, high = max(start - first, 0), min(start - first + 100 * KIB, len(data))
            if low < high:
                data[low:high] = bytes(high - low)
        return bytes(data)

    return read


BYTES: Final = with_holes(SIZE, 0)
TWIN_BYTES: Final = with_holes(SIZE, SHIFT)
CONTENTS: Final = {IMAGE: BYTES, TWIN: TWIN_BYTES}


class StallingOrigin(ScriptedOrigin):
    """Its image STALLED gives no byte until `release` is set."""

    def __init__(self) -> None:
        images = [OriginImage(id_, None, SIZE, CONTENTS.get(id_, BYTES)) for id_ in (IMAGE, TWIN, STALLED)]
        super().__init__(images, script=self._stall)
        self.release = threading.Event()

    def _stall(self, request: Request) -> Fault | None:
        return Stall(release=self.release) if request.image == STALLED and request.kind is Kind.DATA else None


@pytest.fixture
def origin() -> Iterator[StallingOrigin]:
    with StallingOrigin() as origin:
        try:
            yield origin
        finally:
            origin.release.set()


@pytest.fixture
def node(tmp_path: Path, origin: StallingOrigin) -> Node:
    """Stopped."""
    return Node(tmp_path, origin.url)


def assert_sound(folder: Path) -> None:
    report = check(folder)
    assert report.sound, [str(finding) for finding in report.findings]


# ── An end in order ───────────────────────────────────────────────────────────────────────────────────


def test_what_systemd_is_told(node: Node) -> None:
    with node:
        assert node.notices[0] == {"READY": "1", "STATUS": f"mounted on {node.mountpoint}"}
        assert node.mounted
        assert node.path(IMAGE).stat().st_size == SIZE  # Ready means that it answers.
        assert f"mounted on {node.mountpoint}" in node.log
        node.stop()
        assert {"STOPPING": "1"}.items() <= node.notices[1].items()
        assert "STATUS" in node.notices[-1]
        assert not node.socket.exists()
        assert_sound(node.store)


def test_the_watchdog_is_fed_and_its_end_leaves_stacks(tmp_path: Path, origin: StallingOrigin) -> None:
    node = Node(tmp_path, origin.url, wrapper=("env", "WATCHDOG_USEC=100000"))
    with node:
        node.wait_for(lambda: node.notices.count({"WATCHDOG": "1"}) >= 3)
        os.kill(node.pid, signal.SIGABRT)  # What systemd sends to who does not feed it.
        assert node.wait_for_end() == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in node.log
        assert 'daemon.py", line' in node.log
        node.kill()
        unmount(node.mountpoint)
    assert_sound(node.store)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_while_reads_wait(node: Node, origin: StallingOrigin, number: signal.Signals) -> None:
    with node, ThreadPoolExecutor(20) as pool:
        path = node.path(STALLED)
        right = read_buffered(node.path(IMAGE), 0, 2 * MIB)
        reads = [pool.submit(read_direct, path, at * 4 * MIB, 4096) for at in range(20)]
        node.wait_for_status(lambda now: now["reads"]["waiting"] == len(reads))
        assert origin.held > 0
        os.kill(node.pid, number)
        assert node.wait_for_end() == 0
        assert not node.mounted
        assert all(read.exception().errno in ABORTED for read in reads)  # type: ignore[union-attr]
        node.kill()
        assert_sound(node.store)
        # What had been fetched is kept.
        origin.clear()
        node.start()
        assert read_direct(node.path(IMAGE), 0, 2 * MIB) == right == BYTES(0, 2 * MIB)
        assert origin.data_requests == 0


def test_more_signals_while_it_stops_do_not_cut_that(node: Node) -> None:
    """As `timeout` sends them, to the process and then to its group: each 0.2 ms until it has ended."""
    for _ in range(3):
        with node:
            assert read_buffered(node.path(IMAGE), 0, MIB) == BYTES(0, MIB)
            pid = node.pid
            os.kill(pid, signal.SIGTERM)
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                os.kill(pid, signal.SIGTERM)
                time.sleep(0.0002)
            assert node.wait_for_end() == 0
            assert not node.mounted
            assert "stopped" in node.log
            node.kill()
    assert_sound(node.store)


def test_a_signal_in_the_moment_of_mounting_leaves_no_dead_mount(node: Node) -> None:
    try:
        with (
            open("/proc/self/mountinfo") as mounts,
            subprocess.Popen(node.command, cwd=ROOT, stdout=subprocess.DEVNULL) as daemon,
        ):
            changed = select.poll()
            changed.register(mounts, select.POLLPRI)
            while mounts_at(node.mountpoint) == 0:
                assert changed.poll(30_000), "nothing was mounted"
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(30) == 0
        assert mounts_at(node.mountpoint) == 0
    finally:
        unmount(node.mountpoint)


def test_a_stop_keeps_what_was_fetched_a_moment_before(tmp_path: Path, origin: StallingOrigin) -> None:
    node = Node(tmp_path, origin.url, store={"commit_interval": 60})
    # What the kernel reads ahead may be on its way at the stop: nobody is to fetch that for the next guest.
    node.configure(trace={"seconds": 0})
    with node:
        assert read_buffered(node.path(IMAGE), 0, 3 * MIB) == BYTES(0, 3 * MIB)
    assert_sound(node.store)
    origin.clear()
    with node:
        assert read_direct(node.path(IMAGE), 0, 3 * MIB) == BYTES(0, 3 * MIB)
        assert origin.data_requests == 0


def test_an_unmount_from_outside_ends_it(node: Node) -> None:
    with node:
        read_buffered(node.path(IMAGE), 0, 1)
        subprocess.run(["umount", str(node.mountpoint)], check=True)
        assert node.wait_for_end() == 0
        assert "Traceback" not in node.log
        assert_sound(node.store)
        node.kill()


def test_a_file_that_is_open_does_not_keep_it_from_ending(node: Node) -> None:
    with node:
        opened = os.open(node.path(IMAGE), os.O_RDONLY)
        try:
            assert os.pread(opened, 10, 0) == BYTES(0, 10)
            node.stop()
            assert errno_of(lambda: os.pread(opened, 10, 200 * MIB)) in ABORTED
        finally:
            assert errno_of(lambda: os.close(opened)) in (None, *ABORTED)


def test_sigusr1_logs_every_stack(node: Node, origin: StallingOrigin) -> None:
    with node, ThreadPoolExecutor(1) as pool:
        read = pool.submit(read_direct, node.path(STALLED), 0, 4096)
        node.wait_for_status(lambda now: now["reads"]["waiting"] == 1)
        os.kill(node.pid, signal.SIGUSR1)
        # Tasks first, then threads; each tells where it stands.
        node.wait_for(lambda: "most recent call first" in node.log and "Fetcher._fly" in node.log)
        assert "fetcher.py" in node.log
        assert "_until_signalled" in node.log
        origin.release.set()
        assert read.result(timeout=30) == BYTES(0, 4096)


# ── An end by surprise ────────────────────────────────────────────────────────────────────────────────

# As for the stores' tests: CACHEFS_HUNT=4 looks four times as often, and elsewhere in each run.
HUNT: Final = int(os.environ.get("CACHEFS_HUNT", "1"))
KILLS: Final = 16 * HUNT
KILLS_BUDGET_S: Final = 90.0 * HUNT
KILLED_IN_BYTES: Final = 24 * MIB


def test_sigkill_at_any_moment(tmp_path: Path, origin: StallingOrigin) -> None:
    """Each start finds a dead mount, an old socket and half of what was being written."""
    seed = 20261122 if HUNT == 1 else random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    node = Node(tmp_path, origin.url, store={"commit_interval": 0.05})
    began_s = time.monotonic()
    seen: list[tuple[str, int, int]] = []
    try:
        for _ in range(KILLS):
            node.start()
            for image, offset, length in rng.sample(seen, min(len(seen), 8)):
                assert read_direct(node.path(image), offset, length) == CONTENTS[image](offset, length)
            enough = origin.bytes_sent + rng.randrange(KILLED_IN_BYTES)
            with ThreadPoolExecutor(4) as pool:
                readers = [pool.submit(read_until_killed, node, rng.randrange(1 << 30)) for _ in range(4)]
                try:
                    origin.wait_for(functools.partial(has_sent, origin, enough), 60)
                finally:
                    node.kill(leave_mount=True)
            for reader in readers:
                seen += reader.result()
            assert mounts_at(node.mountpoint) == 1
            assert errno_of(lambda: os.statvfs(node.mountpoint)) == errno.ENOTCONN
            assert_sound(node.store)
            assert time.monotonic() - began_s < KILLS_BUDGET_S
        node.start()
        for image, offset, length in seen:
            assert read_direct(node.path(image), offset, length) == CONTENTS[image](offset, length)
        node.stop()
        assert_sound(node.store)
    finally:
        node.kill()


def has_sent(origin: ScriptedOrigin, enough: int) -> bool:
    return origin.bytes_sent >= enough


def read_until_killed(node: Node, seed: int) -> list[tuple[str, int, int]]:
    """Reads at random, comparing; returns what it read."""
    rng = random.Random(seed)
    done: list[tuple[str, int, int]] = []
    while True:
        image = rng.choice((IMAGE, TWIN))
        length = rng.choice((4096, 64 * KIB, MIB, 5 * MIB))
        offset = rng.randrange((SIZE - length) // 4096) * 4096
        try:
            data = rng.choice((read_buffered, read_direct))(node.path(image), offset, length)
        except OSError as error:
            if error.errno not in ABORTED:
                raise
            return done
        if len(data) < length:  # A read that was cut by the kill, after some of its bytes.
            assert data == CONTENTS[image](offset, len(data))
            continue
        assert data == CONTENTS[image](offset, length)
        done.append((image, offset, length))


STARTS_A_NODE: Final = """
    import sys, time
    from pathlib import Path
    from tests.node import Node
    node = Node(Path(sys.argv[1]), "http://127.0.0.1:9")
    node.start()
    print(node.pid, flush=True)
    time.sleep(60)
"""


def test_a_node_of_the_tests_does_not_outlive_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(STARTS_A_NODE), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as tests:
        assert tests.stdout is not None
        daemon = os.pidfd_open(int(tests.stdout.readline()))
        try:
            tests.kill()
            with selectors.DefaultSelector() as selector:
                selector.register(daemon, selectors.EVENT_READ)
                assert selector.select(30), "the daemon is still there"
            assert mounts_at(tmp_path / "mnt") == 0
        finally:
            os.close(daemon)
            unmount(tmp_path / "mnt")


def test_the_daemon_takes_a_dead_mount_away_itself(node: Node) -> None:
    try:
        node.start()
        read_buffered(node.path(IMAGE), 0, 1)
        node.kill(leave_mount=True)
        assert errno_of(lambda: os.statvfs(node.mountpoint)) == errno.ENOTCONN
        node.start()
        assert "dead mount" in node.log
        assert mounts_at(node.mountpoint) == 1
        assert read_buffered(node.path(IMAGE), 0, 1) == BYTES(0, 1)
        node.stop()
    finally:
        node.kill()


# ── No beginning ──────────────────────────────────────────────────────────────────────────────────────


def assert_refused(node: Node, *words: str) -> None:
    """One clear line with these words, exit status 1, and nothing mounted by it."""
    mounts = mounts_at(node.mountpoint)
    refusal = node.refusal()
    assert refusal.status == 1, refusal
    assert refusal.line.startswith("cachefs: ")
    for word in words:
        assert word in refusal.line
    assert mounts_at(node.mountpoint) == mounts


def test_a_second_daemon_on_the_same_store(node: Node, tmp_path: Path, origin: StallingOrigin) -> None:
    (tmp_path / "second").mkdir()
    with node:
        second = Node(tmp_path / "second", origin.url, store={"path": node.store})
        assert_refused(second, str(node.store), "in use", str(node.pid))
        assert read_buffered(node.path(IMAGE), 0, 10) == BYTES(0, 10)
        assert node.status()["pid"] == node.pid


def test_a_second_daemon_on_the_same_mountpoint(node: Node, tmp_path: Path, origin: StallingOrigin) -> None:
    (tmp_path / "second").mkdir()
    with node:
        second = Node(tmp_path / "second", origin.url, mount={"mountpoint": node.mountpoint})
        assert_refused(second, str(node.mountpoint), "mounted there already")
        assert read_buffered(node.path(IMAGE), 0, 10) == BYTES(0, 10)


def test_a_second_daemon_on_the_same_socket(node: Node, tmp_path: Path, origin: StallingOrigin) -> None:
    (tmp_path / "second").mkdir()
    with node:
        second = Node(tmp_path / "second", origin.url)
        second.configure(control={"socket": node.socket})
        assert_refused(second, str(node.socket), "another daemon")
        assert node.status()["pid"] == node.pid


def test_no_mountpoint(node: Node) -> None:
    node.mountpoint.rmdir()
    assert_refused(node, str(node.mountpoint), "no such folder")
    node.mountpoint.write_text("a file")
    assert_refused(node, str(node.mountpoint), "not a folder")


def test_a_mountpoint_that_is_taken(node: Node) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(node.mountpoint)], check=True)
    try:
        assert_refused(node, str(node.mountpoint), "mounted there already")
    finally:
        unmount(node.mountpoint)


def test_a_mountpoint_with_an_odd_name(tmp_path: Path, origin: StallingOrigin) -> None:
    folder = tmp_path / "odd, na\\me \u00fc"
    folder.mkdir()
    node = Node(folder, origin.url)
    node.configure(leases={"folders": tmp_path / "instances"})  # A list has commas of its own.
    with node:
        assert read_buffered(node.path(IMAGE), 0, 10) == BYTES(0, 10)
        assert node.status()["mountpoint"] == str(node.mountpoint)


# In a namespace of its own, /dev made private there: also where / is no mount of its own, as in a chroot.
IN_OWN_MOUNTS: Final = ["unshare", "-m", "--propagation", "unchanged", "sh", "-c"]
NO_DEVICE: Final = (
    "mount --make-rprivate /dev && mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 "
    '&& mknod -m 666 /dev/urandom c 1 9 && exec "$@"'
)
OTHER_DEVICE: Final = 'mount --make-rprivate /dev && mount --bind /dev/null /dev/fuse && exec "$@"'


def test_no_fuse_device(tmp_path: Path, origin: StallingOrigin) -> None:
    node = Node(tmp_path, origin.url, wrapper=[*IN_OWN_MOUNTS, NO_DEVICE, "sh"])
    assert_refused(node, "/dev/fuse", "modprobe fuse")


def test_a_fuse_device_that_is_none(tmp_path: Path, origin: StallingOrigin) -> None:
    node = Node(tmp_path, origin.url, wrapper=[*IN_OWN_MOUNTS, OTHER_DEVICE, "sh"])
    refusal = node.refusal()
    assert refusal.status == 1
    assert refusal.lines[-1].startswith(f"cachefs: {node.mountpoint}: cannot be mounted")


def test_a_store_of_another_user(node: Node) -> None:
    node.store.mkdir()
    os.chown(node.store, 1234, 1234)
    assert_refused(node, str(node.store), "belongs to user 1234")


def test_a_store_of_a_newer_format(node: Node) -> None:
    with node:
        pass
    with closing(Index(node.store / "index")) as index:
        with index.reading() as snapshot:
            record = snapshot.get(f.Table.META, f.STORE_KEY)
        assert record is not None
        writes = WriteSet()
        newer = struct.pack("<8sI", f.MAGIC, f.FORMAT + 1) + record[12:] + b"and more"
        writes.put(f.Table.META, f.STORE_KEY, newer)
        index.commit(writes)
    assert_refused(node, str(node.store), f"format {f.FORMAT + 1}", "upgrade")
    checked = node.cli("check")
    assert (checked.returncode, checked.stdout) == (1, "")
    assert "upgrade" in checked.stderr


def test_a_folder_that_is_no_store(node: Node) -> None:
    node.store.mkdir()
    (node.store / "precious").write_text("data")
    assert_refused(node, str(node.store), "not empty")
    assert (node.store / "precious").read_text() == "data"


def test_a_store_on_a_path_that_is_a_file(node: Node) -> None:
    node.store.write_text("data")
    assert_refused(node, str(node.store))


def test_a_configuration_that_cannot_be_read(node: Node) -> None:
    node.config_file.write_bytes(b"[mount]\nmountpoint = /\xff\n")
    assert_refused(node, str(node.config_file), "UTF-8")
    node.config_file.write_text("mountpoint = /before/any/section\n[mount]\n")
    assert_refused(node, str(node.config_file), "section")
    node.config_file.unlink()
    assert_refused(node, str(node.config_file), "No such file")
    node.config_file.mkdir()
    assert_refused(node, str(node.config_file), "directory")


@pytest.mark.parametrize(
    ("section", "option", "value", "words"),
    [
        ("mount", "mount_point", "/mnt", ["mount/mount_point", "mountpoint"]),
        ("mount", "mountpoint", "relative", ["mount/mountpoint", "absolute"]),
        ("store", "path", "/nowhere/store", ["store/path", "under the mount"]),
        ("store", "max_size", "0", ["store/max_size", "no room"]),
        ("glance", "endpoints", "ftp://host", ["glance/endpoints", "http"]),
        ("glance", "auth_type", "v3nothing", ["glance/auth_type", "v3nothing"]),
        ("cache", "size", "1G", ["[cache]", "unknown section"]),
    ],
)
def test_a_configuration_that_contradicts_itself(
    node: Node, section: str, option: str, value: str, words: list[str]
) -> None:
    if option == "path":
        value = f"{node.mountpoint}/store"
    node.configure(**{section: {option: value}})
    assert_refused(node, *words)
    checked = node.cli("config", "check")
    assert checked.returncode == 1
    assert all(word in checked.stderr for word in words)


# ── A full disk ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of its own, of 64 MiB."""
    image, folder = tmp_path / "disk.ext4", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    mkfs = ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(image)]
    subprocess.run(mkfs, check=True, env=environment)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, env=environment)
    try:
        yield folder
    finally:
        unmount(folder)
        image.unlink()


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.mark.loop
def test_a_store_that_has_no_room_left(tmp_path: Path, small_disk: Path, origin: StallingOrigin) -> None:
    node = Node(tmp_path, origin.url, store={"path": small_disk / "store", "max_size": "100%"})
    with node:
        path = node.path(IMAGE)
        for offset in range(0, 120 * MIB, 4 * MIB):
            assert read_direct(path, offset, 4 * MIB) == BYTES(offset, 4 * MIB), offset
        found = node.wait_for_status(lambda now: now["store"]["trouble"])
        assert found["store"]["bytes_not_kept"] > 0
        assert "not kept:" in node.cli("status").stdout
    assert_sound(node.store)


@pytest.mark.loop
def test_a_disk_that_others_fill(tmp_path: Path, small_disk: Path, origin: StallingOrigin) -> None:
    """The store believed that there was room: writes fail with ENOSPC, and no reader hears of it."""
    node = Node(tmp_path, origin.url, store={"path": small_disk / "store", "max_size": "100%"})
    with node:
        path = node.path(IMAGE)
        assert read_direct(path, 0, 4 * MIB) == BYTES(0, 4 * MIB)
        node.wait_for_status(lambda now: now["store"]["bytes_cached"] >= 4 * MIB)
        ballast = small_disk / "ballast"
        with ballast.open("wb") as file:
            while (room := free_bytes(small_disk)) >= 4096:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room // 2 // 4096 * 4096 or 4096)
        for offset in range(0, 24 * MIB, 4 * MIB):
            assert read_direct(path, offset, 4 * MIB) == BYTES(offset, 4 * MIB), offset
        node.wait_for_status(lambda now: now["store"]["trouble"])
        assert read_direct(node.path(TWIN), 0, MIB) == TWIN_BYTES(0, MIB)  # A new view needs a commit, too.
        ballast.unlink()
        before = node.status()["store"]["bytes_cached"]
        offsets = iter(range(200 * MIB, SIZE, 4096))

        def keeps_again() -> bool:
            read_direct(path, next(offsets), 4096)
            return bool(node.status()["store"]["bytes_cached"] > before)

        assert poll_until(keeps_again, 60)  # It tries again only now and then.
        node.wait_for_status(lambda now: now["store"]["trouble"] is None)
    assert_sound(node.store)
    with node:
        assert read_direct(node.path(IMAGE), 0, 4 * MIB) == BYTES(0, 4 * MIB)


# ── The command ───────────────────────────────────────────────────────────────────────────────────────


def test_commands_without_a_daemon(node: Node) -> None:
    for command in (["status"], ["images", "--json"], ["image", IMAGE]):
        done = node.cli(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"cachefs: {node.socket}: no daemon answers there: start it (systemctl")


def test_a_command_that_is_none() -> None:
    for words in ([], ["nothing"], ["status", "--nothing"], ["image"]):
        done = run_command(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: cachefs")


def test_the_sample_configuration_says_everything() -> None:
    done = run_command("config", "sample")
    assert done.returncode == 0
    for word in ("[mount]", "[store]", "[glance]", "[control]", "#read_deadline", "#max_size", "#endpoints"):
        assert word in done.stdout


AS_NOBODY: Final = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]


def test_one_folder_is_made_for_the_socket_and_no_more(tmp_path: Path, origin: StallingOrigin) -> None:
    node = Node(tmp_path, origin.url)
    node.configure(control={"socket": tmp_path / "run" / "cachefs" / "control.sock"})
    assert_refused(node, str(tmp_path / "run"), "make it, or see to [control] socket")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with node:
        assert (tmp_path / "run" / "cachefs").stat().st_mode & 0o777 == 0o755


def test_the_control_socket_is_its_owners_alone(origin: StallingOrigin) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-") as folder:
        os.chmod(folder, 0o755)
        with Node(Path(folder), origin.url) as node:
            found = node.socket.lstat()
            assert stat.S_ISSOCK(found.st_mode)
            assert stat.S_IMODE(found.st_mode) == 0o660
            assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
            probe = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
            done = subprocess.run(
                [*AS_NOBODY, "/usr/bin/env", "python3", "-c", probe, str(node.socket)],
                env=clean_environment() | {"PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 1
            assert "PermissionError" in done.stderr


def as_json(node: Node, *words: str) -> Any:
    done = node.cli(*words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def shape(value: object) -> object:
    """The names and kinds in a JSON value."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


ROW_SHAPE: Final = {
    "cached": "int", "disk_format": "str", "held": "bool", "id": "str", "in_use": "bool", "name": "NoneType",
    "pinned": "bool", "priority": "str", "same_name": [], "size": "int", "state": "str", "status": "str",
}  # fmt: skip


GLANCE_WELL: Final = {"glance_reached": True, "glance_reason": None}


def test_json(node: Node) -> None:
    with node:
        with node.path(IMAGE).open("rb") as opened:
            opened.read(1)
            opened.seek(0)
            node.wait_for_status(lambda now: now["store"]["bytes_cached"] > 0)
            os.listdir(node.mountpoint / "images")
            status, images, image = (as_json(node, *words) for words in (["status"], ["images"], ["image", IMAGE]))
            images = images["images"]
        assert (status["version"], status["pid"]) == (__version__, node.pid)
        assert status["mountpoint"] == str(node.mountpoint)
        assert time.time() - 60 < status["images"].pop("listed") <= time.time()
        assert status["images"] == {"known": 3, "open": 1, "glance_trouble": None, **GLANCE_WELL}
        assert status["store"]["path"] == str(node.store)
        assert status["store"]["trouble"] is None
        assert shape(status["reads"]) == {
            **dict.fromkeys(("hits", "misses", "waiting", "sampled_bytes"), "int"),
            "waiting_longest": "float",
            "by_outcome": dict.fromkeys(("hit", "memory", "disk", "miss"), "int"),
            "bytes": dict.fromkeys(("memory", "disk", "miss"), "int"),
            "failed": {},
        }
        assert {"requests", "bytes_fetched", "retries", "failures", "flights"} <= set(status["fetcher"])
        assert status["fetcher"]["bytes_fetched"] >= status["store"]["bytes_cached"] > 0
        assert shape(images) == [ROW_SHAPE]
        assert [row["id"] for row in images] == [IMAGE, TWIN, STALLED]
        first = images[0]
        assert (first["size"], first["state"], first["in_use"]) == (SIZE, "partial", True)
        assert first.items() <= image.items()
        assert image["path"] == str(node.path(IMAGE))
        assert (image["origin"], image["handles"]) == ("ranges", 1)
        for words in (["image", UNKNOWN], ["image", "no-uuid"], ["image", "../../etc/passwd"]):
            done = node.cli(*words)
            assert (done.returncode, done.stdout) == (1, "")
            assert len(done.stderr.splitlines()) == 1
    found = as_json(node, "check")
    assert found["sound"] is True
    assert node.cli("check").returncode == 0


def test_a_check_of_a_store_in_use_is_refused(node: Node) -> None:
    with node:
        done = node.cli("check")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"in use by process {node.pid}: `cachefs scrub` verifies while that runs" in done.stderr


def test_the_daemon_answers_while_the_mount_does_not(node: Node, origin: StallingOrigin) -> None:
    with node, ThreadPoolExecutor(30) as pool:
        reads: list[Future[bytes]] = [
            pool.submit(read_buffered, node.path(STALLED), at * MIB, 1) for at in range(30)
        ]
        found = node.wait_for_status(lambda now: now["reads"]["waiting"] >= 30)
        assert found["fetcher"]["flights"] > 0
        assert "30 waiting" in node.cli("status").stdout
        origin.release.set()
        for read in reads:
            read.result(timeout=60)
        assert poll_until(lambda: node.status()["reads"]["waiting"] == 0, 10)
