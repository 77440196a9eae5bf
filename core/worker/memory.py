"""Which engines are in memory, and where: measures, plans, loads, lends, and lets go."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from core.card import Card, Strategy
from core.catalog import Catalog
from core.engines.base import Cancelled, Engine, Placement
from core.errors import DoesNotFit, SoundstageError, WeightsError
from core.settings import Settings
from core.weights import Resolved
from core.worker import footprint, placement
from core.worker.arrange import Arrangement
from core.worker.devices import Device, ram_available
from core.worker.footprint import Component, Footprint
from core.worker.messages import FromWorker
from core.worker.placement import Demand, Room
from core.worker.residency import Key, Residency

_REASON_LENGTH = 300  # characters of what a library said


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
    """

    def __init__(self, settings: Settings, catalog: Catalog, tell: Callable[[FromWorker], None]) -> None:
        self._settings = settings
        self._catalog = catalog
        self._device: Device | None = None
        self._footprints: dict[tuple[str, Path | None, str], Footprint] = {}
        self.residency = Residency(self._room_bytes, self._settle, self._device_used, tell)

    @property
    def device(self) -> Device:
        """The device; the first use imports torch."""
        if self._device is None:
            self._device = Device(self._settings.device, self._settings.model_threads)
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
        where, need = self._place(wanted, size)
        key = Key(card.id, found.folder, found.commit, where)
        words = placement.in_words(where, size)
        with self.residency.lease(key, need, lambda: self._load(card, key), words) as resident:
            yield Loan(resident.engine, where, words, need)

    def free(self) -> int:
        """Bytes that can still be taken on the device, within the budget."""
        if self._device is None:
            return ram_available()
        budget = self._settings.memory_budget
        free = self._device.free()
        return free if budget is None else max(0, min(free, budget - self.residency.held))

    def can_place(self, wanted: Wanted) -> bool:
        try:
            self._place(wanted, self.footprint(wanted.card, wanted.found))
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
        package = importlib.import_module(self._catalog.package(card.id))
        shipped = footprint.shipped(Path(package.__path__[0]))
        if found.kind == "hub" and found.repository in shipped:
            return shipped[found.repository]
        modules = self._class(card).skeleton(found.folder) if found.folder else {}
        if modules:
            return footprint.measure(modules, card.whole)
        return Footprint(
            (Component("weights", floats=found.bytes // 4, largest=found.bytes // 4, whole=True),)
        )

    def _place(self, wanted: Wanted, size: Footprint) -> tuple[Placement, int]:
        """The placement, and the bytes it takes on its device."""
        card = wanted.card
        if not card.has_weights:
            return Placement(), 0
        guess = placement.working_bytes(card, size, wanted.units)
        working = guess if wanted.working is None else wanted.working
        rung = placement.plan(Demand(card, size, working), self._room(), wanted.forced, wanted.after)
        return rung.placement, rung.device_bytes or rung.ram_bytes

    def _room(self) -> Room:
        held = self.residency.held - self.residency.leased
        return Room(
            device=self.device.name,
            device_bytes=self._capped(self.device.free() + held),
            ram_bytes=ram_available() + (held if self.device.name == "cpu" else 0),
            disk_bytes=shutil.disk_usage(self._settings.cache.parent).free,
        )

    def _capped(self, size: int) -> int:
        return min(size, self._settings.memory_budget or size)

    def _room_bytes(self, device: str) -> int:
        """Bytes that all residents may hold together on a device."""
        free = self.device.free() if device == self.device.name else ram_available()
        return self._capped(free + self.residency.held)

    def _class(self, card: Card) -> type[Engine]:
        found: type[Engine] = importlib.import_module(f"{self._catalog.package(card.id)}.engine").ENGINE
        return found

    def _load(self, card: Card, key: Key) -> tuple[Engine, Arrangement]:
        engine = self._class(card)()
        try:
            engine.load(key.folder, key.placement)
            scratch = self._settings.cache / "offload"
            arrangement = Arrangement(engine.components(), key.placement, card.whole, scratch)
        except (Cancelled, SoundstageError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                reason = f"{card.name} does not fit the memory of {self.device.title}."
                raise RanOut(key.placement, reason, loading=True) from None
            name = key.folder.name if key.folder else card.id
            reason = in_short(error)
            if isinstance(error, AttributeError | LookupError | TypeError):  # says nothing to a person
                reason = f"one of its files is not what the library expects ({reason})."
            raise WeightsError(f"{card.name} could not load its checkpoint {name!r}: {reason}") from error
        engine.using = arrangement.using
        return engine, arrangement

    def _device_used(self) -> int | None:
        # Host memory is no proof to the byte: the allocator keeps some of it.
        return self.device.used() if self._device and self._device.name != "cpu" else None

    def _settle(self) -> None:
        if self._device:
            self._device.settle()


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")


def in_short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON_LENGTH else text[:_REASON_LENGTH] + "…"
