"""Writes what an engine made into the take's folder, with the pictures and facts that the page shows."""

from __future__ import annotations

import hashlib
from functools import singledispatch
from pathlib import Path
from typing import Any

from core.media import Audio, at_loudness, loudness, peaks, write_audio
from core.worker.pictures import draw_mel

PEAK_COLUMNS = 400


@singledispatch
def save(result: Any, folder: Path) -> list[dict[str, Any]]:
    """Write a result's files into `folder`.

    Returns:
        One dict a medium: `file`, `kind`, and facts about it.
    """
    raise TypeError(f"no way to write a {type(result).__name__}")


@save.register
def _(result: Audio, folder: Path) -> list[dict[str, Any]]:
    write_audio(folder / "audio.wav", result)
    write_audio(folder / "listen.wav", at_loudness(result))
    level = loudness(result)
    return [
        {
            "file": "audio.wav",
            "kind": "audio",
            "listen": "listen.wav",
            "sha256": hashlib.sha256((folder / "audio.wav").read_bytes()).hexdigest(),
            "seconds": round(result.seconds, 4),
            "rate": result.rate,
            "lufs": None if level is None else round(level, 2),
            "peaks": peaks(result, PEAK_COLUMNS),
            "mel": draw_mel(result, folder / "mel.png"),
        }
    ]
