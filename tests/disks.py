"""Disks that fail on demand and remember every write: one file of a FUSE filesystem, under a loop device. Rule: a
disk is a process of its own, so that it answers whatever the tested one and the test are doing.

    with Disk(tmp_path) as disk, disk.mounted() as folder:
        ...                                        # ext4 in `folder`
        disk.fault(Fault(On.READ, Does.HANG))
        ...
        disk.heal()
    log = disk.log()                               # every write and flush, in the order in which they came

Whatever the filesystem sends is in the log, as with dm-log-writes: bytes of files, its journal, its own blocks.
A flush promises that every write before it is on the medium. Discards do not exist here: a punch is a change of
the filesystem's blocks, no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import pyfuse3
import trio

MIB: Final = 1 << 20
NAME: Final = b"disk"
INODE: Final = pyfuse3.InodeT(2)
HANDLE: Final = pyfuse3.FileHandleT(1)
_HEADER: Final = struct.Struct("<QQ")  # offset (FLUSHED for a flush), length; then the bytes.
FLUSHED: Final = (1 << 64) - 1
ANSWER_TIMEOUT_S: Final = 20.0
# A test that hangs in its own disk could not heal it.
HANG_MAX_S: Final = 100.0
DETACH: Final = 2
PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)
TOOLS: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class On(StrEnum):
    """What meets a fault."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"


class Does(StrEnum):
    """FAIL: EIO, and nothing is done. HANG: until it is healed, or for HANG_MAX_S. SLOW: `seconds` later."""

    FAIL = "fail"
    HANG = "hang"
    SLOW = "slow"


@dataclass(frozen=True)
class Fault:
    """What befalls requests that touch [start, end) of the disk, with a probability. Flushes touch everything."""

    on: On
    does: Does = Does.FAIL
    start: int = 0
    end: int = 1 << 62
    probability: float = 1.0
    seconds: float = 0.0


class Logged(NamedTuple):
    """One write, or a flush, whose `data` is None."""

    offset: int
    data: bytes | None


# ── The disk, as the tests hold it ────────────────────────────────────────────────────────────────────


class Disk:
    """A disk of `size` bytes, on a loop device while the `with` lasts. It begins as `image`, or with an empty
    ext4. Without a `journal` a failed write does not make that read-only."""

    def __init__(
        self, folder: Path, size: int = 64 * MIB, *, journal: bool = True, image: memoryview | None = None
    ) -> None:
        self.folder, self.size = folder, size
        self._journal, self._image = journal, image
        self._stack = ExitStack()
        self.device = ""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._content = _memory(stack, "content", self.size)
            self._written = _memory(stack, "log", 0)
            if self._image is None:
                make_ext4(f"/proc/{os.getpid()}/fd/{self._content}", journal=self._journal)
            else:
                assert os.pwrite(self._content, self._image, 0) == self.size
            self.at_first = mmap.mmap(-1, self.size)
            stack.callback(self.at_first.close)
            copy_file(self._content, self.at_first)
            self._serve(stack)
            self.device = stack.enter_context(loop_device(self._file))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # It ended before; the rest is still to be taken away.
            self.heal()
        self._stack.close()

    def _serve(self, stack: ExitStack) -> None:
        served = self.folder / f"served-{os.getpid()}-{self._content}"
        served.mkdir()
        stack.callback(served.rmdir)
        self._file = served / NAME.decode()
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        self._control = ours.makefile("rw")
        stack.enter_context(self._control)
        ours.settimeout(ANSWER_TIMEOUT_S)
        files = (self._content, self._written, theirs.fileno())
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.disks", str(served), str(self.size), *map(str, files)],
                cwd=Path(__file__).parent.parent,
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the tests: they still need their disk to end.
            )
        stack.callback(_end, child, served)
        assert self._control.readline() == '"ready"\n', "the disk did not start"

    # ── what befalls it ──

    def fault(self, *faults: Fault) -> None:
        """From now on these faults and no others."""
        self._ask({"faults": [asdict(fault) for fault in faults]})

    def heal(self) -> None:
        """No faults; what hangs goes on."""
        self.fault()

    def counts(self) -> dict[str, int]:
        """How many requests came so far, by kind, and how many of each `failed_...` or are `hung` now."""
        return dict(self._ask({"counts": True}))

    def _ask(self, request: dict[str, Any]) -> Any:
        self._control.write(json.dumps(request) + "\n")
        self._control.flush()
        return json.loads(self._control.readline())

    # ── what was written ──

    @property
    def position(self) -> int:
        """How long the log is now: whatever was answered before is in it."""
        return os.fstat(self._written).st_size

    def log(self) -> Log:
        return Log(self._written)

    @contextmanager
    def mounted(self, options: str = "") -> Iterator[Path]:
        """The disk's ext4, mounted."""
        folder = self.folder / f"mounted-{self._content}"
        folder.mkdir(exist_ok=True)
        mount(self.device, folder, options)
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                self.heal()
            unmount_patiently(folder)


