"""Runs a program that may be taken over by what it reads. Rule: what comes out of the cell is bounded, and is
never believed: no output of it becomes a path, a log line as it is, or a decision.

The cell is made by `confine`, a small program of its own, from namespaces of the kernel; nothing has to be
installed. What runs in it has

- no network: a network namespace in which even the loopback is down; and no IPC or other processes to be seen;
- no files but the ones that it was given open, and its own program and libraries read-only (`VISIBLE`): no
  /proc, no /dev, no /etc, no store, no mount of cachefs. Nothing can be written, not even to memory-backed
  files;
- another user (`nobody` unless told otherwise), no group besides its own, no capability and no way to gain one
  (NO_NEW_PRIVS); an empty environment; stdin and stdout are /dev/null; a session of its own;
- limits on CPU time, memory, descriptors, processes, and on its life; it is the first choice of the OOM killer;
- an end: when it is stopped, when its time is up, and when the daemon dies, however that happens.

All of this or nothing: where a part cannot be had, the program is not run, and `Ending.failed` says which part.
As root the user really is another. Without root a user namespace has to be allowed
(kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns, RestrictNamespaces= of systemd),
and two things are less: to the rest of the machine it is the daemon's own user, which matters only to one that
has broken out of its namespaces, and it keeps the daemon's supplementary groups. There is no filter of system
calls: against bugs of the kernel itself it stands only as far as an unprivileged process without files or
network does.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import string
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from cachefs import confine

# What a program of the distribution needs to start: itself, its libraries, and where they are.
VISIBLE = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")
STDERR_MAX, SAID_MAX = 4096, 200
REPORT_MAX = 8192
STOP_S = 5.0  # To kill and to report takes milliseconds, unless the kernel cannot end a process.

_PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation)


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the command runs as. Ids that nobody else has are best: the kernel counts processes by user."""

    uid: int = 65534
    gid: int = 65534

    @classmethod
    def of(cls, name: str) -> Account:
        """A user of this machine by its name. Raises KeyError."""
        found = pwd.getpwnam(name)
        return cls(found.pw_uid, found.pw_gid)


@dataclass(frozen=True, slots=True)
class Limits:
    """What it may use: CPU seconds and seconds of life, bytes of address space, descriptors, processes and threads
    (of its user)."""

    cpu_s: int = 3600
    time_s: float = 24 * 3600.0
    memory_bytes: int = 1 << 30
    files_max: int = 64
    processes_max: int = 256


NOBODY, LIMITS = Account(), Limits()


@dataclass(frozen=True, slots=True)
class Ending:
    """How a command ended. `status`: its exit status, or the negative number of the signal that killed it; None
    when it did not begin: `failed` says why, and it says nothing of what it was to read. `stopped`: it was
    killed from here, as "asked" or for "time". `said`: its stderr, made harmless: printable,
    one line, short."""

    status: int | None
    stopped: str = ""
    failed: str = ""
    cpu_s: float = 0.0
    said: str = ""

    def __str__(self) -> str:
        if self.failed:
            return f"did not begin: {self.failed}"
        if self.stopped == "time":
            return "was killed: its time was up"
        if self.status is not None and self.status < 0:
            return f"was killed by {_signal_name(-self.status)}"
        return f"ended with status {self.status}"


class Process:
    """A command in its cell. Made by `sandboxed`."""

    def __init__(self, helper: trio.Process, control: int, report: int, stderr: int) -> None:
        self._helper, self._control, self._report, self._stderr = helper, control, report, stderr

    def stop(self) -> None:
        """Kills it, and whatever it started. May be called again."""
        if self._control >= 0:
            os.close(self._control)
            self._control = -1

    async def wait(self) -> Ending:
        """Returns when nothing of it runs any more."""
        await self._helper.wait()
        try:
            # Written in one piece, by our own program; only `failed` has words in it.
            ending = json.loads(os.read(self._report, REPORT_MAX))
            return Ending(
                ending["status"],
                ending["stopped"],
                harmless(ending["failed"]),
                ending["cpu_s"],
                self._said(),
            )
        except (ValueError, KeyError, BlockingIOError):
            return Ending(None, failed=f"confine ended with status {self._helper.returncode}", said=self._said())

    def _said(self) -> str:
        try:
            return harmless(os.read(self._stderr, STDERR_MAX).decode("ascii", errors="replace"))
        except BlockingIOError:
            return ""

    async def _close(self) -> None:
        self.stop()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(STOP_S):
                await self._helper.wait()
            if self._helper.returncode is None:
                self._helper.kill()  # Its child has asked to die with it.
                await self._helper.wait()
        os.close(self._report)
        os.close(self._stderr)


@asynccontextmanager
async def sandboxed(
    command: Sequence[str],
    files: Sequence[int] = (),
    listening: int = 0,
    account: Account = NOBODY,
    limits: Limits = LIMITS,
    visible: Sequence[str] = VISIBLE,
) -> AsyncIterator[Process]:
    """Runs `command`, an absolute path and its arguments, with the descriptors `files` as 3, 4, ..., of which
    the first `listening` are announced as listening sockets. They stay the caller's to close. At the end of the
    block the command is killed, and gone."""
    spec = confine.Spec(
        command=list(command),
        files=list(files),
        listening=listening,
        visible=list(visible),
        uid=account.uid,
        gid=account.gid,
        cpu_s=limits.cpu_s,
        time_s=limits.time_s,
        memory_bytes=limits.memory_bytes,
        files_max=limits.files_max,
        processes_max=limits.processes_max,
    )
    control_r, control = os.pipe()
    report, report_w = os.pipe()
    stderr, stderr_w = os.pipe()
    # Read when all is over: who fills it meanwhile is not heard further, and costs nothing. It may not wait,
    # either.
    for fd in (report, stderr, stderr_w):
        os.set_blocking(fd, False)
    try:
        helper = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", str(Path(confine.__file__)), json.dumps(spec)],
            stdin=control_r,
            stdout=report_w,
            stderr=stderr_w,
            pass_fds=tuple(files),
            start_new_session=True,
            env={},
            cwd="/",
        )
    except BaseException:
        for fd in (control, report, stderr):
            os.close(fd)
        raise
    finally:
        for fd in (control_r, report_w, stderr_w):
            os.close(fd)
    process = Process(helper, control, report, stderr)
    try:
        yield process
    finally:
        await process._close()


def harmless(text: str) -> str:
    """The end of `text` as one short line of printable ASCII."""
    words = "".join(char if char in _PRINTABLE else " " for char in text).split()
    line = " ".join(words)
    return line if len(line) <= SAID_MAX else "..." + line[-SAID_MAX:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
