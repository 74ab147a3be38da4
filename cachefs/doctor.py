"""`cachefs doctor`: everything that the daemon needs, tried, and said in words with what mends it. Rule: it
changes nothing, and no check can keep it from its end: each is a process of its own with a time limit.
"""

from __future__ import annotations

import email.utils
import errno
import os
import platform
import pwd
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cachefs import asking, config_doubts, limited
from cachefs import config as configuration
from cachefs.answers import strangers_words
from cachefs.config import Config
from cachefs.config_files import files_read
from cachefs.errors import CachefsError, ControlError
from cachefs.hiding import Hiding, cloud_files
from cachefs.instance_walk import shown
from cachefs.mountpoint import device_of, mounted
from cachefs.options import plain_options
from cachefs.shown import BOLD, STATE_COLOURS, coloured, columns_of, is_terminal
from cachefs.sources.reasons import in_words
from cachefs.store.folder import LOCK, SEGMENTS
from cachefs.words import counted, padded, printable, size, wrapped

if TYPE_CHECKING:
    import requests
    from keystoneauth1.session import Session

OK, WARNING, PROBLEM = "ok", "warning", "problem"

MOUNT_UNIT: Final = "var-lib-nova-instances-_base.mount"
KERNEL_MIN: Final = (4, 18)  # The first in which an account other than root may mount in a namespace of its own.
CLOCK_DOUBT_S, CLOCK_WRONG_S = 5.0, 60.0
RANGE_BYTES: Final = 4096
# Below this part of max_size, somebody counts on room that is not there.
REACHED_SHARE: Final = 0.5
ROOM_MIN: Final = 37  # So that an id is not taken apart where there are less columns beside the checks.
WHY_MAX: Final = 2000  # Somebody may answer with a book.
# Filesystems that other nodes have, too: the store's lock, its holes and its mapped index are for local ones.
_SHARED = {"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "9p", "lustre"}
_SELINUX = Path("/sys/fs/selinux")
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do where it is not well."""

    check: str
    state: str
    found: str
    mend: str = ""


Findings = Iterator[Finding]


def ok(check: str, found: str) -> Finding:
    return Finding(check, OK, found)


def warning(check: str, found: str, mend: str) -> Finding:
    return Finding(check, WARNING, found, mend)


def problem(check: str, found: str, mend: str) -> Finding:
    return Finding(check, PROBLEM, found, mend)


def examine(files: Sequence[str], config_dirs: Sequence[str], limit_s: float) -> list[Finding]:
    """All checks, at once, each for `limit_s` seconds at most; what they found in the order of the checks."""
    config: list[Config] = []
    checks: list[tuple[str, Callable[[], Findings], str]] = [
        ("configuration", lambda: _configuration(files, config_dirs), "its files lie on a disk that hangs"),
        ("kernel", _kernel, ""),
    ]
    try:
        config.append(configuration.load(files, config_dirs, {}))
    except CachefsError:
        pass  # The first check says it.
    if config:
        checks += _of(config[0])
    pieces = [limited.Piece(name, _told(check), limit_s) for name, check, _ in checks]
    limited.run(pieces)
    hiding = Hiding()
    _learn_secrets(hiding, files, config_dirs)
    found: list[Finding] = []
    for piece, (name, _, mend) in zip(pieces, checks, strict=True):
        found += [Finding(*said) for said in piece.said]
        if piece.hung:
            found.append(problem(name, f"no answer within {limit_s:g} s", mend or "look at what hangs there"))
        elif piece.failure is not None:
            found.append(problem(name, f"the check itself failed: {piece.failure}", "report this"))
    if not config:
        found.append(warning("the rest", "not looked at", "mend the configuration first"))
    return [Finding(one.check, one.state, hiding.clean(one.found), hiding.clean(one.mend)) for one in found]


def leave_mounts() -> None:
    """Goes to / where the current folder is on a FUSE mount: whoever looks for a file there hangs with it."""
    here = os.getcwd()  # The kernel knows it; nobody else is asked.
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[fields.index("-") + 1].startswith("fuse"):
            where = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            if here == where or here.startswith(f"{where}/"):
                os.chdir("/")
                return


def _told(check: Callable[[], Findings]) -> Callable[[limited.Say], None]:
    def work(say: limited.Say) -> None:
        for finding in check():
            say([finding.check, finding.state, finding.found, finding.mend])

    return work


def _learn_secrets(hiding: Hiding, files: Sequence[str], config_dirs: Sequence[str]) -> None:
    hiding.know_environment(os.environ)
    plain = plain_options()
    for path in [*map(Path, files_read(files, config_dirs)), *cloud_files()]:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        if path.suffix == ".yaml":
            hiding.know_clouds(text)
        else:
            hiding.config(text, plain)


def _of(config: Config) -> list[tuple[str, Callable[[], Findings], str]]:
    """The checks for which the configuration must be known, each with what to do when it hangs."""
    mountpoint, path, where = config.mount.mountpoint, config.store.path, config.control.socket
    abort = (
        "the daemon behind it does not answer: `cachefs debug tasks` shows where it is; kill it, then "
        f"`umount -l {mountpoint}`"
    )
    disk = f"the disk of {path} does not answer: look at `dmesg`"
    glance = "Glance or Keystone does not answer: look at the network, a firewall, a proxy"
    return [
        ("FUSE", lambda: _fuse(config), ""),
        ("mountpoint", lambda: _mountpoint(mountpoint), abort),
        ("nova/", lambda: _nova(config), abort),
        (
            "daemon",
            lambda: _daemon(where, path),
            "`cachefs debug tasks`, or SIGUSR1 and its log, show where it is",
        ),
        ("store", lambda: _store(config), disk),
        ("Glance", lambda: _glance(config), glance),
        ("other formats", _converter, ""),
        ("security", lambda: _security(mountpoint), ""),
    ]


def as_fields(found: Sequence[Finding]) -> dict[str, Any]:
    """For --json."""
    counts = {state: sum(one.state == state for one in found) for state in (OK, WARNING, PROBLEM)}
    return {"checks": [asdict(one) for one in found], "counts": counts, "well": not counts[PROBLEM]}


def show(found: Sequence[Finding]) -> None:
    print("\n".join(lines(found, columns_of(sys.stdout) if is_terminal(sys.stdout) else None)))


def lines(found: Sequence[Finding], columns: int | None) -> Iterator[str]:
    """A line for each, and below it what mends it; on a terminal of `columns` folded and with colours."""
    longest = max(len(one.check) for one in found)
    indent = len(PROBLEM) + 2 + longest + 2
    is_narrow = columns is not None and columns - indent < ROOM_MIN
    if is_narrow:
        indent = 2
    room = None if columns is None else columns - indent

    def marked(text: str, code: str) -> str:
        return text if columns is None else coloured(text, code, sys.stdout)

    for one in found:
        state = marked(padded(one.state, len(PROBLEM)), STATE_COLOURS[one.state])
        first, *rest = wrapped(printable(one.found), room)
        if is_narrow:
            first, rest = "", [first, *rest]
        yield f"{state}  {padded(one.check, longest)}  {first}".rstrip()
        rest += wrapped(f"→ {printable(one.mend)}", room, "  ") if one.mend else []
        yield from (f"{'':{indent}}{line}" for line in rest)
    counts = as_fields(found)["counts"]
    yield marked(f"{counted(counts[PROBLEM], 'problem')}, {counted(counts[WARNING], 'warning')}", BOLD)


# ── The configuration ─────────────────────────────────────────────────────────────────────────────────


def _configuration(files: Sequence[str], config_dirs: Sequence[str]) -> Findings:
    faults = configuration.check(files, config_dirs)
    for fault in faults:
        yield problem("configuration", str(fault), "mend it; `cachefs config sample` shows every option")
    doubts = config_doubts.warnings(files, config_dirs)
    for doubt in doubts:
        found, _, mend = doubt.partition(": chmod ")
        yield warning("configuration", found, f"chmod {mend}" if mend else "mend it, if it is not meant so")
    if not faults and not doubts:
        yield ok("configuration", ", ".join(files_read(files, config_dirs)) or "the defaults")


# ── The kernel, FUSE, the mount ───────────────────────────────────────────────────────────────────────


def _kernel() -> Findings:
    release = platform.release()
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < KERNEL_MIN:
        yield problem("kernel", f"Linux {release} is too old", "5.4 or later is what cachefs is tried with")
    else:
        yield ok("kernel", f"Linux {release}")


def _fuse(config: Config) -> Findings:
    if "\tfuse\n" not in Path("/proc/filesystems").read_text():
        yield problem("FUSE", "the kernel has no FUSE", "modprobe fuse")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        yield ok("FUSE", "/dev/fuse can be opened")
    except FileNotFoundError:
        yield problem("FUSE", "there is no /dev/fuse", "modprobe fuse; in a container, give it the device")
    except OSError as error:
        yield problem(
            "FUSE", f"/dev/fuse cannot be opened: {error.strerror}",
            "its mode is to be 0666; a container, or the unit's DeviceAllow=, has to allow it",
        )  # fmt: skip
    try:
        from cachefs import fuse  # noqa: F401  # It loads libfuse.
    except ImportError as error:
        yield problem("libfuse", f"cannot be loaded: {error}", "apt-get install libfuse3-3, or reinstall pyfuse3")
    else:
        yield ok("libfuse", "libfuse 3 and pyfuse3 are there")
    account = _account(config)
    if account == 0:
        return
    helper = shutil.which("fusermount3")
    if helper is None:
        yield problem("fusermount3", "is not there, and the daemon is not root", "apt-get install fuse3")
    elif not os.stat(helper).st_mode & stat.S_ISUID:
        yield problem("fusermount3", f"{helper} is not setuid root", f"chmod u+s {helper}")
    else:
        yield ok("fusermount3", helper)
    if config.mount.allow_other:
        yield _user_allow_other()


def _user_allow_other(path: Path = Path("/etc/fuse.conf")) -> Finding:
    try:
        allows = any(line.strip() == "user_allow_other" for line in path.read_text().splitlines())
    except OSError:
        allows = False
    if allows:
        return ok("user_allow_other", f"is in {path}")
    return problem(
        "user_allow_other", f"is not in {path}, and [mount] allow_other is on",
        f"echo user_allow_other >> {path}, or set allow_other = false",
    )  # fmt: skip


def _account(config: Config) -> int:
    """The user that the daemon runs as: who owns the store, or whoever asks."""
    try:
        return os.stat(config.store.path).st_uid
    except OSError:
        return os.geteuid()


def mounted_at(path: str, mountinfo: str) -> str | None:
    """The type of what lies on top at `path`, by the text of mountinfo; None for nothing."""
    real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    found = None
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        where = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if where in (path, real):
            found = fields[fields.index("-") + 1]
    return found


def _mountpoint(path: str) -> Findings:
    kind = mounted_at(path, Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    if kind is None:
        yield _unmounted(path)
        return
    if not kind.startswith("fuse"):
        yield problem("mountpoint", f"{path}: a {kind} is mounted there", f"umount {path}, or choose another")
        return
    if kind != "fuse.cachefs":
        yield problem("mountpoint", f"{path}: another filesystem is mounted there ({kind})", f"umount {path}")
        return
    try:
        os.statvfs(path)  # Hangs where the daemon does: its time is limited.
        os.listdir(path)
    except PermissionError:
        yield warning(
            "mountpoint", f"{path}: is mounted, and this account may not look into it",
            "[mount] allow_other = true, or look as the daemon's account",
        )  # fmt: skip
    except OSError as error:
        yield problem(
            "mountpoint", f"{path}: a dead mount, its daemon is gone ({error.strerror})",
            f"start the daemon, which unmounts it first; or umount -l {path}. Guests that had files open must be "
            "restarted",
        )  # fmt: skip
    else:
        yield ok("mountpoint", f"{path}: cachefs is mounted and answers")


def _nova(config: Config) -> Findings:
    if not config.nova.enabled:
        return
    mounts = mounted()
    device = device_of(config.mount.mountpoint, mounts)
    ours = [one for one in mounts if one.kind == "fuse.cachefs" and one.root == b"/nova"]
    dead = [shown(one.path) for one in ours if _is_dead(one.path)]
    if dead:
        yield problem(
            "nova/", f"bound to {', '.join(dead)}: a bind of a daemon that is gone",
            f"umount -l {dead[0]}, then systemctl restart {MOUNT_UNIT} (or bind it again)",
        )  # fmt: skip
    alive = sorted({shown(one.path) for one in ours if one.device == device} - set(dead))
    owner = _name_of(config.nova.uid)
    yield ok("nova/", f"belongs to {owner}, bound to {', '.join(alive) or 'nothing: Nova has its own _base'}")


def _is_dead(path: bytes) -> bool:
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _unmounted(path: str) -> Finding:
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return problem("mountpoint", f"{path}: no such folder", f"mkdir -p {path}")
    except OSError as error:
        return problem("mountpoint", f"{path}: {error.strerror}", "see to its permissions, or choose another")
    if not stat.S_ISDIR(info.st_mode):
        return problem("mountpoint", f"{path}: is no folder", "choose another, or take it away")
    if os.listdir(path):
        return warning("mountpoint", f"{path}: is not empty", "a mount would hide what is in it")
    return ok("mountpoint", f"{path}: is there, and nothing is mounted yet")


# ── The daemon and its store ──────────────────────────────────────────────────────────────────────────


def _daemon(where: str, store: str) -> Findings:
    try:
        status = asking.ask(where, "status", wait_s=10.0)
    except ControlError as error:
        if error.reason == asking.NOT_RUNNING:
            yield _silent(where, holder_of(Path(store) / LOCK))
        elif error.reason == asking.NOT_ALLOWED:
            yield warning("daemon", f"{where}: this account may not ask it", "try sudo, or join its group")
        else:
            yield problem("daemon", f"{where}: {error.reason}", "look at its log; SIGUSR1 has it say where it is")
        return
    yield ok("daemon", f"cachefs {status['version']}, pid {status['pid']}: {status['ready']['state']}")
    for reason in status["ready"]["reasons"]:
        yield warning("daemon", reason, "`cachefs status` says more")
    yield from _scratch(status.get("nova"))
    path = status["mountpoint"]
    seen = mounted_at(path, Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    if status["ready"]["is_ready"] and seen is None:
        yield problem(
            "daemon",
            f"has mounted on {path}, not seen from here: it, or this shell, is in a mount namespace of its own",
            "take PrivateTmp=, ProtectSystem= and the like out of its unit (systemctl cat cachefs); "
            "to a container, give the mount with propagation",
        )


def _silent(where: str, holder: str | None) -> Finding:
    """Nobody listens at the socket; `holder` is the process that has the store."""
    if holder is None:
        return warning("daemon", "does not run", "systemctl start cachefs, or cachefs mount")
    return problem(
        "daemon", f"process {holder} has the store, and does not answer at {where}",
        "give the commands the [control] socket that it was started with; a daemon that has just started, or "
        "cachefs check, is waited for",
    )  # fmt: skip


def _scratch(nova: dict[str, Any] | None) -> Findings:
    """By what the daemon says of `nova/`."""
    if nova is None:
        return
    yield ok("scratch files", f"{nova['files']} in nova/, {size(nova['bytes'])}")
    if nova["strangers"]:
        yield warning(
            "scratch files", f"{strangers_words(nova['strangers'])}: not used",
            "look at what is there: nobody but the daemon should write into the store's folder",
        )  # fmt: skip


def _store(config: Config) -> Findings:
    path = config.store.path
    there = Path(path)
    while not there.exists() and there != there.parent:
        there = there.parent
    if str(there) != path:
        yield from _unmade_store(path, there)
    else:
        yield from _made_store(path)
    space = os.statvfs(there)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    most, least = config.store.max_size.of(total), config.store.min_free.of(total)
    used = _bytes_of(Path(path) / SEGMENTS)
    now = most if used is None else min(most, max(used + free - least, 0))
    bounds = f"max_size {size(most)}, min_free {size(least)}"
    if used is None:  # This account may not look into it.
        words = f"{bounds}; {size(free)} are free"
    else:
        words = f"the store may hold {size(now)} now ({bounds}; it has {size(used)}, and {size(free)} are free)"
    if most > total:
        yield warning("space", f"max_size is {size(most)}, and the filesystem has {size(total)}", "lower max_size")
    elif free <= least:
        yield warning(
            "space", f"{size(free)} are free and min_free is {size(least)}: nothing new is kept",
            "make room on that filesystem, or lower min_free",
        )  # fmt: skip
    elif most < config_doubts.SMALL_STORE:
        yield warning("space", f"{words}: less than most images have", "raise max_size")
    elif now < most * REACHED_SHARE:
        yield warning(
            "space", f"{words}: max_size cannot be reached by far",
            "make room on that filesystem, or lower max_size to what it is to have",
        )  # fmt: skip
    else:
        yield ok("space", words)
    kind = _filesystem_of(there)
    if kind in _SHARED:
        yield problem(
            "space", f"{there} lies on {kind}, which other nodes share", "use a local disk for the store"
        )
    elif kind in ("tmpfs", "ramfs"):
        yield warning("space", f"{there} lies on {kind}: it is lost with each reboot", "use a local disk")


def _bytes_of(folder: Path) -> int | None:
    """What the files of a folder take on the disk; None where it cannot be looked into."""
    try:
        return sum(file.stat().st_blocks * 512 for file in os.scandir(folder))
    except FileNotFoundError:
        return 0
    except OSError:
        return None


def _unmade_store(path: str, parent: Path) -> Findings:
    if os.access(parent, os.W_OK | os.X_OK):
        yield ok("store", f"{path}: the first start makes it")
    else:
        yield problem(
            "store", f"{path}: is not there, and this account cannot make it in {parent}",
            f"install -d -m 0700 -o USER {path}, with the account that the daemon runs as",
        )  # fmt: skip


def _made_store(path: str) -> Findings:
    info = os.stat(path)
    owner = _name_of(info.st_uid)
    if not stat.S_ISDIR(info.st_mode):
        yield problem("store", f"{path}: is no folder", "choose another [store] path")
        return
    if info.st_mode & 0o077:
        yield warning("store", f"{path}: others than {owner} may look into it", f"chmod 0700 {path}")
    if os.geteuid() not in (0, info.st_uid):
        yield warning("store", f"{path}: belongs to {owner}, and this is {_name_of(os.geteuid())}", "try sudo")
        return
    holder = holder_of(Path(path) / "lock")
    yield ok(
        "store", f"{path}: belongs to {owner}, " + (f"in use by process {holder}" if holder else "not in use")
    )


def holder_of(lock: Path) -> str | None:
    """The process that has the store, by the kernel's list: to try the lock could refuse a daemon's start."""
    try:
        info = os.stat(lock)
        locks = Path("/proc/locks").read_text()
    except OSError:
        return None
    for line in locks.splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(info.st_ino):
            numbers = [int(part, 16) for part in fields[5].split(":")[:2]]
            if numbers == [os.major(info.st_dev), os.minor(info.st_dev)]:
                return fields[4]
    return None


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _filesystem_of(path: Path) -> str:
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return "unknown"


# ── Glance ────────────────────────────────────────────────────────────────────────────────────────────


def _glance(config: Config) -> Findings:
    auth = config.glance.auth
    session = auth.session()
    try:
        token = session.get_token()
    except Exception as error:  # noqa: BLE001  # A library's own: all of them say why.
        mend = "see to auth_url, the credentials and the network; `openstack token issue` tries the same"
        yield problem("credentials", _why(error), mend)
        return
    needed = token and auth.method != "none"
    yield ok("credentials", f"a token by {auth.method}" if needed else "none are needed (auth_type = none)")
    urls: Sequence[str] = auth.endpoints
    if not urls:
        try:
            url = session.get_endpoint(**auth.endpoint_filter)
        except Exception as error:  # noqa: BLE001
            url = None
            yield problem("Glance", _why(error), "see to region_name and interface")
            return
        if not url:
            yield problem(
                "Glance", f"the catalog has no image service ({', '.join(auth.interface)} in "
                f"{auth.region_name or 'any region'})", "see to region_name, interface and service_type",
            )  # fmt: skip
            return
        urls = [re.sub(r"/v2(\.\d+)?/*$", "", url.rstrip("/"))]
    for at, url in enumerate(urls):
        yield from _endpoint(session, url, tries_bytes=at == 0)


def _endpoint(session: Session, url: str, *, tries_bytes: bool) -> Findings:
    try:
        answer = _get(session, url, "/v2/images?limit=100&status=active&sort=size:asc", {})
        images = answer.json()["images"] if answer.status_code == 200 else None
    except (ValueError, KeyError, TypeError):
        yield problem("Glance", f"{url}: what answers there is no Glance", "see to endpoints, and to proxies")
        return
    except Exception as error:  # noqa: BLE001
        yield problem("Glance", _at(url, _why(error)), "see to the network, the URL and its certificate")
        return
    if images is None:
        words = f"{url}: the listing was answered with {answer.status_code} {answer.reason}"
        mend = "give the account the reader role" if answer.status_code in (401, 403) else "look at Glance's log"
        yield problem("Glance", words, mend)
        return
    yield ok("Glance", f"{url}: lists images ({len(images)}{' or more' if len(images) == 100 else ''} active)")
    yield from _clock(answer.headers.get("Date"))
    if not tries_bytes:
        return
    sized = [image for image in images if image.get("size")]
    if not sized:
        yield warning("a range", "there is no image to try it with", "upload one, and ask again")
        return
    yield _range(session, url, sized[0])


def _range(session: Session, url: str, image: dict[str, Any]) -> Finding:
    whole, wanted = int(image["size"]), min(int(image["size"]), RANGE_BYTES)
    name = f"image {image.get('id')}"
    headers = {"Range": f"bytes=0-{wanted - 1}", "Accept-Encoding": "identity"}
    try:
        answer = _get(session, url, f"/v2/images/{image['id']}/file", headers)
        got = len(answer.raw.read(wanted + 1)) if answer.status_code in (200, 206) else 0
        answer.close()
    except Exception as error:  # noqa: BLE001
        return problem("a range", f"{name}: {_why(error)}", "look at Glance's log and its store")
    if answer.status_code == 206 and got == wanted:
        return ok("a range", f"{wanted} bytes of {name} came as they were asked for")
    if answer.status_code in (200, 206) and got >= wanted:
        if whole == wanted:
            return ok("a range", f"{name} came ({wanted} bytes, all of it)")
        return warning(
            "a range", f"{name}: Glance gives no ranges, only whole images",
            "it works, as one stream from the first byte; a Glance store that has ranges (file, cinder) is faster",
        )  # fmt: skip
    if answer.status_code in (400, 416):
        return warning(
            "a range", f"{name}: Glance refuses ranges ({answer.status_code})", "it works as one stream"
        )
    return problem(
        "a range", f"{name}: answered with {answer.status_code}, {got} bytes of {wanted}",
        "look at Glance's log and its store; at proxies between",
    )  # fmt: skip


def _clock(date: str | None) -> Findings:
    if date is None:
        return
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return
    apart_s = abs(time.time() - theirs)
    words = f"{apart_s:.0f} s apart from Glance's"
    mend = "start chrony (or systemd-timesyncd) on both: tokens and leases go by the clock"
    if apart_s >= CLOCK_WRONG_S:
        yield problem("clock", words, mend)
    elif apart_s >= CLOCK_DOUBT_S:
        yield warning("clock", words, mend)
    else:
        yield ok("clock", "agrees with Glance's")


def _get(session: Session, url: str, path: str, headers: dict[str, str]) -> requests.Response:
    answer: requests.Response = session.get(
        path, headers=headers, endpoint_override=url, raise_exc=False, redirect=False, stream=True,
    )  # fmt: skip
    return answer


def _at(url: str, why: str) -> str:
    """Whichever of them says where it was, it is said once."""
    where, _, what = why.partition(": ")
    return f"{url}: {what if what and where and url.startswith(where) else why}"


def _why(error: Exception) -> str:
    """In words, and all of it."""
    said = in_words(error)
    return said if len(said) <= WHY_MAX else f"{said[:WHY_MAX]} …"


# ── The rest of the node ──────────────────────────────────────────────────────────────────────────────


def _converter() -> Findings:
    if shutil.which("qemu-nbd") is None:
        yield warning(
            "other formats", "there is no qemu-nbd: disks of vmdk, vhd, vhdx, vdi and ploop images are not served",
            "apt-get install qemu-utils, if there are such images",
        )  # fmt: skip
    else:
        yield ok("other formats", "qemu-nbd is there")


def _security(mountpoint: str) -> Findings:
    enforcing = _first_line(_SELINUX / "enforce") == "1"
    if enforcing and (_first_line(_SELINUX / "booleans/virt_use_fusefs") or "1 1")[0] == "0":
        yield warning(
            "SELinux", "guests may not read FUSE filesystems (virt_use_fusefs is off)",
            "setsebool -P virt_use_fusefs on",
        )  # fmt: skip
    elif enforcing:
        yield ok("SELinux", "enforcing; if a guest is refused, `ausearch -m avc -ts recent` says what")
    if _first_line(_APPARMOR) == "Y" and Path("/etc/apparmor.d/libvirt").exists():
        yield ok(
            "AppArmor",
            f"on; libvirt allows a guest its backing files. Where `dmesg` says DENIED for {mountpoint}, add "
            f"`{mountpoint}/** r,` to /etc/apparmor.d/local/abstractions/libvirt-qemu",
        )
    elif not enforcing:
        yield ok("security", f"on {_host()} neither SELinux nor AppArmor stands between guests and the mount")


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().split("\n")[0]
    except OSError:
        return None


def _host() -> str:
    return printable(socket.gethostname())
