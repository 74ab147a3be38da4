"""Sizes, times and names as people read them. Rule: pure, and nothing comes out that a terminal would obey."""

from __future__ import annotations

import re
import unicodedata

# Of lines: control characters but for tab and newline, what separates lines or turns their direction, and halves
# of characters, which cannot be written at all.
_OBEYED = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_IN_LINES = re.compile(_OBEYED)
_IN_COLOURED_LINES = re.compile(r"(?!\x1b\[[0-9;]*m)" + _OBEYED)

_HASH = re.compile(r"(?<!\S)[0-9a-f]{56,}(?!\S)")

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(n: float) -> str:
    """`n` bytes for people: 1536 → "1.5 KiB"."""
    value = float(n)
    for unit in _UNITS[:-1]:
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"


def rate(bytes_per_s: float) -> str:
    return f"{size(bytes_per_s)}/s"


def counted(n: int, what: str, many: str | None = None) -> str:
    """1 → "1 image", 2 → "2 images"; `many` where that is no "s" at the end."""
    return f"{n} {what}" if n == 1 else f"{n} {many or what + 's'}"


def duration(seconds: float) -> str:
    """Two units at most: 3700 → "1 h 1 min"."""
    left = round(seconds)
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min {left % 60} s" if left < 600 else f"{left // 60} min"
    if left < 86400:
        return f"{left // 3600} h {left % 3600 // 60} min"
    return f"{left // 86400} d {left % 86400 // 3600} h"


def printable(text: str) -> str:
    """A name that came from elsewhere, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in text)


def printable_lines(text: str, *, coloured: bool = False) -> str:
    """The same for a text of several lines. `coloured`: colours stay."""
    return (_IN_COLOURED_LINES if coloured else _IN_LINES).sub("�", text)


def width(text: str) -> int:
    """Columns on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def cut(text: str, columns: int) -> str:
    """As much of it as fits, with a mark where something is missing."""
    if width(text) <= columns:
        return text
    kept = ""
    for c in text:
        if width(kept + c) > columns - 1:
            break
        kept += c
    return kept + "…" if columns > 0 else ""


def wrapped(text: str, columns: int | None, indent: str = "") -> list[str]:
    """Lines of `columns` at most, cut between words where there is a place; all but the first are indented. All of
    it in one where `columns` is None."""
    if columns is None or width(text) <= columns:
        return [text]
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1].strip() else lines[-1] + word
        if width(longer) <= columns:
            lines[-1] = longer
            continue
        if lines[-1].strip():
            lines.append(indent)
        lines[-1] += word
        while width(lines[-1]) > columns > len(indent) + 1:  # One word that is longer than a line: a path, a URL.
            head = cut(lines[-1], columns + 1)[:-1]
            lines[-1:] = [head, indent + lines[-1][len(head) :]]
    return lines


def folded(text: str, columns: int) -> list[str]:
    """Lines of `columns` at most, cut between words; a word that is longer has a line of its own, and is whole."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and width(lines[-1]) + 1 + width(word) <= columns:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def in_pieces(text: str, columns: int) -> str:
    """Hashes that are longer than a line, in pieces of one length with spaces between them."""

    def taken_apart(found: re.Match[str]) -> str:
        digits = found[0]
        length = -(-len(digits) // -(-len(digits) // columns))
        return " ".join(digits[at : at + length] for at in range(0, len(digits), length))

    return _HASH.sub(taken_apart, text)


def padded(text: str, columns: int, *, right: bool = False) -> str:
    space = " " * max(columns - width(text), 0)
    return space + text if right else text + space
