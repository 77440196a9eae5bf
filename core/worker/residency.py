"""Who is in memory: leases, parking and eviction by what coming back would cost, release with its proof."""

from __future__ import annotations

import logging
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.engines.base import Engine, Placement
from core.worker.arrange import Arrangement
from core.worker.messages import Held, Released
from core.worker.proof import forget, holders

log = logging.getLogger(__name__)

Pool = Literal["device", "ram", "both"]

_SLACK = 2**20  # bytes of the device that a library may keep for itself
_COPY_GUESS = 6e9  # bytes a second to a device before any was measured; PCIe 3.0 x16 carries up to 16e9
_SHORTEST_IDLE = 1e-3  # seconds


@dataclass(frozen=True)
class Bytes:
    """Bytes of the device, and of host memory."""

    device: int = 0
    ram: int = 0

    @property
    def both(self) -> int:
        return self.device + self.ram

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.device + other.device, self.ram + other.ram)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.device - other.device, self.ram - other.ram)


@dataclass(frozen=True)
class Claim:
    """What an engine takes while it works, between jobs, and parked."""

    busy: Bytes = Bytes()
    idle: Bytes = Bytes()
    parked: Bytes = Bytes()


@dataclass(frozen=True)
class Limits:
    """What all residents together may take, in bytes."""

    device: int
    ram: int
    both: int | None = None  # of device and host memory together, where they are one memory
    parking: bool = True  # whether the device has more room once an engine is parked


@dataclass(frozen=True)
class Key:
    """What makes two loads the same."""

    engine: str
    folder: Path | None
    commit: str


class NoRoom(Exception):
    """What holds a lease leaves too little."""


def worth(seconds: float, size: int, idle: float) -> float:
    """What is lost by evicting an engine, for each byte won: `seconds / (size * idle)`. The least goes first.

    How soon an engine is wanted again is not known; that it rested for `idle` seconds makes a return in the
    next one as likely as 1 / idle. So this is the expected wait for a byte. GreedyDual-Size (Cao and Irani,
    "Cost-aware WWW proxy caching algorithms", 1997) ranks by the same cost over size, and hyperbolic caching
    (Blankstein, Sen and Freedman, USENIX ATC 2017) divides by time in the same way. With equal cost a byte it
    is least recently used.

    Args:
        seconds: to bring it back: bytes over the bandwidth measured.
        size: bytes that its eviction gives.
        idle: seconds since it was last used.
    """
    return seconds / (max(1, size) * max(_SHORTEST_IDLE, idle))


class Speed:
    """Bytes a second over one way, learned by use; the last measurement counts as much as all before it."""

    def __init__(self, guess: float) -> None:
        self._size, self._seconds = guess, 1.0

    def note(self, size: int, seconds: float) -> None:
        if size:
            self._size = self._size / 2 + size
            self._seconds = self._seconds / 2 + seconds

    def seconds(self, size: int) -> float:
        return size * self._seconds / self._size


@dataclass
class Resident:
    key: Key
    engine: Engine
    arrangement: Arrangement
    claim: Claim
    words: str  # where its components are, for people
    used: float  # by the clock
    load_seconds: float
    taken: int = 0  # measured on the device when it came there; parked, 0
    parked: bool = False
    leases: int = 0
    parameters: list[weakref.ref[Any]] = field(default_factory=list)

    @property
    def placement(self) -> Placement:
        return self.arrangement.placement

    @property
    def held(self) -> Bytes:
        """What it may take now."""
        if self.leases:
            return self.claim.busy
        return self.claim.parked if self.parked else self.claim.idle


