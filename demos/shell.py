"""The page as a whole: header, tabs, theme, and how it is launched."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from core.card import Modality
from core.errors import BadInput
from core.studio import Status, Studio
from demos import figures
from demos.endpoints import add_endpoints
from demos.memory import MemorySheet
from demos.speech import SpeechTab
from demos.theme import theme
from demos.views import ASSETS, asset, drawing, render

TABS = {"speech": SpeechTab}
TICK_SECONDS = 4.0  # how often an open page asks for the header's figures, and whether jobs run
SLOW_TICK_SECONDS = 30.0  # and whether engines have their weights by now
UPLOADS_KEPT = (3600, 86400)  # look every hour; uploads a day old go, takes keep their own copy
SESSIONS = 300  # kept in memory; each is about 125 KB
HANDLERS = 16  # presses of one kind answered at once
OPEN_PAGES = 200  # pages that can watch running jobs at once


def build(studio: Studio) -> gr.Blocks:
    """The whole page, not yet launched."""
    with gr.Blocks(title="Soundstage", fill_width=False, delete_cache=UPLOADS_KEPT) as page:
        visitor = gr.BrowserState(None, storage_key="soundstage-visitor", secret=studio.secret())
        with gr.Row(elem_classes="header"):
            gr.HTML(render("header", logo=drawing("logo.svg")), apply_default_css=False, elem_classes="brand")
            chips = gr.HTML(_status(studio.status()), apply_default_css=False, elem_classes="status")
            memory = MemorySheet(studio)
        tabs = _tabs(studio, visitor)
        shown = gr.State(tabs[0][0].modality)  # what this page looks at
        timer, slow_timer = gr.Timer(TICK_SECONDS), gr.Timer(SLOW_TICK_SECONDS)
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        known = gr.State(False)
        page.load(
            lambda token: (token or secrets.token_urlsafe(24), True), visitor, [visitor, known], **quiet
        )

        def look(tab: Modality, request: gr.Request) -> tuple[str, gr.HTML]:
            """A sign of life of this page; gives what its header shows."""
            studio.visit(request.session_hash, tab)
            now = studio.status()
            return _status(now), memory.view(now)

        def turning_to(tab: Modality) -> Callable[[gr.Request], Modality]:
            def turn(request: gr.Request) -> Modality:  # Gradio reads the annotation: no partial or lambda
                studio.visit(request.session_hash, tab)
                return tab

            return turn

        def leave(request: gr.Request) -> None:
            studio.leave(request.session_hash)

        gr.on([page.load, timer.tick], look, shown, [chips, memory.pane], queue=False, **quiet)
        page.unload(leave)
        for tab, leaf in tabs:
            tab.wire(known.change, timer.tick, slow_timer.tick)
            if leaf:
                leaf.select(turning_to(tab.modality), None, shown, queue=False, **quiet)
        add_endpoints(studio)
    # Each handler only reads a form or asks the studio; the worker runs one job at a time anyway.
    return page.queue(default_concurrency_limit=HANDLERS)


def launch_options(studio: Studio) -> dict[str, Any]:
    """What `Blocks.launch` needs, the same on a machine of one's own and on a Space."""
    takes = studio.takes.folder
    return {
        "theme": theme(),
        # Not as `css`: Gradio's prefixing takes selectors apart at the commas inside :is() and :has().
        "head": f"<style>{asset('style.css')}</style>\n<script>{asset('page.js')}</script>",
        "allowed_paths": [str(takes / "kept"), str(takes / "partial"), str(ASSETS)],
        "favicon_path": str(ASSETS / "logo.svg"),
        "footer_links": [],
        "run_history": False,
        "max_threads": OPEN_PAGES,
        "state_session_capacity": SESSIONS,
    }


def _tabs(studio: Studio, visitor: gr.BrowserState) -> list[tuple[SpeechTab, gr.Tab | None]]:
    """The wanted tabs, each with its leaf; a single one needs none."""
    wanted = studio.settings.tabs or tuple(TABS)
    for name in wanted:
        if name not in TABS:
            raise BadInput(f"There is no tab {name!r}; the tabs are: {', '.join(TABS)}.")
    if len(wanted) == 1:
        return [(TABS[wanted[0]](studio, visitor), None)]
    built = []
    with gr.Tabs():
        for name in wanted:
            with gr.Tab(TABS[name].name, id=name) as leaf:
                built.append((TABS[name](studio, visitor), leaf))
    return built


def _status(now: Status) -> str:
    """The chips of the header."""
    # A CPU's device memory is RAM: one meter says it.
    own = now.memory_total if now.memory_total != now.ram_total else 0
    meters = [
        (name, figures.size(used), figures.size(total), round(100 * used / total))
        for name, used, total in (
            ("Device memory", now.memory_used, own),
            ("RAM", now.ram_used, now.ram_total),
        )
        if total
    ]
    queue = f"{now.queue} waiting" if now.queue else "empty"
    return render("status", device=now.device or "starting", worker=now.worker, queue=queue, meters=meters)
