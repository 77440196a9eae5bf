"""The one door: what the page and the command line can ask for."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from filelock import FileLock

from core import takes, weights
from core.card import Ability, Card, Checkpoint, Modality, Options, Strategy
from core.catalog import Catalog
from core.errors import BadInput, DoesNotFit, SoundstageError
from core.events import Finished
from core.forecast import Forecast, in_a_sentence, working_memory
from core.jobs import Job, Jobs
from core.media import room_for
from core.presence import Presence
from core.requests import Order, check, parse_options
from core.settings import Settings
from core.takes import Pace, Take, Takes
from core.worker.footprint import shipped
from core.worker.messages import Held
from core.worker.placement import NAMES, Demand, Room, in_words, plan, size, working_bytes
from core.worker.process import InlineWorker, Pulse, Released, RunJob, State, Worker, WorkerProcess

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0  # a watcher wakes at least this often
SETTLE_SECONDS = 0.15  # events that come together wake a watcher once
TIDY_SECONDS = 1.0  # how often the studio looks for engines whose tab everyone left
ASK_AGAIN_SECONDS = 30.0  # an engine that was asked to go and is still there may be asked again


@dataclass(frozen=True)
class Holding:
    """One engine in memory, for the page. Bytes."""

    engine: str
    name: str
    state: Literal["in use", "loaded", "parked"]
    device_bytes: int
    ram_bytes: int
    idle_seconds: float
    words: str  # where its components are
    kept: str  # why it cannot be unloaded now, in a sentence; empty: it can


@dataclass(frozen=True)
class Status:
    """For the page's header. Bytes."""

    device: str
    memory_used: int
    memory_total: int
    ram_used: int
    ram_total: int
    queue: int
    loaded: tuple[str, ...]  # names of engines
    worker: State
    held: tuple[Holding, ...]  # most recently used first
    memory_free: int  # on the device, within the budget
    ram_free: int
    one_memory: bool  # the device's memory is RAM
    leak: str  # the last release that left something behind, in a sentence
    device_size: int  # all there is, whatever the budget


@dataclass(frozen=True)
class _History:
    """An order's engine and checkpoint, and what earlier takes with them took."""

    card: Card
    checkpoint: Checkpoint
    kind: str  # of weights
    units: float
    pace: Pace | None
    working: int | None  # bytes beside the weights


def _room(pulse: Pulse) -> Room:
    """What could be had if every engine without a job made room."""
    idle = [held for held in pulse.held if held.state != "in use"]
    return Room(
        device=pulse.device_name,
        device_bytes=pulse.device_free + sum(held.device_bytes for held in idle),
        ram_bytes=pulse.ram_free + sum(held.ram_bytes for held in idle),
    )


