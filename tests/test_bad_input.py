"""Bad input, for every engine: a clear sentence or a good take, and nothing half."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from core.card import Ability, Card
from core.catalog import Catalog
from core.errors import BadInput
from core.media import Audio, read_audio, resample, write_audio
from core.requests import Order, SpeechRequest
from core.settings import Settings
from core.studio import Studio
from tests.support import miniature

ROOT = Path(__file__).parents[1]
VOICE = json.loads((ROOT / "assets/voices/voices.json").read_text())[0]
CARDS = {card.id: card for card in Catalog().cards()}
CLONING = [card.id for card in CARDS.values() if Ability.CLONE in card.abilities]
WITH_WEIGHTS = [card.id for card in CARDS.values() if card.has_weights]
# What Python's own errors say, outside of brackets; nobody can act on it.
JARGON = re.compile(r"^[^(]*(Traceback|has no attribute|object is not|not iterable|NoneType|Error:)")


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("hostile")
    made = Studio(
        Settings(
            home=folder / "home",
            cache=folder / "cache",
            device="cpu",
            threads=1,
            inline=True,
            accept_licences=tuple(CARDS),
        )
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recordings")


def quickest(card: Card) -> dict[str, Any]:
    """Options that cost the least, where an engine lets its steps be chosen."""
    steps = card.options.model_json_schema().get("properties", {}).get("steps")
    return {"steps": steps["minimum"]} if steps else {}


def order(engine: str, text: str = "Good day.", *, weights: str = "miniature", **request: Any) -> Order:
    card = CARDS[engine]
    if card.reference_required:
        voice = ROOT / "assets/voices" / VOICE["file"]
        request = {"voice": voice, "voice_text": VOICE["text"], "consent": True} | request
    asked = SpeechRequest(text=text, **request)
    return Order(engine=engine, request=asked, options=quickest(card), seed=3, weights=weights)


def outcome(studio: Studio, asked: Order) -> str:
    """ "done", or the sentence that says why not; a take is whole, and nothing else is left of the job."""
    before = {take.id for take in studio.list_takes("anna")}
    try:
        [job] = studio.submit([asked], "anna")
    except BadInput as refusal:
        said = str(refusal)
    else:
        studio.wait(job, interval=0.01)
        said = "done" if job.take else job.reason
    assert "\n" not in said and not JARGON.search(said), said
    assert list(studio.takes._own.iterdir()) == []
    made = [take for take in studio.list_takes("anna") if take.id not in before]
    assert len(made) == (said == "done")
    for take in made:
        samples, _ = soundfile.read(take.folder / take.media[0]["file"])
        assert samples.size and np.isfinite(samples).all() and 0 < np.abs(samples).max() <= 1
    return said


@pytest.mark.parametrize("engine", CARDS)
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Hello 😀.", id="emoji"),
        pytest.param("שלום, مرحبا.", id="right-to-left"),
        pytest.param("a < b & c \u202e\u200b{x} %s.", id="signs of markup, formats and direction"),
    ],
)
def test_strange_text_is_spoken_or_refused_in_a_sentence(studio: Studio, engine: str, text: str) -> None:
    said = outcome(studio, order(engine, text))
    assert said == "done" or said.endswith(".")


@pytest.mark.parametrize(("asked", "right"), [("en-US", "en"), ("EN", "en"), ("en_GB", "en")])
def test_a_language_with_its_country_is_told_the_code_to_write(
    studio: Studio, asked: str, right: str
) -> None:
    for engine in CARDS:
        assert outcome(studio, order(engine, language=asked)).endswith(f"speak {asked!r}; write {right!r}.")


@pytest.mark.parametrize("engine", CARDS)
def test_every_option_refuses_what_is_beyond_its_bounds(studio: Studio, engine: str) -> None:
    good = order(engine)
    for name, schema in CARDS[engine].options.model_json_schema()["properties"].items():
        wrong: list[Any] = [None, ["a"], {"a": 1}]
        if "minimum" in schema:
            wrong += [schema["minimum"] - 1, schema["maximum"] + 1, "much", float("nan"), 10**400]
        if "enum" in schema:
            wrong += ["x" * 100_000]
        for value in wrong:
            with pytest.raises(BadInput, match=f"option '{name}' is ") as refusal:
                studio.check(good.model_copy(update={"options": {name: value}}))
            assert len(str(refusal.value)) < 1000


def speech() -> Audio:
    """Eight seconds of an example voice."""
    voice = read_audio(ROOT / "assets/voices" / VOICE["file"])
    return Audio(np.resize(voice.samples, 8 * voice.rate), voice.rate)


def _write(samples: Any, rate: int, **how: Any) -> Callable[[Path], None]:
    return lambda file: soundfile.write(file, samples, rate, format="WAV", **how)


def _m4a(file: Path) -> None:
    sound = resample(speech(), 48000)
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=sound.rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound.samples[None], format="fltp", layout="mono")
        frame.rate = sound.rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def _cut(file: Path) -> None:
    write_audio(file, speech())
    file.write_bytes(file.read_bytes()[:100_000])


def _with(value: float) -> Any:
    samples = speech().samples.copy()
    samples[24000] = value
    return samples


SOUND, RATE = speech().samples, speech().rate
GOOD: dict[str, Callable[[Path], None]] = {
    "8-bit-stereo.wav": _write(np.stack([SOUND, 0.2 * SOUND], 1), RATE, subtype="PCM_U8"),
    "96-khz.wav": _write(resample(speech(), 96000).samples, 96000),
    "a.mp3": lambda file: write_audio(file, speech()),
    "m4a-named.wav": _m4a,
}
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty.wav": (lambda file: file.write_bytes(b"") and None, "is empty (0 bytes)"),
    "silent.wav": (_write(np.zeros(8 * RATE), RATE), "is silent all through"),
    "tenth.wav": (_write(SOUND[: RATE // 10], RATE), "is 0.1 s long"),
    "text.wav": (lambda file: file.write_text("Only renamed.\n" * 900) and None, "is not an audio file"),
    "cut.wav": (_cut, "is cut short"),
    "nan.wav": (_write(_with(np.nan), RATE, subtype="FLOAT"), "samples that are not numbers"),
    "infinite.wav": (_write(_with(np.inf), RATE, subtype="FLOAT"), "samples that are not numbers"),
}


def cloned(engine: str, file: Path) -> Order:
    return order(engine, voice=file, voice_text=VOICE["text"], consent=True)


@pytest.mark.parametrize("engine", CLONING)
@pytest.mark.parametrize("name", GOOD)
def test_recordings_of_every_common_kind_are_heard(
    studio: Studio, shelf: Path, engine: str, name: str
) -> None:
    GOOD[name](shelf / name)
    assert outcome(studio, cloned(engine, shelf / name)) == "done"


@pytest.mark.parametrize("engine", CLONING)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_recording_is_named_before_anything_is_queued(
    studio: Studio, shelf: Path, engine: str, name: str
) -> None:
    make, sentence = BAD[name]
    make(shelf / name)
    with pytest.raises(BadInput) as refusal:
        studio.submit([cloned(engine, shelf / name)], "anna")
    assert sentence in str(refusal.value) and str(refusal.value).endswith(".")


@pytest.mark.parametrize("engine", CLONING)
def test_ten_minutes_are_heard_in_part_or_refused_with_the_limit(
    studio: Studio, shelf: Path, engine: str
) -> None:
    write_audio(shelf / "long.wav", Audio(np.resize(SOUND, 600 * RATE), RATE))
    said = outcome(studio, cloned(engine, shelf / "long.wav"))
    assert said == "done" or "is 600.0 s long" in said


def test_an_engine_that_cannot_clone_keeps_no_recording(studio: Studio) -> None:
    engine = next(engine for engine in CARDS if engine not in CLONING)
    voice = ROOT / "assets/voices" / VOICE["file"]
    assert outcome(studio, order(engine, voice=voice, voice_text=VOICE["text"])) == "done"
    take = studio.list_takes("anna", limit=1)[0]
    assert take.order.request.voice is None and not take.order.request.voice_text
    assert not list(take.folder.glob("reference*"))


def whole(engine: str, folder: Path) -> Path:
    return Path(shutil.copytree(miniature(engine), folder / "checkpoint"))


@pytest.mark.parametrize("engine", WITH_WEIGHTS)
def test_each_file_of_a_checkpoint_may_be_missing_or_damaged(
    studio: Studio, engine: str, tmp_path: Path
) -> None:
    """What the engine can do without, it does without; all else is named by file or by what it lacks."""
    folder = whole(engine, tmp_path)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in [file for file in files if file.suffix != ".npy"]:
        content, name = file.read_bytes(), file.name
        damages = [b"", content[: len(content) // 2], b"[]" if file.suffix == ".json" else None]
        for damage in damages:
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            said = outcome(studio, order(engine, weights=str(folder)))
            if damage == b"":
                assert f"{name} is empty" in said
            elif said != "done":
                assert said.endswith(".") or name in said, said
            file.write_bytes(content)
            studio.unload()
    assert outcome(studio, order(engine, weights=str(folder))) == "done"


@pytest.mark.parametrize("engine", WITH_WEIGHTS)
def test_a_folder_of_another_engine_is_told_by_what_it_lacks(
    studio: Studio, engine: str, tmp_path: Path
) -> None:
    other = next(name for name in WITH_WEIGHTS if name != engine)
    said = outcome(studio, order(engine, weights=str(whole(other, tmp_path))))
    assert f"is not a checkpoint of {CARDS[engine].name}: it lacks " in said


@pytest.mark.parametrize("weights", ["", "minature", "/nowhere"])
def test_weights_that_are_no_folder_are_told_what_would_be_right(studio: Studio, weights: str) -> None:
    said = outcome(studio, order(WITH_WEIGHTS[0], weights=weights))
    assert said == (
        f"There is no weights folder {weights!r}; weights are auto, hub, miniature or an existing folder."
    )


def test_a_checkpoint_replaced_in_place_is_loaded_anew(studio: Studio, tmp_path: Path) -> None:
    folder = whole(WITH_WEIGHTS[0], tmp_path)
    asked = order(WITH_WEIGHTS[0], weights=str(folder))
    assert outcome(studio, asked) == "done"
    big = max(folder.rglob("*"), key=lambda file: file.stat().st_size)
    start = big.read_bytes()[:1000]
    big.unlink()  # the loaded model may read it still, through a mapping
    big.write_bytes(start)
    assert f"{big.name} is truncated" in outcome(studio, asked)
