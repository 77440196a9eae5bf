"""MMS on its miniature, and on a checkpoint in the hub's layout that the miniature's builder did not make."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import VitsConfig, VitsModel, VitsTokenizer

from core.engines.base import Cancelled, Engine
from core.engines.mms.card import CARD, VOICES, MmsOptions, spell
from core.errors import BadInput, WeightsError
from core.media import Audio
from core.requests import SpeechRequest, check, parse_options
from tests.support import RecordingRun, load, miniature, seed_everything

TEXT = "The quick brown fox is here. It jumps, it runs! Where is the lazy dog?"


def place(language: str) -> int:
    return list(VOICES).index(language)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load("mms", miniature("mms"))


@pytest.fixture(scope="module")
def korean() -> Engine:
    return load("mms", miniature("mms", place("ko")))


def say(
    engine: Engine, text: str, run: RecordingRun | None = None, language: str = "en", **options: Any
) -> Audio:
    run = run or RecordingRun(seed=3)
    seed_everything(run.seed)
    return engine.generate(SpeechRequest(text=text, language=language), MmsOptions(**options), run)


def refusal(text: str, language: str, weights: Path | None) -> str:
    with pytest.raises(BadInput) as refused:
        check(CARD, SpeechRequest(text=text, language=language), MmsOptions(), weights)
    return str(refused.value)


def test_speaks_sentence_by_sentence(engine: Engine) -> None:
    run = RecordingRun(seed=3)
    audio = say(engine, TEXT, run)
    assert [step[:2] for step in run.steps] == [(1, 3), (2, 3), (3, 3)]
    assert audio.rate == CARD.sample_rate and audio.samples.dtype == np.float32 and audio.samples.ndim == 1
    assert np.isfinite(audio.samples).all() and 0 < np.abs(audio.samples).max() <= 1
    assert 2 < audio.seconds < 10


def test_one_sentence_equals_the_library(engine: Engine) -> None:
    folder = miniature("mms")
    tokenizer, model = VitsTokenizer.from_pretrained(folder), VitsModel.from_pretrained(folder)
    torch.manual_seed(3)
    with torch.inference_mode():
        wave = model(**tokenizer("Hello there.", return_tensors="pt")).waveform[0].numpy()
    np.testing.assert_array_equal(say(engine, "Hello there.").samples, wave)


def test_the_seed_decides(engine: Engine) -> None:
    first = say(engine, TEXT, RecordingRun(seed=1)).samples
    np.testing.assert_array_equal(say(engine, TEXT, RecordingRun(seed=1)).samples, first)
    assert not np.array_equal(say(engine, TEXT, RecordingRun(seed=2)).samples, first)


def test_knobs_are_heard_and_last_for_one_job_only(engine: Engine) -> None:
    usual = say(engine, TEXT)
    assert say(engine, TEXT, speaking_rate=2.0).seconds < 0.75 * usual.seconds
    steady = {"noise_scale": 0.0, "noise_scale_duration": 0.0}
    np.testing.assert_array_equal(
        say(engine, TEXT, RecordingRun(seed=1), **steady).samples,
        say(engine, TEXT, RecordingRun(seed=2), **steady).samples,
    )
    np.testing.assert_array_equal(say(engine, TEXT).samples, usual.samples)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_stop_is_obeyed_and_the_next_job_is_right(engine: Engine, stop_after: int) -> None:
    right = say(engine, TEXT)
    with pytest.raises(Cancelled):
        say(engine, TEXT, RecordingRun(stop_after=stop_after))
    np.testing.assert_array_equal(say(engine, TEXT).samples, right.samples)


def test_a_long_text_is_spoken_to_its_end(engine: Engine) -> None:
    run = RecordingRun()
    audio = say(engine, "No stop here and none there " * 30, run, speaking_rate=4.0)
    assert run.steps[-1][0] == run.steps[-1][1] >= 3
    assert audio.seconds > 10


@pytest.mark.parametrize("language", ["de", "ru", "ar", "hi", "th", "yo"])
def test_each_script_is_read(language: str) -> None:
    text = {
        "de": "Grüße, schöne Welt.",
        "ru": "Привет, мир.",
        "ar": "أهلا بالعالم",
        "hi": "नमस्ते दुनिया।",
        "th": "สวัสดีชาวโลก",
        "yo": "Ẹ káàárọ̀ ayé.",
    }[language]
    folder = miniature("mms", place(language))
    check(CARD, SpeechRequest(text=text, language=language), MmsOptions(), folder)
    assert 0.3 < say(load("mms", folder), text, language=language).seconds < 10


def test_every_language_picks_its_own_repository() -> None:
    picked = [
        CARD.checkpoint(SpeechRequest(text="a", language=code), MmsOptions()) for code in CARD.languages
    ]
    assert picked == list(CARD.checkpoints) and len({c.repository for c in picked}) == len(picked) >= 20
    assert picked[0].repository == "facebook/mms-tts-eng"
    with pytest.raises(BadInput, match="does not speak 'xx'"):
        CARD.checkpoint(SpeechRequest(text="a", language="xx"), MmsOptions())


def test_the_card_states_the_real_number_of_parameters() -> None:
    with torch.device("meta"):
        model = VitsModel(VitsConfig(vocab_size=38))
    assert CARD.parameters == sum(p.numel() for p in model.parameters())


def test_another_script_is_refused_without_weights() -> None:
    assert refusal("Hello мир", "en", None) == (
        "MMS English cannot read the Cyrillic letter м; choose the text's language."
    )
    assert "cannot read the Chinese letter 你" in refusal("你好", "ko", None)
    check(CARD, SpeechRequest(text="Привет из Moskau, “café” — 3 ª", language="ru"), MmsOptions())


def test_what_the_vocabulary_lacks_is_refused_and_named() -> None:
    folder = miniature("mms")
    assert refusal("I have 2 cats, 50 € and 😀", "en", folder) == (
        "MMS English has no sound for 2, 5, 0, €, 😀; write it out in words of the language."
    )
    assert "has no sound for &;" in refusal("Tom & Jerry", "en", folder)
    assert "has no sound for h, e, l, o;" in refusal("hello", "ru", miniature("mms", place("ru")))
    assert "has no sound for 3;" in refusal("안녕 3", "ko", miniature("mms", place("ko")))


def test_punctuation_and_vowel_points_are_no_reason_to_refuse() -> None:
    check(
        CARD,
        SpeechRequest(text="“Well…” (she said) — don’t! ¿No?", language="en"),
        MmsOptions(),
        miniature("mms"),
    )
    check(CARD, SpeechRequest(text="مَرْحَبًا", language="ar"), MmsOptions(), miniature("mms", place("ar")))


def test_one_letter_written_in_two_ways_sounds_the_same() -> None:
    german = load("mms", miniature("mms", place("de")))
    np.testing.assert_array_equal(
        say(german, "scho\u0308n", language="de").samples, say(german, "schön", language="de").samples
    )
    romanian = load("mms", miniature("mms", place("ro")))
    np.testing.assert_array_equal(
        say(romanian, "Și țară", language="ro").samples, say(romanian, "şi ţară", language="ro").samples
    )
    turkish = load("mms", miniature("mms", place("tr")))
    np.testing.assert_array_equal(
        say(turkish, "ISI İLE", language="tr").samples, say(turkish, "ısı ile", language="tr").samples
    )


def test_hangul_stays_in_syllables_for_the_romanizer() -> None:
    text = "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. "
    text += "인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다."
    assert spell(text, "ko", "abc") == text


def test_korean_equals_the_library_that_romanizes_by_itself(
    korean: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = miniature("mms", place("ko"))
    check(CARD, SpeechRequest(text="안녕하세요", language="ko"), MmsOptions(), folder)
    tokenizer, model = VitsTokenizer.from_pretrained(folder), VitsModel.from_pretrained(folder)
    # Setting up a romanizer takes 4 s, and the library does it several times a call.
    romanizer = vars(korean)["_romanizer"]
    monkeypatch.setattr("transformers.models.vits.tokenization_vits.ur.Uroman", lambda: romanizer)
    inputs = tokenizer("안녕하세요", return_tensors="pt")
    torch.manual_seed(3)
    with torch.inference_mode():
        wave = model(**inputs).waveform[0].numpy()
    np.testing.assert_array_equal(say(korean, "안녕하세요", language="ko").samples, wave)


def test_nothing_in_the_vocabulary_is_refused_and_not_silence(engine: Engine) -> None:
    with pytest.raises(BadInput, match="nothing that this engine can say"):
        say(engine, "12 34")


def test_options_outside_their_bounds_are_refused() -> None:
    with pytest.raises(BadInput, match="'speaking_rate' is 9"):
        parse_options(CARD, {"speaking_rate": 9})


def test_release_leaves_no_parameter_alive() -> None:
    gc.disable()
    try:
        made = load("mms", miniature("mms"))
        say(made, "Hello.")
        alive = [weakref.ref(p) for module in made.components().values() for p in module.parameters()]
        made.close()
        vars(made).clear()
        gc.collect()
    finally:
        gc.enable()
    assert alive and not any(reference() is not None for reference in alive)


def copy_of_miniature(tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature("mms"), tmp_path / "checkpoint"))


def test_a_truncated_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = copy_of_miniature(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|buffer|header"):
        load("mms", folder)


def test_missing_tensors_another_model_and_another_vocabulary_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of_miniature(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_encoder.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, such as text_encoder.embed_tokens.weight"):
        load("mms", folder)

    (folder / "vocab.json").write_text(json.dumps({chr(97 + n): n for n in range(60)}))
    shutil.copy(miniature("mms") / "model.safetensors", folder)
    with pytest.raises(WeightsError, match="not of one checkpoint"):
        load("mms", folder)

    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WeightsError, match="'bert' model"):
        load("mms", folder)


def test_a_checkpoint_for_phonemes_is_refused(tmp_path: Path) -> None:
    folder = copy_of_miniature(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "phonemize": True}))
    with pytest.raises(WeightsError, match="reads phonemes"):
        load("mms", folder)


@pytest.fixture
def other_checkpoint(tmp_path: Path) -> Path:
    """Saved by the library, as pytorch_model.bin; other sizes, rate, vocabulary, padding, plain durations."""
    vocabulary = {sign: number for number, sign in enumerate(["<pad>", *"zyxwvutsrqponmlkjihgfedcba '"])}
    (tmp_path / "letters.json").write_text(json.dumps(vocabulary))
    VitsTokenizer(
        tmp_path / "letters.json", language="eng", phonemize=False, add_blank=True, pad_token="<pad>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(7)
    model = VitsModel(
        VitsConfig(
            vocab_size=len(vocabulary),
            hidden_size=24,
            ffn_dim=32,
            flow_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            spectrogram_bins=33,
            upsample_initial_channel=16,
            upsample_rates=[4, 4],
            upsample_kernel_sizes=[8, 8],
            use_stochastic_duration_prediction=False,
            duration_predictor_filter_channels=24,
            prior_encoder_num_wavenet_layers=2,
            posterior_encoder_num_wavenet_layers=1,
            sampling_rate=8000,
        )
    )
    model.config.save_pretrained(tmp_path)
    # The hub's files are of 2023, when weight normalization gave its tensors other names.
    names = {
        ".parametrizations.weight.original0": ".weight_g",
        ".parametrizations.weight.original1": ".weight_v",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    assert any(name.endswith(".weight_g") for name in tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    return tmp_path


def test_speaks_from_a_checkpoint_that_others_made(other_checkpoint: Path) -> None:
    check(CARD, SpeechRequest(text="It's fine.", language="en"), MmsOptions(), other_checkpoint)
    made = load("mms", other_checkpoint)
    audio = say(made, "It's fine. Go on.")
    assert audio.rate == 8000 and audio.seconds > 0.25 and np.isfinite(audio.samples).all()
    np.testing.assert_array_equal(say(made, "It's fine. Go on.").samples, audio.samples)


def test_speaks_in_full_precision_even_where_half_is_planned() -> None:
    made = load("mms", miniature("mms"), dtype="bfloat16")
    assert {p.dtype for module in made.components().values() for p in module.parameters()} == {torch.float32}
    np.testing.assert_array_equal(say(made, TEXT).samples, say(load("mms", miniature("mms")), TEXT).samples)
