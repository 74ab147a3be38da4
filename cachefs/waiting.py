"""`prefetch --wait` and `scrub --wait`: asking how far it is until it is done. Rule: it ends when the daemon says
so, or cannot be asked; a stall is shown as one, and waited out.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cachefs.errors import CachefsError
from cachefs.shown import Pace, Progress, of_total
from cachefs.words import printable, size

if TYPE_CHECKING:
    from cachefs.trace_cli import Ask

ASK_EVERY_S = 1.0


def prefetched(ask: Ask, images: list[str], *, quiet: bool) -> list[dict[str, Any]]:
    """What came of each image, once all of it is here or will not be."""
    found = {row["id"]: row for row in ask("prefetch", images=images)}
    pace, progress = Pace(), Progress(quiet=quiet)
    try:
        while True:
            rows = list(found.values())
            here, whole = (sum(row.get(name, 0) for row in rows) for name in ("cached", "size"))
            pace.note(here)
            begun = [row["id"] for row in rows if row["error"] is None and row["cached"] < row["size"]]
            if not begun:
                return rows
            if progress.shows:
                stalled = bool(pace.stalled_s)
                words = pace.words(whole - here, why_stalled(ask) if stalled else "")
                progress.show(here / whole, f"{of_total(here, whole)}, {words}", stalled=stalled)
            time.sleep(ASK_EVERY_S)
            found.update((row["id"], row) for row in ask("prefetch", images=begun, begun=True))
    finally:
        progress.end()


def why_stalled(ask: Ask) -> str:
    """The first thing that is not as it should be, or that guests come first; nothing where nobody knows."""
    try:
        now = ask("status")
    except CachefsError as error:
        return str(error)
    for trouble in now["origin"]["images"].values():
        return _plainly(trouble["error"])
    for endpoint in now["origin"]["endpoints"]:
        if endpoint["state"] != "closed":
            return _plainly(str(endpoint["last_error"]))
    if now["ready"]["reasons"]:
        return printable(now["ready"]["reasons"][0])
    return "guests come first" if now["reads"]["waiting"] else ""


def _plainly(said: str) -> str:
    """Without the name of the failure, for which there is no room in one line."""
    name, _, rest = said.partition(": ")
    return printable(rest if rest and name.isalpha() and name[0].isupper() else said)


def scrubbed(ask: Ask, *, quiet: bool) -> dict[str, Any] | None:
    """Starts a scrub, or joins the one that is under way: what it found. None where it did not come to its end.
    It may take days."""
    number = ask("scrub")["run"]
    pace, progress = Pace(), Progress(quiet=quiet)
    try:
        while (now := ask("scrub-status"))["finished"] < number:
            done, share, total = now["bytes_verified"], now["share"], now.get("bytes_total")
            pace.note(done)
            left = None if not total else max(total - done, 0)
            words = f"{size(done)}, {pace.words(left, now['state'])}, {now['state']}"
            progress.show(share, words, stalled=bool(pace.stalled_s))
            time.sleep(ASK_EVERY_S)
    finally:
        progress.end()
    last: dict[str, Any] | None = now["last"]
    return None if last is None or last["run"] < number else last
