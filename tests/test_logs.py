"""What a line of the log says of its image, and what becomes of failures that repeat.

What operators see is looked at as they see it: by oslo.log's own formats, in a process of its own, because setting
logging up is for the whole process.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from cachefs import logs
from cachefs.errors import NotPermitted, OriginUnavailable
from cachefs.logs import KINDS_MAX, Repeats

ROOT: Final = Path(__file__).parent.parent
IMAGE: Final = "21dced0f-d203-4786-9b93-710d2b98aae0"

_SCRIPT: Final = """
    import sys
    from cachefs import config, logs
    config.load([sys.argv[1]], [], {}).log.start()
    log = logs.get("cachefs.somewhere")
    log.info("is here whole now", image=IMAGE)
    log.info("nothing of an image: %d", 7)
    log.warning("somebody said %s", "this\\n2026-01-01 00:00:00.000 1 CRITICAL cachefs [-] and that", image=IMAGE)
    log.debug("one of many", image=IMAGE)
    def inner():
        raise ValueError("the reason\\nin two lines")
    try:
        inner()
    except ValueError:
        log.exception("unexpected failure", image=IMAGE)
        log.error("that was it", image=IMAGE)
    import threading
    thread = threading.Thread(target=inner, name="somebody")
    thread.start()
    thread.join()
    logs.Repeats(log).warning("kind", "it failed: %s", "again", image=IMAGE)
"""
# Of which a terminal would obey every part.
_OBEYED: Final = "\x1b[2Jred\x9b2J\rover\u202eturned\ud800half"
_OBEYED_SCRIPT: Final = f"""
    import sys
    from cachefs import config, logs
    config.load([sys.argv[1]], [], {{}}).log.start()
    log = logs.get("cachefs.somewhere")
    log.warning("somebody said %s", {_OBEYED!a})
    try:
        raise ValueError({_OBEYED!a})
    except ValueError:
        log.exception("unexpected failure")
