"""`cachefs doctor`, `report`, `debug tasks`, `config check`: what they find, what they hide, and that they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from cachefs import config as configuration
from cachefs import doctor, limited, shortened
from cachefs.config_sample import sample
from cachefs.hiding import HIDDEN, Hiding
from cachefs.options import plain_options
from tests.cloud.service import clean_environment, poll_until
from tests.node import ROOT, Node, errno_of, read_direct, run_command
from tests.origin import IgnoreRange, Kind, OriginImage, ScriptedOrigin, Stall, Status, pattern

MIB: Final = 1 << 20
SIZE: Final = 4 * MIB
A: Final = "91000000-0000-4000-8000-00000000000a"
PLANTED: Final = "planted-5e(c$$ret"
PLAIN: Final = PLANTED.replace("$$", "$")
IN_CLOUDS: Final = "planted: in 'clouds'"


# ── Work that may hang ────────────────────────────────────────────────────────────────────────────────


def test_a_piece_that_hangs_or_fails_keeps_nobody_from_the_others() -> None:
    def hangs(say: limited.Say) -> None:
        say("so far")
        signal.pause()

    def fails(say: limited.Say) -> None:
        raise ValueError("no")

    def dies(say: limited.Say) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def talks(say: limited.Say) -> None:
        for _ in range(50):
            say("x" * 100_000)

    pieces = [limited.Piece(work.__name__, work, 1.0) for work in (hangs, fails, dies, talks)]
    began_s = time.monotonic()
    limited.run(pieces)
    assert time.monotonic() - began_s < 10
    assert [(piece.hung, piece.failure, len(piece.said)) for piece in pieces] == [
        (True, None, 1), (False, "ValueError: no", 0), (False, None, 0), (False, None, 50),
    ]  # fmt: skip


# ── Hiding ────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_known_to_be_harmless_is_hidden() -> None:
    hiding = Hiding()
    text = f"""
# password = in-a-comment
[DEFAULT]
debug = true
[glance]
auth_url = http://k/v3
password = {PLANTED}
  and-more-of-it
