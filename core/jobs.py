"""The queue: submit, watch, cancel. Jobs belong to the server; a page that reloads finds them again."""

from __future__ import annotations

import itertools
import logging
import secrets
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.errors import BadInput, SoundstageError
from core.events import Chunk, Done, Event, Failed, Finished, Loading, Queued, Step, Stopped
from core.requests import Order
from core.takes import Take
from core.worker.process import RunJob, Worker

log = logging.getLogger(__name__)

State = Literal["queued", "loading", "running", "done", "failed", "stopped"]
ENDED: frozenset[State] = frozenset({"done", "failed", "stopped"})
KEPT_PER_VISITOR = 40  # ended jobs that a reload finds; their takes stay on disk
KEPT_IN_ALL = 500  # each holds about 60 kB, most of it the peaks of its take


@dataclass(eq=False)
class Job:
    """A request on its way."""

    id: str
    visitor: str
    order: Order
    state: State = "queued"
    position: int = 0  # in the queue; 0 is next
    event: Event = field(default_factory=lambda: Queued(0))  # the latest
    chunks: list[Chunk] = field(default_factory=list)
    take: Take | None = None
    reason: str = ""  # why it failed or stopped, in a sentence
    detail: str = ""  # a failure's trace or log, for the details fold
    folder: Path | None = None  # its files while it runs
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    expected: float | None = None  # seconds from start to end, from earlier takes
    passed_over: int = 0  # times a later job went first because its engine was loaded

    @property
    def over(self) -> bool:
        return self.state in ENDED

    @property
    def note(self) -> str:
        """What happens now, in a few words."""
        match self.event:
            case Loading(note=note) | Step(note=note):
                return note
        return ""

    @property
    def fraction(self) -> float | None:
        """Share of the present stage that is done, 0 to 1; None where there is no measure."""
        match self.event:
            case Loading(done=done, total=total) | Step(done=done, total=total) if total:
                return min(1.0, done / total)
        return None

    @property
    def seconds_left(self) -> float | None:
        """From the pace of its own steps; before there is one, from earlier takes."""
        if isinstance(self.event, Step) and self.event.seconds_left is not None:
            return self.event.seconds_left
        if self.over or self.expected is None:
            return None
        return max(0.0, self.expected - (time.time() - self.started if self.started else 0.0))


def line_up(waiting: Sequence[Job], turns: Mapping[str, int]) -> list[Job]:
    """Waiting jobs in the order of fairness: visitors take turns, each with its own jobs by arrival.

    Args:
        waiting: by arrival.
        turns: visitor -> number of the turn it was last served in; a newcomer has that of its arrival, so
            that no stream of newcomers keeps those waiting who were there before.
    """
    rounds: Counter[str] = Counter()
    places: dict[str, tuple[int, int]] = {}
    for job in waiting:
        places[job.id] = (rounds[job.visitor], turns[job.visitor])
        rounds[job.visitor] += 1
    return sorted(waiting, key=lambda job: places[job.id])


def choose(line: Sequence[Job], loaded: Sequence[str], patience: int) -> tuple[Job, list[Job]]:
    """Which job goes next, and which ones it passes over.

    A job whose engine is loaded may go before its turn, but not before another one of its visitor, and not
    where a job would be passed over more than `patience` times.

    Args:
        line: from `line_up`.
        loaded: engine ids.
    """
    heads = line[: len({job.visitor for job in line})]  # the first round: one of each visitor
    for place, job in enumerate(heads):
        if job.order.engine in loaded:
            return job, list(heads[:place])
        if job.passed_over >= patience:
            break
    return heads[0], []


