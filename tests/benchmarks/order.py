"""Two visitors, each with an engine that leaves no room for the other's: how often the two change places."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from core.jobs import Job
from core.settings import Settings
from core.studio import Studio
from tests.benchmarks.rows import Row
from tests.benchmarks.stage import cache, order

ENGINES = ("f5", "mms")  # in a budget for the larger, neither leaves room for the other
JOBS = 20  # of each visitor
PATIENCE = 4


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        budget = _room_for_one(Path(folder) / "alone")
        first_come = _round(Path(folder) / "first come", budget, patience=0)
        grouped = _round(Path(folder) / "grouped", budget, patience=PATIENCE)
    before, after = _switches(first_come), _switches(grouped)
    places = {name: place for place, name in enumerate(first_come)}
    later = max(place - places[name] for place, name in enumerate(grouped))
    return [
        Row(
            f"Switches of two engines, two visitors, {2 * JOBS} jobs",
            f"{after} instead of {before}",
            "at most a quarter",
            after <= before / 4,
            f"{', '.join(ENGINES)}; a budget of {budget / 2**20:.1f} MiB that holds one of them",
        ),
        Row("Jobs by which one waits longer than in first-come order", f"{later}", "at most 4", later <= 4),
    ]


def _room_for_one(folder: Path) -> int:
    needs: dict[str, int] = {}
    studio = Studio(_settings(folder))
    for engine in ENGINES:
        [job] = studio.submit([order(engine, text="Hello.")], "operator")
        take = studio.wait(job).take
        assert take is not None, job.reason
        needs[engine] = int(take.measurements["planned_bytes"] or 0)
    studio.close()
    # Not more: between jobs an engine takes less, and the smaller one would find room beside it.
    return int(1.01 * max(needs.values()))


def _round(folder: Path, budget: int, patience: int) -> list[str]:
    """The names of all jobs, in the order in which they were begun."""
    studio = Studio(_settings(folder, memory_budget=budget, patience=patience))
    jobs: dict[str, Job] = {}
    for engine in ENGINES:  # all at once, or the jobs would be done as fast as they come
        asked = [order(engine, text="Hello.") for _ in range(JOBS)]
        submitted = studio.submit(asked, visitor=f"visitor of {engine}")
        jobs |= {f"{engine} {number}": job for number, job in enumerate(submitted)}
    for job in jobs.values():
        assert studio.wait(job).take is not None, job.reason
    studio.close()
    return sorted(jobs, key=lambda name: jobs[name].started or 0)


def _switches(names: Sequence[str]) -> int:
    return sum(one.split()[0] != other.split()[0] for one, other in pairwise(names))


def _settings(folder: Path, **more: object) -> Settings:
    return Settings(
        home=folder / "home", cache=cache(), device="cpu", threads=1, jobs_per_visitor=2 * JOBS, **more
    )