class Log:
    """What was written, up to now. Positions are bytes of the log, as `Disk.position` gave them."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.entries: list[Logged] = []
        self.ends: list[int] = []
        end = os.fstat(file).st_size
        at = 0
        while at < end:
            offset, length = _HEADER.unpack(os.pread(file, _HEADER.size, at))
            at += _HEADER.size
            is_flush = offset == FLUSHED
            self.entries.append(Logged(0, None) if is_flush else Logged(offset, os.pread(file, length, at)))
            at += length
            self.ends.append(at)


def _end(child: subprocess.Popen[bytes], served: Path) -> None:
    """The filesystem is unmounted, of which the child ends; what hangs in it does not hold it up."""
    if _libc.umount2(os.fsencode(served), DETACH):
        code = ctypes.get_errno()
        assert code == errno.EINVAL, os.strerror(code)
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def missing_for_disks() -> str | None:
    """What this machine lacks for a disk of the tests', in words; None where they can run."""
    if os.geteuid() != 0:
        return "loop devices need root"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            return f"there is no {device}"
    for tool in ("losetup", "mkfs.ext4"):
        if shutil.which(tool, path=TOOLS) is None:
            return f"there is no {tool}"
    return None


# ── Filesystems and loop devices ──────────────────────────────────────────────────────────────────────


def make_ext4(file: str, *, journal: bool = True) -> None:
    """Everything is laid out at once: nothing is left for the kernel to initialise later."""
    features = [] if journal else ["-O", "^has_journal"]
    command = ["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run([*command, *features, file], check=True, capture_output=True, env=os.environ | {"PATH": TOOLS})


@contextmanager
def loop_device(file: Path | str) -> Iterator[str]:
    """A loop device on `file`, past the page cache where the file can do that."""
    environment = os.environ | {"PATH": TOOLS}
    made = subprocess.run(
        ["losetup", "--find", "--show", str(file)], check=True, capture_output=True, text=True, env=environment
    )
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True, env=environment)


def mount(device: str, folder: Path, options: str = "") -> None:
    if _libc.mount(device.encode(), os.fsencode(folder), b"ext4", 0, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"mounting {device}")


def unmount(folder: Path, flags: int = 0) -> None:
    if _libc.umount2(os.fsencode(folder), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(folder))


@contextmanager
def small_ext4(folder: Path, size: int) -> Iterator[Path]:
    """An ext4 of `size` bytes, mounted on `folder`, which is made; on a loop device over memory."""
    folder.mkdir()
    with ExitStack() as stack:
        memory = os.memfd_create("tests-small-disk")
        stack.callback(os.close, memory)
        os.ftruncate(memory, size)
        file = f"/proc/{os.getpid()}/fd/{memory}"
        make_ext4(file)
        mount(stack.enter_context(loop_device(file)), folder)
        stack.callback(unmount_patiently, folder)
        yield folder


