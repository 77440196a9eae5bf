"""What all speech engines share: long text by sentence, pauses between, samples that do not clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from core.engines.base import Run
from core.media import Audio

PAUSE_SECONDS = 0.25  # between two sentences, about the pause a reader makes at a full stop


def split_sentences(text: str, limit: int = 250) -> list[str]:
    """Cut text into sentences of at most `limit` characters.

    Cuts after sentence ends and line breaks (also of CJK, Arabic and Devanagari script), never inside a
    number or after a common abbreviation; a sentence over the limit is cut at a comma, then at a space,
    then anywhere. Joined again, the pieces hold every character of the text but white space.
    """
    raise NotImplementedError


def speak_by_sentence(
    text: str,
    rate: int,
    run: Run,
    speak: Callable[[str], npt.NDArray[np.float32]],
    limit: int = 250,
) -> Audio:
    """Speak each sentence with `speak` (text -> (n,) float32 in [-1, 1]), report a step each, join with pauses."""
    raise NotImplementedError


def join(pieces: Sequence[npt.NDArray[np.float32]], rate: int, pause: float = PAUSE_SECONDS) -> Audio:
    """Join mono pieces with `pause` seconds of silence between, scaled down if a sample exceeds 1."""
    raise NotImplementedError
