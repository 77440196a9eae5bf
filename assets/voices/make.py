"""Makes the three example voices: eSpeak NG speaks, then its sound is bent into three different people.

Run from the project's root: `python -m assets.voices.make [FOLDER]`. The result is the project's own (CC0).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from core.engines.base import Placement
from core.engines.espeak.card import EspeakOptions
from core.engines.espeak.engine import Espeak
from core.media import Audio, at_loudness, write_audio
from core.requests import SpeechRequest

RATE = 24_000
Samples = npt.NDArray[Any]


@dataclass(frozen=True)
class Voice:
    """A person: how eSpeak speaks, and what is done to it afterwards."""

    id: str
    name: str
    text: str
    speech: EspeakOptions
    size: float  # formants and pitch are multiplied by it: under 1 a longer throat
    drift: float  # how far the pitch wanders, as a fraction
    breath: float  # noise beside the voice, as a fraction of its level
    warmth: float  # dB that the treble loses above 3 kHz


VOICES = (
    Voice(
        id="bookseller",
        name="Bookseller, low and warm",
        text="Thank you for calling the old bookshop by the river. We open at nine, and there is always "
        "fresh coffee waiting on the counter.",
        speech=EspeakOptions(accent="en-gb-x-rp", variant="m3", speed=178, pitch=42, pitch_range=60),
        size=0.86,
        drift=0.012,
        breath=0.03,
        warmth=9.0,
    ),
    Voice(
        id="traveller",
        name="Traveller, quick and bright",
        text="Look at those clouds! If we hurry across the bridge now, we might just reach the station "
        "before the first drops begin to fall.",
        speech=EspeakOptions(accent="en-us", variant="f2", speed=155, pitch=58, pitch_range=75),
        size=1.1,
        drift=0.015,
        breath=0.05,
        warmth=3.0,
    ),
    Voice(
        id="storyteller",
        name="Storyteller, soft and breathy",
        text="My grandmother kept bees behind the house. Every August she gave each of us one small jar, "
        "and told us to make it last.",
        speech=EspeakOptions(accent="en-gb-scotland", variant="f5", speed=148, pitch=40, pitch_range=45),
        size=0.97,
        drift=0.02,
        breath=0.11,
        warmth=6.0,
    ),
)


class _Quiet:
    """A `Run` that nobody watches."""

    seed = 0

    def step(self, done: int, total: int, note: str = "") -> None: ...
    def chunk(self, audio: Audio) -> None: ...
    def preview(self, file: Path) -> None: ...
    def check(self) -> None: ...


def make(voice: Voice) -> Audio:
    """Speak a voice's text: 24 kHz mono at -20 LUFS."""
    engine = Espeak()
    engine.load(None, Placement())
    try:
        spoken = engine.generate(SpeechRequest(text=voice.text, language="en"), voice.speech, _Quiet())
    finally:
        engine.close()
    chance = np.random.default_rng(sum(voice.id.encode()))
    sound = spoken.samples.astype(np.float64)
    sound = _bend(sound, spoken.rate, voice.size, voice.drift, chance)
    sound = soxr.resample(sound, spoken.rate, RATE)
    sound = _breathe(sound, voice.breath, chance)
    sound = _soften(sound, voice.warmth)
    sound = np.tanh(1.5 * sound / np.abs(sound).max())  # rounds off the highest peaks
    return at_loudness(Audio(sound.astype(np.float32), RATE))


def _bend(sound: Samples, rate: int, size: float, drift: float, chance: np.random.Generator) -> Samples:
    """Play at a speed around `size` that wanders by up to `drift`, a few times a second."""
    knots = chance.uniform(-1, 1, 3 + round(4 * len(sound) / rate / size))
    speed = size * (1 + drift * _smooth_between(knots, int(len(sound) / size)))
    bent: Samples = np.interp(np.cumsum(speed), np.arange(len(sound)), sound)
    return bent


def _breathe(sound: Samples, amount: float, chance: np.random.Generator) -> Samples:
    """Add noise from 1 to 8 kHz that follows the loudness of the voice."""
    noise = _shape(chance.normal(size=len(sound)), lambda hertz: (hertz > 1000) & (hertz < 8000))
    window = np.hanning(RATE // 50)
    level: Samples = np.sqrt(np.convolve(sound**2, window / window.sum(), mode="same"))
    breath: Samples = amount * level * noise / noise.std()
    return sound + breath


def _soften(sound: Samples, loss: float) -> Samples:
    """Take `loss` dB from the treble, half of it at 3 kHz, and everything under 60 Hz."""
    return _shape(sound, lambda hertz: (hertz > 60) * 10 ** (-loss / 20 / (1 + (3000 / (hertz + 1)) ** 2)))


def _shape(sound: Samples, gain: Callable[[Samples], Samples]) -> Samples:
    """Multiply the spectrum by a gain over frequency in Hz."""
    spectrum = np.fft.rfft(sound, 2 * len(sound))
    shaped: Samples = np.fft.irfft(spectrum * gain(np.fft.rfftfreq(2 * len(sound), 1 / RATE)))
    return shaped[: len(sound)]


def _smooth_between(knots: Samples, length: int) -> Samples:
    """A curve through `knots` without corners."""
    places = np.linspace(0, len(knots) - 1.001, length)
    left = places.astype(int)
    turn = (1 - np.cos(np.pi * (places - left))) / 2
    curve: Samples = knots[left] * (1 - turn) + knots[left + 1] * turn
    return curve


def main(folder: Path) -> None:
    entries = []
    for voice in VOICES:
        file = f"{voice.id}.flac"
        sound = make(voice)
        write_audio(folder / file, sound, {"title": voice.name, "license": "CC0-1.0"})
        entries.append(
            {
                "id": voice.id,
                "name": voice.name,
                "file": file,
                "text": voice.text,
                "language": "en",
                "licence": "CC0-1.0",
                "made": "eSpeak NG, then pitch, formants and breath changed by assets/voices/make.py",
            }
        )
    text = json.dumps(entries, indent=2, ensure_ascii=False)
    (folder / "voices.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
