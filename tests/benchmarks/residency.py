"""What engines give back and what coming back costs: on this machine's GPU, or on the tests' pretend card.

The pretend card keeps its memory in the host's: copies to it are real copies, at the speed of host memory.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.catalog import Catalog
from core.engines.quirks import mend_torchaudio
from core.events import Failed, Finished, Step
from core.settings import Settings
from core.weights import Resolved
from core.worker.devices import ram_peak, ram_used, reset_ram_peak
from core.worker.memory import Wanted
from core.worker.messages import JobEvent, RunJob
from core.worker.process import WorkerProcess
from tests.benchmarks import loading
from tests.benchmarks.rows import Row, median
from tests.benchmarks.stage import Stage, cache, gpu, order, speakers, wanted_of

ROUNDS = 7
MIB = 2**20
CARD = 4096 * MIB  # of the pretend card
TEXT = "Hello there. How are you?"  # two steps: the first can still be the last
TEMPORARY = 0.15  # seconds: what planning and proof may take, whatever the size
WAIT = 300  # seconds for a worker


def measure() -> list[Row]:
    mend_torchaudio()
    return [*_coming_back(), *_ends(), _kills(), *_visits()]


# Coming back.


def _coming_back() -> list[Row]:
    with tempfile.TemporaryDirectory() as place, gpu(CARD) as name:
        folder = Path(place) / "weights"
        folder.mkdir()
        loading.BUILDERS["bark"](folder)
        stage = Stage(Path(place), device="cuda")
        memory = stage.host.memory
        found = Resolved(folder, "folder", "", "1", sum(f.stat().st_size for f in folder.rglob("*")))
        wanted = Wanted(Catalog().card("bark"), found, units=1.0, working=0)
        loaded = _seconds(lambda: _lend(memory, wanted))
        size = memory.residency.held.device
        shutil.rmtree(folder)  # nothing can be read of it from now on
        times, copies, read = [], [], []
        for _ in range(ROUNDS):
            stage.host.unload(park=True)
            assert memory.residency.held.device == 0
            before = _io()
            times.append(_seconds(lambda: _lend(memory, wanted)))
            after = _io()
            read.append({field: after[field] - before[field] for field in after})
            copies.append(_copy_seconds(size))
        took, copy = median(times), median(copies)
        disk, calls = max(r["read_bytes"] for r in read), max(r["rchar"] for r in read)
    bound = 1.5 * copy + TEMPORARY
    return [
        Row(
            f"Coming back to a parked engine of {size / 1e6:.0f} MB",
            f"{took:.3f} s",
            "1.5 x bytes over bandwidth, plus 150 ms",
            took <= bound,
            f"{name}; a bare copy takes {copy:.3f} s, a load {loaded:.1f} s; median of {ROUNDS}",
        ),
        Row(
            "Bytes read from disk on the way",
            f"{disk}",
            "0",
            disk == 0,
            f"its files had been deleted; {calls} bytes of /proc were read",
        ),
    ]


def _lend(memory: Any, wanted: Wanted) -> None:
    import torch

    with memory.lend(wanted):
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _copy_seconds(size: int) -> float:
    import torch

    host = torch.ones(size, dtype=torch.uint8).pin_memory()

    def copy() -> None:
        host.to("cuda")
        torch.cuda.synchronize()

    return _seconds(copy)


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _io() -> dict[str, int]:
    """proc(5): rchar counts what was read by any call, read_bytes what the disk had to be asked for."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {field: int(count) for field, count in lines if field in ("rchar", "read_bytes")}


# Giving back.


class Ending(Stage):
    """Ends jobs as asked, at their first step."""

    how = "success"

    def _hear(self, message: Any) -> None:
        super()._hear(message)
        if isinstance(message, JobEvent) and isinstance(message.event, Step):
            if self.how == "error":
                raise RuntimeError("an error in the middle of the work")
            if self.how == "cancel":
                self.host.stop("job")

    def end(self, engine: str, how: str) -> str:
        """Run a job, unload, and say how it ended."""
        self.how = how
        self.released.clear()
        self.host.run(RunJob("job", order(engine, text=TEXT), self.folder, online=False))
        assert isinstance(self._last, JobEvent)
        self.host.unload()
        return type(self._last.event).__name__


