"""The Speech tab: one text, spoken by several engines side by side."""

from __future__ import annotations

import asyncio
import html
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from core.card import Card, Modality
from core.errors import SoundstageError
from core.jobs import Job
from core.requests import SEED_MAX, Order, SpeechRequest
from core.studio import Studio
from core.takes import Take
from demos import figures
from demos.casting import banner, hindrance, licences_to_accept, plans
from demos.comparison import comparison
from demos.earlier import earlier
from demos.parts import act_on, engine_picker, engines, option_controls, option_values, pane
from demos.stage import Stage, stage
from demos.tracks import longest, track
from demos.views import ASSETS, asset, render

TAKES_LISTED = 40
LISTING_SECONDS = 2.0  # how old the list of takes may be while jobs run
FIRST_CHOICE = 2  # engines chosen when the page opens
AUTO = "auto"  # the placement that Soundstage chooses

Form = Mapping[Any, Any]  # component -> its value


class SpeechTab:
    """Builds the tab inside the present Blocks; `wire` connects it once the visitor is known.

    Args:
        studio: the one door to everything behind the page.
        visitor: the browser's token.
    """

    name = "Speech"
    modality = Modality.SPEECH

    def __init__(self, studio: Studio, visitor: gr.BrowserState) -> None:
        self.studio = studio
        self.visitor = visitor
        self.cards = {card.id: card for card in studio.cards(self.modality)}
        self.examples: dict[str, list[str]] = json.loads(asset("examples.json"))
        self.voices: list[dict[str, str]] = json.loads(asset("voices/voices.json"))
        self.sent = gr.State({})  # what this page shows by now, so that only changes travel
        self.nudge = gr.State(0)  # a new number starts the watch
        self._build()

    # What stands where

    def _build(self) -> None:
        chosen = list(self.cards)[:FIRST_CHOICE]
        gr.HTML(render("title"), apply_default_css=False)
        self.banner = pane(elem_classes="slot")
        with gr.Row(elem_classes="desk"):
            with gr.Column(scale=7, min_width=320):
                self._build_script()
            with gr.Column(scale=5, min_width=320):
                self._build_language()
                self._build_voice()
        self.picker = engine_picker(list(self.cards.values()), chosen, elem_id="engines")
        self.licences = gr.CheckboxGroup(
            label="Licences to accept", visible=False, elem_id="licences", elem_classes="plain-checks"
        )
        self.accepted = gr.BrowserState([], storage_key="soundstage-accepted", secret=self.studio.secret())
        self.draft = gr.BrowserState("", storage_key="soundstage-draft", secret=self.studio.secret())
        with gr.Row(elem_classes="action-bar"):
            self.speak = gr.Button(
                "Speak",
                variant="primary",
                interactive=False,
                elem_classes="go",
                elem_id="speak",
                scale=0,
                min_width=150,
            )
            self.stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=90)
            self.seed = gr.Number(
                _new_seed(),
                label="Seed for all",
                precision=0,
                minimum=0,
                maximum=SEED_MAX,
                min_width=130,
                scale=0,
            )
            self.random = gr.Checkbox(
                True, label="New seed at each press", elem_classes="inline-check", min_width=200
            )
        self.forecast = gr.HTML(
            "",
            html_template='<p aria-live="polite">${value}</p>',
            js_on_load=_SETTLED,
            elem_id="forecast",
            apply_default_css=False,
        )
        self.alert = pane(elem_id="alert", elem_classes="slot")
        self._build_options(chosen)
        self.status = gr.HTML(
            "",
            html_template='<p role="status" aria-live="polite">${value}</p>',
            elem_id="say",
            apply_default_css=False,
        )
        self.tracks = [pane(elem_classes="slot track-slot") for _ in self.cards]
        self.comparison = pane(elem_classes="slot")
        with gr.Row(elem_classes="exports", visible=False) as self.exports:
            self.csv = gr.Button("Export CSV", size="sm", scale=0, min_width=130, elem_id="csv")
            self.zip = gr.Button("Download all (zip)", size="sm", scale=0, min_width=170, elem_id="zip")
        self.csv_file = gr.DownloadButton(visible="hidden", elem_id="csv-file")
        self.zip_file = gr.DownloadButton(visible="hidden", elem_id="zip-file")
        self.takes = pane(elem_classes="slot")

    def _build_script(self) -> None:
        with gr.Group(elem_classes="script"):
            self.text = gr.Textbox(
                label="Text",
                lines=6,
                max_lines=16,
                placeholder="What should they say?",
                elem_id="text",
                autofocus=True,
            )
            self.count = gr.HTML("0 characters", elem_id="count", apply_default_css=False)
        self.chips = gr.HTML(
            self._chips("en"), js_on_load=_PICKS, apply_default_css=False, elem_id="examples"
        )

    def _build_language(self) -> None:
        codes = sorted(
            {c for card in self.cards.values() for c in card.languages} | {"en"}, key=figures.language
        )
        self.language = gr.Dropdown(
            [(figures.language(c), c) for c in codes], value="en", label="Language", elem_id="language"
        )

    def _build_voice(self) -> None:
        with gr.Accordion("A voice to clone", open=False, elem_id="voice-fold"):
            self.voice_chips = gr.HTML(
                render(
                    "chips",
                    label="Example voices",
                    name="voice",
                    chips=[(v["id"], v["name"]) for v in self.voices],
                ),
                js_on_load=_PICKS,
                apply_default_css=False,
                elem_id="voices",
            )
            self.voice = gr.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label="Reference recording",
                elem_id="voice",
                buttons=[],
                waveform_options=gr.WaveformOptions(show_recording_waveform=True),
            )
            self.voice_text = gr.Textbox(
                label="What is said in it",
                lines=2,
                info="Helps engines that align speech with text.",
                elem_id="voice-text",
            )
            self.consent = gr.Checkbox(
                False,
                label="I may use this voice",
                info="It is mine, or its speaker agreed.",
                visible=False,
                elem_id="consent",
            )

    def _build_options(self, chosen: Sequence[str]) -> None:
        self.options: dict[str, dict[str, gr.components.Component]] = {}
        self.option_groups: dict[str, gr.Group] = {}
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.placement = gr.Dropdown(
                self._placements(chosen),
                value=AUTO,
                label="Placement of weights",
                info="Where they go while an engine works; Auto takes the fastest way that fits.",
                filterable=False,
                elem_id="placement",
            )
            for card in self.cards.values():
                with gr.Group(visible=_shown(card.id in chosen), elem_classes="options") as group:
                    gr.HTML(render("options_title", card=card), apply_default_css=False)
                    with gr.Row(elem_classes="option-grid"):
                        self.options[card.id] = option_controls(card)
                self.option_groups[card.id] = group

    # What happens when

    def wire(self, ready: Any, tick: Any, slow_tick: Any) -> None:
        """Connect the events.

        Args:
            ready: the event after which `visitor` holds a token.
            tick, slow_tick: events every few seconds, and every half minute.
        """
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        ready(lambda draft: draft or gr.skip(), self.draft, self.text, **quiet).then(
            lambda: gr.Button(interactive=True), None, self.speak, **quiet
        )
        self.text.change(None, self.text, self.draft, js="(text) => text")
        self.text.change(None, [self.text, self.picker], self.count, js=self._counting())
        self.picker.change(None, [self.text, self.picker], self.count, js=self._counting())
        self.language.change(self._chips, self.language, self.chips, **quiet)
        self.chips.select(self._take_example, self.language, self.text, **quiet)
        self.voice_chips.select(self._take_voice, None, [self.voice, self.voice_text], **quiet)
        self.voice.change(
            lambda voice: gr.Checkbox(visible=bool(voice), value=False), self.voice, self.consent, **quiet
        )
        self.licences.input(
            lambda ticked, chosen, kept: [*ticked, *(e for e in kept if e not in chosen)],
            [self.licences, self.picker, self.accepted],
            self.accepted,
            **quiet,
        )
        gr.on(
            [ready, slow_tick, self.language.change, self.picker.change, self.voice.change],
            self._fit,
            [self.picker, self.language, self.voice, self.accepted, self.sent],
            [self.picker, self.licences, self.banner, self.placement, *self.option_groups.values()],
            trigger_mode="always_last",
            **quiet,
        )
        form = {
            self.visitor, self.text, self.language, self.picker, self.voice, self.voice_text, self.consent,
            self.seed, self.random, self.licences, self.placement,
            *(c for o in self.options.values() for c in o.values()),
        }  # fmt: skip
        self.text.change(None, js="() => soundstage.changed()")
        gr.on(
            [ready, slow_tick, self.forecast.select],
            self._foretell,
            form,
            self.forecast,
            queue=False,
            trigger_mode="always_last",
            **quiet,
        )
        self.speak.click(self._speak, form, [self.alert, self.seed, self.nudge], **quiet)
        self.stop.click(self._stop, self.visitor, self.nudge, **quiet)
        act_on([*self.tracks, self.takes], self._act, self.visitor, [self.alert, self.nudge])
        gr.on(
            [ready, tick, self.nudge.change],
            self._watch,
            [self.visitor, self.sent],
            [*self.tracks, self.comparison, self.exports, self.takes, self.status],
            trigger_mode="always_last",
            concurrency_limit=None,
            **quiet,
        )
        for button, make, file in (
            (self.csv, self._csv, self.csv_file),
            (self.zip, self._zip, self.zip_file),
        ):
            button.click(make, self.visitor, file, **quiet).success(
                None, js=f"() => document.querySelector('#{file.elem_id}').click()", **quiet
            )

    def _counting(self) -> str:
        limits = json.dumps({card.id: card.text_limit for card in self.cards.values()})
        return f"(text, chosen) => soundstage.count(text, chosen, {limits})"

    def _chips(self, language: str) -> str:
        texts = self.examples.get(language, [])
        return render(
            "chips", label="Examples", name="example", chips=[(str(i), t) for i, t in enumerate(texts)]
        )

    def _take_example(self, language: str, event: gr.EventData) -> str:
        return self.examples[language][int(event.id)]

    def _take_voice(self, event: gr.EventData) -> tuple[str, str]:
        voice = next(voice for voice in self.voices if voice["id"] == event.id)
        return str(ASSETS / "voices" / voice["file"]), voice["text"]

    # Which engines fit

    def _fit(
        self, chosen: list[str], language: str, voice: str | None, accepted: list[str], sent: dict[str, Any]
    ) -> list[Any]:
        """Bring the picker, the licence boxes, the banner and what is under Advanced up to date."""
        planned = plans(self.studio, self.cards)
        hindrances = {card.id: hindrance(card, language, bool(voice)) for card in self.cards.values()}
        content = engines(list(self.cards.values()), chosen, hindrances, planned)
        needed = licences_to_accept(self.studio, [self.cards[engine] for engine in chosen], planned)
        boxes = gr.CheckboxGroup(
            [(sentence, engine) for engine, sentence in needed.items()],
            value=[engine for engine in needed if engine in accepted],
            visible=bool(needed),
        )
        notice, ways = banner(self.cards, planned), self._placements(chosen)
        return [
            _changed(sent, "picker", content, lambda: gr.HTML(content=content)),
            _changed(sent, "licences", list(needed), lambda: boxes),
            _changed(sent, "banner", notice, lambda: notice),
            _changed(sent, "placements", ways, lambda: gr.Dropdown(ways, value=AUTO)),
            *(
                _changed(
                    sent,
                    f"options of {engine}",
                    engine in chosen,
                    partial(gr.Group, visible=_shown(engine in chosen)),
                )
                for engine in self.option_groups
            ),
        ]

    def _placements(self, chosen: Sequence[str]) -> list[tuple[str, str]]:
        """The ways to run that all chosen engines allow, as names and values."""
        ways = self.studio.placements(chosen)
        return [("Auto", AUTO), *((name[:1].upper() + name[1:], way) for way, name in ways.items())]

    # Press and watch

    def _foretell(self, form: Form) -> str:
        """What a press would cost, in a line; empty where nothing is known or there is nothing to say."""
        if not (form[self.text] or "").strip():
            return ""
        return html.escape(self.studio.forecast_line(self._orders(form, seed=0)))

    def _speak(self, form: Form) -> tuple[str, Any, Any]:
        seed = _new_seed() if form[self.random] or form[self.seed] is None else int(form[self.seed])
        orders = self._orders(form, seed)
        faults = [fault for order in orders if (fault := self._fault(order))]
        try:
            if not faults:
                self.studio.submit(orders, form[self.visitor])
        except SoundstageError as error:
            faults = [str(error)]
        if faults:
            return render("alert", faults=list(dict.fromkeys(faults))), gr.skip(), gr.skip()
        return "", seed, _nudge()

    def _orders(self, form: Form, seed: int) -> list[Order]:
        voice = form[self.voice]
        request = SpeechRequest(
            text=form[self.text],
            language=form[self.language],
            voice=Path(voice) if voice else None,
            voice_text=form[self.voice_text] if voice else "",
            consent=bool(voice and form[self.consent]),
        )
        group = secrets.token_hex(8)
        ways = self.studio.placements(
            form[self.picker]
        )  # engines chosen just now may not allow the one shown
        forced = next((way for way in ways if way == form[self.placement]), None)
        return [
            Order(
                engine=card.id,
                request=request,
                options=option_values(self.options[card.id], form, card),
                seed=seed,
                weights=self.studio.settings.weights,
                accepted=frozenset(form[self.licences] or ()),
                forced=forced,
                group=group,
            )
            for card in self.cards.values()
            if card.id in form[self.picker] and not hindrance(card, request.language, bool(voice)).blocks
        ]

    def _fault(self, order: Order) -> str:
        try:
            self.studio.check(order)
        except SoundstageError as error:
            return str(error)
        return ""

    def _stop(self, visitor: str) -> int:
        self.studio.stop(visitor)
        return _nudge()

    def _act(self, visitor: str, event: gr.EventData) -> tuple[str, int]:
        try:
            match event.act:
                case "stop":
                    self.studio.stop(visitor, event.id)
                case "again":
                    self.studio.again(event.id, visitor)
                case "delete":
                    self.studio.delete(event.id, visitor)
        except SoundstageError as error:
            return render("alert", faults=[str(error)]), _nudge()
        return "", _nudge()

    async def _watch(self, visitor: str | None, sent: dict[str, Any]) -> AsyncIterator[list[Any]]:
        """Show this browser's jobs and takes for as long as one of its jobs runs; only changes travel."""
        if not visitor:
            yield [gr.skip()] * (len(self.tracks) + 4)
            return
        if not sent.pop("whole", True):  # the last watch broke off: what it sent may not have arrived
            sent.clear()
        sent["whole"] = False
        listing = _Listing(lambda: self._takes(visitor))
        first = True
        async for _ in self.studio.changes(visitor):
            jobs = self.studio.jobs(visitor)
            # In a thread: disk and templates must not hold up the server's loop.
            updates = await asyncio.to_thread(self._view, jobs, listing, sent)
            if first or any(update != gr.skip() for update in updates):
                yield updates
            first = False
            if all(job.over for job in jobs):
                break
        sent["whole"] = True

    def _takes(self, visitor: str) -> list[Take]:
        kept = self.studio.list_takes(visitor, self.modality, TAKES_LISTED)
        return [take for take in kept if take.engine in self.cards]  # an engine may have been removed

    def _view(self, jobs: Sequence[Job], listing: _Listing, sent: dict[str, Any]) -> list[Any]:
        shown = stage(jobs, listing.of(jobs))
        span = longest(shown.slots)
        finished = [slot.take for slot in shown.slots if slot.take]
        made = [take.id for take in finished]
        empty = len(self.tracks) - len(shown.slots)
        return [
            *(
                _changed(
                    sent,
                    f"track {place}",
                    (slot.looks, span),
                    partial(track, slot, self.cards[slot.order.engine], span),
                )
                for place, slot in enumerate(shown.slots)
            ),
            *(_changed(sent, f"track {len(shown.slots) + place}", None, str) for place in range(empty)),
            _changed(sent, "comparison", made, lambda: comparison(finished, self.cards)),
            _changed(sent, "exports", bool(made), lambda: gr.Row(visible=bool(made))),
            _changed(
                sent, "takes", [p.looks for p in shown.earlier], lambda: earlier(shown.earlier, self.cards)
            ),
            _changed(sent, "say", [p.state for p in shown.slots], lambda: _say(shown, self.cards)),
        ]

    # Files to take home

    def _finished(self, visitor: str) -> list[str]:
        shown = stage(self.studio.jobs(visitor), self._takes(visitor))
        return [slot.take.id for slot in shown.slots if slot.take]

    def _csv(self, visitor: str) -> str:
        file = Path(tempfile.mkdtemp(prefix="soundstage-")) / "soundstage-runs.csv"
        file.write_text(self.studio.as_csv(self._finished(visitor), visitor), encoding="utf-8")
        return str(file)

    def _zip(self, visitor: str) -> str:
        file = Path(tempfile.mkdtemp(prefix="soundstage-")) / "soundstage-takes.zip"
        return str(self.studio.export_zip(self._finished(visitor), visitor, file))