class Jobs:
    """One worker's queue.

    Args:
        worker: runs the jobs, one at a time.
        message: what the worker is told of a job whose turn it is.
        expect: seconds an order will take, as far as earlier takes tell; None where they do not.
        crowds_out: whether an order needs the room of an engine that is loaded.
        new_folder: makes a job's private folder.
        keep: makes a take of a finished job.
        patience: times a job may be passed over for a loaded engine.
        turn_seconds: how long the engine of a visitor who was just served stays for their next job, before
            that of another visitor crowds it out.
        limit: waiting jobs one visitor may have.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        message: Callable[[Job], RunJob],
        expect: Callable[[Order], float | None],
        new_folder: Callable[[str], Path],
        keep: Callable[[Job, Finished], Take],
        crowds_out: Callable[[Order], bool] = lambda order: False,
        patience: int,
        turn_seconds: float = 0.0,
        limit: int,
    ) -> None:
        self._worker = worker
        self._message = message
        self._expect = expect
        self._crowds_out = crowds_out
        self._new_folder = new_folder
        self._keep = keep
        self._patience = patience
        self._turn_seconds = turn_seconds
        self._limit = limit
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}  # by arrival
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._served: Job | None = None  # the last one that ran
        self._held: threading.Timer | None = None  # until its turn is over
        self._turns: dict[str, int] = {}
        self._turn = itertools.count()
        self._listeners: dict[str, list[Callable[[], object]]] = defaultdict(list)
        worker.start(self._hear)

    def submit(self, orders: Sequence[Order], visitor: str) -> list[Job]:
        """Queue orders of one visitor, all or none.

        Raises:
            BadInput: the visitor has too many waiting jobs.
        """
        jobs = [
            Job(secrets.token_urlsafe(16), visitor, order, expected=self._foretell(order)) for order in orders
        ]
        with self._lock:
            mine = sum(job.visitor == visitor for job in self._waiting)
            if mine + len(orders) > self._limit:
                raise BadInput(
                    f"At most {self._limit} of your jobs may wait at once: {mine} waiting, "
                    f"{len(orders)} asked for; stop some, or ask for fewer."
                )
            self._turns.setdefault(visitor, next(self._turn))
            self._jobs.update((job.id, job) for job in jobs)
            self._waiting += jobs
            self._dispatch()
        self._tell_everyone()
        return jobs

    def stop(self, visitor: str, job_id: str | None = None) -> int:
        """Stop one job of this visitor, or all of them; returns how many were told to."""
        with self._lock:
            mine = [
                job for job in self._jobs.values()
                if job.visitor == visitor and not job.over and job_id in (None, job.id)
            ]  # fmt: skip
            for job in reversed(mine):  # the running one last, or the next of them would take its place
                if job in self._waiting:
                    self._waiting.remove(job)
                    self._end(job, Stopped())
                else:
                    self._worker.stop(job.id)
            self._dispatch()
        self._tell_everyone()
        return len(mine)

    def of(self, visitor: str) -> list[Job]:
        """This visitor's jobs, oldest first: waiting, running, and the latest that ended."""
        with self._lock:
            return [job for job in self._jobs.values() if job.visitor == visitor]

    def get(self, job_id: str, visitor: str) -> Job:
        """One job; another visitor's is as absent as one that never was."""
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None or job.visitor != visitor:
            raise BadInput("There is no such job.")
        return job

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        with self._lock:
            return self._running is None and not self._waiting

    def use_of(self, engine: str) -> Literal["running", "waiting"] | None:
        """Whether a job runs on this engine, or waits for it."""
        with self._lock:
            if self._running and self._running.order.engine == engine:
                return "running"
            return "waiting" if any(job.order.engine == engine for job in self._waiting) else None

    def listen(self, visitor: str, callback: Callable[[], object]) -> Callable[[], None]:
        """Call `callback`, from any thread, whenever a job of this visitor may look different.

        Returns:
            A function that ends it.
        """
        with self._lock:
            self._listeners[visitor].append(callback)

        def undo() -> None:
            with self._lock:
                self._listeners[visitor].remove(callback)
                if not self._listeners[visitor]:
                    del self._listeners[visitor]

        return undo

    def _dispatch(self) -> None:
        """Hand the worker its next job, if it is free and one waits. Called with the lock held."""
        while self._running is None and self._waiting:
            pulse = self._worker.pulse
            line = line_up(self._waiting, self._turns)
            job, passed = choose(line, pulse.loaded if pulse else (), self._patience)
            if self._holds_turn(job):
                break
            for other in passed:
                other.passed_over += 1
            self._waiting.remove(job)
            self._turns[job.visitor] = next(self._turn)
            try:
                self._begin(job)
            except SoundstageError as error:
                self._end(job, Failed(str(error)))
            except Exception as error:  # one job's fault must not end the queue
                log.exception("could not start job %s", job.id)
                self._end(job, Failed(f"The job could not be started: {error}"))
        wait = self._running.seconds_left if self._running else None
        for place, job in enumerate(line_up(self._waiting, self._turns)):
            job.position = place
            job.event = Queued(place, wait)
            wait = None if wait is None or job.expected is None else wait + job.expected

    def _holds_turn(self, job: Job) -> bool:
        """Whether this job waits a moment, since the visitor served before it may have more for that engine.

        Without it, two visitors who answer each result with their next press would have two large engines
        change places at every job.
        """
        served = self._served
        if served is None or served.visitor == job.visitor or job.passed_over >= self._patience:
            return False
        left = self._turn_seconds - (time.time() - (served.ended or 0.0))
        if left <= 0 or not self._crowds_out(job.order):
            return False
        if self._held is None:
            self._held = threading.Timer(left, self._end_turn)
            self._held.daemon = True
            self._held.start()
        return True

    def _end_turn(self) -> None:
        with self._lock:
            self._held = None
            self._dispatch()
        self._tell_everyone()

    def _begin(self, job: Job) -> None:
        job.folder = self._new_folder(job.id)
        job.expected = self._foretell(job.order)
        message = self._message(job)
        job.started = time.time()
        job.state = "loading"
        job.event = Loading("Starting")
        self._running = job
        try:
            self._worker.run(message)
        except BaseException:
            self._running = None
            raise

    def _foretell(self, order: Order) -> float | None:
        """A forecast is a courtesy: a job goes its way without one."""
        try:
            return self._expect(order)
        except Exception as error:
            log.warning("no forecast for a job of %s: %s", order.engine, error)
            return None

    def _hear(self, job_id: str, event: Event) -> None:
        """The worker's word on the running job."""
        with self._lock:
            job = self._running
            if job is None or job.id != job_id:
                return
        if isinstance(event, Finished | Failed | Stopped):
            end = self._finish(job, event) if isinstance(event, Finished) else event
            with self._lock:
                self._end(job, end)
                self._running, self._served = None, job
                self._dispatch()
            self._tell_everyone()
            return
        with self._lock:
            if isinstance(event, Chunk):
                job.chunks.append(event)
            else:
                job.event = event
                job.state = "loading" if isinstance(event, Loading) else "running"
        self._tell(job.visitor)

    def _finish(self, job: Job, finished: Finished) -> Done | Failed:
        try:
            job.take = self._keep(job, finished)
        except SoundstageError as error:
            return Failed(str(error))
        except Exception as error:
            log.exception("could not keep the take of job %s", job.id)
            return Failed(f"The result could not be kept: {error}")
        return Done(job.take.id)

    def _end(self, job: Job, event: Done | Failed | Stopped) -> None:
        if not isinstance(event, Done) and job.folder:
            shutil.rmtree(job.folder, ignore_errors=True)  # first: a job that is over has left nothing
        job.event = event
        job.ended = time.time()
        if isinstance(event, Failed | Stopped):
            job.reason = event.reason
            job.detail = event.detail if isinstance(event, Failed) else ""
        # Last, because others read a job without the lock once it is over.
        job.state = (
            "done" if isinstance(event, Done) else "failed" if isinstance(event, Failed) else "stopped"
        )
        self._forget_old(job.visitor)

    def _forget_old(self, visitor: str) -> None:
        ended = [job for job in self._jobs.values() if job.over]
        mine = [job for job in ended if job.visitor == visitor]
        for job in {j.id: j for j in (*mine[:-KEPT_PER_VISITOR], *ended[:-KEPT_IN_ALL])}:
            del self._jobs[job]
        if len(self._turns) > KEPT_IN_ALL:
            present = {job.visitor for job in self._jobs.values()}
            self._turns = {v: turn for v, turn in self._turns.items() if v in present}

    def _tell(self, visitor: str) -> None:
        with self._lock:
            callbacks = list(self._listeners.get(visitor, ()))
        for callback in callbacks:
            try:
                callback()
            except Exception:  # a watcher's fault, such as an event loop that was closed, is not the queue's
                log.exception("a watcher of jobs failed")

    def _tell_everyone(self) -> None:
        """Positions changed."""
        with self._lock:
            visitors = list(self._listeners)
        for visitor in visitors:
            self._tell(visitor)
