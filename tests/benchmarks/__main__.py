"""`make bench`: measure what the README's table of figures states, as ratios within this run.

python -m tests.benchmarks [name ...]      names of modules here; all unless given
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import traceback

NAMES = ("overhead", "residency", "switches", "cancel", "startup", "responsive", "order", "loading", "gpu")


def main(names: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tests.benchmarks.rows import HEAD, Row, as_line

    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n\n{HEAD}")
    held = True
    for name in names or NAMES:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            rows = importlib.import_module(f"tests.benchmarks.{name}").measure()
        except Exception as error:  # the other figures are not lost with it
            traceback.print_exc()
            rows = [Row(name, "not measured", "measured", False, f"{type(error).__name__}: {error}")]
        for row in rows:
            print(as_line(row), flush=True)
            held = held and row.holds
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
