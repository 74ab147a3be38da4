"""Where the daemon listens, and one request to it. Rule: nothing is imported that a command does not need to put
its question: `cachefs status` is there at once, on a busy node too.

`socket_path` reads that one option out of the files by itself. Where anything is not as plain as it mostly is, it
says nothing, and whoever asks has the whole configuration read (`cachefs.config`, which takes half a second).
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Final

from cachefs.errors import ControlError, Refused

DEFAULT_FILE: Final = "/etc/cachefs/cachefs.conf"
DEFAULT_SOCKET: Final = "/run/cachefs/control.sock"
ANSWER_WAIT_S: Final = 30.0

NOT_RUNNING = (
    "no daemon answers there: start it (systemctl start cachefs, or cachefs mount), or name the configuration "
    "that it has (--config-file)"
)
NOT_ALLOWED = "only the daemon's user and group may ask it: try sudo, or join its group"
NO_ANSWER = "the daemon did not answer"


def ask(path: str, command: str, *, wait_s: float = ANSWER_WAIT_S, **operands: Any) -> Any:
    """Puts one request to the daemon that listens at `path`. Raises ControlError with what to do, or Refused with
    what the daemon says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(wait_s)
        try:
            connection.connect(path)
            connection.sendall(json.dumps({"command": command, **operands}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise ControlError(path, NOT_RUNNING) from error
        except PermissionError as error:
            raise ControlError(path, NOT_ALLOWED) from error
        except TimeoutError as error:
            raise ControlError(path, f"{NO_ANSWER} within {wait_s:.0f} s: its log says more") from error
        except OSError as error:
            raise ControlError(path, f"{NO_ANSWER}: {error.strerror or error}") from error
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise ControlError(path, "the daemon closed the connection without an answer") from error
    if not answer.get("ok"):
        raise Refused(str(answer.get("error")))
    return answer["result"]


# ── Where it listens ──────────────────────────────────────────────────────────────────────────────────


def socket_path(files: Sequence[str], folders: Sequence[str]) -> str | None:
    """The `[control] socket` of these configuration files, as `config.load` would find it; None where that has to
    be asked."""
    if any(name.upper().endswith("CONTROL__SOCKET") for name in os.environ):
        return None
    found: str | None = DEFAULT_SOCKET
    paths = [*([] if files or not os.path.exists(DEFAULT_FILE) else [DEFAULT_FILE]), *files]
    if not paths and not folders:
        return None
    try:
        for path in [*paths, *_of_folders(folders)]:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                found = _socket_in(file.read().split("\n"), found)
    except (OSError, UnicodeDecodeError):
        return None
    return found


def _of_folders(folders: Sequence[str]) -> Iterator[str]:
    for folder in folders:
        yield from (os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".conf"))


def _socket_in(lines: Sequence[str], found: str | None) -> str | None:
    """What these lines make of it. Quotes, `$`, and values of several lines are for the whole reading."""
    section, is_socket = "", False
    for line in lines:
        if line.startswith("["):
            section, is_socket = line.rstrip()[1:-1].lower(), False
        elif line[:1].isspace() and line.strip():
            if is_socket:
                return None
        elif section == "control" and (option := re.match(r"socket\s*[=:]\s*(.*)", line)) is not None:
            is_socket, value = True, option[1].strip()
            if not re.fullmatch(r"/[^$\"'\\]+", value):
                return None
            found = value
        elif line.strip():
            is_socket = False
    return found
