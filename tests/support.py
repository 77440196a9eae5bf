"""What several tests need: a Run that records, and miniatures built once for the whole test run."""

from __future__ import annotations

import fcntl
import importlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.card import Card
from core.engines.base import Cancelled, Engine, Placement
from core.media import Audio


class RecordingRun:
    """A `Run` that keeps what it was told, and asks for a stop after `stop_after` steps."""

    def __init__(self, seed: int = 0, stop_after: int | None = None) -> None:
        self.seed = seed
        self.stop_after = stop_after
        self.steps: list[tuple[int, int, str]] = []
        self.chunks: list[Audio] = []
        self.previews: list[Path] = []

    def check(self) -> None:
        if self.stop_after is not None and len(self.steps) >= self.stop_after:
            raise Cancelled

    def step(self, done: int, total: int, note: str = "") -> None:
        self.check()
        self.steps.append((done, total, note))

    def chunk(self, audio: Audio) -> None:
        self.check()
        self.chunks.append(audio)

    def preview(self, file: Path) -> None:
        self.check()
        self.previews.append(file)


def seed_everything(seed: int) -> None:
    """As the host does before each `generate`."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def miniature(engine: str, checkpoint: int = 0) -> Path:
    """The miniature of an engine's checkpoint, built once per machine and version of its builder."""
    card = importlib.import_module(f"core.engines.{engine}.card").CARD
    builder = importlib.import_module(f"core.engines.{engine}.miniature")
    stamp = hash_of(Path(builder.__file__).read_bytes() + card.checkpoints[checkpoint].repository.encode())
    folder = Path(tempfile.gettempdir()) / "soundstage-test-miniatures" / f"{engine}-{stamp}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(dir=folder.parent))
            builder.build(partial, card.checkpoints[checkpoint])
            partial.rename(folder)
    return folder


def reference(card: Card) -> dict[str, Any]:
    """What a request needs beside its text: one of the example voices for an engine that only clones."""
    if not card.reference_required:
        return {}
    folder = Path(__file__).parents[1] / "assets/voices"
    voice = json.loads((folder / "voices.json").read_text())[0]
    return {"voice": folder / voice["file"], "voice_text": voice["text"], "consent": True}


def hash_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()[:12]


def load(engine: str, weights: Path | None, **placement: Any) -> Engine:
    """An engine with its checkpoint loaded, on the CPU unless told otherwise."""
    made: Engine = importlib.import_module(f"core.engines.{engine}.engine").ENGINE()
    made.load(weights, Placement(**placement))
    return made


def until(happened: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for what another thread or process does."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