"""


def lines_of(tmp_path: Path, options: str = "", script: str = _SCRIPT) -> list[str]:
    """What a process with this configuration logs."""
    path = tmp_path / "cachefs.conf"
    path.write_text(f"[DEFAULT]\n{options}\n[glance]\nauth_type = none\nendpoints = http://127.0.0.1:1\n")
    script = textwrap.dedent(script).replace("IMAGE", repr(IMAGE))
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return (done.stdout + done.stderr).splitlines()


STAMP: Final = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \d+"


def test_a_line_about_an_image_has_it_as_its_resource_and_so_has_each_line_of_a_traceback(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    about = re.escape(f"[image {IMAGE}] ")
    assert re.fullmatch(rf"{STAMP} INFO cachefs\.somewhere \[-\] {about}is here whole now", lines[0])
    assert re.fullmatch(rf"{STAMP} INFO cachefs\.somewhere \[-\] nothing of an image: 7", lines[1])
    assert re.fullmatch(rf"{STAMP} WARNING cachefs\.somewhere \[-\] {about}somebody said this", lines[2])
    forged = (
        rf"{STAMP} WARNING cachefs\.somewhere {about}2026-01-01 00:00:00\.000 1 CRITICAL cachefs \[-\] and that"
    )
    assert re.fullmatch(forged, lines[3]), "what others say is no line of ours"
    assert re.match(rf"{STAMP} ERROR cachefs\.somewhere \[-\] {about}unexpected failure", lines[4])
    trace = [line for line in lines if re.match(rf"{STAMP} ERROR cachefs\.somewhere {about}", line)]
    assert "Traceback (most recent call last):" in [line.split("] ")[1] for line in trace]
    assert any(line.endswith("in inner") for line in trace)
    assert trace[-2].endswith("in two lines")  # Also what a message breaks into several lines.
    assert any(line.endswith(" that was it") for line in lines), "what is handled is not said once more"
    assert any(" CRITICAL cachefs [-] unexpected end of the thread somebody" in line for line in lines)
    assert all(re.match(STAMP, line) for line in lines), "tracebacks of threads, too"
    last = lines[-1]
    assert re.fullmatch(rf"{STAMP} WARNING cachefs\.somewhere \[-\] {about}it failed: again", last)
    assert not any("one of many" in line for line in lines)


def test_every_line_of_a_log_has_its_time_and_image_also_where_a_format_of_ones_own_names_the_resource(
    tmp_path: Path,
) -> None:
    options = "logging_default_format_string = %%(levelname)s <%%(resource)s> %%(message)s\ndebug = true"
    lines = lines_of(tmp_path, options.replace("%%", "%"))
    assert f"INFO <[image {IMAGE}] > is here whole now" in lines
    assert any(line.startswith(f"DEBUG <[image {IMAGE}] > one of many") for line in lines)


@pytest.mark.parametrize("options", ["", "log_color = true"])
def test_no_line_has_what_a_terminal_obeys(tmp_path: Path, options: str) -> None:
    said = "\n".join(lines_of(tmp_path, options, _OBEYED_SCRIPT))
    assert said.count("�[2Jred�2J�over�turned�half") >= 2, "the message, and the traceback"
    assert ("\x1b" in said) == bool(options), "colours are oslo.log's own"
    assert re.findall("\x1b(?!\\[[0-9;]*m)", said) == []


def test_in_json_the_image_is_a_field(tmp_path: Path) -> None:
    records = [json.loads(line) for line in lines_of(tmp_path, "use_json = true")]
    assert records[0]["message"] == "is here whole now"
    assert records[0]["extra"]["image"] == IMAGE
    assert records[0]["extra"]["resource"] == f"[image {IMAGE}] "
    assert "image" not in records[1]["extra"]
    assert "in inner" in records[3]["traceback"]


# ── What repeats ──────────────────────────────────────────────────────────────────────────────────────


class Handed:
    """A clock that is set by hand, and what is to run later by it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        self.due.append((self.now_s + seconds, work))

    def go_to(self, seconds: float) -> None:
        """So many seconds on; what is due on the way is done."""
        until_s = self.now_s + seconds
        while due := sorted((d for d in self.due if d[0] <= until_s), key=lambda d: d[0]):
            self.due.remove(due[0])
            self.now_s = due[0][0]
            due[0][1]()
        self.now_s = until_s


@pytest.fixture
def hand() -> Handed:
    return Handed()


@pytest.fixture
def repeats(hand: Handed, caplog: pytest.LogCaptureFixture) -> Repeats:
    caplog.set_level(logging.INFO, "cachefs.test")
    return Repeats(logs.get("cachefs.test"), 60.0, clock=lambda: hand.now_s, later=hand.later)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str | None]]:
    """By this file's logger: what other tests had counted is said by timers, up to a minute later."""
    ours = [record for record in caplog.records if record.name == "cachefs.test"]
    return [(record.getMessage(), getattr(record, "image", None)) for record in ours]


