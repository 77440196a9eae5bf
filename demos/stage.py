"""What stands on a tab's stage: this browser's newest press, one slot an engine; and what came before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from core.jobs import Job
from core.requests import Order
from core.takes import Take

State = Literal["queued", "loading", "running", "done", "failed", "stopped"]
Verdict = Literal["busy", "same", "other", "failed"]


@dataclass
class Piece:
    """A job on its way, a finished take, or both; and the pieces that made it again."""

    order: Order
    created: float  # seconds since the epoch
    job: Job | None = None
    take: Take | None = None
    again: list[Piece] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.job.id if self.job else self.take.id if self.take else ""

    @property
    def state(self) -> State:
        return "done" if self.take else self.job.state if self.job else "failed"

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "stopped")

    @property
    def looks(self) -> tuple[Any, ...]:
        """What a drawing of it depends on: equal looks need no new one."""
        job = None if self.over or self.job is None else (self.job.event, len(self.job.chunks))
        return self.key, self.state, job, verdict(self)

    @property
    def noise(self) -> bool:
        """Whether untrained weights made it."""
        return self.take is not None and self.take.weights.get("kind") == "miniature"


@dataclass(frozen=True)
class Stage:
    """The newest press, and everything else of this browser, newest first."""

    slots: Sequence[Piece]
    earlier: Sequence[Piece]


def stage(jobs: Iterable[Job], takes: Sequence[Take]) -> Stage:
    """Sort jobs and takes of one browser.

    The server forgets jobs when it restarts; their takes then stand for them. Of several pieces of one press
    and one engine, the first is the original and the others made it again.
    """
    pieces = _pieces(jobs, takes)
    originals: dict[tuple[str, str], Piece] = {}
    for piece in pieces:
        first = originals.setdefault((piece.order.group, piece.order.engine), piece)
        if first is not piece:
            first.again.append(piece)
    newest = max(
        (first for first in originals.values() if first.order.group),
        key=lambda first: (first.created, first.order.group),
        default=None,
    )
    slots = [p for p in originals.values() if newest and p.order.group == newest.order.group]
    shown = {id(slot) for slot in slots}
    earlier = [p for p in reversed(pieces) if id(p) not in shown and (p.take or not p.over)]
    return Stage(slots, earlier)


def _pieces(jobs: Iterable[Job], takes: Sequence[Take]) -> list[Piece]:
    """Oldest first. A job whose take was deleted is gone with it."""
    there = {take.id for take in takes}
    mine = [
        Piece(job.order, job.created, job, job.take)
        for job in jobs
        if job.take is None or job.take.id in there
    ]
    covered = {piece.take.id for piece in mine if piece.take}
    alone = [Piece(t.order, t.made.timestamp(), take=t) for t in takes if t.id not in covered]
    return sorted([*mine, *alone], key=lambda piece: piece.created)


def verdict(original: Piece) -> tuple[Verdict, str] | None:
    """What came of making it again the last time, in a sentence."""
    if not original.again or original.take is None:
        return None
    latest = original.again[-1]
    if latest.take is None:
        if latest.over:
            assert latest.job is not None
            return "failed", f"It could not be made again: {latest.job.reason}"
        return "busy", "Making it again from its record …"
    if latest.take.media[0]["sha256"] == original.take.media[0]["sha256"]:
        return "same", "Made again: bitwise identical."
    return "other", "Made again: it differs from the first; Details says what this engine promises."
