"""The list of metrics: its names, its documentation, and what is made of a snapshot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cachefs import metrics
from cachefs.errors import ImageCondemned, OriginBusy, ReadDeadline, word_of
from cachefs.histogram import Histogram
from cachefs.metrics import FAMILIES, Family, Kind, Snapshot, exposition

DOCS: Final = Path(__file__).parent.parent / "docs"

UNITS: Final = ("_seconds", "_bytes", "_ratio", "_info", "_total", "_bytes_per_second")
# Gauges that count things are named after them, in the plural; states after what is true when they are 1.
COUNTED: Final = {
    "cachefs_connections_limit", "cachefs_disk_hung_operations", "cachefs_flights", "cachefs_flights_queued",
    "cachefs_hydration_images", "cachefs_images_known", "cachefs_images_open", "cachefs_instance_disks",
    "cachefs_instance_folders_unread", "cachefs_leases", "cachefs_origin_changed_images",
    "cachefs_origin_images_in_trouble", "cachefs_origin_requests_limit", "cachefs_origin_requests_under_way",
    "cachefs_precache_failing_policies", "cachefs_precache_held_images", "cachefs_promise_at_risk_images",
    "cachefs_reads_waiting", "cachefs_scrub_healed_spans", "cachefs_scrub_lost_spans",
    "cachefs_scrub_rotten_chunks", "cachefs_scrub_to_mend_chunks", "cachefs_store_segments",
    "cachefs_traces_known", "cachefs_traces_recording", "cachefs_traces_replaying",
    "cachefs_verification_waiting_images",
}  # fmt: skip


def test_the_documentation_is_made_from_the_list() -> None:
    assert (DOCS / "metrics.md").read_text() == metrics.documentation(), (
        "python -m cachefs.metrics > docs/metrics.md"
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_are_those_of_prometheus(family: Family) -> None:
    assert re.fullmatch(r"cachefs(_[a-z0-9]+)+", family.name)
    assert (family.kind is Kind.COUNTER) == family.name.endswith("_total")
    if family.kind is Kind.HISTOGRAM:
        assert family.name.endswith("_seconds")
    assert not re.search(r"_(ms|milliseconds|mib|kib|percent|count|sum|bucket)(_|$)", family.name)
    assert re.fullmatch(r"[A-Z1].*\.\)?", family.help)
    assert "|" not in family.help
    assert all(re.fullmatch(r"[a-z0-9]+", label) for label in family.labels)
    is_state = re.search(r"\b1 (while|for)\b|0 sound", family.help)
    assert family.name.endswith(UNITS) or family.name in COUNTED or is_state, "no unit"


def test_no_name_is_there_twice() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def parsed(text: bytes) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def forgiving(snapshot: Snapshot) -> bytes:
    return exposition(snapshot, lambda family, error: None)


def snapshot(**status: Any) -> Snapshot:
    return Snapshot(status, {})


def test_a_family_that_cannot_be_read_is_left_out_and_told_of() -> None:
    failed: list[str] = []
    status = snapshot(uptime="some", reads={"waiting": 3, "misses": object()})
    found = parsed(exposition(status, lambda family, error: failed.append(family.name)))
    assert found["cachefs_reads_waiting"] == {(): 3.0}
    assert "cachefs_misses_total" in found, "an object is there, so 1"
    assert "cachefs_ready" not in found
    assert failed.count("cachefs_ready") == 1
    assert "cachefs_reads_waiting" not in failed
    with pytest.raises(KeyError):
        exposition(snapshot())


def test_a_reason_is_1_and_none_is_0() -> None:
    for trouble, value in (("no space left", 1.0), (None, 0.0), ("", 0.0)):
        found = parsed(forgiving(snapshot(evictor={"stuck": trouble, "trouble": None})))
        assert found["cachefs_eviction_stuck"] == {(): value}


def test_labels_of_any_text_stay_one_line() -> None:
    found = parsed(forgiving(snapshot(reads={"failed": {'a"b\\c\nd': 2}})))
    assert found["cachefs_read_errors_total"][("reason", 'a"b\\c\nd'),] == 2.0


def test_what_can_fail_is_there_before_it_fails() -> None:
    """Of a series that begins with 1, Prometheus does not see that it increased."""
    status = {"reads": {"failed": {"read_deadline": 2}}, "origin": {"requests": {"range": {"origin_busy": 3}}}}
    found = parsed(forgiving(snapshot(**status)))
    reads = {dict(labels)["reason"]: value for labels, value in found["cachefs_read_errors_total"].items()}
    assert {name for name, value in reads.items() if value} == {"read_deadline"}
    assert {"origin_unavailable", "origin_unauthorized", "image_condemned", "unexpected"} < set(reads)
    requests = found["cachefs_origin_requests_total"]
    assert requests[("outcome", "origin_busy"), ("request", "range")] == 3
    assert requests[("outcome", "token_refused"), ("request", "images")] == 0
    assert len(requests) < 150


def test_a_histogram_is_cumulative_with_its_sum() -> None:
    times = Histogram((0.001, 0.01, 0.1))
    for seconds in (0.0005, 0.001, 0.002, 0.05, 7.0):
        times.observe(seconds)
    found = parsed(forgiving(Snapshot({}, {"read_wait_seconds": {("miss",): times.now()}})))
    buckets = {dict(labels)["le"]: value for labels, value in found["cachefs_read_wait_seconds_bucket"].items()}
    assert buckets == {"0.001": 2, "0.01": 3, "0.1": 4, "+Inf": 5}
    assert found["cachefs_read_wait_seconds_count"] == {(("outcome", "miss"),): 5}
    assert found["cachefs_read_wait_seconds_sum"][("outcome", "miss"),] == pytest.approx(7.0535)


def test_what_was_read_of_a_histogram_does_not_change() -> None:
    times = Histogram()
    times.observe(1)
    before = times.now()
    times.observe(1)
    assert (before.total, before.sum) == (1, 1.0)


def test_the_process_is_measured_too() -> None:
    found = parsed(forgiving(snapshot()))
    for name in re.findall(r"`(process_\w+)`", (DOCS / "metrics.md").read_text()):
        assert name in found


def test_a_failure_has_one_word() -> None:
    assert word_of(ReadDeadline("i")) == "read_deadline"
    assert word_of(ImageCondemned("i")) == "image_condemned"
    assert word_of(OriginBusy("i")) == "origin_busy"
    assert word_of(ValueError()) == "unexpected"
