"""The demo shows what it says and leaves nothing behind, whether it comes to its end or is ended in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

pytestmark = [pytest.mark.cloud, pytest.mark.mount]

ROOT: Final = Path(__file__).parent.parent
WHOLE_MAX_S: Final = 300.0
END_MAX_S: Final = 60.0
COLUMNS: Final = 100
RESULT_AT: Final = 28


@contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo whose own folder will be in `folder`; killed if it is still there in the end."""
    settings = {"TMPDIR": str(folder), "KEEP": "", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "demo"],
        cwd=ROOT,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def left_by(folder: Path) -> list[str]:
    """What is still there of anything that was begun with `folder`: files, mounts, processes."""
    name = str(folder)
    left = [str(path) for path in folder.iterdir()]
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # It has ended, or is not ours to look at.
            said = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if os.fsencode(name) in said:
                left.append(f"process {process.name}: {(process / 'cmdline').read_bytes()!r}")
    return left


def test_it_comes_to_its_end_and_leaves_nothing(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        out, err = process.communicate(timeout=WHOLE_MAX_S)
    assert (process.returncode, err) == (0, "")
    assert left_by(tmp_path) == []
    assert "\033" not in out, "colours are for terminals"
    for said in ("fetched from Glance   0 B of", "Images are identical.", "Input/output error", "sound: "):
        assert said in out
    assert "auth_type = v3applicationcredential" in out
    lines = out.splitlines()
    for step in ("a disk", "its next build", "a real Glance", "uploaded to it", "cachefs mounted"):
        begun = lines.index(f"   {step} ...")
        told = next(at for at, line in enumerate(lines) if at > begun and line.startswith(" " * RESULT_AT))
        between = [line.split()[0] for line in lines[begun + 1 : told]]
        assert set(between) <= {"upload", "build"}, "it is said before it is done, and what came of it after that"
        assert sum(line.strip().startswith(step) for line in lines[: told + 1]) == 1, "each step is named once"
    tables = [line for line in lines if line.startswith("    ") and ("complete" in line or "verified" in line)]
    assert len([line for line in tables if "demo-linux-1." in line]) == 3
    assert max(map(len, tables)) <= COLUMNS
    assert sum(line.startswith("   upload of ") for line in lines) == 3


@pytest.mark.parametrize(
    ("line", "number"),
    [("a disk ...", signal.SIGTERM), ("with an empty store", signal.SIGINT)],
    ids=["before there is a Glance", "while it is mounted"],
)
def test_ended_in_the_middle_it_leaves_nothing(tmp_path: Path, line: str, number: signal.Signals) -> None:
    with demo(tmp_path) as process:
        assert process.stdout is not None
        for said in process.stdout:
            if line in said:
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=END_MAX_S)
    assert process.returncode == 128 + number
    assert err.startswith("demo: ended in the middle of: ")
    assert err.count("\n") == 1
    assert left_by(tmp_path) == []


def test_a_missing_tool_is_named_in_one_line(tmp_path: Path) -> None:
    # `environment` adds the usual sbin folders, so what is missing is missing in the PATH alone.
    program = (
        "import sys, demo.stage; demo.stage.TOOLS = {'no-such-tool': 'no-such-package'}; import demo.__main__ as m"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; sys.exit(m.main())"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "KEEP": ""},
        capture_output=True,
        text=True,
        timeout=END_MAX_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "demo: looking for the tools: not found: no-such-tool (no-such-package); `make setup` installs them"
    ]
    assert left_by(tmp_path) == []
