"""oslo.utils' format inspectors, which Nova and Glance use too, fed by pieces. Rule: whatever they raise is a
refusal, and whatever they want to log of an image is dropped.

They were written for a stream that passes from its first byte to its last. Here they get the head as such, and
then just the regions that those still lack which know the file as theirs. This is the only importer of oslo.utils.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from oslo_utils.imageutils import format_inspector

from cachefs.errors import FormatError
from cachefs.formats.pieces import Pieces

CHUNK_BYTES = 4096
"""As Nova feeds them: what they make of a text depends on how much of it comes at once."""

REGIONS_MAX = 8

log = logging.getLogger(format_inspector.__name__)

Inspector = format_inspector.FileInspector


def _dropped(record: logging.LogRecord) -> bool:
    """They log lines of a descriptor, as long as an image likes, at ERROR."""
    return False


@contextmanager
def _hushed() -> Iterator[None]:
    log.addFilter(_dropped)
    try:
        yield
    finally:
        log.removeFilter(_dropped)


def matching(head: bytes) -> dict[str, Inspector | None]:
    """The inspectors that know `head` as theirs, by their name; None for one that failed over it. Raises
    FormatError when one cannot even say whether it is its own: Nova takes no such image either."""
    found: dict[str, Inspector | None] = {}
    with _hushed():
        for name, kind in format_inspector.ALL_FORMATS.items():
            if name == "raw":
                continue
            inspector = kind()
            failed = not _eat(inspector, head)
            try:
                matches = inspector.format_match
            except Exception as error:  # An AttributeError of the one for VMDK, over some texts.
                raise FormatError(f"its content confuses the inspector for {name}") from error
            if matches:
                found[name] = None if failed else inspector
    return found


def _eat(inspector: Inspector, head: bytes) -> bool:
    try:
        for at in range(0, len(head), CHUNK_BYTES):
            inspector.eat_chunk(head[at : at + CHUNK_BYTES])
    except Exception:  # noqa: BLE001 -- ImageFormatError, struct.error, whatever the next release has.
        return False
    return True


def failures(inspector: Inspector, pieces: Pieces) -> set[str]:
    """The names of the safety checks that the file fails. Raises Lacking while a region is missing, and
    FormatError when the inspector cannot be brought to an answer."""
    with _hushed():
        for _ in range(REGIONS_MAX):
            if not _complete_one(inspector, pieces):
                break
        try:
            inspector.finish()
            inspector.safety_check()
        except format_inspector.SafetyCheckFailed as failed:
            return set(failed.failures)
        except Exception as error:  # ImageFormatError for what stayed incomplete, and the rest.
            raise FormatError("the inspector of its format cannot make it out") from error
    return set()


def _complete_one(inspector: Inspector, pieces: Pieces) -> bool:
    """Gives the inspector the first region that it lacks; False when it lacks none."""
    for name in inspector.context_info:
        region = inspector.region(name)
        at_end = isinstance(region, format_inspector.EndCaptureRegion)
        have = len(region.data)
        if region.complete or (at_end and region.offset + have == pieces.size and have == region.length):
            continue
        start = pieces.size - region.length if at_end else region.offset + have
        length = region.length if at_end else region.length - have
        if start < 0 or length < 0:
            raise FormatError("it ends before its header does")
        data = pieces.get(start, length, "header")
        try:
            region.capture(data, start + length)
            inspector.region_complete(name)
            inspector.eat_chunk(b"")
        except Exception as error:
            raise FormatError("the inspector of its format cannot make it out") from error
        return True
    return False
