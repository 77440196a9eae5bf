"""Pictures of sound: the mel spectrogram on one scale for all engines, whatever their sample rate."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.media import Audio, write_whole

BANDS = 96
TOP_HZ = 12_000.0  # bands above half the sample rate stay empty
FLOOR_DB = -80.0  # 0 dB: a band that holds the power of a full-scale sine
COLUMNS_PER_SECOND = 100
MAX_COLUMNS = 3000  # longer sound than 30 s gets fewer columns a second
TICKS_HZ = (500, 1000, 2000, 4000, 8000)
_WINDOW_SECONDS = 0.046  # of 1024 samples at 22.05 kHz, usual in speech synthesis
_BIN_HZ = 12.0  # at most, so that the narrowest band (35 Hz) holds some
_BATCH = 500  # columns transformed at once, which bounds the memory
_LINEAR = 200 / 3  # Hz a mel, up to _BREAK
_BREAK = 1000.0  # Hz
_LOG = np.log(6.4) / 27  # 27 mel for each factor of 6.4

# Every 32nd colour of matplotlib's magma (Nathaniel Smith and Stéfan van der Walt, CC0); between them
# it is near enough to straight. Importing matplotlib for it would take longer than the whole picture.
_MAGMA = (0x000004, 0x1D1147, 0x51127C, 0x832681, 0xB73779, 0xE55064, 0xFB8761, 0xFEC287, 0xFCFDBF)


def draw_mel(audio: Audio, file: Path) -> dict[str, Any]:
    """Draw the log-mel spectrogram as a png without axes: time to the right, low bands at the bottom.

    Returns:
        What is needed to draw axes: `file`, `width` and `height` in pixels, `seconds`, `floor_db`, `top_db`,
        `top_hz`, and `ticks`, each with its `hz` and how far down it lies, `top`, in percent of the height.
    """
    from PIL import Image

    levels = mel_levels(audio)
    shades = np.round((levels - FLOOR_DB) / -FLOOR_DB * 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(shades[::-1]), mode="P")
    picture.putpalette(_palette())
    png = io.BytesIO()
    picture.save(png, "png", compress_level=3)
    write_whole(file, png.getvalue())
    return {
        "file": file.name,
        "width": picture.width,
        "height": picture.height,
        "seconds": round(audio.seconds, 4),
        "floor_db": FLOOR_DB,
        "top_db": 0.0,
        "top_hz": TOP_HZ,
        "ticks": [{"hz": hz, "top": round(100 * (1 - _height(hz)), 2)} for hz in TICKS_HZ],
    }


def mel_levels(audio: Audio) -> npt.NDArray[np.float32]:
    """Level of each band in dB, (BANDS, columns), from `FLOOR_DB` to 0; the lowest band first.

    The bands' weights add up to 1 at each frequency, so together they hold the power of the sound.
    """
    mono = audio.samples if audio.samples.ndim == 1 else audio.samples.mean(axis=0)
    length = max(2, round(_WINDOW_SECONDS * audio.rate))
    size = 1 << int(np.ceil(np.log2(max(length, audio.rate / _BIN_HZ))))
    window = np.hanning(length + 1)[:-1].astype(np.float32)
    weights = mel_weights(audio.rate, size)
    scale = 4 / (size * np.square(window).sum())  # by Parseval, a full-scale sine has a power of 1

    columns = min(max(1, round(audio.seconds * COLUMNS_PER_SECOND)), MAX_COLUMNS)
    centres = ((np.arange(columns) + 0.5) * len(mono) / columns).astype(int)
    padded = np.pad(mono, (length // 2, length))
    windows = np.lib.stride_tricks.sliding_window_view(padded, length)
    power = np.empty((BANDS, columns), np.float32)
    for start in range(0, columns, _BATCH):
        pieces = windows[centres[start : start + _BATCH]] * window
        spectrum = np.fft.rfft(pieces, size)
        power[:, start : start + _BATCH] = weights @ (spectrum.real**2 + spectrum.imag**2).T * scale
    floor = 10 ** (FLOOR_DB / 10)
    return np.clip(10 * np.log10(np.maximum(power, floor)), FLOOR_DB, 0).astype(np.float32)


@cache
def mel_weights(rate: int, size: int) -> npt.NDArray[np.float32]:
    """Triangular bands of height 1, equally wide in mel, over the bins of an FFT: (BANDS, size // 2 + 1)."""
    edges = _hertz(np.linspace(0, _mel(TOP_HZ), BANDS + 2))
    bins = np.linspace(0, rate / 2, size // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _mel(hertz: float) -> float:
    """Slaney's mel scale (Auditory Toolbox, 1998), as in librosa: straight to 1 kHz, logarithmic above."""
    return float(hertz / _LINEAR if hertz < _BREAK else _BREAK / _LINEAR + np.log(hertz / _BREAK) / _LOG)


def _hertz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    straight = mel * _LINEAR
    return np.where(straight < _BREAK, straight, _BREAK * np.exp(_LOG * (mel - _BREAK / _LINEAR)))


def _height(hertz: float) -> float:
    """How far up the picture a frequency lies, from 0 to 1: a band is highest in the middle of its row."""
    return (_mel(hertz) / _mel(TOP_HZ) * (BANDS + 1) - 0.5) / BANDS


@cache
def _palette() -> list[int]:
    """256 colours, red, green, blue, ..."""
    anchors = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in _MAGMA], float)
    places = np.linspace(0, 255, len(anchors))
    channels = [np.interp(np.arange(256), places, channel) for channel in anchors.T]
    return np.stack(channels, 1).round().astype(int).ravel().tolist()
