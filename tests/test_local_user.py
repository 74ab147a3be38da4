"""A local user who may not: what he sees of the mount, what he plants in the store's folder and in place of the
control socket; and images whose names are made to harm. Each is refused with one clear line, or harmless.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import trio

from cachefs.control import ControlServer
from cachefs.errors import ControlError, StoreError
from cachefs.store.check import check
from cachefs.store.recover import open_store, repair_store
from tests.node import Node, errno_of
from tests.origin import Fault, Kind, OriginImage, Request, ScriptedOrigin, Status, pattern
from tests.terminal import Terminal
from tests.test_terminal import CACHEFS

pytestmark = pytest.mark.mount

IMAGE: Final = "70000000-0000-4000-8000-000000000001"
SIZE: Final = 1 << 20
BYTES: Final = pattern(SIZE)(0, SIZE)
STRANGER, GROUP = 4242, 4343
# Of a terminal, and those that turn the direction of what follows.
OBEYED: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin([OriginImage.of(IMAGE, "one", BYTES)]) as origin:
        yield origin


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that others may look into; pytest's are for their owner alone."""
    with tempfile.TemporaryDirectory(prefix="cachefs-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_stranger(*command: str | Path, group: int = STRANGER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", "--reuid", str(STRANGER), "--regid", str(group), "--clear-groups", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )


def assert_refused(node: Node, *words: str) -> None:
    refusal = node.refusal()
    assert refusal.status == 1, refusal
    for word in words:
        assert word in refusal.line
    assert not node.mounted


# ── The mount ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_mount_that_is_not_for_others_shows_them_nothing(origin: ScriptedOrigin, folder: Path) -> None:
    with Node(folder, origin.url, mount={"allow_other": "false"}) as node:
        for tool, path in (("ls", node.mountpoint), ("stat", node.path(IMAGE)), ("cat", node.path(IMAGE))):
            done = as_stranger(tool, path)
            assert (done.returncode != 0, done.stdout) == (True, "")
            assert "Permission denied" in done.stderr
        assert node.path(IMAGE).read_bytes() == BYTES


def test_the_mode_and_group_say_who_of_the_others_reads(origin: ScriptedOrigin, folder: Path) -> None:
    with Node(folder, origin.url, mount={"file_mode": "0440", "gid": GROUP}) as node:
        paths = [node.path(IMAGE), node.mountpoint / "raw" / IMAGE, node.mountpoint / "by-name" / "one"]
        for path in paths:
            done = as_stranger("sha256sum", path)
            assert (done.returncode, done.stdout) == (1, "")
            assert "Permission denied" in done.stderr
            assert as_stranger("sha256sum", path, group=GROUP).returncode == 0
        assert stat.S_IMODE(paths[0].stat().st_mode) == 0o440


# ── The control socket ────────────────────────────────────────────────────────────────────────────────


def plant_link(at: Path, target: Path) -> None:
    target.write_text("precious")
    at.symlink_to(target)


def plant_link_to_a_socket(at: Path, target: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(target))
    at.symlink_to(target)


PLANTED: Final[dict[str, Callable[[Path, Path], object]]] = {
    "a link to a file": plant_link,
    "a link to a socket": plant_link_to_a_socket,
    "a link to nothing": lambda at, target: at.symlink_to(target),
    "a folder": lambda at, _: at.mkdir(),
    "a fifo": lambda at, _: os.mkfifo(at),
    "a file": lambda at, _: at.write_text("precious"),
}


async def refuses(path: Path, *words: str) -> None:
    with pytest.raises(ControlError) as refused:
        await ControlServer(str(path), {}).open()
    for word in (str(path), *words):
        assert word in str(refused.value)


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_no_socket_is_left_alone(folder: Path, what: str) -> None:
    path, target = folder / "sock", folder / "target"
    PLANTED[what](path, target)
    before = found_at(path), found_at(target)
    trio.run(refuses, path, "is there and is no socket")
    assert (found_at(path), found_at(target)) == before


def test_a_socket_that_cannot_be_made_is_one_line(origin: ScriptedOrigin, folder: Path) -> None:
    node = Node(folder, origin.url)
    node.configure(control={"socket": node.config_file / "sock"})
    assert_refused(node, str(node.config_file / "sock"), "cannot be made", "Not a directory")


