"""eSpeak NG speaks for real: these tests listen to it through the real library."""

from __future__ import annotations

import subprocess
import sys
import wave
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from core.card import Ability
from core.engines.base import Cancelled, Engine
from core.engines.espeak.card import CARD, LANGUAGES, EspeakOptions
from core.errors import BadInput
from core.media import Audio
from core.requests import SpeechRequest, check, parse_options
from tests.support import RecordingRun, load

SENTENCE = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def engine() -> Any:
    made = load("espeak", None)
    yield made
    made.close()


def say(
    engine: Engine, text: str, language: str = "en", run: RecordingRun | None = None, **options: Any
) -> Audio:
    request = SpeechRequest(text=text, language=language)
    return engine.generate(request, EspeakOptions(**options), run or RecordingRun())


def refusal(text: str, language: str = "en", **options: Any) -> str:
    with pytest.raises(BadInput) as refused:
        check(CARD, SpeechRequest(text=text, language=language), EspeakOptions(**options))
    return str(refused.value)


def pitch_hz(audio: Audio) -> float:
    """Median pitch of the voiced frames, by the highest peak of each frame's autocorrelation."""
    found = []
    for start in range(0, audio.samples.size - 2048, 1024):
        frame = audio.samples[start : start + 2048] - audio.samples[start : start + 2048].mean()
        if np.abs(frame).max() < 0.1:
            continue
        likeness = np.correlate(frame, frame, "full")[2047:]
        lowest, highest = audio.rate // 500, audio.rate // 50
        lag = lowest + int(likeness[lowest:highest].argmax())
        if likeness[lag] > 0.5 * likeness[0]:
            found.append(audio.rate / lag)
    return float(np.median(found))


def test_speaks_with_a_human_voice_at_a_human_pace(engine: Engine) -> None:
    audio = say(engine, SENTENCE)
    assert audio.rate == CARD.sample_rate == 22050
    assert audio.samples.dtype == np.float32 and audio.samples.ndim == 1
    assert np.isfinite(audio.samples).all() and 0.3 < np.abs(audio.samples).max() <= 1
    assert 2 < audio.seconds < 4  # nine words at 175 a minute: 3.1 s
    assert 70 < pitch_hz(audio) < 180
    spectrum = np.abs(np.fft.rfft(audio.samples)) ** 2
    hertz = np.fft.rfftfreq(audio.samples.size, 1 / audio.rate)
    assert spectrum[(hertz > 80) & (hertz < 4000)].sum() > 0.9 * spectrum.sum()


def test_more_words_take_more_time_and_twice_the_speed_half_of_it(engine: Engine) -> None:
    once, thrice = say(engine, SENTENCE), say(engine, " ".join([SENTENCE] * 3))
    assert 2.8 < (thrice.seconds - 0.5) / once.seconds < 3.2
    slow, fast = say(engine, SENTENCE, speed=120), say(engine, SENTENCE, speed=240)
    assert 0.4 < fast.seconds / slow.seconds < 0.6


def test_knobs_are_heard(engine: Engine) -> None:
    assert pitch_hz(say(engine, SENTENCE, pitch=90)) > 1.3 * pitch_hz(say(engine, SENTENCE, pitch=20))
    assert pitch_hz(say(engine, SENTENCE, variant="f3")) > 1.3 * pitch_hz(say(engine, SENTENCE, variant="m3"))
    assert say(engine, SENTENCE, word_gap=20).seconds > say(engine, SENTENCE).seconds + 1
    assert differ(say(engine, SENTENCE, pitch_range=0), say(engine, SENTENCE, pitch_range=99))


def differ(one: Audio, other: Audio) -> bool:
    return not np.array_equal(one.samples, other.samples)


def test_every_language_of_the_card_has_a_voice(engine: Engine) -> None:
    assert len(set(LANGUAGES)) == len(LANGUAGES) >= 100
    for language in LANGUAGES:
        assert say(engine, "mama", language).seconds > 0.2, language


