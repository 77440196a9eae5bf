"""eSpeak NG, the classic formant synthesizer: it speaks for real on every machine, and sets the base line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from core.card import Ability, Card, Licence, Modality, Options, Paradigm, knob
from core.errors import BadInput
from core.requests import TAG, SpeechRequest

# Voices of the 1.52 library, less those whose dictionary is missing (fo, kaa) and test languages.
LANGUAGES = (
    "en", "zh", "hi", "es", "fr", "ar", "bn", "pt", "ru", "ur", "id", "de", "ja", "sw", "mr", "te",
    "tr", "ta", "vi", "ko", "it", "th", "gu", "fa", "pl", "pa", "kn", "ml", "or", "my", "uk", "ro",
    "nl", "az", "uz", "sd", "am", "ms", "ne", "si", "el", "cs", "hu", "sv", "he", "be", "bg", "ca",
    "da", "fi", "no", "sk", "hr", "sr", "bs", "sl", "mk", "lt", "lv", "et", "sq", "hy", "ka", "kk",
    "ky", "tt", "tk", "ug", "as", "om", "ti", "tn", "ht", "ku", "la", "eo", "eu", "cy", "ga", "gd",
    "is", "lb", "mt", "af", "an", "ba", "cv", "gn", "ia", "io", "kl", "mi", "qu", "nb", "yue", "bpy",
    "chr", "grc", "haw", "hyw", "jbo", "kok", "lfn", "ltg", "mto", "nci", "nog", "pap", "quc",
    "qya", "shn", "sjn", "smj",
)  # fmt: skip

# <audio> is left out: it would play any sound file of this machine.
_TAGS = ("speak", "p", "s", "break", "prosody", "emphasis", "say-as", "sub", "voice")
_HAN = re.compile(r"[\u3005\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


class EspeakOptions(Options):
    accent: Literal[
        "standard",
        "en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029",
        "es-419", "pt-br", "fr-be", "fr-ch", "ca-ba", "ca-nw", "ca-va", "ru-lv", "ru-cl",
        "vi-vn-x-central", "vi-vn-x-south",
    ] = knob("standard", "regional voice of the language; standard is eSpeak's own first choice")  # fmt: skip
    variant: Literal[
        "plain",
        "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5",
        "croak", "whisper", "whisperf", "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "klatt6",
        "Alex", "Andrea", "Annie", "belinda", "grandma", "grandpa", "linda", "robosoft", "steph", "Storm",
        "UniRobot",
    ] = knob("plain", "timbre: m1-m8 male, f1-f5 female, the others as their names say")  # fmt: skip
    speed: int = knob(175, "speaking rate in words per minute", ge=80, le=450)
    pitch: int = knob(50, "how high the voice lies", ge=0, le=99)
    pitch_range: int = knob(50, "how much the melody moves; 0 is a monotone", ge=0, le=99)
    word_gap: int = knob(0, "pause between words, in 10 ms at the normal speed", ge=0, le=50)
    markup: bool = knob(False, "follow SSML tags such as <break time='1s'/> and <emphasis>")


def check(request: SpeechRequest, options: EspeakOptions, weights: Path | None) -> None:
    """Refuse a foreign accent, tags that would be read aloud, broken SSML, misplaced Chinese characters."""
    spoken, accent = request.language, options.accent
    if accent != "standard" and accent.partition("-")[0] != spoken:
        raise BadInput(
            f"The accent {accent!r} belongs to another language than {spoken!r}; choose 'standard'."
        )
    tag = TAG.search(request.text)
    if tag and not options.markup:
        raise BadInput(f"eSpeak NG reads the tag {tag[0]} aloud unless the option markup is on.")
    if options.markup:
        _check_ssml(request.text)
    if spoken not in ("zh", "yue") and (han := _HAN.search(request.text)):
        raise BadInput(
            f"eSpeak NG reads the character {han[0]} only in the languages zh and yue; spell the word out"
            f"{' in kana' if spoken == 'ja' else ''}."
        )


def _check_ssml(text: str) -> None:
    if "<!" in text or "<?" in text:
        raise BadInput("Comments, CDATA and declarations are not followed; leave only text and SSML tags.")
    try:
        root = ElementTree.fromstring(ssml(text))
    except ElementTree.ParseError as error:
        line, column = error.position
        raise BadInput(
            f"The SSML is broken at line {line}, column {column}: "
            "close every tag, and write &lt; and &amp; for < and &."
        ) from None
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        if tag not in _TAGS:
            raise BadInput(f"eSpeak NG does not follow the tag <{tag}> here; it follows: {', '.join(_TAGS)}.")
        # The library would take a voice's name for a file's path.
        if any(sign in value for value in element.attrib.values() for sign in "/\\"):
            raise BadInput(f"An attribute of the tag <{tag}> holds a slash; the tags may not name files.")
    if not "".join(root.itertext()).strip():
        raise BadInput("The SSML holds no words to speak; add some between the tags.")


def ssml(text: str) -> str:
    """`text` as one SSML document."""
    return text if text.lstrip().startswith("<speak") else f"<speak>{text}</speak>"


CARD = Card(
    id="espeak",
    name="eSpeak NG",
    modality=Modality.SPEECH,
    summary="A small rule-based synthesizer: robotic, instant, in over a hundred languages, no download.",
    pipeline="text -> phonemes by rules -> formants -> waveform",
    paradigm=Paradigm.RULES,
    code_licence=Licence(
        name="GPL-3.0-or-later", url="https://github.com/espeak-ng/espeak-ng/blob/master/COPYING"
    ),
    languages=LANGUAGES,
    sample_rate=22050,
    abilities=frozenset({Ability.MARKUP}),
    options=EspeakOptions,
    source="https://github.com/espeak-ng/espeak-ng",
    check=check,
)
