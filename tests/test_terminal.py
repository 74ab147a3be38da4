"""What commands look like on a terminal, and in a pipe: tables, colours, progress, `top`, completion."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyte
import pytest

from cachefs import answers, asking, cli, completion, shown
from cachefs.errors import ControlError
from cachefs.shown import JSON_FORMAT, Pace, table
from cachefs.store.repair import Repaired
from cachefs.top import Look, frame
from cachefs.words import counted, cut, duration, padded, printable, size, width, wrapped
from tests.cloud.service import clean_environment
from tests.node import ROOT, Node, read_direct, run_command
from tests.origin import OriginImage, ScriptedOrigin, Stall, pattern
from tests.terminal import COLUMNS, Terminal

MIB: Final = 1 << 20
SIZE: Final = 8 * MIB
A: Final = "90000000-0000-4000-8000-00000000000a"
B: Final = "90000000-0000-4000-8000-00000000000b"
LONG: Final = "a name of an image that is far longer than any terminal would like to show " * 3
GROUPS: Final = ("trace", "config", "debug")
UNNAMED: Final = "is no image id, nor the first 4 or more digits of one, nor an image's name (cachefs images)"
CACHEFS: Final = [sys.executable, "-m", "cachefs.cli"]


# ── Words, tables, pace ───────────────────────────────────────────────────────────────────────────────


def test_words() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
    assert [duration(s) for s in (0, 59.4, 61, 3599, 3700, 90000)] == [
        "0 s", "59 s", "1 min 1 s", "59 min", "1 h 1 min", "1 d 1 h",
    ]  # fmt: skip
    assert (width("äé"), width("漢字"), width("e\u0301")) == (2, 4, 1)
    assert (cut("漢字漢字", 5), cut("abc", 3), cut("abcd", 3)) == ("漢字…", "abc", "ab…")
    assert padded("漢", 4) + "|" == "漢  |"
    assert printable("a\x1b[2Jb\nc\u202e") == "a�[2Jb�c�"


def test_a_table_fits_its_terminal_and_not_a_pipe() -> None:
    rows = [(A, LONG, "8.0 MiB"), (B, "漢字", "1.0 MiB")]
    for columns in (60, 80, 120):
        lines = table(("ID", "NAME", "SIZE"), rows, ("SIZE",), columns)
        assert all(width(line) <= columns for line in lines)
        assert lines[1].startswith(A), "what one copies is whole"
        assert lines[1].endswith("8.0 MiB"), "a number that is cut is another one"
    lines = table(("ID", "NAME", "SIZE"), rows, ("SIZE",))
    assert LONG.strip() in lines[1]
    assert len({width(line) for line in lines}) == 1


def test_images_keep_their_names_on_a_narrow_terminal() -> None:
    def row(id_: str, name: str, **known: object) -> dict[str, object]:
        return {
            "id": id_, "name": name, "disk_format": "qcow2", "size": 300 * MIB, "cached": 0, "pinned": False,
            "priority": "normal", "state": "partial", "status": "active", **known,
        }  # fmt: skip

    name = "debian-13-genericcloud-amd64"
    rows = [row(A, name), row("91000000-0000-4000-8000-00000000000a", "x")]
    header, cells = answers.images_table(rows, 80)
    assert header == ["ID", "NAME", "FORMAT", "SIZE", "CACHED", "STATE"]
    assert [cell[:2] for cell in cells] == [("90000000", name), ("91000000", "x")]
    header, cells = answers.images_table(rows, 200)
    assert (header, cells[0][:2]) == (answers.IMAGES_HEADER, (A, name))
    assert answers.images_table(rows, None)[1][0][:2] == (A, name), "a pipe has all of it"
    rows += [row(B, "y", pinned=True, priority="critical")]
    header, cells = answers.images_table(rows, 80)
    assert {"PINNED", "PRIORITY"} <= set(header)
    assert [cell[0] for cell in cells] == [A, "91000000-0000-4000-8000-00000000000a", B], (
        "less would be two images"
    )


def test_a_narrow_table_has_what_matters_and_lacks_what_was_named() -> None:
    header = ("ID", "NAME", "FORMAT", "SIZE", "CACHED", "STATE")
    rows = [(A[:8], LONG, "qcow2", "300.0 MiB", "10.0 MiB", "partial")]
    drop = ("FORMAT", "SIZE")

    def shown_at(columns: int) -> list[list[str]]:
        lines = table(header, rows, ("SIZE", "CACHED"), columns, drop)
        assert all(width(line) <= columns for line in lines)
        return [line.split() for line in lines]

    assert shown_at(120)[0] == list(header)
    assert shown_at(60)[0] == ["ID", "NAME", "SIZE", "CACHED", "STATE"]
    head, row = shown_at(40)
    assert (head, row[0], row[-3:]) == (["ID", "NAME", "CACHED", "STATE"], A[:8], ["10.0", "MiB", "partial"])
    assert shown_at(20)[0] == ["ID", "NAME"]


def test_rows_go_on_between_words_and_ids_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = "0123456789abcdef" * 8
    rows = [("image", A), ("kept because", "it is pinned and somebody has it open"), ("hash", f"sha512 {digest}")]
    monkeypatch.setattr(shown, "is_terminal", lambda stream: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(shown, "columns_of", lambda stream: 40)
    shown.print_rows(rows)
    assert capsys.readouterr().out.splitlines() == [
        "image:",
        f"  {A}",
        "kept because: it is pinned and somebody",
        "              has it open",
        "hash:         sha512",
        *(f"              {digest[at : at + 26]}" for at in range(0, 128, 26)),
    ]
    monkeypatch.setattr(shown, "columns_of", lambda stream: 80)
    shown.print_rows(rows)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "hash:         sha512",
        f"              {digest[:64]}",
        f"              {digest[64:]}",
    ]
    monkeypatch.setattr(shown, "is_terminal", lambda stream: False)
    shown.print_rows(rows)
    assert capsys.readouterr().out.splitlines()[1] == "kept because: it is pinned and somebody has it open"


def test_values_of_one_name_stand_one_below_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown, "is_terminal", lambda stream: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(shown, "columns_of", lambda stream: 40)
    short, long = f"/mnt/raw/{A[:8]}", f"/mnt/raw/{A}"
    shown.print_rows([("name", "x"), ("file", short), ("file", long), ("open", "no")])
    assert capsys.readouterr().out.splitlines() == ["name: x", "file:", f"  {short}", f"  {long}", "open: no"]
    shown.print_rows([("file", short), ("file", short)])
    assert capsys.readouterr().out.splitlines() == [f"file: {short}", f"      {short}"]


def test_a_sentence_goes_on_between_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"cachefs: image {A} is not evicted: it is open (1 handle)"
    shown.print_sentence(said, sys.stderr)
    assert capsys.readouterr().err == f"{said}\n"
    monkeypatch.setattr(shown, "is_terminal", lambda stream: True)
    monkeypatch.setattr(shown, "columns_of", lambda stream: 60)
    shown.print_sentence(said, sys.stderr)
    lines = capsys.readouterr().err.splitlines()
    assert (" ".join(lines), max(map(len, lines)) <= 60) == (said, True)
    shown.print_sentence(f"cachefs: it goes on in the daemon; `cachefs evict {A}` ends it")
    assert capsys.readouterr().out.splitlines() == [
        "cachefs: it goes on in the daemon;", f"`cachefs evict {A}` ends it"
    ], "what is copied is whole"  # fmt: skip


def test_one_thing_is_said_as_one() -> None:
    assert [counted(n, "hit") for n in (0, 1, 2)] == ["0 hits", "1 hit", "2 hits"]
    assert [counted(n, "miss", "misses") for n in (0, 1, 2)] == ["0 misses", "1 miss", "2 misses"]
    assert answers.strangers_words(1) == "1 thing that is no plain file lies among them"
    assert answers.strangers_words(2) == "2 things that are no plain files lie among them"
    assert str(Repaired(records_changed=1, bytes_cut=2)) == "1 record changed, 2 bytes cut off"


@pytest.mark.parametrize(
    ("disks", "images", "said"),
    [
        (0, 0, "0 disks stand on 0 images"),
        (1, 1, "1 disk stands on 1 image"),
        (2, 1, "2 disks stand on 1 image"),
        (2, 2, "2 disks stand on 2 images"),
        (0, 1, "no disks any more; 1 image stays leased for [leases] grace"),
        (0, 2, "no disks any more; 2 images stay leased for [leases] grace"),
    ],
)
@pytest.mark.parametrize(("unread", "more"), [(0, ""), (1, "1 file or folder"), (2, "2 files or folders")])
def test_disks_and_images_are_counted_as_they_are(
    disks: int, images: int, said: str, unread: int, more: str
) -> None:
    folder = {"path": "/i", "trouble": None, "unread": unread}
    found = answers.instances_words({"disks": disks, "images": images, "folders": [folder]})
    assert found == said + (f"; /i: {more} cannot be read" if more else "")


def test_from_when_a_listing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_796_000_000.0)
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(1_795_990_000))
    assert answers.listed_words(1_795_999_988.0) == "listed by Glance 12 s ago"
    assert answers.listed_words(1_795_990_000.0) == f"listed by Glance 2 h 46 min ago, {day}"
    assert answers.listed_words(None) == "not listed by Glance since the daemon's start"


def test_names_that_several_images_have_are_named_with_their_ids() -> None:
    def row(number: int, name: str, *others: int) -> dict[str, object]:
        ids = [f"{at:08x}-0000-4000-8000-000000000000" for at in (number, *others)]
        return {"id": ids[0], "name": name, "same_name": ids[1:]}

    assert answers.namesakes_words([row(1, "a"), row(2, "b")]) is None
    assert answers.namesakes_words([row(1, "a", 2), row(2, "a", 1), row(3, "b")]) == (
        "by-name/ has no link for this name, which several images have: a (00000001, 00000002)"
    )
    many = [row(at, f"n{at // 2}", at ^ 1) for at in range(20)]
    said = answers.namesakes_words(many)
    assert said is not None
    assert said.endswith("n4 (00000008, 00000009) and 5 more")


def test_words_are_wrapped_between_words_and_nothing_is_lost() -> None:
    text = (
        "http://glance.example.org:9292: its certificate is not accepted: unable to get local issuer certificate"
    )
    for columns in (20, 30, 60, 200):
        lines = wrapped(text, columns, "  ")
        assert all(width(line) <= columns for line in lines)
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(line.startswith("  ") for line in lines[1:])
    assert wrapped(text, None) == [text]
    assert wrapped("a bc", 4) == ["a bc"]


def test_pace_says_rate_time_left_and_a_stall_as_a_stall() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.words(SIZE) == "…"
    for second in range(11):
        now[0] = float(second)
        pace.note(second * MIB)
    assert pace.words(20 * MIB) == "1.0 MiB/s, 20 s left"
    now[0] = 14.0
    pace.note(10 * MIB)
    assert "stalled" not in pace.words(MIB)
    now[0] = 22.0
    pace.note(10 * MIB)
    assert pace.words(MIB, "Glance is away") == "stalled for 12 s: Glance is away"
    now[0] = 23.0
    pace.note(11 * MIB)
    assert not pace.stalled_s
    pace.note(0)  # Begun anew.
    assert pace.rate == 0.0


# ── A node ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def origin() -> Iterator[ScriptedOrigin]:
    images = [OriginImage(A, LONG, SIZE, pattern(SIZE, 1)), OriginImage(B, "evil\x1b[2J", SIZE, pattern(SIZE, 2))]
    with ScriptedOrigin(images) as running:
        yield running


@pytest.fixture(scope="module")
def node(origin: ScriptedOrigin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("terminal"), origin.url, glance={"connections": 1}) as node:
        yield node


def on_terminal(node: Node, *words: str, **environment: str) -> Terminal:
    return Terminal([*CACHEFS, *words, "--config-file", str(node.config_file)], environment)


@pytest.mark.mount
def test_tables_are_plain_in_a_pipe_and_fit_a_terminal(node: Node) -> None:
    os.listdir(node.mountpoint / "images")
    piped = node.cli("images")
    assert "\x1b" not in piped.stdout
    assert LONG.strip() in piped.stdout
    assert "PINNED" in piped.stdout.splitlines()[0]
    for environment in ({}, {"NO_COLOR": "1"}):
        with on_terminal(node, "images", **environment) as terminal:
            assert terminal.end() == 0
        assert all(width(line) <= COLUMNS for line in terminal.text.splitlines())
        assert ("\x1b[1m" in terminal.said) == (not environment)
        assert "\x1b[2J" not in terminal.said, "a name clears no screen"
        assert A in terminal.text


@pytest.mark.mount
def test_prefetch_shows_progress_and_a_stall(node: Node, origin: ScriptedOrigin) -> None:
    stall = Stall(after=4096)
    origin.fault(stall)
    with on_terminal(node, "prefetch", "--wait", A) as terminal:
        terminal.read_until(r"\d%  [\d.]+ \w+ of 8\.0 MiB", plain=True)
        terminal.read_until(r"stalled for \d+ s", plain=True)
        stall.release.set()
        terminal.read_until("8.0 MiB is here", 60, plain=True)
        assert terminal.end() == 0
    assert "\r\x1b[K" in terminal.said
    quiet = node.cli("prefetch", "--wait", A)
    assert (quiet.stdout, quiet.stderr) == (f"{A}: 8.0 MiB is here\n", "")


@pytest.mark.mount
def test_scrub_shows_progress_on_a_terminal(node: Node) -> None:
    read_direct(node.path(B), 0, MIB)
    with on_terminal(node, "scrub", "--wait") as terminal:
        assert terminal.end(60) == 0
    assert "verified" in terminal.text


@pytest.mark.mount
@pytest.mark.parametrize("how", ["q", "\x03", "SIGTERM"])
def test_top_refreshes_by_itself_and_leaves_the_terminal_as_it_was(node: Node, how: str) -> None:
    with on_terminal(node, "top", "--interval", "0.2") as terminal:
        terminal.read_until(r"reads\s+\d+: .* at once, .* from Glance; now \d+/s", plain=True)
        assert "\x1b[?1049h" in terminal.said
        assert terminal.mode != terminal.before
        before = terminal.said.count("\x1b[H")
        terminal.read_until(r"(?s)" + r"\x1b\[H.*" * (before + 3))
        if how == "SIGTERM":
            terminal.process.send_signal(signal.SIGTERM)
        else:
            terminal.press(how)
        assert terminal.end(10) == 0
        assert terminal.said.endswith("\x1b[?25h\x1b[?1049l")
        assert terminal.mode == terminal.before


@pytest.mark.mount
def test_top_in_a_pipe_is_one_frame(node: Node, origin: ScriptedOrigin) -> None:
    with node.path(B).open("rb"):
        done = node.cli("top")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert re.search(rf"^{B}  .* 1 .*$", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.mount
def test_top_goes_on_without_a_daemon(origin: ScriptedOrigin, tmp_path: Path) -> None:
    node = Node(tmp_path, origin.url)
    with on_terminal(node, "top", "--interval", "0.2") as terminal:
        terminal.read_until("no daemon answers there", plain=True)
        with node:
            terminal.read_until("images open", plain=True)
        terminal.said = ""
        terminal.read_until("no daemon answers there", plain=True)
        terminal.press("q")
        assert terminal.end(10) == 0
    assert node.cli("top").returncode == 1


@pytest.mark.mount
def test_every_reading_command_prints_json_with_its_format(node: Node) -> None:
    lists = {"images": ["images"], "traces": ["trace", "list"]}
    commands = [["status"], ["image", A], ["debug", "tasks"], ["config", "check"], ["top"], *lists.values()]
    for words in commands:
        done = node.cli(*words, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["json_format"] == JSON_FORMAT
    for name, words in lists.items():
        assert isinstance(json.loads(node.cli(*words, "--json").stdout)[name], list)
    told = json.loads(node.cli("pin", A, "--json").stdout)
    assert (told["json_format"], told["images"][0]["pinned"]) == (JSON_FORMAT, True)
    assert re.search(rf"^{A} .* pinned ", node.cli("images").stdout, re.MULTILINE)
    said = node.cli("image", A).stdout
    assert re.search(r"^kept because: +it is pinned$", said, re.MULTILINE)
    assert "8.0 MiB (8388608 bytes)" in said
    assert node.cli("unpin", A).returncode == 0


@pytest.mark.mount
def test_errors_say_what_to_do(node: Node, tmp_path: Path) -> None:
    unknown = "90000000-0000-4000-8000-00000000dead"
    said = node.cli("image", unknown).stderr
    assert f"there is no image {unknown}" in said
    assert "openstack image show" in said
    assert str(node.socket) not in said
    assert "NoEntry" not in said
    assert node.cli("image", "x").stderr == f"cachefs: 'x' {UNNAMED}\n"
    away = Node(tmp_path, "http://127.0.0.1:1")
    assert "systemctl start cachefs" in away.cli("status").stderr
    assert node.cli("pin", "y").stderr == f"cachefs: 'y' {UNNAMED}\n"


@pytest.mark.parametrize(
    ("words", "usage", "error"),
    [
        (["status", "--bogus"], "usage: cachefs status ", "unrecognized arguments: --bogus"),
        (["debug", "tasks", "more"], "usage: cachefs debug tasks ", "unrecognized arguments: more"),
        (["top", "--interval", "x"], "usage: cachefs top ", "'x' is not a number of seconds from 0.1 to 3600"),
        (["nosuch"], "usage: cachefs [-h]", "invalid choice: 'nosuch'"),
    ],
)
def test_a_wrong_call_shows_the_usage_of_its_command(
    words: list[str], usage: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr().err
    assert (ended.value.code, said.startswith(usage), error in said) == (2, True, True), said


def test_a_start_says_how_many_faults_there_are_besides_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cachefs.conf"
    for text, more in (
        ("a = 1\nb = 1\nc = 1\n", "2 more faults"),
        ("a = 1\nb = 1\n", "1 more fault"),
        ("a = 1\n", ""),
    ):
        file.write_text(f"[glance]\nauth_type = none\nendpoints = http://127.0.0.1:1\n[store]\n{text}")
        assert cli.main(["mount", "--config-file", str(file), str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"cachefs: store/a: {file}:5: unknown option")
        assert (f"; and {more}: `cachefs config check` names them all" in said) is bool(more), said
        assert said.count("\n") == 1


def test_a_store_that_was_never_made_is_no_broken_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        tmp_path.chmod(0o700)
        assert cli.main(["check", "--store", str(path)]) == 1
        assert capsys.readouterr().err == f"cachefs: store {path}: there is no store there yet\n"


def test_an_offline_check_needs_nothing_of_glance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, store = tmp_path / "cachefs.conf", tmp_path / "store"
    nothing = f"cachefs: store {store}: there is no store there yet\n"
    for text, said in (
        (f"[store]\npath = {store}\n", nothing),
        (f"[store]\npath = {store}\n[glance]\nauth_type = none\n", nothing),
        (f"[stroe]\npath = {store}\n", f"cachefs: [stroe]: {file}:1: unknown section: did you mean store?\n"),
        (f"[store]\npaht = {store}\n", f"cachefs: store/paht: {file}:2: unknown option: did you mean path?\n"),
    ):
        file.write_text(text)
        for repair in ([], ["--repair"]):
            assert cli.main(["check", "--config-file", str(file), *repair]) == (2 if repair else 1)
            assert capsys.readouterr().err == said


def test_where_the_configuration_is_may_be_said_to_every_command_and_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cachefs.conf"
    assert cli.main(["config", "sample", "--config-file", str(file)]) == 0
    file.write_text(sample := capsys.readouterr().out)
    assert sample.startswith("# /etc/cachefs/cachefs.conf")
    assert cli.main(["completion", "bash", "--config-dir", str(tmp_path)]) == 0
    before = cli.parsed(["--config-file", "a", "--config-dir", "b", "config", "check", "--config-file", "c"])
    assert (before.config_file, before.config_dir) == (["a", "c"], ["b"])


@pytest.mark.mount
def test_who_stops_waiting_for_a_prefetch_is_told_that_it_goes_on(node: Node, origin: ScriptedOrigin) -> None:
    assert node.cli("evict", A).returncode == 0
    stall = Stall(after=4096)
    origin.fault(stall)
    with on_terminal(node, "prefetch", "--wait", A) as terminal:
        terminal.read_until(r"of 8\.0 MiB", 60, plain=True)
        terminal.press("\x03")
        assert terminal.end() == 130
    assert f"it goes on in the daemon; `cachefs evict {A}` ends it" in terminal.text
    stall.release.set()
    assert node.cli("prefetch", "--wait", A).returncode == 0


@pytest.mark.mount
def test_a_refused_image_is_in_the_json_as_others_have_it(node: Node) -> None:
    done = node.cli("image", "--json", "nosuch")
    assert (done.returncode, json.loads(done.stdout)) == (
        1, {"json_format": 1, "id": "nosuch", "error": f"'nosuch' {UNNAMED}"},
    )  # fmt: skip
    assert done.stderr == f"cachefs: 'nosuch' {UNNAMED}\n"
    assert json.loads(node.cli("image", "--json", A).stdout)["error"] is None


@pytest.mark.mount
def test_an_image_is_named_by_the_beginning_of_its_id_or_by_its_name(node: Node) -> None:
    os.listdir(node.mountpoint / "images")
    said = node.cli("image", "90000000").stderr
    assert said.startswith("cachefs: 90000000 may be any of 2 images: ")
    assert A in said
    assert B in said
    assert A in node.cli("image", A.replace("-", "")[:32]).stdout
    assert json.loads(node.cli("image", LONG, "--json").stdout)["id"] == A
    told = node.cli("pin", LONG, "90000000", "nothing")
    assert (told.returncode, told.stdout) == (1, f"{A}: pinned, 8.0 MiB\n")
    assert len(told.stderr.splitlines()) == 2
    rows = json.loads(node.cli("unpin", LONG, "nothing", "--json").stdout)["images"]
    assert [(row["id"], row["error"] is None) for row in rows] == [(A, True), ("nothing", False)]
    assert node.path(A[:8]).exists() is False, "the mount's names are exact"


@pytest.mark.mount
def test_a_name_that_two_images_have_is_said_and_never_guessed(tmp_path: Path) -> None:
    with (
        ScriptedOrigin([OriginImage(id_, "twice", SIZE, pattern(SIZE)) for id_ in (A, B)]) as origin,
        Node(tmp_path, origin.url, glance={"listing_ttl": 0}) as node,
    ):
        assert os.listdir(node.mountpoint / "by-name") == []
        with on_terminal(node, "images") as terminal:
            assert terminal.end() == 0
        assert "by-name/ has no link for this name, which several images have: twice" in terminal.text
        assert "2 images, listed by Glance " in terminal.text
        assert "by-name" not in node.cli("images").stdout, "in a pipe each line is an image"
        found = json.loads(node.cli("images", "--json").stdout)
        assert {row["id"]: row["same_name"] for row in found["images"]} == {A: [B], B: [A]}
        assert abs(found["glance"]["listed"] - time.time()) < 60
        assert re.search(
            rf"^by name: +no link: 1 other image has this name: {B}$", node.cli("image", A).stdout, re.M
        )
        for command in ("image", "pin", "unpin", "evict", "prefetch"):
            done = node.cli(command, "twice")
            assert (done.returncode, done.stdout) == (1, "")
            assert A in done.stderr
            assert B in done.stderr
        origin.stop()
        node.cli("images")
        said = node.cli("images").stderr
        assert ". Shown is what was known before, listed by Glance " in said
        assert re.search(r"^images: .*; listed by Glance \d+ s ago$", node.cli("status").stdout, re.M)


@pytest.mark.mount
def test_exit_statuses(node: Node) -> None:
    unknown = "90000000-0000-4000-8000-00000000dead"
    statuses = {
        ("prefetch", "--wait", A, B): 0, ("prefetch", A, unknown): 1, ("pin", unknown): 1, ("evict", "x"): 1,
        ("pin",): 2, ("nonsense",): 2, ("top", "--interval", "0"): 2, ("image", A): 0,
    }  # fmt: skip
    found = {words: node.cli(*words) for words in statuses}
    assert {words: done.returncode for words, done in found.items()} == statuses
    assert [line.split(":")[0] for line in found["prefetch", "--wait", A, B].stdout.splitlines()] == [A, B]
    assert all("Traceback" not in done.stderr for done in found.values())


@pytest.mark.mount
def test_who_may_not_ask_is_told_so(node: Node) -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(ControlError, match="only the daemon's user and group may ask it: try sudo"):
            asking.ask(str(node.socket), "status")
    finally:
        os.seteuid(0)


@pytest.mark.mount
@pytest.mark.parametrize(("columns", "lines"), [(60, 12), (80, 24), (120, 40)])
def test_top_fills_a_screen_and_no_more(node: Node, columns: int, lines: int) -> None:
    command = [*CACHEFS, "top", "--interval", "0.2", "--config-file", str(node.config_file)]
    screen = pyte.Screen(columns, lines)
    with (
        node.path(B).open("rb"),
        Terminal(command, columns=columns, lines=lines) as terminal,
    ):
        terminal.read_until(r"(?s)waiting.*\x1b\[H.*\x1b\[J")
        pyte.Stream(screen).feed(terminal.said)
        terminal.press("q")
        assert terminal.end(10) == 0
    shown = [line.rstrip() for line in screen.display]
    assert shown[0].startswith("cachefs "), "nothing has scrolled"
    assert shown[1].startswith("guests   ")
    if lines > 12:
        assert any(line.startswith("guests   ") for line in shown)
    images = next(at for at, line in enumerate(shown) if line.startswith("IMAGE "))
    if lines > 12:
        assert shown[images + 1].startswith(B[:8])
    assert shown[-1] == ""


# ── Frames ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.mount
def test_a_frame_fits_any_terminal(node: Node) -> None:
    status, moving = node.ask("status"), node.ask("flights")
    moving["flights"] = [
        {"image": A, "priority": "demand", "start": 0, "arrived": 1, "length": MIB, "started": True, "readers": 3}
    ] * 100
    now, before = Look(2.0, status, moving), Look(1.0, status, moving)
    for columns, height in ((20, 5), (60, 12), (80, 24), (200, 50)):
        lines = frame(now, before, columns, height)
        assert all(width(re.sub(r"\x1b\[\d*m", "", line)) <= columns for line in lines)
    moving["waiting"] = [
        {"image": id_, "name": n, "reads": 2, "longest": 7.25} for id_, n in ((A, "debian"), (B, None))
    ]
    said = frame(now, None, None, None)
    assert "for      debian (90000000): 2 reads, 7.2 s; an image without a name (90000000): 2 reads, 7.2 s" in said
    small = [re.sub(r"\x1b\[\d*m", "", line) for line in frame(now, before, 40, 40)]
    assert all(width(line) <= 40 for line in small)
    assert "reads," in " ".join(small), "the head goes on in the next line"
    gone = frame(Look(3.0, error="away\x1b[2J"), now, 80, 24)
    assert "away" in gone[0]
    assert "\x1b[2J" not in "".join(gone)
    assert any("waiting" in line for line in gone), "what was known last stays"


# ── Documentation, help and completion ─────────────────────────────────────────────────────────────────


def every_command() -> list[list[str]]:
    return [path.split() for path, _ in completion._commands(cli.parser(), "") if path]


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_help_has_an_example_that_can_be_parsed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parser().parse_args([*words, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    if "ACTION" in said.splitlines()[0]:
        return
    (example,) = re.findall(r"^  cachefs (.*)$", said, re.MULTILINE)
    arguments: Any = cli.parser().parse_args(example.partition(" >")[0].split())
    assert arguments.command == words[0]


COMPLETE: Final = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_cachefs
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (["cachefs", "sta"], ["status"]),
        (["cachefs", "pre"], ["precache", "prefetch"]),
        (["cachefs", "prefetch", "--w"], ["--wait"]),
        (["cachefs", "trace", ""], ["export", "import", "list"]),
        (["cachefs", "trace", "export", "--out"], ["--output"]),
        (["cachefs", "config", "ch"], ["check"]),
        (["cachefs", "config", "check", "--js"], ["--json"]),
        (["cachefs", "completion", "b"], ["bash"]),
        (["cachefs", "check", "--store", "pyproj"], ["pyproject.toml"]),
        (["cachefs", "status", "--config-file", "pyproj"], ["pyproject.toml"]),
    ],
)
def test_completion(line: list[str], wanted: list[str], tmp_path: Path) -> None:
    script = tmp_path / "cachefs.bash"
    script.write_text(completion.bash(cli.parser()))
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", str(script), *line], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == wanted
    assert done.stderr == ""


def completed(tmp_path: Path, *line: str) -> list[str]:
    """What bash is offered for the last of these words."""
    script = tmp_path / "cachefs.bash"
    script.write_text(completion.bash(cli.parser()))
    program = Path(sys.executable).with_name("cachefs")
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", str(script), str(program), *line],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return [text for text in done.stdout.split("\n") if text]


@pytest.mark.mount
def test_images_are_completed_from_what_the_daemon_knows(tmp_path: Path) -> None:
    images = [OriginImage(A, "debian 13", SIZE, pattern(SIZE)), OriginImage(B, "$(id)", SIZE, pattern(SIZE))]
    with ScriptedOrigin(images) as origin, Node(tmp_path, origin.url) as node:
        os.listdir(node.mountpoint / "images")
        where = ("--config-file", str(node.config_file))
        for command in (("pin",), ("unpin",), ("evict",), ("image",), ("prefetch", "--wait"), ("trace", "export")):
            assert completed(tmp_path, *command, *where, "deb") == ["debian 13"]
            assert completed(tmp_path, *where, *command, "90000000") == [A, B]
        for begun in ("'debian 1", '"debian 1', "debian\\ 1"):
            assert completed(tmp_path, "pin", *where, begun) == ["debian 13"]
        assert completed(tmp_path, "pin", "--config-file", "=", str(node.config_file), "d") == ["debian 13"]
        assert completed(tmp_path, "pin", *where, "") == [B, "debian 13"], "names, and ids where there is none"
        assert completed(tmp_path, "pin", *where, "$") == []
        assert completed(tmp_path, "pin", *where, "ubuntu", ":", "d") == []
        assert completed(tmp_path, "pin", *where, "--js") == ["--json"]


def test_no_image_is_completed_while_no_daemon_answers(tmp_path: Path) -> None:
    file, where = tmp_path / "cachefs.conf", tmp_path / "control.sock"
    file.write_text(f"[control]\nsocket = {where}\n")
    assert completed(tmp_path, "pin", "--config-file", str(file), "d") == []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hung:
        hung.bind(str(where))
        hung.listen()
        began_s = time.monotonic()
        assert completed(tmp_path, "pin", "--config-file", str(file), "d") == []
        assert time.monotonic() - began_s < asking.ANSWER_WAIT_S / 3
    assert completed(tmp_path, "pin", "--config-file", str(tmp_path / "none"), "d") == []


def test_the_completion_command_prints_that() -> None:
    assert run_command("completion", "bash").stdout == completion.bash(cli.parser())


def test_every_command_is_documented_and_no_other() -> None:
    said = (ROOT / "docs" / "commands.md").read_text()
    documented = set(re.findall(r"`cachefs ([a-z]+(?: [a-z]+)?)`", said.partition("## On a terminal")[0]))
    assert documented == {" ".join(words) for words in every_command() if words[0] not in GROUPS or len(words) > 1}
    for line in re.findall(r"^# cachefs (.*)$", said, re.MULTILINE):
        cli.parser().parse_args(line.partition(" >")[0].split())
    assert f"`json_format` is {JSON_FORMAT};" in said


def test_where_nothing_can_be_written_one_line_says_so() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cachefs.cli", "config", "sample"],
            cwd=ROOT, env=clean_environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "cachefs: No space left on device\n")


def test_the_disk_inside_an_image_is_told_in_words() -> None:
    disk = {"size": 1 << 30, "format": "qcow2", "refused": None, "seen": True, "verified": True}
    found = image_of(disk=disk, leases=["it is open", "it is open"], handles=1)
    rows = answers.image_rows(found)
    assert ("guest disk", "1.0 GiB (inside the qcow2), verified") in rows
    assert ("file", "/x") in rows, "as a daemon of before this command says it"
    assert [value for key, value in rows if key == "kept because"] == ["it is open"]
    assert ("open", "1 handle") in rows
    refused = answers.image_rows(image_of(disk={**disk, "refused": "it has a backing file"}))
    assert ("guest disk", "refused: it has a backing file") in refused
    assert ("kept", "no: it goes when room is needed") in refused

    def words(**known: object) -> str:
        return dict(answers.image_rows(image_of(**known)))["guest disk"]

    some = {**disk, "verified": False}
    assert words(disk=some, disk_cached=3 << 20) == "1.0 GiB (inside the qcow2), 3.0 MiB of it stored"
    assert words(disk=some) == "1.0 GiB (inside the qcow2)"
    assert words(disk=some, disk_format="raw") == "1.0 GiB (the file itself)"
    assert words(disk=None) == "not looked at yet: nobody asked for it"


def image_of(**known: object) -> dict[str, object]:
    """An answer about an image, as far as `image_rows` asks."""
    found: dict[str, object] = dict.fromkeys(("name", "condemned", "os_hash_value", "checksum"))
    return found | {
        "id": "50000000-0000-4000-8000-000000000001", "status": "active", "disk_format": "qcow2", "size": 1 << 20,
        "cached": 0, "state": "absent", "origin": "unknown", "path": "/x", "in_use": True, "handles": 0,
        "priority": "normal",
    } | known  # fmt: skip
