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
    from tests.benchmarks.rows import Row, as_markdown

    rows = []
    for name in names or NAMES:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            rows += importlib.import_module(f"tests.benchmarks.{name}").measure()
        except Exception as error:  # what was measured before is not lost with it
            traceback.print_exc()
            rows.append(Row(name, "not measured", "measured", False, f"{type(error).__name__}: {error}"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(as_markdown(rows))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
