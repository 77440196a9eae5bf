"""What the page and its worker say to each other: plain data over a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.events import Event
from core.requests import Order


@dataclass(frozen=True)
class RunJob:
    job: str
    order: Order
    folder: Path  # where the media files go
    online: bool  # whether the hub answered the page
    working: int | None = None  # bytes it takes beside the weights, from earlier takes


@dataclass(frozen=True)
class StopJob:
    job: str


@dataclass(frozen=True)
class Unload:
    """Taken up between jobs, so that it never meets an engine at work."""

    engine: str = ""  # empty: all
    park: bool = False  # give back only the device, since everybody left the engine's tab


@dataclass(frozen=True)
class Budget:
    """The memory budget was changed while the server runs. Taken up between jobs."""

    memory: int | None  # bytes of the device; None: all there is


@dataclass(frozen=True)
class Quit:
    pass


ToWorker = RunJob | StopJob | Unload | Budget | Quit


@dataclass(frozen=True)
class JobEvent:
    job: str
    event: Event


@dataclass(frozen=True)
class Held:
    """One engine in memory. Bytes."""

    engine: str
    weights: str  # the checkpoint's folder, by name
    state: Literal["in use", "loaded", "parked"]
    device_bytes: int  # planned: the weights; in use, its working memory with them
    ram_bytes: int  # in host memory: parked, or waiting there to be moved in
    idle_seconds: float
    words: str  # where its components are, for people


@dataclass(frozen=True)
class Pulse:
    """A sign of life, with what the header shows. Bytes."""

    device: str  # "NVIDIA H200", "CPU"
    device_name: str  # as torch names it: "cuda", "cpu"
    device_used: int
    device_total: int  # within the budget
    device_size: int  # all there is
    ram_used: int  # of the worker process
    ram_total: int
    loaded: tuple[str, ...]  # engine ids, most recently used first; not the parked ones
    held: tuple[Held, ...]  # all of them, most recently used first; the parked ones too
    device_free: int  # what could still be taken on the device, within the budget
    ram_free: int  # of the machine, or of its container
    ready: bool  # False while libraries are still being imported
    parked: tuple[str, ...] = ()  # engine ids whose weights wait in host memory, most recently used first
    ram_held: int = 0  # by engines: parked, or waiting in host memory to be moved in
    ram_budget: int = 0  # the most that may be


@dataclass(frozen=True)
class Released:
    """An engine was let go. `alive` counts parameters that something still holds."""

    engine: str
    alive: int
    device_bytes_left: int
    clean: bool
    holders: tuple[str, ...] = ()  # what holds them, as far as the garbage collector can tell


FromWorker = JobEvent | Pulse | Released
