"""The mel spectrogram: right band, right level, one scale for all sample rates."""

from __future__ import annotations

from pathlib import Path

import librosa
import matplotlib
import numpy as np
import pytest
from PIL import Image

from core.media import Audio
from core.worker.pictures import (
    BANDS,
    COLUMNS_PER_SECOND,
    FLOOR_DB,
    MAX_COLUMNS,
    TOP_HZ,
    draw_mel,
    mel_levels,
    mel_weights,
)


def tone(frequency: float, rate: int = 24000, seconds: float = 1.0, level: float = 0.5) -> Audio:
    time = np.arange(round(seconds * rate)) / rate
    return Audio((level * np.sin(2 * np.pi * frequency * time)).astype(np.float32), rate)


@pytest.mark.parametrize(("rate", "size"), [(8000, 1024), (22050, 2048), (24000, 2048), (48000, 4096)])
@pytest.mark.filterwarnings("ignore:Empty filters")  # above half the rate
def test_the_bands_are_those_of_slaney(rate: int, size: int) -> None:
    # librosa's last band ends below half the rate or goes on past it; either way its weights are ours.
    theirs = librosa.filters.mel(sr=rate, n_fft=size, n_mels=BANDS, fmin=0, fmax=TOP_HZ, norm=None)
    assert np.allclose(mel_weights(rate, size), theirs, atol=1e-5)


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 48000])
@pytest.mark.parametrize("frequency", [200, 1000, 4000, 7000])
def test_a_pure_tone_lies_in_its_band(rate: int, frequency: int) -> None:
    edges = librosa.mel_frequencies(BANDS + 2, fmin=0, fmax=TOP_HZ)
    levels = mel_levels(tone(frequency, rate))
    loudest = levels[:, levels.shape[1] // 2].argmax()
    assert edges[loudest] < frequency < edges[loudest + 2]


def test_silence_is_the_lowest_colour(tmp_path: Path) -> None:
    draw_mel(Audio(np.zeros(24000, np.float32), 24000), tmp_path / "mel.png")
    assert set(np.asarray(Image.open(tmp_path / "mel.png")).ravel()) == {0}


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100, 48000, 96000])
def test_the_bands_together_hold_the_power_of_the_sound(rate: int) -> None:
    for level in (1.0, 0.1):
        middle = mel_levels(tone(2000, rate, level=level))[:, 20:-20]
        power = 10 * np.log10(np.sum(10 ** (middle / 10), axis=0))
        assert np.allclose(power, 20 * np.log10(level), atol=0.1)


def test_two_sample_rates_share_one_scale() -> None:
    low, high = (mel_levels(tone(3000, rate))[:, 20:-20].mean(axis=1) for rate in (16000, 48000))
    heard = np.maximum(low, high) > -30
    assert heard.any()
    assert np.abs(low - high)[heard].max() < 0.5


def test_bands_above_half_the_sample_rate_are_empty() -> None:
    noise = Audio(np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32), 16000)
    edges = librosa.mel_frequencies(BANDS + 2, fmin=0, fmax=TOP_HZ)
    levels = mel_levels(noise)
    assert (levels[edges[:-2] > 8000] == FLOOR_DB).all()
    assert (levels[edges[2:] < 7900] > -60).all()


def test_columns_are_in_time() -> None:
    click = np.zeros(48000, np.float32)
    click[12000] = 1.0  # at half a second of two
    levels = mel_levels(Audio(click, 24000))
    assert levels.shape == (BANDS, 2 * COLUMNS_PER_SECOND)
    assert levels.sum(axis=0).argmax() == pytest.approx(50, abs=1)


@pytest.mark.parametrize(("seconds", "columns"), [(0.001, 1), (0.5, 50), (3, 300), (120, MAX_COLUMNS)])
def test_clips_are_as_wide_as_they_are_long_up_to_a_limit(
    tmp_path: Path, seconds: float, columns: int
) -> None:
    facts = draw_mel(tone(440, 16000, seconds), tmp_path / "mel.png")
    assert (facts["width"], facts["height"]) == (columns, BANDS)
    assert Image.open(tmp_path / "mel.png").size == (columns, BANDS)


def test_ticks_lie_where_a_tone_of_that_pitch_is_drawn(tmp_path: Path) -> None:
    for tick in draw_mel(tone(440), tmp_path / "mel.png")["ticks"]:
        draw_mel(tone(tick["hz"]), tmp_path / "tone.png")
        column = np.asarray(Image.open(tmp_path / "tone.png"))[:, 50].astype(float)
        middle = ((np.arange(BANDS) + 0.5) * column**8).sum() / (column**8).sum()
        assert middle == pytest.approx(tick["top"] / 100 * BANDS, abs=0.6)


def test_the_colours_are_magma(tmp_path: Path) -> None:
    draw_mel(tone(440), tmp_path / "mel.png")
    palette = np.reshape(Image.open(tmp_path / "mel.png").getpalette(), (256, 3))
    magma = matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255
    assert np.abs(palette - magma).max() < 10  # of 255: drawn from nine of its colours


def test_stereo_is_drawn_as_the_mix() -> None:
    one = tone(1000)
    assert np.array_equal(mel_levels(Audio(np.stack([one.samples] * 2), one.rate)), mel_levels(one))
