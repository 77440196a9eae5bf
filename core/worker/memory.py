"""Which engines are in memory, and where: measures, plans, loads, lends, and lets go."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from core.card import Card, Strategy
from core.catalog import Catalog
from core.engines.base import Cancelled, Engine, Placement
from core.errors import DoesNotFit, SoundstageError, WeightsError
from core.settings import Settings
from core.weights import Resolved
from core.worker import footprint, placement
from core.worker.arrange import Arrangement
from core.worker.devices import Device, ram_available, ram_total
from core.worker.footprint import Component, Footprint
from core.worker.messages import FromWorker
from core.worker.placement import Demand, Room, Rung
from core.worker.residency import Bytes, Claim, Key, Limits, NoRoom, Residency

_REASON_LENGTH = 300  # characters of what a library said
_RAM_SHARE = 0.6  # of the machine's, for engines: the page, the libraries and files being read need the rest

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Wanted:
    """What a job needs of an engine."""

    card: Card
    found: Resolved
    units: float  # size of its request (`Card.units`)
    working: int | None = None  # bytes beside the weights, from earlier takes
    forced: Strategy | None = None
    after: Placement | None = None  # this one failed: only what needs less


@dataclass(frozen=True)
class Loan:
    engine: Engine
    placement: Placement
    words: str  # where its components are, for people
    planned: int  # bytes on its device


class RanOut(Exception):
    """Memory ran out although the plan fitted: something else takes it, or the plan was too hopeful."""

    def __init__(self, placement: Placement, reason: str, *, loading: bool) -> None:
        super().__init__(reason)
        self.placement = placement
        self.reason = reason
        self.loading = loading  # False: in the middle of the job


class Memory:
    """One device's engines.

    Args:
        tell: receives each `Released`.

    Attributes:
        budget: bytes of the device that engines may take; None: all there is.
        ram_budget: bytes of host memory that parked and offloaded engines may take.
    """

    def __init__(self, settings: Settings, catalog: Catalog, tell: Callable[[FromWorker], None]) -> None:
        self._settings = settings
        self._catalog = catalog
        self.budget = settings.memory_budget
        self.ram_budget = settings.ram_budget or int(_RAM_SHARE * ram_total())
        self._device: Device | None = None
        self._footprints: dict[tuple[str, Path | None, str], Footprint] = {}
        self.residency = Residency(self._settle, self._trim, self._device_used, tell)

    @property
    def device(self) -> Device:
        """The device; the first use imports torch."""
        if self._device is None:
            self._device = Device(self._settings.device, self._settings.model_threads)
            self._device.limit(self.budget)
        return self._device

    @property
    def known_device(self) -> Device | None:
        """The device, if torch was imported by now."""
        return self._device

    @contextmanager
    def lend(self, wanted: Wanted) -> Iterator[Loan]:
        """An engine for the length of a job, loaded and arranged as planned.

        Raises:
            DoesNotFit: no placement does.
            RanOut: the memory was gone when it was loaded.
            WeightsError: the library cannot load the checkpoint.
        """
        card, found = wanted.card, wanted.found
        size = self.footprint(card, found)
        key = Key(card.id, found.folder, found.commit)
        limits = self.limits() if card.has_weights else Limits(0, 0)
        where, claim = self._place(wanted, size, key, limits)
        words = placement.in_words(where, size)
        kind = self._class(card)  # imports libraries, which is no part of a load
        lease = self.residency.lease(
            key, where, claim, limits, lambda: self._load(kind, card, key, where), words
        )
        with ExitStack() as stack:
            resident = self._explained(card, key, where, lambda: stack.enter_context(lease))
            planned = resident.claim.busy
            yield Loan(resident.engine, resident.placement, resident.words, planned.device or planned.ram)

    def limits(self) -> Limits:
        """What engines may take now. The device is asked, so what others take there counts."""
        resting, ram, device = self.residency.resting, ram_available(), self.device
        if device.name == "cpu":
            both = ram + resting.both
            return Limits(
                self._capped(both), min(both, self.ram_budget), both, parking=self.budget is not None
            )
        return Limits(self._capped(device.free() + resting.device), min(ram + resting.ram, self.ram_budget))

    def set_budget(self, memory: int | None) -> None:
        """Change the budget between two jobs: what no longer fits is parked or let go."""
        self.budget = memory
        if self._device:
            self.residency.fit(self.limits())
            self._device.limit(memory)

    def leave_device(self, engine: str = "") -> None:
        """Park one engine, or all; what cannot be parked is let go."""
        if self._device:
            self.residency.leave_device(self.limits(), engine)

    def age(self) -> None:
        """Give back what was not used for longer than the settings' time-outs."""
        if self._device and self.residency.inventory():
            on_device = self._settings.idle_timeout
            self.residency.age(self.limits(), on_device, on_device + self._settings.park_timeout)

    def free(self) -> int:
        """Bytes that can still be taken on the device, within the budget."""
        free = self._device.free() if self._device else ram_available()
        return free if self.budget is None else max(0, min(free, self.budget - self.residency.held.device))

    def can_place(self, wanted: Wanted) -> bool:
        card, found = wanted.card, wanted.found
        key = Key(card.id, found.folder, found.commit)
        try:
            self._place(wanted, self.footprint(card, found), key, self.limits())
        except DoesNotFit:
            return False
        return True

    def footprint(self, card: Card, found: Resolved) -> Footprint:
        """Bytes of a checkpoint's components: as shipped with its engine, or counted from its configs."""
        key = (card.id, found.folder, found.commit)
        if key not in self._footprints:
            self._footprints[key] = self._count(card, found)
        return self._footprints[key]

    def _count(self, card: Card, found: Resolved) -> Footprint:
        shipped = footprint.shipped(self._catalog.folder(card.id))
        if found.kind == "hub" and found.repository in shipped:
            return shipped[found.repository]
        modules = self._class(card).skeleton(found.folder) if found.folder else {}
        if modules:
            return footprint.measure(modules, card.whole)
        return Footprint(
            (Component("weights", floats=found.bytes // 4, largest=found.bytes // 4, whole=True),)
        )

    def _place(self, wanted: Wanted, size: Footprint, key: Key, limits: Limits) -> tuple[Placement, Claim]:
        """The best placement there is room for, or the one it has where that is the same way to run it."""
        card = wanted.card
        if not card.has_weights:
            return Placement(), Claim()
        guess = placement.working_bytes(card, size, wanted.units)
        demand = Demand(card, size, guess if wanted.working is None else wanted.working)
        room = self._room(limits)
        rung = placement.plan(demand, room, wanted.forced, wanted.after)
        present = self.residency.placement(key)
        if present and present.record == rung.placement.record:
            # A device map's share follows what is free to the byte; that is no reason to load again.
            kept = _with_shares(rung, present)
            rung = kept if kept.fits(room) else rung
        return rung.placement, _claim(rung, demand)

    def _room(self, limits: Limits) -> Room:
        """What could be had if all that has no lease were evicted, this very engine with them."""
        leased = self.residency.leased
        device, ram = limits.device - leased.device, limits.ram - leased.ram
        if limits.both is not None:
            device = min(device, limits.both - leased.both)
        return Room(
            device=self.device.name,
            device_bytes=max(0, device),
            ram_bytes=max(0, ram),
            disk_bytes=shutil.disk_usage(self._settings.cache.parent).free,
        )

    def _capped(self, size: int) -> int:
        return size if self.budget is None else min(size, self.budget)

    def _class(self, card: Card) -> type[Engine]:
        found: type[Engine] = importlib.import_module(f"{self._catalog.package(card.id)}.engine").ENGINE
        return found

    def _load(self, kind: type[Engine], card: Card, key: Key, where: Placement) -> tuple[Engine, Arrangement]:
        engine = kind()
        engine.load(key.folder, where)
        scratch = self._settings.cache / "offload"
        arrangement = Arrangement(engine.components(), where, card.whole, scratch)
        engine.using = arrangement.using
        return engine, arrangement

    def _explained(self, card: Card, key: Key, where: Placement, bring: Callable[[], _Result]) -> _Result:
        """Load an engine, or bring it back; what a library says of it becomes an error of ours."""
        reason = f"{card.name} does not fit the memory of {self.device.title}." if card.has_weights else ""
        try:
            return bring()
        except (Cancelled, SoundstageError):
            raise
        except NoRoom:
            pass
        except Exception as error:
            if not is_out_of_memory(error):
                raise _not_loaded(card, key, error) from error
        # Out here it has no context, whose frames would keep the half of it that was loaded alive.
        raise RanOut(where, reason, loading=True)

    def _device_used(self) -> int | None:
        """After what was asked of it is done; None for host memory, of which the allocator keeps some."""
        if self._device is None or self._device.name == "cpu":
            return None
        self._device.wait()
        return self._device.used()

    def _settle(self) -> None:
        if self._device:
            self._device.settle()

    def _trim(self) -> None:
        if self._device:
            self._device.trim()


def _with_shares(rung: Rung, present: Placement) -> Rung:
    """A rung with the shares of a device map that is there already, and needs no more of the disk."""
    planned = rung.placement
    return replace(
        rung,
        placement=present,
        device_bytes=rung.device_bytes + present.device_share - planned.device_share,
        ram_bytes=rung.ram_bytes + present.ram_share - planned.ram_share,
        disk_bytes=0,
    )


def _claim(rung: Rung, demand: Demand) -> Claim:
    """What a rung takes while it works, between jobs, and parked."""
    busy, at, size = Bytes(rung.device_bytes, rung.ram_bytes), rung.placement, demand.footprint
    parked = Bytes(0, size.bytes(at.dtype, at.quantisation))
    staying = sum(c.staying(at.dtype) for c in size.components)
    if at.strategy == "device_map":
        idle = Bytes(staying + at.device_share, rung.ram_bytes)
    elif at.strategy == "resident" or (at.device == "cpu" and rung.device_bytes):
        idle = busy - Bytes(demand.working, 0)
    elif at.strategy == "cpu":
        idle = busy - Bytes(0, demand.working)
    else:
        idle = Bytes(0 if at.strategy == "model_offload" else staying, rung.ram_bytes)
    return Claim(busy, idle, parked)


def _not_loaded(card: Card, key: Key, error: Exception) -> WeightsError:
    name = key.folder.name if key.folder else card.id
    reason = in_short(error)
    if isinstance(error, AttributeError | LookupError | TypeError):  # says nothing to a person
        reason = f"one of its files is not what the library expects ({reason})."
    return WeightsError(f"{card.name} could not load its checkpoint {name!r}: {reason}")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")


def in_short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON_LENGTH else text[:_REASON_LENGTH] + "…"
