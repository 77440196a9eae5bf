"""A download that reports, can be stopped at any moment, and goes on where an earlier try ended."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx

from core.errors import WeightsError

Report = Callable[[str, int, int], None]
"""`report(note, bytes done, bytes in all)`; it may raise to stop."""

PERIOD = 0.2  # seconds between two reports
TRIES = 4  # in a row that brought nothing
PAUSE = 1.0  # seconds before the next try
TIMEOUT = 10.0  # seconds without a byte; huggingface_hub's own default

T = TypeVar("T")


class Unreachable(WeightsError):
    """The server gave no answer at all, so nothing was begun."""


class _Abandoned(Exception):
    """The one who waits has gone."""


@dataclass
class Meter:
    """How far a piece of background work is: written by its thread, read by the one who waits."""

    note: str = "Looking for the weights"
    done: int = 0
    total: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Leave the work if nobody waits for it any more."""
        if self.stop.is_set():
            raise _Abandoned

    def say(self, note: str) -> None:
        self.check()
        self.note, self.done, self.total = note, 0, 0


def watched(work: Callable[[Meter], T], report: Report) -> T:
    """Run `work` in a thread and `report` its meter several times a second, however slow the network is.

    What `report` raises stops the work at its next byte, or leaves it behind to time out alone.
    """
    meter = Meter()
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work(meter))
        except BaseException as error:  # handed to the one who waits
            errors.append(error)

    thread = threading.Thread(target=body, name="weights", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            report(meter.note, meter.done, meter.total)
            thread.join(PERIOD)
        if not errors:
            report(meter.note, meter.done, meter.total)
    except BaseException:
        meter.stop.set()
        thread.join(1.0)
        raise
    if errors:
        raise errors[0]
    return results[0]


def fetch(
    client: httpx.Client,
    url: str,
    file: Path,
    meter: Meter,
    *,
    size: int | None = None,
    headers: dict[str, str] | None = None,
    refuse: Callable[[httpx.Response], object] = httpx.Response.raise_for_status,
) -> None:
    """Bring `url` to `file`. What is not whole yet is kept in `file` + ".incomplete" for the next try.

    Args:
        meter: `done` grows by the bytes that are there, those of an earlier try included.
        size: bytes expected; None takes what the server says. Whether they are the right ones is for the
            caller to verify.
        refuse: raises for an answer that is an error.

    Raises:
        Unreachable: no answer, and nothing was there from before.
        WeightsError: the connection was lost too often, or the disk is full.
    """
    partial = file.with_name(file.name + ".incomplete")
    before = meter.done
    fruitless = 0
    while True:
        meter.check()
        there = partial.stat().st_size if partial.exists() else 0
        meter.done = before + there
        try:
            if size is None or there < size:
                _append(client, url, partial, there, meter, before, headers or {}, refuse)
            break
        except httpx.TransportError as error:
            came = (partial.stat().st_size if partial.exists() else 0) > there
            fruitless = 1 if came else fruitless + 1
            if fruitless >= TRIES:
                raise _lost(url, meter.done, meter.total, error) from error
            meter.stop.wait(PAUSE)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise WeightsError(f"The disk of {partial.parent} is full; make room and try again.") from error
    partial.replace(file)


def _append(
    client: httpx.Client,
    url: str,
    partial: Path,
    there: int,
    meter: Meter,
    before: int,
    headers: dict[str, str],
    refuse: Callable[[httpx.Response], object],
) -> None:
    ask = {**headers, "Accept-Encoding": "identity"}
    if there:
        ask["Range"] = f"bytes={there}-"
    with client.stream("GET", url, headers=ask, timeout=TIMEOUT, follow_redirects=True) as answer:
        if answer.status_code >= 500 or answer.status_code == 429:
            raise httpx.ReadError(f"the server answered {answer.status_code}", request=answer.request)
        if answer.status_code == 416:  # what is there cannot be a start of this file
            partial.unlink()
            raise httpx.ReadError("the server has no such range", request=answer.request)
        refuse(answer)
        resumed = answer.status_code == 206
        if not meter.total and (length := answer.headers.get("Content-Length")):
            meter.total = int(length) + (there if resumed else 0)
        with partial.open("ab" if resumed else "wb") as out:
            for piece in answer.iter_bytes():
                out.write(piece)
                meter.done = before + out.tell()
                meter.check()


def _lost(url: str, done: int, total: int, error: Exception) -> WeightsError:
    host = httpx.URL(url).host
    if not done:
        return Unreachable(f"{host} does not answer: {error}.")
    from core.weights.folders import human

    share = f"{human(done)} of {human(total)}" if total else human(done)
    return WeightsError(
        f"The connection to {host} was lost after {share}; that is kept, and the next try goes on from there."
    )
