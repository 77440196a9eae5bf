"""Bark: speech, laughs, sighs and song as tokens, in three stages and a codec."""

from __future__ import annotations

import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from core.card import Ability, Card, Checkpoint, Licence, Modality, Options, Paradigm, Working, knob
from core.errors import BadInput, WeightsError
from core.requests import SpeechRequest

LANGUAGES = ("en", "zh", "fr", "de", "hi", "it", "ja", "ko", "pl", "pt", "ru", "es", "tr")
CUES = ("[laughter]", "[laughs]", "[sighs]", "[music]", "[gasps]", "[clears throat]", "[MAN]", "[WOMAN]", "♪")
AUTO = "auto"
VOICES_FILE = "speaker_embeddings_path.json"

_TAG = re.compile(r"\[[^\[\]\n]*\]")
_FILES = (
    # The repositories also hold the original checkpoints (*.pt), twice this size, which nothing here reads.
    "config.json",
    "generation_config.json",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    VOICES_FILE,
    "speaker_embeddings/*",
)
_REQUIRED = ("config.json", "generation_config.json", VOICES_FILE)


class BarkOptions(Options):
    checkpoint: Literal["small", "large"] = knob(
        "small", "small is about three times as fast, large sounds better"
    )
    voice: str = knob(
        AUTO,
        "A preset such as v2/en_speaker_6; auto: speaker 6 of the text's language; empty: any voice",
        suggestions=[AUTO, "", *(f"v2/{language}_speaker_{n}" for language in LANGUAGES for n in range(10))],
        max_length=80,
    )
    semantic_temperature: float = knob(
        0.7, "Freedom of wording and tone: the text-to-semantic stage", ge=0.1, le=1.5, step=0.05
    )
    coarse_temperature: float = knob(
        0.7, "Freedom of the voice's sound: the semantic-to-coarse stage", ge=0.1, le=1.5, step=0.05
    )
    fine_temperature: float = knob(
        0.5, "Freedom of the finest detail; 1 takes the likeliest token", ge=0.1, le=1.0, step=0.05
    )
    min_eos_p: float = knob(
        0.2, "End a sentence once its end is this likely; 0 waits for the model", ge=0.0, le=1.0, step=0.01
    )


def voices(weights: Path) -> list[str]:
    """The names of a checkpoint's voice presets."""
    try:
        presets = json.loads((weights / VOICES_FILE).read_text("utf-8"))
        return [name for name, files in presets.items() if isinstance(files, dict)]
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{VOICES_FILE} of this checkpoint cannot be read ({error}).") from None


def preset(options: BarkOptions, language: str, known: list[str]) -> str:
    """The name of the preset to speak with; empty for none."""
    if options.voice != AUTO:
        return options.voice
    # Speaker 6 is the one Bark's own examples use.
    default = f"v2/{language}_speaker_6"
    return default if default in known else ""


def _pick(_request: Any, options: BarkOptions) -> Checkpoint:
    return CARD.checkpoints[("small", "large").index(options.checkpoint)]


def _check(request: SpeechRequest, options: BarkOptions, weights: Path | None) -> None:
    for tag in _TAG.findall(request.text):
        if tag not in CUES:
            raise BadInput(f"Bark does not know the cue {tag}; it knows: {' '.join(CUES)}")
    if weights is None:
        return
    known = voices(weights)
    if options.voice not in (AUTO, "", *known):
        near = [name for name in known if f"{request.language}_" in name][:10] or known[:10]
        raise BadInput(
            f"This checkpoint of Bark has no voice {options.voice!r}; it has: {', '.join(near) or 'none'}."
        )
    _check_characters(request.text, weights)


def _check_characters(text: str, weights: Path) -> None:
    """The tokenizer turns a word with a character it does not know into one token that says nothing."""
    file = weights / "vocab.txt"
    if not file.exists():
        return
    known = _alphabet(file, file.stat().st_mtime_ns)
    strange = {c: None for c in text if c not in known and unicodedata.category(c)[0] not in "ZC"}
    if strange:
        raise BadInput(
            f"Bark does not know the characters {' '.join([*strange][:10])}; write it without them."
        )


@lru_cache(maxsize=4)
def _alphabet(file: Path, modified: int) -> frozenset[str]:
    """All characters of a vocabulary. It holds 120,000 words, and does not change between two jobs."""
    return frozenset(file.read_text("utf-8")) | {"♪"}


CARD = Card(
    id="bark",
    name="Bark",
    modality=Modality.SPEECH,
    summary="Speaks, laughs, sighs and sings in 13 languages, each seed in its own way.",
    pipeline="text → semantic tokens → coarse codec tokens → fine codec tokens → EnCodec → waveform",
    paradigm=Paradigm.TOKENS,
    checkpoints=(
        Checkpoint(
            repository="suno/bark-small",
            label="small",
            files=_FILES,
            required=_REQUIRED,
            parameters=404_000_000,
        ),
        Checkpoint(
            repository="suno/bark",
            label="large",
            files=_FILES,
            required=_REQUIRED,
            parameters=1_100_000_000,
        ),
    ),
    code_licence=Licence(
        name="Apache-2.0", url="https://github.com/huggingface/transformers/blob/main/LICENSE"
    ),
    weights_licence=Licence(name="MIT", url="https://huggingface.co/suno/bark"),
    languages=LANGUAGES,
    gpu_dtype="float16",  # as transformers' documentation of Bark has it
    strategies=("resident", "model_offload", "group_leaf", "device_map", "cpu"),
    # The fine stage ties its heads to the embeddings of other codebooks and visits them in no fixed order;
    # the codec is used by its parts. Where positions are embedded, the library looks for the device.
    whole=frozenset({"fine", "codec", "semantic.position_embeds_layer", "coarse.position_embeds_layer"}),
    quantisations=("int8",),
    working=Working(share=0.12),  # the codec of 14 s: 164 MiB; keys and values of the large one: 126 MiB
    sample_rate=24_000,
    abilities=frozenset({Ability.CUES}),
    options=BarkOptions,
    source="https://github.com/suno-ai/bark",
    pick=_pick,
    check=_check,
)
