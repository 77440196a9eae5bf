"""Time to the first served page and its memory, against a bare app of the same components."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.rows import Row, median
from tests.benchmarks.servers import Server, bare, ours

ROUNDS = 5
HEAVY = ("libtorch", "/transformers/", "/diffusers/", "/TTS/")


def measure() -> list[Row]:
    with ours() as server:
        components = [part["type"] for part in server.config()["components"]]
    with bare(components):
        pass  # both have now written their caches
    mine, theirs, memory = [], [], []
    mapped: set[str] = set()
    for _ in range(ROUNDS):  # turn about, so that both meet the same noise
        with bare(components) as plain:
            theirs.append(plain.seconds)
            plain_memory = plain.process.memory_info().rss
        with ours() as server:
            mine.append(server.seconds)
            memory.append(server.process.memory_info().rss / plain_memory)
            mapped |= _heavy_files(server)
    ratio, share = median(mine) / median(theirs), median(memory)
    return [
        Row(
            "Time to the first served page, over a bare app",
            f"{ratio:.2f} x ({median(mine):.1f} s over {median(theirs):.1f} s)",
            "1.25 x",
            ratio <= 1.25,
            f"{len(components)} components, median of {ROUNDS}",
        ),
        Row("Memory of the page process, over a bare app", f"{share:.2f} x", "1.15 x", share <= 1.15),
        Row(
            "Heavy libraries mapped into the page process",
            ", ".join(sorted(mapped)) or "none",
            "none",
            not mapped,
            "tests/test_page_process.py looks at its modules too",
        ),
    ]


def _heavy_files(server: Server) -> set[str]:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    return {name for name in HEAVY if name in maps}
