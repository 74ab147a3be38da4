"""The inside of `sandbox`: a program of its own, which makes the cell, starts the command in it, and waits for
both ends. Rule: the standard library only, one thread, and nothing of the daemon's state: it is run by its path.

    python -I -S confine.py '<Spec as JSON>'

A process that has just begun has one thread and no files, so it may fork, mount and change its user in peace; in
the daemon, which has threads, the same calls between fork and exec could find a lock that nobody will ever
release. It stays as the command's parent: who is the first process of a pid namespace cannot be started
otherwise.

    descriptor 0   control: at its end (the daemon asks for the end, or is dead) the command is killed
    descriptor 1   report: one line of JSON, a `Report`, when the command is over
    descriptor 2   what the command writes to its stderr

Order matters: namespaces and mounts need privileges, dropping them comes last, and nothing that was inherited is
still open when the command begins.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
from typing import NoReturn, TypedDict

# <sched.h>
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL_BUT_USER = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
# <sys/mount.h>
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
KEPT_FLAGS = MS_NOSUID | MS_NODEV | MS_NOEXEC  # In a user namespace they may be added to, not taken away.
# <sys/prctl.h>
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 1, 24, 38, 47, 4
CAPABILITY_VERSION_3 = 0x20080522
CAPABILITIES_MAX = 64

CONTROL, REPORT, STDERR = 0, 1, 2
TROUBLE_MAX = 1000
# Its new root is put together there: it exists everywhere, and nothing of it is to be seen.
ROOT_AT = "/proc"
OOM_SCORE = "1000"  # The daemon's is -900 under systemd: this one goes first.

_libc = ctypes.CDLL(None, use_errno=True)


class Spec(TypedDict):
    """What to run, and how. `files` become descriptors 3, 4, ...; the first `listening` of them are announced as
    systemd does (LISTEN_FDS). `visible` paths can be read; there is nothing else."""

    command: list[str]
    files: list[int]
    listening: int
    visible: list[str]
    uid: int
    gid: int
    cpu_s: int
    time_s: float
    memory_bytes: int
    files_max: int
    processes_max: int


class Report(TypedDict):
    """How it ended. `status`: as of `subprocess`, so a signal is negative; None when it did not begin, for the
    reason in `failed`. `stopped`: whether it was killed from here: "asked", "time" or ""."""

    status: int | None
    stopped: str
    failed: str
    cpu_s: float


def main() -> None:
    spec: Spec = json.loads(sys.argv[1])
    trouble, troubled = os.pipe()  # Why the command did not begin; closed by its beginning.
    alive, living = (
        os.pipe()
    )  # Closed by this process's death, which may come before the child asks for its signal.
    try:
        _enter_namespaces(spec)
        pid = os.fork()
        if pid == 0:
            os.close(living)
            _become(spec, alive, troubled)
    except OSError as error:
        report: Report = {"status": None, "stopped": "", "failed": _said(error), "cpu_s": 0.0}
    else:
        for fd in (*spec["files"], alive, troubled):
            os.close(fd)
        report = _wait(pid, trouble, spec["time_s"])
    os.write(REPORT, json.dumps(report).encode() + b"\n")


def _wait(pid: int, trouble: int, time_s: float) -> Report:
    """Until the command is over, the time is up, or somebody asks for the end."""
    child = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(child, select.POLLIN)
    poll.register(CONTROL, select.POLLIN | select.POLLHUP)
    ready = {fd for fd, _ in poll.poll(time_s * 1000)}
    stopped = "" if child in ready else "asked" if CONTROL in ready else "time"
    os.kill(pid, signal.SIGKILL)  # And everything that it may have started: it was their first process.
    _, status, usage = os.wait4(pid, 0)
    failed = os.read(trouble, TROUBLE_MAX).decode(errors="replace")
    return {
        "status": None if failed else os.waitstatus_to_exitcode(status),
        "stopped": stopped,
        "failed": failed,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


# ── the cell ──


def _enter_namespaces(spec: Spec) -> None:
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write(OOM_SCORE)
    if os.geteuid() == 0:
        _unshare(ALL_BUT_USER)
        return
    uid, gid = os.geteuid(), os.getegid()
    _unshare(ALL_BUT_USER | CLONE_NEWUSER)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{spec['uid']} {uid} 1"),
        ("gid_map", f"{spec['gid']} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _become(spec: Spec, alive: int, troubled: int) -> NoReturn:
    """The child: turns into the command, or says on `troubled` why not."""
    try:
        as_root = os.geteuid() == 0
        null = os.open("/dev/null", os.O_RDWR)
        _enter_root(spec["visible"])
        _limit(spec)
        _drop_privileges(spec, as_root)
        _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl PDEATHSIG")
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)
        troubled = _arrange([null, null, STDERR, *spec["files"]], troubled)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spec["files_max"],) * 2)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them, and that would be inherited.
        announced = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(spec["listening"])}
        os.execve(spec["command"][0], spec["command"], announced if spec["listening"] else {})
    except BaseException as error:  # noqa: BLE001  # Whatever it is: there must not be two of its parent.
        os.write(troubled, _said(error).encode()[:TROUBLE_MAX])
    finally:
        os._exit(1)


def _enter_root(visible: list[str]) -> None:
    """A root of its own, in memory and read-only, that holds the `visible` paths of the old one and no more: no
    /proc, no /dev, no /sys. The old one is gone."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("none", ROOT_AT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m,nr_inodes=1k")
    for path in visible:
        _show(path, ROOT_AT + path)
    os.chdir(ROOT_AT)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")
    _mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _show(path: str, at: str) -> None:
    if not os.path.lexists(path) or os.path.lexists(at):
        return
    os.makedirs(os.path.dirname(at), mode=0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), at)
        return
    if os.path.isdir(path):
        os.mkdir(at)
    else:
        os.close(os.open(at, os.O_CREAT | os.O_WRONLY, 0o644))
    try:
        _mount(path, at, None, MS_BIND)
    except OSError:  # In a user namespace: mounts below it may not be uncovered, only taken along.
        _mount(path, at, None, MS_BIND | MS_REC)
    kept = os.statvfs(at).f_flag & KEPT_FLAGS
    _mount(None, at, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def _limit(spec: Spec) -> None:
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CPU, spec["cpu_s"]),
        (resource.RLIMIT_AS, spec["memory_bytes"]),
        (resource.RLIMIT_NPROC, spec["processes_max"]),
    ):
        resource.setrlimit(what, (most, most))


