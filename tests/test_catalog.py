"""The catalogue: cards are found by folder, and reading them loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import core
from core.card import Card, Modality, Options
from core.catalog import Catalog
from core.errors import BadInput, SoundstageError

ROOT = Path(core.__file__).parents[1]
HEAVY = (
    "torch",
    "torchaudio",
    "transformers",
    "diffusers",
    "accelerate",
    "TTS",
    "f5_tts",
    "librosa",
    "gradio",
)


def test_every_engine_folder_is_found_and_reading_the_cards_imports_nothing_heavy():
    script = (
        "import json, sys; from core.catalog import Catalog; ids = [c.id for c in Catalog().cards()]; "
        f"print(json.dumps([ids, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    ids, loaded = json.loads(ran.stdout)
    assert loaded == []
    folders = sorted(card.parent.name for card in (ROOT / "core" / "engines").glob("*/card.py"))
    assert sorted(ids) == folders != []


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(BadInput, match=r"There is no engine 'espaek'; the engines are: .*espeak"):
        Catalog().card("espaek")
    with pytest.raises(BadInput, match="There is no engine"):
        Catalog().package("espaek")


def test_an_extra_package_adds_its_engine():
    catalog = Catalog(("tests.unruly",))
    assert catalog.card("unruly").name == "Unruly"
    assert catalog.package("unruly") == "tests.unruly"
    assert "unruly" not in [c.id for c in Catalog().cards()]


def test_cards_come_without_weights_first_then_by_name():
    cards = Catalog(("tests.unruly",)).cards(Modality.SPEECH)
    assert cards == sorted(cards, key=lambda c: (c.has_weights, c.name.lower()))
    assert all(c.modality is Modality.SPEECH for c in cards)
    assert Catalog().cards(Modality.SHAPE) == []


@pytest.mark.parametrize("card", Catalog().cards(), ids=lambda c: c.id)
def test_a_card_is_complete_and_its_options_describe_themselves(card: Card):
    assert card.summary.endswith(".") and card.sample_rate > 0 and card.paradigm
    assert issubclass(card.options, Options)
    for name, field in card.options.model_fields.items():
        assert field.description, f"{card.id}: option {name} has no description"
        assert not field.is_required(), f"{card.id}: option {name} has no default"
    assert card.options() == card.options()
    if card.has_weights:
        for checkpoint in card.checkpoints:
            assert checkpoint.repository or checkpoint.archive
            assert checkpoint.required and checkpoint.parameters


def test_an_extra_package_that_cannot_be_read_is_named():
    with pytest.raises(SoundstageError, match=r"engine package 'nowhere.at_all' cannot be read"):
        Catalog(("nowhere.at_all",))
