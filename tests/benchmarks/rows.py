"""One line of the table of figures, and the statistics it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEAD = "| figure | measured | bound | holds | note |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    figure: str
    measured: str
    bound: str
    holds: bool
    note: str = ""


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def slope(values: Sequence[float]) -> float:
    """Theil-Sen slope a step: the median over all pairs, which a single jump cannot move."""
    pairs = [
        (b - a) / (j - i)
        for i, a in enumerate(values)
        for j, b in enumerate(values[i + 1 :], start=i + 1)
    ]  # fmt: skip
    return median(pairs)


def as_line(row: Row) -> str:
    """A line of the table below `HEAD`."""
    holds = "yes" if row.holds else "no"
    return f"| {row.figure} | {row.measured} | {row.bound} | {holds} | {row.note} |"