def test_the_first_failure_is_said_and_the_others_are_counted(
    repeats: Repeats, hand: Handed, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(38):
        repeats.warning("flight", "failed: %d", number, image="a")
        hand.go_to(1)
    assert said(caplog) == [("failed: 0", "a")]
    hand.go_to(22)
    assert said(caplog)[1:] == [("failed: 37 (37 more times in 60 s)", "a")]
    hand.go_to(1000)
    assert len(said(caplog)) == 2, "nothing came since"
    repeats.warning("flight", "failed: %d", 99, image="a")
    assert said(caplog)[2:] == [("failed: 99", "a")], "it is news again"
    assert not hand.due


def test_a_failure_that_goes_on_is_one_line_a_minute(
    repeats: Repeats, hand: Handed, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(300):
        repeats.warning("flight", "failed", image="a")
        hand.go_to(1)
    assert len(said(caplog)) == 6
    assert {line for line, _ in said(caplog)[1:]} == {
        "failed (59 more times in 60 s)", "failed (60 more times in 60 s)",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotPermitted(IMAGE, "is deactivated"), "is deactivated"),
        (OriginUnavailable(IMAGE, "no connection"), "OriginUnavailable: no connection"),
        (OriginUnavailable("other", "no connection"), "OriginUnavailable: image other: no connection"),
    ],
    ids=["ours", "the origin's", "of another"],
)
def test_a_failure_that_names_its_image_names_it_once(
    caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    Repeats(logs.get("cachefs.somewhere")).warning("kind", "%s", error, image=IMAGE)
    assert [(record.getMessage(), getattr(record, "image", None)) for record in caplog.records] == [(said, IMAGE)]


def test_other_images_and_other_kinds_are_other_failures(
    repeats: Repeats, caplog: pytest.LogCaptureFixture
) -> None:
    for image in ("a", "b"):
        for kind in (ValueError, KeyError):
            repeats.warning(kind, "failed: %s", kind.__name__, image=image)
    assert len(said(caplog)) == 4


def test_however_many_kinds_there_are_no_more_than_a_bound_is_remembered(
    repeats: Repeats, hand: Handed, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10 * KINDS_MAX):
        repeats.warning(number, "failed: %d", number)
    assert len(said(caplog)) == KINDS_MAX + 1, "the rest is one kind"
    hand.go_to(60)
    assert said(caplog)[-1] == (f"failed: 9999 ({9 * KINDS_MAX - 1} more times in 60 s)", None)
    assert len(hand.due) <= 1


def test_at_the_end_nothing_that_was_counted_is_lost(repeats: Repeats, caplog: pytest.LogCaptureFixture) -> None:
    logs.say_what_was_counted()  # What other tests have left.
    caplog.clear()
    repeats.warning("flight", "failed", image="a")
    repeats.warning("flight", "failed", image="a")
    logs.say_what_was_counted()
    assert said(caplog)[1:] == [("failed (once more in 60 s)", "a")]


def test_many_threads_count_together(repeats: Repeats, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        for _ in range(500):
            repeats.error("disk", "failed")

    threads = [threading.Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    repeats.say()
    assert said(caplog) == [("failed", None), ("failed (1999 more times in 60 s)", None)]


def test_the_timer_of_its_own_says_what_was_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cachefs.test")
    heard = threading.Event()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "more" in record.getMessage():
                heard.set()

    ear = Ear()
    logging.getLogger("cachefs.test").addHandler(ear)
    try:
        repeats = Repeats(logs.get("cachefs.test"), 0.05)
        for _ in range(3):
            repeats.warning("flight", "failed")
        assert heard.wait(10)
    finally:
        logging.getLogger("cachefs.test").removeHandler(ear)


def test_what_failed_is_not_kept(repeats: Repeats) -> None:
    """An error holds its traceback, and that all the buffers of a read."""
    import gc
    import weakref

    class Heavy(Exception):
        pass

    error = Heavy("x")
    known = weakref.ref(error)
    repeats.warning("flight", "failed: %s", error)
    del error
    gc.collect()
    assert known() is None


# ── Every line of the source ──────────────────────────────────────────────────────────────────────────

LEVELS: Final = {"debug", "info", "warning", "error", "exception", "critical", "log"}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a logger, with its place."""
    for path in sorted((ROOT / "cachefs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and ast.unparse(node.func.value).rpartition(".")[2].strip("_") in ("log", "repeats")
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_no_line_writes_its_image_by_hand() -> None:
    found = list(calls())
    assert len(found) > 80
    for place, call in found:
        text = ast.unparse(call)
        assert "[image" not in text, f"{place}: image= puts it in front"


def test_a_line_that_knows_its_image_says_so() -> None:
    """Whoever has an image, or the view of one, at hand where a line is written: `image=`."""
    knows = re.compile(r"\b(image|image\.id|view\.record\.image|\.image)\b")
    for place, call in calls():
        arguments = [ast.unparse(argument) for argument in call.args]
        named = {keyword.arg for keyword in call.keywords}
        if "image" not in named:
            operands = [one for one in arguments if not one.startswith(("'", '"', "f'"))]
            assert not any(knows.search(one) for one in operands), f"{place}: {arguments}"
