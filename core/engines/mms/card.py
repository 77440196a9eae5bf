"""MMS-TTS: Meta's VITS voices, one small checkpoint a language; a part of its 1100 languages is listed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection
from pathlib import Path

from core.card import Card, Checkpoint, Licence, Modality, Options, Paradigm, Working, knob
from core.errors import BadInput, WeightsError
from core.requests import SpeechRequest

# Language of the request -> code of the repository, name, script as Unicode's character names spell it.
VOICES = {
    "en": ("eng", "English", "LATIN"),
    "de": ("deu", "German", "LATIN"),
    "fr": ("fra", "French", "LATIN"),
    "es": ("spa", "Spanish", "LATIN"),
    "pt": ("por", "Portuguese", "LATIN"),
    "nl": ("nld", "Dutch", "LATIN"),
    "pl": ("pol", "Polish", "LATIN"),
    "ro": ("ron", "Romanian", "LATIN"),
    "hu": ("hun", "Hungarian", "LATIN"),
    "sv": ("swe", "Swedish", "LATIN"),
    "fi": ("fin", "Finnish", "LATIN"),
    "ca": ("cat", "Catalan", "LATIN"),
    "cy": ("cym", "Welsh", "LATIN"),
    "tr": ("tur", "Turkish", "LATIN"),
    "az": ("azj-script_latin", "Azerbaijani", "LATIN"),
    "vi": ("vie", "Vietnamese", "LATIN"),
    "id": ("ind", "Indonesian", "LATIN"),
    "tl": ("tgl", "Tagalog", "LATIN"),
    "sw": ("swh", "Swahili", "LATIN"),
    "ha": ("hau", "Hausa", "LATIN"),
    "yo": ("yor", "Yoruba", "LATIN"),
    "ru": ("rus", "Russian", "CYRILLIC"),
    "uk": ("ukr", "Ukrainian", "CYRILLIC"),
    "bg": ("bul", "Bulgarian", "CYRILLIC"),
    "kk": ("kaz", "Kazakh", "CYRILLIC"),
    "el": ("ell", "Greek", "GREEK"),
    "he": ("heb", "Hebrew", "HEBREW"),
    "ar": ("ara", "Arabic", "ARABIC"),
    "fa": ("fas", "Persian", "ARABIC"),
    "ur": ("urd-script_arabic", "Urdu", "ARABIC"),
    "hi": ("hin", "Hindi", "DEVANAGARI"),
    "mr": ("mar", "Marathi", "DEVANAGARI"),
    "bn": ("ben", "Bengali", "BENGALI"),
    "gu": ("guj", "Gujarati", "GUJARATI"),
    "pa": ("pan", "Punjabi", "GURMUKHI"),
    "ta": ("tam", "Tamil", "TAMIL"),
    "te": ("tel", "Telugu", "TELUGU"),
    "kn": ("kan", "Kannada", "KANNADA"),
    "ml": ("mal", "Malayalam", "MALAYALAM"),
    "th": ("tha", "Thai", "THAI"),
    "ko": ("kor", "Korean", "HANGUL"),
    "am": ("amh", "Amharic", "ETHIOPIC"),
}
_SCRIPTS = {script for _, _, script in VOICES.values()} | {"CJK", "HIRAGANA", "KATAKANA"}

# Two ways to write one letter; a vocabulary holds either.
_TWINS = (("’", "'"), ("ț", "ţ"), ("ș", "ş"))

_CHECKPOINTS = {
    language: Checkpoint(
        repository=f"facebook/mms-tts-{code}",
        label=name,
        # The repositories also hold pytorch_model.bin, the same weights once more.
        files=(
            "config.json",
            "model.safetensors",
            "vocab.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
        required=("config.json", "vocab.json", "tokenizer_config.json"),
        parameters=36_284_592,  # VitsModel with a vocabulary of 38; another adds or takes 192 a letter
    )
    for language, (code, name, _) in VOICES.items()
}


class MmsOptions(Options):
    speaking_rate: float = knob(1.0, "tempo; 2 is twice as fast", ge=0.25, le=4.0, step=0.05)
    noise_scale: float = knob(
        0.667, "variation of the sound; 0 is flat and steady", ge=0.0, le=2.0, step=0.01
    )
    noise_scale_duration: float = knob(0.8, "variation of the rhythm; 0 is even", ge=0.0, le=2.0, step=0.01)


def pick(request: SpeechRequest, options: MmsOptions) -> Checkpoint:
    """The checkpoint of the request's language."""
    if request.language not in _CHECKPOINTS:
        raise BadInput(f"MMS does not speak {request.language!r}; it speaks: {', '.join(VOICES)}.")
    return _CHECKPOINTS[request.language]