class Residency:
    """Keeps engines in memory until their room is needed: on the device, then parked in host memory.

    Args:
        settle: frees garbage, then the allocators' caches.
        trim: frees the allocators' caches only, which takes no time.
        device_used: bytes used on the device now; None where that is no proof (host memory).
        told: called with each `Released`.
        clock: seconds.
    """

    def __init__(
        self,
        settle: Callable[[], None],
        trim: Callable[[], None],
        device_used: Callable[[], int | None],
        told: Callable[[Released], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settle = settle
        self._trim = trim
        self._device_used = device_used
        self._told = told
        self._clock = clock
        self._residents: dict[Key, Resident] = {}
        self._fastest_load: dict[Key, float] = {}  # the first may have waited for imports and a cold disk
        self._copy = Speed(_COPY_GUESS)
        self._device_empty: int | None = None  # bytes used there when no engine was
        # accelerate patches torch.nn.Module for the whole process while it loads, so loads take turns.
        self._lock = threading.RLock()

    # What there is. Nothing here waits for a load in progress.

    @property
    def loaded(self) -> tuple[str, ...]:
        """Ids of the engines that are not parked, most recently used first."""
        return tuple(dict.fromkeys(r.key.engine for r in self._by_use() if not r.parked))

    @property
    def parked(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.key.engine for r in self._by_use() if r.parked))

    def inventory(self) -> tuple[Held, ...]:
        """All that is in memory, most recently used first."""
        now = self._clock()
        return tuple(
            Held(
                engine=r.key.engine,
                weights=r.key.folder.name if r.key.folder else "",
                state="in use" if r.leases else "parked" if r.parked else "loaded",
                device_bytes=r.held.device,
                ram_bytes=r.held.ram,
                idle_seconds=0.0 if r.leases else now - r.used,
                words=r.words,
            )
            for r in self._by_use()
        )

    def holds(self, engine: str, folder: Path | None, commit: str) -> bool:
        """Whether these weights are in memory, however they were placed."""
        return Key(engine, folder, commit) in self._residents

    def placement(self, key: Key) -> Placement | None:
        """How these weights are in memory, if they are."""
        resident = self._residents.get(key)
        return resident.placement if resident else None

    @property
    def held(self) -> Bytes:
        """What all may take now."""
        return sum((r.held for r in self._residents.copy().values()), Bytes())

    @property
    def leased(self) -> Bytes:
        """What cannot be evicted now."""
        return sum((r.held for r in self._residents.copy().values() if r.leases), Bytes())

    @property
    def resting(self) -> Bytes:
        """What the weights of all take: the part of `held` that is there between jobs, too."""
        claims = [(r.claim.parked if r.parked else r.claim.idle) for r in self._residents.copy().values()]
        return sum(claims, Bytes())

    def _by_use(self) -> list[Resident]:
        return sorted(self._residents.copy().values(), key=lambda r: -r.used)

    # Coming.

    @contextmanager
    def lease(
        self,
        key: Key,
        placement: Placement,
        claim: Claim,
        limits: Limits,
        make: Callable[[], tuple[Engine, Arrangement]],
        words: str = "",
    ) -> Iterator[Resident]:
        """Hold an engine for the length of a job; it is never evicted meanwhile.

        It is taken as it is in memory, unless that is another placement and nobody holds it: then it is let
        go and loaded again.

        Args:
            claim: what it is planned to take; others are evicted until it fits, those of the least `worth`
                first.
            make: loads and arranges it; called only if it is not in memory.

        Raises:
            NoRoom: what is leased leaves too little.
        """
        with self._lock:
            resident = self._residents.get(key)
            if resident and not resident.leases and resident.placement != placement:
                self.release(key)
                resident = None
            if resident is None or not resident.leases:
                self._make_room(claim.busy, limits, resident)
                resident = self._bring_back(resident) if resident else self._load(key, claim, make)
                resident.claim, resident.words = claim, words
            resident.leases += 1
            resident.used = self._clock()
        try:
            yield resident
        finally:
            with self._lock:
                self._end(resident)

    def _load(self, key: Key, claim: Claim, make: Callable[[], tuple[Engine, Arrangement]]) -> Resident:
        before = self._arriving()
        started = self._clock()
        try:
            engine, arrangement = make()
        except BaseException:
            self._settle()
            raise
        took = min(self._clock() - started, self._fastest_load.get(key, float("inf")))
        self._fastest_load[key] = took
        resident = Resident(key, engine, arrangement, claim, "", self._clock(), took, self._taken(before))
        resident.parameters = [weakref.ref(p) for m in engine.components().values() for p in m.parameters()]
        self._residents[key] = resident
        return resident

    def _bring_back(self, resident: Resident) -> Resident:
        if not resident.parked:
            return resident
        before = self._arriving()
        started = self._clock()
        failed: BaseException | None = None
        try:
            resident.arrangement.unpark()
        except BaseException as error:
            failed = _told(error, "%s could not be brought back", resident)
        if failed:  # half of it is on the device
            self.release(resident.key)
            raise failed
        self._copy.note(resident.claim.idle.device, self._clock() - started)
        resident.parked, resident.taken = False, self._taken(before)
        return resident

    def _end(self, resident: Resident) -> None:
        resident.leases -= 1
        resident.used = self._clock()
        if resident.leases:
            return
        try:
            resident.arrangement.rest()
        except Exception as error:  # what the device is in for then, the next job would meet
            _told(error, "%s could not be put to rest", resident)
            self.release(resident.key)

    # Going.

    def fit(self, limits: Limits) -> None:
        """Evict until all that has no lease is within limits that became narrower."""
        with self._lock:
            self._evict("both", limits, Bytes())
            self._evict("ram", limits, Bytes())
            self._evict("device", limits, Bytes())

    def leave_device(self, limits: Limits, engine: str = "") -> None:
        """Park, or let go, every engine without a lease, or one of them."""
        with self._lock:
            for resident in self._idle():
                if engine in ("", resident.key.engine) and resident.key in self._residents:
                    self._leave_device(resident, limits, Bytes())

    def age(self, limits: Limits, on_device: float, in_memory: float) -> None:
        """Give back what nobody used for long: the device first, host memory later.

        Args:
            on_device: seconds after which an engine leaves the device.
            in_memory: seconds after which it is let go.
        """
        with self._lock:
            for resident in self._idle():
                idle = self._clock() - resident.used
                if resident.key not in self._residents:
                    continue
                if idle >= in_memory:
                    self.release(resident.key)
                elif idle >= on_device:
                    self._leave_device(resident, limits, Bytes())

    def release_all(self, engine: str = "") -> list[Released]:
        """Let go of everything without a lease, or of one engine's loads."""
        with self._lock:
            return [self.release(r.key) for r in self._idle() if engine in ("", r.key.engine)]

    def release(self, key: Key) -> Released:
        """Let one engine go and prove it: no parameter alive, device memory back where it was."""
        with self._lock:
            resident = self._residents.pop(key)
            assert not resident.leases, f"{key.engine} is leased"
            expected = self._used_without(resident)
            references = resident.parameters
            try:
                resident.arrangement.undo()
                resident.engine.close()
            except Exception as error:  # it must not become the fault of the job that needs the room
                _told(error, "%s did not close cleanly", resident)
            vars(resident.engine).clear()
            del resident
            self._settle()
            released = self._proof(key.engine, references, self._left(expected))
        self._told(released)
        return released

    def _proof(self, engine: str, references: list[weakref.ref[Any]], left: int) -> Released:
        alive = sum(reference() is not None for reference in references)
        found: tuple[str, ...] = ()
        if alive:
            found = holders([p for reference in references if (p := reference()) is not None])
        if alive or left > _SLACK:
            log.warning(
                "%s left %d parameters alive and %d bytes on the device\n%s",
                engine,
                alive,
                left,
                "\n".join(found),
            )
        return Released(engine, alive, left, clean=not alive and left <= _SLACK, holders=found)

    # Room.

    def _make_room(self, need: Bytes, limits: Limits, present: Resident | None) -> None:
        """Evict until `need` fits beside the others. A parked engine that comes back gives its own place."""
        more = need - present.held if present else need
        for pool in ("both", "ram", "device"):  # what is parked on the way takes only what is left of RAM
            if _of(more, pool) > 0 and not self._evict(pool, limits, more, present):
                raise NoRoom(f"{_of(need, pool)} bytes of {pool}")

    def _evict(self, pool: Pool, limits: Limits, more: Bytes, keep: Resident | None = None) -> bool:
        """Evict until there is room for `more` in a pool; False if there never is."""
        limit = getattr(limits, pool)
        while limit is not None and _of(self.held, pool) + _of(more, pool) > limit:
            others = [r for r in self._idle() if r is not keep and _of(r.held, pool)]
            if not others:
                return False
            if pool == "device":
                least = min(others, key=lambda r: self._worth(r, pool, parks=self._parks(r, limits)))
                self._leave_device(least, limits, more, keep)
            else:
                self.release(min(others, key=lambda r: self._worth(r, pool)).key)
        return True

    def _leave_device(
        self, resident: Resident, limits: Limits, more: Bytes, keep: Resident | None = None
    ) -> None:
        """Park it, if it can and host memory has room beside `more`; else let it go."""
        if not resident.held.device:
            return
        if self._parks(resident, limits) and self._make_room_to_park(resident, limits, more, keep):
            self._park(resident)
        else:
            self.release(resident.key)

    def _make_room_to_park(
        self, resident: Resident, limits: Limits, more: Bytes, keep: Resident | None
    ) -> bool:
        """Drop what is worth less in host memory than this one, if that makes the room it needs."""
        size = resident.claim.parked.ram
        excess = self.held.ram - resident.held.ram + size + max(0, more.ram) - limits.ram
        own = worth(resident.load_seconds, size, self._clock() - resident.used)
        cheaper = [
            r
            for r in sorted(self._idle(), key=lambda r: self._worth(r, "ram"))
            if r is not keep and r is not resident and r.held.ram and self._worth(r, "ram") < own
        ]
        if excess > sum(r.held.ram for r in cheaper):
            return False
        for other in cheaper:
            if excess <= 0:
                break
            excess -= other.held.ram
            self.release(other.key)
        return True

    def _park(self, resident: Resident) -> None:
        """Move it to host memory and prove it: the device has its memory back, though the weights live."""
        expected = self._used_without(resident)
        try:
            resident.arrangement.park()
        except Exception as error:
            _told(error, "%s could not be parked", resident)
            self.release(resident.key)
            return
        resident.parked, resident.taken = True, 0
        self._trim()
        if self._left(expected) > _SLACK:
            self._settle()  # garbage of the last job may hold it
        if (left := self._left(expected)) > _SLACK:
            log.warning("%s left %d bytes on the device when it was parked", resident.key.engine, left)
            self.release(resident.key)

    def _idle(self) -> list[Resident]:
        return [r for r in self._residents.values() if not r.leases]

    def _parks(self, resident: Resident, limits: Limits) -> bool:
        return limits.parking and resident.arrangement.can_park

    def _worth(self, resident: Resident, pool: Pool, parks: bool = False) -> float:
        back = self._copy.seconds(resident.claim.idle.device) if parks else resident.load_seconds
        return worth(back, _of(resident.held, pool), self._clock() - resident.used)

    # The device's memory, as measured.

    def _arriving(self) -> int:
        used = self._device_used()
        if not any(r.taken for r in self._residents.values()):
            self._device_empty = used
        return used or 0

    def _taken(self, before: int) -> int:
        return max(0, (self._device_used() or 0) - before)

    def _used_without(self, resident: Resident) -> int | None:
        """Bytes that are used on the device once this one has left it; None where that cannot be measured."""
        if any(r.taken for r in self._residents.values() if r is not resident):
            used = self._device_used()
            return None if used is None else used - resident.taken
        return self._device_empty

    def _left(self, expected: int | None) -> int:
        used = self._device_used()
        return 0 if used is None or expected is None else max(0, used - expected)


def _told(error: BaseException, what: str, resident: Resident) -> BaseException:
    """Log a fault as text: a kept traceback, be it in a log record, would keep the model alive."""
    log.error(f"{what}\n%s", resident.key.engine, "".join(traceback.format_exception(error)))
    return forget(error)


def _of(size: Bytes, pool: Pool) -> int:
    count: int = getattr(size, pool)
    return count
