"""Sentences, pauses and peaks: what every speech engine leans on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engines.base import Cancelled
from core.engines.speaking import join, speak_by_sentence, split_sentences
from core.errors import BadInput, SoundstageError
from tests.support import RecordingRun


def dense(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four… Five.", ["One.", "Two!", "Three?", "Four…", "Five."]),
        ("A line\nand another\r\n\r\nand a third", ["A line", "and another", "and a third"]),
        ("no capitals here. none there either", ["no capitals here.", "none there either"]),
        ("He said “Stop.” Then he left.", ["He said “Stop.”", "Then he left."]),
        ("Really?! Yes.", ["Really?!", "Yes."]),
        ("¿Qué tal? ¡Muy bien! Gracias.", ["¿Qué tal?", "¡Muy bien!", "Gracias."]),
        ("今日は晴れ。明日は雨？そうです！", ["今日は晴れ。", "明日は雨？", "そうです！"]),
        ("「はい。」と彼は言った。終わり。", ["「はい。」と彼は言った。", "終わり。"]),
        ("كيف حالك؟ أنا بخير.", ["كيف حالك؟", "أنا بخير."]),
        ("یہ ایک ہے۔ وہ دو ہے۔", ["یہ ایک ہے۔", "وہ دو ہے۔"]),
        ("यह एक है। वह दो है॥", ["यह एक है।", "वह दो है॥"]),
        ("ეს არის NATO. მეორე აქ არის.", ["ეს არის NATO.", "მეორე აქ არის."]),
    ],
)
def test_cuts_after_sentence_ends(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith and Mrs. Jones met Prof. Li.",
        "Pi is 3.14159 and a half is 0.5 or .5 of one.",
        "It cost 1,234.50 on www.example.org today.",
        "J. R. R. Tolkien wrote it, e.g. in the U.S. Army.",
        "Am 3. Mai kam z. B. Frau Dr. Kuhn, vgl. Nr. 5 und S. 12.",
        "See Fig. 3 and p. 12 of Vol. 2.",
        "Wait... what was that?",
        "“Why?” he asked.",
        "M. Dupont et Mme. Durand sont là.",
        "Сегодня г. Москва и т. д.",
    ],
)
def test_leaves_abbreviations_numbers_and_quotations_whole(text: str) -> None:
    assert split_sentences(text) == [text]


def test_a_word_that_is_an_abbreviation_only_before_a_number_ends_a_sentence() -> None:
    assert split_sentences("He said no. She laughed.") == ["He said no.", "She laughed."]


def test_a_long_sentence_is_cut_at_a_comma_then_at_a_space_then_anywhere() -> None:
    assert split_sentences("one two, three four five", limit=16) == ["one two,", "three four five"]
    assert split_sentences("one two three four", limit=9) == ["one two", "three", "four"]
    assert split_sentences("abcdefgh", limit=3) == ["abc", "def", "gh"]
    assert split_sentences("one two three", limit=7) == ["one two", "three"]
    assert split_sentences("costs 1,000,000 now", limit=12) == ["costs", "1,000,000", "now"]


def test_a_cut_anywhere_keeps_vowel_signs_with_their_letter() -> None:
    assert split_sentences("กิกิกิ", limit=3) == ["กิ", "กิ", "กิ"]


def test_blank_text_has_no_sentences_and_a_limit_below_one_is_refused() -> None:
    assert split_sentences(" \n\t ") == []
    with pytest.raises(ValueError, match="limit"):
        split_sentences("a", limit=0)


PUNCTUATED = st.text(
    st.one_of(
        st.sampled_from("aB3 .,!?…\n\r\t\"'”)。、！」।؟ंิ\u200d😀-"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=300,
)


@given(PUNCTUATED, st.integers(1, 60))
def test_nothing_but_white_space_is_lost_and_the_limit_holds(text: str, limit: int) -> None:
    pieces = split_sentences(text, limit)
    assert dense("".join(pieces)) == dense(text)
    assert all(piece.strip() == piece and 0 < len(piece) <= limit for piece in pieces)


@given(st.lists(st.integers(0, 99999).map(lambda n: f"Number {n / 100} it was."), min_size=1, max_size=6))
def test_sentences_with_decimals_come_back_as_they_went_in(sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences)) == sentences


def test_speaks_each_sentence_in_order_with_a_step_each() -> None:
    run, heard = RecordingRun(), []

    def speak(sentence: str) -> np.ndarray:
        heard.append(sentence)
        return np.full(10, len(heard) / 10, np.float32)

    audio = speak_by_sentence("One. Two. Three.", 100, run, speak)
    assert heard == ["One.", "Two.", "Three."]
    assert [step[:2] for step in run.steps] == [(1, 3), (2, 3), (3, 3)]
    assert audio.samples.shape == (3 * 10 + 2 * 25,)
    assert audio.samples[10:35].any() == False  # noqa: E712 - a numpy bool
    np.testing.assert_allclose(audio.samples[[0, 35, 70]], [0.1, 0.2, 0.3])


@pytest.mark.parametrize(("stop_after", "spoken"), [(0, 0), (1, 2), (2, 3)])
def test_a_stop_is_obeyed_before_the_next_sentence(stop_after: int, spoken: int) -> None:
    heard: list[str] = []

    def speak(sentence: str) -> np.ndarray:
        heard.append(sentence)
        return np.ones(1, np.float32)

    with pytest.raises(Cancelled):
        speak_by_sentence("One. Two. Three.", 100, RecordingRun(stop_after=stop_after), speak)
    assert len(heard) == spoken


def test_a_piece_without_samples_leaves_no_second_pause() -> None:
    one = np.ones(5, np.float32)
    np.testing.assert_array_equal(
        join([one, np.zeros(0, np.float32), one], 100).samples, join([one, one], 100).samples
    )


def test_too_loud_is_scaled_down_and_quiet_is_left_alone() -> None:
    loud = np.array([0.5, -2.0], np.float32)
    np.testing.assert_allclose(join([loud], 100).samples, [0.25, -1.0])
    quiet = np.array([0.5, -0.25], np.float32)
    np.testing.assert_array_equal(join([quiet], 100).samples, quiet)


def test_nothing_spoken_or_not_numbers_is_an_error_and_not_silence() -> None:
    with pytest.raises(BadInput, match="nothing that this engine can say"):
        join([np.zeros(0, np.float32)], 100)
    with pytest.raises(SoundstageError, match="not numbers"):
        join([np.array([0.0, np.nan], np.float32)], 100)
