"""The public API, as a client of the served page finds it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import soundfile
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

SNAPSHOT = Path(__file__).with_name("api.json")
VOICE = Path(__file__).parents[2] / "assets" / "voices" / "bookseller.flac"


@pytest.fixture(scope="module")
def client(site: str) -> Client:
    return Client(site, verbose=False)


def test_the_schema_is_the_one_promised(client: Client):
    """Scripts depend on names, order, types and choices. SOUNDSTAGE_SNAPSHOT=write writes it anew."""
    found = _schema(client)
    if os.environ.get("SOUNDSTAGE_SNAPSHOT") == "write":
        SNAPSHOT.write_text(json.dumps(found, indent=2) + "\n")
    assert found == json.loads(SNAPSHOT.read_text())


def test_speech_generate_gives_the_audio_and_its_record(client: Client):
    ask = {"text": "Good evening.", "engine": "espeak", "options": {"speed": 120}, "seed": 7}
    audio, record = client.predict(**ask, api_name="/speech_generate")
    sound = soundfile.info(audio)
    assert sound.samplerate == 22050
    assert sound.duration == pytest.approx(record["measurements"]["audio_seconds"], abs=0.01)
    assert record["order"]["options"]["speed"] == 120
    assert record["order"]["seed"] == 7


def test_speech_generate_clones_only_with_consent(client: Client):
    ask = {"text": "Good evening.", "engine": "xtts", "voice": handle_file(VOICE)}
    with pytest.raises(AppError, match="Confirm that you may use this voice"):
        client.predict(**ask, api_name="/speech_generate")
    _, record = client.predict(**ask, consent=True, api_name="/speech_generate")
    assert record["order"]["request"]["consent"] is True


def test_speech_compare_speaks_with_each_engine_in_order(client: Client):
    files, records = client.predict(
        text="One, two.", engines=["mms", "espeak"], seed=3, api_name="/speech_compare"
    )
    assert [record["engine"] for record in records] == ["mms", "espeak"]
    assert [soundfile.info(file).samplerate for file in files] == [16000, 22050]


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        ({"text": "", "engine": "espeak"}, "There is no text to speak"),
        ({"text": "Hi.", "engine": "espeak", "options": {"speed": 9999}}, "option 'speed' is 9999"),
        ({"text": "Hi.", "engine": "espeak", "options": {"sped": 1}}, "there is no option 'sped'"),
        ({"text": "Hi.", "engine": "vits", "language": "sw"}, "does not speak"),
        ({"text": "Hi.", "engine": "espeak", "seed": 2**40}, "The seed is 1099511627776"),
        ({"text": "Hi.", "engine": "espeak", "options": [1]}, "The options are an object"),
        ({"text": "Hi.", "engine": "nobody"}, "nobody"),
    ],
)
def test_bad_input_is_named_in_a_sentence(client: Client, ask: dict[str, Any], sentence: str):
    with pytest.raises(AppError, match=sentence):
        client.predict(**ask, api_name="/speech_generate")


def _schema(client: Client) -> dict[str, Any]:
    """The named endpoints, without what only this test's server has."""
    text = json.dumps(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    return json.loads(text.replace(", 'unruly'", "").replace(', "unruly"', ""))
