"""Who is loaded: leases, eviction, and release with its proof."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.engines.base import Engine, Placement
from core.worker.arrange import Arrangement
from core.worker.messages import Held, Released

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What makes two loads the same."""

    engine: str
    folder: Path | None
    commit: str
    placement: Placement


@dataclass
class Resident:
    key: Key
    engine: Engine
    arrangement: Arrangement
    bytes: int  # planned, weights and working memory
    device_before: int  # bytes used on the device before it was loaded
    words: str = ""  # where its components are, for people
    leases: int = 0
    used: float = field(default_factory=time.monotonic)
    parameters: list[weakref.ref[Any]] = field(default_factory=list)


class Residency:
    """Keeps engines loaded until their room is needed.

    Args:
        room: bytes that residents may hold together on a device; asked before every load.
        settle: frees garbage and the allocators' caches.
        device_used: bytes used on the device now; None where that is no proof (host memory).
        told: called with each `Released`.
    """

    def __init__(
        self,
        room: Callable[[str], int],
        settle: Callable[[], None],
        device_used: Callable[[], int | None],
        told: Callable[[Released], None],
    ) -> None:
        self._room = room
        self._settle = settle
        self._device_used = device_used
        self._told = told
        self._residents: dict[Key, Resident] = {}
        # accelerate patches torch.nn.Module for the whole process while it loads, so loads take turns.
        self._lock = threading.RLock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Engine ids, most recently used first. Does not wait for a load in progress."""
        residents = sorted(self._residents.copy().values(), key=lambda r: -r.used)
        return tuple(dict.fromkeys(r.key.engine for r in residents))

    def inventory(self) -> tuple[Held, ...]:
        """All that is in memory, most recently used first."""
        now = time.monotonic()
        residents = sorted(self._residents.copy().values(), key=lambda r: -r.used)
        return tuple(
            Held(
                engine=r.key.engine,
                weights=r.key.folder.name if r.key.folder else "",
                state="in use" if r.leases else "loaded",
                device_bytes=r.bytes,
                ram_bytes=0,
                idle_seconds=0.0 if r.leases else now - r.used,
                words=r.words,
            )
            for r in residents
        )

    def holds(self, engine: str, folder: Path | None, commit: str) -> bool:
        """Whether these weights are loaded, wherever they were placed."""
        keys = self._residents.copy()
        return any((k.engine, k.folder, k.commit) == (engine, folder, commit) for k in keys)

    @property
    def held(self) -> int:
        """Bytes planned for all that is loaded."""
        return sum(r.bytes for r in self._residents.copy().values())

    @property
    def leased(self) -> int:
        """Bytes planned for what cannot be evicted now."""
        return sum(r.bytes for r in self._residents.copy().values() if r.leases)

    @contextmanager
    def lease(
        self, key: Key, size: int, make: Callable[[], tuple[Engine, Arrangement]], words: str = ""
    ) -> Iterator[Resident]:
        """Hold an engine for the length of a job; it is never evicted meanwhile.

        Args:
            size: bytes it is planned to take; others are evicted, least recently used first, until it fits.
            make: loads it; called only if it is not loaded.
        """
        with self._lock:
            resident = self._residents.get(key) or self._load(key, size, make)
            resident.words = words
            resident.leases += 1
        try:
            yield resident
        finally:
            with self._lock:
                resident.leases -= 1
                resident.arrangement.rest()
                resident.used = time.monotonic()

    def _load(self, key: Key, size: int, make: Callable[[], tuple[Engine, Arrangement]]) -> Resident:
        if size:
            self._evict_until_fits(key.placement.device, size)
        before = self._device_used() or 0
        try:
            engine, arrangement = make()
        except BaseException:
            self._settle()
            raise
        resident = Resident(key, engine, arrangement, size, before)
        resident.parameters = [weakref.ref(p) for m in engine.components().values() for p in m.parameters()]
        self._residents[key] = resident
        return resident

    def _evict_until_fits(self, device: str, size: int) -> None:
        idle = sorted((r for r in self._residents.values() if not r.leases), key=lambda r: r.used)
        for resident in idle:
            # A second checkpoint or placement of one engine counts like any other resident.
            if self.held + size <= self._room(device):
                return
            self.release(resident.key)

    def release(self, key: Key) -> Released:
        """Let one engine go and prove it: no parameter alive, device memory back where it was."""
        with self._lock:
            resident = self._residents.pop(key)
            assert not resident.leases, f"{key.engine} is leased"
            references, only = resident.parameters, not self._residents
            try:
                resident.arrangement.undo()
                resident.engine.close()
            except Exception:  # it must not become the fault of the job that needs the room
                log.exception("%s did not close cleanly", key.engine)
            vars(resident.engine).clear()
            before = resident.device_before
            del resident
            self._settle()
            alive = sum(reference() is not None for reference in references)
            used = self._device_used()
            left = max(0, used - before) if used is not None and only else 0
            released = Released(key.engine, alive, left, clean=not alive and left <= 2**20)
        self._told(released)
        return released

    def release_all(self, engine: str = "") -> list[Released]:
        """Let go of everything without a lease, or of one engine's loads."""
        with self._lock:
            keys = [k for k, r in self._residents.items() if not r.leases and engine in ("", k.engine)]
            return [self.release(key) for key in keys]