def test_what_another_account_left_at_the_sockets_path(origin: ScriptedOrigin, folder: Path) -> None:
    """In a folder like /tmp, and without root: it can be neither asked nor removed."""
    public = folder / "public"
    public.mkdir()
    public.chmod(0o1777)
    as_a_user = ["setpriv", "--reuid", str(STRANGER), "--regid", str(STRANGER), "--clear-groups"]
    # This interpreter may lie in root's home.
    reading = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    (folder / "own").mkdir()
    os.chown(folder / "own", STRANGER, STRANGER)
    node = Node(
        folder, origin.url, store={"path": folder / "own" / "store"}, wrapper=[*as_a_user, *reading]
    )  # fmt: skip
    node.configure(control={"socket": public / "sock"})
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(public / "sock"))
        theirs.listen()
        assert_refused(node, str(public / "sock"), "cannot be made", "Permission denied")
        (public / "sock").chmod(0o777)
    assert_refused(node, str(public / "sock"), "cannot be made", "Operation not permitted")
    assert stat.S_ISSOCK((public / "sock").lstat().st_mode)


def found_at(path: Path) -> os.stat_result | None:
    return path.lstat() if os.path.lexists(path) else None


@pytest.mark.parametrize("what", ["a socket", "nothing", *PLANTED])
def test_what_took_the_sockets_place_meanwhile_is_left_alone_at_the_end(folder: Path, what: str) -> None:
    path = folder / "sock"

    async def main() -> None:
        server = ControlServer(str(path), {})
        await server.open()
        path.rename(folder / "old")  # Its inode is not given to another.
        if what == "a socket":
            with socket.socket(socket.AF_UNIX) as theirs:
                theirs.bind(str(path))
        elif what in PLANTED:
            PLANTED[what](path, folder / "target")
        before = found_at(path)
        server.close()
        assert found_at(path) == before

    trio.run(main)


# ── The store's folder ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, origin: ScriptedOrigin) -> Path:
    """A store with an image in it."""
    with Node(tmp_path_factory.mktemp("made"), origin.url) as node:
        assert node.path(IMAGE).read_bytes() == BYTES
        node.wait_for_status(lambda status: status["store"]["bytes_cached"] == SIZE)
    return node.store


SEGMENT: Final = "segments/0000000001.seg"
PARTS: Final = ("lock", "index", "index/data.mdb", "index/lock.mdb", "segments", SEGMENT)
FILES: Final = [part for part in PARTS if part not in ("index", "segments")]


