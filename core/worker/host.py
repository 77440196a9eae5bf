"""Inside the worker: leases an engine, runs a job, reports events. One job at a time.

The same `Host` runs in a child process (`main`) and inline: in a test, a script or a ZeroGPU Space.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from core import __version__, weights
from core.card import Card, Checkpoint
from core.catalog import Catalog
from core.engines.base import Cancelled
from core.errors import BadInput, DoesNotFit, SoundstageError
from core.events import Chunk, Event, Failed, Finished, Loading, Preview, Step, Stopped
from core.media import Audio, write_audio
from core.requests import Order, check, parse_options
from core.settings import Settings
from core.worker.devices import Device, ram_available, ram_peak, ram_total, ram_used, reset_ram_peak
from core.worker.memory import Loan, Memory, RanOut, Wanted, in_short, is_out_of_memory
from core.worker.messages import (
    Budget,
    FromWorker,
    JobEvent,
    Pulse,
    Quit,
    RunJob,
    StopJob,
    ToWorker,
    Unload,
)
from core.worker.outputs import save
from core.worker.proof import forget

PULSE_SECONDS = 2.0
TICK_SECONDS = 1.0  # without a message, after which idle engines are looked at
EVENTS_PER_SECOND = 10.0  # of steps; an eye sees no more
LIBRARIES = ("torch", "transformers", "coqui-tts", "f5-tts")  # whose versions go into a take


class JobRun:
    """One job as its engine sees it (`core.engines.base.Run`)."""

    def __init__(self, seed: int, folder: Path, tell: Callable[[Event], None]) -> None:
        self.seed = seed
        self._folder = folder
        self._tell = tell
        self._stop = threading.Event()
        self._told = 0.0
        self._first_step: tuple[float, int] | None = None
        self._chunks = 0
        self.first_audio: float | None = None  # time.perf_counter() of the first chunk

    def ask_to_stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        if self._stop.is_set():
            raise Cancelled

    def step(self, done: int, total: int, note: str = "") -> None:
        self.check()
        now = time.perf_counter()
        if now - self._told < 1 / EVENTS_PER_SECOND and done < total and self._first_step:
            return
        self._told = now
        if self._first_step is None:
            self._first_step = (now, done)
        began, at = self._first_step
        pace = (now - began) / (done - at) if done > at else None
        self._tell(Step(done, total, note, None if pace is None else pace * (total - done)))

    def chunk(self, audio: Audio) -> None:
        self.check()
        if self.first_audio is None:
            self.first_audio = time.perf_counter()
        name = f"chunk-{self._chunks:04d}.wav"
        write_audio(self._folder / name, audio)
        self._tell(Chunk(name, self._chunks, audio.seconds))
        self._chunks += 1

    def preview(self, file: Path) -> None:
        self.check()
        self._tell(Preview(file.name))

    def finishing(self) -> None:
        """The result is there; what is left are its files and pictures."""
        self._tell(Step(1, 1, "Writing files and pictures"))

    def loading(self, note: str, done: int = 0, total: int = 0) -> None:
        """Progress of a download or a load; throttled like steps."""
        self.check()
        now = time.perf_counter()
        if total and done < total and now - self._told < 1 / EVENTS_PER_SECOND:
            return
        self._told = now
        self._tell(Loading(note, done, total))


def seed_everything(seed: int) -> None:
    """Seed every generator that a library may draw from."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Host:
    """Runs jobs, one at a time, and keeps engines loaded between them.

    Args:
        tell: receives what a page wants to know; called from any thread.
    """

    def __init__(self, settings: Settings, tell: Callable[[FromWorker], None]) -> None:
        self._settings = settings
        self._tell = tell
        self._catalog = Catalog(settings.engine_modules)
        self._licences = weights.Licences(settings.home, settings.accept_licences)
        self._running: tuple[str, JobRun] | None = None
        self._stopped_early: set[str] = set()
        self._found: dict[tuple[str, Checkpoint, str, bool], weights.Resolved] = {}
        self._stopping = threading.Lock()
        self._turn = threading.Lock()
        self._warm = False
        self.memory = Memory(settings, self._catalog, tell)
        self.residency = self.memory.residency

    def warm_up(self) -> None:
        """Import torch now. What hinders it is told by each job that needs a device."""
        try:
            _ = self.memory.device
        except Exception:
            traceback.print_exc()
        self._warm = True

    def stop(self, job: str) -> None:
        """Ask a job to stop at its next step, or before it starts."""
        with self._stopping:
            if self._running and self._running[0] == job:
                self._running[1].ask_to_stop()
            else:
                self._stopped_early.add(job)

    def unload(self, engine: str = "", park: bool = False) -> None:
        """Release one engine, or all; with `park` its weights wait in host memory, where there is room."""
        with self._turn:
            if park:
                self.memory.leave_device(engine)
            else:
                self.residency.release_all(engine)

    def set_budget(self, memory: int | None) -> None:
        """Change the memory budget; what no longer fits goes now."""
        with self._turn:
            self.memory.set_budget(memory)

    def tick(self) -> None:
        """Give back what was not used for long."""
        with self._turn:
            self.memory.age()

    def pulse(self) -> Pulse:
        device = self.memory.known_device
        ram, size = ram_used(), device.total() if device else ram_total()
        return Pulse(
            device=device.title if device else "CPU",
            device_name=device.name if device else "cpu",
            device_used=device.used() if device else ram,
            device_total=min(size, self.memory.budget or size),
            device_size=size,
            ram_used=ram,
            ram_total=ram_total(),
            loaded=self.residency.loaded,
            held=self.residency.inventory(),
            device_free=self.memory.free(),
            ram_free=ram_available(),
            ready=self._warm,
            parked=self.residency.parked,
            ram_held=self.residency.held.ram,
            ram_budget=self.memory.ram_budget,
        )

    def run(self, job: RunJob) -> None:
        """Carry out one job. Never raises; the last event is `Finished`, `Failed` or `Stopped`."""
        run = JobRun(job.order.seed, job.folder, lambda event: self._tell(JobEvent(job.job, event)))
        with self._turn:
            with self._stopping:
                self._running = (job.job, run)
                if job.job in self._stopped_early:
                    run.ask_to_stop()
            broken = False
            try:
                last: Event = self._carry_out(job, run)
            except Cancelled:
                last = Stopped()
            except SoundstageError as error:
                trace = traceback.format_exc() if error.__cause__ else ""  # what a library said
                last = Failed(str(error), trace, bad_input=isinstance(error, BadInput))
            except (Exception, SystemExit) as error:  # a library may think it owns the process
                # Formatted here and dropped: a kept traceback would keep the model alive.
                last = Failed(_reason(self._catalog.card(job.order.engine), error), traceback.format_exc())
                broken = True
            finally:
                with self._stopping:
                    self._running = None
                    self._stopped_early.discard(job.job)
            if broken:
                # Whatever state the engine is in now, its next job starts from a fresh one.
                self.residency.release_all(job.order.engine)
        self._tell(self.pulse())  # first: the queue asks at once which engines are loaded now
        self._tell(JobEvent(job.job, last))

    def _carry_out(self, job: RunJob, run: JobRun) -> Finished:
        order = job.order
        card = self._catalog.card(order.engine)
        options = parse_options(card, order.options)
        checkpoint = card.checkpoint(order.request, options).at(order.commits)
        run.loading("Looking for weights" if card.has_weights else "Starting")
        self._refuse_closed(card, checkpoint, order, job.online)
        # First of all: it mends what libraries trip over.
        device = self.memory.device if card.has_weights else None
        found = self._find(card, checkpoint, order.weights, job.online, run)
        check(card, order.request, options, found.folder)
        meter = Meter(device)
        work = self._work(
            Wanted(card, found, card.units(order.request), job.working, order.forced), job, run, meter
        )
        result, where = work.result, work.loan.placement
        if not result.seconds:
            raise SoundstageError(f"{card.name} gave no sound for this text; try another seed or text.")
        memory = meter.read()
        run.finishing()
        media = save(result, job.folder)
        measurements: dict[str, float | int | None] = {
            "load_seconds": round(work.started - work.asked, 4),
            "generate_seconds": round(work.ended - work.started, 4),
            "first_audio_seconds": round((run.first_audio or work.ended) - work.started, 4),
            "audio_seconds": round(result.seconds, 4),
            "real_time_factor": round((work.ended - work.started) / result.seconds, 4),
            "finish_seconds": round(time.perf_counter() - work.ended, 4),
            "units": card.units(order.request),
            "planned_bytes": work.loan.planned,
            **memory,
        }
        origin = {
            "kind": found.kind,
            "repository": found.repository,
            "commit": found.commit,
            "bytes": found.bytes,
            "also": found.also,
            "note": found.note,
        }
        return Finished(
            tuple(media), measurements, origin, {**where.record, "words": work.loan.words}, dict(_versions())
        )

    def _work(self, wanted: Wanted, job: RunJob, run: JobRun, meter: Meter) -> Work:
        """Load and generate. Where memory runs out all the same, with the next placement that needs less.

        While loading that is tried down the whole ladder: another process may have taken what was free. In
        the middle of a job it is tried once, and not where a listener has heard a part already.
        """
        while True:
            try:
                return self._attempt(wanted, job, run, meter)
            except RanOut as error:
                short = error
                forget(short)
            self.residency.release_all(wanted.card.id)
            again = short.loading or (wanted.after is None and not run.first_audio)
            wanted = replace(wanted, forced=None, after=short.placement)
            if not again or not self.memory.can_place(wanted):
                raise DoesNotFit(short.reason)
            run.loading("It ran out of memory; trying a way that needs less")

    def _attempt(self, wanted: Wanted, job: RunJob, run: JobRun, meter: Meter) -> Work:
        card, order = wanted.card, job.order
        run.loading(f"Loading {card.name}")
        asked = time.perf_counter()
        with self.memory.lend(wanted) as loan:
            run.check()
            if card.has_weights:
                seed_everything(order.seed)
            meter.loaded()
            started = time.perf_counter()
            try:
                result = loan.engine.generate(order.request, parse_options(card, order.options), run)
            except Exception as error:
                if is_out_of_memory(error):
                    raise RanOut(loan.placement, _ran_out(card), loading=False) from None
                raise
            return Work(result, loan, asked, started, time.perf_counter())

    def _refuse_closed(self, card: Card, checkpoint: Checkpoint, order: Order, online: bool) -> None:
        """The page asked before the job was queued; since then real weights may have come within reach."""
        if card.weights_licence and card.weights_licence.must_accept:
            plan = weights.plan(card, checkpoint, order.weights, online)
            weights.may_use(card, plan, order.accepted | self._licences.accepted())

    def _find(
        self, card: Card, checkpoint: Checkpoint, choice: str, online: bool, run: JobRun
    ) -> weights.Resolved:
        """The weights' folder; looked up and checked again unless they are loaded at this moment."""
        asked = (card.id, checkpoint, choice, online)
        found = self._found.get(asked)
        if found and found.kind != "folder" and self.residency.holds(card.id, found.folder, found.commit):
            return found
        self._found[asked] = found = weights.resolve(
            card,
            checkpoint,
            choice,
            online=online,
            cache=self._settings.cache,
            package=self._catalog.package(card.id),
            report=run.loading,
        )
        return found


