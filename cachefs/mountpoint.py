"""The folder that is mounted on: whether it can be, what lies on it, and what the kernel is told about the mount.
Rule: nobody is asked here who may not answer, but for a mount that is known to be dead.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from cachefs import logs
from cachefs.errors import MountError

log = logs.get(__name__)

BACKGROUND_MAX: Final = 65535  # What the kernel's field holds.
READ_AHEAD_KIB: Final = 1024  # One FUSE request of 256 pages.
CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
MOUNTINFO: Final = Path("/proc/self/mountinfo")


def prepare_mountpoint(mountpoint: str) -> None:
    """Makes sure that there is a folder to mount on; a dead mount left by a crash is taken away first."""
    if not os.access("/dev/fuse", os.F_OK):
        raise MountError(mountpoint, "there is no /dev/fuse: load the fuse module (modprobe fuse)")
    try:
        is_folder = stat.S_ISDIR(os.stat(mountpoint).st_mode)
        os.statvfs(mountpoint)  # Of a dead mount the kernel may still know the attributes, but never this.
    except FileNotFoundError:
        raise MountError(mountpoint, "no such folder: make it first (mkdir)") from None
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise MountError(mountpoint, f"cannot be used: {error.strerror}") from error
        log.warning("%s is a dead mount left by a crash: unmounting it", mountpoint)
        _unmount_dead(mountpoint)
        is_folder = os.path.isdir(mountpoint)
    if not is_folder:
        raise MountError(mountpoint, "is not a folder")
    if os.path.ismount(mountpoint):
        raise MountError(mountpoint, "something is mounted there already")


def require_mountpoint(mountpoint: str) -> None:
    """Raises MountError where nothing is mounted, and nothing could be. What is mounted there, alive or dead, is
    `prepare_mountpoint`'s: nobody is asked here who may not answer."""
    if not os.access("/dev/fuse", os.F_OK):
        raise MountError(mountpoint, "there is no /dev/fuse: load the fuse module (modprobe fuse)")
    if minor_of(os.path.abspath(mountpoint)) is not None:
        return
    try:
        is_folder = stat.S_ISDIR(os.stat(mountpoint).st_mode)
    except FileNotFoundError:
        raise MountError(mountpoint, "no such folder: make it first (mkdir)") from None
    except OSError as error:
        raise MountError(mountpoint, f"cannot be used: {error.strerror}") from error
    if not is_folder:
        raise MountError(mountpoint, "is not a folder")


def _unmount_dead(mountpoint: str) -> None:
    command = ["umount", "-l", mountpoint] if os.geteuid() == 0 else ["fusermount3", "-u", "-z", mountpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise MountError(mountpoint, f"is a dead mount and cannot be unmounted: {done.stderr.strip()}")


def tune(mountpoint: str) -> None:
    """Tells the kernel what pyfuse3 cannot say in the handshake, after it; takes root.

    As many background requests (reading ahead, asynchronous direct reads) as it has: by default 12 that wait for
    Glance would hold up all others. And to read ahead by what one request can carry, not by an eighth of it."""
    minor = minor_of(mountpoint)
    connection = CONNECTIONS / str(minor)
    try:
        if not connection.exists() and os.geteuid() == 0:
            subprocess.run(
                ["mount", "-t", "fusectl", "fusectl", str(CONNECTIONS)], capture_output=True, check=False
            )
        for name in ("max_background", "congestion_threshold"):
            (connection / name).write_text(str(BACKGROUND_MAX))
        Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
    except OSError as error:
        log.warning(
            "the kernel will send no more than 12 background reads at once (%s): many reads that wait for "
            "Glance may delay others", error,
        )  # fmt: skip


class Mounted(NamedTuple):
    """One line of mountinfo: what lies at `path`, of which filesystem (`device` as `major:minor`, `kind`), and
    which folder of it (`root`). Paths as bytes, as the kernel has them."""

    device: str
    root: bytes
    path: bytes
    kind: str


def mounted() -> list[Mounted]:
    """All of them, in the order in which they lie on each other. Nobody but the kernel is asked: stat(2) would ask
    the filesystem, which nobody may answer for yet."""
    found = []
    for line in MOUNTINFO.read_bytes().splitlines():
        fields = line.split(b" ")
        kind = fields[fields.index(b"-") + 1].decode(errors="replace")
        found.append(Mounted(fields[2].decode(), _unescaped(fields[3]), _unescaped(fields[4]), kind))
    return found


def _unescaped(path: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), path)


def device_of(mountpoint: str, mounts: Sequence[Mounted]) -> str | None:
    """`major:minor` of what lies on top at this place."""
    folder, name = os.path.split(mountpoint)
    place = os.fsencode(os.path.realpath(folder).rstrip("/") + "/" + name)
    return next((one.device for one in reversed(mounts) if one.path == place), None)


def minor_of(mountpoint: str) -> int | None:
    """The minor device number of what is mounted there."""
    device = device_of(mountpoint, mounted())
    return None if device is None else int(device.partition(":")[2])


def binds_of(mountpoint: str, folder: str) -> tuple[bytes, ...]:
    """Where else a folder of the mount lies: the places to which it is bound."""
    mounts = mounted()
    device, root = device_of(mountpoint, mounts), os.fsencode(f"/{folder}")
    return tuple(sorted({one.path for one in mounts if device == one.device and one.root == root}))
