"""A real daemon on a folder of its own: `python -m cachefs.cli mount` as a child. Rule: a node that was started
leaves neither a process nor a mount behind, whatever failed.

    with Node(tmp_path, origin.url, mount={"read_deadline": 5}) as node:
        node.path(IMAGE).read_bytes()
        assert node.status()["reads"]["misses"] == 1

What the child says (datagrams to its NOTIFY_SOCKET, lines of its log) and that it has ended are events: `wait_for`
wakes up at each. Start a node in the main thread: the kernel takes the end of the thread that did for the end
of the parent, and then ends the daemon in good order.
"""

from __future__ import annotations

import mmap
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cachefs import asking
from tests.cloud.service import clean_environment, poll_until

ROOT: Final = Path(__file__).parent.parent
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 60.0
COMMAND_TIMEOUT_S: Final = 60.0
LOG_PIECE_BYTES: Final = 65536


class NodeFailed(Exception):
    """The daemon ended, or did not do in time what was waited for."""


@dataclass(frozen=True)
class Refusal:
    """How a daemon ended that could not start; `lines` are those of stderr."""

    status: int
    lines: list[str]

    @property
    def line(self) -> str:
        """The one line that it is to be."""
        assert len(self.lines) == 1, self.lines
        return self.lines[0]


def missing_for_mounts() -> str | None:
    """What this machine lacks for a mount of the tests', in words; None where they can run."""
    if os.geteuid() != 0:
        return "mounts of the tests need root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse cannot be opened: {error.strerror}"
    for tool in ("setpriv", "umount"):
        if shutil.which(tool) is None:
            return f"there is no {tool} (util-linux)"
    return None