@dataclass(frozen=True)
class Work:
    """What an engine made, and when: seconds of `time.perf_counter`."""

    result: Audio
    loan: Loan
    asked: float
    started: float
    ended: float


class Meter:
    """Memory of one job, in bytes: before, at the peak, after; and what it took beside the weights.

    The last is known only of a device that counts its tensors. Host memory also grows by libraries, by pages
    of mapped files and by what allocators keep.
    """

    def __init__(self, device: Device | None) -> None:
        self._device = device
        self._ram_before = ram_used()
        self._device_before = device.used() if device else None
        self._load_peaks: tuple[int | None, int | None] = (None, None)
        self._loaded = 0
        self._reset()

    def loaded(self) -> None:
        """The engine is loaded, and starts to work."""
        self._load_peaks = self._peaks()
        self._loaded = self._device.used() if self._device else ram_used()
        self._reset()

    def read(self) -> dict[str, int | None]:
        device, (ram, most) = self._device, self._peaks()
        return {
            "ram_before_bytes": self._ram_before,
            "ram_peak_bytes": _most(ram, self._load_peaks[0]),
            "ram_after_bytes": ram_used(),
            "device_before_bytes": self._device_before,
            "device_peak_bytes": _most(most, self._load_peaks[1]) if device else None,
            "device_after_bytes": device.used() if device else None,
            "working_bytes": max(0, most - self._loaded)
            if most and device and device.name != "cpu"
            else None,
        }

    def _reset(self) -> None:
        self._marked = reset_ram_peak()
        if self._device:
            self._device.reset_peak()

    def _peaks(self) -> tuple[int | None, int | None]:
        """Of RAM and of the device since the last reset."""
        return ram_peak() if self._marked else None, self._device.peak() if self._device else None


