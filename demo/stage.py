"""What the story stands on: a throw-away folder with a Glance and a cachefs daemon of its own. Rule: all of it
is gone after `strike`, in whatever state it was; and this process never touches the mount itself, so that
nothing can keep it from ending.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cachefs.asking import ask
from demo.endings import Signals
from demo.terminal import StepFailed, Terminal, size
from tests.cloud import Glance

TOOLS = {
    "sfdisk": "fdisk",
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "fusermount3": "fuse3",
    "setpriv": "util-linux",
    "dd": "coreutils",
    "curl": "curl",
}
SPACE_BYTES = 4 << 30

# Of a read that needs Glance while it is away.
READ_DEADLINE_S = 3

_COMMAND_MAX_S = 120.0
_READY_MAX_S = 30.0
_STOP_MAX_S = 20.0
_POLL_S = 0.1
_LOG_TAIL_LINES = 8
_LINES = 24  # Of a terminal, which no command here fills.

LOG, _STDERR = "cachefs.log", "stderr.log"

# Glance would write the zeros of a disk one by one.
_THIN = "[fast]\nfilesystem_thin_provisioning = true\n"

_CONFIGURATION = """\
[DEFAULT]
log_file = {folder}/{log}

[mount]
mountpoint = {folder}/mnt
allow_other = {others}
read_deadline = {deadline}

[store]
path = {folder}/store
max_size = 4G
min_free = 0
commit_interval = 0.2

[glance]
auth_type = none
endpoints = {endpoint}
retries = 1

# What is fetched is shown beside what is asked for: nothing in the background.
[hydration]
mode = manual

[control]
socket = {folder}/control.sock

# A port that is free: another daemon on this machine may have the usual one.
[metrics]
listen = 127.0.0.1:0
"""


def environment() -> dict[str, str]:
    """Ours, in plain English, and with the tools that are not in everybody's PATH."""
    path = os.environ.get("PATH", os.defpath)
    return os.environ | {
        "PATH": f"{path}:/usr/local/sbin:/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
        "PYTHONWARNINGS": "ignore",
    }


