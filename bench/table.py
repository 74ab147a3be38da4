"""What was measured, as rows and as one table. Rule: nothing here measures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Bound(Enum):
    """Which side of its target a value must be on."""

    AT_LEAST = "≥"
    AT_MOST = "≤"


@dataclass(frozen=True)
class Row:
    """One measurement. `samples` are what the value was made from, for the JSON file. Without a target it is
    shown for what it tells."""

    name: str
    what: str
    value: float
    unit: str = ""
    bound: Bound = Bound.AT_MOST
    target: float | None = None
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.bound is Bound.AT_LEAST else self.value <= self.target

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "bound": self.bound.value,
            "target": self.target,
            "met": self.met,
            "samples": self.samples,
        }

    def cells(self) -> tuple[str, str, str, str, str]:
        target = "" if self.target is None else f"{self.bound.value} {number(self.target)}"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return self.name, self.what, f"{number(self.value)} {self.unit}".rstrip(), target, met


def table(rows: Iterable[Row]) -> str:
    lines = [("NAME", "WHAT", "VALUE", "TARGET", "MET"), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def number(value: float) -> str:
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def interleaved(repetitions: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Each side's samples. Every repetition runs each side once, in turning order, so that what else the
    machine does meets them all alike."""
    samples: list[list[float]] = [[] for _ in sides]
    for repetition in range(repetitions):
        order = list(enumerate(sides))
        for i, side in order if repetition % 2 == 0 else reversed(order):
            samples[i].append(side())
    return samples


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(above) / statistics.median(below)
