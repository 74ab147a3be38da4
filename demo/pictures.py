"""`python -m demo.pictures`: what commands look like, as pictures for docs/pictures/. Rule: nothing is drawn by
hand: a real daemon is asked by real commands on a pseudo-terminal, and what they print is what is shown.

The images are made up and come from a Glance on loopback that gives so many bytes a second. It needs what the
tests need: root, and /dev/fuse.
"""

from __future__ import annotations

import io
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Final
from uuid import NAMESPACE_URL, uuid5

import pyte
from rich.console import Console
from rich.text import Text

from tests.node import Node, missing_for_mounts, read_direct
from tests.origin import Fault, Kind, OriginImage, Request, ScriptedOrigin, Trickle, pattern
from tests.terminal import Terminal

PICTURES: Final = Path(__file__).parent.parent / "docs" / "pictures"
MIB, GIB = 1 << 20, 1 << 30
# Of each request, some 40 MiB/s.
SLOWLY: Final = Trickle(256 << 10, 0.006)
CACHEFS: Final = [sys.executable, "-m", "cachefs.cli"]
# Without the fonts that rich would load from elsewhere.
SVG: Final = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>@TITLE@</title>
<desc>@DESCRIPTION@</desc>
<style>
.{unique_id}-matrix {{
    font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px;
    line-height: {line_height}px; font-variant-east-asian: full-width;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: arial, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


# What is on each, in words.
DESCRIPTIONS: Final = {
    "images": (
        "cachefs images",
        "The images of a node on 80 columns: ids, names, sizes, how much of each is cached, their states.",
    ),
    "status": (
        "cachefs status",
        "What a daemon holds and does, on a terminal.",
    ),
    "prefetch": (
        "cachefs prefetch --wait",
        "How far a prefetch is: a bar, the share, bytes, rate and time left.",
    ),
    "top": (
        "cachefs top",
        "Guests, reads, flights and the images that matter, while guests read.",
    ),
    "top-80": (
        "cachefs top at 80 columns",
        "The same on a smaller terminal.",
    ),
}


def image(number: int, name: str, size: int, disk_format: str = "raw") -> OriginImage:
    id_ = str(uuid5(NAMESPACE_URL, name))  # The same in each run.
    return OriginImage(id_, name, size, pattern(size, number), disk_format=disk_format)


DEBIAN, UBUNTU = image(1, "debian-13-genericcloud", 256 * MIB), image(2, "ubuntu-24.04-server", 2 * GIB)
ROCKY, WINDOWS = image(3, "rocky-9.6-base", 1536 * MIB), image(4, "windows-server-2025-eval", 9 * GIB, "qcow2")
CIRROS = image(5, "cirros-0.6.3", 112 * MIB)


def main() -> int:
    missing = missing_for_mounts()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 1
    PICTURES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="cachefs-") as folder,
        ScriptedOrigin([DEBIAN, UBUNTU, ROCKY, WINDOWS, CIRROS]) as origin,
        ExitStack() as stack,
    ):
        (Path(folder) / "instances").mkdir()
        node = Node(Path(folder), origin.url, store={"max_size": "20G"}, glance={"connections": 4})
        stack.enter_context(node)
        for known in (DEBIAN, CIRROS):
            run(node, "prefetch", "--wait", known.id)
        for at in range(40):
            read_direct(node.path(UBUNTU.id), at * 48 * MIB, 4096)
        run(node, "pin", DEBIAN.id)
        with open(node.path(DEBIAN.id), "rb"):
            take("images", screen_of(node, ["images"], 80, 12))
            take("status", screen_of(node, ["status"], 110, 24))
        origin.script = slowly
        take("prefetch", progress(node))
        with guests(node):
            run(node, "prefetch", ROCKY.id)
            for name, columns, lines in (("top", 110, 28), ("top-80", 80, 24)):
                take(name, watched(node, columns, lines))
    return 0


def slowly(request: Request) -> Fault | None:
    return SLOWLY if request.kind is Kind.DATA else None


# ── Commands, on a terminal ───────────────────────────────────────────────────────────────────────────


