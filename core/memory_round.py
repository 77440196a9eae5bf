"""A round over all engines: what each holds while it works, and what it gives back when it is let go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.card import Card
from core.requests import Order, SpeechRequest
from core.studio import Studio
from core.takes import Take
from core.worker.process import Pulse

VISITOR = "doctor"
TEXT = "One sentence, so that every part of the engine works once."
_PATIENCE = 60.0  # seconds for a release to be reported


@dataclass(frozen=True)
class Visit:
    """One engine's turn. Bytes; None where the system does not tell."""

    engine: str
    weights: str  # kind of the weights it was tried with
    placement: str  # strategy
    planned: int | None  # on the device
    before: int | None  # used on the device before it was loaded
    peak: int | None
    after_release: int | None
    ram_before: int | None
    ram_peak: int | None
    ram_after_release: int | None
    alive: int | None = None  # parameters that something still held after the release
    fault: str = ""

    @property
    def clean(self) -> bool:
        return not self.fault and not self.alive


def visit_all(studio: Studio, voice: Path, voice_text: str) -> Iterator[Visit]:
    """Let each engine work, then let it go, one after the other.

    The first visit also imports the engine's libraries, which stay; so the second one is told.

    Args:
        voice: a recording for those that clone.
        voice_text: what is said in it.
    """
    for card in studio.cards():
        first = _visit(studio, card, voice, voice_text)
        yield first if first.fault else _visit(studio, card, voice, voice_text)


def _visit(studio: Studio, card: Card, voice: Path, voice_text: str) -> Visit:
    recording = {"voice": voice, "voice_text": voice_text, "consent": True} if card.reference_required else {}
    request = SpeechRequest(text=TEXT, **recording)
    order = Order(engine=card.id, request=request, seed=1, weights=studio.settings.weights)
    try:
        [job] = studio.submit([order], VISITOR)
    except Exception as error:
        return _failed(card, str(error))
    studio.wait(job)
    if job.take is None:
        return _failed(card, job.reason)
    alive, pulse = _let_go(studio, card)
    visit = _measured(card, job.take, alive, pulse)
    studio.delete(job.take.id, VISITOR)
    return visit


def _let_go(studio: Studio, card: Card) -> tuple[int | None, Pulse | None]:
    """Release it; parameters that stayed alive, and a pulse from after that."""
    if not card.has_weights:
        return 0, studio.pulse
    count = len(studio.releases)
    studio.unload(card.id)
    deadline = time.monotonic() + _PATIENCE
    while len(studio.releases) == count and time.monotonic() < deadline:
        time.sleep(0.05)
    released = studio.releases[-1] if len(studio.releases) > count else None
    while (pulse := studio.pulse) and card.id in pulse.loaded and time.monotonic() < deadline:
        time.sleep(0.05)
    return released.alive if released else None, pulse


def _measured(card: Card, take: Take, alive: int | None, pulse: Pulse | None) -> Visit:
    cost: dict[str, int | None] = {k: None if v is None else int(v) for k, v in take.measurements.items()}
    return Visit(
        engine=card.id,
        weights=str(take.weights["kind"]),
        placement=take.placement.get("strategy", ""),
        planned=cost.get("planned_bytes"),
        before=cost.get("device_before_bytes"),
        peak=cost.get("device_peak_bytes"),
        after_release=pulse.device_used if pulse and card.has_weights else None,
        ram_before=cost.get("ram_before_bytes"),
        ram_peak=cost.get("ram_peak_bytes"),
        ram_after_release=pulse.ram_used if pulse else None,
        alive=alive,
        fault="" if alive is not None else "It did not say that it was let go.",
    )


def _failed(card: Card, reason: str) -> Visit:
    return Visit(card.id, "", "", None, None, None, None, None, None, None, fault=reason)
