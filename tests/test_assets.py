"""The example voices and texts that the project makes itself."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import librosa
import numpy as np
import pytest

from assets.voices import make
from core.engines.espeak.card import CARD as ESPEAK
from core.media import loudness, probe_audio, read_audio
from core.requests import SpeechRequest, check
from core.worker.pictures import mel_levels

ASSETS = Path(__file__).parents[1] / "assets"
VOICES = json.loads((ASSETS / "voices" / "voices.json").read_text(encoding="utf-8"))
EXAMPLES = json.loads((ASSETS / "examples.json").read_text(encoding="utf-8"))
SCRIPTS = {
    "CYRILLIC": "ru uk",
    "GREEK": "el",
    "ARABIC": "ar fa",
    "HEBREW": "he",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "CJK": "zh",
    "HANGUL": "ko",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("voices")
    make.main(folder)
    return folder


def test_there_are_three_voices_and_the_script_lists_them_as_they_are(made: Path) -> None:
    assert len({voice["id"] for voice in VOICES}) == 3
    assert json.loads((made / "voices.json").read_text(encoding="utf-8")) == VOICES


@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice["id"])
def test_the_script_makes_the_voice_that_is_committed(made: Path, voice: dict[str, str]) -> None:
    committed, again = (read_audio(folder / voice["file"]) for folder in (ASSETS / "voices", made))
    assert committed.seconds == again.seconds
    # Other processors round otherwise, so the sound is compared and not the bytes.
    assert np.abs(mel_levels(committed) - mel_levels(again)).mean() < 0.5


@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice["id"])
def test_a_voice_is_long_and_loud_enough_to_be_cloned(voice: dict[str, str]) -> None:
    file = ASSETS / "voices" / voice["file"]
    assert file.stat().st_size < 250_000
    assert (probe_audio(file).rate, probe_audio(file).channels) == (24000, 1)
    sound = read_audio(file)
    assert 6.5 < sound.seconds < 9.5
    assert loudness(sound) == pytest.approx(-20, abs=2)
    assert np.abs(sound.samples).max() < 1
    assert voice["text"]
    assert voice["licence"] == "CC0-1.0"


def test_the_voices_lie_apart_in_pitch() -> None:
    def pitch(file: Path) -> float:
        sound = read_audio(file)
        steps = librosa.yin(sound.samples, fmin=60, fmax=400, sr=sound.rate)
        energy = librosa.feature.rms(y=sound.samples)[0]
        return float(np.median(steps[energy > energy.max() / 4]))

    low, middle, high = sorted(pitch(ASSETS / "voices" / voice["file"]) for voice in VOICES)
    assert middle / low > 1.25
    assert high / middle > 1.25


def test_every_xtts_language_has_an_example_and_english_has_several() -> None:
    spoken = "en es fr de it pt pl tr ru nl cs ar zh hu ko ja hi"
    assert set(spoken.split()) <= set(EXAMPLES)
    assert len(EXAMPLES["en"]) >= 4


@pytest.mark.parametrize("language", EXAMPLES)
def test_examples_are_sentences_in_the_script_of_their_language(language: str) -> None:
    expected = next((s for s, languages in SCRIPTS.items() if language in languages.split()), "LATIN")
    for text in EXAMPLES[language]:
        assert 25 <= len(text) <= 120
        assert text == unicodedata.normalize("NFC", text).strip()
        assert text[-1] in ".?!。।"
        names = [unicodedata.name(c) for c in text if unicodedata.category(c)[0] == "L"]
        if language == "ja":
            assert any(name.startswith("HIRAGANA") for name in names)
            expected = ("CJK", "HIRAGANA", "KATAKANA")  # type: ignore[assignment]
        assert all(name.startswith(expected) for name in names), text


@pytest.mark.parametrize("language", sorted(set(EXAMPLES) & set(ESPEAK.languages) - {"ja"}))
def test_espeak_takes_every_example(language: str) -> None:
    """All but Japanese, of which it reads no kanji."""
    for text in EXAMPLES[language]:
        check(ESPEAK, SpeechRequest(text=text, language=language), ESPEAK.options())
