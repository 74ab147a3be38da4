"""The file in which traces travel: what goes in comes out, and a hostile one gives one line and nothing else."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import control, trace_cli
from cachefs.errors import TraceRefused
from cachefs.plan import trace, trace_file
from cachefs.plan.trace_file import FILE_BYTES_MAX, TEXT_BYTES_MAX, NamedTrace, dump, from_fields, parse, to_fields
from cachefs.store.format import TraceRecord, TraceRun, ViewKind
from tests.stores import examples, image_id

HASH = "sha512:" + "ab" * 64
RUNS = (TraceRun(5, 3, 0), TraceRun(0, 1, 17))
ONE = NamedTrace(HASH, ViewKind.ORIGINAL, TraceRecord(1 << 20, 100.0, 100.0, 0, RUNS))
OTHER = ONE._replace(content=f"image:{image_id(7)}", kind=ViewKind.RAW)


def packed(lines: list[str], digest: str | None = None) -> bytes:
    """A file of these lines, and the digest that they have."""
    text = "".join(line + "\n" for line in lines)
    found = hashlib.sha256(text.encode()).hexdigest() if digest is None else digest
    return gzip.compress((text + json.dumps({"sha256": found}) + "\n").encode())


def head(**changes: Any) -> str:
    return json.dumps({"format": "cachefs-traces", "version": 1, "traces": 1} | changes)


def line(**changes: Any) -> str:
    return json.dumps(to_fields(ONE) | changes)


def test_what_was_put_in_comes_out() -> None:
    assert parse(dump([])) == []
    assert parse(dump([to_fields(ONE), to_fields(OTHER)])) == [ONE, OTHER]


def test_the_file_is_as_the_documents_say() -> None:
    text = gzip.decompress(dump([to_fields(ONE)])).decode()
    first, second, last, rest = text.split("\n")
    assert json.loads(first) == {"format": "cachefs-traces", "version": 1, "traces": 1}
    assert json.loads(second) == {
        "content": HASH, "kind": "original", "size": 1 << 20, "recorded": 100, "runs": [[5, 3, 0], [0, 1, 17]],
    }  # fmt: skip
    assert json.loads(last) == {"sha256": hashlib.sha256(f"{first}\n{second}\n".encode()).hexdigest()}
    assert rest == ""
    assert parse(packed([first, second])) == [ONE]


many = tuple(TraceRun(2 * n, 1, n) for n in range(trace.RUNS_MAX))


def test_a_file_is_small() -> None:
    big = ONE._replace(record=TraceRecord(1 << 40, 100.0, 100.0, 0, many))
    assert len(dump([to_fields(big)])) < 64 << 10
    assert parse(dump([to_fields(big)])) == [big]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "no file of boot traces|cut"),
    "no gzip": (lambda: b"#!/bin/sh\n" * 9, "no file of boot traces"),
    "another gzip": (lambda: gzip.compress(b"hello\n"), "no JSON"),
    "zlib": (lambda: zlib.compress(b"{}\n"), "no file of boot traces"),
    "of another program": (lambda: packed(["{}"]), "no file of boot traces"),
    "a later version": (lambda: packed([head(version=2), line()]), "not of version 1"),
    "a version in words": (lambda: packed([head(version="1"), line()]), "not of version 1"),
    "fewer than it says": (lambda: packed([head(traces=2), line()]), "cut"),
    "more than it says": (lambda: packed([head(traces=0), line()]), "more lines"),
    "a count that is none": (lambda: packed([head(traces="1"), line()]), "claims"),
    "a count that is true": (lambda: packed([head(traces=True), line()]), "claims"),
    "too many": (lambda: packed([head(traces=5000), *[line()] * 5000]), "claims"),
    "another digest": (lambda: packed([head(), line()], "0" * 64), "damaged"),
    "cut": (lambda: dump([to_fields(ONE)])[:-9], "cut"),
    "with a tail": (lambda: dump([to_fields(ONE)]) + b"x", "behind its end"),
    "a bomb": (lambda: gzip.compress(bytes(TEXT_BYTES_MAX + 1)), "unpacks to too much"),
    "too long": (lambda: bytes(FILE_BYTES_MAX + 1), "longer than"),
    "a long line": (lambda: packed([head(), line(content="a" * (1 << 20))]), "too long"),
    "deep": (lambda: packed([head(), "[" * 100_000]), "no JSON"),
    "no JSON": (lambda: packed([head(), "nonsense"]), "no JSON"),
    "no UTF-8": (lambda: gzip.compress(b'{"\xff\xff": 1}\n'), "no JSON"),
    "a list": (lambda: packed([head(), "[]"]), "no JSON object"),
    "the same twice": (lambda: packed([head(traces=2), line(), line()]), "two traces"),
    "no content": (lambda: packed([head(), line(content=None)]), "does not name"),
    "content of a path": (lambda: packed([head(), line(content="../../etc/passwd")]), "does not name"),
    "content of a short hash": (lambda: packed([head(), line(content="sha512:ab")]), "does not name"),
    "content with a newline": (lambda: packed([head(), line(content=HASH + "\n")]), "does not name"),
    "content that is no id": (lambda: packed([head(), line(content="image:x")]), "does not name"),
    "no kind": (lambda: packed([head(), line(kind=1)]), "is of original or raw"),
    "of a resized view": (lambda: packed([head(), line(kind="resized")]), "is of original or raw"),
    "runs of words": (lambda: packed([head(), line(runs=[["a", 1, 1]])]), "three numbers"),
    "runs of truths": (lambda: packed([head(), line(runs=[[True, 1, 1]])]), "three numbers"),
    "runs of fractions": (lambda: packed([head(), line(runs=[[1.5, 1, 1]])]), "three numbers"),
    "runs of four": (lambda: packed([head(), line(runs=[[1, 1, 1, 1]])]), "three numbers"),
    "runs that are none": (lambda: packed([head(), line(runs={})]), "three numbers"),
    "too many runs": (lambda: packed([head(), line(runs=[[1, 1, 1]] * 9000)]), "three numbers"),
    "no runs": (lambda: packed([head(), line(runs=[])]), "has 0 runs"),
    "no size": (lambda: packed([head(), line(size="1")]), "no numbers"),
    "an enormous size": (lambda: packed([head(), line(size=1 << 80)]), "size of its image"),
    "no time": (lambda: packed([head(), line(recorded=None)]), "no numbers"),
    "an enormous time": (lambda: packed([head(), line(recorded=10**400)]), "times"),
    "a block outside": (lambda: packed([head(), line(runs=[[16, 1, 0]])]), "does not lie in its image"),
    "a block twice": (lambda: packed([head(), line(runs=[[1, 2, 0], [2, 1, 0]])]), "twice"),
    "an enormous block": (lambda: packed([head(), line(runs=[[1 << 90, 1, 0]])]), "does not lie"),
    "times that fall": (lambda: packed([head(), line(runs=[[1, 1, 5], [2, 1, 4]])]), "order of their times"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_what_it_should_be_gives_one_line(name: str) -> None:
    data, says = HOSTILE[name]
    with pytest.raises(TraceRefused, match=says) as failure:
        parse(data())
    assert len(str(failure.value)) < 300
    assert str(failure.value).isprintable()


@examples(300)
@given(st.binary(max_size=200), st.integers(0, 400), st.booleans())
def test_whatever_a_file_holds_it_is_read_or_refused(noise: bytes, where: int, inside: bool) -> None:
    text = gzip.decompress(dump([to_fields(ONE)]))
    data = gzip.compress(text[:where] + noise + text[where + len(noise) :]) if inside else noise
    try:
        assert parse(data) == [ONE]
    except TraceRefused:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@examples(300)
@given(st.dictionaries(st.sampled_from(list(to_fields(ONE))), json_values))
def test_whatever_a_trace_says_it_is_taken_or_refused(changes: dict[str, Any]) -> None:
    try:
        found = from_fields(to_fields(ONE) | changes)
    except TraceRefused:
        return
    assert trace.fault(found.record) is None
    assert trace.is_content(found.content)
    assert trace_file.from_fields(to_fields(found)) == found


# ── The command's side of it ──────────────────────────────────────────────────────────────────────────


def test_a_file_is_written_whole_where_it_leads_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    trace_cli.write(str(link), b"one")
    trace_cli.write(str(link), b"two")
    assert (link.is_symlink(), real.read_bytes(), real.stat().st_mode & 0o777) == (True, b"two", 0o644)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"], "and nothing stays beside it"
    trace_cli.write("/dev/null", b"three")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(TraceRefused, match="No such file"):
        trace_cli.write(str(tmp_path / "none" / "file"), b"")
    with pytest.raises(TraceRefused, match="No such file"):
        trace_cli.read(str(tmp_path / "none"))
    with pytest.raises(TraceRefused, match="Is a directory"):
        trace_cli.read(str(tmp_path))


def test_many_traces_go_in_requests_that_a_daemon_takes() -> None:
    big = [
        ONE._replace(content=f"sha512:{n:0128x}", record=TraceRecord(1 << 40, 1.0, 1.0, 0, many)) for n in range(9)
    ]
    asked: list[Any] = []

    def ask(command: str, **operands: Any) -> Any:
        assert len(json.dumps({"command": command, **operands})) < control.REQUEST_BYTES_MAX
        asked.extend(operands["traces"])

    assert trace_cli.imported(ask, dump(map(to_fields, big))) == big
    assert [from_fields(fields) for fields in asked] == big
    asked.clear()
    with pytest.raises(TraceRefused):
        trace_cli.imported(ask, dump([*map(to_fields, big), to_fields(big[0])]))
    assert asked == [], "nothing of a file that is refused"
