"""Two hundred switches between two engines: memory, descriptors, threads, and parameters left alive."""

from __future__ import annotations

import ctypes
import gc
import tempfile
import threading
import weakref
from pathlib import Path

import psutil

from tests.benchmarks.rows import Row, slope
from tests.benchmarks.stage import Stage, order
from tests.support import miniature

SWITCHES = 200
WARM_UP = 40
CONTROL = 140


def measure() -> list[Row]:
    process = psutil.Process()
    memory, descriptors, threads, alive = [], [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        gc.disable()  # what dies, dies by the release itself
        try:
            for turn in range(WARM_UP + SWITCHES):
                engine = ("mms", "bark")[turn % 2]
                # One and the same request: lengths that vary fill oneDNN's bounded cache of kernels by shape.
                stage.run(order(engine, text="Hello there"))
                references = [
                    weakref.ref(p)
                    for resident in stage.host.residency._residents.values()
                    for module in resident.engine.modules()
                    for p in module.parameters()
                ]
                assert references
                stage.host.unload()
                alive += sum(reference() is not None for reference in references)
                if turn >= WARM_UP:
                    memory.append(process.memory_info().rss)
                    descriptors.append(process.num_fds())
                    threads.append(threading.active_count())
        finally:
            gc.enable()
    grew, control = slope(memory) / 1024, slope(_bare()) / 1024
    flat = descriptors[0] == descriptors[-1] and threads[0] == threads[-1]
    return [
        Row(
            f"Memory over {SWITCHES} switches of two engines",
            f"{grew:+.1f} KB a switch",
            "at most 20 KB",
            grew <= 20,
            f"Theil-Sen slope after {WARM_UP} to warm up; the libraries alone: {control:+.1f} KB",
        ),
        Row(
            "Descriptors and threads over the switches",
            f"{descriptors[0]} to {descriptors[-1]}, {threads[0]} to {threads[-1]}",
            "flat",
            flat,
        ),
        Row("Parameters alive after a release", f"{alive}", "0", alive == 0, "weak references, gc off"),
    ]


def _bare() -> list[int]:
    """Memory over loads and releases of the same checkpoints by the library alone."""
    from transformers import BarkModel, VitsModel

    process, memory = psutil.Process(), []
    trim = ctypes.CDLL(None).malloc_trim
    for turn in range(CONTROL):
        name, kind = (("mms", VitsModel), ("bark", BarkModel))[turn % 2]
        kind.from_pretrained(miniature(name))
        gc.collect()
        trim(0)
        if turn >= WARM_UP:
            memory.append(process.memory_info().rss)
    return memory
