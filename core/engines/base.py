"""What every engine is: `load`, `generate`, `close`; and what `generate` gets to talk back with."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.media import Audio

if TYPE_CHECKING:
    import torch


class Cancelled(Exception):
    """A stop was asked for. Engines let it pass through."""


@dataclass(frozen=True)
class Placement:
    """Where the components of an engine go. Plain data, so that it can be shown, saved and tested."""

    device: str = "cpu"  # "cuda", "cuda:1", "mps", "cpu"
    dtype: str = "float32"  # a torch dtype's name
    strategy: str = "resident"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


class Run(Protocol):
    """One call of `generate`, as its engine sees it. Each method raises `Cancelled` once a stop was asked."""

    seed: int  # torch, numpy and random are seeded with it before `generate` starts

    def step(self, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total` steps (tokens, sentences, denoising steps)."""

    def chunk(self, audio: Audio) -> None:
        """Hand on a piece of audio that can be played now."""

    def preview(self, file: Path) -> None:
        """Hand on a file that shows the result so far."""

    def check(self) -> None:
        """Only raise `Cancelled` if a stop was asked for."""


class Engine(ABC):
    """One model family. `core/engines/<id>/engine.py` names its class as `ENGINE`."""

    @abstractmethod
    def load(self, weights: Path | None, placement: Placement) -> None:
        """Load a checkpoint from a folder in the hub's layout; `None` for an engine without weights."""

    @abstractmethod
    def generate(self, request: Any, options: Any, run: Run) -> Audio:
        """Make what was asked for.

        Args:
            request: the modality's request (`core.requests`).
            options: an instance of the card's `options`.
            run: progress, chunks, seed and cancel.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to undo
        """Undo what `load` did beyond attributes (hooks, files). The caller drops the attributes."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """The torch modules held by this engine, for the proof that they were released."""
        torch = sys.modules.get("torch")  # an engine that did not import it holds none
        for value in vars(self).values():
            if torch and isinstance(value, torch.nn.Module):
                yield value
