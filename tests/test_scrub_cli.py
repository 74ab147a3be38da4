"""`cachefs scrub`: what it says, and its exit status."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs import cli
from cachefs.control import ControlServer

SOUND: dict[str, Any] = {
    "run": 4, "exit_status": 0, "seconds": 1.0, "bytes_verified": 3 << 20, "rotten": 0, "healed": 0, "waiting": 0,
    "lost": 0, "faults": [], "faults_in_all": 0, "bytes_given_back": 0, "counts_compared": True,
}  # fmt: skip


class Daemon:
    """Answers as a scrubber whose run 4 ends when it was asked for the second time."""

    def __init__(self, last: dict[str, Any] | None, *, was_running: bool = False) -> None:
        self.last, self.asked, self.was_running = last, 0, was_running

    async def scrub(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"run": 4, "was_running": self.was_running}

    async def status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked += 1
        done = self.asked > 1
        return {
            "state": "idle" if done else "reading", "share": None if done else 0.5, "bytes_verified": 1 << 20,
            "finished": 4 if done else 3, "last": self.last if done else None,
        }  # fmt: skip


def run(tmp_path: Path, daemon: Daemon | None, *argv: str) -> int:
    config = tmp_path / "cachefs.conf"
    socket = tmp_path / "control.sock"
    config.write_text(
        f"[control]\nsocket = {socket}\n[glance]\nauth_type = none\nendpoints = http://127.0.0.1:1\n"
    )

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            if daemon is not None:
                server = ControlServer(str(socket), {"scrub": daemon.scrub, "scrub-status": daemon.status})
                await server.open()
                nursery.start_soon(server.serve)
            status = await trio.to_thread.run_sync(
                partial(cli.main, ["scrub", "--config-file", str(config), *argv])
            )
            nursery.cancel_scope.cancel()
        return status

    return trio.run(main)


def test_without_waiting_it_only_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = Daemon(SOUND)
    assert run(tmp_path, daemon) == 0
    assert daemon.asked == 0
    assert capsys.readouterr().out == "a scrub has begun (cachefs status shows it)\n"
    assert run(tmp_path, Daemon(SOUND, was_running=True)) == 0
    assert capsys.readouterr().out == "a scrub is running already (cachefs status shows it)\n"
    assert run(tmp_path, daemon, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"json_format": 1, "run": 4, "was_running": False}


def test_who_stops_waiting_is_told_that_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    assert run(tmp_path, Daemon(SOUND), "--wait") == 130
    assert "it goes on in the daemon" in capsys.readouterr().err


@pytest.mark.parametrize("found", [0, 1, 2])
def test_waiting_gives_what_was_found_as_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], found: int
) -> None:
    last = SOUND | {"exit_status": found, "rotten": found}
    assert run(tmp_path, Daemon(last), "--wait") == found
    out = capsys.readouterr()
    chunks = "1 chunk" if found == 1 else f"{found} chunks"
    assert out.out.startswith(f"3.0 MiB verified: {chunks} rotten, 0 spans")
    assert out.err == ""  # No terminal, no progress.
    assert run(tmp_path, Daemon(last), "--wait", "--json") == found
    assert json.loads(capsys.readouterr().out) == last | {"json_format": 1}


@pytest.mark.parametrize("last", [None, SOUND | {"run": 3}])
def test_a_scrub_that_does_not_end_is_told_from_what_one_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], last: dict[str, Any] | None
) -> None:
    assert run(tmp_path, Daemon(last), "--wait") == 3
    assert "did not come to an end" in capsys.readouterr().err


def test_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, None, "--wait") == 3
    assert run(tmp_path, None) == 1
    assert "no daemon answers there" in capsys.readouterr().err
