"""Where an engine's components go: a ladder of ways to run it, from the fastest to the smallest.

`python -m core.worker.placement` writes `docs/placement.md`: what that comes to on cards of several sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from core.card import Card, Strategy
from core.catalog import Catalog
from core.engines.base import Placement
from core.errors import DoesNotFit
from core.requests import SpeechRequest
from core.worker.footprint import ITEM_BYTES, Component, Footprint, folder_of, shipped

NAMES: dict[Strategy, str] = {
    "resident": "resident",
    "model_offload": "model offload",
    "group_block": "group offload, block by block",
    "group_leaf": "group offload, layer by layer",
    "device_map": "device map",
    "cpu": "on the CPU",
}
_TAKE_APART: set[Strategy] = {"group_block", "group_leaf", "device_map"}


@dataclass(frozen=True)
class Room:
    """What can be had, in bytes: on the device, in host memory (the same on a CPU), and on disk."""

    device: str  # "cpu", "cuda", ...
    device_bytes: int
    ram_bytes: int
    disk_bytes: int = 0


@dataclass(frozen=True)
class Demand:
    """What an engine needs for a job."""

    card: Card
    footprint: Footprint
    working: int  # bytes beside the weights while it works


@dataclass(frozen=True)
class Rung:
    """One way to run an engine, and the bytes it takes."""

    placement: Placement
    device_bytes: int
    ram_bytes: int = 0
    disk_bytes: int = 0

    def fits(self, room: Room) -> bool:
        if room.device == "cpu" or self.placement.device == "cpu":
            # One memory: what a budget calls the device is a part of it.
            most = room.device_bytes if room.device == "cpu" else room.ram_bytes
            return self.device_bytes + self.ram_bytes <= most and self.disk_bytes <= room.disk_bytes
        return (
            self.device_bytes <= room.device_bytes
            and self.ram_bytes <= room.ram_bytes
            and self.disk_bytes <= room.disk_bytes
        )


def working_bytes(card: Card, footprint: Footprint, units: float) -> int:
    """Working memory before anything was measured: the card's guess.

    Args:
        units: size of the request (`Card.units`).
    """
    guess = card.working
    return int(guess.share * footprint.bytes("float32") + guess.fixed + guess.per_unit * units)


def ladder(demand: Demand, room: Room) -> list[Rung]:
    """Every way to run it that its card allows, the fastest first. What they need may be more than `room`."""
    allowed = set(demand.card.strategies)
    if all(component.whole for component in demand.footprint.components):
        allowed -= _TAKE_APART
    return [rung for rung in _rungs(demand, room) if rung.placement.strategy in allowed]


def plan(demand: Demand, room: Room, forced: Strategy | None = None, after: Placement | None = None) -> Rung:
    """The first rung that fits.

    Args:
        room: what could be had if every engine without a lease were evicted.
        forced: consider only this strategy.
        after: consider only the rungs below this one, which failed.

    Raises:
        DoesNotFit: none does; says what would be needed.
    """
    rungs = ladder(demand, room)
    if after is not None:
        places = [r.placement.strategy == after.strategy and r.placement.device == after.device
                  and r.placement.quantisation == after.quantisation for r in rungs]  # fmt: skip
        rungs = rungs[places.index(True) + 1 :] if True in places else []
    if forced:
        rungs = [rung for rung in rungs if rung.placement.strategy == forced]
    for rung in rungs:
        if rung.fits(room):
            return rung
    raise DoesNotFit(_refusal(demand.card, rungs, room, forced))


def _rungs(demand: Demand, room: Room) -> Iterator[Rung]:
    footprint, working = demand.footprint, demand.working
    if room.device == "cpu":
        whole = footprint.bytes("float32")
        yield Rung(Placement("cpu", "float32", "resident"), whole + working)
        for strategy in ("model_offload", "group_block", "group_leaf"):
            # They save nothing here, and run only where they are forced: to try them without a GPU.
            yield Rung(Placement("cpu", "float32", strategy), whole + working)
        yield _device_map(demand, room, "float32")
        return
    dtype = demand.card.gpu_dtype
    whole = footprint.bytes(dtype)
    on = Placement(room.device, dtype)
    yield Rung(on, whole + working)
    if len(footprint.components) > 1:
        largest = max(c.bytes(dtype) for c in footprint.components)
        yield Rung(replace(on, strategy="model_offload"), largest + working, whole)
    for kind in demand.card.quantisations:
        yield Rung(replace(on, quantisation=kind), footprint.bytes(dtype, kind) + working)
    for strategy, by_leaf in (("group_block", False), ("group_leaf", True)):
        streamed = _at_once(footprint.components, dtype, by_leaf=by_leaf)
        yield Rung(replace(on, strategy=strategy), streamed + working, whole)  # type: ignore[arg-type]
    yield _device_map(demand, room, dtype)
    yield Rung(Placement("cpu", "float32", "cpu"), 0, footprint.bytes("float32") + working)


def _at_once(components: Sequence[Component], dtype: str, *, by_leaf: bool) -> int:
    """Bytes on the device under group offload: all that stays, and the largest of what is streamed."""
    staying = sum(c.staying(dtype) for c in components)
    return staying + max(c.streamed(dtype, by_leaf=by_leaf) for c in components)


def _device_map(demand: Demand, room: Room, dtype: str) -> Rung:
    """As many layers as fit on the device, beside room for the largest one of those that do not."""
    components = demand.footprint.components
    moving = sum(c.moving(dtype) for c in components)
    passing = max((c.largest for c in components if not c.whole), default=0) * ITEM_BYTES[dtype]
    least = sum(c.staying(dtype) for c in components) + passing + demand.working
    share = max(0, min(moving, room.device_bytes - least))
    if room.device == "cpu":
        ram = 0
        disk = moving - share
        placement = Placement("cpu", dtype, "device_map", device_share=share)
    else:
        rest = moving - share
        ram = min(rest, max(0, room.ram_bytes))
        disk = rest - ram
        placement = Placement(room.device, dtype, "device_map", device_share=share, ram_share=ram)
    return Rung(placement, least + share, ram, disk)


def _refusal(card: Card, rungs: Sequence[Rung], room: Room, forced: Strategy | None) -> str:
    if not rungs:
        way = f" as {NAMES[forced]}" if forced else " in any other way"
        return f"{card.name} cannot be run{way} here; leave the placement to Soundstage."
    most = max(room.device_bytes, room.ram_bytes) if room.device != "cpu" else room.device_bytes
    first, least = rungs[0], min(rungs, key=lambda r: r.device_bytes + r.ram_bytes)
    need = f"{card.name} needs about {size(first.device_bytes + first.ram_bytes)}"
    if least is not first:
        places = (
            (least.device_bytes, "on the device"),
            (least.ram_bytes, "of RAM"),
            (least.disk_bytes, "of disk"),
        )
        need += f", or with {NAMES[least.placement.strategy]} "
        need += _list([f"{size(count)} {place}" for count, place in places if count])
    return (
        f"{need}, and {size(most)} can be had; choose a smaller checkpoint, ask for less at once, "
        "or raise the memory budget."
    )


def in_words(placement: Placement, footprint: Footprint) -> str:
    """A placement as the page shows it: "gpt brought to the GPU layer by layer; decoder stays on the GPU"."""
    names = [component.name for component in footprint.components]
    whole = [component.name for component in footprint.components if component.whole]
    streamed = [name for name in names if name not in whole]
    device = "the CPU" if placement.device == "cpu" else "the GPU"
    match placement.strategy:
        case "resident":
            words = f"all on {device}"
        case "model_offload":
            words = f"{_list(names)} take turns on {device}"
        case "group_block" | "group_leaf":
            piece = "block by block" if placement.strategy == "group_block" else "layer by layer"
            words = f"{_list(streamed)} brought to {device} {piece}"
        case "device_map":
            rest = "RAM and disk" if placement.ram_share else "disk"
            words = f"{size(placement.device_share)} of {_list(streamed)} on {device}, the rest in {rest}"
        case "cpu":
            return "all in RAM, the work is done by the CPU"
    if whole and placement.strategy != "resident" and placement.strategy != "model_offload":
        words += f"; {_list(whole)} {'stay' if len(whole) > 1 else 'stays'} on {device}"
    return f"{words}, weights in {placement.quantisation}" if placement.quantisation else words


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


DOCUMENT = Path(__file__).parents[2] / "docs" / "placement.md"

_CARDS_GB = (1, 2, 4, 6, 8, 12, 16, 24, 48, 80)
_RAM = 32 * 2**30
_DISK = 100 * 10**9
_USUAL = "x" * 200  # the text of a usual request
_INTRODUCTION = f"""\
# What runs where

