"""How the demo looks. Rule: colours only for a terminal that wants them; the text says everything without."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from cachefs.words import counted, size

_WIDTH_MAX, _WIDTH_MIN = 100, 60
_INDENT = "    "
_LABEL = 22
_RESULT = 28  # Where what came of a step begins.

BOLD, DIM, RED, GREEN, CYAN = "1", "2", "31", "32", "36"


class StepFailed(Exception):
    """A step did not do what the demo shows."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(step, reason)
        self.step, self.reason = step, reason


class Terminal:
    """Writes the story. `step` is what is going on: what a failure is reported by."""

    def __init__(self) -> None:
        self.step = "starting"
        self._acts = 0
        terminal = sys.stdout.isatty()
        self._moves = terminal and os.environ.get("TERM") != "dumb"
        self._coloured = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        columns = shutil.get_terminal_size((_WIDTH_MAX, 24)).columns if terminal else _WIDTH_MAX
        self._width = max(_WIDTH_MIN, min(columns, _WIDTH_MAX))
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):
                stream.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]

    @property
    def room(self) -> int:
        """Columns of what commands print."""
        return self._width - len(_INDENT)

    def paint(self, text: str, *codes: str) -> str:
        return f"\033[{';'.join(codes)}m{text}\033[0m" if self._coloured and text else text

    # ── text ──

    def line(self, text: str = "") -> None:
        print(text)

    def title(self, text: str) -> None:
        self.line(self.paint(text, BOLD))

    def act(self, text: str) -> None:
        """The head of a new part of the story."""
        self._acts += 1
        self.step = text
        self.line()
        self.title(f"{self._acts}. {text}")

    def say(self, text: str) -> None:
        for line in textwrap.wrap(" ".join(text.split()), self._width - 3, break_on_hyphens=False):
            self.line("   " + line)

    def show(self, text: str) -> None:
        """Lines as they are: a configuration, commands to copy."""
        for line in textwrap.dedent(text).strip().splitlines():
            self.line((_INDENT + line).rstrip())

    # ── commands and what comes of them ──

    def command(self, *pipe: Sequence[str]) -> None:
        """A command; of several, what each prints goes to the next."""
        self.line()
        self.line(self.paint("  $ ", DIM) + self.paint(" | ".join(map(as_typed, pipe)), CYAN))

    def output(self, text: str, lines_max: int = 20) -> None:
        lines = text.rstrip().splitlines()
        for line in lines[:lines_max]:
            self.line((_INDENT + line).rstrip())
        if len(lines) > lines_max:
            self.line(self.paint(f"{_INDENT}({counted(len(lines) - lines_max, 'line')} more)", DIM))

    def fact(self, label: str, text: str) -> None:
        """What it comes down to."""
        self.line("  " + self.paint("> " + label.ljust(_LABEL), BOLD) + self.paint(text, GREEN))

    @contextmanager
    def doing(self, step: str) -> Iterator[list[str]]:
        """A step of the setting up; what is put into the list is told at its end."""
        self.step = step
        began_s = time.monotonic()
        self.begin(step)
        found: list[str] = []
        try:
            yield found
        except BaseException:
            if self._moves:
                print()
            raise
        took = f"{time.monotonic() - began_s:.1f} s"
        room = self._width - 8 - _RESULT - 1
        words = textwrap.wrap(", ".join(found), room, break_on_hyphens=False, break_long_words=False)
        first, *rest = words or [""]
        # In a pipe its name stands in the line before.
        text = f"   {step + ':' if self._moves else '':24} {first}"
        self.line(("\r\033[K" if self._moves else "") + text.ljust(self._width - 8) + self.paint(took, DIM))
        for line in rest:
            self.line(" " * _RESULT + line)

    def begin(self, what: str) -> None:
        """What is done now, before it takes its time; in a pipe a line of its own. Within `doing`."""
        if self._moves:
            print(f"\r\033[K   {what} ...", end="", flush=True)
        else:
            self.line(f"   {what} ...")

    def fail(self, text: str) -> None:
        with suppress(OSError):
            print(self.paint(f"demo: {text}", RED), file=sys.stderr)


def as_typed(arguments: Sequence[str]) -> str:
    """The command for a shell, with double quotes where they do."""

    def word(text: str) -> str:
        quoted = shlex.quote(text)
        plain = not set(text) & set("\"$`\\!'")
        return f'"{text}"' if quoted != text and plain else quoted

    return " ".join(map(word, arguments))


__all__ = ["StepFailed", "Terminal", "as_typed", "size"]