def _most(*numbers: int | None) -> int | None:
    return max((number for number in numbers if number is not None), default=None)


def _reason(card: Card, error: BaseException) -> str:
    return _ran_out(card) if is_out_of_memory(error) else f"{card.name} failed: {in_short(error)}"


def _ran_out(card: Card) -> str:
    return f"{card.name} ran out of memory; ask for less at once, or choose a smaller checkpoint."


@cache
def _versions() -> dict[str, str]:
    found = {"soundstage": __version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main(pipe: Connection, settings: Settings, log: Path) -> None:
    """The child process: read messages, run jobs, and end when the page ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the page's to handle
    _write_output_to(log)
    sending = threading.Lock()

    def tell(message: FromWorker) -> None:
        with sending, suppress(BrokenPipeError):
            pipe.send(message)

    host = Host(settings, tell)
    todo: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, host, todo), daemon=True).start()
    threading.Thread(target=_beat, args=(host, tell), daemon=True).start()
    host.warm_up()  # while the visitor still types
    tell(host.pulse())
    while not isinstance(message := _next(todo), Quit):
        match message:
            case RunJob():
                # A crash shows the end of the log to this job's visitor, who is not to read of others' jobs.
                os.ftruncate(1, 0)
                host.run(message)
            case Unload(engine, park):
                host.unload(engine, park)
                tell(host.pulse())
            case Budget(memory):
                host.set_budget(memory)
                tell(host.pulse())
            case None:
                host.tick()  # the next beat tells of it
    host.unload()


def _next(todo: queue.SimpleQueue[ToWorker]) -> ToWorker | None:
    """The next message; None where there was none for a while."""
    try:
        return todo.get(timeout=TICK_SECONDS)
    except queue.Empty:
        return None


def _write_output_to(log: Path) -> None:
    """Send what libraries print, and the stack of a crash, to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.enable()


def _listen(pipe: Connection, host: Host, todo: queue.SimpleQueue[ToWorker]) -> None:
    """Stops take effect at once; everything else waits its turn."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # the page is gone, and nobody waits for the job in progress
        if isinstance(message, StopJob):
            host.stop(message.job)
        else:
            todo.put(message)


def _beat(host: Host, tell: Callable[[FromWorker], None]) -> None:
    while True:
        tell(host.pulse())
        time.sleep(PULSE_SECONDS)