class Studio:
    """Everything behind the page. One per server; close it at the end."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.catalog = Catalog(self.settings.engine_modules)
        for engine in self.settings.accept_licences:
            self.catalog.card(engine)  # a misspelt name would accept nothing, and nobody would know
        self.hub = weights.Hub()
        self.hub.probe()
        self.takes = Takes(self.settings.takes_folder)
        self.licences = weights.Licences(self.settings.home, self.settings.accept_licences)
        self._presence = Presence(self.settings.leave_seconds)
        self._asked_to_go: dict[str, float] = {}  # engine -> when, time.monotonic()
        self._worker: Worker = (
            InlineWorker(self.settings) if self.settings.inline else WorkerProcess(self.settings)
        )
        self._jobs = Jobs(
            self._worker,
            message=self._message,
            new_folder=self.takes.new_folder,
            keep=self._keep,
            expect=self._expect,
            crowds_out=lambda order: bool(self.forecast(order).unloads),
            patience=self.settings.patience,
            turn_seconds=self.settings.turn_seconds,
            limit=self.settings.jobs_per_visitor,
        )
        self._closed = threading.Event()
        self._tidier = threading.Thread(target=self._tidy, name="tidier", daemon=True)
        self._tidier.start()

    def close(self) -> None:
        self._closed.set()
        self._worker.close()
        self._tidier.join(2)
        self.takes.close()

    # Engines and weights

    def cards(self, modality: Modality | None = None) -> list[Card]:
        return self.catalog.cards(modality)

    def online(self) -> bool:
        """Whether the hub answers, as last probed; waits for the first probe at most 2 s."""
        return self.hub.online()

    def weights_plan(
        self, card: Card, checkpoint: Checkpoint | None = None, choice: str | None = None
    ) -> weights.Plan:
        """Which weights would be used now; raises BadInput or WeightsError if none can be."""
        choice = choice or self.settings.weights
        checkpoint = checkpoint or card.checkpoints[0]
        online = self._asks_hub(card, choice)
        size = self.hub.size(checkpoint) if online else None
        return weights.plan(card, checkpoint, choice, online, size=size)

    def _asks_hub(self, card: Card, choice: str) -> bool:
        """Whether the hub answers; not asked, and so not waited for, where it plays no part."""
        return card.has_weights and choice in ("auto", "hub") and self.hub.online()

    # Jobs

    def check(self, order: Order) -> None:
        """Refuse what cannot be done, in one sentence, before anything is queued or loaded.

        Raises:
            BadInput: the request or an option is wrong for this engine.
            LicenceNeeded: the weights' licence has to be accepted first.
            WeightsError: there are no weights to use.
        """
        card, options = self._parse(order)
        check(card, order.request, options)
        checkpoint = card.checkpoint(order.request, options).at(order.commits)
        plan = self.weights_plan(card, checkpoint, order.weights)
        weights.may_use(card, plan, order.accepted | self.licences.accepted())

    def _parse(self, order: Order) -> tuple[Card, Options]:
        card = self.catalog.card(order.engine)
        return card, parse_options(card, order.options)

    def submit(self, orders: Sequence[Order], visitor: str) -> list[Job]:
        """Queue orders, all or none; raises what `check` raises."""
        if not orders:
            raise BadInput("No engine is chosen; choose at least one.")
        orders = [self._without_idle_voice(order) for order in orders]
        for order in orders:
            self.check(order)
        return self._jobs.submit(orders, visitor)

    def _without_idle_voice(self, order: Order) -> Order:
        """A recording is kept only where it is heard: an engine that cannot clone gets none."""
        if order.request.voice is None or Ability.CLONE in self.catalog.card(order.engine).abilities:
            return order
        unheard = {"voice": None, "voice_text": "", "consent": False}
        return order.model_copy(update={"request": order.request.model_copy(update=unheard)})

    def again(self, take_id: str, visitor: str) -> Job:
        """Make a take again from its own record: same request, options, seed and weights."""
        take = self.take(take_id, visitor)
        order = self.takes.order_of(take)
        if take.weights["kind"] in ("miniature", "hub"):
            pins = {take.weights["repository"]: take.weights["commit"], **take.weights["also"]}
            commits = pins if take.weights["kind"] == "hub" else {}
            order = order.model_copy(update={"weights": take.weights["kind"], "commits": commits})
        return self.submit([order], visitor)[0]

    def stop(self, visitor: str, job_id: str | None = None) -> int:
        return self._jobs.stop(visitor, job_id)

    def jobs(self, visitor: str) -> list[Job]:
        return self._jobs.of(visitor)

    def job_file(self, job_id: str, visitor: str, name: str) -> Path:
        """A file that a running job has written so far."""
        job = self._jobs.get(job_id, visitor)
        folder = job.take.folder if job.take else job.folder
        file = folder / Path(name).name if folder else None
        if file is None or not file.is_file():
            raise BadInput("There is no such file.")
        return file

    async def changes(self, visitor: str) -> AsyncIterator[None]:
        """Yields at once, then whenever a job of this visitor may look different, and every 2 s."""
        loop, wake = asyncio.get_running_loop(), asyncio.Event()
        undo = self._jobs.listen(visitor, lambda: loop.call_soon_threadsafe(wake.set))
        try:
            while True:
                wake.clear()
                yield
                try:
                    await asyncio.wait_for(wake.wait(), HEARTBEAT_SECONDS)
                    await asyncio.sleep(SETTLE_SECONDS)
                except TimeoutError:
                    pass
        finally:
            undo()

    def wait(self, job: Job, tick: Callable[[Job], object] | None = None, interval: float = 0.1) -> Job:
        """Block until a job is over, calling `tick(job)` every `interval` seconds: for the command line."""
        while not job.over:
            if tick:
                tick(job)
            time.sleep(interval)
        return job

    def _message(self, job: Job) -> RunJob:
        """What the worker is told of a job: it asks neither the hub nor the takes by itself."""
        assert job.folder is not None
        card = self.catalog.card(job.order.engine)
        online = self._asks_hub(card, job.order.weights)
        return RunJob(job.id, job.order, job.folder, online, self._history(job.order).working)

    def _history(self, order: Order) -> _History:
        """What earlier takes with the same engine, weights and device tell about an order."""
        card, options = self._parse(order)
        checkpoint = card.checkpoint(order.request, options)
        kind = self.weights_plan(card, checkpoint, order.weights).kind
        kind = "hub" if kind == "download" else kind
        pulse = self._worker.pulse
        device = pulse.device_name if pulse and card.has_weights else "cpu"
        like = (card.id, checkpoint.repository, device, kind)
        units = card.units(order.request)
        working = working_memory(self.takes.peaks(*like), units) if card.has_weights else None
        return _History(card, checkpoint, kind, units, self.takes.pace(*like), working)

    def _expect(self, order: Order) -> float | None:
        """Seconds this order will take, from earlier takes like it; None where there are none."""
        past = self._history(order)
        if past.pace is None:
            return None
        pulse = self._worker.pulse
        loading = 0.0 if pulse and past.card.id in pulse.loaded else past.pace.load_seconds
        return loading + past.pace.seconds_per_unit * past.units

    def forecast(self, order: Order) -> Forecast:
        """What this order will need: memory, whose room it takes, download and time, as far as known.

        Raises:
            BadInput, WeightsError: as `check`.
        """
        past = self._history(order)
        card, pulse = past.card, self._worker.pulse
        source = self.weights_plan(card, past.checkpoint, order.weights)
        told = Forecast(
            card.name,
            seconds=self._expect(order),
            download_bytes=self.hub.size(past.checkpoint) if source.kind == "download" else None,
        )
        if not card.has_weights or pulse is None or not pulse.ready:
            return told
        told = replace(told, free_bytes=pulse.device_free, loaded=card.id in pulse.loaded)
        if told.loaded:
            return told
        components = shipped(self.catalog.folder(card.id)).get(past.checkpoint.repository)
        if (
            past.kind != "hub" or components is None
        ):  # a miniature or a folder: what it took before, if it ran
            need, words = past.pace.planned_bytes if past.pace else None, ""
        else:
            working = past.working or working_bytes(card, components, past.units)
            try:
                rung = plan(Demand(card, components, working), _room(pulse), order.forced)
            except DoesNotFit as error:
                return replace(told, refusal=str(error))
            need, words = rung.device_bytes or rung.ram_bytes, in_words(rung.placement, components)
        return replace(told, device_bytes=need, words=words, unloads=self._crowded_out(need or 0, pulse))

    def forecast_line(self, orders: Sequence[Order]) -> str:
        """What one press with these orders will cost, in a sentence; "" where nothing is known of it."""
        try:
            return in_a_sentence([self.forecast(order) for order in orders])
        except SoundstageError:
            return ""  # the press itself says what is wrong

    def _crowded_out(self, need: int, pulse: Pulse) -> tuple[str, ...]:
        """Names of the engines that have to make room, the longest idle first."""
        free, gone = pulse.device_free, []
        for held in sorted(pulse.held, key=lambda held: -held.idle_seconds):
            if free >= need:
                break
            if held.state == "loaded":
                free += held.device_bytes
                gone.append(self.catalog.card(held.engine).name)
        return tuple(gone)

    # Takes

    def _keep(self, job: Job, finished: Finished) -> Take:
        card, _ = self._parse(job.order)
        licence = card.weights_licence
        assert job.folder is not None
        take = Take(
            engine=card.id,
            modality=card.modality,
            order=job.order,
            weights=finished.weights,
            media=list(finished.media),
            measurements={
                **finished.measurements,
                "queue_seconds": round((job.started or 0) - job.created, 4),
            },
            placement=finished.placement,
            versions=finished.versions,
            group=job.order.group,
            licences={
                "code": card.code_licence.name,
                "weights": licence.name if licence else "",
                "commercial": licence is None or licence.commercial,
            },
        )
        for chunk in job.chunks:
            (job.folder / chunk.file).unlink(missing_ok=True)
        return self.takes.keep(job.folder, take, job.visitor)

    def take(self, take_id: str, visitor: str) -> Take:
        return self.takes.get(take_id, owner=visitor)

    def list_takes(
        self, visitor: str | None = None, modality: Modality | None = None, limit: int = 50
    ) -> list[Take]:
        """Newest first; `visitor=None` lists everyone's, for the operator's command line."""
        return self.takes.list(owner=visitor, modality=modality, limit=limit)

    def delete(self, take_id: str, visitor: str) -> None:
        self.takes.delete(take_id, visitor)

    def export_zip(self, take_ids: Sequence[str], visitor: str, file: Path) -> Path:
        takes.export_zip([self.take(i, visitor) for i in take_ids], file)
        return file

    def as_csv(self, take_ids: Sequence[str], visitor: str) -> str:
        return takes.as_csv([self.take(i, visitor) for i in take_ids])

    # Memory

    def unload(self, engine: str = "") -> None:
        """Release one engine's memory, or all; what a job uses or waits for stays."""
        if engine:
            wanted = {engine}
        elif self._jobs.idle:
            wanted = {""}  # all of them: the last pulse may not know of one yet
        else:
            wanted = {held.engine for held in self._held()}
        for one in wanted:
            if not self._jobs.use_of(one):
                self._ask_to_go(one)

    def visit(self, page: str, tab: Modality) -> None:
        """An open page shows this tab: to be said when it opens or changes tabs, and now and then after."""
        self._presence.visit(page, tab)

    def leave(self, page: str) -> None:
        """A page was closed."""
        self._presence.leave(page)

    def placements(self, engines: Iterable[str]) -> dict[Strategy, str]:
        """The ways to run that all of these engines allow, with their names for people.

        Engines without weights have no say.
        """
        cards = [card for card in map(self.catalog.card, engines) if card.has_weights]
        common = [s for s in NAMES if cards and all(s in card.strategies for card in cards)]
        if self._on_cpu:
            common = [strategy for strategy in common if strategy != "cpu"]  # it is resident there
        return {strategy: NAMES[strategy] for strategy in common}

    @property
    def _on_cpu(self) -> bool:
        pulse = self._worker.pulse
        return pulse is None or pulse.device_name == "cpu"

    def _tidy(self) -> None:
        while not self._closed.wait(TIDY_SECONDS):
            try:
                self._give_back_what_was_left()
            except Exception:  # without this thread, nothing would be given back any more
                log.exception("looking for engines to give back failed")

    def _give_back_what_was_left(self) -> None:
        """Let engines go that served only tabs which everyone left, and no job since."""
        left = self._presence.left()
        for held in self._held() if left else ():
            on_device = held.state == "loaded" and (held.device_bytes or not held.ram_bytes)
            unused = on_device and held.idle_seconds >= self.settings.leave_seconds
            if (
                unused
                and self.catalog.card(held.engine).modality in left
                and not self._jobs.use_of(held.engine)
                and held.engine not in self._going()
            ):
                # Its weights wait in host memory, where there is room; one without any has nothing to keep.
                self._ask_to_go(held.engine, park=bool(held.device_bytes))

    def _ask_to_go(self, engine: str, park: bool = False) -> None:
        self._asked_to_go[engine] = time.monotonic()
        self._worker.unload(engine, park)

    def set_budget(self, share: float) -> None:
        """Let engines take at most this share of the device, from now on; what no longer fits goes.

        Raises:
            BadInput: the page's visitors are not the operator (`Settings.operator_page`).
        """
        if not self.settings.operator_page:
            raise BadInput("Only the operator of this server may change its memory budget.")
        pulse = self._worker.pulse
        if pulse:
            self._worker.set_budget(None if share >= 1 else int(share * pulse.device_size))

    def _going(self) -> frozenset[str]:
        """Engines that were asked to go and are still there: a worker at work first ends its job."""
        now, busy = time.monotonic(), self._worker.state == "busy"
        there = {h.engine for h in self._held() if h.state != "parked"}
        for engine, asked in list(self._asked_to_go.items()):
            if engine not in there or (now - asked > ASK_AGAIN_SECONDS and not busy):
                self._asked_to_go.pop(engine, None)
        return frozenset(self._asked_to_go)

    def _held(self) -> tuple[Held, ...]:
        pulse = self._worker.pulse
        return pulse.held if pulse else ()

    def _holding(self, held: Held, going: frozenset[str]) -> Holding:
        use = "running" if held.state == "in use" else self._jobs.use_of(held.engine)
        kept = {"running": "A job is using it.", "waiting": "A job waits for it."}.get(use or "", "")
        if not kept and held.engine in going:
            kept = "It goes as soon as the job in progress is over."
        return Holding(
            engine=held.engine,
            name=self.catalog.card(held.engine).name,
            state=held.state,
            device_bytes=held.device_bytes,
            ram_bytes=held.ram_bytes,
            idle_seconds=held.idle_seconds,
            words=held.words,
            kept=kept,
        )

    def _leak(self) -> str:
        leak = next((r for r in reversed(tuple(self.releases)) if not r.clean), None)
        if leak is None:
            return ""
        what = size(leak.device_bytes_left) if leak.device_bytes_left else f"{leak.alive} of its tensors"
        mended = "" if self.settings.inline else "; the worker was restarted to give that back"
        return f"{self.catalog.card(leak.engine).name} left {what} behind when it was unloaded{mended}."

    # The server

    @property
    def pulse(self) -> Pulse | None:
        """The worker's latest sign of life; None before the first."""
        return self._worker.pulse

    @property
    def releases(self) -> Sequence[Released]:
        """What the worker's latest releases gave back, oldest first."""
        return self._worker.releases

    def status(self) -> Status:
        pulse = self._worker.pulse
        names, going = {card.id: card.name for card in self.cards()}, self._going()
        return Status(
            device=pulse.device if pulse else "",
            memory_used=pulse.device_used if pulse else 0,
            memory_total=pulse.device_total if pulse else 0,
            ram_used=pulse.ram_used if pulse else 0,
            ram_total=pulse.ram_total if pulse else 0,
            queue=self._jobs.waiting,
            loaded=tuple(names.get(e, e) for e in pulse.loaded) if pulse else (),
            worker=self._worker.state,
            held=tuple(self._holding(held, going) for held in self._held()),
            memory_free=pulse.device_free if pulse else 0,
            ram_free=pulse.ram_free if pulse else 0,
            one_memory=pulse is None or pulse.device_name in ("cpu", "mps"),
            leak=self._leak(),
            device_size=pulse.device_size if pulse else 0,
        )

    def secret(self) -> str:
        """A secret of this installation, kept over restarts: the page signs with it what browsers keep."""
        home = self.settings.home
        file = home / "secret"
        with room_for(str(file)), FileLock(home / "secret.lock"):
            if not file.is_file() or not file.stat().st_size:
                handle, partial = tempfile.mkstemp(dir=home)  # which only this user can read
                with os.fdopen(handle, "w") as out:
                    out.write(secrets.token_urlsafe(32))
                Path(partial).replace(file)
            return file.read_text()
