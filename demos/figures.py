"""Numbers as people read them: seconds, bytes, counts, languages, and the ticks of a time axis."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from babel import Locale

_ENGLISH = Locale("en")
NONE = "–"  # what there is no figure of
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def seconds(value: float | None) -> str:
    """`0.042` -> `42 ms`, `4.62` -> `4.62 s`, `75` -> `1 min 15 s`; whole seconds stay whole."""
    if value is None:
        return NONE
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 59.95:
        return (
            f"{value} s" if isinstance(value, int) else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
        )
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s"


def size(value: float | None) -> str:
    """Bytes in the unit that keeps the number short: `412 MiB`, `1.9 GiB`."""
    if value is None:
        return NONE
    for unit, base in _UNITS:
        if value >= base:
            amount = value / base
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{value:.0f} B"


def course(*values: float | None) -> str:
    """Bytes at several moments, in the unit of the largest: `0.4 → 1.9 → 1.2 GiB`."""
    if any(value is None for value in values) or not values:
        return NONE
    most = max(value or 0 for value in values)
    unit, base = next(((u, b) for u, b in _UNITS if most >= b), ("B", 1))
    digits = 1 if base > 1 and most / base < 10 else 0
    return f"{' → '.join(f'{(value or 0) / base:.{digits}f}' for value in values)} {unit}"


def factor(value: float | None) -> str:
    """A real-time factor (generation time by duration) with two significant digits."""
    return NONE if value is None else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def count(value: int) -> str:
    """Parameters: `82 M`, `1.1 B`."""
    return (
        f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.0f} M" if value >= 1e6 else f"{value:,}"
    )


def language(code: str) -> str:
    """The English name of an ISO 639 code; the code itself where Unicode's tables have none."""
    return (
        _ENGLISH.languages.get(code.replace("-", "_")) or _ENGLISH.languages.get(code.split("-")[0]) or code
    )


def languages(codes: Sequence[str]) -> str:
    """A card's languages in a few words."""
    if not codes:
        return "any language"
    return ", ".join(language(c) for c in codes) if len(codes) <= 3 else f"{len(codes)} languages"


def moment(when: datetime) -> str:
    return when.astimezone().strftime("%-d %b, %H:%M")


def time_ticks(longest: float) -> list[tuple[float, str]]:
    """Places (percent of `longest` seconds) and labels of three to seven round times."""
    step = next((s for s in (0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300) if longest / s <= 6), 600)
    number = int(longest / step)
    digits = 1 if step < 1 else 0
    return [(100 * i * step / longest, f"{i * step:.{digits}f} s") for i in range(number + 1)]