def check(request: SpeechRequest, options: MmsOptions, weights: Path | None) -> None:
    """Refuse what the voice would leave out: other scripts, and with `weights` what its vocabulary lacks."""
    _, name, script = VOICES[request.language]
    for letter in request.text:
        found = unicodedata.name(letter, "").partition(" ")[0]
        if found in _SCRIPTS - {script, "LATIN"}:
            foreign = "Chinese" if found == "CJK" else found.title()
            raise BadInput(
                f"MMS {name} cannot read the {foreign} letter {letter}; choose the text's language."
            )
    if weights is None:
        return
    try:
        vocabulary = json.loads((weights / "vocab.json").read_text("utf-8"))
        romanizes = json.loads((weights / "tokenizer_config.json").read_text("utf-8")).get("is_uroman", False)
    except (OSError, ValueError, AttributeError):
        return  # `load` says what is wrong with the folder
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise WeightsError("vocab.json of this checkpoint holds no letters; give a whole copy of it.")
    text = spell(request.text, request.language, vocabulary)
    if missing := [sign for sign in unknown(text, vocabulary) if sign.isascii() or not romanizes]:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise BadInput(f"MMS {name} has no sound for {shown}; write it out in words of the language.")


def spell(text: str, language: str, vocabulary: Collection[str]) -> str:
    """Lower-case `text`, with accents, apostrophes and cedillas in the form the vocabulary holds.

    The tokenizer drops a character that it does not know, so the same letter in another form would be lost.
    """
    if language in ("tr", "az"):
        text = text.replace("İ", "i").replace("I", "ı")
    text = text.lower()
    text = min(
        (unicodedata.normalize(form, text) for form in ("NFC", "NFD")),
        key=lambda written: sum(_is_lost(sign, vocabulary) for sign in written),
    )
    for twins in _TWINS:
        for old, new in (twins, twins[::-1]):
            if old not in vocabulary and new in vocabulary:
                text = text.replace(old, new)
    return text


def unknown(text: str, vocabulary: Collection[str]) -> list[str]:
    """The characters, each once, that carry sound or meaning and that the vocabulary lacks.

    Not counted are punctuation and the vowel points of Arabic and Hebrew, which readers leave out, too.
    """
    return [sign for sign in dict.fromkeys(text) if _is_lost(sign, vocabulary)]


def _is_lost(sign: str, vocabulary: Collection[str]) -> bool:
    if sign in vocabulary:
        return False
    category = unicodedata.category(sign)
    if category == "Mn":
        return unicodedata.name(sign, "").partition(" ")[0] not in ("ARABIC", "HEBREW")
    return category[0] in "LNS" or category == "Mc" or sign in "%&@#"


CARD = Card(
    id="mms",
    name="MMS",
    modality=Modality.SPEECH,
    summary="Meta's Massively Multilingual Speech: one small VITS voice for each language.",
    pipeline="letters -> text encoder and durations -> spectrogram latents -> HiFi-GAN -> waveform",
    paradigm=Paradigm.SPECTROGRAM,
    checkpoints=tuple(_CHECKPOINTS.values()),
    code_licence=Licence(
        name="Apache-2.0", url="https://github.com/huggingface/transformers/blob/main/LICENSE"
    ),
    weights_licence=Licence(
        name="CC-BY-NC-4.0", url="https://creativecommons.org/licenses/by-nc/4.0/", commercial=False
    ),
    languages=tuple(VOICES),
    strategies=("resident", "group_block", "group_leaf", "device_map", "cpu"),
    working=Working(share=1.25),  # the decoder of 17 s at once, the longest sentence: 163 MiB
    sample_rate=16000,
    options=MmsOptions,
    source="https://arxiv.org/abs/2305.13516",
    pick=pick,
    check=check,
)
