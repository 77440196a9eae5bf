"""What the spawned process calls first: cheap to import, so that the page can name it."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from core.settings import Settings


def run(pipe: Connection, settings: Settings, log: Path) -> None:
    from core.worker.host import main

    main(pipe, settings, log)
