"""Which engines can take part: their weights, what is in their way, and whose licence has to be accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.card import Ability, Card
from core.errors import SoundstageError
from core.studio import Studio
from core.weights import Plan
from demos import figures
from demos.views import render


@dataclass(frozen=True)
class Hindrance:
    """What is in the way of an engine, in a word or two."""

    word: str = ""
    blocks: bool = False  # it cannot take part
    mild: bool = False  # it can, but not quite as asked


def hindrance(card: Card, language: str, has_voice: bool) -> Hindrance:
    if card.languages and language not in card.languages:
        return Hindrance(f"no {figures.language(language)}", blocks=True)
    if card.reference_required and not has_voice:
        return Hindrance("needs a voice")
    if has_voice and Ability.CLONE not in card.abilities:
        return Hindrance("own voice only", mild=True)
    return Hindrance()


def plans(studio: Studio, cards: Mapping[str, Card]) -> dict[str, Plan | SoundstageError]:
    """Engine id -> the weights it would use, or why there are none."""

    def plan(card: Card) -> Plan | SoundstageError:
        try:
            return studio.weights_plan(card)
        except SoundstageError as error:
            return error

    return {engine: plan(card) for engine, card in cards.items()}


def licences_to_accept(
    studio: Studio, cards: Sequence[Card], planned: Mapping[str, Plan | SoundstageError]
) -> dict[str, str]:
    """Engine id -> the sentence to agree to, for those whose real weights nobody agreed to use yet."""
    settled = studio.licences.accepted() | frozenset(studio.settings.accept_licences)
    found = {}
    for card in cards:
        plan, licence = planned[card.id], card.weights_licence
        if (
            licence
            and licence.must_accept
            and isinstance(plan, Plan)
            and plan.real
            and card.id not in settled
        ):
            terms = "" if licence.commercial else ", for non-commercial use"
            found[card.id] = f"I accept the {licence.name} of {card.name}'s weights{terms}"
    return found


def banner(cards: Mapping[str, Card], planned: Mapping[str, Plan | SoundstageError]) -> str:
    """HTML that says which engines only have miniatures; empty where none is so."""
    noise = [
        cards[engine].name
        for engine, plan in planned.items()
        if isinstance(plan, Plan) and plan.kind == "miniature"
    ]
    return render("banner", names=noise) if noise else ""
