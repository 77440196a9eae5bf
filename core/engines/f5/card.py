"""F5-TTS: any voice from a few seconds of it, by flow matching on a mel spectrogram."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from core.card import Ability, Card, Checkpoint, Licence, Modality, Options, Paradigm, Working, knob
from core.errors import BadInput, WeightsError
from core.media import probe_audio
from core.requests import SpeechRequest

MODEL_FILE = "F5TTS_v1_Base/model_1250000.safetensors"
VOCABULARY_FILE = "F5TTS_v1_Base/vocab.txt"
REFERENCE_SECONDS = (3.0, 12.0)

_VOCODER = Checkpoint(
    repository="charactr/vocos-mel-24khz",
    label="vocoder",
    files=("config.yaml", "pytorch_model.bin"),
    required=("config.yaml", "pytorch_model.bin"),
    parameters=13_500_000,
)
_WHISPER = Checkpoint(
    repository="openai/whisper-base",
    label="writes down what the reference says",
    files=("*.json", "merges.txt", "model.safetensors"),
    required=("config.json", "generation_config.json", "model.safetensors"),
    parameters=72_600_000,
    optional=True,
)
VOCODER_FOLDER, WHISPER_FOLDER = _VOCODER.folder, _WHISPER.folder

_CHINESE = ("\u3100", "\u9fff")  # what the library turns into pinyin before it looks it up
_BYTES_PER_SECOND = (1, 60)  # of a text that somebody speaks: slow and sparse to fast and in Chinese


class F5Options(Options):
    steps: int = knob(32, "Flow-matching steps: fewer is faster and rougher", ge=4, le=64, step=1)
    cfg_strength: float = knob(
        2.0, "Classifier-free guidance: how closely to follow text and voice", ge=0.0, le=5.0, step=0.1
    )
    sway_sampling_coef: float = knob(
        -1.0, "Sway sampling: below 0 more of the steps go to the beginning", ge=-1.0, le=1.0, step=0.1
    )
    speed: float = knob(
        1.0,
        "Pace against the reference's; sentences under 10 bytes keep the library's own",
        ge=0.5,
        le=2.0,
        step=0.05,
    )


def _check(request: SpeechRequest, _options: F5Options, weights: Path | None) -> None:
    assert request.voice is not None, "the general check asks for it"
    seconds = probe_audio(request.voice).seconds
    longest = REFERENCE_SECONDS[1]
    if request.voice_text.strip() and seconds <= longest:
        _check_pace(request.voice_text, seconds)
    if weights is None:
        return
    if not (weights / WHISPER_FOLDER).is_dir():
        if not request.voice_text.strip():
            raise BadInput("F5-TTS must know what the reference recording says: type its words.")
        if seconds > longest:
            raise BadInput(
                f"The reference recording is {seconds:.1f} s long; F5-TTS hears {longest:g} s of it: "
                "cut it and its text to that."
            )
    _check_characters(request.text, weights, "The text")
    _check_characters(request.voice_text, weights, "The reference's text")


def _check_pace(text: str, seconds: float) -> None:
    """The text's length against the recording's sets how long the speech will be."""
    slowest, fastest = _BYTES_PER_SECOND
    if not slowest <= len(text.strip().encode()) / seconds <= fastest:
        raise BadInput(
            f"The reference's text has {len(text.strip())} characters for {seconds:.1f} s of sound; "
            "type just what is said in it."
        )


def _check_characters(text: str, weights: Path, what: str) -> None:
    """The library would speak an unknown character as a blank; for a mark between words that is right."""
    try:
        with (weights / VOCABULARY_FILE).open(encoding="utf-8") as lines:
            known = {line.rstrip("\n") for line in lines}
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{VOCABULARY_FILE} of this checkpoint cannot be read: {error}") from None
    if " " not in known:
        raise WeightsError(f"{VOCABULARY_FILE} is no vocabulary of F5-TTS: it lacks the space.")
    strange = {
        c: None
        for c in text
        if unicodedata.category(c)[0] in "LMNS" and c not in known and not _CHINESE[0] <= c <= _CHINESE[1]
    }
    if strange:
        raise BadInput(
            f"{what} has characters that this checkpoint of F5-TTS does not know: "
            f"{' '.join([*strange][:10])}; write it without them."
        )


CARD = Card(
    id="f5",
    name="F5-TTS",
    modality=Modality.SPEECH,
    summary="Speaks English and Chinese in any voice, from a few seconds of it and their words.",
    pipeline="reference + text → flow matching on a mel spectrogram → Vocos → waveform",
    paradigm=Paradigm.SPECTROGRAM,
    checkpoints=(
        Checkpoint(
            repository="SWivid/F5-TTS",
            label="v1 base",
            files=(MODEL_FILE, VOCABULARY_FILE),
            required=(MODEL_FILE, VOCABULARY_FILE),
            parameters=337_000_000,
            also=(_VOCODER, _WHISPER),
        ),
    ),
    # Its vocoder package imports encodec 0.1.1, whose code is non-commercial.
    code_licence=Licence(
        name="MIT; imports encodec 0.1.1, CC-BY-NC-4.0",
        url="https://github.com/SWivid/F5-TTS",
        commercial=False,
    ),
    weights_licence=Licence(
        name="CC-BY-NC-4.0", url="https://huggingface.co/SWivid/F5-TTS", commercial=False
    ),
    languages=("en", "zh"),
    strategies=("resident", "model_offload", "group_block", "group_leaf", "device_map", "cpu"),
    # The vocoder is used by its parts. The text is embedded twice in a sentence's first step and not again,
    # while diffusers' streams bring each layer once a pass, in the order of the first pass.
    whole=frozenset({"vocoder", "transformer.text_embed"}),
    working=Working(share=0.2),  # 22 s of mel, twice for the guidance: 155 MiB; and the vocoder
    sample_rate=24_000,
    abilities=frozenset({Ability.CLONE}),
    reference_seconds=REFERENCE_SECONDS,
    reference_required=True,
    options=F5Options,
    source="https://arxiv.org/abs/2410.06885",
    check=_check,
)
