"""The file in which boot traces travel from node to node. Rule: nothing of a file is believed before all of it was
looked at.

A gzipped text of lines, each one JSON value, which `zcat` shows: the head (format, version, how many traces), one
line for each trace, and the sha256 of all lines before the last. That shows what was cut or changed on the way; it
does not say who wrote the file.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cachefs.errors import TraceRefused
from cachefs.plan.trace import KINDS, RUNS_MAX, fault, is_content
from cachefs.store.format import TraceRecord, TraceRun, ViewKind

FORMAT, VERSION = "cachefs-traces", 1
TRACES_MAX = 1024
FILE_BYTES_MAX, TEXT_BYTES_MAX = 16 << 20, 64 << 20
_LINE_BYTES_MAX = 1 << 20

_KINDS = {kind.name.lower(): kind for kind in KINDS}
_GZIP = 31  # zlib's word for a gzip header.


class NamedTrace(NamedTuple):
    """A trace, and whose: `content` names the bytes of an image, `kind` the view of them."""

    content: str
    kind: ViewKind
    record: TraceRecord


def to_fields(named: NamedTrace) -> dict[str, Any]:
    """As JSON has it, in a file and on the control socket."""
    return {
        "content": named.content,
        "kind": named.kind.name.lower(),
        "size": named.record.size,
        "recorded": round(named.record.recorded_s),
        "runs": [[run.first, run.blocks, run.at] for run in named.record.runs],
    }


def from_fields(fields: object) -> NamedTrace:
    """Raises TraceRefused for what `to_fields` cannot have made."""
    if not isinstance(fields, Mapping):
        raise TraceRefused("a trace is no JSON object")
    content, kind, runs = fields.get("content"), fields.get("kind"), fields.get("runs")
    if not isinstance(content, str) or not is_content(content):
        raise TraceRefused("a trace does not name the hash, or the id, of an image")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise TraceRefused(f"{content}: a trace is of {' or '.join(_KINDS)}")
    if not isinstance(runs, list) or len(runs) > RUNS_MAX or not all(map(_is_run, runs)):
        raise TraceRefused(f"{content}: its runs are no list of at most {RUNS_MAX} times three numbers")
    size, recorded_s = fields.get("size"), fields.get("recorded")
    if type(size) is not int or type(recorded_s) is not int:
        raise TraceRefused(f"{content}: its size, and when it was recorded, are no numbers")
    if not 0 <= recorded_s < 1e12:
        raise TraceRefused(f"{content}: its times cannot be")
    record = TraceRecord(size, float(recorded_s), float(recorded_s), 0, tuple(TraceRun(*run) for run in runs))
    why = fault(record)
    if why is not None:
        raise TraceRefused(f"{content}: {why}")
    return NamedTrace(content, _KINDS[kind], record)


def _is_run(run: object) -> bool:
    return isinstance(run, list) and len(run) == 3 and all(type(n) is int for n in run)


def dump(traces: Iterable[Mapping[str, Any]]) -> bytes:
    """The file of traces that are given by their fields."""
    lines = [_line(fields) for fields in traces]
    text = b"".join([_line({"format": FORMAT, "version": VERSION, "traces": len(lines)}), *lines])
    text += _line({"sha256": hashlib.sha256(text).hexdigest()})
    packer = zlib.compressobj(9, wbits=_GZIP)
    return packer.compress(text) + packer.flush()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def parse(data: bytes) -> list[NamedTrace]:
    """All traces of a file. Raises TraceRefused with one reason, and believes nothing of the file then."""
    if len(data) > FILE_BYTES_MAX:
        raise TraceRefused(f"the file is longer than {FILE_BYTES_MAX} bytes")
    lines = _unpacked(data).splitlines(keepends=True)
    head = _value(lines[0] if lines else b"")
    if not isinstance(head, Mapping) or head.get("format") != FORMAT:
        raise TraceRefused("this is no file of boot traces")
    if head.get("version") != VERSION:
        raise TraceRefused(f"the file is not of version {VERSION}, which this cachefs reads")
    count = head.get("traces")
    if type(count) is not int or not 0 <= count <= TRACES_MAX:
        raise TraceRefused(f"the file claims to have other than up to {TRACES_MAX} traces")
    if len(lines) != count + 2:
        raise TraceRefused("the file was cut, or has more lines than it says")
    last = _value(lines[-1])
    if not isinstance(last, Mapping) or last.get("sha256") != hashlib.sha256(b"".join(lines[:-1])).hexdigest():
        raise TraceRefused("the file was damaged on its way: its lines do not have its digest")
    found = [from_fields(_value(line)) for line in lines[1:-1]]
    if len({(named.content, named.kind) for named in found}) != len(found):
        raise TraceRefused("the file has two traces of one view")
    return found


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        text = unpacker.decompress(data, TEXT_BYTES_MAX)
    except zlib.error:
        raise TraceRefused("this is no file of boot traces") from None
    if not unpacker.eof or unpacker.unused_data:
        raise TraceRefused("the file was cut, or has more behind its end, or unpacks to too much")
    return text


def _value(line: bytes) -> object:
    if len(line) > _LINE_BYTES_MAX or not line.endswith(b"\n"):
        raise TraceRefused("a line of the file is too long, or has no end")
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        raise TraceRefused("a line of the file is no JSON") from None
    return value
