"""What a real daemon tells those who watch it, and that the dashboard and the alerts ask for what it tells.

The queries of `monitoring/` are run by a real Prometheus that has scraped the daemon, where there is one
(`setup/install test` puts it into `.tools`); a machine without it skips these tests, and says so.
"""

from __future__ import annotations

import errno
import http.client
import json
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cachefs import metrics
from tests.cloud.service import poll_until
from tests.node import Node, errno_of, read_direct
from tests.origin import Fault, Kind, OriginImage, Request, ScriptedOrigin, Stall, pattern

pytestmark = pytest.mark.mount

KIB, MIB = 1 << 10, 1 << 20
ROOT: Final = Path(__file__).parent.parent
MONITORING: Final = ROOT / "monitoring"
IMAGE: Final = "00000000-0000-4000-8000-000000000011"
STALLED: Final = "00000000-0000-4000-8000-000000000022"
SIZE: Final = 8 * MIB
DEADLINE_S: Final = 3
FRESH_S: Final = 1.05  # So long a snapshot is good.
# What nothing has happened for: named, described, and without a value on a node that was just started.
MAY_BE_EMPTY: Final = {
    "cachefs_scrub_progress_ratio", "cachefs_scrub_last_end_timestamp_seconds", "cachefs_scrub_last_exit_status",
}  # fmt: skip

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


