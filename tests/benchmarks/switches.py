"""A thousand switches over all engines: memory, descriptors, threads, and parameters left alive.

A switch is another engine brought in, and the one before sent away: parked, where the next turn copies it
back, or let go, where it is loaded again. Each kind runs in a process of its own, and so does each control:
engines that stay, and the libraries' own loads of the same checkpoints. Memory is read once a round over all.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from core.engines.quirks import mend_torchaudio
from tests.benchmarks.rows import Row, slope
from tests.benchmarks.stage import Stage, gpu, speakers, wanted_of
from tests.support import load, miniature

PARKED = 200  # rounds
LOADED = 30
WARM_UP = 5
CARD = 1024 * 2**20  # bytes of the pretend card
BOUND = 2.0  # KB a switch


def measure() -> list[Row]:
    runs = {kind: _child(kind) for kind in RUNS}
    each = len(speakers())
    rows = []
    for kind, control, words in (
        ("parked", "staying", "parked and copied back"),
        ("loaded", "bare", "let go and loaded again"),
    ):
        run, base = runs[kind], runs[control]
        grew, alone = (slope(r["memory"]) / 1024 / each for r in (run, base))
        switches = each * len(run["memory"])
        rows += [
            Row(
                f"Memory over {switches} switches of {each} engines, {words}",
                f"{grew - alone:+.1f} KB a switch",
                f"{BOUND:g} KB",
                grew - alone <= BOUND,
                f"{grew:+.1f} KB beyond a control of {alone:+.1f} KB; Theil-Sen slopes; {run['device']}",
            ),
            Row(
                f"Descriptors and threads over these {switches}",
                f"{run['descriptors']}, {run['threads']}",
                "flat",
                len(set(run["descriptors"])) == len(set(run["threads"])) == 1,
                "at the first and the last round",
            ),
        ]
    alive = runs["loaded"]["alive"]
    rows.append(
        Row("Parameters alive after a release", f"{alive}", "0", alive == 0, "weak references, gc off")
    )
    return rows


def _child(kind: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.switches", kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rounds(count: int, switch: Callable[[str], None]) -> dict[str, Any]:
    process = psutil.Process()
    memory, descriptors, threads = [], [], []
    for number in range(WARM_UP + count):
        for engine in speakers():
            switch(engine)
        if number >= WARM_UP:
            memory.append(process.memory_info().rss)
            descriptors.append(process.num_fds())
            threads.append(threading.active_count())
    ends = [0, -1]
    return {
        "memory": memory,
        "descriptors": [descriptors[end] for end in ends],
        "threads": [threads[end] for end in ends],
    }


def _parked(park: bool = True) -> dict[str, Any]:
    wanted = {engine: wanted_of(engine) for engine in speakers()}
    with tempfile.TemporaryDirectory() as folder, gpu(CARD) as name:
        stage = Stage(Path(folder), device="cuda")

        def switch(engine: str) -> None:
            if park:
                stage.host.unload(park=True)
            with stage.host.memory.lend(wanted[engine]):
                pass

        found = _rounds(PARKED, switch)
        assert not stage.released, "an engine was let go"
    return {**found, "device": name}


def _loaded() -> dict[str, Any]:
    wanted, alive = {engine: wanted_of(engine) for engine in speakers()}, 0
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))

        def switch(engine: str) -> None:
            nonlocal alive
            with stage.host.memory.lend(wanted[engine]) as loan:
                modules = loan.engine.components().values()
                references = [weakref.ref(p) for module in modules for p in module.parameters()]
            del loan, modules
            assert references
            stage.host.unload()
            alive += sum(reference() is not None for reference in references)

        gc.disable()  # what dies, dies by the release itself
        found = _rounds(LOADED, switch)
    return {**found, "alive": alive, "device": "CPU"}


def _bare() -> dict[str, Any]:
    """The libraries' loads, and as little around them as there can be."""
    mend_torchaudio()
    trim = ctypes.CDLL(None).malloc_trim

    def switch(engine: str) -> None:
        loaded = load(engine, miniature(engine))
        loaded.close()
        del loaded
        gc.collect()
        trim(0)

    return _rounds(LOADED, switch)


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "parked": _parked,
    "staying": lambda: _parked(park=False),
    "loaded": _loaded,
    "bare": _bare,
}


if __name__ == "__main__":
    mend_torchaudio()
    print(json.dumps(RUNS[sys.argv[1]]()))
