"""What systemd is told: READY, STATUS, STOPPING, WATCHDOG. Rule: never an error; without systemd nothing happens.

The protocol is one datagram to `$NOTIFY_SOCKET` (sd_notify(3)); no package of this ecosystem offers less than
a service framework for it.
"""

from __future__ import annotations

import os
import socket


def notify(**fields: str) -> None:
    """Sends `READY="1"`, `STATUS="..."` and the like. Newlines in a value become blanks."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return
    message = "\n".join(f"{name}={' '.join(value.splitlines())}" for name, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(message.encode(), "\0" + where[1:] if where[0] == "@" else where)
    except OSError:
        pass  # Whoever asked to be told is gone, or there is no descriptor left for it.


def watchdog_s() -> float | None:
    """How often this process is to say WATCHDOG, twice within the limit; None where systemd does not ask."""
    asked, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not asked.isdecimal() or pid not in ("", str(os.getpid())) or not int(asked):
        return None
    return int(asked) / 2e6