class Watched:
    """A node, and its metrics."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.wait_for_log("metrics on http://")
        found = re.search(r"metrics on http://([\d.]+):(\d+)/metrics", node.log)
        assert found is not None
        self.host, self.port = found[1], int(found[2])

    def get(self, path: str) -> tuple[int, str]:
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=20)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def fresh(self, path: str) -> tuple[int, str]:
        """An answer that is newer than everything that was done before."""
        time.sleep(FRESH_S)
        return self.get(path)

    def exposition(self) -> str:
        status, text = self.fresh("/metrics")
        assert status == 200
        return text

    def samples(self) -> Samples:
        found: Samples = {}
        for family in text_string_to_metric_families(self.exposition()):
            for sample in family.samples:
                found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return found


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name][frozenset(labels.items())]


class StallingOrigin(ScriptedOrigin):
    """Its image STALLED gives no byte until `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        images = [OriginImage(image, None, SIZE, pattern(SIZE)) for image in (IMAGE, STALLED)]
        super().__init__(images, script=self._stall)

    def _stall(self, request: Request) -> Fault | None:
        return Stall(release=self.release) if request.image == STALLED and request.kind is Kind.DATA else None


@pytest.fixture(scope="module")
def origin() -> Iterator[StallingOrigin]:
    with StallingOrigin() as origin:
        yield origin


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, origin: StallingOrigin) -> Iterator[Watched]:
    node = Node(tmp_path_factory.mktemp("node"), origin.url)
    node.configure(metrics={"listen": "127.0.0.1:0"}, mount={"read_deadline": DEADLINE_S})
    with node:
        yield Watched(node)


# ── Values ────────────────────────────────────────────────────────────────────────────────────────────


def test_reads_are_counted_by_where_they_came_from(watched: Watched, origin: StallingOrigin) -> None:
    before = watched.samples()
    path = watched.node.path(IMAGE)
    assert read_direct(path, 0, 128 * KIB) == pattern(SIZE)(0, 128 * KIB)
    for _ in range(20):
        read_direct(path, 0, 4 * KIB)
    after = watched.samples()

    def grown(name: str, **labels: str) -> float:
        return of(after, name, **labels) - of(before, name, **labels)

    assert grown("cachefs_reads_total", outcome="miss") >= 1
    assert grown("cachefs_reads_total", outcome="hit") + grown("cachefs_reads_total", outcome="memory") >= 19
    assert grown("cachefs_read_bytes_total", outcome="miss") >= 64 * KIB
    assert grown("cachefs_read_wait_seconds_count", outcome="miss") == grown("cachefs_reads_total", outcome="miss")
    assert grown("cachefs_origin_requests_total", request="range", outcome="ok") >= 1
    assert grown("cachefs_origin_request_seconds_count", request="range") >= 1
    assert grown("cachefs_origin_received_bytes_total", request="range") >= 128 * KIB
    assert of(after, "cachefs_ready") == 1
    assert of(after, "cachefs_disk_state", side="reads", state="healthy") == 1
    assert of(after, "cachefs_origin_circuit_state", endpoint=origin.url, state="closed") == 1


def test_what_status_says_the_metrics_say(watched: Watched) -> None:
    read_direct(watched.node.path(IMAGE), 0, 64 * KIB)
    samples, status = watched.samples(), watched.node.status()
    assert of(samples, "cachefs_reads_total", outcome="hit") == status["reads"]["hits"]
    assert of(samples, "cachefs_misses_total") == status["reads"]["misses"]
    assert of(samples, "cachefs_store_limit_bytes") == pytest.approx(status["store"]["bytes_limit"], rel=0.05)
    assert of(samples, "cachefs_store_cached_bytes") == status["store"]["bytes_cached"]
    assert of(samples, "cachefs_store_written_bytes_total") == status["store"]["bytes_landed"]
    assert of(samples, "cachefs_images_open") == status["images"]["open"]
    with open(watched.node.path(IMAGE), "rb"):
        assert of(watched.samples(), "cachefs_leases", reason="open") == 1
    watched.node.ask("pin", images=[IMAGE])
    samples = watched.samples()
    assert of(samples, "cachefs_leases", reason="pinned") == 1
    assert of(samples, "cachefs_pinned_bytes") == SIZE
    watched.node.ask("unpin", images=[IMAGE])
    watched.node.ask("evict", images=[IMAGE])
    assert of(watched.samples(), "cachefs_evicted_spans_total", reason="asked") >= 1


def test_everything_that_is_documented_is_there(watched: Watched) -> None:
    text = watched.exposition()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for family in metrics.FAMILIES:
        found = families[family.name.removesuffix("_total")]
        assert found.documentation == family.help
        assert found.type == family.kind.value
        assert found.samples or family.name in MAY_BE_EMPTY, family.name
        for sample in found.samples:
            assert set(sample.labels) - {"le"} == set(family.labels)
    assert "cannot be read" not in watched.node.log
    assert len(text.splitlines()) < 1000, "a scrape is not to grow with the images"


def test_nothing_names_an_image(watched: Watched) -> None:
    read_direct(watched.node.path(IMAGE), 0, 64 * KIB)
    text = watched.exposition() + watched.get("/readyz")[1] + watched.get("/healthz")[1]
    assert IMAGE not in text
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-", text)


def test_hits_are_timed_from_a_sample(watched: Watched) -> None:
    """Every 5 s on average the next 50 are: reads go on until that was so."""
    path = watched.node.path(IMAGE)
    read_direct(path, 0, 4 * KIB)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4 * KIB) as room:

            def is_sampled() -> bool:
                for _ in range(200):
                    os.preadv(file, [room], 0)
                return int(watched.node.status()["reads"]["sampled_bytes"]) >= 50 * 4 * KIB

            assert poll_until(is_sampled, 20)
    finally:
        os.close(file)
    samples = watched.samples()
    count = of(samples, "cachefs_read_hit_seconds_count")
    assert 50 <= count < of(samples, "cachefs_reads_total", outcome="hit")
    assert 1e-6 < of(samples, "cachefs_read_hit_seconds_sum") / count < 0.1


def test_all_is_answered_while_reads_wait_for_a_glance_that_does_not_answer(
    watched: Watched, origin: StallingOrigin
) -> None:
    """And those that fail at their deadline are counted by why."""
    path, count = watched.node.path(STALLED), 50
    before = watched.samples()
    with ThreadPoolExecutor(count) as readers:
        reads = [readers.submit(errno_of, partial(read_direct, path, n * 64 * KIB, KIB * 4)) for n in range(count)]
        watched.node.wait_for_status(lambda status: status["reads"]["waiting"] >= count)
        began_s = time.monotonic()
        samples = watched.samples()
        assert time.monotonic() - began_s < FRESH_S + 1.0
        assert of(samples, "cachefs_reads_waiting") >= count
        assert 0.5 < of(samples, "cachefs_reads_waiting_longest_seconds") < DEADLINE_S + 1
        assert sum(samples["cachefs_flights"].values()) >= 1
        assert watched.get("/healthz")[0] == 200
        assert watched.get("/readyz")[0] == 200
        assert {read.result() for read in reads} == {errno.EIO}
    origin.release.set()
    after = watched.samples()
    grown = {
        dict(labels)["reason"]: value - before["cachefs_read_errors_total"][labels]
        for labels, value in after["cachefs_read_errors_total"].items()
    }
    assert grown["read_deadline"] == sum(grown.values()) == count
    waited = of(after, "cachefs_read_wait_seconds_sum", outcome="miss")
    assert waited - of(before, "cachefs_read_wait_seconds_sum", outcome="miss") >= count * DEADLINE_S * 0.9


def test_a_glance_that_is_away_degrades_the_node_until_it_is_back(
    watched: Watched, origin: StallingOrigin
) -> None:
    assert json.loads(watched.get("/readyz")[1])["state"] == "ready"
    origin.stop()
    for n in range(4):
        assert errno_of(partial(read_direct, watched.node.path(IMAGE), (100 + n) * 64 * KIB, 4 * KIB)) == errno.EIO
    status, text = watched.fresh("/readyz")
    assert status == 200, "what is cached is served"
    said = json.loads(text)
    (reason,) = said["reasons"]
    assert said["state"] == "degraded"
    assert reason == f"Glance cannot be asked: what is cached is served ({origin.url}: connection refused)"
    samples = watched.samples()
    assert of(samples, "cachefs_origin_unwell") == 1
    assert (of(samples, "cachefs_origin_reached"), of(samples, "cachefs_origin_in_doubt")) == (1, 1)
    assert of(samples, "cachefs_origin_circuit_state", endpoint=origin.url, state="closed") == 0
    origin.start()
    assert poll_until(lambda: json.loads(watched.fresh("/readyz")[1])["state"] == "ready", 40)
    assert of(watched.samples(), "cachefs_origin_unwell") == 0


# ── Starting ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_port_that_is_taken_refuses_the_start_and_nothing_is_mounted(
    watched: Watched, origin: StallingOrigin, tmp_path: Path
) -> None:
    node = Node(tmp_path, origin.url)
    node.configure(metrics={"listen": f"{watched.host}:{watched.port}"})
    refusal = node.refusal()
    assert refusal.status == 1
    said = f"cachefs: metrics/listen: {watched.host}:{watched.port}: another process listens there"
    assert refusal.line.startswith(said)
    assert not node.mounted
    assert not node.socket.exists()


def test_it_can_be_turned_off_and_goes_with_the_daemon(origin: StallingOrigin, tmp_path: Path) -> None:
    node = Node(tmp_path, origin.url)
    node.configure(metrics={"listen": "127.0.0.1:0"})
    with node:
        watched = Watched(node)
        assert watched.get("/healthz")[0] == 200
    with pytest.raises(ConnectionRefusedError):
        watched.get("/healthz")
    node.configure(metrics={"listen": ""})
    with node:
        assert "metrics on" not in node.log
        assert "sampled_bytes" in node.status()["reads"], "what is counted is counted"


# ── The dashboard and the alerts ──────────────────────────────────────────────────────────────────────


def tool(name: str) -> str:
    """Prometheus' own, installed or in .tools; skips where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(ROOT / ".tools"))
    if found is None:
        pytest.skip(f"there is no {name}: install Prometheus, or run setup/install test")
    return found


def promtool(*args: str, stdin: str = "") -> str:
    done = subprocess.run(
        [tool("promtool"), *args], input=stdin, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


DASHBOARD: Final = json.loads((MONITORING / "cachefs-dashboard.json").read_text())
RULES: Final = yaml.safe_load((MONITORING / "cachefs-alerts.yaml").read_text())
VARIABLES: Final = {"$__rate_interval": "1m", "$instance": ".*", "$job": ".*"}


def queries() -> dict[str, str]:
    """Every expression of the dashboard and the alerts, by what it is for."""
    found = {}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']}: {target['legendFormat']}"] = target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        found[f"annotation {annotation['name']}"] = annotation["expr"]
    for rule in alerts():
        found[f"alert {rule['alert']}"] = rule["expr"]
    for name, value in VARIABLES.items():
        found = {what: query.replace(name, value) for what, query in found.items()}
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def test_every_query_asks_for_what_there_is(watched: Watched) -> None:
    text = watched.exposition()
    there: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        names = [family.name, *(sample.name for sample in family.samples)]
        if family.type == "counter":
            names.append(f"{family.name}_total")
        for name in names:
            there.setdefault(name, set()).update(*(set(sample.labels) for sample in family.samples))
    declared = {family.name: set(family.labels) for family in metrics.FAMILIES}
    asked = set()
    for what, query in queries().items():
        for name, labels in re.findall(r"\b((?:cachefs|process)_\w+)(?:\{([^}]*)\})?", query):
            asked.add(name)
            assert name in there, f"{what} asks for {name}"
            known = there[name] | declared.get(name, set()) | {"instance", "job"}
            for label in re.findall(r"(\w+)(?:=~|!=|=|!~)", labels):
                assert label in known, f"{what} asks for {name} by {label}"
        for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
            mentioned = set().union(
                *(there.get(n, set()) for n in re.findall(r"\b(?:cachefs|process)_\w+", query))
            )
            for label in group.replace(" ", "").split(","):
                assert label in mentioned | {"instance", "job"}, f"{what} groups by {label}"
    assert len(asked) > 40


def test_values_of_labels_that_are_asked_for_exist(watched: Watched) -> None:
    samples = watched.samples()
    for what, query in queries().items():
        for name, labels in re.findall(r"\b(cachefs_\w+)\{([^}]*)\}", query):
            for label, value in re.findall(r'(\w+)!?="([^"]*)"', labels):
                if label in ("instance", "job"):
                    continue
                values = {dict(found)[label] for found in samples[name]}
                assert value in values, f"{what}: {name} has no {label}={value}, but {values}"


def test_a_real_prometheus_scrapes_it_and_runs_every_query(watched: Watched, tmp_path: Path) -> None:
    with prometheus(tmp_path, watched) as ask:
        assert poll_until(lambda: bool(ask('cachefs_ready{job="cachefs"} == 1')), 30), "it was scraped"
        assert poll_until(lambda: ask("count_over_time(cachefs_ready[1m]) > 3"), 30), "a few times, for rates"
        for what, query in queries().items():
            ask(query)  # Raises where it is refused.
            if what.startswith("alert "):
                continue
            filters = " > " in query or " == " in query or "scrub" in query or "histogram" in query
            assert ask(query) or filters, f"{what} has no value: {query}"


@contextmanager
def prometheus(folder: Path, watched: Watched) -> Iterator[Any]:
    """Asks a Prometheus of its own, which scrapes the node and knows the alerts."""
    program, port = tool("prometheus"), free_port()
    (folder / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n"
        f"rule_files: [{MONITORING}/cachefs-alerts.yaml]\n"
        f"scrape_configs:\n- job_name: cachefs\n"
        f"  static_configs: [{{targets: ['{watched.host}:{watched.port}']}}]\n"
    )
    command = [
        program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def ask(query: str) -> list[Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            try:
                connection.request("GET", f"/api/v1/query?query={urllib.parse.quote(query)}")
                said = connection.getresponse().read()
            except ConnectionRefusedError:  # It has just been started.
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                return []
        if not said.startswith(b"{"):  # It reads its own folder first.
            return []
        answer: Any = json.loads(said)
        assert answer["status"] == "success", f"{query}: {answer}"
        return list(answer["data"]["result"])

    try:
        yield ask
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_exposition_is_as_promtool_wants_it(watched: Watched) -> None:
    said = promtool("check", "metrics", stdin=watched.exposition())
    assert said.strip() == ""


def test_the_alerts_are_sound_and_each_fires_when_it_should(tmp_path: Path) -> None:
    assert "SUCCESS" in promtool("check", "rules", str(MONITORING / "cachefs-alerts.yaml"))
    assert "SUCCESS" in promtool("test", "rules", str(MONITORING / "cachefs-alerts.test.yaml"))


def test_each_alert_is_tried_and_says_what_to_do() -> None:
    tried = yaml.safe_load((MONITORING / "cachefs-alerts.test.yaml").read_text())
    fire: set[str] = set()
    quiet: set[str] = set()
    for test in tried["tests"]:
        for case in test["promql_expr_test"]:
            found = re.search(r'alertname="(\w+)"', case["expr"])
            assert found is not None
            (fire if case["exp_samples"] else quiet).add(found[1])
    names = {rule["alert"] for rule in alerts()}
    assert fire == quiet == names, "each fires once, and does not where all is well"
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 20


def test_the_dashboard_can_be_imported() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        for target in panel.get("targets", []):
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= names | {"__rate_interval"}
            assert target["datasource"]["uid"] == "${datasource}"
