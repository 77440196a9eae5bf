"""What is in memory: a button in the header, and a sheet with bars, a table and buttons to unload."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from core.studio import Holding, Status, Studio
from demos import figures
from demos.parts import act_on, sheet_button
from demos.views import render

SHARES = (1.0, 0.75, 0.5, 0.25)  # of the device, as a budget
ANSWER_SECONDS = 3.0  # how long a press waits to see memory come back
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Piece:
    """One part of a bar."""

    name: str
    bytes: int
    kind: str  # in-use, loaded, parked, other, free
    percent: float
    engine: bool = False

    @property
    def words(self) -> str:
        return f"{self.name} {figures.size(self.bytes)}"


class MemorySheet:
    """Builds the button with its sheet inside the present Blocks; `view` brings it up to date."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        starting = render("memory_face", words="…")  # what is in memory is known once the page asks
        self.pane = sheet_button(starting, "", "memory", elem_classes="memory", elem_id="memory-chip")
        act_on([self.pane], self._act, None, self.pane)

    def view(self, now: Status) -> gr.HTML:
        return gr.HTML(face=face(now), content=sheet(now, self.studio.settings.operator_page))

    async def _act(self, event: gr.EventData) -> gr.HTML:
        match event.act:
            case "unload":
                await self._unload(event.id or "")
            case "budget" if event.id in map(str, SHARES) and self.studio.settings.operator_page:
                await self._set_budget(float(event.id))
        return self.view(self.studio.status())

    async def _set_budget(self, share: float) -> None:
        before = self.studio.status().memory_total
        await asyncio.to_thread(self.studio.set_budget, share)
        until = time.monotonic() + ANSWER_SECONDS
        while self.studio.status().memory_total == before and time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS)

    async def _unload(self, engine: str) -> None:
        """Unload what was asked for, and wait until it is gone."""
        wanted = {h.engine for h in self.studio.status().held if not h.kept and engine in ("", h.engine)}
        await asyncio.to_thread(self.studio.unload, engine)
        until = time.monotonic() + ANSWER_SECONDS
        while wanted & {h.engine for h in self.studio.status().held} and time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS)


def face(now: Status) -> str:
    """The button in a few words: what is loaded, parked and free."""
    return render("memory_face", words=in_short(now))


def in_short(now: Status) -> str:
    if not now.memory_total:
        return "starting"
    parked = sum(h.state == "parked" for h in now.held)
    loaded = len(now.held) - parked
    parts = [
        f"{loaded} loaded" if loaded else "nothing loaded",
        f"{parked} parked" if parked else "",
        f"{figures.size(now.memory_free)} free",
    ]
    return ", ".join(part for part in parts if part)


def sheet(now: Status, operator: bool = False) -> str:
    """The sheet's HTML; an operator may change the budget there."""
    return render(
        "memory",
        bars=bars(now),
        one_memory=now.one_memory,
        leak=now.leak,
        budgets=budgets(now) if operator else [],
        idle=not any(not held.kept for held in now.held),
        rows=[
            {
                "held": held,
                "device": _size(held.device_bytes + (held.ram_bytes if now.one_memory else 0)),
                "ram": _size(held.ram_bytes),
                "where": "in RAM, until it is needed" if held.state == "parked" else held.words,
                "idle": "" if held.state == "in use" else figures.seconds(round(held.idle_seconds)),
            }
            for held in now.held
        ],
    )


def budgets(now: Status) -> list[dict[str, object]]:
    """The shares of the device that engines may be held to, with the one that holds now."""
    if not now.device_size:
        return []
    return [
        {
            "share": share,
            "words": "all of it" if share == 1 else figures.size(int(share * now.device_size)),
            "now": abs(now.memory_total / now.device_size - share) < 0.01,
        }
        for share in SHARES
    ]


def bars(now: Status) -> list[dict[str, object]]:
    """The device's memory, and RAM where that is another one: title, bytes free and in all, pieces."""
    if not now.memory_total:
        return []
    if now.one_memory:
        title = "RAM" if now.memory_total == now.ram_total else "RAM, within the budget"
        pieces = [(h, h.device_bytes + h.ram_bytes) for h in now.held]
        return [_bar(title, now.memory_total, now.memory_free, pieces)]
    device = [(h, h.device_bytes) for h in now.held]
    ram = [(h, h.ram_bytes) for h in now.held]
    return [
        _bar(now.device, now.memory_total, now.memory_free, device),
        _bar("RAM", now.ram_total, now.ram_free, ram),
    ]


def _bar(title: str, total: int, free: int, held: Sequence[tuple[Holding, int]]) -> dict[str, object]:
    return {
        "title": title,
        "free": figures.size(free),
        "total": figures.size(total),
        "pieces": stack(total, free, held),
    }


def stack(total: int, free: int, held: Sequence[tuple[Holding, int]]) -> list[Piece]:
    """The pieces of a bar, which add up to `total` bytes, or to more where more is planned for.

    What an engine takes is planned, its working memory with it: while it rests, some of that still counts as
    free. What neither an engine takes nor is free belongs to something else.
    """
    engines = sum(size for _, size in held)
    total = max(total, engines, 1)
    free = min(free, total - engines)
    other = total - engines - free
    pieces = [
        Piece(h.name, size, _KINDS[h.state], 100 * size / total, engine=True) for h, size in held if size
    ]
    rest = (("other", other), ("free", free))
    return [*pieces, *(Piece(kind, size, kind, 100 * size / total) for kind, size in rest if size)]


def _size(count: int) -> str:
    return figures.size(count or None)


_KINDS = {"in use": "in-use", "loaded": "loaded", "parked": "parked"}