def on_terminal(node: Node, words: Sequence[str], columns: int, lines: int) -> Terminal:
    command = [*CACHEFS, *words, "--config-file", str(node.config_file)]
    return Terminal(command, {"TERM": "xterm-256color"}, columns=columns, lines=lines)


def run(node: Node, *words: str) -> None:
    done = node.cli(*words)
    if done.returncode:
        raise RuntimeError(f"cachefs {' '.join(words)}: {done.stderr}")


def screen_of(node: Node, words: Sequence[str], columns: int, lines: int) -> pyte.Screen:
    with on_terminal(node, words, columns, lines) as terminal:
        if terminal.end():
            raise RuntimeError(f"cachefs {' '.join(words)}: {terminal.said}")
        return shown(terminal, columns, lines, words)


def progress(node: Node) -> pyte.Screen:
    """A prefetch, when some of it is here."""
    words = ["prefetch", "--wait", UBUNTU.id]
    with on_terminal(node, words, 110, 4) as terminal:
        terminal.read_until(r"[2-6]\d\.\d%  .* left", 60, plain=True)
        return shown(terminal, 110, 4, words)


def watched(node: Node, columns: int, lines: int) -> pyte.Screen:
    """`top`, when it has looked some times."""
    with on_terminal(node, ["top"], columns, lines) as terminal:
        terminal.read_until(r"(?s)waiting.*" + r"\x1b\[H.*" * 6 + r"\x1b\[J")
        found = shown(terminal, columns, lines, None)
        terminal.press("q")
        terminal.end()
        return found


@contextmanager
def guests(node: Node) -> Iterator[None]:
    """Readers, some of them of what is here, and some of what has to be fetched."""
    over = threading.Event()

    def read(known: OriginImage, step: int, pause_s: float) -> None:
        offset = 0
        while not over.wait(pause_s):
            try:
                read_direct(node.path(known.id), offset, 4096)
            except OSError:
                return
            offset = (offset + step * MIB) % (known.size or MIB)

    threads = [
        threading.Thread(target=read, args=args)
        for args in ((DEBIAN, 3, 0.002), (DEBIAN, 5, 0.003), (WINDOWS, 211, 0.001), (WINDOWS, 379, 0.02))
    ]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1)
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────────


def shown(terminal: Terminal, columns: int, lines: int, words: Sequence[str] | None) -> pyte.Screen:
    """What such a terminal shows of what was said; below what was typed, where the command is not a screen."""
    screen = pyte.Screen(columns, lines)
    typed = "" if words is None else f"\x1b[1m$ cachefs {' '.join(words)}\x1b[0m\r\n"
    # pyte knows nothing of dim, which most terminals show as grey.
    pyte.Stream(screen).feed(typed + terminal.said.replace("\x1b[2m", "\x1b[90m"))
    return screen


def as_text(screen: pyte.Screen) -> Text:
    rows = []
    for number in range(screen.lines):
        row = Text()
        cells = [screen.buffer[number][column] for column in range(screen.columns)]
        # Word by word: whoever draws it in another font is to begin each where it belongs.
        for (style, _), some in groupby(cells, lambda cell: (_style(cell), cell.data == " ")):
            row.append("".join(cell.data for cell in some), style)
        rows.append(row)
    while rows and not rows[-1].plain.strip():
        rows.pop()
    return Text("\n").join([*rows, Text()])


def _style(cell: pyte.screens.Char) -> str:
    colour = {"brown": "yellow", "brightblack": "bright_black"}.get(cell.fg, cell.fg)
    return f"{'bold ' if cell.bold else ''}{colour}"


def take(name: str, screen: pyte.Screen) -> None:
    console = Console(width=screen.columns, record=True, file=io.StringIO(), force_terminal=True)
    console.print(as_text(screen), no_wrap=True, overflow="crop")
    path = PICTURES / f"{name}.svg"
    svg = console.export_svg(
        title=f"cachefs {name.partition('-')[0]}", code_format=SVG, unique_id=f"cachefs-{name}"
    )
    title, description = DESCRIPTIONS[name]
    svg = svg.replace("@TITLE@", title).replace("@DESCRIPTION@", description)
    path.write_text("".join(f"{line.rstrip()}\n" for line in svg.splitlines()))
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    sys.exit(main())
