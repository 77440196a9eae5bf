"""What a press will cost, from plans and earlier takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.forecast import MARGIN, Forecast, in_a_sentence, working_memory

peaks = st.lists(st.tuples(st.floats(0, 5000), st.integers(0, 2**34)), min_size=1, max_size=20)


def test_without_takes_nothing_is_known():
    assert working_memory([], 100) is None


def test_a_line_is_laid_over_measured_peaks():
    takes = [(100.0, 1200), (200.0, 2200), (300.0, 3200)]
    assert working_memory(takes, 400) == pytest.approx(MARGIN * 4200, rel=1e-6)
    assert working_memory(takes, 0) == pytest.approx(MARGIN * 200, abs=2)


def test_one_size_counts_in_proportion_for_a_larger_request_and_whole_for_a_smaller():
    assert working_memory([(100.0, 1000), (100.0, 800)], 300) == int(MARGIN * 3000)
    assert working_memory([(100.0, 1000)], 10) == int(MARGIN * 1000)


@given(peaks)
def test_no_measured_peak_lies_above_the_forecast_for_the_same_request(takes):
    for size, peak in takes:
        assert working_memory(takes, size) >= peak


@given(peaks, st.floats(0, 5000), st.floats(0, 5000))
def test_a_larger_request_never_needs_less(takes, size, more):
    assert working_memory(takes, size + more) >= working_memory(takes, size)


def test_a_forecast_is_told_in_one_line():
    gib = 2**30
    large = Forecast("Bark", 4 * gib, 6 * gib, unloads=("XTTS v2",), download_bytes=5 * gib, seconds=100.0)
    small = Forecast("MMS", 200 * 2**20, 6 * gib, seconds=20.0)
    assert in_a_sentence([large]) == (
        "Needs about 4.0 GiB, 6.0 GiB free; XTTS v2 will make room; downloads 5.0 GiB first; about 2 min"
    )
    assert in_a_sentence([small, large]).startswith("Needs about 4.0 GiB for Bark, 6.0 GiB free")
    assert in_a_sentence([Forecast("MMS", 1, 1, loaded=True, seconds=0.2)]) == "About 1 s"
    assert in_a_sentence([small, Forecast("F5-TTS", refusal="F5-TTS needs 9 GiB.")]) == "F5-TTS needs 9 GiB."
    assert in_a_sentence([Forecast("MMS")]) == "" and in_a_sentence([]) == ""
