"""What every engine must do, whichever it is: from the catalogue, so that a new one is held to it too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile

from core.card import Ability
from core.catalog import Catalog
from core.errors import BadInput
from core.requests import Order, SpeechRequest
from core.settings import Settings
from core.studio import Studio
from tests.support import reference

ROOT = Path(__file__).parents[1]
VOICES = json.loads((ROOT / "assets/voices/voices.json").read_text())
CARDS = {card.id: card for card in Catalog().cards()}
TEXT = "Good morning, dear listeners. Today we speak about rivers."


def order(engine: str, seed: int = 11, text: str = TEXT, **changes) -> Order:
    request = SpeechRequest(text=text, **reference(CARDS[engine]) | changes)
    return Order(engine=engine, request=request, seed=seed, weights="miniature")


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    made = Studio(
        Settings(home=folder / "home", cache=folder / "cache", device="cpu", threads=1, inline=True)
    )
    yield made
    made.close()


@pytest.mark.parametrize("engine", CARDS)
def test_it_speaks_says_what_it_cost_and_makes_the_same_again(studio, engine):
    [job] = studio.submit([order(engine)], "anna")
    steps = []
    studio.wait(job, lambda job: steps.append(job.fraction), interval=0.01)
    assert job.state == "done", (job.reason, job.detail)
    take = job.take
    samples, rate = soundfile.read(take.folder / "audio.wav")
    assert rate == CARDS[engine].sample_rate
    assert len(samples) > 0.2 * rate and 0 < abs(samples).max() <= 1
    cost = take.measurements
    assert cost["generate_seconds"] > 0 and cost["real_time_factor"] > 0 and cost["ram_peak_bytes"] > 0
    assert cost["first_audio_seconds"] <= cost["generate_seconds"] + 0.01
    assert cost["device_peak_bytes"] or not CARDS[engine].has_weights
    assert (take.folder / "mel.png").is_file() and len(take.media[0]["peaks"]) == 400

    again = studio.wait(studio.again(take.id, "anna"))
    assert again.state == "done", again.reason
    same = again.take.media[0]["sha256"] == take.media[0]["sha256"]
    assert same == CARDS[engine].reproducible


@pytest.mark.parametrize("engine", CARDS)
def test_its_card_can_be_shown_and_its_options_drawn(engine):
    card = CARDS[engine]
    assert card.summary.endswith(".") and len(card.summary) < 120
    assert card.sample_rate > 0 and card.paradigm and card.source.startswith("https://")
    for name, field in card.options.model_fields.items():
        assert field.description, f"option {name} has no description"
        card.options(**{name: field.get_default(call_default_factory=True)})


@pytest.mark.parametrize("engine", CARDS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no text"),
        (" \n\t ", "no text"),
        ("a" * 100_000, "takes at most"),
        ("ding \x07 dong", "control character"),
        ("?!", "no letter"),
    ],
)
def test_it_refuses_text_that_nobody_can_speak(studio, engine, text, says):
    with pytest.raises(BadInput, match=says):
        studio.check(order(engine, text=text))


@pytest.mark.parametrize("engine", CARDS)
def test_it_refuses_a_language_it_does_not_speak(studio, engine):
    with pytest.raises(BadInput, match="'tlh'"):
        studio.check(order(engine, language="tlh"))


@pytest.mark.parametrize("engine", [c.id for c in CARDS.values() if Ability.CUES not in c.abilities])
def test_it_refuses_cues_and_tags_that_it_would_read_aloud(studio, engine):
    for text in ("Well [laughs] hello", "Well <b>hello</b>"):
        with pytest.raises(BadInput, match="aloud"):
            studio.check(order(engine, text=text))


@pytest.mark.parametrize("engine", [c.id for c in CARDS.values() if Ability.CLONE in c.abilities])
def test_it_clones_only_with_consent(studio, engine):
    voice = ROOT / "assets/voices" / VOICES[0]["file"]
    with pytest.raises(BadInput, match="may use this voice"):
        studio.check(order(engine, voice=voice, voice_text=VOICES[0]["text"], consent=False))


def test_no_weights_stay_after_all_were_used(studio):
    loaded = studio._worker._host.residency
    released = loaded.release_all()
    assert released and all(r.clean for r in released), released
