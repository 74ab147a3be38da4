"""What mount(8) calls for `mount -t cachefs` and `mount -t fuse.cachefs`, and so for a line of fstab(5). Rule: it
only starts the daemon and waits for its READY; what is mounted, and how, is the configuration's to say.

mount(8) looks for `/sbin/mount.<type>` and gives it `SOURCE FOLDER [-sfnv] [-o OPTIONS]`. SOURCE is a
configuration file, or a word without a slash for the default ones. Exit status as mount(8) has them: 0 mounted,
1 wrong call, 32 it could not be mounted.
"""

from __future__ import annotations

import argparse
import os
import selectors
import shutil
import socket
import subprocess
import sys
import syslog
import tempfile
from collections.abc import Sequence
from pathlib import Path

WRONG_CALL, FAILED = 1, 32
LINES_MAX = 64 << 10

# Everybody's, for mount(8) and systemd, or what this filesystem is anyway: files cannot be changed or executed.
_IGNORED = {
    "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev", "ro", "rw",
    "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime", "diratime", "nodiratime", "relatime",
    "norelatime", "async", "sync",
}  # fmt: skip
_IGNORED_PREFIXES = ("x-", "X-", "comment=")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "cachefs.cli", "mount"]
    if "/" in arguments.source:
        command += ["--config-file", os.path.abspath(arguments.source)]
    for option in filter(None, ",".join(arguments.options).split(",")):
        name, _, value = option.partition("=")
        if name in ("config_file", "config_dir") and value:
            command += [f"--{name.replace('_', '-')}", value]
        elif option not in _IGNORED and not option.startswith(_IGNORED_PREFIXES):
            print(f"mount.cachefs: unknown option {option!r}: the configuration file has them", file=sys.stderr)
            return WRONG_CALL
    return 0 if arguments.fake else _start([*command, os.path.abspath(arguments.folder)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mount.cachefs", description="Mounts cachefs, for mount(8).")
    parser.add_argument("source", help="a configuration file, or any word for the default ones")
    parser.add_argument("folder", help="where to mount")
    parser.add_argument("-o", dest="options", action="append", default=[], help="config_file=, config_dir=")
    parser.add_argument("-f", dest="fake", action="store_true", help="do everything but mount")
    parser.add_argument("-t", dest="type", help="ignored: this program was chosen by it")
    for flag in "snv":
        parser.add_argument(f"-{flag}", action="store_true", help=argparse.SUPPRESS)
    return parser


def _start(command: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="cachefs-mount-") as folder:
        notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notices.bind(str(Path(folder) / "notify"))
        # Its own session: a Ctrl-C in the terminal of mount(8) is not for the daemon.
        daemon = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
            env=os.environ | {"NOTIFY_SOCKET": str(Path(folder) / "notify")},
        )
        assert daemon.stdout is not None
        said = bytearray()
        with notices, selectors.DefaultSelector() as selector:
            selector.register(notices, selectors.EVENT_READ)
            selector.register(daemon.stdout, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is notices:
                        if b"READY=1" in notices.recv(65536).split(b"\n"):
                            _hand_over(daemon.stdout.fileno(), bytes(said))
                            return 0
                        continue
                    text = os.read(daemon.stdout.fileno(), 65536)
                    said = (said + text)[-LINES_MAX:]
                    if not text:
                        daemon.wait()
                        sys.stderr.write(said.decode(errors="replace"))
                        return FAILED


def _hand_over(output: int, said: bytes) -> None:
    """What the daemon says from now on (where no log file or journal is configured) goes to the system's log."""
    syslog.openlog("cachefs", 0, syslog.LOG_DAEMON)
    for line in said.decode(errors="replace").splitlines():
        syslog.syslog(line)
    logger = shutil.which("logger")
    command = [logger, "-t", "cachefs", "-p", "daemon.info"] if logger else ["cat"]
    subprocess.Popen(
        command,
        stdin=output,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


if __name__ == "__main__":
    sys.exit(main())
