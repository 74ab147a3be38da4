"""A terminal with `cachefs top` on it, as a picture: `python -m docs.screen` makes docs/pictures/top.svg anew.
Rule: what is on it was said by a real daemon to a real terminal; only the mountpoint is that of a node.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from html import escape
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
CELL_X, CELL_Y, MARGIN, BAR = 8, 18, 16, 30
# What the marks of cachefs/shown.py are, as colours.
CLASSES: Final = {"1": "bold", "31": "red", "32": "green", "33": "yellow", "2": "dim"}

_HEAD: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title about"
     font-family="ui-monospace, 'DejaVu Sans Mono', 'Liberation Mono', monospace" font-size="13">
  <title id="title">{title}</title>
  <desc id="about">{about}</desc>
  <style>
    .screen {{ fill: #14181d; stroke: #3a4149; }}
    .light  {{ fill: #4a545d; }}
    text    {{ fill: #d5dbe1; white-space: pre; }}
    .bold {{ font-weight: 700; fill: #ffffff; }} .dim {{ fill: #8c959e; }}
    .red {{ fill: #ff8a80; }} .green {{ fill: #8fd694; }} .yellow {{ fill: #f2c76b; }}
    @media (prefers-color-scheme: dark) {{ .screen {{ stroke: #66717c; }} }}
  </style>
  <rect class="screen" x="1" y="1" width="{inner_width}" height="{inner_height}" rx="8"/>
  <circle class="light" cx="20" cy="17" r="5"/><circle class="light" cx="36" cy="17" r="5"/>
  <circle class="light" cx="52" cy="17" r="5"/>
"""


def picture(lines: list[str], title: str, about: str) -> str:
    """An SVG of lines as a terminal had them, colours included. Each run of a colour has the width of its letters,
    whatever font there is."""
    columns = max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in lines)
    width, height = 2 * MARGIN + columns * CELL_X, BAR + MARGIN + len(lines) * CELL_Y
    parts = [
        _HEAD.format(
            width=width, height=height, inner_width=width - 2, inner_height=height - 2, title=title, about=about
        )
    ]
    for row, line in enumerate(lines):
        column, kind = 0, ""
        for piece in re.split(r"(\x1b\[[\d;]*m)", line):
            if mark := re.fullmatch(r"\x1b\[([\d;]*)m", piece):
                kind = " ".join(CLASSES[code] for code in mark[1].split(";") if code in CLASSES)
                continue
            # A column at a time: where several blanks are, a font of other widths has nothing to shift.
            for cell in re.finditer(r"\S+(?: \S+)*", piece):
                x, y = MARGIN + (column + cell.start()) * CELL_X, BAR + (row + 1) * CELL_Y - 4
                named = f' class="{kind}"' if kind else ""
                parts.append(
                    f'  <text{named} x="{x}" y="{y}" textLength="{len(cell[0]) * CELL_X}"'
                    f' lengthAdjust="spacingAndGlyphs">{escape(cell[0])}</text>\n'
                )
            column += len(piece)
    return "".join([*parts, "</svg>\n"])


def top() -> list[str]:
    """The lines of `cachefs top` while a guest reads what is here, two wait for what is not, and an image is to
    come whole."""
    from tests.node import Node, read_direct
    from tests.origin import OriginImage, ScriptedOrigin, Stall, pattern
    from tests.terminal import Terminal

    names = {"debian-13": 96, "rocky-9.6": 160, "ubuntu-24.04": 128, "windows-2025": 320}
    images = {
        name: OriginImage(f"{n}1dced0f-d203-4786-9b93-710d2b98aae{n}", name, mib * MIB, pattern(mib * MIB, n))
        for n, (name, mib) in enumerate(names.items(), 2)
    }
    with tempfile.TemporaryDirectory(prefix="cachefs-") as made, ScriptedOrigin(list(images.values())) as origin:
        ids = {name: image.id for name, image in images.items()}
        node = Node(Path(made), origin.url, store={"max_size": "200G"})
        node.configure(hydration={"mode": "manual", "bandwidth": "4M"})
        over = threading.Event()
        with node:
            node.ask("pin", images=[ids["debian-13"]])
            warm, held = node.path(ids["debian-13"]), node.path(ids["rocky-9.6"])
            for offset in range(0, 48 * MIB, MIB):
                read_direct(warm, offset, MIB)
            read_direct(held, 0, 8 * MIB)

            def read_warm() -> None:
                file = os.open(warm, os.O_RDONLY | os.O_DIRECT)
                while not over.wait(0.002):
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                    read_direct(warm, 0, 4096)
                os.close(file)

            node.ask("prefetch", images=[ids["ubuntu-24.04"]])
            stall = Stall(after=700_000)
            for _ in range(2):
                origin.fault(stall)
            guests = [threading.Thread(target=read_warm)] + [
                threading.Thread(target=read_direct, args=(held, (64 + n) * MIB, MIB)) for n in range(2)
            ]
            for guest in guests:
                guest.start()
            command = [sys.executable, "-m", "cachefs.cli", "top", "--config-file", str(node.config_file)]
            try:
                with Terminal(command) as terminal:
                    terminal.read_until(r"(?s)now \d+ reads/s.*now \d+ reads/s.*\x1b\[J", 60)
                    said = terminal.said.rpartition("\x1b[H")[0].rpartition("\x1b[H")[2]
                    terminal.press("q")
                    terminal.end()
            finally:
                over.set()
                stall.release.set()
                for guest in guests:
                    guest.join()
        text = said.replace("\x1b[K", "").partition("\x1b[J")[0].replace("\r", "")
        return text.replace(str(node.mountpoint), "/mnt/cachefs").rstrip("\n").split("\n")


if __name__ == "__main__":
    lines = top()
    about = (
        "One guest reads what is here, two wait for what is not, and another image is to come whole after that."
    )
    (Path(__file__).parent / "pictures" / "top.svg").write_text(picture(lines, "cachefs top", about))
