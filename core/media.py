"""Sound as arrays with their rate; files in and out. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Audio:
    """A waveform.

    Attributes:
        samples: float32, shape (frames,) for mono or (channels, frames), in [-1, 1].
        rate: sample rate in Hz.
    """

    samples: npt.NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[-1] / self.rate


@dataclass(frozen=True)
class AudioFacts:
    """What a file says of itself, without its samples."""

    seconds: float
    rate: int
    channels: int


def probe_audio(file: Path) -> AudioFacts:
    """Read an audio file's length, rate and channels; `BadInput` if it is none."""
    raise NotImplementedError


def read_audio(file: Path, *, rate: int | None = None, mono: bool = True, limit_seconds: float | None = None) -> Audio:
    """Read any common audio file (wav, flac, mp3, m4a, ogg, webm) as float32.

    Args:
        rate: resample to this many Hz; None keeps the file's.
        mono: mix the channels down.
        limit_seconds: read no more than this from the start.

    Raises:
        BadInput: not audio, empty, truncated, silent all through, or with samples that are not numbers.
    """
    raise NotImplementedError


def write_audio(file: Path, audio: Audio) -> None:
    """Write wav (16-bit PCM), flac or mp3, by suffix. A file that could not be finished is removed.

    Raises:
        DiskFull: there is no room.
        BadInput: the suffix is none of these.
    """
    raise NotImplementedError