def _drop_privileges(spec: Spec, as_root: bool) -> None:
    """Another user without any capability, for good. In a user namespace the user is what it was made with."""
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(CAPABILITIES_MAX):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # The kernel knows no more of them.
    if as_root:
        os.setgroups([])
        os.setresgid(spec["gid"], spec["gid"], spec["gid"])
        os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")
    if os.getresuid() != (spec["uid"],) * 3 or os.getresgid() != (spec["gid"],) * 3:
        raise OSError(f"user {os.getresuid()}, group {os.getresgid()}")


def _arrange(files: list[int], troubled: int) -> int:
    """`files` become 0, 1, 2, ...; all else is closed, and by a successful exec also `troubled`, whose new
    number is returned."""
    last = os.sysconf("SC_OPEN_MAX")
    above = max(*files, troubled) + 1  # There their numbers are not in each other's way.
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in files]
    troubled = fcntl.fcntl(troubled, fcntl.F_DUPFD_CLOEXEC, above)
    for number, fd in enumerate(copies):
        os.dup2(fd, number)
    os.closerange(len(files), troubled)
    os.closerange(troubled + 1, last)
    return troubled


# ── calls ──


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    source_, kind_, data_ = (None if text is None else os.fsencode(text) for text in (source, kind, data))
    what = f"mount {target}"
    _check(_libc.mount(source_, os.fsencode(target), kind_, ctypes.c_ulong(flags), data_), what)


if __name__ == "__main__":
    main()
