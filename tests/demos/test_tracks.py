from pathlib import Path

from core.card import Modality
from core.catalog import Catalog
from core.requests import Order, SpeechRequest
from core.takes import Take
from demos.comparison import comparison
from demos.stage import stage
from demos.tracks import download_name, facts, longest, track, waveform

NASTY = """<img src=x onerror=alert(1)> "quoted" 'single' ${1+1} {{value}}"""


def finished(engine: str = "espeak", text: str = "Hello.", seconds: float = 2.0, **cost: float) -> Take:
    medium = {
        "file": "audio.wav", "listen": "listen.wav", "sha256": "0", "seconds": seconds, "rate": 22050,
        "lufs": -20.0, "peaks": [[-0.5, 0.25], [-0.1, 0.5]],
        "mel": {"file": "mel.png", "ticks": [{"hz": 500, "top": 80.0}, {"hz": 4000, "top": 30.0}]},
    }  # fmt: skip
    return Take(
        engine=engine,
        modality=Modality.SPEECH,
        order=Order(engine=engine, request=SpeechRequest(text=text), seed=1, group="g"),
        media=[medium],
        measurements={"audio_seconds": seconds, "real_time_factor": 0.5, "generate_seconds": 1.0, **cost},
        weights={"kind": "miniature"},
        folder=Path("/takes/kept/abc"),
    )


def html(take: Take, span: float | None = None) -> str:
    [slot] = stage([], [take]).slots
    return track(slot, Catalog().card(take.engine), span or longest([slot]))


def test_a_visitors_text_is_never_markup():
    assert "<img src=x" not in html(finished(text=NASTY))


def test_a_track_takes_its_share_of_the_common_time_axis():
    assert "--share: 0.250" in html(finished(seconds=2.0), span=8.0)


def test_miniatures_are_called_noise():
    assert "untrained miniature: noise" in html(finished())


def test_the_waveform_fills_its_height_at_the_loudest_peak():
    path = waveform([[-0.5, 0.25], [-0.1, 0.5]])
    assert path.startswith("M0,26.0 1,2.0") and path.endswith("0,98.0Z")


def test_silence_is_a_thin_line():
    assert waveform([[0.0, 0.0]]) == "M0,49.4 0,50.6Z"


def test_downloads_are_named_after_engine_and_words():
    assert download_name(finished(text="Well, hello there!")) == "espeak-well-hello-there.wav"
    assert download_name(finished(text="...")) == "espeak-take.wav"


def test_two_runs_are_compared_and_the_best_is_marked():
    cards = {card.id: card for card in Catalog().cards(Modality.SPEECH)}
    assert comparison([finished()], cards) == ""
    table = comparison([finished(generate_seconds=4.0), finished("mms", generate_seconds=1.0)], cards)
    chart = table[table.index("without loading") :]
    slow, fast = chart.index("width: 100.00%"), chart.index("width: 25.00%")
    assert slow < fast < chart.index("1.00 s")
    assert 'class="best"' in chart


def test_a_result_says_where_its_weights_were_and_what_memory_did():
    cost = {
        f"{m}_{w}_bytes": n * 2**30
        for m in ("ram", "device")
        for n, w in enumerate(("before", "peak", "after"))
    }
    take = finished(**cost).model_copy(update={"placement": {"device": "cuda", "words": "gpt on the GPU"}})
    told = dict(facts(take))
    assert told["Placement"] == "gpt on the GPU"
    assert told["GPU before, peak, after"] == told["RAM before, peak, after"] == "0.0 → 1.0 → 2.0 GiB"
    on_cpu = take.model_copy(update={"placement": {"device": "cpu", "strategy": "resident"}})
    assert dict(facts(on_cpu))["GPU before, peak, after"] == "–"
    assert "GPU before" in html(take) and "GPU before" not in html(on_cpu)


def test_a_column_without_any_figure_is_left_out():
    cards = {card.id: card for card in Catalog().cards(Modality.SPEECH)}
    assert "RAM before" not in comparison([finished(), finished("mms")], cards)
    cost = {f"ram_{when}_bytes": 2**30 for when in ("before", "peak", "after")}
    table = comparison([finished(), finished("mms", **cost)], cards)
    assert "RAM before" in table and "<td>–</td>" in table
