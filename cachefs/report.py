"""`cachefs report`: what a bug report needs, as text or as an archive. Rule: no secret leaves by it, and nothing
that hangs (mount, disk, daemon, Glance) keeps it from its end.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cachefs import asking, doctor, limited, shortened
from cachefs import config as configuration
from cachefs.config import Config
from cachefs.config_files import files_read
from cachefs.errors import CachefsError, Refused
from cachefs.hiding import Hiding, cloud_files
from cachefs.options import plain_options

LOG_BYTES = 256 << 10
PART_BYTES_MAX = 4 << 20
_LIBRARIES = (
    "cachefs", "pyfuse3", "trio", "lmdb", "xxhash", "python-glanceclient", "keystoneauth1", "openstacksdk",
    "oslo.config", "oslo.log", "oslo.utils", "requests", "urllib3", "zstandard", "isal", "prometheus_client",
)  # fmt: skip


# Of the daemon's process; what follows is what the kernel calls it.
_OF_STATUS = (
    "Name", "State", "Uid", "Gid", "Groups", "VmPeak", "VmSize", "VmHWM", "VmRSS", "RssAnon", "RssFile", "VmSwap",
    "Threads", "SigIgn", "CapEff", "NoNewPrivs", "Seccomp:", "Cpus_allowed_list", "voluntary", "nonvoluntary", "(",
)  # fmt: skip
_OF_LIMITS = ("Limit", "Max core", "Max processes", "Max open files", "Max locked memory", "Max address", "(")


def collect(files: Sequence[str], config_dirs: Sequence[str], limit_s: float) -> dict[str, str]:
    """Each part as text, by the name of its file; without secrets."""
    hiding = Hiding()
    hiding.know_environment(os.environ)
    shown = _configurations(hiding, files, config_dirs)
    config: Config | None = None
    try:
        config = configuration.load(files, config_dirs, {})
    except CachefsError as error:
        shown += f"\n\nnot sound: {error}"
    where = config.control.socket if config is not None else asking.DEFAULT_SOCKET
    works: dict[str, Callable[[], str]] = {
        "versions.txt": _versions,
        "kernel.txt": lambda: _kernel(config),
        "status.json": lambda: _asked(where, "status", limit_s, lambda said: _json(shortened.status(said))),
        "flights.txt": lambda: _asked(where, "flights", limit_s, lambda said: "\n".join(shortened.flights(said))),
        "tasks.txt": lambda: _asked(where, "debug-tasks", limit_s, tasks_text),
        "process.txt": lambda: _process(config),
        "log.txt": lambda: _log(config),
    }
    pieces = [limited.Piece(name, _telling(work), limit_s) for name, work in works.items()]
    limited.run(pieces)
    found = doctor.examine(files, config_dirs, limit_s)
    parts = {"configuration.txt": shown, "doctor.txt": "\n".join(doctor.lines(found, None))}
    for piece in pieces:
        text = "".join(piece.said)
        if piece.hung:
            text += f"\n(no answer within {limit_s:g} s)\n"
        if piece.failure is not None:
            text += f"\n(cannot be had: {piece.failure})\n"
        parts[piece.name] = text
    return {name: hiding.clean(text).rstrip() + "\n" for name, text in sorted(parts.items())}


def _telling(work: Callable[[], str]) -> Callable[[limited.Say], None]:
    def tell(say: limited.Say) -> None:
        text = work()
        if len(text) > PART_BYTES_MAX:  # At the end of a line: half a secret would not be known for one.
            text = text[:PART_BYTES_MAX].rpartition("\n")[0] + "\n(cut short)"
        say(text)

    return tell


def as_text(parts: Mapping[str, str]) -> str:
    return "".join(f"══ {name}\n\n{text}\n" for name, text in parts.items())


def write(path: str, parts: Mapping[str, str]) -> None:
    """One file, for its owner's eyes only. Raises Refused where it cannot be written."""
    data = _archive(parts) if path.endswith((".tar.gz", ".tgz")) else as_text(parts).encode()
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # A pipe, a device: not to be replaced.
            Path(path).write_bytes(data)
        else:
            _replace(os.path.realpath(path), data)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error


