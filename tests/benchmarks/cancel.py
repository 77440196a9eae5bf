"""From the press of Stop to "stopped", and from a hang to the next job."""

from __future__ import annotations

import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

from core.events import Step
from core.jobs import Job
from core.requests import Order, SpeechRequest
from core.settings import Settings
from core.studio import Studio
from tests.benchmarks.rows import Row
from tests.benchmarks.stage import TEXT, cache, order, speakers

VISITOR = "benchmark"


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            home=Path(folder), cache=cache(), device="cpu", threads=1, engine_modules=("tests.unruly",)
        )
        studio = Studio(settings)
        try:
            return [*(_press(studio, engine) for engine in speakers()), _hang(studio)]
        finally:
            studio.close()


def _until(studio: Studio, job: Job, reached: threading.Event, test) -> None:
    def look() -> None:
        if test(job) or job.over:
            reached.set()

    undo = studio._jobs.listen(VISITOR, look)
    look()
    assert reached.wait(120)
    undo()


def _press(studio: Studio, engine: str) -> Row:
    long = order(engine, text=" ".join([TEXT] * 20))
    steps: list[float] = []
    [job] = studio.submit([long], VISITOR)

    def notice(job: Job) -> bool:
        if isinstance(job.event, Step):
            steps.append(time.perf_counter())
        return len(steps) >= 3

    _until(studio, job, threading.Event(), notice)
    assert not job.over, f"{engine} ended before the press: {job.state} {job.reason}"
    step = max(b - a for a, b in pairwise(steps))
    pressed = time.perf_counter()
    studio.stop(VISITOR, job.id)
    _until(studio, job, threading.Event(), lambda job: job.over)
    took = time.perf_counter() - pressed
    assert job.state == "stopped", job.state
    return Row(
        f"From Stop to stopped, {engine}",
        f"{took * 1e3:.0f} ms",
        "one step plus 0.5 s",
        took <= step + 0.5,
        f"longest time between two steps seen: {step * 1e3:.0f} ms",
    )


def _hang(studio: Studio) -> Row:
    request = SpeechRequest(text="hello")
    [job] = studio.submit(
        [Order(engine="unruly", request=request, options={"behave": "deaf"}, seed=1, weights="miniature")],
        VISITOR,
    )
    _until(studio, job, threading.Event(), lambda job: isinstance(job.event, Step))
    restarts = studio._worker.restarts  # type: ignore[attr-defined]
    pressed = time.perf_counter()
    studio.stop(VISITOR, job.id)
    _until(studio, job, threading.Event(), lambda job: job.over)
    took = time.perf_counter() - pressed
    replaced = studio._worker.restarts == restarts + 1  # type: ignore[attr-defined]
    [after] = studio.submit([order("mms")], VISITOR)
    _until(studio, after, threading.Event(), lambda job: job.over)
    return Row(
        "A hung engine's worker is replaced",
        f"{took:.1f} s, next job {after.state}",
        "12 s, next job runs",
        replaced and took <= 12 and after.state == "done",
        "10 s of that are the grace",
    )