def missing_for_loops() -> str | None:
    """The same for a filesystem of its own on a loop device."""
    if os.geteuid() != 0:
        return "loop devices need root"
    if not os.path.exists("/dev/loop-control"):
        return "there is no /dev/loop-control"
    for tool in ("losetup", "mkfs.ext4", "mount"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"there is no {tool}"
    return None


class Node:
    """One daemon: stopped as made, then `start` ... `stop` or `kill`, and again. `endpoints` are Glance's; with
    Keystone, `glance` has the options. Each keyword is a section; what it leaves out is right for a test."""

    def __init__(
        self,
        folder: Path,
        *endpoints: str,
        mount: Mapping[str, object] | None = None,
        store: Mapping[str, object] | None = None,
        glance: Mapping[str, object] | None = None,
        default: Mapping[str, object] | None = None,
        wrapper: Sequence[str] = (),
        program: str = "cachefs.cli",
    ) -> None:
        """`wrapper` is a command that ends by running the words after it; `program` is the daemon's module."""
        self.folder = folder
        self.config_file = folder / "cachefs.conf"
        self.mountpoint, self.store = folder / "mnt", Path(str((store or {}).get("path", folder / "store")))
        self.socket = folder / "control.sock"
        access: dict[str, object] = {"auth_type": "none"} if endpoints else {}
        if endpoints:
            access["endpoints"] = ",".join(endpoints)
        self._sections: dict[str, dict[str, object]] = {
            "DEFAULT": {**(default or {})},
            "mount": {"mountpoint": self.mountpoint, "read_deadline": 30} | {**(mount or {})},
            "store": {"path": self.store, "min_free": 0, "commit_interval": 0.1} | {**(store or {})},
            "glance": access | {**(glance or {})},
            # What is fetched is what is asked for, unless the test is about the rest.
            "hydration": {"mode": "manual"},
            # Not those of this machine.
            "leases": {"folders": folder / "instances"},
            "control": {"socket": self.socket},
            # There are others on this machine: a test of the metrics takes a port that is free.
            "metrics": {"listen": ""},
        }
        self._wrapper, self._program = list(wrapper), program
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: _Watch | None = None
        self.mountpoint.mkdir(exist_ok=True)
        self.configure()

    def configure(self, **sections: Mapping[str, object]) -> None:
        """Writes the configuration again, with these changes, for the next start. None removes an option."""
        for section, known in sections.items():
            self._sections.setdefault(section, {}).update(known)
        self.config_file.write_text(
            "".join(
                f"[{section}]\n"
                + "".join(f"{k} = {str(v).replace('$', '$$')}\n" for k, v in known.items() if v is not None)
                for section, known in self._sections.items()
            )
        )

    # ── its life ──

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._process is not None and error is None:
                self.stop()
        finally:
            if self._process is not None and error is not None:
                print(f"── log of the node in {self.folder}\n{self.log}", file=sys.stderr)
            self.kill()

    @property
    def command(self) -> list[str]:
        daemon = [sys.executable, "-m", self._program, "mount", "--config-file", str(self.config_file)]
        return [*self._wrapper, "setpriv", "--pdeathsig", "TERM", *daemon]

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Returns when the daemon says READY. Raises NodeFailed with its log."""
        assert self._process is None, "already started"
        notices = self.folder / "notify.sock"
        notices.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(str(notices))
        environment = clean_environment() | {"NOTIFY_SOCKET": str(notices)}
        self._process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # oslo.log's, and
            stderr=subprocess.STDOUT,  # what Python says for itself.
        )
        self._watch = _Watch(self._process, listener)
        try:
            self.wait_for(lambda: self.ready, START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM; the daemon is to unmount, exit with 0 and have met nothing unexpected."""
        process = self._running()
        process.send_signal(signal.SIGTERM)
        self.wait_for_end(timeout_s)
        assert process.returncode == 0, f"exit status {process.returncode}\n{self.log}"
        assert not self.mounted, f"{self.mountpoint} is still mounted\n{self.log}"
        assert "Traceback" not in self.log, self.log
        self._process = None

    def kill(self, *, leave_mount: bool = False) -> None:
        """SIGKILL, in whatever state it is; what it had mounted is unmounted, unless it is to be left dead."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._watch is not None
            self._watch.finish()
            self._process = None
        if not leave_mount:
            unmount(self.mountpoint)

    def wait_for_end(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit status, once the daemon has ended."""
        process = self._running()
        assert self._watch is not None
        watch = self._watch
        self.wait_for(lambda: watch.ended, timeout_s)
        watch.finish()
        return process.wait()

    def refusal(self) -> Refusal:
        """Starts a daemon that is not to get as far as a mount."""
        process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, said = process.communicate(timeout=COMMAND_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
        return Refusal(process.returncode, said.splitlines())

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    # ── what it says ──

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float = 30) -> None:
        """Until it is true, which is tried whenever the daemon notifies, logs or ends. Raises NodeFailed."""
        assert self._watch is not None, "not started"
        watch = self._watch
        with watch.changed:
            watch.changed.wait_for(lambda: predicate() or watch.ended, timeout_s)
            if not predicate():
                how = "the daemon ended" if watch.ended else f"not within {timeout_s} s"
                raise NodeFailed(f"{how}:\n{self.log}")

    def wait_for_log(self, text: str, timeout_s: float = 30) -> None:
        self.wait_for(lambda: text in self.log, timeout_s)

    def wait_for_status(
        self, predicate: Callable[[dict[str, Any]], object], timeout_s: float = 30
    ) -> dict[str, Any]:
        """The first status for which it is true. Asked again and again: a daemon does not tell of reads."""
        last: dict[str, Any] = {}

        def is_so() -> bool:
            last.update(self.status())
            return bool(predicate(last))

        if not poll_until(is_so, timeout_s):
            raise NodeFailed(f"not within {timeout_s} s, status {last}:\n{self.log}")
        return last

    @property
    def notices(self) -> list[dict[str, str]]:
        """What it has told systemd since it was started last."""
        return list(self._watch.notices) if self._watch is not None else []

    @property
    def ready(self) -> bool:
        return any(notice.get("READY") == "1" for notice in self.notices)

    @property
    def log(self) -> str:
        """What it has logged, and said on stderr, since it was started last."""
        return self._watch.log if self._watch is not None else ""

    # ── what it offers ──

    def path(self, image: str) -> Path:
        return self.mountpoint / "images" / image

    @property
    def mounted(self) -> bool:
        return mounts_at(self.mountpoint) > 0

    def ask(self, command: str, **operands: Any) -> Any:
        """One request over the control socket."""
        return asking.ask(str(self.socket), command, **operands)

    def status(self) -> dict[str, Any]:
        return dict(self.ask("status"))

    def requests_seen(self) -> int:
        """Reads that have reached the daemon so far."""
        reads = self.status()["reads"]
        return int(reads["hits"] + reads["misses"])

    def cli(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs the console command with this node's configuration."""
        return run_command(*args, "--config-file", str(self.config_file))


class _Watch:
    """Hears a child until it has ended: datagrams, output, and the end itself, all under `changed`."""

    def __init__(self, process: subprocess.Popen[bytes], listener: socket.socket) -> None:
        assert process.stdout is not None
        self.changed = threading.Condition()
        self.notices: list[dict[str, str]] = []
        self.ended = self._at_end = False
        self._log = bytearray()
        self._listener, self._output = listener, process.stdout
        self._pidfd = os.pidfd_open(process.pid)
        self._listener.setblocking(False)
        os.set_blocking(self._output.fileno(), False)
        self._thread = threading.Thread(target=self._run, name=f"watch-{process.pid}", daemon=True)
        self._thread.start()

    @property
    def log(self) -> str:
        with self.changed:
            if not self.ended:
                self._hear()  # What it said before it answered somebody is there, whichever thread runs first.
            return self._log.decode(errors="replace")

    def finish(self) -> None:
        """After the end of the child: everything that it said has been heard."""
        self._thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for file in (self._listener, self._output, self._pidfd):
                selector.register(file, selectors.EVENT_READ)
            while not self.ended:
                ready = {key.fileobj for key, _ in selector.select()}
                with self.changed:
                    ended = self._pidfd in ready  # Before the last look: nothing is said after it.
                    self._hear()
                    if self._output in ready and not ended and self._at_end:
                        selector.unregister(self._output)
                    self.ended = ended
                    self.changed.notify_all()
        self._listener.close()
        self._output.close()
        os.close(self._pidfd)

    def _hear(self) -> None:
        try:
            while True:
                lines = self._listener.recv(LOG_PIECE_BYTES).decode().splitlines()
                self.notices.append(dict(line.split("=", 1) for line in lines))
        except BlockingIOError:
            pass
        try:
            while piece := os.read(self._output.fileno(), LOG_PIECE_BYTES):
                self._log += piece
            self._at_end = True
        except BlockingIOError:
            pass


# ── Mounts and commands ───────────────────────────────────────────────────────────────────────────────


def mounts_at(mountpoint: Path) -> int:
    """How many mounts lie there, dead ones too: asks nobody but the kernel."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return sum(_unescaped(line.split(" ")[4]) == str(mountpoint) for line in lines)


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)


def unmount(mountpoint: Path) -> None:
    """Whatever lies there, dead or alive, also while it is in use."""
    for _ in range(mounts_at(mountpoint)):
        subprocess.run(["umount", "-l", str(mountpoint)], check=True, capture_output=True)


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    """The `cachefs` command as an operator runs it."""
    program = Path(sys.executable).with_name("cachefs")
    return subprocess.run(
        [str(program), *args],
        check=False,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────


def errno_of(work: Callable[[], object]) -> int | None:
    """With what it fails; None when it does not."""
    try:
        work()
    except OSError as error:
        return error.errno
    return None


def read_buffered(path: Path, offset: int, length: int) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def read_direct(path: Path, offset: int, length: int) -> bytes:
    """Past the page cache, as a hypervisor reads: each read reaches the daemon."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as room:  # Begins on a page, as O_DIRECT may want it.
            return room[: os.preadv(file, [room], offset)]
    finally:
        os.close(file)


def drop_pages(path: Path) -> None:
    """Empties the kernel's page cache of this file, as far as nobody has it mapped."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
