"""`cachefs trace`: boot traces out of a daemon into a file, and out of a file into a daemon. Rule: a file is
looked at as a whole before the daemon hears of it; the daemon looks again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from cachefs.errors import TraceRefused
from cachefs.plan import trace_file
from cachefs.plan.trace_file import FILE_BYTES_MAX, NamedTrace

# Of one request, whose line may have 1 MiB. A trace alone has up to some 200 KiB.
_REQUEST_BYTES = 256 << 10


class Ask(Protocol):
    """Puts one request to the daemon. Raises ControlError."""

    def __call__(self, command: str, **operands: Any) -> Any: ...


def rows_of(rows: Iterable[dict[str, Any]], image: str) -> list[dict[str, Any]]:
    """What is known of one image, of the rows of `trace-list`."""
    return [row for row in rows if image in row["images"] or row["content"] == f"image:{image}"]


def exported(ask: Ask, images: Sequence[str]) -> tuple[bytes, int, list[str]]:
    """The file with the traces of `images`, or with all there are; how many are in it; which images have none."""
    rows = ask("trace-list")
    images = list(map(_image, images))
    lacking = [image for image in images if not rows_of(rows, image)]
    if images:
        wanted = {(row["content"], row["kind"]): None for image in images for row in rows_of(rows, image)}
    else:
        wanted = {(row["content"], row["kind"]): None for row in rows}
    traces = [ask("trace-export", content=content, kind=kind) for content, kind in wanted]
    return trace_file.dump(traces), len(traces), lacking


def _image(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        return text  # Of which there is no trace.


def imported(ask: Ask, data: bytes) -> list[NamedTrace]:
    """Gives the daemon all traces of a file. Raises TraceRefused, and gives it none."""
    traces = trace_file.parse(data)
    for some in _requests(trace_file.to_fields(named) for named in traces):
        ask("trace-import", traces=some)
    return traces


def _requests(traces: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    some: list[dict[str, Any]] = []
    total = 0
    for fields in traces:
        length = len(json.dumps(fields))
        if some and total + length > _REQUEST_BYTES:
            yield some
            some, total = [], 0
        some.append(fields)
        total += length
    if some:
        yield some


def read(path: str) -> bytes:
    """A file, or standard input (`-`), as far as it may be one of traces. Raises TraceRefused."""
    try:
        if path == "-":
            return sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
        with open(path, "rb") as file:
            return file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise TraceRefused(f"{path}: {error.strerror}") from error


def write(path: str, data: bytes) -> None:
    """All of a file, or nothing of it. Raises TraceRefused when it cannot be written."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # A pipe, a device: not to be replaced.
            Path(path).write_bytes(data)
        else:
            _replace(os.path.realpath(path), data)
    except OSError as error:
        raise TraceRefused(f"{path}: {error.strerror}") from error


def _replace(path: str, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=".traces-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
