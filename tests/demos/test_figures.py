import pytest

from demos import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.042, "42 ms"), (0.9996, "1.00 s"), (4.621, "4.62 s"), (31.24, "31.2 s"), (12, "12 s"),
        (59.97, "1 min 00 s"), (75.2, "1 min 15 s"),
    ],
)  # fmt: skip
def test_seconds_are_short(value, text):
    assert figures.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (512, "512 B"),
        (412 * 2**20, "412 MiB"),
        (2**30 * 1.93, "1.9 GiB"),
        (24 * 2**30, "24 GiB"),
    ],
)
def test_sizes_are_short(value, text):
    assert figures.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0042, "0.0042"), (0.37, "0.37"), (2.5, "2.50"), (None, "–")])
def test_factors_keep_two_digits(value, text):
    assert figures.factor(value) == text


def test_languages_have_names_and_unknown_codes_stay():
    assert figures.language("fr") == "French"
    assert figures.language("zz9") == "zz9"
    assert figures.languages(()) == "any language"
    assert figures.languages(("en", "zh")) == "English, Chinese"
    assert figures.languages(("en", "zh", "fr", "de")) == "4 languages"


@pytest.mark.parametrize("longest", [0.3, 0.95, 1.0, 2.4, 7, 29, 61, 400, 1200])
def test_the_time_axis_has_a_few_round_ticks_within_the_span(longest):
    ticks = figures.time_ticks(longest)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] == (0, ticks[0][1])
    assert all(0 <= place <= 100 for place, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


def test_bytes_over_time_share_the_unit_of_the_largest():
    assert figures.course(400 * 2**20, 1.9 * 2**30, 1.2 * 2**30) == "0.4 → 1.9 → 1.2 GiB"
    assert figures.course(599 * 2**20, 618 * 2**20, 618 * 2**20) == "599 → 618 → 618 MiB"
    assert figures.course(0, 0, 0) == "0 → 0 → 0 B"
    assert figures.course(1, None, 2) == "–"
