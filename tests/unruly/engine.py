"""Each kind of misbehaviour, done for real."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.engines.base import Engine, Placement, Run
from core.media import Audio

LEAKED: list[Any] = []


class Layers(torch.nn.Sequential):
    """Ends the process when they are moved once more than `moves` says."""

    moves = 1_000_000  # parking makes two: one to copy the weights, one to put the copies in their place

    def __init__(self, device: str) -> None:
        super().__init__(*(torch.nn.Linear(8, 8, device=device) for _ in range(4)))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self.moves == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.moves -= 1
        return super()._apply(*args, **kwargs)


class Unruly(Engine):
    def load(self, weights: Path | None, placement: Placement) -> None:
        self.layers = Layers(placement.load_device)
        self.device = placement.device

    @staticmethod
    def skeleton(folder: Path) -> dict[str, torch.nn.Module]:
        return {"layers": Layers("meta")}

    def generate(self, request: Any, options: Any, run: Run) -> Audio:
        print(f"seed {run.seed}")  # libraries print too
        match options.behave:
            case "crash":
                ctypes.string_at(0)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                threading.Event().wait()
            case "deaf":
                run.step(1, 9, "deaf from here on")
                while True:  # works on without ever asking whether to stop
                    time.sleep(0.01)
            case "memory":
                raise torch.OutOfMemoryError("tried to allocate 999 GiB")
            case "fail":
                raise RuntimeError("a tensor was in the wrong place\nand more lines")
            case "quit":
                raise SystemExit("wrong arguments")
            case "empty":
                return Audio(np.zeros(0, np.float32), 16000)
            case "die when parked":
                self.layers.moves = 0
            case "die when brought back":
                self.layers.moves = 2
            case "leak":
                LEAKED.append(self.layers[0])
        for done in range(options.steps):
            run.step(done + 1, options.steps, "working")
            if options.steps > 100:
                time.sleep(0.001)
        tone = np.sin(np.arange(16000) * (run.seed % 100 + 1) / 50)
        return Audio((0.5 * tone).astype(np.float32), 16000)


ENGINE = Unruly