def unmount_patiently(folder: Path, patience_s: float = 5.0) -> None:
    """What was in use a moment ago is waited for; what still is, is detached, and an error."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return unmount(folder)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                with contextlib.suppress(OSError):
                    unmount(folder, DETACH)
                raise
        time.sleep(0.02)


def copy_file(file: int, to: mmap.mmap) -> None:
    view = memoryview(to)
    at = 0
    while at < len(view) and (n := os.preadv(file, [view[at : at + MIB]], at)):
        at += n


def _memory(stack: ExitStack, name: str, size: int) -> int:
    file = os.memfd_create(f"tests-disk-{name}")
    stack.callback(os.close, file)
    os.ftruncate(file, size)
    return file


# ── The disk's own process ────────────────────────────────────────────────────────────────────────────


class _Served(pyfuse3.Operations):
    """A filesystem of one file. Every request looks for its fault first, and again when it may go on."""

    def __init__(self, size: int, content: int, log: int) -> None:
        super().__init__()
        self._size = size
        self._content = memoryview(mmap.mmap(content, size))
        self._log = log
        self.faults: list[Fault] = []
        self.changed = trio.Event()
        self.counts = dict.fromkeys((*On, *(f"failed_{on}" for on in On), "hung"), 0)
        self._random = random.Random(1)

    def change(self, faults: list[Fault]) -> None:
        self.faults = faults
        self.changed.set()
        self.changed = trio.Event()

    async def _meet(self, on: On, start: int, end: int) -> None:
        self.counts[on] += 1
        while (fault := self._fault(on, start, end)) is not None:
            match fault.does:
                case Does.FAIL:
                    self.counts[f"failed_{on}"] += 1
                    raise pyfuse3.FUSEError(errno.EIO)
                case Does.SLOW:
                    return await trio.sleep(fault.seconds)
                case Does.HANG:
                    self.counts["hung"] += 1
                    with trio.move_on_after(HANG_MAX_S) as patience:
                        await self.changed.wait()
                    self.counts["hung"] -= 1
                    if patience.cancelled_caught:
                        return None
        return None

    def _fault(self, on: On, start: int, end: int) -> Fault | None:
        for fault in self.faults:
            touches = on is On.FLUSH or (fault.start < end and start < fault.end)
            if fault.on == on and touches and self._random.random() < fault.probability:
                return fault
        return None

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        await self._meet(On.READ, off, off + size)
        return bytes(self._content[off : min(off + size, self._size)])

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        await self._meet(On.WRITE, off, off + len(buf))
        self._content[off : off + len(buf)] = buf
        self._note(off, buf)
        return len(buf)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self._meet(On.FLUSH, 0, 0)
        self._note(FLUSHED, b"")

    def _note(self, offset: int, data: bytes) -> None:
        """In one write, so that the log ends after a whole entry at every moment."""
        entry = _HEADER.pack(offset, len(data)) + data
        assert os.write(self._log, entry) == len(entry)

    # ── what a filesystem of one file has to know ──

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(INODE, ctx)

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o600 if inode == INODE else stat.S_IFDIR | 0o700
        entry.st_size = self._size if inode == INODE else 0
        entry.st_nlink = 1
        return entry

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return await self.getattr(inode, ctx)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=HANDLE, direct_io=True)  # Every request of the loop device comes here.

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """A descriptor was closed: nothing is promised by that."""

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        pass


async def _listen(served: _Served, control: trio.SocketStream) -> None:
    pending = b""
    while piece := await control.receive_some():
        pending += piece
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            request = json.loads(line)
            if "faults" in request:
                served.change([_fault_of(fault) for fault in request["faults"]])
            await control.send_all(json.dumps(served.counts).encode() + b"\n")


def _fault_of(said: dict[str, Any]) -> Fault:
    return Fault(**said | {"on": On(said["on"]), "does": Does(said["does"])})


async def _serve_disk(folder: str, size: int, content: int, log: int, control: int) -> None:
    served = _Served(size, content, log)
    pyfuse3.init(served, folder, {"fsname=tests-disk", "default_permissions"})
    try:
        async with trio.open_nursery() as nursery:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=control)))
            nursery.start_soon(_listen, served, stream)
            await stream.send_all(b'"ready"\n')
            await pyfuse3.main(1, 64)  # Until it is unmounted.
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    size, content, log, control = map(int, sys.argv[2:])
    trio.run(_serve_disk, sys.argv[1], size, content, log, control)
