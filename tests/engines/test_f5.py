"""F5-TTS through its library, on its miniature and on a checkpoint built in another way."""

from __future__ import annotations

import gc
import json
import shutil
import socket
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from core.card import Options
from core.catalog import Catalog
from core.engines.base import Cancelled, Engine
from core.errors import BadInput, WeightsError
from core.media import Audio, read_audio, write_audio
from core.requests import SpeechRequest, check, parse_options
from tests.support import RecordingRun, load, miniature, seed_everything

CARD = Catalog().card("f5")
WORDS = "The quick brown fox jumps over the lazy dog."
TEXT = "A short sentence to speak."
TWO = "The kettle sings. The cat sleeps by the window."
MODEL = "F5TTS_v1_Base/model_1250000.safetensors"


def voice_of(seconds: float, file: Path, pitch: float = 150.0) -> Path:
    """A hum that swells three times a second: enough like speech to have a pitch and pauses."""
    time = np.arange(int(seconds * 24_000)) / 24_000
    wave = 0.2 * np.sin(2 * np.pi * pitch * time) * (1 + np.sin(2 * np.pi * 3 * time))
    write_audio(file, Audio(wave.astype(np.float32), 24_000))
    return file


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voice_of(4, tmp_path_factory.mktemp("voice") / "voice.wav")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load("f5", miniature("f5"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the miniature that a test may damage."""
    return Path(shutil.copytree(miniature("f5"), tmp_path / "f5"))


def options(**values: Any) -> Options:
    return parse_options(CARD, {"steps": 4} | values)


def ask(voice: Path | None, text: str = TEXT, words: str = WORDS, language: str = "en") -> SpeechRequest:
    return SpeechRequest(text=text, voice=voice, voice_text=words, language=language, consent=True)


def speak(
    engine: Engine, request: SpeechRequest, seed: int = 7, run: RecordingRun | None = None, **values: Any
) -> np.ndarray:
    seed_everything(seed)
    audio = engine.generate(request, options(**values), run or RecordingRun(seed))
    assert audio.rate == CARD.sample_rate
    return audio.samples


def test_speaks_without_clipping(engine: Engine, voice: Path) -> None:
    samples = speak(engine, ask(voice, TWO))
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert np.isfinite(samples).all()
    assert 0 < np.abs(samples).max() <= 1
    assert samples.std() > 0.001


def test_equals_the_librarys_own_call(engine: Any, voice: Path) -> None:
    from f5_tts.infer.utils_infer import infer_batch_process

    from core.engines.f5.reference import prepare

    ours = speak(engine, ask(voice), steps=6, cfg_strength=1.5, sway_sampling_coef=-0.5, speed=1.2)
    recording = prepare(read_audio(voice, rate=24_000), 12)
    seed_everything(7)
    theirs, rate, _ = next(
        infer_batch_process(
            (torch.from_numpy(recording.samples)[None], 24_000),
            WORDS + " ",
            [TEXT],
            engine.model,
            engine.vocoder,
            nfe_step=6,
            cfg_strength=1.5,
            sway_sampling_coef=-0.5,
            speed=1.2,
            device="cpu",
        )
    )
    assert rate == CARD.sample_rate
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_what_the_library_loads(dtype: str) -> None:
    from f5_tts.infer.utils_infer import load_model, load_vocoder
    from f5_tts.model import DiT

    from core.engines.f5.engine import architecture

    folder = miniature("f5")
    engine: Any = load("f5", folder, dtype=dtype)
    model = load_model(
        DiT,
        architecture(folder / MODEL),
        str(folder / MODEL),
        vocab_file=str(folder / "F5TTS_v1_Base/vocab.txt"),
        device="cpu",
    ).to(getattr(torch, dtype))
    vocoder = load_vocoder(is_local=True, local_path=str(folder / "vocos-mel-24khz"), device="cpu")
    for ours, theirs in ((engine.model, model), (engine.vocoder, vocoder)):
        assert not ours.training
        for held in ("named_parameters", "named_buffers"):
            mine, other = dict(getattr(ours, held)()), dict(getattr(theirs, held)())
            assert mine.keys() == other.keys()
            for name, tensor in other.items():
                assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    assert vars(engine.model)["vocab_char_map"] == vars(model)["vocab_char_map"]
    assert vars(engine.model)["odeint_kwargs"] == vars(model)["odeint_kwargs"]


def test_same_seed_gives_the_same_samples_and_another_seed_others(engine: Engine, voice: Path) -> None:
    first = speak(engine, ask(voice), seed=1)
    np.testing.assert_array_equal(first, speak(engine, ask(voice), seed=1))
    assert not np.array_equal(first, speak(engine, ask(voice), seed=2))


def test_every_option_reaches_the_model(engine: Engine, voice: Path) -> None:
    usual = speak(engine, ask(voice))
    for change in ({"steps": 5}, {"cfg_strength": 0.0}, {"sway_sampling_coef": 0.5}, {"speed": 0.8}):
        assert not np.array_equal(usual, speak(engine, ask(voice), **change)), change
    assert len(speak(engine, ask(voice), speed=0.5)) > 1.8 * len(usual)


def test_voice_and_words_both_count(engine: Engine, voice: Path, tmp_path: Path) -> None:
    usual = speak(engine, ask(voice))
    other = voice_of(4, tmp_path / "other.wav", pitch=220)
    assert not np.array_equal(usual, speak(engine, ask(other)))
    assert not np.array_equal(usual, speak(engine, ask(voice, words=WORDS.upper())))


def test_every_flow_matching_step_is_told(engine: Engine, voice: Path) -> None:
    run = RecordingRun()
    speak(engine, ask(voice, TWO), run=run, steps=6)
    assert [(done, total) for done, total, _ in run.steps] == [(n, 12) for n in range(1, 13)]
    assert [note for _, _, note in run.steps] == ["sentence 1 of 2"] * 6 + ["sentence 2 of 2"] * 6


def test_a_stop_ends_it_at_that_step_and_the_next_job_is_right(engine: Engine, voice: Path) -> None:
    right = speak(engine, ask(voice, TWO))
    for stop_after in (0, 1, 4, 7):
        run = RecordingRun(stop_after=stop_after)
        with pytest.raises(Cancelled):
            speak(engine, ask(voice, TWO), run=run)
        assert len(run.steps) == stop_after
    run = RecordingRun()
    np.testing.assert_array_equal(right, speak(engine, ask(voice, TWO), run=run))
    assert len(run.steps) == 8


def test_long_text_is_cut_to_what_the_reference_allows(engine: Engine, voice: Path) -> None:
    run = RecordingRun()
    speak(engine, ask(voice, "word after word, " * 30), run=run)  # 510 characters, 44 in 4 s
    sentences = {note for _, _, note in run.steps}
    assert len(sentences) >= 510 / 44 * 4 / (22 - 4)
    assert all(a <= b for (a, _, _), (b, _, _) in pairwise(run.steps))


def test_chinese_is_spoken(engine: Engine, voice: Path) -> None:
    request = ask(voice, "你好，世界。今天天气很好……", words="他说：“你好”。", language="zh")
    check(CARD, request, options(), miniature("f5"))
    assert speak(engine, request).size


def test_half_precision_speaks_too(voice: Path) -> None:
    engine: Any = load("f5", miniature("f5"), dtype="bfloat16")
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert np.isfinite(speak(engine, ask(voice))).all()


def test_silence_around_the_reference_changes_nothing(engine: Engine, voice: Path, tmp_path: Path) -> None:
    samples = read_audio(voice).samples
    padded = np.concatenate([np.zeros(24_000, np.float32), samples, np.zeros(36_000, np.float32)])
    write_audio(tmp_path / "padded.wav", Audio(padded, 24_000))
    np.testing.assert_array_equal(speak(engine, ask(voice)), speak(engine, ask(tmp_path / "padded.wav")))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"voice": None}, "F5-TTS needs a reference recording"),
        ({"consent": False}, "Confirm that you may use this voice"),
        ({"language": "de"}, "does not speak 'de'; it speaks: en, zh"),
        ({"text": "Oh [laughs] no."}, r"would read the cue \[laughs\] aloud"),
        (
            {"text": "Hello 😀."},
            "this checkpoint of F5-TTS does not know: 😀; write it without them.",
        ),
        (
            {"voice_text": "Hello 😀, this is me."},
            "reference's text has characters that this checkpoint of F5-TTS does not know: 😀",
        ),
        ({"voice_text": " "}, "must know what the reference recording says: type its words"),
        ({"voice_text": "Hm."}, r"text has 3 characters for 4\.0 s of sound; type just what is said"),
        ({"voice_text": "and on " * 60}, r"text has 419 characters for 4\.0 s of sound"),
    ],
)
def test_refuses_in_one_sentence(voice: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        check(CARD, ask(voice).model_copy(update=change), options(), miniature("f5"))


def test_refuses_a_reference_of_the_wrong_length(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is 2\.0 s long; F5-TTS needs at least 3 s"):
        check(CARD, ask(voice_of(2, tmp_path / "short.wav")), options(), miniature("f5"))
    with pytest.raises(BadInput, match=r"is 13\.0 s long; F5-TTS hears 12 s of it"):
        check(CARD, ask(voice_of(13, tmp_path / "long.wav")), options(), miniature("f5"))


def test_the_page_asks_for_no_words_before_it_knows_the_weights(voice: Path) -> None:
    check(CARD, ask(voice, words=""), options(), None)


def whisper_in(folder: Path) -> Path:
    """A tiny untrained Whisper in the hub's layout."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    tokens = {token: n for n, token in enumerate([*letters, *specials])}
    torch.manual_seed(5)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokens),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            pad_token_id=tokens["<|endoftext|>"],
            bos_token_id=tokens["<|endoftext|>"],
            eos_token_id=tokens["<|endoftext|>"],
            decoder_start_token_id=tokens["<|startoftranscript|>"],
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.normal_()
    settings = model.generation_config
    vars(settings).update(
        lang_to_id={"<|en|>": tokens["<|en|>"]},
        task_to_id={"transcribe": tokens["<|transcribe|>"]},
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        is_multilingual=True,
        max_length=60,
        suppress_tokens=[tokens[s] for s in specials],
        _from_model_config=False,  # else it would be thrown away at loading
    )
    place = folder / "whisper-base"
    model.save_pretrained(place)
    tokenizer = WhisperTokenizer(vocab=tokens, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(place)
    return place


def test_whisper_writes_down_the_reference_where_it_is_there(folder: Path, tmp_path: Path) -> None:
    from core.engines.f5.reference import prepare, transcribe

    words_of = whisper_in(folder)
    engine: Any = load("f5", folder)
    for seconds in (5, 13):
        voice = voice_of(seconds, tmp_path / f"{seconds}.wav")
        check(CARD, ask(voice, words=""), options(), folder)
        heard = prepare(read_audio(voice, rate=24_000), 12)
        words = transcribe(heard, words_of, "cpu", torch.float32)
        assert words
        by_whisper = speak(engine, ask(voice, words=""))
        if seconds <= 12:
            np.testing.assert_array_equal(by_whisper, speak(engine, ask(voice, words=words)))
            assert not np.array_equal(by_whisper, speak(engine, ask(voice, words=WORDS)))
        else:
            # Only a part is heard, so words given for the whole would not fit.
            assert 8 <= heard.seconds < 12.1
            check(CARD, ask(voice), options(), folder)
            np.testing.assert_array_equal(by_whisper, speak(engine, ask(voice, words=WORDS)))


def test_never_asks_the_network(voice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    speak(load("f5", miniature("f5")), ask(voice))


def test_prints_nothing(voice: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speak(load("f5", miniature("f5")), ask(voice))
    assert capsys.readouterr() == ("", "")


def test_a_vocoder_config_that_names_other_code_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "vocos-mel-24khz/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["head"] = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "called")}}
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(WeightsError, match=r"config\.yaml names .*os\.mkdir; it may name only vocos\."):
        load("f5", folder)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("content", ["", "head: [", "head: 3", "head: {}"])
def test_a_broken_vocoder_config_is_named(folder: Path, content: str) -> None:
    (folder / "vocos-mel-24khz/config.yaml").write_text(content)
    with pytest.raises(WeightsError, match=r"The vocoder's config\.yaml cannot be read"):
        load("f5", folder)


def test_a_cut_file_is_named(folder: Path) -> None:
    file = folder / MODEL
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"model_1250000\.safetensors is not a whole safetensors file"):
        load("f5", folder)


def test_another_models_tensors_are_named(folder: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2, 2)}, folder / MODEL)
    with pytest.raises(
        WeightsError, match=r"holds no F5-TTS model: it lacks the tensor 'input_embed\.proj\.bias'"
    ):
        load("f5", folder)


def test_a_missing_tensor_or_a_foreign_vocabulary_does_not_load(folder: Path) -> None:
    tensors = load_file(folder / MODEL)
    save_file({k: v for k, v in tensors.items() if "norm_out" not in k}, folder / MODEL)
    with pytest.raises(WeightsError, match=r"lacks 2 tensors, such as transformer\.norm_out\."):
        load("f5", folder)
    save_file(tensors, folder / MODEL)
    (folder / "F5TTS_v1_Base/vocab.txt").write_text(" \na\nb\n")
    with pytest.raises(WeightsError, match=r"transformer\.text_embed\..* is of shape .*; the model's is"):
        load("f5", folder)


def test_after_release_no_tensor_is_alive(voice: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = load("f5", miniature("f5"))
        speak(engine, ask(voice))
        with pytest.raises(Cancelled):
            speak(engine, ask(voice), run=RecordingRun(stop_after=2))
        modules = list(engine.components().values())
        alive = [weakref.ref(p) for module in modules for p in module.parameters()]
        assert len(alive) > 50
        del modules
        engine.close()
        vars(engine).clear()
    finally:
        gc.enable()
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    from f5_tts.model.modules import vocos_mel_stft_cache

    assert not vocos_mel_stft_cache


def test_speaks_from_a_checkpoint_of_another_size(tmp_path: Path, voice: Path) -> None:
    """More heads, another feed-forward, a vocabulary of letters; with the counters that training leaves."""
    from f5_tts.model import CFM, DiT
    from vocos import Vocos
    from vocos.feature_extractors import MelSpectrogramFeatures
    from vocos.heads import ISTFTHead
    from vocos.models import VocosBackbone

    torch.manual_seed(3)
    letters = [" ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,"]
    (tmp_path / "F5TTS_v1_Base").mkdir()
    (tmp_path / "F5TTS_v1_Base/vocab.txt").write_text("\n".join(letters) + "\n")
    arch = {"dim": 48, "depth": 3, "heads": 2, "ff_mult": 3, "text_dim": 24, "conv_layers": 2}
    model = CFM(DiT(**arch, text_num_embeds=len(letters), mel_dim=100))
    tensors = {f"ema_model.{name}": tensor for name, tensor in model.state_dict().items()}
    counters = {"initted": torch.tensor(True), "step": torch.tensor(1250000)}
    save_file(tensors | counters, tmp_path / MODEL)
    sizes = {"input_channels": 100, "dim": 24, "intermediate_dim": 40, "num_layers": 1}
    config = {
        "feature_extractor": {"class_path": "vocos.feature_extractors.MelSpectrogramFeatures"},
        "backbone": {"class_path": "vocos.models.VocosBackbone", "init_args": sizes},
        "head": {
            "class_path": "vocos.heads.ISTFTHead",
            "init_args": {"dim": 24, "n_fft": 1024, "hop_length": 256},
        },
    }
    vocoder = tmp_path / "vocos-mel-24khz"
    vocoder.mkdir()
    (vocoder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    head = ISTFTHead(24, n_fft=1024, hop_length=256)
    torch.save(
        Vocos(MelSpectrogramFeatures(), VocosBackbone(**sizes), head).state_dict(),
        vocoder / "pytorch_model.bin",
    )

    request = ask(voice, "One, two.")
    check(CARD, request, options(), tmp_path)
    with pytest.raises(BadInput, match="does not know: 1 2"):
        check(CARD, ask(voice, "One, 12."), options(), tmp_path)
    engine: Any = load("f5", tmp_path)
    assert len(engine.model.transformer.transformer_blocks) == 3
    assert torch.equal(engine.model.transformer.proj_out.weight, model.transformer.proj_out.weight)
    assert torch.equal(engine.vocoder.head.out.weight, head.out.weight)
    samples = speak(engine, request)
    assert np.isfinite(samples).all()
    assert len(samples) > 24_000 / 4
