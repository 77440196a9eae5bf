"""The few errors that cross a room's wall. Each carries one sentence for the person who asked."""

from __future__ import annotations


class SoundstageError(Exception):
    """Base of all; `str(error)` is one sentence that can be shown as it is."""


class BadInput(SoundstageError):
    """The request cannot be carried out as asked; the sentence says what would be right."""


class LicenceNeeded(BadInput):
    """The weights' licence has to be accepted first."""

    def __init__(self, engine: str, sentence: str) -> None:
        super().__init__(sentence)
        self.engine = engine

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.engine, str(self))


class WeightsError(SoundstageError):
    """Weights are missing, truncated, foreign, gated, or could not be downloaded."""


class DoesNotFit(SoundstageError):
    """No placement fits the memory there is."""


class DiskFull(SoundstageError):
    """There is no room left for the take."""