oidc_thing: unknown-to-us
[precache]
option = team.key = plug-in-secret
not an option
"""
    shown = hiding.config(text, plain_options())
    assert "debug = true\n[glance]\nauth_url = http://k/v3\n" in shown
    for word in ("in-a-comment", PLANTED, "and-more-of-it", "unknown-to-us", "plug-in-secret", "not an option"):
        assert word not in shown
    said = f"{PLAIN} {PLANTED} and-more-of-it plug-in-secret gAAAAABhabcdefghijklmnopqrstuv "
    said += "http://me:pw@h/ {'password': 'x1'}"
    cleaned = hiding.clean(said)
    for word in (PLAIN, "and-more-of-it", "plug-in-secret", "gAAAA", "me:pw", "x1"):
        assert word not in cleaned
    assert (
        hiding.clean("nothing of that, on auth_url and http://k/v3")
        == "nothing of that, on auth_url and http://k/v3"
    )


def test_secrets_of_clouds_yaml_are_known_however_they_are_written() -> None:
    hiding = Hiding()
    hiding.know_clouds(
        "clouds:\n a: {auth: {username: me, password: flow-secret}}\n b:\n  auth:\n"
        "   password: |\n    block-secret\n"
        "   application_credential_secret: 'quoted # secret'\n"
    )
    hiding.know_clouds("clouds: [broken\n password: broken-secret # why\n")
    hiding.know_environment({"OS_PASSWORD": "of-the-environment", "HOME": "/root"})
    said = "flow-secret block-secret quoted # secret broken-secret of-the-environment /root"
    assert hiding.clean(said) == f"{HIDDEN} {HIDDEN} {HIDDEN} {HIDDEN} {HIDDEN} /root"


# ── config check ──────────────────────────────────────────────────────────────────────────────────────


def test_config_check_warns_of_what_is_hardly_meant(tmp_path: Path) -> None:
    node = Node(
        tmp_path,
        glance={"auth_type": "password", "auth_url": "http://127.0.0.1:1/v3", "username": "x", "password": PLAIN},
        store={"max_size": "1M"},
    )
    os.chmod(node.config_file, 0o644)
    done = node.cli("config", "check")
    assert (done.returncode, done.stdout) == (0, "the configuration is sound\n")
    assert "max_size: 1.0 MiB is less than most images" in done.stderr
    assert f"chmod 0600 {node.config_file}" in done.stderr
    assert PLAIN not in done.stderr
    found = json.loads(node.cli("config", "check", "--json").stdout)
    assert (found["sound"], len(found["warnings"])) == (True, 2)
    os.chmod(node.config_file, 0o640)
    node.configure(store={"max_size": "200G"})
    assert node.cli("config", "check").stderr == ""
    node.configure(mount={"allow_other": "false"}, nova={"uid": 4242})
    assert "Nova (user 4242) cannot look into nova/" in node.cli("config", "check").stderr
    node.configure(precache={"policies": "newest,nosuch"})
    assert "policies: nosuch is not installed (there are" in node.cli("config", "check").stderr


def test_the_sample_begins_with_what_is_needed_most() -> None:
    sections = re.findall(r"^\[(\w+)\]$", sample(), re.MULTILINE)
    assert sections[:3] == ["glance", "store", "mount"]
    assert sections[-1] == "DEFAULT"


# ── doctor ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([OriginImage(A, "a", SIZE, pattern(SIZE))]) as running:
        yield running


def examined(node: Node, *words: str, status: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """What the doctor found, by check."""
    done = node.cli("doctor", "--json", *words)
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert done.returncode == (0 if said["well"] else 1)
    if status is not None:
        assert done.returncode == status, said
    found: dict[str, list[dict[str, Any]]] = {}
    for one in said["checks"]:
        assert one["mend"] or one["state"] == "ok"
        found.setdefault(one["check"], []).append(one)
    return found


def state(found: dict[str, list[dict[str, Any]]], check: str) -> str:
    return max((str(one["state"]) for one in found[check]), key=["ok", "warning", "problem"].index)


@pytest.mark.mount
def test_doctor_of_a_node_that_is_well_and_of_one_that_died(origin: ScriptedOrigin, tmp_path: Path) -> None:
    node = Node(tmp_path, origin.url, store={"max_size": "2G"})
    before = examined(node, status=0)
    assert state(before, "daemon") == "warning"
    assert not node.store.exists(), "it changes nothing"
    node.start()
    try:
        found = examined(node, status=0)
        for check in ("mountpoint", "daemon", "store", "credentials", "Glance", "a range", "clock", "FUSE"):
            assert state(found, check) == "ok", found[check]
        assert f"in use by process {node.pid}" in found["store"][0]["found"]
        text = node.cli("doctor")
        assert text.stdout.splitlines()[-1] == "0 problems, 0 warnings"
        # Asked at another socket than its own.
        other = tmp_path / "other.conf"
        socket = next(line for line in node.config_file.read_text().splitlines() if line.startswith("socket"))
        other.write_text(node.config_file.read_text().replace(socket, f"socket = {tmp_path / 'other.sock'}"))
        (said,) = [
            one
            for one in json.loads(run_command("doctor", "--json", "--config-file", str(other)).stdout)["checks"]
            if one["check"] == "daemon"
        ]
        assert said["state"] == "problem"
        assert f"process {node.pid} has the store" in said["found"]
        assert "[control] socket" in said["mend"]
        # A daemon that hangs, and a mount with it.
        os.kill(node.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        hung = examined(node, "--timeout", "2", status=1)
        assert time.monotonic() - began_s < 15
        assert "no answer" in hung["mountpoint"][0]["found"]
        assert "umount -l" in hung["mountpoint"][0]["mend"]
        assert state(hung, "daemon") == "problem"
        os.kill(node.pid, signal.SIGCONT)
        # The same, for somebody who stands in it.
        cachefs = Path(sys.executable).with_name("cachefs")
        words = f"cd {node.mountpoint} && kill -STOP {node.pid} && exec {cachefs} report --timeout 1"
        command = ["sh", "-c", f"{words} --config-file {node.config_file}"]
        report = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        assert "the daemon did not answer" in report or "no answer within" in report
        assert f"# /proc/{node.pid}/status" in report
        os.kill(node.pid, signal.SIGCONT)
        bound = tmp_path / "bound"
        bound.mkdir()
        subprocess.run(["mount", "--bind", node.mountpoint / "nova", bound], check=True)
        assert f"bound to {bound}" in examined(node, status=0)["nova/"][0]["found"]
        node.kill(leave_mount=True)
        dead = examined(node, status=1)
        assert "a dead mount" in dead["mountpoint"][0]["found"]
        assert state(dead, "store") == "ok"
        assert state(dead, "nova/") == "problem", "whoever looks there gets an error"
        node.start()  # Which takes its own dead mount away, and no other.
        stale = examined(node, status=1)
        assert state(stale, "mountpoint") == "ok"
        assert (state(stale, "nova/"), f"umount -l {bound}" in stale["nova/"][0]["mend"]) == ("problem", True)
    finally:
        node.kill()
        subprocess.run(["umount", "-l", tmp_path / "bound"], check=False)


def _no_mountpoint(node: Node, origin: ScriptedOrigin) -> None:
    node.mountpoint.rmdir()


def _full_mountpoint(node: Node, origin: ScriptedOrigin) -> None:
    (node.mountpoint / "file").touch()


def _no_glance(node: Node, origin: ScriptedOrigin) -> None:
    origin.stop()


def _hung_glance(node: Node, origin: ScriptedOrigin) -> None:
    origin.fault(*[Stall(after=0)] * 9, kind=Kind.LIST)


def _broken_listing(node: Node, origin: ScriptedOrigin) -> None:
    origin.fault(*[Status(403)] * 9, kind=Kind.LIST)


def _no_ranges(node: Node, origin: ScriptedOrigin) -> None:
    origin.fault(IgnoreRange())


def _broken_bytes(node: Node, origin: ScriptedOrigin) -> None:
    origin.fault(Status(500))


def _no_images(node: Node, origin: ScriptedOrigin) -> None:
    origin.remove(A)


def _small_store(node: Node, origin: ScriptedOrigin) -> None:
    node.configure(store={"max_size": "2M"})


def _open_store(node: Node, origin: ScriptedOrigin) -> None:
    node.store.mkdir()
    node.store.chmod(0o755)


def _bad_option(node: Node, origin: ScriptedOrigin) -> None:
    node.configure(store={"max_sise": "2M"})


@pytest.mark.parametrize(
    ("harm", "check", "how", "words"),
    [
        (_no_mountpoint, "mountpoint", "problem", "mkdir -p"),
        (_full_mountpoint, "mountpoint", "warning", "hide"),
        (_no_glance, "Glance", "problem", "network"),
        (_hung_glance, "Glance", "problem", "network"),
        (_broken_listing, "Glance", "problem", "role"),
        (_no_ranges, "a range", "warning", "one stream"),
        (_broken_bytes, "a range", "problem", "log"),
        (_no_images, "a range", "warning", "upload"),
        (_small_store, "space", "warning", "max_size"),
        (_open_store, "store", "warning", "chmod 0700"),
        (_bad_option, "configuration", "problem", "sample"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_doctor_says_what_is_wrong_and_what_mends_it(
    origin: ScriptedOrigin, tmp_path: Path, harm: Any, check: str, how: str, words: str
) -> None:
    node = Node(tmp_path, origin.url, glance={"connect_timeout": 1, "read_timeout": 2})
    harm(node, origin)
    found = examined(node, "--timeout", "5", status=1 if how == "problem" else 0)
    assert state(found, check) == how
    assert any(words in one["mend"] for one in found[check]), found[check]


def test_doctor_tries_credentials_and_says_no_secret(tmp_path: Path) -> None:
    node = Node(
        tmp_path,
        glance={
            "auth_type": "password", "auth_url": f"http://127.0.0.1:1/{PLAIN}", "username": "x", "password": PLAIN,
            "user_domain_name": "d", "project_name": "p", "project_domain_name": "d", "connect_timeout": 1,
        },
    )  # fmt: skip
    found = examined(node, status=1)
    assert state(found, "credentials") == "problem"
    assert PLAIN not in json.dumps(found)
    assert state(found, "configuration") == "warning", "mode 0644"


@pytest.mark.parametrize(
    ("url", "why", "said"),
    [
        ("http://x:1", "http://x:1: connection refused", "http://x:1: connection refused"),
        ("http://x:1/image", "http://x:1: no TLS: odd", "http://x:1/image: no TLS: odd"),
        ("http://x:1", "http://proxy:2: connection refused", "http://x:1: http://proxy:2: connection refused"),
        ("http://x:1", "nobody knows", "http://x:1: nobody knows"),
    ],
)
def test_where_something_failed_is_said_once(url: str, why: str, said: str) -> None:
    assert doctor._at(url, why) == said


def test_doctor_says_what_the_store_may_hold_on_the_disk_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem of 100 GiB of which 30 are free; 2 MiB are the store's own."""
    block = 4096

    def of_filesystem(path: object) -> SimpleNamespace:
        return SimpleNamespace(f_frsize=block, f_blocks=(100 << 30) // block, f_bavail=(30 << 30) // block)

    monkeypatch.setattr(os, "statvfs", of_filesystem)
    node = Node(tmp_path, "http://127.0.0.1:1", store={"max_size": "80G", "min_free": "10G"})
    (node.store / "segments").mkdir(parents=True)
    (node.store / "segments" / "a").write_bytes(bytes(2 * MIB))
    os.sync()

    def space() -> doctor.Finding:
        found = doctor._store(configuration.load([str(node.config_file)], [], {}))
        return next(one for one in found if one.check == "space")

    assert (space().state, "may hold 20.0 GiB now (max_size 80.0 GiB" in space().found) == ("warning", True)
    assert "max_size cannot be reached by far" in space().found
    assert "it has 2.0 MiB, and 30.0 GiB are free" in space().found
    node.configure(store={"max_size": "30G"})
    assert (space().state, "may hold 20.0 GiB now" in space().found) == ("ok", True)
    node.configure(store={"max_size": "10G"})
    assert (space().state, "may hold 10.0 GiB now" in space().found) == ("ok", True)


def test_clocks_that_differ() -> None:
    (far,) = doctor._clock("Thu, 01 Jan 2026 00:00:00 GMT")
    assert (far.state, "chrony" in far.mend) == ("problem", True)
    assert list(doctor._clock(None)) == list(doctor._clock("nonsense")) == []


def test_what_is_mounted_where() -> None:
    mountinfo = "\n".join(
        [
            "22 1 254:0 / / rw - ext4 /dev/vda rw",
            "30 22 0:40 / /mnt/odd\\040name ro shared:1 - fuse.cachefs cachefs ro",
            "31 22 0:41 / /mnt/b rw - tmpfs none rw",
            "32 31 0:42 / /mnt/b ro - fuse.cachefs cachefs ro",
        ]
    )
    assert doctor.mounted_at("/mnt/odd name", mountinfo) == "fuse.cachefs"
    assert doctor.mounted_at("/mnt/b", mountinfo) == "fuse.cachefs", "the last one lies on top"
    assert doctor.mounted_at("/mnt/c", mountinfo) is None


def test_user_allow_other(tmp_path: Path) -> None:
    path = tmp_path / "fuse.conf"
    assert doctor._user_allow_other(path).state == "problem"
    path.write_text("# user_allow_other\n")
    assert doctor._user_allow_other(path).state == "problem"
    path.write_text("mount_max = 5\nuser_allow_other\n")
    assert doctor._user_allow_other(path).state == "ok"


# ── debug tasks, report ───────────────────────────────────────────────────────────────────────────────


@contextmanager
def planted(tmp_path: Path, origin: ScriptedOrigin) -> Iterator[Node]:
    """A node with secrets wherever it may have some, its log among them."""
    (tmp_path / "node").mkdir()
    log = tmp_path / "cachefs.log"
    clouds = tmp_path / "clouds.yaml"
    node = Node(
        tmp_path / "node",
        glance={"cloud": "planted", "endpoints": origin.url},
        default={"log_file": log, "debug": "true"},
        wrapper=["env", f"OS_CLIENT_CONFIG_FILE={clouds}"],
    )
    clouds.write_text(
        "clouds:\n  planted:\n    auth:\n      auth_url: " + origin.auth_url + "\n      username: me\n"
        f'      password: "{IN_CLOUDS}"\n      project_name: p\n      user_domain_name: d\n'
        "      project_domain_name: d\n    region_name: RegionOne\n"
    )
    with node:
        with log.open("a") as file:
            file.write(f"somebody logged {IN_CLOUDS} and X-Auth-Token: {'t' * 30}, gAAAAA{'x' * 40}\n")
        yield node


@pytest.mark.mount
def test_debug_tasks_shows_reads_tasks_and_threads(origin: ScriptedOrigin, tmp_path: Path) -> None:
    stall = Stall(after=0)
    origin.fault(stall)
    with Node(tmp_path, origin.url) as node, ThreadPoolExecutor(1) as pool:
        read = pool.submit(errno_of, lambda: read_direct(node.path(A), MIB, 4096))
        assert poll_until(lambda: node.status()["reads"]["waiting"] == 1, 20)
        found = json.loads(node.cli("debug", "tasks", "--json").stdout)
        (waiting,) = found["reads"]
        assert (waiting["image"], waiting["offset"], waiting["length"]) == (A, MIB, 4096)
        assert any("Fetcher" in task["name"] for task in found["tasks"])
        assert any(thread["name"] == "MainThread" for thread in found["threads"])
        text = node.cli("debug", "tasks").stdout
        assert text.startswith("1 read waits\n")
        assert f"image {A}, 4096 bytes at {MIB}" in text
        stall.release.set()
        assert read.result(60) is None


@pytest.mark.mount
def test_a_report_has_what_is_needed_and_no_secret(origin: ScriptedOrigin, tmp_path: Path) -> None:
    with planted(tmp_path, origin) as node:
        environment = clean_environment() | {"OS_PASSWORD": PLAIN}
        environment["OS_CLIENT_CONFIG_FILE"] = str(tmp_path / "clouds.yaml")
        output = tmp_path / "report.tar.gz"
        command = [sys.executable, "-m", "cachefs.cli", "report", "--config-file", str(node.config_file)]
        for words in (["-o", str(output)], []):
            done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=True)
            assert done.stderr == ""
        text = done.stdout
        assert output.stat().st_mode & 0o777 == 0o600
        with tarfile.open(output) as archive:
            parts = {Path(entry.name).name: archive.extractfile(entry) for entry in archive}
            archived = {name: file.read().decode() for name, file in parts.items() if file is not None}
        refused = subprocess.run(
            [*command, "-o", "/nowhere/report"], env=environment, capture_output=True, text=True, check=False
        )
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert set(archived) == {
        "configuration.txt", "doctor.txt", "flights.txt", "kernel.txt", "log.txt", "process.txt", "status.json",
        "tasks.txt", "versions.txt",
    }  # fmt: skip
    assert json.loads(archived["status.json"])["mountpoint"] == str(node.mountpoint)
    assert "cloud = planted" in archived["configuration.txt"]
    assert "somebody logged ***" in archived["log.txt"]
    assert "MainThread" in archived["tasks.txt"]
    for said in (text, *archived.values()):
        for secret in (IN_CLOUDS, PLAIN, "t" * 30, "gAAAAA"):
            assert secret not in said


