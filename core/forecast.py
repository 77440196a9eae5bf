"""What a press will cost: memory, what has to make room, download and time, from plans and earlier takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MARGIN = 1.25  # measured peaks vary with the words that happen to be said


@dataclass(frozen=True)
class Forecast:
    """What an order will need, as far as it can be told. Bytes and seconds; None where unknown."""

    engine: str  # its name
    device_bytes: int | None = None
    free_bytes: int | None = None
    loaded: bool = False  # already in memory
    unloads: tuple[str, ...] = ()  # names of engines that make room
    download_bytes: int | None = None
    seconds: float | None = None
    words: str = ""  # where its components will be
    refusal: str = ""  # why it cannot be run, and what would be needed


def in_a_sentence(forecasts: Sequence[Forecast]) -> str:
    """What a press will cost, for the page; "" where nothing is known."""
    if refusal := next((f.refusal for f in forecasts if f.refusal), ""):
        return refusal
    parts = []
    if needs := [f for f in forecasts if f.device_bytes and f.free_bytes is not None and not f.loaded]:
        largest = max(needs, key=lambda f: f.device_bytes or 0)
        whose = f" for {largest.engine}" if len(forecasts) > 1 else ""
        parts.append(f"needs about {_size(largest.device_bytes)}{whose}, {_size(largest.free_bytes)} free")
    if leaving := dict.fromkeys(name for f in forecasts for name in f.unloads):
        parts.append(f"{' and '.join(leaving)} will make room")
    if download := sum(f.download_bytes or 0 for f in forecasts):
        parts.append(f"downloads {_size(download)} first")
    if forecasts and all(f.seconds is not None for f in forecasts):
        parts.append(f"about {_time(sum(f.seconds or 0.0 for f in forecasts))}")
    line = "; ".join(parts)
    return line[:1].upper() + line[1:]


def _size(count: int | None) -> str:
    count = count or 0
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, count >> 20)} MiB"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def working_memory(takes: Sequence[tuple[float, int]], units: float) -> int | None:
    """Bytes that an engine takes beside its weights, from what it took before.

    A line is laid over the measured peaks: its slope by least squares and never negative, its height such
    that no peak lies above it; then a margin is added. A single size of request says nothing about the
    slope, so a larger request counts in proportion.

    Args:
        takes: size of the request (`Card.units`) and measured bytes, of each.
        units: size of the coming request.
    """
    if not takes:
        return None
    sizes = np.array([size for size, _ in takes], float)
    peaks = np.array([peak for _, peak in takes], float)
    if np.ptp(sizes) == 0:
        return int(MARGIN * peaks.max() * max(1.0, units / max(sizes[0], 1.0)))
    slope = max(0.0, float(np.polyfit(sizes, peaks, 1)[0]))
    fixed = float((peaks - slope * sizes).max())
    return int(MARGIN * max(0.0, fixed + slope * units))
