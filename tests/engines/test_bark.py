"""Bark through transformers, on its miniature and on a checkpoint built in another way."""

from __future__ import annotations

import gc
import json
import re
import shutil
import socket
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.card import Options
from core.catalog import Catalog
from core.engines.base import Cancelled, Engine
from core.errors import BadInput, WeightsError
from core.requests import SpeechRequest, check, parse_options
from tests.support import RecordingRun, load, miniature, seed_everything

CARD = Catalog().card("bark")
TEXT = "Well [sighs] here we are."
TWO = "The kettle sings. The cat sleeps by the window."


def options(**values: Any) -> Options:
    return parse_options(CARD, values)


def speak(
    engine: Engine, text: str = TEXT, seed: int = 7, run: RecordingRun | None = None, **values: Any
) -> np.ndarray:
    seed_everything(seed)
    language = values.pop("language", "en")
    request = SpeechRequest(text=text, language=language)
    audio = engine.generate(request, options(**values), run or RecordingRun(seed))
    assert audio.rate == CARD.sample_rate
    return audio.samples


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load("bark", miniature("bark"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the miniature that a test may damage."""
    return Path(shutil.copytree(miniature("bark"), tmp_path / "bark"))


def test_speaks_without_clipping(engine: Engine) -> None:
    samples = speak(engine)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert np.isfinite(samples).all()
    assert 0 < np.abs(samples).max() <= 1
    assert samples.std() > 0.001


@pytest.mark.parametrize("voice", ["", "v2/de_speaker_3"])
def test_stages_one_by_one_equal_the_librarys_generate(engine: Any, voice: str) -> None:
    ours = speak(
        engine, seed=11, voice=voice, semantic_temperature=0.8, coarse_temperature=0.6, fine_temperature=0.4
    )
    inputs = engine.processor(TEXT, voice_preset=voice or None)
    seed_everything(11)
    theirs = engine.model.generate(
        **inputs, semantic_temperature=0.8, coarse_temperature=0.6, fine_temperature=0.4, min_eos_p=0.2
    )
    np.testing.assert_array_equal(ours, theirs[0].numpy())


def test_equals_the_librarys_generate_where_the_model_ends_early(engine: Any) -> None:
    # Untrained, the end is about as likely as any of 10,001 tokens: half of that is soon reached.
    lengths = []
    for seed in range(3):
        ours = speak(engine, "Hello there.", seed=seed, voice="v2/de_speaker_3", min_eos_p=0.00005)
        seed_everything(seed)
        theirs = engine.model.generate(
            **engine.processor("Hello there.", voice_preset="v2/de_speaker_3"),
            semantic_temperature=0.7,
            coarse_temperature=0.7,
            fine_temperature=0.5,
            min_eos_p=0.00005,
        )
        np.testing.assert_array_equal(ours, theirs[0].numpy())
        lengths.append(len(ours))
    assert min(lengths) < 320 * 78  # frames of the most tokens the miniature gives


def test_half_precision_speaks_too() -> None:
    engine: Any = load("bark", miniature("bark"), dtype="bfloat16")
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert speak(engine).std() > 0.001


def test_same_seed_gives_the_same_samples_and_another_seed_others(engine: Engine) -> None:
    first = speak(engine, seed=1)
    np.testing.assert_array_equal(first, speak(engine, seed=1))
    assert not np.array_equal(first, speak(engine, seed=2))


def test_every_option_reaches_the_model(engine: Engine) -> None:
    usual = speak(engine)
    for change in (
        {"voice": ""},
        {"voice": "v2/fr_speaker_1"},
        {"semantic_temperature": 1.3},
        {"coarse_temperature": 1.3},
        {"fine_temperature": 1.0},
    ):
        assert not np.array_equal(usual, speak(engine, **change)), change


def test_auto_takes_a_voice_of_the_texts_language(engine: Engine) -> None:
    auto = speak(engine, language="pl")
    np.testing.assert_array_equal(auto, speak(engine, language="pl", voice="v2/pl_speaker_6"))
    assert not np.array_equal(auto, speak(engine, language="en"))


def test_steps_of_all_stages_count_up_to_one_total(engine: Engine) -> None:
    run = RecordingRun()
    speak(engine, TWO, run=run)
    totals = {total for _, total, _ in run.steps}
    assert len(totals) == 1
    assert all(a <= b for (a, _, _), (b, _, _) in pairwise(run.steps))
    assert run.steps[-1][0] == totals.pop()
    seen = [re.fullmatch(r"sentence (\d) of 2, (\w+) \d+", note) for _, _, note in run.steps]
    order = list(dict.fromkeys(m.groups() for m in seen if m))
    assert order == [(n, stage) for n in "12" for stage in ("semantic", "coarse", "fine")]


def test_a_stop_ends_it_at_that_step_and_the_next_job_is_right(engine: Engine) -> None:
    run = RecordingRun()
    right = speak(engine, TWO, run=run)
    stage_starts = [n for n, (_, _, note) in enumerate(run.steps) if note.endswith(" 1")]
    for stop_after in {0, *stage_starts[1:3], len(run.steps) - 1}:
        stopped = RecordingRun(stop_after=stop_after)
        with pytest.raises(Cancelled):
            speak(engine, TWO, run=stopped)
        assert len(stopped.steps) == stop_after
    again = RecordingRun()
    np.testing.assert_array_equal(right, speak(engine, TWO, run=again))
    assert again.steps == run.steps


def test_without_a_preset_later_sentences_go_on_in_the_first_ones_voice(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    generate = engine.model.semantic.generate

    def listening(*args: Any, **kwargs: Any) -> Any:
        heard.append(kwargs["history_prompt"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(engine.model.semantic, "generate", listening)
    speak(engine, TWO + " It dreams.", voice="")
    assert heard[0] is None
    assert heard[1] is heard[2]
    frames = heard[1]["coarse_prompt"].shape[1]
    assert heard[1]["semantic_prompt"].shape == (52,)
    assert heard[1]["fine_prompt"].shape == (8, frames)
    assert torch.equal(heard[1]["fine_prompt"][:2], heard[1]["coarse_prompt"])
    assert engine.stages.fault_of(heard[1]) == ""


def test_a_sentence_beyond_thirteen_seconds_is_spoken_in_pieces(engine: Engine) -> None:
    run = RecordingRun()
    speak(engine, "and on it goes " * 20, run=run)
    assert run.steps[-1][2].startswith("sentence 2 of 2")
    run = RecordingRun()
    speak(engine, "天" * 60, run=run, language="zh")
    assert run.steps[-1][2].startswith("sentence 2 of 2")


def test_a_sentence_that_ends_before_it_began_is_refused(engine: Engine) -> None:
    # Untrained, each of 10,001 tokens is about equally likely, the end among them.
    with pytest.raises(BadInput, match="nothing that this engine can say"):
        speak(engine, min_eos_p=0.00001)


@pytest.mark.parametrize(
    ("text", "language", "chosen", "sentence"),
    [
        (
            "Oh [giggles] no.",
            "en",
            {},
            r"does not know the cue \[giggles\]; it knows: \[laughter\] \[laughs\] ",
        ),
        ("Hallo.", "nl", {}, "does not speak 'nl'; it speaks: en, zh,"),
        (
            "Hello.",
            "en",
            {"voice": "v2/en_speaker_12"},
            "no voice 'v2/en_speaker_12'; it has: v2/en_speaker_0, ",
        ),
        ("Hello 😀.", "en", {}, "does not know the characters 😀; write it without"),
        ("<b>Hello</b>", "en", {}, "would read the tag <b> aloud"),
    ],
)
def test_refuses_in_one_sentence(text: str, language: str, chosen: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        check(CARD, SpeechRequest(text=text, language=language), options(**chosen), miniature("bark"))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("♪ Row, row, row your boat ♪ [clears throat] [WOMAN] “yes” – it’s fine…", "en"),
        ("你好，世界。", "zh"),
        ("नमस्ते दुनिया", "hi"),
        ("안녕하세요 여러분", "ko"),
        ("こんにちは、世界。", "ja"),
        ("Здравствуй, мир!", "ru"),
        ("Güneş doğdu, şiir gibi.", "tr"),
        ("Zażółć gęślą jaźń.", "pl"),
    ],
)
def test_accepts_what_it_can_speak(text: str, language: str) -> None:
    check(CARD, SpeechRequest(text=text, language=language), options(), miniature("bark"))


def test_the_options_checkpoint_decides_the_repository() -> None:
    request = SpeechRequest(text=TEXT)
    assert CARD.checkpoint(request, options()).repository == "suno/bark-small"
    assert CARD.checkpoint(request, options(checkpoint="large")).repository == "suno/bark"


def test_never_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    speak(load("bark", miniature("bark")))


def _out_of_range(file: Path) -> None:
    np.save(file, np.full(50, 10_000))


def _pickled(file: Path) -> None:
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def _of_another_shape(file: Path) -> None:
    np.save(file, np.zeros((2, 50), int))


def _of_three_codebooks(file: Path) -> None:
    np.save(file.with_name("en_speaker_2_coarse_prompt.npy"), np.zeros((3, 75), int))


@pytest.mark.parametrize(
    "damage", [_of_three_codebooks, _out_of_range, _pickled, _truncated, _of_another_shape, Path.unlink]
)
def test_a_damaged_voice_is_named(folder: Path, damage: Any) -> None:
    damage(folder / "speaker_embeddings/v2/en_speaker_2_semantic_prompt.npy")
    engine = load("bark", folder)
    with pytest.raises(WeightsError, match="voice preset 'v2/en_speaker_2' of this checkpoint is damaged: "):
        speak(engine, voice="v2/en_speaker_2")
    assert speak(engine, voice="v2/en_speaker_1").size


def test_a_cut_file_does_not_load(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(Exception, match=r"zip archive|corrupt|central directory"):
        load("bark", folder)


def test_missing_tensors_are_not_made_up(folder: Path) -> None:
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["coarse_acoustics.lm_head.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, such as coarse_acoustics\.lm_head\.weight"):
        load("bark", folder)


def test_another_models_checkpoint_does_not_load(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(WeightsError, match="a checkpoint of 'bert', not of Bark"):
        load("bark", folder)


def test_a_broken_list_of_voices_is_named(folder: Path) -> None:
    (folder / "speaker_embeddings_path.json").write_text("{")
    with pytest.raises(
        WeightsError, match=r"speaker_embeddings_path\.json of this checkpoint cannot be read"
    ):
        check(CARD, SpeechRequest(text=TEXT), options(), folder)


def test_after_release_no_parameter_is_alive() -> None:
    gc.collect()
    gc.disable()
    try:
        engine = load("bark", miniature("bark"))
        speak(engine)
        with pytest.raises(Cancelled):
            speak(engine, run=RecordingRun(stop_after=100))
        alive = [weakref.ref(p) for module in engine.components().values() for p in module.parameters()]
        assert len(alive) > 50
        engine.close()
        vars(engine).clear()
    finally:
        gc.enable()
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


def test_speaks_from_a_checkpoint_of_another_size_and_format(tmp_path: Path) -> None:
    """Two layers, other widths, names of weight-normed tensors as in 2023, two voices, no vocab.txt."""
    from transformers import BarkConfig, BarkModel, BertTokenizerFast

    torch.manual_seed(3)
    layer = {"num_layers": 2, "num_heads": 3, "hidden_size": 12, "bias": True}
    model = BarkModel(
        BarkConfig(
            semantic_config=layer | {"input_vocab_size": 129_600, "output_vocab_size": 10_048},
            coarse_acoustics_config=layer | {"input_vocab_size": 12_096, "output_vocab_size": 12_096},
            fine_acoustics_config=layer | {"input_vocab_size": 1_056, "output_vocab_size": 1_056},
            codec_config={"model_type": "encodec", "num_filters": 2, "hidden_size": 8, "codebook_dim": 8},
        )
    )
    model.config.save_pretrained(tmp_path)
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = {
        re.sub("|".join(old), lambda m: old[m[0]], name): tensor
        for name, tensor in model.state_dict().items()
    }
    assert any(name.endswith("weight_g") for name in tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "generation_config.json").write_text(
        json.dumps(
            {
                "codebook_size": 1024,
                "semantic_config": {"max_new_tokens": 20, "do_sample": True},
                "coarse_acoustics_config": {"do_sample": True},
                "fine_acoustics_config": {},
            }
        )
    )
    letters = [*"abcdefghijklmnopqrstuvwxyz.,"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    BertTokenizerFast(vocab={token: n for n, token in enumerate(vocabulary)}).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    files = {part: f"{part}.npy" for part in ("semantic_prompt", "coarse_prompt", "fine_prompt")}
    (tmp_path / "speaker_embeddings_path.json").write_text(
        json.dumps({"narrator": files, "repo_or_path": "x/y"})
    )
    for file, shape in zip(files.values(), [(300,), (2, 700), (8, 700)], strict=True):
        np.save(tmp_path / file, np.random.default_rng(0).integers(1000, size=shape))

    check(CARD, SpeechRequest(text="one, two."), options(voice="narrator"), tmp_path)
    with pytest.raises(BadInput, match="it has: narrator"):
        check(CARD, SpeechRequest(text="one"), options(voice="v2/en_speaker_6"), tmp_path)
    engine: Any = load("bark", tmp_path)
    assert torch.equal(engine.model.semantic.lm_head.weight, model.semantic.lm_head.weight)
    theirs, ours = (m.codec_model.decoder.layers[0].conv.weight for m in (model, engine.model))
    assert torch.equal(theirs, ours)
    for voice in ("auto", "narrator"):
        run = RecordingRun()
        samples = speak(engine, "one, two.", run=run, voice=voice)
        assert np.isfinite(samples).all()
        assert len(samples) == 30 * 320
        assert run.steps[-1][0] == run.steps[-1][1]
