"""What of an image's metadata is kept: what policies and priorities go by, and no more. Rule: pure; whatever
Glance answers, what is kept of one image is bounded in count and in bytes.

Tags and properties are whatever the image's owner wrote, so each list ends before it costs more than `BYTES_MAX`.
What this project itself goes by comes first, the rest in alphabetical order. A value that is too long is not kept
at all: cut, it would say something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

PREFIX = "cachefs_"
PRECACHE, PRIORITY = "cachefs_precache", "cachefs_priority"
FIRST = (PRECACHE, PRIORITY, "os_distro", "os_version", "architecture")

COUNT_MAX = 16
BYTES_MAX = 1024  # Of all tags, and of all names and values of properties, in UTF-8.
VALUE_BYTES_MAX = 255


def tags_of(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """The tags that are kept of Glance's `answer`, in order."""
    said = answer.get("tags")
    tags = {tag for tag in said if isinstance(tag, str)} if isinstance(said, list | tuple) else set()
    return tuple(tag for tag, _ in _bounded((tag, "") for tag in tags))


def properties_of(answer: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The properties that are kept: those of FIRST, and all that begin with PREFIX."""
    return tuple(
        _bounded(
            (name, value)
            for name, value in answer.items()
            if isinstance(name, str) and isinstance(value, str) and (name in FIRST or name.startswith(PREFIX))
        )
    )


def _bounded(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    kept: list[tuple[str, str]] = []
    left = BYTES_MAX
    for pair in sorted(pairs, key=lambda pair: (pair[0] not in FIRST, not pair[0].startswith(PREFIX), pair)):
        lengths = [len(text.encode(errors="surrogatepass")) for text in pair]
        if max(lengths) <= VALUE_BYTES_MAX and sum(lengths) <= left and len(kept) < COUNT_MAX:
            kept.append(pair)
            left -= sum(lengths)
    return sorted(kept)


def epoch_s(text: object) -> int:
    """Seconds since 1970 of a time as Glance writes it; 0 of anything else."""
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return 0
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
