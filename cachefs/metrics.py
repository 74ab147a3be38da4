"""What the daemon measures, as Prometheus reads it. Rule: every value is looked up when somebody asks, in a
snapshot that the daemon's loop made of what is there anyway; nothing is counted here.

`SECTIONS` is the one list: the exposition and docs/metrics.md (`python -m cachefs.metrics > docs/metrics.md`) are
both made from it. A family whose values are missing is left out rather than in the way of the others.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from cachefs import __version__
from cachefs.errors import words_of_origin
from cachefs.histogram import Counted
from cachefs.leases import Reason
from cachefs.sources.circuit import State as CircuitState
from cachefs.sources.measured import ABANDONED, OK, Asked

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

UNEXPECTED: Final = "unexpected"
IDENTITY: Final = "identity"
ASKED: Final = tuple(asked.value for asked in Asked)
# What `status` says in words, as labels.
LEASES: Final = {Reason.TOUCH.value: "touched", Reason.DISK.value: "instance_disk"}

Labels = tuple[str, ...]
Value = float | Counted


@dataclass(frozen=True)
class Snapshot:
    """One moment of the daemon. `status` is what `cachefs status` gives; `store` its part that the disk was asked
    for, at another moment, or None when the disk has not answered yet. `times` are histograms, by name and labels;
    `seconds` what the snapshot itself took: how old it is, how long the loop let it wait, how old `store` is."""

    status: Mapping[str, Any]
    times: Mapping[str, Mapping[Labels, Counted]]
    store: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] | None = None


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


Read = Callable[[Snapshot], Iterable[tuple[Labels, Value]]]


@dataclass(frozen=True)
class Family:
    """One metric: its name, what it is, its labels, and how its values are found in a snapshot."""

    name: str
    kind: Kind
    help: str
    read: Read
    labels: Labels = ()


class _Missing(Exception):
    """The snapshot does not have it: the disk did not answer yet, or nothing of the kind is there."""


# ── How values are found ──────────────────────────────────────────────────────────────────────────────


def _dig(found: Any, path: str) -> Any:
    for name in path.split("."):
        found = found[name]
    return found


def _number(value: Any) -> float:
    """True is 1; a text (a reason) 1, and no text 0."""
    return float(value) if isinstance(value, int | float) else float(bool(value))


def _at(path: str) -> Read:
    """One value of `status`, by its dotted path."""
    return lambda snapshot: [((), _number(_dig(snapshot.status, path)))]


def _each(path: str, field: str = "") -> Read:
    """One value for each key of a mapping of `status`; `field` of each, where these are mappings."""

    def read(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
        for key, value in _dig(snapshot.status, path).items():
            yield (str(key),), _number(value[field] if field else value)

    return read


def _when(path: str, seconds: float = 1.0) -> Read:
    """A moment of `status` in seconds since 1970; nothing while there is none."""

    def read(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
        value = _dig(snapshot.status, path)
        if value is not None:
            yield (), value * seconds

    return read


def _stored(path: str) -> Read:
    """One value of what the disk was asked for."""

    def read(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
        if snapshot.store is None:
            raise _Missing
        yield (), _number(_dig(snapshot.store, path))

    return read


def _times(name: str) -> Read:
    return lambda snapshot: snapshot.times[name].items()


def _seconds(name: str) -> Read:
    def read(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
        if snapshot.seconds is None or name not in snapshot.seconds:
            raise _Missing
        yield (), snapshot.seconds[name]

    return read


def _state(path: str, states: Labels) -> Read:
    """1 for the state that it is in, 0 for the others."""

    def read(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
        now = str(_dig(snapshot.status, path))
        for state in states:
            yield (state,), float(state == now)

    return read


def _sides(field: str) -> Read:
    return lambda snapshot: [
        ((side,), _number(snapshot.status["disk"][side][field])) for side in ("reads", "writes")
    ]


def _side_states(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    for side in ("reads", "writes"):
        for state in ("healthy", "degraded", "down"):
            yield (side, state), float(snapshot.status["disk"][side]["state"] == state)


def _read_errors(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    failed = snapshot.status["reads"]["failed"]
    # From 0 on: of a series that begins with 1 Prometheus does not see that something happened.
    for reason in sorted({*words_of_origin(), UNEXPECTED, *failed}):
        yield (reason,), float(failed.get(reason, 0))


def _requests(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    for asked in ASKED:
        outcomes = snapshot.status["origin"]["requests"].get(asked, {})
        for outcome in sorted({OK, ABANDONED, UNEXPECTED, *words_of_origin(), *outcomes}):
            yield (asked, outcome), float(outcomes.get(outcome, 0))


def _by_request(path: str) -> Read:
    return lambda snapshot: [((asked,), _number(_dig(snapshot.status, path).get(asked, 0))) for asked in ASKED]


def _circuits(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    origin = snapshot.status["origin"]
    for name, circuit in [*((_name(one), one) for one in origin["endpoints"]), (IDENTITY, origin["identity"])]:
        for state in CircuitState:
            yield (name, state.value), float(circuit["state"] == state.value)


def _in_use(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    for endpoint in snapshot.status["origin"]["endpoints"]:
        yield (_name(endpoint),), float(endpoint["in_use"])


def _name(endpoint: Mapping[str, Any]) -> str:
    return endpoint["url"] or "catalog"


def _leases(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    for reason, count in snapshot.status["leases"].items():
        yield (LEASES.get(reason, re.sub(r"\W+", "_", reason)),), float(count)


def _troubled_folders(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    yield (), float(sum(folder["trouble"] is not None for folder in snapshot.status["instances"]["folders"]))


def _build(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    yield (__version__, platform.python_version(), _version_of("pyfuse3"), platform.release()), 1.0


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


# ── The list ──────────────────────────────────────────────────────────────────────────────────────────


def _counter(name: str, help: str, read: Read, *labels: str) -> Family:
    return Family(f"cachefs_{name}_total", Kind.COUNTER, help, read, labels)


def _gauge(name: str, help: str, read: Read, *labels: str) -> Family:
    return Family(f"cachefs_{name}", Kind.GAUGE, help, read, labels)


def _histogram(name: str, help: str, *labels: str) -> Family:
    return Family(f"cachefs_{name}", Kind.HISTOGRAM, help, _times(name), labels)


SECTIONS: Final[dict[str, list[Family]]] = {
    "The daemon": [
        _gauge(
            "build_info",
            "Always 1; the labels say what runs.",
            _build,
            "version",
            "python",
            "pyfuse3",
            "kernel",
        ),
        _gauge(
            "ready",
            "1 while instances can be given disks of the mount; what /readyz answers with 200.",
            _at("ready.is_ready"),
        ),
        _gauge(
            "uptime_seconds",
            "Since the start of the daemon.",
            _at("uptime"),
        ),
        _gauge(
            "loop_delay_seconds",
            "How long the loop that serves reads let this snapshot wait.",
            _seconds("delay"),
        ),
        _gauge(
            "snapshot_age_seconds",
            "Age of the values of this exposition: 0 to 1 while the loop is well, more when it did not answer "
            "in time.",
            _seconds("age"),
        ),
        _gauge(
            "store_usage_age_seconds",
            "Age of what the store's disk was asked for (the families that say so): more than a minute when "
            "it hangs.",
            _seconds("store_age"),
        ),
    ],
    "Reads": [
        _counter(
            "reads",
            "Reads of the kernel, by where the bytes came from: `hit` (the page cache, at once), `memory` (on "
            "their way to the store), `disk` (the store's disk) and `miss` (some of them from Glance). With those "
            "of qemu-nbd that are no hits.",
            _each("reads.by_outcome"),
            "outcome",
        ),
        _counter(
            "read_bytes",
            "Bytes that reads gave, where that is counted: hits are not (see "
            "`cachefs_read_hit_sampled_bytes_total`).",
            _each("reads.bytes"),
            "outcome",
        ),
        _counter("read_errors", "Reads that failed, by the kind of failure.", _read_errors, "reason"),
        _histogram(
            "read_hit_seconds",
            "How long hits take in the daemon, from the request's arrival to the bytes. Of a sample: some 50 "
            "hits every 5 s, so `_count` is not the number of hits.",
        ),
        _counter(
            "read_hit_sampled_bytes",
            "Bytes of the hits in that sample: divided by its count, what a hit gives.",
            _at("reads.sampled_bytes"),
        ),
        _histogram(
            "read_wait_seconds",
            "How long the other reads waited, failures and deadlines included, by outcome `disk` or `miss`.",
            "outcome",
        ),
        _gauge("reads_waiting", "Reads that wait at this moment.", _at("reads.waiting")),
        _gauge(
            "reads_waiting_longest_seconds", "How long the oldest of them waits.", _at("reads.waiting_longest")
        ),
        _counter(
            "misses",
            "Times that bytes were wanted and absent, also by the daemon itself (the tables of a disk).",
            _at("reads.misses"),
        ),
        _gauge("images_known", "Images that Glance is known to have.", _at("images.known")),
        _gauge("images_open", "Images that somebody has open.", _at("images.open")),
    ],
    "Flights": [
        _gauge(
            "flights",
            "Fetches under way, by who waits for them: `demand` (a guest), `readahead`, `hydration`.",
            _each("fetcher.flights_by_priority"),
            "priority",
        ),
        _gauge(
            "flights_queued",
            "Fetches that wait for a connection (`[glance]` `connections`).",
            _at("fetcher.queued"),
        ),
        _gauge("connections_limit", "Requests for bytes at once, at most.", _at("fetcher.connections")),
        _counter("flight_failures", "Fetches that failed after all their tries.", _at("fetcher.failures")),
        _counter("flight_retries", "Tries after a failure.", _at("fetcher.retries")),
        _gauge(
            "arriving_bytes",
            "Memory for what is arriving and not in the store yet.",
            _at("fetcher.bytes_in_memory"),
        ),
    ],
    "Glance": [
        _counter(
            "origin_requests",
            "Requests that ended, by what was asked for (`range` and `stream` of bytes; `image`, `images`: "
            "metadata) and how it went: `ok`, `abandoned` (nobody needed it any more), or the kind of failure.",
            _requests,
            "request",
            "outcome",
        ),
        _counter(
            "origin_received_bytes",
            "Bytes of images that were received, whatever became of the request.",
            _by_request("origin.bytes"),
            "request",
        ),
        _histogram(
            "origin_request_seconds",
            "From asking to the last byte, of requests that went well; with what they waited here for memory, "
            "and for guests that went first.",
            "request",
        ),
        _histogram("origin_first_byte_seconds", "From asking to the first byte of the body.", "request"),
        _gauge(
            "origin_requests_under_way", "Requests at this moment.", _by_request("origin.under_way"), "request"
        ),
        _gauge(
            "origin_request_cost_seconds",
            "What one request costs before its first byte, as the windows of fetching go by it.",
            _at("fetcher.request_cost"),
        ),
        _gauge(
            "origin_link_bytes_per_second",
            "What the link carries, as measured; 0 while nothing was.",
            _at("fetcher.link_bytes_per_second"),
        ),
        _gauge(
            "origin_unwell",
            "1 while Glance cannot be asked (no endpoint, or no token): what is cached is served, the rest fails.",
            lambda snapshot: [((), float(not snapshot.status["origin"]["may_ask"]))],
        ),
        _gauge(
            "origin_reached",
            "1 for a Glance that has answered something since the start of the daemon.",
            _at("images.glance_reached"),
        ),
        _gauge(
            "origin_in_doubt",
            "1 while the last question to Glance is not answered: it is put again every 10 s.",
            lambda snapshot: [((), float(snapshot.status["images"]["glance_trouble"] is not None))],
        ),
        _gauge(
            "origin_circuit_state",
            "1 for the state that each endpoint, and the `identity` service, is in: `closed` (asked as ever), "
            "`open` (left alone after failures), `half-open` (being tried).",
            _circuits,
            "endpoint",
            "state",
        ),
        _gauge("origin_endpoint_in_use", "1 for the endpoint that is asked first.", _in_use, "endpoint"),
        _gauge(
            "origin_images_in_trouble",
            "Images that cannot be had although Glance is well. `cachefs status` names them.",
            lambda snapshot: [((), float(len(snapshot.status["origin"]["images"])))],
        ),
        _gauge(
            "origin_requests_limit",
            "Requests at once at this moment: less than `connections` after an outage, as load comes back "
            "gradually.",
            _at("origin.requests_at_once"),
        ),
    ],
    "The store": [
        _gauge(
            "store_used_bytes", "Of the disk, by the filesystem's own count. (Disk.)", _stored("bytes_on_disk")
        ),
        _gauge(
            "store_limit_bytes",
            "What the store may hold, as full as the filesystem is now: `max_size` and `min_free`. (Disk.)",
            _stored("bytes_limit"),
        ),
        _gauge("store_filesystem_free_bytes", "What the filesystem has left. (Disk.)", _stored("bytes_free")),
        _gauge("store_segments", "Segment files. (Disk.)", _stored("segments")),
        _gauge(
            "store_cached_bytes",
            "Bytes of images that are cached, shared ones and zeros too. (Disk.)",
            _stored("bytes_cached"),
        ),
        _gauge(
            "store_high_watermark_ratio",
            "Share of the limit above which eviction begins.",
            _at("evictor.high_watermark"),
        ),
        _gauge(
            "store_low_watermark_ratio", "Share of the limit down to which it goes.", _at("evictor.low_watermark")
        ),
        _counter("store_written_bytes", "Bytes that were appended to segments.", _at("writer.bytes_landed")),
        _counter("store_zero_bytes", "Bytes that were zeros, and are not stored.", _at("writer.bytes_zero")),
        _gauge(
            "store_shared_bytes",
            "Bytes that need not be stored since the start, as other images have them. Cutting a span anew "
            "may take some back.",
            _at("writer.bytes_shared"),
        ),
        _counter(
            "store_not_kept_bytes", "Bytes that were fetched, served and not kept.", _at("writer.bytes_not_kept")
        ),
        _counter("store_commits", "Commits of the index.", _at("writer.commits")),
        _gauge(
            "store_refuses",
            "1 while the store does not keep what is fetched (full, or its disk fails).",
            _at("writer.trouble"),
        ),
        _counter(
            "store_read_errors", "Reads of segments that did not give what they should.", _at("writer.read_errors")
        ),
        _counter(
            "store_rotten_chunks",
            "Chunks that were found not to be what they were.",
            _at("writer.rotten_chunks_found"),
        ),
        _gauge(
            "disk_state",
            "The state of the store's disk: 1 for the one that holds, for `reads` and `writes` apart.",
            _side_states,
            "side",
            "state",
        ),
        _counter("disk_errors", "Operations on the store's disk that failed or hung.", _sides("errors"), "side"),
        _gauge("disk_hung_operations", "Operations that hang at this moment.", _sides("hung"), "side"),
    ],
    "Eviction and leases": [
        _counter(
            "evicted_spans",
            "Spans that went, by why: `watermark` (in the background), `full` (a write met the limit), "
            "`ended` (Glance has the image no more), `asked` (`cachefs evict`).",
            _each("evictor.evicted", "spans"),
            "reason",
        ),
        _counter(
            "evicted_bytes",
            "Bytes of the disk that came back for them.",
            _each("evictor.evicted", "bytes"),
            "reason",
        ),
        _gauge(
            "eviction_stuck", "1 while nothing more may be evicted and the store is full.", _at("evictor.stuck")
        ),
        _gauge("eviction_failing", "1 while eviction fails.", _at("evictor.trouble")),
        _gauge(
            "leases",
            "What may not be evicted, by why: `open` handles; images that are `pinned`, `touched` lately, or "
            "named by an `instance_disk`.",
            _leases,
            "reason",
        ),
        _gauge("instance_disks", "Disks of instances that name an image.", _at("instances.disks")),
        _gauge(
            "instance_folders_unread",
            "Folders of instances that cannot be looked at: what they name counts as it did.",
            _troubled_folders,
        ),
        _gauge("pinned_bytes", "What pinned images claim, by their whole sizes.", _at("evictor.pinned_bytes")),
    ],
    "Images come whole": [
        _gauge("hydration_images", "Images that are to be whole and are not yet.", _at("hydration.images")),
        _gauge(
            "hydration_backlog_bytes",
            "Bytes of them that are still to be fetched.",
            _at("hydration.bytes_to_fetch"),
        ),
        _counter(
            "hydration_fetched_bytes", "Bytes that were fetched in the background.", _at("hydration.bytes_fetched")
        ),
        _gauge(
            "promise_at_risk_images",
            "Leased images that cannot be held whole: instances on them still need Glance. `cachefs status` "
            "names them.",
            lambda snapshot: [((), float(len(snapshot.status["hydration"]["at_risk"])))],
        ),
        _counter(
            "verified_images", "Images whose bytes were found to have Glance's hash.", _at("verification.verified")
        ),
        _counter("condemned_images", "Images whose bytes were found not to.", _at("verification.condemned")),
        _gauge(
            "verification_waiting_images",
            "Whole images that are still to be compared.",
            _at("verification.waiting"),
        ),
        _gauge(
            "origin_changed_images",
            "Images that Glance gives otherwise than they were verified: what comes is refused. `cachefs status` "
            "names them.",
            lambda snapshot: [((), float(len(snapshot.status["verification"]["origin_changed"])))],
        ),
    ],
    "Pre-caching and boot traces": [
        _gauge("precache_held_images", "Images that policies hold.", _at("precache.held_images")),
        _gauge("precache_held_bytes", "Their whole sizes.", _at("precache.held_bytes")),
        _gauge("precache_cached_bytes", "What of them is cached.", _at("precache.cached_bytes")),
        _gauge(
            "precache_failing_policies",
            "Policies that failed when they were asked last.",
            lambda snapshot: [((), float(len(snapshot.status["precache"]["failed"])))],
        ),
        _gauge("traces_known", "Images of which a boot trace is known.", _at("traces.known")),
        _gauge("traces_recording", "Traces that are being recorded.", _at("traces.recording")),
        _gauge("traces_replaying", "Traces that are being fetched ahead of a guest.", _at("traces.replaying")),
        _counter("traces_recorded", "Traces that were recorded.", _at("traces.recorded")),
        _counter("traces_replayed", "Traces that were fetched ahead.", _at("traces.replayed")),
        _counter("traces_replayed_bytes", "Bytes that were fetched so.", _at("traces.bytes_replayed")),
    ],
    "Scrubbing": [
        _gauge("scrub_running", "1 while a scrub is under way.", _at("scrub.run")),
        _gauge(
            "scrub_progress_ratio",
            "Share of the bytes of chunks that the scrub under way has compared.",
            _when("scrub.share"),
        ),
        _gauge(
            "scrub_last_end_timestamp_seconds",
            "When the last scrub ended; nothing before the first.",
            _when("scrub.ended"),
        ),
        _gauge(
            "scrub_verified_bytes",
            "What the scrub under way, or the last one, compared.",
            _at("scrub.bytes_verified"),
        ),
        _gauge("scrub_rotten_chunks", "Rotten chunks that it found.", _at("scrub.rotten")),
        _gauge("scrub_healed_spans", "Spans that are fetched again for it.", _at("scrub.healed")),
        _gauge("scrub_lost_spans", "Spans that nobody has any more.", _at("scrub.lost")),
        _gauge("scrub_to_mend_chunks", "Rotten chunks that are still to be seen to.", _at("scrub.to_mend")),
        _gauge(
            "scrub_last_exit_status",
            "How the last scrub since the start ended: 0 sound, 1 healed, 2 lost or damaged.",
            lambda snapshot: [
                ((), float(last["exit_status"])) for last in [snapshot.status["scrub"]["last"]] if last
            ],
        ),
    ],
}

FAMILIES: Final = [family for families in SECTIONS.values() for family in families]


# ── The exposition ────────────────────────────────────────────────────────────────────────────────────


OnFailure = Callable[[Family, Exception], None]


def exposition(snapshot: Snapshot, on_failure: OnFailure | None = None) -> bytes:
    """The text that Prometheus reads. `on_failure` is told of families that cannot be read, and are left out;
    without it that is an error."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.process_collector import ProcessCollector

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot, on_failure))
    ProcessCollector(registry=registry)
    text: bytes = generate_latest(registry)
    return text


