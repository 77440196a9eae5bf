"""The runs of one press side by side: four small bar charts and a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.card import Card
from core.takes import Take
from demos import figures
from demos.tracks import facts
from demos.views import render

Measure = tuple[str, str, str, Callable[[float | None], str]]

MEASURES: tuple[Measure, ...] = (
    ("Real-time factor", "under 1 is faster than speech", "real_time_factor", figures.factor),
    ("Generation", "without loading", "generate_seconds", figures.seconds),
    ("First sound", "from the start of the run", "first_audio_seconds", figures.seconds),
    ("Peak memory", "RAM, device where there is one", "peak", figures.size),
)


def comparison(takes: Sequence[Take], cards: Mapping[str, Card]) -> str:
    """HTML for two or more finished takes; nothing to compare gives an empty string."""
    if len(takes) < 2:
        return ""
    names = [cards[take.engine].name for take in takes]
    found = [dict(facts(take)) for take in takes]
    columns = [name for name in found[0] if any(row[name] != figures.NONE for row in found)]
    rows = [
        {"name": name, "cells": [row[column] for column in columns]}
        for name, row in zip(names, found, strict=True)
    ]
    return render(
        "comparison", charts=[_chart(m, takes, names) for m in MEASURES], columns=columns, rows=rows
    )


def _chart(measure: Measure, takes: Sequence[Take], names: Sequence[str]) -> dict[str, Any]:
    title, hint, key, write = measure
    values = [_value(take, key) for take in takes]
    known = [value for value in values if value is not None]
    most, least = max(known, default=0), min(known, default=0)
    bars = [
        {
            "name": name,
            "label": write(value),
            "percent": 100 * value / most if value is not None and most else 0,
            "best": value is not None and value == least,
        }
        for name, value in zip(names, values, strict=True)
    ]
    return {"title": title, "hint": hint, "bars": bars}


def _value(take: Take, key: str) -> float | None:
    cost = take.measurements
    return cost.get("device_peak_bytes") or cost.get("ram_peak_bytes") if key == "peak" else cost.get(key)
