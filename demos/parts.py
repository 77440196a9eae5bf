"""Parts that every tab needs, each made once: panes of HTML that act, the engine picker, the options form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from core.card import Ability, Card
from core.errors import SoundstageError
from core.weights import Plan
from demos import figures
from demos.casting import Hindrance
from demos.views import render

# A press on anything with data-act becomes one select event with what to do and to which id.
_ACTS = """
element.addEventListener('click', (event) => {
  const deed = event.target.closest('[data-act]');
  if (deed && !deed.disabled) trigger('select', { act: deed.dataset.act, id: deed.dataset.id });
});
"""
# A button that opens a sheet. What is open is known here only: the server changes `face` and `content`.
_SHEET = """
const button = () => element.querySelector('[aria-expanded]');
const sheet = () => element.querySelector('.sheet');
element.addEventListener('click', (event) => {
  if (event.target.closest('[aria-expanded]')) props.value = !props.value;
});
element.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || !props.value) return;
  props.value = false;
  button().focus();
});
document.addEventListener('click', (event) => {
  if (props.value && !event.composedPath().includes(element)) props.value = false;
});
// A row may go with the button in it that was just pressed: the focus stays in the sheet.
let within = false;
element.addEventListener('focusin', () => (within = true));
document.addEventListener('focusin', (event) => (within = element.contains(event.target)));
document.addEventListener('pointerdown', (event) => (within = event.composedPath().includes(element)));
new MutationObserver(() => {
  const lost = document.activeElement === document.body || document.activeElement?.disabled;
  if (within && props.value && lost) sheet().focus();
}).observe(element, { childList: true, subtree: true, attributeFilter: ['disabled'] });
"""
_CHOICE = """
element.addEventListener('change', () => {
  props.value = [...element.querySelectorAll('input:checked')].map((box) => box.value);
});
"""


def pane(value: str = "", **settings: Any) -> gr.HTML:
    """HTML that Python renders; Gradio changes only the nodes that differ, so a player goes on playing."""
    return gr.HTML(value, js_on_load=_ACTS, apply_default_css=False, **settings)


def sheet_button(face: str, content: str, sheet_id: str, **settings: Any) -> gr.HTML:
    """A button with a sheet below it, which Escape and a press elsewhere close.

    Its props `face` and `content` are the HTML of the two; presses in the sheet act as in a `pane`.
    """
    return gr.HTML(
        False,
        html_template=(
            f'<button type="button" class="chip opener" aria-expanded="${{value}}" '
            f'aria-controls="{sheet_id}">${{face}}</button>'
            f'<section class="sheet" id="{sheet_id}" tabindex="-1" aria-labelledby="{sheet_id}-title" '
            '${value ? "" : "hidden"}>${content}</section>'
        ),
        js_on_load=_ACTS + _SHEET,
        apply_default_css=False,
        face=face,
        content=content,
        **settings,
    )


def engine_picker(cards: Sequence[Card], chosen: Sequence[str], **settings: Any) -> gr.HTML:
    """A checkbox an engine; its value is the list of chosen ids, its prop `content` the HTML of `engines`."""
    return gr.HTML(
        list(chosen),
        html_template="${content}",
        js_on_load=_CHOICE,
        apply_default_css=False,
        content=engines(cards, chosen, {}, {}),
        **settings,
    )


def engines(
    cards: Sequence[Card],
    chosen: Sequence[str],
    hindrances: Mapping[str, Hindrance],
    plans: Mapping[str, Plan | SoundstageError],
) -> str:
    """The picker's HTML.

    Args:
        hindrances: engine id -> what is in its way.
        plans: engine id -> its weights, or why there are none.
    """
    shown = []
    for card in cards:
        hindrance, plan = hindrances.get(card.id, Hindrance()), plans.get(card.id)
        shown.append(
            {
                "id": card.id,
                "name": card.name,
                "summary": card.summary,
                "facts": card_facts(card),
                "hindrance": hindrance.word,
                "mild": hindrance.mild,
                "blocked": hindrance.blocks,
                "chosen": card.id in chosen,
                "weights": plan.sentence if isinstance(plan, Plan) else str(plan or ""),
                "weights_kind": plan.kind if isinstance(plan, Plan) else "absent",
            }
        )
    return render("engines", engines=shown)


def card_facts(card: Card) -> list[str]:
    """What an engine is, in words of a few letters each."""
    licence = card.weights_licence
    found = [
        str(card.paradigm or ""),
        figures.languages(card.languages),
        "clones voices" if Ability.CLONE in card.abilities else "",
        "streams" if Ability.STREAM in card.abilities else "",
        "performs [cues]" if Ability.CUES in card.abilities else "",
        f"{figures.count(card.parameters)} parameters" if card.parameters else "",
        f"{licence.name}{'' if licence.commercial else ', non-commercial'}" if licence else "no weights",
    ]
    return [fact for fact in found if fact]


def option_controls(card: Card) -> dict[str, gr.components.Component]:
    """One control for each of an engine's options, from the JSON schema of its pydantic model."""
    fields = card.options.model_json_schema().get("properties", {})
    return {name: _control(name, field) for name, field in fields.items()}


def _control(name: str, field: Mapping[str, Any]) -> gr.components.Component:
    # An optional value is a choice between its type and null, and a slider has no place for null.
    optional = "anyOf" in field
    field = {**next((f for f in field.get("anyOf", ()) if f.get("type") != "null"), {}), **field}
    about = {
        "label": name.replace("_", " ").capitalize(),
        "info": _sentence(field.get("description", "")),
        "value": field.get("default"),
    }
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    match field:
        case {"enum": choices}:
            return gr.Dropdown(choices, filterable=len(choices) > 8, **about)
        case {"type": "boolean"}:
            return gr.Checkbox(**about)
        case {"type": "integer" | "number" as kind} if not (optional or low is None or high is None):
            fine = 1 if kind == "integer" else _fine_step(high - low)
            return gr.Slider(low, high, step=field.get("step", fine), **about)
        case {"type": "integer" | "number" as kind}:
            return gr.Number(minimum=low, maximum=high, precision=0 if kind == "integer" else None, **about)
        case {"suggestions": suggestions}:
            return gr.Dropdown(suggestions, allow_custom_value=True, **about)
    return gr.Textbox(**about)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _fine_step(span: float) -> float:
    """About a hundredth of the span, as a round number."""
    return next((step for step in (0.001, 0.01, 0.05, 0.1, 0.5, 1.0) if span / step <= 200), 1.0)


def option_values(
    controls: Mapping[str, gr.components.Component], values: Mapping[Any, Any], card: Card
) -> dict[str, Any]:
    """What the controls hold, ready for the engine's Options; sliders give whole numbers as floats."""
    fields = card.options.model_fields
    found: dict[str, Any] = {}
    for name, control in controls.items():
        value = values[control]
        if isinstance(value, float) and value.is_integer() and isinstance(fields[name].default, int):
            value = int(value)
        if value is not None or fields[name].default is not None:
            found[name] = value
    return found


def act_on(
    panes: Sequence[gr.HTML], deed: Callable[..., Any], inputs: Any, outputs: Any
) -> gr.events.Dependency:
    """Run `deed(event, ...)` for every press on a `data-act` element of `panes`."""
    return gr.on(
        [p.select for p in panes],
        deed,
        inputs,
        outputs,
        api_visibility="private",
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="multiple",
    )