def test_of_a_report_what_nobody_would_read_is_shortened_and_counted() -> None:
    ids = [f"{at:08x}-0000-4000-8000-000000000000" for at in range(300)]
    lines = ["begin", *(f"12:00:{at % 60:02} image {id_} came" for at, id_ in enumerate(ids)), "end"]
    assert list(shortened.log(lines)) == [*lines[:3], "(297 more lines like these)", *lines[-2:]]
    assert list(shortened.log(lines[:6])) == lines[:6]
    found = {
        "disk": {"state": "healthy"}, "writer": {"commits": 3, "trouble": None},
        "store": {"disk": {"state": "healthy"}, "commits": 3, "segments": 1},
        "instances": {"named": dict.fromkeys(ids, "a disk"), "folders": list(range(30))},
    }  # fmt: skip
    said = shortened.status(found)
    assert (said["store"], said["disk"], said["writer"]) == ({"segments": 1}, found["disk"], found["writer"])
    assert list(said["instances"]["named"].items())[-2:] == [(ids[19], "a disk"), ("and more", 280)]
    assert said["instances"]["folders"] == [*range(20), "and 10 more"]
    rows = [{"id": id_, "waiting": 0, "pinned": False, "at_risk": None} for id_ in ids]
    said_lines = list(shortened.flights({"images": rows}))
    assert (said_lines[0], said_lines[1]) == ("# images: 300", f'{{"id": "{ids[0]}", "waiting": 0}}')
    assert said_lines[21:] == ["(and 280 more)"]


