"""The reference recording as F5-TTS wants it: at most 12 s, no silence around it, its words beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from core.engines.loading import load_pretrained
from core.media import Audio, resample

Samples = npt.NDArray[np.float32]

_QUIET = 10 ** (-42 / 20)  # what the library's own preparation calls silence, there against full scale
_TAIL_SECONDS = 0.05  # the silence that it leaves at the end
_WINDOW_SECONDS = 0.02
_WHISPER_RATE = 16_000


def prepare(audio: Audio, longest: float) -> Audio:
    """Cut to at most `longest` seconds where it is quiet, trim the silence around, leave a short tail.

    A word cut in half would be spoken on at the start of the result.
    """
    samples = audio.samples
    if audio.seconds > longest:
        earliest, latest = int(longest * 2 / 3 * audio.rate), int(longest * audio.rate)
        levels = _levels(samples[earliest:latest], audio.rate)
        samples = samples[: earliest + int(levels.argmin()) * _window(audio.rate)]
    window = _window(audio.rate)
    levels = _levels(samples, audio.rate)
    loud = np.flatnonzero(levels > levels.max() * _QUIET)
    samples = samples[loud[0] * window : (loud[-1] + 1) * window]
    return Audio(np.concatenate([samples, np.zeros(int(_TAIL_SECONDS * audio.rate), np.float32)]), audio.rate)


def as_sentence(words: str) -> str:
    """The reference's words, ended so that the text to speak does not run on from them."""
    words = words.strip()
    if words.endswith(("。", "！", "？")):
        return words
    return words + " " if words.endswith((".", "!", "?")) else words + ". "


def transcribe(audio: Audio, whisper: Path, device: str, dtype: torch.dtype) -> str:
    """What a recording says, by a Whisper checkpoint that is loaded for this and dropped again."""
    processor = AutoProcessor.from_pretrained(whisper)
    model = load_pretrained(AutoModelForSpeechSeq2Seq, whisper, dtype=dtype, device=device)
    samples = resample(audio, _WHISPER_RATE).samples
    features = processor(samples, sampling_rate=_WHISPER_RATE, return_tensors="pt").input_features
    with torch.inference_mode():
        tokens = model.generate(features.to(device, dtype), task="transcribe", return_timestamps=False)
    words: str = processor.batch_decode(tokens, skip_special_tokens=True)[0]
    return words.strip()


def _window(rate: int) -> int:
    return int(_WINDOW_SECONDS * rate)


def _levels(samples: Samples, rate: int) -> Samples:
    """RMS of each window; the last window may be short."""
    window = _window(rate)
    parts = np.array_split(samples, range(window, len(samples), window))
    return np.array([np.sqrt(np.mean(np.square(part))) for part in parts], np.float32)
