"""The page's side of the worker: start the child process, talk to it, end it when it must be ended."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Literal, Protocol

from core.events import Event, Failed, Finished, Stopped
from core.logs import new_log
from core.settings import Settings
from core.worker.messages import (
    Budget,
    FromWorker,
    JobEvent,
    Pulse,
    Quit,
    Released,
    RunJob,
    StopJob,
    ToWorker,
    Unload,
)

__all__ = ["InlineWorker", "Listener", "Pulse", "Released", "RunJob", "State", "Worker", "WorkerProcess"]

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "busy", "restarting", "closed"]
Listener = Callable[[str, Event], None]  # (job, event)
_TICK = 0.1  # seconds between looks at the deadlines
_SENDS = 2  # times a job is handed to a new process because the last one died before it began
_LONGEST_BACKOFF = 10.0  # seconds
_RELEASES = 50  # remembered, to be shown
_LOG_TAIL = 12_000  # bytes of its output that go into a failure's detail; a crash lists modules at length


class Worker(Protocol):
    """Runs one job at a time; the page's jobs know nothing else of it."""

    @property
    def state(self) -> State: ...
    @property
    def pulse(self) -> Pulse | None: ...
    @property
    def releases(self) -> Sequence[Released]: ...  # the latest, oldest first
    def start(self, listener: Listener) -> None: ...
    def run(self, message: RunJob) -> None: ...
    def stop(self, job: str) -> None: ...
    def unload(self, engine: str = "", park: bool = False) -> None: ...
    def set_budget(self, memory: int | None) -> None: ...
    def close(self) -> None: ...


@dataclass
class _Current:
    message: RunJob
    heard: float  # time.monotonic() of its last event
    begun: bool = False  # the process has said something about it
    sent: int = 1
    stop_asked: float | None = None

    @property
    def job(self) -> str:
        return self.message.job


