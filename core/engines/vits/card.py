"""Coqui VITS: text to waveform in one model, in the two English sets of voices that Coqui published."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Literal

from core.card import Card, Checkpoint, Licence, Modality, Options, Paradigm, Working, knob
from core.errors import BadInput
from core.requests import SpeechRequest

SPEAKERS_FILE = "speaker_ids.json"
DEFAULT_SPEAKER = "p225"

# The speakers of the VCTK checkpoint, less one called "ED\n" that nobody can type. The corpus has gaps.
_GAPS = {235, 242, 289, 290, 291, 296, 309, 315, 319, 320, 321, 322, 324, 325, 327, 328, 331, 332, 337, 338}
_LATER = (339, 340, 341, 343, 345, 347, 351, 360, 361, 362, 363, 364, 374, 376)
VCTK_SPEAKERS = [f"p{n}" for n in (*range(225, 339), *_LATER) if n not in _GAPS]


class VitsOptions(Options):
    checkpoint: Literal["ljspeech", "vctk"] = knob(
        "ljspeech", "ljspeech: one clear female voice; vctk: 109 speakers with many English accents"
    )
    speaker: str = knob(
        "", f"speaker of vctk, such as p226; empty: {DEFAULT_SPEAKER}", suggestions=VCTK_SPEAKERS
    )
    speed: float = knob(1.0, "speaking rate; 2 is twice as fast", ge=0.5, le=2.0, step=0.05)
    noise_scale: float = knob(0.667, "variation of the voice; 0 is flat", ge=0.0, le=1.5, step=0.01)
    rhythm_noise_scale: float = knob(1.0, "variation of the rhythm; 0 is even", ge=0.0, le=1.5, step=0.05)


def pick(request: SpeechRequest, options: VitsOptions) -> Checkpoint:
    return CHECKPOINTS[options.checkpoint]


def check(request: SpeechRequest, options: VitsOptions, weights: Path | None) -> None:
    """Refuse letters that English phonemes cannot spell, and speakers that the checkpoint does not have."""
    if not any(character.isalnum() for character in request.text):
        raise BadInput("The text has no letter or digit for Coqui VITS to speak; type a sentence.")
    foreign = next((c for c in request.text if c.isalpha() and not _is_latin(c)), None)
    if foreign:
        raise BadInput(
            f"Coqui VITS reads English and cannot pronounce {foreign!r}; write it in Latin letters."
        )
    if weights is not None:
        speaker_of(options, weights)
    elif options.speaker and options.checkpoint != "vctk":
        raise BadInput(
            f"The checkpoint {options.checkpoint} has a single speaker; "
            "leave the option 'speaker' empty, or set 'checkpoint' to vctk."
        )


def _is_latin(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(("LATIN", "FULLWIDTH LATIN", "MODIFIER LETTER"))


def speaker_of(options: VitsOptions, weights: Path) -> str | None:
    """The speaker to speak as; None where the checkpoint in `weights` has only one.

    Raises:
        BadInput: the checkpoint has no such speaker.
    """
    file = weights / SPEAKERS_FILE
    if not file.exists():
        if options.speaker:
            raise BadInput(
                "This checkpoint of Coqui VITS has a single speaker; leave the option 'speaker' empty."
            )
        return None
    speakers: list[str] = list(json.loads(file.read_text(encoding="utf-8")))
    if not options.speaker:
        return DEFAULT_SPEAKER if DEFAULT_SPEAKER in speakers else speakers[0]
    if options.speaker not in speakers:
        known = ", ".join(name.strip() for name in speakers)
        raise BadInput(f"Coqui VITS has no speaker {options.speaker!r}; the speakers are: {known}.")
    return options.speaker


def _release(name: str) -> str:
    """Coqui publishes these weights on its releases page only."""
    return f"https://github.com/coqui-ai/TTS/releases/download/v0.6.1_models/{name}.zip"


CHECKPOINTS = {
    "ljspeech": Checkpoint(
        repository="coqui/tts_models--en--ljspeech--vits",
        label="ljspeech: one voice",
        files=("model_file.pth", "config.json"),
        required=("model_file.pth", "config.json"),
        archive=_release("tts_models--en--ljspeech--vits"),
        parameters=36_300_000,  # without the discriminator, which only training needs
    ),
    "vctk": Checkpoint(
        repository="coqui/tts_models--en--vctk--vits",
        label="vctk: 109 voices",
        files=("model_file.pth", "config.json", SPEAKERS_FILE),
        required=("model_file.pth", "config.json", SPEAKERS_FILE),
        archive=_release("tts_models--en--vctk--vits"),
        parameters=39_700_000,
    ),
}

CARD = Card(
    id="vits",
    name="Coqui VITS",
    modality=Modality.SPEECH,
    summary="Small and fast: one model goes from phonemes to waveform, in a single clear voice or in 109.",
    pipeline="text -> phonemes (eSpeak NG) -> latent spectrogram (flow) -> waveform (HiFi-GAN)",
    paradigm=Paradigm.SPECTROGRAM,
    checkpoints=tuple(CHECKPOINTS.values()),
    code_licence=Licence(name="MPL-2.0", url="https://github.com/idiap/coqui-ai-TTS/blob/main/LICENSE.txt"),
    weights_licence=Licence(name="Apache-2.0", url="https://www.apache.org/licenses/LICENSE-2.0"),
    languages=("en",),
    strategies=("resident", "group_leaf", "device_map", "cpu"),
    working=Working(share=1.7),  # like the decoder of MMS, at 22 kHz
    sample_rate=22050,
    options=VitsOptions,
    source="https://arxiv.org/abs/2106.06103",
    pick=pick,
    check=check,
)