def moved_to_a_link(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replaced_by_a_fifo(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    os.mkfifo(path)


def replaced_by_a_device(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


WAYS: Final[dict[str, tuple[Callable[[Path, Path], object], list[str], str]]] = {
    "a link": (moved_to_a_link, list(PARTS), "is a symbolic link"),
    "a fifo": (replaced_by_a_fifo, FILES, "is no regular file"),
    "a device": (replaced_by_a_device, FILES, "is no regular file"),
    "a hard link": (lambda path, elsewhere: os.link(path, elsewhere), FILES, "has another name elsewhere"),
    "another's": (lambda path, _: os.chown(path, STRANGER, STRANGER), list(PARTS), f"belongs to user {STRANGER}"),
    "open to all": (lambda path, _: path.chmod(0o777), list(PARTS), "others may write into"),
    "open to a group": (lambda path, _: path.chmod(0o770), list(PARTS), "others may write into"),
}
CASES: Final = [(way, part) for way, (_, parts, _) in WAYS.items() for part in parts]


@pytest.mark.parametrize(("way", "part"), CASES)
def test_a_store_that_others_had_a_hand_in_is_refused(made: Path, tmp_path: Path, way: str, part: str) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    shutil.copytree(made, store)
    plant, _, why = WAYS[way]
    plant(store / part, elsewhere)
    before = contents(elsewhere)
    for look in (open_store, check, repair_store):
        with pytest.raises(StoreError, match=f"{re.escape(str(store))}: .*{why}") as refused:
            look(store)
        assert part in str(refused.value)
    assert contents(elsewhere) == before


def contents(path: Path) -> object:
    if path.is_dir():
        return {str(inner): inner.read_bytes() for inner in path.rglob("*") if inner.is_file()}
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_that_others_may_write_into_is_no_store(tmp_path: Path, mode: int) -> None:
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(mode)
    with pytest.raises(StoreError, match=f"others may write into it: .*chmod 0700 {store}"):
        open_store(store)
    assert os.listdir(store) == []


def test_others_see_nothing_of_a_store_though_its_folder_was_made_for_all(
    origin: ScriptedOrigin, folder: Path
) -> None:
    node = Node(folder, origin.url)
    node.store.mkdir(mode=0o755)
    with node:
        assert node.path(IMAGE).read_bytes() == BYTES
        node.wait_for_status(lambda status: status["store"]["bytes_cached"] == SIZE)
        modes = {part: stat.S_IMODE((node.store / part).stat().st_mode) & 0o077 for part in PARTS}
        assert modes == dict.fromkeys(PARTS, 0)
        assert "Permission denied" in as_stranger("ls", node.store / "segments").stderr


def test_the_daemon_says_it_in_one_line(made: Path, origin: ScriptedOrigin, tmp_path: Path) -> None:
    node = Node(tmp_path, origin.url)
    shutil.copytree(made, node.store)
    replaced_by_a_fifo(node.store / "index/data.mdb", tmp_path / "elsewhere")
    assert_refused(node, str(node.store), "index/data.mdb is no regular file")


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE: Final = [
    "../../../../etc/passwd", "/etc/shadow", "..", ".", "a/../b", "", " ", "-rf", "~root", "$(reboot)", "`reboot`",
    "two\nlines", "cr\rover", "tab\tbed", "bell\x07", "\x1b]0;title\x07", "\x1b[2J\x1b[H", "\x9b2J", "del\x7f",
    "nul\0in", "\u202egnp.exe", "\u2066hidden\u2069", "zero\u200bwidth", "e" + "\u0301" * 100, "\ud800", "\udcff",
    "é" * 2048, "\U0001f4bf" * 1024, "n" * 255, "n" * 256, "ü" * 128, "x" * 200_000, "images", "by-name", "*",
]  # fmt: skip
SAFE: Final = "70000000-0000-4000-8000-00000000ffff"


def hostile_id(number: int) -> str:
    return f"70000000-0000-4000-8000-{number + 16:012x}"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    evil = {"x_evil\x1b[2J": "\x1b[2J\nvalue", "tags": ["tag\x1b[2J", "two\nlines"]}
    images = [
        OriginImage(hostile_id(number), name, SIZE, pattern(SIZE), properties=evil)
        for number, name in enumerate(HOSTILE)
    ]
    images.append(OriginImage.of(SAFE, "safe", BYTES, container_format="\x1b[2J", disk_format="raw\x1b[2J"))
    with ScriptedOrigin(images) as origin, Node(tmp_path_factory.mktemp("hostile"), origin.url) as node:
        yield node


def can_be_a_file(name: str) -> bool:
    if name in ("", ".", "..") or "/" in name or "\0" in name or re.search("[\ud800-\udfff]", name):
        return False
    return len(name.encode()) <= 255


def test_no_name_leads_out_of_the_folder(hostile: Node) -> None:
    folder = os.fsencode(hostile.mountpoint / "by-name")
    images = os.path.realpath(hostile.mountpoint / "images")
    names = os.listdir(folder)
    assert b"safe" in names
    assert len(set(names)) == len(names)
    for name in names:
        assert name not in (b"", b".", b"..")
        assert b"/" not in name
        assert len(name) <= 255
        name.decode()
        target = os.readlink(os.path.join(folder, name))
        assert re.fullmatch(rb"\.\./images/[0-9a-f-]{36}", target)
        assert os.path.dirname(os.path.realpath(os.path.join(folder, name))).decode() == images
    assert {*names} == {name.encode() for name in HOSTILE if can_be_a_file(name)} | {b"safe"}
    assert len(os.listdir(hostile.mountpoint / "images")) == len(HOSTILE) + 1
    assert (hostile.mountpoint / "by-name" / "safe").read_bytes() == BYTES


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"n" * 254, b"\n", b"\x1b[2J"], ids=repr
)
def test_a_look_up_of_any_bytes_is_only_not_there(hostile: Node, name: bytes) -> None:
    for folder in ("", "images", "raw", "resized", f"resized/{SAFE}", "by-name"):
        path = os.path.join(os.fsencode(hostile.mountpoint / folder), name)
        assert errno_of(lambda path=path: os.lstat(path)) == errno.ENOENT, path  # type: ignore[misc]
    longer = os.path.join(os.fsencode(hostile.mountpoint / "by-name"), "é".encode() * 2048)
    assert errno_of(lambda: os.lstat(longer)) == errno.ENAMETOOLONG


COMMANDS: Final = (
    ["images"], ["images", "--json"], ["image", SAFE], ["image", hostile_id(HOSTILE.index("two\nlines"))],
    ["image", hostile_id(HOSTILE.index("\ud800"))], ["top"], ["evict", "\x1b[2J"],
)  # fmt: skip


def test_no_command_prints_what_a_terminal_obeys(hostile: Node) -> None:
    os.listdir(hostile.mountpoint / "images")
    for command in COMMANDS:
        done = hostile.cli(*command)
        assert (done.returncode, "Traceback" in done.stderr) == (command[0] == "evict", False), done
        assert OBEYED.findall(done.stdout + done.stderr) == [], command
        if command == ["images"]:
            assert len(done.stdout.splitlines()) == len(HOSTILE) + 2


def test_a_table_on_a_terminal_is_as_long_as_there_are_images(hostile: Node) -> None:
    os.listdir(hostile.mountpoint / "images")
    with Terminal([*CACHEFS, "images", "--config-file", str(hostile.config_file)], {}) as terminal:
        assert terminal.end() == 0
        assert OBEYED.findall(terminal.text.replace("\r\n", "\n")) == []
        images, note, end = len(HOSTILE) + 1, 1, 1
        assert len(terminal.text.split("\r\n")) == 1 + images + note + end


def test_the_log_has_no_line_that_an_image_wrote(hostile: Node) -> None:
    assert OBEYED.findall(hostile.log) == []
    for line in hostile.log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d ", line), line
    assert "Traceback" not in hostile.log


def test_an_answer_that_is_not_utf8_harms_nobody(tmp_path: Path) -> None:
    """What cannot be decoded is shown as U+FFFD, in `by-name` too."""
    shown = [OriginImage.of(IMAGE, "one", BYTES).shown(), OriginImage.of(SAFE, "PLACE", BYTES).shown()]
    listing = json.dumps({"images": shown}).encode().replace(b"PLACE", b"bad \xff\xfe\x80")
    answer = Status(200, {"Content-Type": "application/json"}, listing)

    def script(request: Request) -> Fault | None:
        return answer if request.kind is Kind.LIST else None

    images = [OriginImage.of(IMAGE, "one", BYTES), OriginImage.of(SAFE, "two", BYTES)]
    with ScriptedOrigin(images, script=script) as origin, Node(tmp_path, origin.url) as node:
        folder = node.mountpoint / "by-name"
        assert sorted(os.listdir(folder)) == ["bad \ufffd\ufffd\ufffd", "one"]
        assert (folder / "one").read_bytes() == BYTES
        assert OBEYED.findall(node.cli("images").stdout) == []


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_an_error_page_is_shown_harmlessly(tmp_path: Path, kind: str) -> None:
    evil = "EVIL\x1b[2J\r\nsecond \u202eline"
    page = json.dumps({"message": evil, "code": evil}) if "json" in kind else f"<html><h1>{evil}</h1>{evil}</html>"
    answer = Status(500, {"Content-Type": kind}, page.encode())
    with (
        ScriptedOrigin([OriginImage.of(IMAGE, "one", BYTES)], script=lambda _: answer) as origin,
        Node(tmp_path, origin.url, mount={"read_deadline": 1}, glance={"retries": 0}) as node,
    ):
        os.listdir(node.mountpoint / "images")
        assert errno_of(lambda: node.path(IMAGE).stat()) == errno.EIO
        assert "Glance cannot say what there is" in node.log
        assert ("EVIL" in node.log) == ("html" in kind)
        said = [node.log, json.dumps(node.status(), ensure_ascii=False), node.cli("status").stdout]
        assert [OBEYED.findall(text) for text in said] == [[], [], []]