def test_stacks_end_where_they_wait_and_the_same_is_said_once() -> None:
    trio = "/opt/venv/lib/python3.11/site-packages/trio"
    stack = [
        f"{ROOT}/cachefs/fetcher.py:88 in Fetcher.run",
        f"{trio}/_sync.py:1 in Event.wait",
        f"{trio}/_core/x.py:2 in y",
    ]
    found = {
        "reads": [{"image": A, "offset": at, "length": 4096, "waiting": 300.0 - at} for at in range(100)],
        "tasks": [
            {"name": "run", "depth": 0, "stack": stack, "times": 1},
            *(
                {"name": f"pyfuse-{at}", "depth": 1, "stack": ["/usr/lib/a.py:1 in b"], "times": 2}
                for at in range(9)
            ),
        ],
        "tasks_in_all": 19,
        "threads": [
            {"name": "w", "stack": ["/usr/lib/python3.11/threading.py:1 in boot", f"{trio}/_t.py:3 in z"]}
        ],
    }
    said = list(shortened.tasks(found))
    assert said[0] == "100 reads wait"
    assert said[21:] == [
        "  and 80 more, for less long", "\n19 tasks", "  run", "      cachefs/fetcher.py:88 in Fetcher.run",
        "      trio/_sync.py:1 in Event.wait", "    pyfuse-… (18 times)", "        /usr/lib/a.py:1 in b",
        "\n1 thread", "  w", "      trio/_t.py:3 in z",
    ]  # fmt: skip


def test_a_report_without_daemon_or_configuration(tmp_path: Path) -> None:
    node = Node(tmp_path, "http://127.0.0.1:1", glance={"connect_timeout": 1})
    done = node.cli("report", "--timeout", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no daemon answers there" not in done.stderr
    node.config_file.write_text(f"[glance]\npassword = {PLAIN}\nnonsense\n[stor]\n")
    done = node.cli("report", "--timeout", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "not sound: " in done.stdout
    assert PLAIN not in done.stdout