def _ends() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, gpu(CARD) as name:
        stage = Ending(Path(folder), device="cuda")
        for engine in 2 * speakers():
            stage.end(engine, "success")  # libraries are imported, and their caches filled
        device = stage.host.memory.device
        for how, expected in (("success", "Finished"), ("error", "Failed"), ("cancel", "Stopped")):
            alive, left, grown = 0, 0, 0.0
            for engine in speakers():
                used, ram = device.used(), ram_used()
                ended = stage.end(engine, how)
                assert ended == expected, f"{engine} ended as {ended}"
                assert stage.released
                alive += sum(released.alive for released in stage.released)
                left = max(left, device.used() - used)
                grown = max(grown, ram_used() / ram - 1)
            rows.append(
                Row(
                    f"Left behind after {how}, the most of {len(speakers())} engines",
                    f"{alive} parameters, {left / MIB:.2f} MiB of the device, {grown:+.1%} of RAM",
                    "0, 1 MiB, 3 %",
                    alive == 0 and left <= MIB and grown <= 0.03,
                    f"{name}; RAM after malloc_trim",
                )
            )
    return rows


def _kills() -> Row:
    """A killed process leaves nothing; the next one is as small as the first."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder), cache=cache(), device="auto", threads=1)
        worker = WorkerProcess(settings)
        events: queue.Queue[Any] = queue.Queue()
        worker.start(lambda job, event: events.put(event))
        try:
            first = _idle_ram(worker)
            grown = -1.0
            for engine in speakers():
                worker.run(RunJob("job", order(engine), Path(folder), online=False))
                while not isinstance(events.get(timeout=WAIT), Step):
                    pass
                assert worker.pid
                os.kill(worker.pid, signal.SIGKILL)
                while not isinstance(event := events.get(timeout=WAIT), Failed | Finished):
                    pass
                assert isinstance(event, Failed), f"{engine} was faster than the kill"
                grown = max(grown, _idle_ram(worker) / first - 1)
        finally:
            worker.close()
    return Row(
        f"RAM of the worker that follows a killed one, the most of {len(speakers())} engines",
        f"{grown:+.1%}",
        "3 %",
        grown <= 0.03,
        f"over {first / MIB:.0f} MiB at the first start",
    )


def _idle_ram(worker: WorkerProcess) -> int:
    while not (worker.pulse and worker.pulse.ready):
        time.sleep(0.01)
    return worker.pulse.ram_used


# One after the other.


def _visits() -> list[Row]:
    alone = {engine: _visit([engine], {}, 0) for engine in speakers()}
    working = {engine: peaks["working"] for engine, peaks in alone.items()}
    largest = {field: max(peaks[field] for peaks in alone.values()) for field in ("device", "ram")}
    together = _visit(speakers(), working, largest["device"])
    rows = []
    for field, what in (("device", "of the device"), ("ram", "of the process")):
        ratio = together[field] / largest[field]
        rows.append(
            Row(
                f"Peak memory {what} over a visit to every engine, over the largest single one",
                f"{ratio:.2f} x",
                "1.05 x",
                ratio <= 1.05,
                f"{together[field] / MIB:.0f} over {largest[field] / MIB:.0f} MiB; budget for one, each in "
                f"a process of its own, after all were loaded once; strategies: {together['strategies']}",
            )
        )
    return rows


def _visit(engines: list[str], working: dict[str, int], budget: int) -> dict[str, Any]:
    given = json.dumps({"engines": engines, "working": working, "budget": budget})
    command = [sys.executable, "-m", "tests.benchmarks.residency", given]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def _visit_here(engines: list[str], working: dict[str, int], budget: int) -> dict[str, Any]:
    mend_torchaudio()
    with tempfile.TemporaryDirectory() as folder, gpu(CARD):
        # Without room to park in, what one engine took is all there is for the next.
        stage = Stage(Path(folder), device="cuda", memory_budget=budget or None, ram_budget=1)
        for engine in speakers():  # libraries are no part of what an engine takes, and stay in memory
            _lend(stage.host.memory, wanted_of(engine))
            stage.host.unload()
        reset_ram_peak()
        device, ram, strategies, most = 0, ram_used(), set(), 0
        for engine in engines:
            message = RunJob(
                "job", order(engine, text=TEXT), stage.folder, online=False, working=working.get(engine)
            )
            cost, strategy = _cost(stage, message)
            device, ram = max(device, cost["device_peak_bytes"]), max(ram, cost["ram_peak_bytes"])
            most = max(most, cost["working_bytes"])
            strategies.add(strategy)
    return {"device": device, "ram": ram, "working": most, "strategies": ", ".join(sorted(strategies))}


def _cost(stage: Stage, message: RunJob) -> tuple[dict[str, int], str]:
    stage.host.run(message)
    assert isinstance(stage._last, JobEvent) and isinstance(stage._last.event, Finished), stage._last
    measured: dict[str, Any] = stage._last.event.measurements
    assert ram_peak() is not None
    return measured, stage._last.event.placement["strategy"]


if __name__ == "__main__":
    print(json.dumps(_visit_here(**json.loads(sys.argv[1]))))