def _replace(path: str, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=".report-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _archive(parts: Mapping[str, str]) -> bytes:
    out = io.BytesIO()
    folder = time.strftime("cachefs-report-%Y%m%dT%H%M%S")
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in parts.items():
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────────


def _configurations(hiding: Hiding, files: Sequence[str], config_dirs: Sequence[str]) -> str:
    plain = plain_options()
    parts = []
    for path in map(Path, files_read(files, config_dirs)):
        parts.append(f"# {path}{_mode(path)}")
        try:
            parts.append(hiding.config(path.read_text(errors="replace"), plain))
        except OSError as error:
            parts.append(f"# cannot be read: {error.strerror}")
    for path in cloud_files():
        parts.append(f"# {path}{_mode(path)}: left out")
        try:
            hiding.know_clouds(path.read_text(errors="replace"))
        except OSError:
            pass
    return "\n".join(parts) or "no configuration file"


def _mode(path: Path) -> str:
    try:
        info = path.stat()
    except OSError:
        return ""
    return f", mode {info.st_mode & 0o7777:04o}, {info.st_uid}:{info.st_gid}"


def _versions() -> str:
    lines = [f"Python {sys.version}", " ".join(platform.uname())]
    lines += [f"{key}: {value}" for key, value in _distribution()]
    for name in _LIBRARIES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed")
    lines.append(f"\n# /etc/fuse.conf\n{shortened.without_comments(_text('/etc/fuse.conf')) or '(only comments)'}")
    return "\n".join(lines)


def _distribution() -> Iterator[tuple[str, str]]:
    try:
        yield "distribution", platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return


def _kernel(config: Config | None) -> str:
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    ours = [line for line in mounts if re.search(" - fuse[. ]", line)]
    if config is not None:
        parts = Path(config.store.path).parents
        ours += [line for line in mounts if Path(line.split(" ")[4]) in parts]
    lines = ["# mounts", *dict.fromkeys(ours)]
    for connection in sorted(Path("/sys/fs/fuse/connections").glob("*")):
        values = {name: _text(connection / name).strip() for name in ("waiting", "max_background")}
        lines.append(f"# {connection}: {values}")
    lines += ["", "# /proc/meminfo", *_text("/proc/meminfo").splitlines()[:5]]
    lines += ["", f"# load: {os.getloadavg()}, {os.cpu_count()} processors"]
    return "\n".join(lines)


def _asked(where: str, command: str, limit_s: float, say: Callable[[Mapping[str, Any]], str]) -> str:
    try:
        return say(asking.ask(where, command, wait_s=limit_s))
    except CachefsError as error:
        return str(error)


def _json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=2, sort_keys=True)


def tasks_text(found: Mapping[str, Any]) -> str:
    """What `debug-tasks` answers, for people."""
    return "\n".join(shortened.tasks(found))


def _process(config: Config | None) -> str:
    """Of the daemon, as far as the kernel tells: also of one that does not answer."""
    if config is None:
        return "the configuration has to be mended first"
    lock = Path(config.store.path) / "lock"
    pid = doctor.holder_of(lock)
    if pid is None:
        return "no daemon has the store"
    lines = [f"pid {pid}"]
    for name, wanted in (("status", _OF_STATUS), ("limits", _OF_LIMITS), ("wchan", ("",)), ("stack", ("",))):
        lines += ["", f"# /proc/{pid}/{name}", shortened.only(_text(f"/proc/{pid}/{name}"), wanted)]
    lines.append("")
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*")):
        lines.append(f"# thread {thread.name}: {_text(thread / 'comm').strip()} in {_text(thread / 'wchan')}")
    return "\n".join(lines)


def _log(config: Config | None) -> str:
    if config is None:
        return "the configuration has to be mended first"
    path = config.log.file
    if path is None:
        return "no log_file is configured: see `journalctl -u cachefs`"
    try:
        with open(path, "rb") as file:
            begin = max(os.fstat(file.fileno()).st_size - LOG_BYTES, 0)
            file.seek(begin)
            text = file.read(LOG_BYTES).decode(errors="replace")
            # From a whole line on: half a secret would not be known for one.
            lines = (text.partition("\n")[2] if begin else text).splitlines()
            return "\n".join([f"# the end of {path}", *shortened.log(lines)])
    except OSError as error:
        return f"{path}: {error.strerror}"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError as error:
        return f"({error.strerror})"
