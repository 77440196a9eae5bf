"""What a visitor can ask for, and the refusals that need no model."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.card import Ability, Card, Modality, Options, Strategy
from core.errors import BadInput
from core.media import probe_audio, read_audio

SEED_MAX = 2**31 - 1
_CUE = re.compile(r"\[[^\[\]\n]{1,40}\]")
TAG = re.compile(r"</?[A-Za-z][^<>\n]{0,200}>")


class SpeechRequest(BaseModel):
    """Speak `text`; in the voice of `voice` where the engine can clone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modality: Literal[Modality.SPEECH] = Modality.SPEECH
    text: str
    language: str = "en"
    voice: Path | None = None  # a reference recording
    voice_text: str = ""  # what is said in it
    consent: bool = False  # "I may use this voice"


Request = SpeechRequest  # the other modalities join here


class Order(BaseModel):
    """One engine's share of a request, with everything needed to carry it out again."""

    model_config = ConfigDict(frozen=True)

    engine: str
    request: Request
    options: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(ge=0, le=SEED_MAX)
    weights: str = "auto"  # auto, hub, miniature, or a folder
    commits: dict[str, str] = Field(default_factory=dict)  # repository -> commit, when a take is made again
    accepted: frozenset[str] = frozenset()  # engines whose licence this visitor accepted
    forced: Strategy | None = None  # a placement the visitor insists on
    group: str = ""  # orders of one press share it


def parse_options(card: Card, values: dict[str, Any]) -> Options:
    """Validate an engine's options; `BadInput` names the first that is wrong and what would be right."""
    try:
        return card.options(**values)
    except ValidationError as error:
        raise BadInput(f"{card.name}: {_first_fault(error, card.options)}") from None


def _first_fault(error: ValidationError, options: type[Options]) -> str:
    fault = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in fault["loc"]) or "options"
    if fault["type"] == "extra_forbidden":
        known = ", ".join(options.model_fields) or "none"
        return f"there is no option {name!r}; the options are: {known}."
    message = fault["msg"].removeprefix("Value error, ")
    return f"option {name!r} is {_shown(fault['input'])}: {message[0].lower()}{message[1:]}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def check(card: Card, request: Request, options: Options, weights: Path | None = None) -> None:
    """Refuse what `card`'s engine cannot do, in one sentence, before anything is loaded.

    Called twice: by the page without `weights`, and by the worker once the checkpoint's folder is known.
    """
    _check_text(card, request.text)
    if card.languages and request.language not in card.languages:
        known = ", ".join(card.languages)
        plain = re.split("[-_]", request.language.lower())[0]
        right = f"write {plain!r}" if plain in card.languages else f"it speaks: {known}"
        raise BadInput(f"{card.name} does not speak {_shown(request.language)}; {right}.")
    _check_reference(card, request)
    if card.check:
        card.check(request, options, weights)


def _check_text(card: Card, text: str) -> None:
    if not text.strip():
        raise BadInput("There is no text to speak; type a sentence.")
    if len(text) > card.text_limit:
        raise BadInput(
            f"The text has {len(text):,} characters; {card.name} takes at most {card.text_limit:,} at once."
        )
    for place, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t":
            raise BadInput(
                f"The text holds a control character (U+{ord(character):04X}) at position {place + 1}; "
                "remove it."
            )
    if Ability.MARKUP not in card.abilities and (tag := TAG.search(text)):
        raise BadInput(f"{card.name} would read the tag {tag[0]} aloud; remove it.")
    if Ability.CUES not in card.abilities and (tag := _CUE.search(text)):
        raise BadInput(f"{card.name} would read the cue {tag[0]} aloud; remove it.")
    if not any(unicodedata.category(c)[0] in "LNS" for c in text):
        raise BadInput("The text has no letter or digit to speak; type a sentence.")


def _check_reference(card: Card, request: Request) -> None:
    if Ability.CLONE not in card.abilities:
        return
    if request.voice is None:
        if card.reference_required:
            raise BadInput(f"{card.name} needs a reference recording of the voice to speak in; add one.")
        return
    if not request.consent:
        raise BadInput("Confirm that you may use this voice before it is cloned.")
    facts = probe_audio(request.voice)
    if card.reference_seconds and facts.seconds < card.reference_seconds[0]:
        raise BadInput(
            f"The reference recording is {facts.seconds:.1f} s long; {card.name} needs at least "
            f"{card.reference_seconds[0]:g} s."
        )
    longest = card.reference_seconds[1] if card.reference_seconds else None
    read_audio(request.voice, limit_seconds=longest)  # silence and samples that are no numbers show only so
