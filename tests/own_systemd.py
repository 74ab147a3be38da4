"""A real systemd as process 1 of namespaces of its own, on a root that is an overlay of this machine's. Rule: what
happens in there is seen by nobody out here, and nothing of it is left.

    with Systemd(tmp_path) as systemd:
        systemd.write("/etc/systemd/system/x.service", UNIT)
        systemd.systemctl("start", "x.service")
        systemd.run("cat", "/mnt/x")

The folder and this repository are the same in there as out here; all else that is written is in memory. The
network is this machine's. Nothing is started but what a test starts.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from functools import cache
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.cloud.service import poll_until
from tests.node import ROOT, missing_for_mounts

SYSTEMD: Final = "/lib/systemd/systemd"
NAMESPACES: Final = ("--pid", "--fork", "--kill-child", "--mount", "--ipc", "--uts", "--cgroup")
# Several of them at once have groups of their own: two managers of one would stop each other's services.
_NUMBERS: Final = count()
START_TIMEOUT_S: Final = 30.0
COMMAND_TIMEOUT_S: Final = 120.0

# $1 the folder, $2 this repository. The hierarchies of control groups are this machine's, from the group on that
# this process was put into before: what systemd does to its root, it does to that.
MAKE_ROOT: Final = f"""
set -eu
mount --make-rprivate /
root=$1/root
mkdir -p "$root"
mount -t tmpfs -o mode=0755 tmpfs "$root"
mkdir "$root/up" "$root/work" "$root/top"
mount -t overlay -o lowerdir=/,upperdir="$root/up",workdir="$root/work" overlay "$root/top"
cd "$root/top"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs sysfs sys
for folder in dev run tmp; do mount -t tmpfs -o mode=0755 tmpfs $folder; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
for name in null zero full random urandom tty; do mknod -m 0666 dev/$name c $(stat -c '0x%t 0x%T' /dev/$name); done
mknod -m 0666 dev/fuse c $(stat -c '0x%t 0x%T' /dev/fuse)
chmod 1777 tmp
for folder in "$1" "$2"; do
    mkdir -p ".$folder"
    mount --bind "$folder" ".$folder"
done
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs tmpfs sys/fs/cgroup
    mkdir sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
fi
rm -rf lib/systemd/system/*.wants lib/systemd/system/*.requires etc/systemd/system/*
rm -f etc/fstab
find lib/systemd/system-generators/ ! -type d ! -name systemd-fstab-generator -delete
mkdir -p etc/systemd/system.conf.d
printf '[Manager]\\nDefaultStandardOutput=null\\n' > etc/systemd/system.conf.d/no-journal.conf
printf '[Unit]\\nDefaultDependencies=no\\n' > etc/systemd/system/nothing.target
mkdir old
pivot_root . old
umount -l /old
mount --make-rshared /
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin {SYSTEMD} --unit=nothing.target \\
    --log-target=console --show-status=no
"""


@cache
def missing_for_systemd() -> str | None:
    """What this machine lacks for it, in words; None where it can run."""
    if (lacking := missing_for_mounts()) is not None:
        return lacking
    for tool in (SYSTEMD, "systemctl", "unshare", "nsenter", "pivot_root"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"there is no {tool}"
    probe = "mount --make-rprivate / && mount -t tmpfs tmpfs /mnt && mkdir /mnt/up /mnt/work /mnt/top && "
    probe += "mount -t overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work overlay /mnt/top && "
    probe += "mount -t sysfs sysfs /mnt/top/sys"
    done = subprocess.run(
        ["unshare", *NAMESPACES, "sh", "-c", probe], capture_output=True, text=True, check=False, timeout=30
    )
    if done.returncode:
        return f"namespaces with a root of their own cannot be made here: {done.stderr.strip()}"
    if not _groups():
        return "there are no control groups that this account may divide"
    return None


class Systemd:
    """Stopped as made; `with` starts and ends it, and all that runs in there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[Path] = []
        self._number = next(_NUMBERS)

    def __enter__(self) -> Self:
        self._groups = [group / f"cachefs-test-{os.getpid()}-{self._number}" for group in _groups()]
        for group in self._groups:
            group.mkdir(exist_ok=True)
        enter = "".join(f"echo $$ > '{group}/cgroup.procs' && " for group in self._groups)
        command = ["unshare", *NAMESPACES, "sh", "-c", MAKE_ROOT, "sh", str(self.folder), str(ROOT)]
        with (self.folder / "systemd.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "sh", "-c", enter + 'exec "$@"', "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            assert poll_until(self._is_up, START_TIMEOUT_S), f"systemd is not up:\n{self.log}"
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def log(self) -> str:
        return (self.folder / "systemd.log").read_text(errors="replace")

    def path(self, inside: str) -> Path:
        """Where a file of its root can be reached from out here."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command beside its services: what it sees is what a hypervisor would."""
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-p", "-i", "-u", "-C", "env", "-i",
             "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip

    def systemctl(self, *words: str) -> str:
        """Raises AssertionError with what it said when it fails."""
        done = self.run("systemctl", *words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.log}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            return True  # And will be told by the next command.
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return False
        self.pid = int(children[0])
        if not os.path.lexists(self.path("/run/systemd/private")):
            return False
        return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def _end(self) -> None:
        if self._process is None:
            return
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)  # And with it whatever runs in there.
        self._process.kill()
        self._process.wait()
        self._process = None
        left = [path for group in self._groups for path in [*group.rglob("*/"), group] if path.is_dir()]
        for path in sorted(left, key=lambda path: len(path.parts), reverse=True):
            # A group is empty when the kernel has buried its last process.
            poll_until(lambda path=path: _removed(path), 10)  # type: ignore[misc]


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _groups() -> list[Path]:
    """This process's own control group in each hierarchy that systemd uses, where groups can be made in it."""
    base = Path("/sys/fs/cgroup")
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if (base / "cgroup.controllers").exists():
            mounted = base if not names else None
        else:
            mounted = base / (names.removeprefix("name=") or "unified")
        if mounted is None or names in ("cpuset", "cpu", "cpuacct", "blkio", "freezer"):
            continue
        for group in (mounted / path.lstrip("/"), mounted):  # The second in a namespace of groups.
            if os.access(group / "cgroup.procs", os.W_OK):
                found.append(group)
                break
    return found
