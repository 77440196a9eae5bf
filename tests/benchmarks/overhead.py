"""What our layer adds to a job: the library called directly, against the same call as a job of the host.

Both use the one loaded model, in one process, turn about, so that both meet the same noise. Engine tests show
that these direct calls give bitwise the same samples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.worker.host import seed_everything
from tests.benchmarks.rows import Row, median
from tests.benchmarks.stage import Stage, order

ROUNDS = 40
SENTENCE = "The quick brown fox jumps over the lazy dog"  # one sentence, so that both sides make one call


def measure() -> list[Row]:
    direct = {"mms": (_mms, {}), "vits": (_vits, {}), "xtts": (_xtts, {}), "bark": (_bark, {"voice": ""})}
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        return [_compare(stage, engine, *how) for engine, how in direct.items()]


def _compare(
    stage: Stage, engine: str, make: Callable[[Any], Callable[[], object]], options: dict[str, Any]
) -> Row:
    wanted = order(engine, text=SENTENCE, **options)
    stage.run(wanted)
    [resident] = [r for r in stage.host.residency._residents.values() if r.key.engine == engine]
    call = make(resident)
    call()
    direct, ours = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        seed_everything(1)
        call()
        direct.append(time.perf_counter() - started)
        started = time.perf_counter()
        finished = stage.run(wanted)
        # Files, loudness and pictures come once the sound is there: work that a direct call does not do.
        ours.append(time.perf_counter() - started - (finished.measurements["finish_seconds"] or 0))
    base, added = median(direct), median([o - d for o, d in zip(ours, direct, strict=True)])
    return Row(
        f"Overhead of a job over the direct call, {engine}",
        f"{added * 1e3:.1f} ms on {base * 1e3:.0f} ms",
        "the larger of 2 % and 5 ms",
        added <= max(0.02 * base, 0.005),
        f"median of {ROUNDS}",
    )


def _model(resident: Any, name: str) -> Any:
    """The first module of this class in a loaded engine."""
    import torch

    held = (value for value in vars(resident.engine).values() if isinstance(value, torch.nn.Module))
    return next(module for value in held for module in value.modules() if type(module).__name__ == name)


def _mms(resident: Any) -> Callable[[], object]:
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = _model(resident, "VitsModel"), AutoTokenizer.from_pretrained(resident.key.folder)

    def call() -> object:
        with torch.inference_mode():
            return model(**tokenizer(SENTENCE, return_tensors="pt")).waveform[0].numpy()

    return call


def _bark(resident: Any) -> Callable[[], object]:
    from transformers import AutoProcessor

    model, processor = _model(resident, "BarkModel"), AutoProcessor.from_pretrained(resident.key.folder)
    return lambda: model.generate(**processor(SENTENCE)).numpy()


def _vits(resident: Any) -> Callable[[], object]:
    model = _model(resident, "Vits")
    return lambda: model.synthesize(SENTENCE)["wav"]


def _xtts(resident: Any) -> Callable[[], object]:
    import torch

    model = _model(resident, "Xtts")
    voice = next(iter(model.speaker_manager.speakers.values())).values()
    settings = {"temperature": 0.75, "repetition_penalty": 5.0}
    return lambda: torch.cat(list(model.inference_stream(SENTENCE, "en", *voice, **settings))).numpy()
