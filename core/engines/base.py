"""What every engine is: `load`, `generate`, `close`; and what `generate` gets to talk back with."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.card import Strategy
from core.media import Audio

if TYPE_CHECKING:
    import torch


class Cancelled(Exception):
    """A stop was asked for. Engines let it pass through."""


@dataclass(frozen=True)
class Placement:
    """Where the components of an engine go. Plain data, so that it can be shown, saved and tested."""

    device: str = "cpu"  # the one that works: "cuda", "cuda:1", "mps", "cpu"
    dtype: str = "float32"  # a torch dtype's name
    strategy: Strategy = "resident"
    quantisation: str = ""  # "int8": of the weights only
    device_share: int = 0  # bytes of weights on the device, for a device map
    ram_share: int = 0  # bytes of weights in host memory, for a device map; the rest is on disk

    @property
    def load_device(self) -> str:
        """Where `Engine.load` puts the weights: what is moved later waits in host memory."""
        return self.device if self.strategy == "resident" and not self.quantisation else "cpu"

    @property
    def record(self) -> dict[str, str]:
        """What a take keeps of it."""
        kept = {"device": self.device, "dtype": self.dtype, "strategy": self.strategy}
        return {**kept, "quantisation": self.quantisation} if self.quantisation else kept

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
        """Load a checkpoint from a folder in the hub's layout; `None` for an engine without weights.

        Weights go to `placement.load_device` in `placement.torch_dtype`. The worker then arranges them as
        `placement.strategy` says. Inputs are made on `placement.device`, which is where the work is done.
        """

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

    def components(self) -> Mapping[str, torch.nn.Module]:
        """The loaded modules by name, in the order in which they work; none is part of another.

        Together they hold every parameter. They are what a placement moves, and what has to be gone after a
        release.
        """
        torch = sys.modules.get("torch")  # an engine that did not import it holds none
        return {
            name: value for name, value in vars(self).items() if torch and isinstance(value, torch.nn.Module)
        }

    @staticmethod
    def skeleton(folder: Path) -> Mapping[str, torch.nn.Module]:
        """`components` without weights: the same names and shapes on the meta device, from configs alone.

        Args:
            folder: a checkpoint's folder, of which only the configs are read.
        """
        return {}

    using: Callable[..., AbstractContextManager[None]] = staticmethod(lambda *_names: nullcontext())
    """`with self.using("decoder"):` around work of components: an offloaded one is on the device inside.

    The worker sets it where something has to be moved.
    """
