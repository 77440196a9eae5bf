"""What a job tells on its way. Plain frozen data: it crosses the process wall and is kept on the job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Queued:
    position: int  # 0: next
    seconds: float | None = None  # until its turn, as far as earlier takes tell


@dataclass(frozen=True)
class Loading:
    """Weights are being found, downloaded, built or loaded."""

    note: str
    done: int = 0  # bytes, while a download runs; otherwise 0 of 0
    total: int = 0


@dataclass(frozen=True)
class Step:
    done: int
    total: int
    note: str = ""
    seconds_left: float | None = None  # from the pace so far; None before there is a pace


@dataclass(frozen=True)
class Preview:
    file: str  # name inside the job's folder


@dataclass(frozen=True)
class Chunk:
    """A piece of audio that can be played before the rest is there."""

    file: str  # name inside the job's folder
    index: int
    seconds: float


@dataclass(frozen=True)
class Finished:
    """The worker's last word on a job that worked: the files it wrote and what they cost."""

    media: tuple[dict[str, Any], ...]  # each: file, kind ("audio"), and facts about it
    measurements: dict[str, float | int | None]
    weights: dict[str, Any]  # kind, repository, commit, folder
    placement: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    take: str  # the take's id


@dataclass(frozen=True)
class Failed:
    reason: str  # one sentence
    detail: str = ""  # for a log or the details fold
    bad_input: bool = False


@dataclass(frozen=True)
class Stopped:
    reason: str = "Stopped."


Event = Queued | Loading | Step | Preview | Chunk | Finished | Done | Failed | Stopped
