"""A host in this process, with what a measurement needs around it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.catalog import Catalog
from core.events import Finished
from core.requests import Order, SpeechRequest
from core.settings import Settings
from core.weights import Resolved
from core.worker.host import Host
from core.worker.memory import Wanted
from core.worker.messages import FromWorker, JobEvent, Released, RunJob
from tests.support import miniature, reference

TEXT = "The quick brown fox jumps over the lazy dog. It does so every single day."


class Stage:
    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder / "job"
        self.folder.mkdir()
        self.released: list[Released] = []
        self._last: FromWorker | None = None
        given = {"home": folder / "home", "cache": cache(), "device": "cpu", "threads": 1}
        self.host = Host(Settings(**given | settings), self._hear)

    def _hear(self, message: FromWorker) -> None:
        if isinstance(message, Released):
            self.released.append(message)
        else:
            self._last = message

    def run(self, order: Order) -> Finished:
        self.host.run(RunJob("job", order, self.folder, online=False))
        assert isinstance(self._last, JobEvent) and isinstance(self._last.event, Finished), self._last
        return self._last.event


@contextmanager
def gpu(total: int) -> Iterator[str]:
    """The GPU of this machine or, without one, the tests' pretend card; yields what to call it."""
    import torch

    from tests.pretend import AVAILABLE, card

    if not AVAILABLE:
        yield str(torch.cuda.get_device_name())
        return
    with card(total):
        yield "pretend card"


def cache() -> Path:
    """Miniatures are built once for all measurements."""
    return Path(tempfile.gettempdir()) / "soundstage-benchmarks"


def speakers() -> list[str]:
    """The engines with weights."""
    return [card.id for card in Catalog().cards() if card.has_weights]


def order(engine: str, seed: int = 1, text: str = TEXT, **options: object) -> Order:
    request = SpeechRequest(text=text, **reference(Catalog().card(engine)))
    return Order(engine=engine, request=request, options=options, seed=seed, weights="miniature")


def wanted_of(engine: str) -> Wanted:
    """What a lease of an engine with its miniature needs."""
    found = Resolved(miniature(engine), "folder", "", "1", bytes=2**20)
    return Wanted(Catalog().card(engine), found, units=1.0, working=0)
