"""Coqui VITS: speaks through the real library, from folders that only its layout identifies."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from TTS.api import TTS
from TTS.tts.configs.vits_config import VitsArgs, VitsConfig
from TTS.tts.models.vits import Vits

from core.engines.base import Cancelled, Engine
from core.engines.vits.card import CARD, CHECKPOINTS, VCTK_SPEAKERS, VitsOptions
from core.engines.vits.phonemes import LibraryPhonemizer, installed
from core.errors import BadInput, WeightsError
from core.media import Audio
from core.requests import SpeechRequest, check, parse_options
from tests.support import RecordingRun, load, miniature, seed_everything

ONE = "Be a voice, not an echo."
THREE = "Be a voice, not an echo. This cake is great! Is it moist?"


@pytest.fixture(scope="module")
def ljspeech() -> Engine:
    return load("vits", miniature("vits", 0))


@pytest.fixture(scope="module")
def vctk() -> Engine:
    return load("vits", miniature("vits", 1))


def speak(
    engine: Engine, text: str = ONE, seed: int = 7, run: RecordingRun | None = None, **options: object
) -> Audio:
    seed_everything(seed)
    request = SpeechRequest(text=text)
    return engine.generate(request, parse_options(CARD, options), run or RecordingRun(seed))


def contents(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_speaks_float_mono_within_full_scale(ljspeech: Engine) -> None:
    audio = speak(ljspeech)
    assert audio.rate == CARD.sample_rate
    assert audio.samples.dtype == np.float32 and audio.samples.ndim == 1
    assert np.isfinite(audio.samples).all()
    assert 0 < np.abs(audio.samples).max() <= 1
    assert audio.seconds > 0.3


def test_same_seed_same_samples_other_seed_others(ljspeech: Engine) -> None:
    first = speak(ljspeech, seed=1).samples
    speak(ljspeech, "Something else in between.", seed=5, speed=2.0)
    assert np.array_equal(first, speak(ljspeech, seed=1).samples)
    assert not np.array_equal(first, speak(ljspeech, seed=2).samples)


def test_equals_the_library_called_directly(vctk: Engine, tmp_path: Path) -> None:
    folder = miniature("vits", 1)
    config = json.loads((folder / "config.json").read_text())
    config["speakers_file"] = config["model_args"]["speakers_file"] = str(folder / "speaker_ids.json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with installed():
        tts = TTS(
            model_path=str(folder / "model_file.pth"),
            config_path=str(tmp_path / "config.json"),
            progress_bar=False,
        )
    seed_everything(3)
    expected = tts.synthesizer.tts_model.synthesize(ONE, speaker="p226")["wav"]
    assert np.array_equal(speak(vctk, seed=3, speaker="p226").samples, expected)


def test_speakers_sound_different_and_empty_means_p225(vctk: Engine) -> None:
    assert np.array_equal(speak(vctk).samples, speak(vctk, speaker="p225").samples)
    assert not np.array_equal(speak(vctk).samples, speak(vctk, speaker="p376").samples)


def test_speed_shortens(ljspeech: Engine) -> None:
    slow, usual, fast = (speak(ljspeech, speed=speed).seconds for speed in (0.5, 1.0, 2.0))
    assert slow > 1.3 * usual > 1.3 * fast


def test_without_noise_every_seed_gives_the_same(ljspeech: Engine) -> None:
    still = {"noise_scale": 0.0, "rhythm_noise_scale": 0.0}
    assert np.array_equal(speak(ljspeech, seed=1, **still).samples, speak(ljspeech, seed=2, **still).samples)


def test_reports_one_step_a_sentence(ljspeech: Engine) -> None:
    run = RecordingRun(0)
    speak(ljspeech, THREE, run=run)
    assert [(done, total) for done, total, _ in run.steps] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_stops_within_a_sentence_and_the_next_job_is_right(ljspeech: Engine, after: int) -> None:
    expected = speak(ljspeech, seed=9).samples
    run = RecordingRun(0, stop_after=after)
    with pytest.raises(Cancelled):
        speak(ljspeech, THREE, run=run)
    assert len(run.steps) == after
    assert np.array_equal(speak(ljspeech, seed=9).samples, expected)


def test_long_text_with_dashes_numbers_and_lone_signs(ljspeech: Engine) -> None:
    text = "In 1999, 12.5 % of them (three) paid $20 - or so.\n—\n" * 2 + "word " * 60
    run = RecordingRun(0)
    audio = speak(ljspeech, text, run=run)
    assert audio.seconds > 5 and np.isfinite(audio.samples).all()
    assert run.steps[-1][0] == run.steps[-1][1] == 6


def test_needs_no_espeak_command(tmp_path: Path) -> None:
    program = (
        "from tests.support import *\n"
        "import shutil; assert not shutil.which('espeak-ng') and not shutil.which('espeak')\n"
        "from core.engines.quirks import mend_torchaudio; mend_torchaudio()\n"
        "import sys; from pathlib import Path; from core.requests import SpeechRequest as R\n"
        "from core.engines.vits.card import VitsOptions as O\n"
        "engine = load('vits', Path(sys.argv[1])); seed_everything(7)\n"
        "audio = engine.generate(R(text=sys.argv[2]), O(), RecordingRun(7))\n"
        "sys.stdout.buffer.write(audio.samples.tobytes())\n"
    )
    folder = miniature("vits", 0)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), ONE],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    spoken = np.frombuffer(done.stdout, np.float32)
    assert np.array_equal(spoken, speak(load("vits", folder)).samples)


def test_phonemes_are_those_of_the_espeak_command() -> None:
    # Recorded from `espeak-ng 1.51 -q -b 1 -v en-us --ipa=1`, less the separators.
    phonemizer = LibraryPhonemizer("en")
    assert phonemizer.phonemize("Hello world", "") == "həlˈoʊ wˈɜːld"
    assert phonemizer.phonemize("In 1999, Dr Smith paid $20!", "") == (
        "ɪn nˈaɪntiːnhˈʌndɹɪd nˈaɪnti nˈaɪn, dˈɑːktɚ smˈɪθ pˈeɪd dˈɑːlɚ twˈɛnti!"
    )


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="compares with the espeak-ng command")
def test_phonemes_equal_those_of_coquis_wrapper() -> None:
    from TTS.tts.utils.text.phonemizers.espeak_wrapper import ESpeak

    text = "The quick brown fox, (it says) jumps over 12.5 lazy dogs; doesn't it?"
    assert LibraryPhonemizer("en").phonemize(text, "") == ESpeak("en").phonemize(text, "")


def test_coquis_phonemizers_are_as_before_after_a_load(ljspeech: Engine) -> None:
    from TTS.tts.utils.text.phonemizers import PHONEMIZERS

    assert PHONEMIZERS["espeak"] is not LibraryPhonemizer


def test_loading_changes_nothing_in_the_folder(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(miniature("vits", 1), tmp_path / "moved here"))
    before = contents(folder)
    speak(load("vits", folder), speaker="p300")
    assert contents(folder) == before


def refusal(text: str = ONE, weights: Path | None = None, **options: object) -> str:
    request = SpeechRequest(text=text)
    with pytest.raises(BadInput) as caught:
        check(CARD, request, parse_options(CARD, options), weights)
    return str(caught.value)


def test_refusals_say_what_would_be_right() -> None:
    assert "'п'" in refusal("Say привет") and "Latin letters" in refusal("你好")
    assert "no letter or digit" in refusal("😀 $ ☂")
    assert "set 'checkpoint' to vctk" in refusal(speaker="p226")
    assert "single speaker" in refusal(speaker="p226", weights=miniature("vits", 0))
    unknown = refusal(checkpoint="vctk", speaker="Bob", weights=miniature("vits", 1))
    assert unknown.startswith("Coqui VITS has no speaker 'Bob'; the speakers are: ED, p225, ")
    assert "less than or equal to 2" in refusal_of_option(speed=9)
    check(CARD, SpeechRequest(text="Café, naïve, straße, 12 €."), VitsOptions(), miniature("vits", 0))


def refusal_of_option(**options: object) -> str:
    with pytest.raises(BadInput) as caught:
        parse_options(CARD, options)
    return str(caught.value)


def test_options_pick_the_checkpoint() -> None:
    request = SpeechRequest(text=ONE)
    assert CARD.checkpoint(request, VitsOptions(checkpoint="vctk")) is CHECKPOINTS["vctk"]
    assert CARD.checkpoint(request, VitsOptions()) is CHECKPOINTS["ljspeech"]
    assert len(VCTK_SPEAKERS) == 108


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(miniature("vits", 0), tmp_path / name))

    truncated = broken("truncated")
    model = truncated / "model_file.pth"
    model.write_bytes(model.read_bytes()[:200_000])
    with pytest.raises(WeightsError, match=r"model_file\.pth is damaged or foreign: .*zip archive"):
        load("vits", truncated)
    torch.save({"weights": {}}, model)
    with pytest.raises(WeightsError, match=r"model_file\.pth is damaged or foreign: 'model'"):
        load("vits", truncated)
    shutil.copy(miniature("vits", 1) / "model_file.pth", model)
    with pytest.raises(WeightsError, match=r"damaged or foreign: Error.*Unexpected key.*emb_g"):
        load("vits", truncated)

    foreign = broken("foreign")
    (foreign / "config.json").write_text('{"model": "tacotron2"}')
    with pytest.raises(WeightsError, match=r"no Coqui VITS: its config\.json says 'tacotron2'"):
        load("vits", foreign)

    (foreign / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        load("vits", foreign)


def test_reads_a_checkpoint_that_the_miniature_builder_did_not_make(tmp_path: Path) -> None:
    """Graphemes, two speakers, other sizes, deterministic durations, a discriminator, 16 kHz."""
    torch.manual_seed(1)
    (tmp_path / "speaker_ids.json").write_text('{"ada": 0, "bob": 1}')
    args = VitsArgs(
        hidden_channels=16,
        num_layers_text_encoder=2,
        num_layers_flow=2,
        num_layers_posterior_encoder=2,
        resblock_type_decoder="2",
        resblock_kernel_sizes_decoder=[3],
        resblock_dilation_sizes_decoder=[[1, 2]],
        upsample_rates_decoder=[16, 8, 2],
        upsample_kernel_sizes_decoder=[32, 16, 4],
        upsample_initial_channel_decoder=32,
        use_sdp=False,
        use_speaker_embedding=True,
        speaker_embedding_channels=4,
        speakers_file=str(tmp_path / "speaker_ids.json"),
        length_scale=1.3,
    )
    config = VitsConfig(model_args=args, text_cleaner="english_cleaners", use_speaker_embedding=True)
    config.audio.sample_rate = 16000
    model = Vits(config)
    torch.save({"model": model.state_dict(), "step": 3}, tmp_path / "model_file.pth")
    args.speakers_file = config.speakers_file = "elsewhere/speaker_ids.json"
    config.save_json(str(tmp_path / "config.json"))

    engine = load("vits", tmp_path)
    assert "the speakers are: ada, bob" in refusal(speaker="p225", weights=tmp_path)
    audio = speak(engine, speaker="bob")
    assert audio.rate == 16000 and np.abs(audio.samples).max() > 0
    assert not np.array_equal(audio.samples, speak(engine).samples)
    # Its own pace stays the measure: 1.3 frames a sign are rounded up to 2, half as fast to 3.
    assert 2 * speak(engine, speaker="bob", speed=0.5).samples.size == 3 * audio.samples.size


def test_release_leaves_no_parameter_alive() -> None:
    gc.collect()
    gc.disable()
    try:
        engine = load("vits", miniature("vits", 1))
        speak(engine)
        with pytest.raises(Cancelled):
            speak(engine, run=RecordingRun(0, stop_after=0))
        alive = [weakref.ref(p) for module in engine.components().values() for p in module.parameters()]
        assert len(alive) > 50
        engine.close()
        vars(engine).clear()
        gc.collect()
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()
