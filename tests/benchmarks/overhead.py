"""What our layer adds to a job: the library called directly, against the same call as a job of the host."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from core.worker.host import seed_everything
from tests.benchmarks.rows import Row, median
from tests.benchmarks.stage import Stage, order

ROUNDS = 25
SENTENCE = "The quick brown fox jumps over the lazy dog"  # one sentence, so that both sides make one call


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        return [_compare(stage, "mms", _mms), _compare(stage, "bark", _bark)]


def _compare(stage: Stage, engine: str, direct_call: Callable[[Path], Callable[[], object]]) -> Row:
    wanted = order(engine, text=SENTENCE)
    stage.run(wanted)
    [key] = [k for k in stage.host.residency._residents if k.engine == engine]
    assert key.folder is not None
    call = direct_call(key.folder)
    call()
    direct, ours = [], []
    for _ in range(ROUNDS):  # turn about, so that both meet the same noise
        started = time.perf_counter()
        seed_everything(1)
        call()
        direct.append(time.perf_counter() - started)
        started = time.perf_counter()
        finished = stage.run(wanted)
        # Pictures, loudness and files come after the sound is there: work that a direct call does not do.
        ours.append(time.perf_counter() - started - (finished.measurements["finish_seconds"] or 0))
    base, added = median(direct), median([o - d for o, d in zip(ours, direct, strict=True)])
    bound = max(0.02 * base, 0.005)
    return Row(
        f"Overhead of a job over the direct call, {engine}",
        f"{added * 1e3:.1f} ms on {base * 1e3:.0f} ms",
        "the larger of 2 % and 5 ms",
        added <= bound,
        f"median of {ROUNDS}",
    )


def _mms(folder: Path) -> Callable[[], object]:
    import torch
    from transformers import AutoTokenizer, VitsModel

    model, tokenizer = VitsModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def call() -> object:
        with torch.inference_mode():
            return model(**tokenizer(SENTENCE, return_tensors="pt")).waveform[0].numpy()

    return call


def _bark(folder: Path) -> Callable[[], object]:
    from transformers import AutoProcessor, BarkModel

    model, processor = BarkModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    return lambda: model.generate(**processor(SENTENCE)).numpy()