class _Collector:
    """What prometheus_client asks for families."""

    def __init__(self, snapshot: Snapshot, on_failure: OnFailure | None) -> None:
        self._snapshot, self._on_failure = snapshot, on_failure

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            try:
                yield _metric(family, self._snapshot)
            except _Missing:
                continue
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                if self._on_failure is None:
                    raise
                self._on_failure(family, error)


def _metric(family: Family, snapshot: Snapshot) -> Metric:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    found: Any
    match family.kind:
        case Kind.COUNTER:
            found = CounterMetricFamily(family.name, family.help, labels=family.labels)
        case Kind.GAUGE:
            found = GaugeMetricFamily(family.name, family.help, labels=family.labels)
        case Kind.HISTOGRAM:
            found = HistogramMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in family.read(snapshot):
        if isinstance(value, Counted):
            buckets = [(f"{bound:g}", count) for bound, count in zip(value.bounds, value.up_to, strict=True)]
            found.add_metric(labels, [*buckets, ("+Inf", value.total)], value.sum)
        else:
            found.add_metric(labels, value)
    metric: Metric = found
    return metric


# ── The documentation ─────────────────────────────────────────────────────────────────────────────────

_HEAD = """\
# Metrics

Made from the code by `python -m cachefs.metrics`: change it there.

The daemon answers over HTTP on `[metrics]` `listen`, by default on `127.0.0.1:19292`; empty turns that off.

| path | answer |
|---|---|
| `/metrics` | what follows, in Prometheus' text format |
| `/healthz` | 200 when the loop that serves reads answers, else 503; JSON with `heartbeat_age_seconds` |
| `/readyz` | 200 when instances can be given disks of the mount, else 503; JSON with `state` and `reasons` |

`state` is `ready`, `degraded` or `unready`; `reasons` says in words what is not as it should be, and what to do.

- `ready` (200): it is mounted, and the last question to Glance was answered.
- `degraded` (200): it serves what is cached, and something is not as it should be. The last question to Glance
  failed: that is so after one failure, until one is answered, and the daemon asks again by itself within 10 s. Or
  Glance was not reached since the start; or the store's disk is unwell, what is fetched is not kept, or an image
  in use cannot be held whole.
- `unready` (503): it is not mounted. Or no image is known: Glance was not reached since the start, nor before it.

The daemon asks Glance once at its start, in the background. A node that was up before starts, lists and serves
with Glance down: that is `degraded`, so that an outage of Glance takes no node out of service.

A scrape is answered by a thread of its own, from a snapshot that the loop makes within a millisecond and at most
once a second. When the loop does not answer within 2 s, the last snapshot is given, and
`cachefs_snapshot_age_seconds` grows. What the disk is asked for (`(Disk.)` below) comes from another thread, so
that a disk that hangs holds up nothing.

Nothing here names an image, an instance or an account. Counters begin at 0 when the daemon starts; those of
`store_written`, `store_zero` and `store_rotten_chunks` also when a failed commit was undone.

**Hits are sampled.** The path of a hit counts one number and nothing else. For its latency, every 5 s on average
the function that serves reads is replaced by one with a clock, for the next 50 hits. The time is that between the
request's arrival in the daemon and its bytes: the kernel's part, and what a request waited in the kernel's queue,
is not in it.

`monitoring/` has a dashboard for Grafana (`cachefs-dashboard.json`) and alert rules (`cachefs-alerts.yaml`).
"""

_TAIL = """\
## The process

From `prometheus_client`: `process_cpu_seconds_total`, `process_resident_memory_bytes`,
`process_virtual_memory_bytes`, `process_start_time_seconds`, `process_open_fds`, `process_max_fds`.
"""


def documentation() -> str:
    """docs/metrics.md."""
    parts = [_HEAD]
    for title, families in SECTIONS.items():
        rows = [
            f"| `{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.help} |"
            for one in families
        ]
        parts.append(
            "\n".join([f"## {title}", "", "| name | type | labels | |", "|---|---|---|---|", *rows]) + "\n"
        )
    parts.append(_TAIL)
    return "\n".join(parts)


if __name__ == "__main__":
    print(documentation(), end="")