class WorkerProcess:
    """A child process that imports torch, watched by one thread.

    A job ends with exactly one of `Finished`, `Failed` and `Stopped`, whatever becomes of the process: a
    crash, a kill from outside, a hang and an ignored stop are told as what they are, and a new process
    takes over.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._context = multiprocessing.get_context("spawn")
        self._lock = threading.RLock()
        self._listener: Listener = lambda job, event: None
        self._current: _Current | None = None
        self._leaky = False
        self._early_deaths = 0  # in a row, before the process was ready
        self._closing = False
        self.state: State = "starting"
        self.pulse: Pulse | None = None
        self.releases: deque[Released] = deque(maxlen=_RELEASES)
        self.restarts = 0

    def start(self, listener: Listener) -> None:
        """Start the process; returns at once."""
        self._listener = listener
        self._log = new_log(self._settings.home, "worker")
        self._spawn()
        self._watcher = threading.Thread(target=self._watch, name="worker-watch", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def run(self, message: RunJob) -> None:
        """Begin a job; its events come to the listener. Only one may run at a time."""
        with self._lock:
            assert self._current is None, "the worker runs one job at a time"
            current = _Current(message, time.monotonic())
            self._send(current.message)
            self._current = current
            if self.state == "ready":
                self.state = "busy"

    def stop(self, job: str) -> None:
        """Ask the running job to stop; it is killed if it does not within the grace."""
        with self._lock:
            current = self._current
            if current is None or current.job != job or current.stop_asked is not None:
                return
            current.stop_asked = time.monotonic()
            self._send(StopJob(job))
            if current.begun or self.state == "busy":
                return
            self._current = None
        # The process is still starting: it drops the job when it gets there, and nobody waits for that.
        self._listener(job, Stopped())

    def unload(self, engine: str = "", park: bool = False) -> None:
        """Let one engine go, or all; with `park` it keeps its weights in host memory, where there is room."""
        with self._lock:
            self._send(Unload(engine, park))

    def set_budget(self, memory: int | None) -> None:
        """Change the memory budget, for this process and for those that may replace it."""
        with self._lock:
            self._settings = self._settings.model_copy(update={"memory_budget": memory})
            self._send(Budget(memory))

    def close(self) -> None:
        """End the process: politely, then not."""
        with self._lock:
            self._closing = True
            self.state = "closed"
            if self._current:
                self._send(StopJob(self._current.job))
            self._send(Quit())
        self._process.join(2)
        self._process.kill()
        self._process.join()
        self._watcher.join(2)
        self._pipe.close()

    def _send(self, message: ToWorker) -> None:
        with suppress(OSError):  # the process is gone; the watcher says so and starts another
            self._pipe.send(message)

    def _spawn(self) -> None:
        from core.worker import _child

        self._pipe, child_end = self._context.Pipe()
        self._process = self._context.Process(
            target=_child.run,
            args=(child_end, self._settings, self._log),
            name="soundstage-worker",
            daemon=True,
        )
        self._process.start()
        child_end.close()
        self._beat = time.monotonic()

    def _watch(self) -> None:
        while not self._closing:
            try:
                self._look()
            except Exception:  # without this thread, every job to come would wait for ever
                log.exception("watching the worker process failed")
                time.sleep(_TICK)

    def _look(self) -> None:
        """Wait a moment for messages, and for what may have become of the process."""
        pipe, process = self._pipe, self._process
        with suppress(OSError):  # the pipe is closed: `_read` finds that too
            wait([pipe, process.sentinel], timeout=_TICK)
        gone = not self._read(pipe)
        if self._closing:
            return
        if gone or not process.is_alive():
            process.join(1)
            self._replace(self._cause_of_death(process.exitcode))
        elif verdict := self._overdue():
            process.kill()
            process.join()
            self._read(pipe)
            self._replace(verdict)

    def _read(self, pipe: Connection) -> bool:
        """Take in all messages there are; False once the other end is closed."""
        try:
            while pipe.poll():
                self._hear(pipe.recv())
        except (EOFError, OSError):
            return False
        return True

    def _hear(self, message: FromWorker) -> None:
        self._beat = time.monotonic()
        if isinstance(message, Pulse):
            self.pulse = message
            with self._lock:
                if message.ready:
                    self._early_deaths = 0
                    if self.state in ("starting", "restarting"):
                        self.state = "busy" if self._current else "ready"
                        if self._current:
                            self._current.heard = self._beat  # the job's own time begins now
        elif isinstance(message, Released):
            with self._lock:
                self.releases.append(message)
                self._leaky = self._leaky or not message.clean
                self._end_leaky()
        elif isinstance(message, JobEvent):
            self._hear_event(message.job, message.event)

    def _hear_event(self, job: str, event: Event) -> None:
        with self._lock:
            if not self._current or self._current.job != job:
                return
            self._current.heard = time.monotonic()
            self._current.begun = True
            last = isinstance(event, Finished | Failed | Stopped)
            if last:
                self._current = None
                if self.state == "busy":
                    self.state = "ready"
                self._end_leaky()
        self._listener(job, event)

    def _end_leaky(self) -> None:
        """A release left something behind: only a new process gives that memory back."""
        if self._leaky and self._current is None:
            self._process.kill()

    def _overdue(self) -> Event | None:
        """Why the process has to be ended, if it has."""
        now, current, settings = time.monotonic(), self._current, self._settings
        if current and current.stop_asked and now - current.stop_asked > settings.cancel_grace:
            return Stopped(
                f"It did not stop within {settings.cancel_grace:g} s, so its process was ended and replaced."
            )
        if current and self.state == "busy" and now - current.heard > settings.silence_limit:
            return Failed(
                f"There was no step for {settings.silence_limit:g} s, so its process was ended and replaced."
            )
        # One import may hold the process for long on a slow disk, and starting over would not be faster.
        starting = self.state in ("starting", "restarting")
        limit = settings.start_limit if starting else settings.heartbeat_limit
        if now - self._beat > limit:
            return Failed(f"The worker gave no sign of life for {limit:g} s, so it was replaced.")
        return None

    def _cause_of_death(self, code: int | None) -> Event:
        with self._lock:
            if self._current and self._current.stop_asked:
                return Stopped()
        if code == -signal.SIGKILL:
            reason = "The worker process was killed, most likely because the machine ran out of memory."
        elif code is not None and code < 0:
            names = {number.value: number.name for number in signal.Signals}
            reason = f"The worker process crashed ({names.get(-code, f'signal {-code}')})."
        else:
            reason = f"The worker process ended by itself (exit code {code})."
        return Failed(reason, self._log_tail())

    def _log_tail(self) -> str:
        try:
            return self._log.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
        except OSError:
            return ""

    def _replace(self, verdict: Event) -> None:
        """Start a new process, and only then tell the job's end: the next job finds it there."""
        with self._lock:
            self._pipe.close()
            self.pulse = None
            self.state = "restarting"
            self._leaky = False
            lost = self._current
            if lost and not lost.begun and not lost.stop_asked and lost.sent <= _SENDS:
                lost = None  # the process died before it took the job up; the next one gets it
            else:
                self._current = None
        while not self._start_again():
            pass
        if lost:
            self._listener(lost.job, verdict)

    def _start_again(self) -> bool:
        """Spawn, and hand over a job that waits for it; False if the system has no process to give."""
        self._early_deaths += 1  # back to 0 at the first ready pulse
        if self._early_deaths > 1:
            # A process that cannot even start must not be started in a tight loop.
            time.sleep(min(_LONGEST_BACKOFF, 2.0 ** min(self._early_deaths - 2, 8)))
        with self._lock:
            if self._closing:
                return True
            self.restarts += 1
            try:
                self._spawn()
            except OSError as error:
                log.error("a new worker process cannot be started: %s", error)
                return False
            if self._current:
                self._current.sent += 1
                self._current.heard = time.monotonic()
                self._send(self._current.message)
        return True


class InlineWorker:
    """The same host in this process, for the command line and for a ZeroGPU Space, which forks by itself."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._job = ""
        self._thread: threading.Thread | None = None
        self.state: State = "ready"
        self.releases: deque[Released] = deque(maxlen=_RELEASES)

    def start(self, listener: Listener) -> None:
        from core.worker.host import Host

        def hear(message: FromWorker) -> None:
            if isinstance(message, JobEvent):
                if isinstance(message.event, Finished | Failed | Stopped):
                    self.state = "ready"
                listener(message.job, message.event)
            elif isinstance(message, Released):
                self.releases.append(message)

        self._host = Host(self._settings, hear)

    @property
    def pulse(self) -> Pulse | None:
        return self._host.pulse()

    def run(self, message: RunJob) -> None:
        self.state = "busy"
        self._job = message.job
        self._thread = threading.Thread(target=self._host.run, args=(message,), daemon=True)
        self._thread.start()

    def stop(self, job: str) -> None:
        self._host.stop(job)

    def unload(self, engine: str = "", park: bool = False) -> None:
        self._host.unload(engine, park)

    def set_budget(self, memory: int | None) -> None:
        self._host.set_budget(memory)

    def close(self) -> None:
        """Stop the job in progress. One that does not heed it within the grace is left to end by itself."""
        self.state = "closed"
        if self._thread:
            self._host.stop(self._job)
            self._thread.join(self._settings.cancel_grace)
            if self._thread.is_alive():
                return
        self._host.unload()