class Stage:
    """`build` first; `strike` last, always."""

    def __init__(self, terminal: Terminal, signals: Signals) -> None:
        self._terminal, self._signals = terminal, signals
        self._folder: Path | None = None
        self._environment = environment()
        self._glance: Glance | None = None
        self.daemon: subprocess.Popen[bytes] | None = None

    # ── where things are ──

    @property
    def folder(self) -> Path:
        assert self._folder is not None, "build comes first"
        return self._folder

    @property
    def mountpoint(self) -> Path:
        return self.folder / "mnt"

    @property
    def configuration(self) -> Path:
        return self.folder / "cachefs.conf"

    @property
    def glance(self) -> Glance:
        assert self._glance is not None, "start_glance comes first"
        return self._glance

    # ── building ──

    def build(self) -> None:
        """The folder; and whether all is there that the rest needs."""
        path = self._environment["PATH"]
        missing = sorted(
            f"{tool} ({package})" for tool, package in TOOLS.items() if not shutil.which(tool, path=path)
        )
        if missing:
            raise StepFailed(
                "looking for the tools", f"not found: {', '.join(missing)}; `make setup` installs them"
            )
        if not os.access("/dev/fuse", os.F_OK):
            raise StepFailed("looking for FUSE", "there is no /dev/fuse: load the module (modprobe fuse)")
        with self._signals.held():
            self._folder = Path(tempfile.mkdtemp(prefix="cachefs-demo-")).resolve()
        free = shutil.disk_usage(self.folder).free
        if free < SPACE_BYTES:
            raise StepFailed(
                "looking for room",
                f"{self.folder.parent} has {size(free)} free and {size(SPACE_BYTES)} are needed: "
                "TMPDIR names another folder",
            )
        self.mountpoint.mkdir()

    def start_glance(self) -> None:
        self._glance = Glance(self.folder / "glance")
        with (self.folder / "glance" / "glance-api.conf").open("a") as more:
            more.write(_THIN)
        self._glance.start()

    def start_daemon(self) -> None:
        self.configuration.write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                log=LOG,
                others=os.geteuid() == 0,
                endpoint=self.glance.endpoint,
                deadline=READ_DEADLINE_S,
            )
        )
        ready = self.folder / "notify.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(ready))
            listener.settimeout(_POLL_S)
            with self._signals.held(), (self.folder / _STDERR).open("ab") as log:
                self.daemon = subprocess.Popen(
                    # Should this process be killed, the daemon is told to end.
                    [
                        "setpriv",
                        "--pdeathsig",
                        "TERM",
                        *cachefs(),
                        "mount",
                        "--config-file",
                        str(self.configuration),
                    ],
                    env=self._environment | {"NOTIFY_SOCKET": str(ready)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is ours to pass on, in the right order.
                )
            self._wait_until_ready(listener, self.daemon)
        ready.unlink()

    def _wait_until_ready(self, listener: socket.socket, daemon: subprocess.Popen[bytes]) -> None:
        for _ in range(int(_READY_MAX_S / _POLL_S)):
            with suppress(TimeoutError):
                if b"READY=1" in listener.recv(4096):
                    return
            if daemon.poll() is not None:
                raise self._failed(f"the daemon ended with {daemon.returncode}:\n{self.log_tail()}")
        raise self._failed(f"the daemon is not ready after {_READY_MAX_S:.0f} s:\n{self.log_tail()}")

    def _failed(self, reason: str) -> StepFailed:
        return StepFailed(self._terminal.step, reason)

    def log_tail(self) -> str:
        """The last of what the daemon said."""
        paths = [self.folder / name for name in (LOG, _STDERR)]
        lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    @property
    def metrics(self) -> str:
        """The address of the metrics, as the daemon says it."""
        found = re.search(r"metrics on (http://\S+)", (self.folder / LOG).read_text())
        if found is None:
            raise self._failed(f"the daemon has not said where its metrics are:\n{self.log_tail()}")
        return found[1]

    # ── using it ──

    def run(self, arguments: Sequence[str], *, cwd: Path | None = None, fails: bool = False) -> str:
        """What a command prints. `fails`: it is expected to, and what it says on stderr is returned as well."""
        with self._signals.held():
            process = subprocess.Popen(
                arguments,
                cwd=cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if fails else subprocess.PIPE,
                text=True,
                errors="replace",
            )
        try:
            out, err = process.communicate(timeout=_COMMAND_MAX_S)
        except BaseException:
            process.kill()  # Not waited for: it may hang in the mount until that is gone.
            raise
        if process.returncode and not fails:
            raise StepFailed(
                self._terminal.step, f"{arguments[0]} ended with {process.returncode}: {(err or out).strip()}"
            )
        return out

    def on_terminal(self, arguments: Sequence[str], columns: int) -> str:
        """What a command prints on a terminal of so many columns that has no colours."""
        ours, theirs = pty.openpty()
        try:
            tty.setraw(theirs)
            termios.tcsetwinsize(theirs, (_LINES, columns))
            with self._signals.held():
                process = subprocess.Popen(
                    arguments,
                    env=self._environment | {"TERM": "xterm", "NO_COLOR": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=theirs,
                    stderr=theirs,
                )
        finally:
            os.close(theirs)
        try:
            out = b"".join(_all_of(ours)).decode(errors="replace")
            process.wait(_COMMAND_MAX_S)
        except BaseException:
            process.kill()
            raise
        finally:
            os.close(ours)
        if process.returncode:
            raise StepFailed(self._terminal.step, f"{arguments[0]} ended with {process.returncode}: {out.strip()}")
        return out

    def cachefs(self, command: str) -> list[str]:
        """A cachefs command about this daemon."""
        return [*cachefs(), command, "--config-file", str(self.configuration)]

    def status(self) -> dict[str, Any]:
        """What `cachefs status --json` prints."""
        found: dict[str, Any] = ask(str(self.folder / "control.sock"), "status")
        return found

    # ── ending ──

    def stop_daemon(self) -> None:
        """As systemd would: SIGTERM, and time to unmount and to commit."""
        if self.daemon is None:
            return
        self.daemon.send_signal(signal.SIGTERM)
        try:
            self.daemon.wait(_STOP_MAX_S)
        except subprocess.TimeoutExpired:
            raise StepFailed("stopping the daemon", f"it is still there after {_STOP_MAX_S:.0f} s") from None
        self.daemon = None

    def strike(self) -> list[str]:
        """Ends and removes everything. Returns what could not be."""
        left: list[str] = []
        self._signals.ignore()
        try:
            self.stop_daemon()
        except StepFailed as error:
            left.append(f"{error.step}: {error.reason}")
        if self._glance is not None:
            try:
                self._glance.close()
            except Exception as error:  # noqa: BLE001  # Whatever it is, the rest is to go as well.
                left.append(f"stopping Glance: {error}")
        _kill_children()
        if self._folder is None:
            return left
        for _ in range(8):
            if not is_mounted(self.mountpoint):
                break
            self._unmount()
        else:
            return [*left, f"{self.mountpoint} is still mounted: umount -l it, then remove {self.folder}"]
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            left.append(f"{self.folder} could not be removed")
        return left

    def _unmount(self) -> None:
        tool = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [*tool, str(self.mountpoint)],
                env=self._environment, capture_output=True, timeout=_STOP_MAX_S, check=False,
            )  # fmt: skip


def _all_of(terminal: int) -> Iterator[bytes]:
    """What comes until nobody has the other end any more, or for `_COMMAND_MAX_S`."""
    deadline_s = time.monotonic() + _COMMAND_MAX_S
    while select.select([terminal], [], [], max(deadline_s - time.monotonic(), 0))[0]:
        try:
            said = os.read(terminal, 65536)
        except OSError:  # EIO: so the end is told.
            return
        if not said:
            return
        yield said


def cachefs() -> list[str]:
    """The command of this environment."""
    script = Path(sys.executable).with_name("cachefs")
    return [str(script)] if script.exists() else [sys.executable, "-m", "cachefs.cli"]


def is_mounted(folder: Path) -> bool:
    """From mountinfo: asking the filesystem would wait for a daemon that hangs."""
    mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return any(line.split(" ")[4].replace("\\040", " ") == str(folder) for line in mounts)


def _kill_children() -> None:
    """Everything that this process has started and that is still there."""
    for pid in _children():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _STOP_MAX_S
    while _children() and time.monotonic() < deadline_s:
        with suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.01)


def _children() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name may hold anything, so what counts begins behind its last parenthesis: state, parent.
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found
