"""What the page and its worker say to each other: plain data over a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.events import Event
from core.requests import Order


@dataclass(frozen=True)
class RunJob:
    job: str
    order: Order
    folder: Path  # where the media files go
    online: bool  # whether the hub answered the page


@dataclass(frozen=True)
class StopJob:
    job: str


@dataclass(frozen=True)
class Unload:
    engine: str = ""  # empty: all


@dataclass(frozen=True)
class Quit:
    pass


ToWorker = RunJob | StopJob | Unload | Quit


@dataclass(frozen=True)
class JobEvent:
    job: str
    event: Event


@dataclass(frozen=True)
class Pulse:
    """A sign of life, with what the header shows. Bytes."""

    device: str  # "NVIDIA H200", "CPU"
    device_name: str  # as torch names it: "cuda", "cpu"
    device_used: int
    device_total: int
    ram_used: int  # of the worker process
    ram_total: int
    loaded: tuple[str, ...]  # engine ids
    ready: bool  # False while libraries are still being imported


@dataclass(frozen=True)
class Released:
    """An engine was let go. `alive` counts parameters that something still holds."""

    engine: str
    alive: int
    device_bytes_left: int
    clean: bool


FromWorker = JobEvent | Pulse | Released
