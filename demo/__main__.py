"""The order of things, and how they end: 0 shown, 1 a step failed, 128 + n ended by signal n. Rule: whatever
happens, `strike` comes last.

KEEP=1 (or --keep) leaves all of it running until Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from demo.endings import Ended, Signals
from demo.stage import Stage, cachefs
from demo.story import Story, keep_text
from demo.terminal import StepFailed, Terminal

_LOOK_EVERY_S = 0.5
_KEPT = "keeping it running"

CLOUD = """
    [glance]
    # One of clouds.yaml.
    cloud = NAME
"""
APPLICATION_CREDENTIAL = """
    [glance]
    auth_type = v3applicationcredential
    auth_url = https://keystone.example.org/v3
    application_credential_id = ...
    application_credential_secret = ...
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description="A real Glance and a mount, and what they do.")
    kept = os.environ.get("KEEP", "") not in ("", "0")
    parser.add_argument("--keep", action="store_true", default=kept, help="leave it running (or KEEP=1)")
    keep = parser.parse_args().keep
    terminal, signals = Terminal(), Signals()
    stage = Stage(terminal, signals)
    try:
        try:
            signals.catch()
            status = _outcome(stage, terminal, keep=keep)
        finally:
            left = stage.strike()
    except Ended as ended:  # Between two steps of the above; it does not come twice.
        status, left = 128 + ended.number, stage.strike()
    for what in left:
        terminal.fail(f"left behind: {what}")
    if keep and not left:
        terminal.line()
        terminal.line("It has ended, and nothing is left.")
    return status or (1 if left else 0)


def _outcome(stage: Stage, terminal: Terminal, *, keep: bool) -> int:
    try:
        _show(stage, terminal, keep=keep)
    except Ended as ended:
        if terminal.step == _KEPT:
            return 0
        terminal.fail(f"ended in the middle of: {terminal.step}")
        return 128 + ended.number
    except StepFailed as error:
        terminal.fail(f"{error.step}: {error.reason}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit.
    except Exception as error:  # noqa: BLE001  # Whatever it was: say in which step, and clean up.
        terminal.fail(f"{terminal.step}: {type(error).__name__}: {error}")
    else:
        return 0
    return 1


def _show(stage: Stage, terminal: Terminal, *, keep: bool) -> None:
    terminal.title("cachefs: every Glance image on this node, already there")
    terminal.line()
    stage.build()
    story = Story(stage, terminal)
    story.set_up()
    story.play()
    if not keep:
        story.last_act()
    _your_cloud(terminal)
    if keep:
        terminal.line()
        terminal.title("Kept running")
        terminal.show(keep_text(stage, os.getpid()))
        terminal.step = _KEPT
        _wait_for_the_end(stage)


def _your_cloud(terminal: Terminal) -> None:
    terminal.line()
    terminal.title("With your own cloud")
    terminal.say("Write cachefs.conf:")
    terminal.line()
    terminal.show(CLOUD)
    terminal.line()
    terminal.say("or, with an application credential:")
    terminal.line()
    terminal.show(APPLICATION_CREDENTIAL)
    terminal.line()
    terminal.say("Then, as root (`cachefs config sample` prints every option):")
    terminal.line()
    command = cachefs()[0]
    terminal.show(
        f"""
        mkdir -p /mnt/cachefs
        {command} config check --config-file cachefs.conf
        {command} mount --config-file cachefs.conf
        """
    )


def _wait_for_the_end(stage: Stage) -> None:
    assert stage.daemon is not None
    while stage.daemon.poll() is None:
        time.sleep(_LOOK_EVERY_S)
    raise StepFailed(_KEPT, f"the daemon ended with {stage.daemon.returncode}: {stage.log_tail()}")


if __name__ == "__main__":
    sys.exit(main())
