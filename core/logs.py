"""What the libraries print: one file a process, and the oldest files go."""

from __future__ import annotations

import os
from pathlib import Path

from core.errors import SoundstageError

KEPT = 20  # files of a kind


def new_log(home: Path, kind: str) -> Path:
    """A place for this process to log to: `<home>/logs/<kind>-<process id>.log`, not yet written.

    Raises:
        SoundstageError: nothing can be kept in `home`.
    """
    folder = home / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        logs = sorted(folder.glob(f"{kind}-*.log"), key=lambda log: log.stat().st_mtime)
        for log in logs[: 1 - KEPT]:
            log.unlink()
    except FileNotFoundError:
        pass  # another process removes old files too
    except OSError as error:
        raise SoundstageError(
            f"Nothing can be kept in {home}: {os.strerror(error.errno or 0)}; "
            "name another place by SOUNDSTAGE_HOME."
        ) from None
    return folder / f"{kind}-{os.getpid()}.log"