def test_languages_sound_different(engine: Engine) -> None:
    spoken = [say(engine, "12 34", language) for language in ("en", "de", "fr", "es", "zh", "hi", "ar", "ru")]
    assert len({audio.samples.tobytes() for audio in spoken}) == len(spoken)


def test_every_accent_and_every_variant_exists(engine: Engine) -> None:
    text = f"{SENTENCE} 75 95"
    standard = {code: say(engine, text, code) for code in ("en", "es", "pt", "fr", "ca", "ru", "vi")}
    accents = get_args(EspeakOptions.model_fields["accent"].annotation)[1:]
    for accent in accents:
        code = accent.partition("-")[0]
        assert differ(say(engine, text, code, accent=accent), standard[code]), accent
    # eSpeak passes over a variant that it does not know: only a changed sound shows that it is there.
    for variant in get_args(EspeakOptions.model_fields["variant"].annotation)[1:]:
        assert differ(say(engine, text, variant=variant), standard["en"]), variant


@pytest.mark.parametrize("variant", get_args(EspeakOptions.model_fields["variant"].annotation))
def test_the_same_seed_gives_the_same_samples_whatever_was_said_before(engine: Engine, variant: str) -> None:
    first = say(engine, SENTENCE, run=RecordingRun(5), variant=variant)
    say(engine, "Bonjour à tous.", "fr", variant="whisper", speed=300, pitch=80)
    np.testing.assert_array_equal(
        say(engine, SENTENCE, run=RecordingRun(5), variant=variant).samples, first.samples
    )


def test_another_seed_breathes_differently(engine: Engine) -> None:
    one, other = (say(engine, SENTENCE, run=RecordingRun(seed), variant="whisper") for seed in (1, 2))
    assert differ(one, other)


def test_a_long_text_is_spoken_sentence_by_sentence(engine: Engine) -> None:
    run = RecordingRun()
    audio = say(engine, " ".join([SENTENCE] * 60), run=run)
    assert [done for done, _, _ in run.steps] == list(range(1, 61))
    assert audio.seconds > 120


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_stop_is_obeyed_and_the_next_job_is_right(engine: Engine, stop_after: int) -> None:
    right = say(engine, SENTENCE)
    with pytest.raises(Cancelled):
        say(engine, f"{SENTENCE} {SENTENCE} {SENTENCE}", run=RecordingRun(stop_after=stop_after))
    np.testing.assert_array_equal(say(engine, SENTENCE).samples, right.samples)


class StopsInside(RecordingRun):
    """Asks for a stop at the n-th time it is asked, without any step in between."""

    asked = 0

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def check(self) -> None:
        self.asked += 1
        if self.asked > 5:
            raise self.error


@pytest.mark.parametrize("error", [Cancelled(), RuntimeError("the pipe is closed"), KeyboardInterrupt()])
def test_what_the_run_raises_inside_a_sentence_comes_out_at_once(
    engine: Engine, error: BaseException
) -> None:
    run = StopsInside(error)
    with pytest.raises(type(error)):
        say(engine, "one and two and three and four and five and six, " * 15, run=run)
    assert run.asked == 6 and not run.steps


def test_emoji_are_read_out(engine: Engine) -> None:
    assert say(engine, "Hello 😀").seconds > say(engine, "Hello").seconds + 0.5


def test_text_that_comes_out_silent_is_refused(engine: Engine) -> None:
    with pytest.raises(BadInput, match="nothing that this engine can say"):
        say(engine, "1 2 3", "cv")  # the Chuvash rules have no numbers


def test_markup_is_followed_when_asked(engine: Engine) -> None:
    pause = (
        say(engine, "Hello <break time='2s'/> there", markup=True).seconds
        - say(engine, "Hello there").seconds
    )
    assert 1.8 < pause < 2.6
    run = RecordingRun()
    say(engine, "<speak>One. <prosody rate='slow'>Two. Three.</prosody></speak>", markup=True, run=run)
    assert run.steps[-1][:2] == (1, 1)