Made by `python -m core.worker.placement` from the engines' footprints and cards; a test holds it to them.
For each checkpoint the first way to run it that fits a card with so many free bytes (1 GB is 10⁹), beside
{_RAM // 2**30} GiB of RAM and {_DISK // 10**9} GB of disk, for a text of {len(_USUAL)} characters and
with the working memory that the engine's card guesses; the worker plans with what earlier takes measured.

| Engine | Checkpoint | Card | Way | Type | On the card | In RAM |
|---|---|---|---|---|---|---|
"""


def as_markdown(catalog: Catalog) -> str:
    """The placements of every engine and checkpoint with a shipped footprint, on cards of several sizes."""
    rows = []
    for card in catalog.cards():
        known = shipped(folder_of(catalog.package(card.id))) if card.has_weights else {}
        for repository, footprint in known.items():
            label = next(c.label or c.folder for c in card.checkpoints if c.repository == repository)
            if len(card.checkpoints) > len(known):
                label = "each language"
            rows += [f"| {card.name} | {label} | {row} |" for row in _rows(card, footprint)]
    return _INTRODUCTION + "\n".join(rows) + "\n"


def _rows(card: Card, footprint: Footprint) -> Iterator[str]:
    """One for each run of card sizes that are used in the same way."""
    demand = Demand(card, footprint, working_bytes(card, footprint, card.units(SpeechRequest(text=_USUAL))))
    plans = [(gb, plan(demand, Room("cuda", gb * 10**9, _RAM, _DISK))) for gb in _CARDS_GB]
    for rung, run in groupby(plans, key=lambda pair: pair[1]):
        sizes = [gb for gb, _ in run]
        at = rung.placement
        where = f"{sizes[0]} GB" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} GB"
        way = f"{NAMES[at.strategy]}, {at.quantisation}" if at.quantisation else NAMES[at.strategy]
        yield " | ".join([where, way, at.dtype, size(rung.device_bytes), size(rung.ram_bytes)])


if __name__ == "__main__":
    DOCUMENT.write_text(as_markdown(Catalog()), "utf-8")
