"""The API of the Speech tab, `speech_generate` and `speech_compare`. Names and order are a contract."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from core.card import Modality
from core.errors import SoundstageError
from core.jobs import Job
from core.requests import SEED_MAX, Order, SpeechRequest
from core.studio import Studio
from core.takes import Take


def add_endpoints(studio: Studio) -> None:
    """Add the endpoints to the present Blocks. Their fields are never shown: they carry names and choices."""
    known = [card.id for card in studio.cards(Modality.SPEECH)]

    async def generate(
        text: str,
        engine: str,
        language: str = "en",
        voice: str | None = None,
        voice_text: str = "",
        consent: bool = False,
        options: dict[str, Any] | None = None,
        seed: float = -1,
    ) -> tuple[str, dict[str, Any]]:
        """Speak a text with one engine; returns the audio file and the take's record."""
        request = _request(text, language, voice, voice_text, consent)
        [take] = await _make(studio, [_order(engine or "", request, options or {}, _seed(seed), studio)])
        return _file(take), _record(take)

    async def compare(
        text: str,
        engines: list[str],
        language: str = "en",
        voice: str | None = None,
        voice_text: str = "",
        consent: bool = False,
        seed: float = -1,
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Speak a text with several engines; returns audio files and records in the order of `engines`."""
        request, one_seed = _request(text, language, voice, voice_text, consent), _seed(seed)
        takes = await _make(
            studio, [_order(engine, request, {}, one_seed, studio) for engine in engines or ()]
        )
        return [_file(take) for take in takes], [_record(take) for take in takes]

    with gr.Column(visible=False):
        text = gr.Textbox(label="Text")
        engine = gr.Dropdown(known, label="Engine", value=None)
        several = gr.Dropdown(known, label="Engines", value=None, multiselect=True)
        language = gr.Textbox("en", label="Language, ISO 639")
        voice = gr.Audio(label="Reference recording", type="filepath")
        voice_text = gr.Textbox("", label="What is said in the reference")
        consent = gr.Checkbox(False, label="I may use this voice")
        options = gr.JSON({}, label="Options of the engine")
        seed = gr.Number(-1, label="Seed; -1 draws one", precision=0)
        press = gr.Button()
        audio, record = gr.Audio(label="Audio", type="filepath"), gr.JSON(label="Record")
        files, records = gr.File(label="Audio files", file_count="multiple"), gr.JSON(label="Records")
    shared: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
    press.click(
        generate,
        [text, engine, language, voice, voice_text, consent, options, seed],
        [audio, record],
        api_name="speech_generate",
        **shared,
    )
    press.click(
        compare,
        [text, several, language, voice, voice_text, consent, seed],
        [files, records],
        api_name="speech_compare",
        **shared,
    )


def _seed(value: float) -> int:
    if value is None or value < 0:
        return secrets.randbelow(SEED_MAX)
    if value > SEED_MAX:
        raise gr.Error(f"The seed is {value:.0f}; it may be 0 to {SEED_MAX}.", print_exception=False)
    return int(value)


def _request(text: str, language: str, voice: str | None, voice_text: str, consent: bool) -> SpeechRequest:
    return SpeechRequest(
        text=text or "",  # a caller may send null for anything
        language=language or "en",
        voice=Path(voice) if voice else None,
        voice_text=voice_text or "",
        consent=bool(consent),
    )


def _order(engine: str, request: SpeechRequest, options: Any, seed: int, studio: Studio) -> Order:
    if not isinstance(options, dict):
        raise gr.Error(
            'The options are an object of names and values, like {"speed": 1.2}.', print_exception=False
        )
    return Order(engine=engine, request=request, options=options, seed=seed, weights=studio.settings.weights)


async def _make(studio: Studio, orders: Sequence[Order]) -> list[Take]:
    """Carry orders out for a caller of its own; a caller that hangs up stops them."""
    caller = f"api-{secrets.token_urlsafe(24)}"
    try:
        jobs = studio.submit(orders, caller)
    except SoundstageError as error:
        raise gr.Error(str(error), print_exception=False) from None
    try:
        async for _ in studio.changes(caller):
            if all(job.over for job in jobs):
                break
    finally:
        studio.stop(caller)
    return [_take(job) for job in jobs]


def _take(job: Job) -> Take:
    if job.take is None:
        raise gr.Error(job.reason, print_exception=False)
    return job.take


def _file(take: Take) -> str:
    return str(take.folder / take.media[0]["file"])


def _record(take: Take) -> dict[str, Any]:
    return take.model_dump(mode="json", exclude={"media": {"__all__": {"peaks"}}})