def test_markup_reads_no_file_even_past_the_check(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "secret.wav"
    with wave.open(str(file), "wb") as secret:
        secret.setnchannels(1)
        secret.setsampwidth(2)
        secret.setframerate(22050)
        secret.writeframes(b"\x00\x20" * 22050 * 3)
    assert say(engine, f"Hello <audio src='{file}'/> there", markup=True).seconds < 2


def test_several_engines_live_side_by_side() -> None:
    one, other = load("espeak", None), load("espeak", None)
    first = say(one, SENTENCE)
    np.testing.assert_array_equal(say(other, SENTENCE).samples, first.samples)
    other.close()
    np.testing.assert_array_equal(say(one, SENTENCE).samples, first.samples)
    one.close()


def test_another_user_of_the_library_in_this_process_is_left_alone() -> None:
    import ctypes

    import espeakng_loader

    shared = ctypes.CDLL(espeakng_loader.get_library_path())
    shared.espeak_Initialize(1, 0, espeakng_loader.get_data_path().encode(), 0x8000)
    assert shared.espeak_SetVoiceByName(b"de") == 0
    made = load("espeak", None)
    first = say(made, SENTENCE)
    shared.espeak_TextToPhonemes.restype = ctypes.c_char_p
    text = ctypes.c_char_p("zwölf".encode())
    assert shared.espeak_TextToPhonemes(ctypes.byref(text), 1, 2).decode() == "tsvˈœlf"
    np.testing.assert_array_equal(say(made, SENTENCE).samples, first.samples)
    made.close()
    assert shared.espeak_Terminate() == 0


def test_close_leaves_no_file_and_no_mapped_library_behind() -> None:
    made = load("espeak", None)
    say(made, SENTENCE)
    copy: Path = made._library  # type: ignore[attr-defined]
    assert copy.exists() and str(copy) not in Path("/proc/self/maps").read_text()
    made.close()
    assert not copy.parent.exists()


def test_refusals_name_what_is_wrong_and_what_would_be_right() -> None:
    assert "does not speak 'xx'" in refusal("Hello", "xx")
    assert "belongs to another language than 'fr'" in refusal("Bonjour", "fr", accent="en-us")
    assert "the tag <b> aloud unless the option markup is on" in refusal("<b>Hello</b>")
    assert "broken at line 1" in refusal("Hello <break", markup=True)
    assert "&amp;" in refusal("Tom & Jerry", markup=True)
    assert "the tag <audio> here" in refusal("<audio src='/tmp/a.wav'/> Hello", markup=True)
    assert "may not name files" in refusal("<voice name='../../x'>Hello</voice>", markup=True)
    assert "Comments" in refusal("Hello <!-- <audio src='a'/> -->", markup=True)
    assert "no words" in refusal("<break time='1s'/>", markup=True)
    assert "the character 日" in refusal("こんにちは、日本", "ja") and "kana" in refusal("日本", "ja")
    assert "would read the cue [laughs]" in refusal("[laughs] Hello")
    with pytest.raises(BadInput, match=r"'speed' is 9.*80"):
        parse_options(CARD, {"speed": 9})


@pytest.mark.parametrize(
    ("text", "language", "options"),
    [
        ("3 < 5 and 7 > 2", "en", {}),
        ("Hello <emphasis>world</emphasis> &amp; all", "en", {"markup": True}),
        ("你好。", "zh", {}),
        ("Hello", "en", {"accent": "en-gb-scotland"}),
    ],
)
def test_what_it_can_say_is_let_through(text: str, language: str, options: dict[str, Any]) -> None:
    check(CARD, SpeechRequest(text=text, language=language), EspeakOptions(**options))


def test_has_no_weights_and_needs_no_torch() -> None:
    assert not CARD.has_weights and CARD.parameters == 0 and Ability.MARKUP in CARD.abilities
    command = (
        "import core.engines.espeak.engine, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", command], check=True)
