"""Finds the engines: every folder of core/engines with a card.py, and packages that add more."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from core.card import Card, Modality
from core.errors import BadInput, SoundstageError

ENTRY_POINTS = "soundstage.engines"


@cache
def _packages(extra: tuple[str, ...]) -> dict[str, str]:
    """Engine id -> package name, in a stable order."""
    folder = str(Path(__file__).with_name("engines"))
    own = [f"core.engines.{m.name}" for m in pkgutil.iter_modules([folder]) if m.ispkg]
    added = [point.value for point in entry_points(group=ENTRY_POINTS)]
    return {name.rsplit(".", 1)[-1]: name for name in (*own, *added, *extra)}


def _card(package: str) -> Card:
    try:
        card: Card = importlib.import_module(f"{package}.card").CARD
    except Exception as error:
        raise SoundstageError(
            f"The engine package {package!r} cannot be read ({type(error).__name__}: {error}); "
            "mend it, or take it off SOUNDSTAGE_ENGINE_MODULES."
        ) from error
    return card


class Catalog:
    """The cards of all engines. Reading them imports no torch.

    Args:
        extra: packages to add, by module name (`Settings.engine_modules`).

    Raises:
        SoundstageError: a package is missing or broken.
    """

    def __init__(self, extra: tuple[str, ...] = ()) -> None:
        self._packages = _packages(extra)
        self._cards = {}
        for package in self._packages.values():
            card = _card(package)
            self._cards[card.id] = card
            assert self._packages.get(card.id) == package, f"{package} holds the card of {card.id!r}"

    def card(self, engine: str) -> Card:
        """One engine's card; `BadInput` if there is no such engine."""
        try:
            return self._cards[engine]
        except KeyError:
            raise BadInput(
                f"There is no engine {engine!r}; the engines are: {', '.join(sorted(self._cards))}."
            ) from None

    def cards(self, modality: Modality | None = None) -> list[Card]:
        """All cards, or those of one modality: rule-based first, then by name."""
        found = [c for c in self._cards.values() if modality in (None, c.modality)]
        return sorted(found, key=lambda c: (c.has_weights, c.name.lower()))

    def package(self, engine: str) -> str:
        """The package an engine lives in; `<package>.engine` and `<package>.miniature` are for the worker."""
        self.card(engine)
        return self._packages[engine]

    def folder(self, engine: str) -> Path:
        """Where an engine's files are."""
        return Path(importlib.import_module(self.package(engine)).__path__[0])


def as_markdown(cards: list[Card]) -> str:
    """The README's table of engines."""
    head = ("engine", "what it is", "paradigm", "languages", "can", "code", "weights", "parameters")
    rows = [
        (
            f"**{card.name}** `{card.id}`",
            card.summary,
            card.paradigm or "",
            _few(card.languages),
            ", ".join(sorted(card.abilities)) or "–",
            card.code_licence.name,
            card.weights_licence.name if card.weights_licence else "needs none",
            f"{card.parameters / 1e6:.0f} M" if card.parameters else "–",
        )
        for card in cards
    ]
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _few(languages: tuple[str, ...]) -> str:
    return ", ".join(languages) if 0 < len(languages) <= 8 else f"{len(languages)} languages"
