"""XTTS v2: clones, streams, and leaves the checkpoint's folder as it was."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from TTS.tts.configs.xtts_config import XttsArgs, XttsConfig
from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
from TTS.tts.models import xtts as library

from core.engines.base import Cancelled, Engine
from core.engines.speaking import PAUSE_SECONDS
from core.engines.xtts.card import CARD, LANGUAGES, SPEAKERS, XttsOptions, speakers_in
from core.errors import BadInput, WeightsError
from core.media import Audio
from core.requests import SpeechRequest, check, parse_options
from tests.support import RecordingRun, load, miniature, seed_everything

ONE = "Be a voice, not an echo."
TWO = "Be a voice. Not an echo!"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load("xtts", miniature("xtts"))


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven seconds of a hum with syllables, in stereo at 44.1 kHz."""
    return record(tmp_path_factory.mktemp("voice") / "hum.wav", 7.0, 140.0)


def record(file: Path, seconds: float, pitch: float, rate: int = 44100) -> Path:
    """A voice-like hum that rises all the time, so that every second of it counts."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * pitch * (t + 0.05 * t**2)
    hum = sum(np.sin(k * phase) / k for k in range(1, 12)) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    soundfile.write(file, 0.2 * np.stack([hum, hum], 1), rate)
    return file


def speak(
    engine: Engine,
    text: str = ONE,
    seed: int = 7,
    run: RecordingRun | None = None,
    language: str = "en",
    voice: Path | None = None,
    **options: object,
) -> Audio:
    seed_everything(seed)
    request = SpeechRequest(text=text, language=language, voice=voice, consent=voice is not None)
    return engine.generate(request, parse_options(CARD, options), run or RecordingRun(seed))


def model_of(engine: Engine) -> library.Xtts:
    return engine.tts.synthesizer.tts_model


def contents(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_streams_what_it_returns(engine: Engine) -> None:
    run = RecordingRun(7)
    audio = speak(engine, TWO, run=run)
    assert audio.rate == CARD.sample_rate and audio.samples.dtype == np.float32 and audio.samples.ndim == 1
    assert 0 < np.abs(audio.samples).max() <= 1
    assert len(run.chunks) > 3, "several pieces a sentence, and the pause between"
    assert {chunk.rate for chunk in run.chunks} == {audio.rate}
    assert np.array_equal(np.concatenate([chunk.samples for chunk in run.chunks]), audio.samples)
    assert any(not c.samples.any() and c.seconds == PAUSE_SECONDS for c in run.chunks)


def test_first_sound_comes_long_before_the_last_step(engine: Engine) -> None:
    class Watching(RecordingRun):
        def chunk(self, audio: Audio) -> None:
            super().chunk(audio)
            self.heard_after = getattr(self, "heard_after", len(self.steps))

    run = Watching(7)
    speak(engine, ONE, run=run, chunk_tokens=5)
    # Every token but the newest has been reported when a piece is decoded.
    assert run.heard_after == 4 < len(run.steps) / 4


def test_same_seed_same_samples_other_seed_others(engine: Engine) -> None:
    first = speak(engine, seed=1).samples
    assert np.array_equal(first, speak(engine, seed=1).samples)
    assert not np.array_equal(first, speak(engine, seed=2).samples)


def test_equals_the_library_called_directly_with_a_cloned_voice(engine: Engine, tmp_path: Path) -> None:
    model = model_of(engine)
    voice = record(
        tmp_path / "voice.wav", 7.0, 140.0, rate=22050
    )  # the model's own rate: nothing to resample
    waveform = torch.from_numpy(soundfile.read(voice, dtype="float32")[0].mean(1))[None]
    latents = model.get_gpt_cond_latents(waveform, 22050, length=30, chunk_length=4)
    embedding = model.get_speaker_embedding(waveform, 22050)
    settings = {"temperature": 0.9, "top_k": 30, "top_p": 0.7, "repetition_penalty": 2.0, "speed": 1.25}
    seed_everything(3)
    pieces = list(model.inference_stream(ONE, "fr", latents, embedding, stream_chunk_size=8, **settings))
    mine = speak(engine, voice=voice, language="fr", seed=3, chunk_tokens=8, **settings)
    assert np.array_equal(mine.samples, torch.cat(pieces).numpy())


def test_equals_the_library_called_directly_with_a_built_in_voice(engine: Engine) -> None:
    model = model_of(engine)
    seed_everything(5)
    voice = model.speaker_manager.speakers["Ana Florence"].values()
    settings = {"temperature": 0.75, "repetition_penalty": 5.0}
    theirs = torch.cat(list(model.inference_stream(ONE, "zh-cn", *voice, **settings))).numpy()
    mine = speak(engine, seed=5, speaker="Ana Florence", language="zh").samples
    assert np.array_equal(mine, theirs)


def test_voices_differ(engine: Engine, voice: Path, tmp_path: Path) -> None:
    quick = {"chunk_tokens": 200}
    built_in = speak(engine, **quick).samples
    assert not np.array_equal(built_in, speak(engine, speaker="Luis Moray", **quick).samples)
    cloned = speak(engine, voice=voice, **quick).samples
    assert not np.array_equal(built_in, cloned)
    high = record(tmp_path / "high.wav", 6.5, 310.0)
    assert not np.array_equal(cloned, speak(engine, voice=high, **quick).samples)
    assert np.array_equal(cloned, speak(engine, voice=voice, speaker="Luis Moray", **quick).samples)


def test_reports_a_step_a_token_and_never_goes_back(engine: Engine) -> None:
    run = RecordingRun(7)
    speak(engine, TWO, run=run)
    done = [step[0] for step in run.steps]
    assert len(done) > 40, "two sentences of up to 30 tokens"
    assert done == sorted(done)
    assert {total for _, total, _ in run.steps} == {done[-1]}


@pytest.mark.parametrize("after", [0, 25, 40])
def test_stops_within_a_token_and_the_next_job_is_right(engine: Engine, after: int) -> None:
    """Before the first token, between two streamed pieces, in the second sentence."""
    run = RecordingRun(0, stop_after=after)
    with pytest.raises(Cancelled):
        speak(engine, TWO, run=run)
    assert len(run.steps) == after
    assert bool(run.chunks) == (after > 20)
    again = speak(engine, "Next.", seed=9, chunk_tokens=200)
    assert np.array_equal(again.samples, speak(engine, "Next.", seed=9, chunk_tokens=200).samples)


def test_a_stop_while_a_piece_is_handed_on_ends_the_job(engine: Engine) -> None:
    class Stopping(RecordingRun):
        def chunk(self, audio: Audio) -> None:
            raise Cancelled

    with pytest.raises(Cancelled):
        speak(engine, run=Stopping(0))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_spelled_with_what_is_installed(engine: Engine, language: str) -> None:
    texts = {
        "ar": "مرحبا بالعالم",
        "zh": "你好，世界 12",
        "ko": "안녕하세요 12",
        "ja": "こんにちは世界",
        "hi": "नमस्ते दुनिया",
        "ru": "Привет, мир 12",
        "tr": "Günaydın ışık 12",
        "cs": "Příliš žluťoučký 12",
        "pl": "Zażółć gęślą 12",
    }
    text = texts.get(language, "Olé, così süß ça va 12")
    check(CARD, SpeechRequest(text=text, language=language), XttsOptions(), miniature("xtts"))
    tokenizer = model_of(engine).tokenizer
    tokens = tokenizer.encode(text.lower(), lang="zh-cn" if language == "zh" else language)
    unknown = tokenizer.tokenizer.token_to_id("[UNK]")
    assert len(tokens) > 8 and unknown not in tokens
    assert tokenizer.decode(tokens).startswith(f"[{'zh-cn' if language == 'zh' else language}]")


def test_long_text_is_cut_for_its_language_and_for_spelled_out_numbers(engine: Engine) -> None:
    digits = " ".join(["777777"] * 30)
    pieces = engine._sentences(f"{ONE}\n—\n{digits}", "en")
    assert pieces[0] == ONE and len(pieces) > 3
    assert " ".join(pieces[1:]) == digits
    tokenizer = model_of(engine).tokenizer
    assert all(len(tokenizer.encode(piece, lang="en")) < 402 for piece in pieces)
    assert len(tokenizer.encode(digits, lang="en")) > 402, "all at once would be too much"
    assert max(len(piece) for piece in engine._sentences("你好世界" * 50, "zh-cn")) <= 82


def refusal(
    text: str = ONE,
    weights: Path | None = None,
    language: str = "en",
    voice: Path | None = None,
    consent: bool = True,
    **options: object,
) -> str:
    request = SpeechRequest(text=text, language=language, voice=voice, consent=consent)
    with pytest.raises(BadInput) as caught:
        check(CARD, request, parse_options(CARD, options), weights)
    return str(caught.value)


def test_refusals_say_what_would_be_right(voice: Path, tmp_path: Path) -> None:
    folder = miniature("xtts")
    short = record(tmp_path / "short.wav", 5.0, 140.0)
    assert "5.0 s long; XTTS v2 needs at least 6 s" in refusal(voice=short)
    assert "Confirm that you may use this voice" in refusal(voice=voice, consent=False)
    assert "does not speak 'sv'; it speaks: en, es," in refusal(language="sv")
    assert "no letter or digit" in refusal("😀!")
    assert "cannot read digits in Hindi; write '1' in words" in refusal("नमस्ते 1", language="hi")
    assert "ordinal numbers in Czech; write '5.' in words" in refusal("Dnes je 5. ledna", language="cs")
    assert refusal("Say 你好", folder).startswith("XTTS v2 has no sign for '你'")
    assert "no voice 'Bob'; its voices are: Claribel Dervla, Daisy" in refusal(weights=folder, speaker="Bob")
    check(CARD, SpeechRequest(text=ONE, voice=voice, consent=True), XttsOptions(speaker="Bob"), folder)


def test_a_number_beyond_words_is_refused_when_met(engine: Engine) -> None:
    with pytest.raises(BadInput, match="cannot spell a number in"):
        speak(engine, "9" * 80, language="ru")


def test_a_checkpoint_without_built_in_voices_asks_for_a_reference(voice: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(miniature("xtts"), folder, ignore=shutil.ignore_patterns("speakers*"))
    assert "add a reference recording" in refusal(weights=folder)
    assert speak(load("xtts", folder), voice=voice, chunk_tokens=200).seconds > 0.1


def test_speakers_are_read_without_torch_and_nothing_in_the_file_is_run(tmp_path: Path) -> None:
    assert speakers_in(miniature("xtts") / "speakers_xtts.pth") == list(SPEAKERS)
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(trap),)

    torch.save({"ann": Trap()}, tmp_path / "trap.pth")
    assert speakers_in(tmp_path / "trap.pth") == ["ann"]
    assert not trap.exists()
    (tmp_path / "text.pth").write_text("no zip")
    with pytest.raises(WeightsError, match="damaged or foreign"):
        speakers_in(tmp_path / "text.pth")


def test_a_legacy_checkpoint_loads_and_is_not_rewritten(tmp_path: Path) -> None:
    """The first edition pickled its configuration as a class; the library would write model.pth anew."""
    folder = Path(shutil.copytree(miniature("xtts"), tmp_path / "legacy"))
    model = torch.load(folder / "model.pth", weights_only=True)
    with library._legacy_safe_globals():
        torch.save({"config": XttsConfig(), "model": model["model"]}, folder / "model.pth")
    before = contents(folder)
    legacy = speak(load("xtts", folder), chunk_tokens=200)
    assert contents(folder) == before
    assert np.array_equal(legacy.samples, speak(load("xtts", miniature("xtts")), chunk_tokens=200).samples)


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(miniature("xtts"), tmp_path / "broken"))
    model = folder / "model.pth"
    model.write_bytes(model.read_bytes()[:1_000_000])
    with pytest.raises(WeightsError, match=r"model\.pth is damaged or foreign: .*zip archive"):
        load("xtts", folder)
    torch.save({"weights": {}}, model)
    with pytest.raises(WeightsError, match=r"model\.pth is damaged or foreign: 'model'"):
        load("xtts", folder)
    (folder / "config.json").write_text('{"model": "vits"}')
    with pytest.raises(WeightsError, match=r"no XTTS: its config\.json says 'vits'"):
        load("xtts", folder)
    (folder / "vocab.json").write_text('{"a": 1}')
    with pytest.raises(WeightsError, match=r"vocab\.json is damaged or foreign"):
        check(CARD, SpeechRequest(text=ONE), XttsOptions(), folder)


def test_reads_a_checkpoint_that_the_miniature_builder_did_not_make(tmp_path: Path) -> None:
    """Trainer's key names, other sizes, a merged vocabulary, one voice, two languages."""
    torch.manual_seed(1)
    special = ["[STOP]", "[UNK]", "[SPACE]", "[en]", "[de]", "[START]"]
    letters = list("abcdefghijklmnopqrstuvwxyzäöüß.,!?'")
    vocabulary = {token: n for n, token in enumerate([*special, *letters, "ch", "ech", "th"])}
    tokenizer = {
        "added_tokens": [{"id": n, "content": t, "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for n, t in enumerate(special)],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "BPE", "unk_token": "[UNK]", "vocab": vocabulary, "merges": ["c h", "e ch", "t h"]},
    }  # fmt: skip
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer))
    args = XttsArgs(
        gpt_layers=2, gpt_n_model_channels=48, gpt_n_heads=3, gpt_max_audio_tokens=17, gpt_max_text_tokens=60,
        gpt_num_audio_tokens=90, gpt_start_audio_token=88, gpt_stop_audio_token=89, decoder_input_dim=48,
        gpt_use_perceiver_resampler=True, gpt_code_stride_len=512,
    )  # fmt: skip
    config = XttsConfig(model_args=args, languages=["en", "de"], max_ref_len=10)
    model = library.Xtts(config)
    model.tokenizer = VoiceBpeTokenizer(tmp_path / "vocab.json")
    model.init_models()
    torch.save(
        {"model": {f"xtts.{k}": v for k, v in model.state_dict().items()}, "step": 9}, tmp_path / "model.pth"
    )
    config.save_json(str(tmp_path / "config.json"))
    voices = {"ann": {"gpt_cond_latent": torch.randn(1, 32, 48), "speaker_embedding": torch.randn(1, 512, 1)}}
    torch.save(voices, tmp_path / "speakers_xtts.pth")

    assert "its voices are: ann." in refusal(weights=tmp_path)
    check(CARD, SpeechRequest(text="Echt?", language="de"), XttsOptions(speaker="ann"), tmp_path)
    engine = load("xtts", tmp_path)
    audio = speak(engine, "Echt? Schön.", language="de", speaker="ann")
    assert np.isfinite(audio.samples).all() and audio.seconds > PAUSE_SECONDS
    assert len(engine._sentences("the echo " * 20, "en")) > 1, "its text limit is 60 tokens"


def test_release_leaves_no_parameter_alive(voice: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = load("xtts", miniature("xtts"))
        speak(engine, voice=voice)
        with pytest.raises(Cancelled):
            speak(engine, run=RecordingRun(0, stop_after=3))
        alive = [weakref.ref(p) for module in engine.components().values() for p in module.parameters()]
        assert len(alive) > 100
        engine.close()
        vars(engine).clear()
        gc.collect()
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()
