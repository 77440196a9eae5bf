from typing import Literal

import gradio as gr
import pytest

from core.card import Ability, Card, Licence, Modality, Options, knob
from core.catalog import Catalog
from core.requests import parse_options
from demos.casting import hindrance
from demos.parts import engines, option_controls, option_values


class EveryKind(Options):
    number: float = knob(0.5, "a share", ge=0, le=1)
    whole: int = knob(4, "a count", ge=1, le=9, step=2)
    open_ended: int = knob(7, "no upper bound", ge=0)
    choice: Literal["soft", "loud"] = knob("soft", "how loud")
    switch: bool = knob(False, "on or off")
    voice: str = knob("anna", "who speaks", suggestions=["anna", "ben"])
    free: str = knob("", "anything")
    maybe: float | None = knob(None, "a share, or the engine's own", ge=0, le=1)


LICENCE = Licence(name="MIT")


def card(**more) -> Card:
    fields = {"id": "x", "name": "X", "modality": Modality.SPEECH, "summary": "S.", "code_licence": LICENCE}
    return Card(**fields | more)


def test_each_kind_of_option_gets_its_control():
    controls = option_controls(card(options=EveryKind))
    kinds = {name: type(control) for name, control in controls.items()}
    assert kinds == {
        "number": gr.Slider, "whole": gr.Slider, "open_ended": gr.Number, "choice": gr.Dropdown,
        "switch": gr.Checkbox, "voice": gr.Dropdown, "free": gr.Textbox, "maybe": gr.Number,
    }  # fmt: skip
    assert (controls["number"].minimum, controls["number"].maximum) == (0, 1)
    assert controls["whole"].step == 2
    assert controls["voice"].allow_custom_value
    assert controls["choice"].label == "Choice" and controls["choice"].info == "How loud"


@pytest.mark.parametrize("engine", [c.id for c in Catalog().cards(Modality.SPEECH)])
def test_untouched_controls_give_the_engines_defaults(engine):
    found = Catalog().card(engine)
    controls = option_controls(found)
    values = {control: control.value for control in controls.values()}
    assert parse_options(found, option_values(controls, values, found)) == found.options()


def test_whole_numbers_come_back_whole_from_sliders():
    found = card(options=EveryKind)
    controls = option_controls(found)
    values = {control: control.value for control in controls.values()} | {controls["whole"]: 5.0}
    assert parse_options(found, option_values(controls, values, found)).whole == 5


def test_what_a_card_says_is_escaped():
    html = engines([card(name="<b>X</b>", summary="<script>alert(1)</script>")], [], {}, {})
    assert "<script>" not in html and "<b>X</b>" not in html


@pytest.mark.parametrize(
    ("more", "language", "voice", "word", "blocks"),
    [
        ({"languages": ("en",)}, "fr", False, "no French", True),
        ({"languages": ("en",)}, "en", False, "", False),
        ({}, "fr", False, "", False),
        ({"reference_required": True}, "en", False, "needs a voice", False),
        ({"abilities": {Ability.CLONE}, "reference_required": True}, "en", True, "", False),
        ({}, "en", True, "own voice only", False),
    ],
)
def test_what_is_in_the_way_is_said_in_a_word(more, language, voice, word, blocks):
    found = hindrance(card(**more), language, voice)
    assert (found.word, found.blocks) == (word, blocks)