_PICKS = """
element.addEventListener('click', (event) => {
  const chip = event.target.closest('[data-pick]');
  if (chip) trigger('select', { id: chip.dataset.pick });
});
"""


# Once the form has rested for a moment, ask anew what a press would cost.
_SETTLED = """
let resting;
const changed = () => {
  clearTimeout(resting);
  resting = setTimeout(() => trigger('select', {}), 600);
};
for (const kind of ['input', 'change', 'soundstage-changed']) document.addEventListener(kind, changed);
"""


def _nudge() -> int:
    return secrets.randbits(40)


def _new_seed() -> int:
    return secrets.randbelow(10**6)  # short enough to read out; any value up to SEED_MAX can be typed


def _shown(on: bool) -> bool | Literal["hidden"]:
    """Hidden controls stay mounted: what was set in them is not lost when they are mounted anew."""
    return True if on else "hidden"


def _changed(sent: dict[str, Any], name: str, looks: Any, update: Callable[[], Any]) -> Any:
    """The update, or nothing where the page shows these looks already."""
    if name in sent and sent[name] == looks:
        return gr.skip()
    sent[name] = looks
    return update()


class _Listing:
    """The takes of a browser, read from disk again only when a job ended, and now and then."""

    def __init__(self, read: Callable[[], list[Take]]) -> None:
        self._read = read
        self._ended: set[str] = set()
        self._takes: list[Take] = []
        self._at = float("-inf")

    def of(self, jobs: Sequence[Job]) -> list[Take]:
        ended = {job.id for job in jobs if job.over}
        if ended != self._ended or time.monotonic() - self._at > LISTING_SECONDS:
            self._ended, self._takes, self._at = ended, self._read(), time.monotonic()
        return self._takes


def _say(shown: Stage, cards: Mapping[str, Card]) -> str:
    """One line on how the press stands, for eyes and screen readers; it changes only when a state does."""
    if not shown.slots:
        return ""
    ended = {"done": "done", "failed": "failed", "stopped": "stopped"}
    counts = {word: sum(slot.state == state for slot in shown.slots) for state, word in ended.items()}
    text = ", ".join(f"{number} {word}" for word, number in counts.items() if number)
    busy = [cards[s.order.engine].name for s in shown.slots if s.state in ("loading", "running")]
    waiting = sum(s.state == "queued" for s in shown.slots)
    parts = [text, f"{', '.join(busy)} at work" if busy else "", f"{waiting} waiting" if waiting else ""]
    return "; ".join(part for part in parts if part) + "."
