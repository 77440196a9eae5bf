"""Engines that share one card, as jobs see it: on a pretend card that counts every byte."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch

from core.card import Checkpoint
from core.events import Failed, Finished, Loading
from core.requests import SpeechRequest
from core.worker.messages import Released
from tests.pretend import card, needed
from tests.support import reference
from tests.worker.test_host import Stage

pytestmark = needed

MIB = 2**20
WINDOW = 8192  # bytes: Coqui's VITS holds that of its spectrogram as neither parameter nor buffer
WORDS = "Hello there"


@pytest.fixture
def gpu():
    gc.collect()
    with card(400 * MIB) as made:
        yield made


@pytest.fixture
def stage(gpu, settings, tmp_path):
    return staged(settings, tmp_path)


def staged(settings, tmp_path, **changes) -> Stage:
    settings = settings.model_copy(update={"device": "cuda", **changes})
    stage = Stage(settings, tmp_path / "job")
    catalog = stage.host._catalog
    ladder = ("resident", "device_map", "cpu")
    card = catalog.card("unruly").model_copy(update={"strategies": ladder})
    catalog._cards["unruly"] = card
    return stage


def speak(stage: Stage, engine: str, **changes) -> Finished:
    request = SpeechRequest(text=WORDS, **reference(stage.host._catalog.card(engine)))
    finished = stage.run(engine=engine, request=request, **changes)[-1]
    assert isinstance(finished, Finished), finished
    return finished


def sound(finished: Finished) -> str:
    return finished.media[0]["sha256"]


def states(stage: Stage) -> dict[str, str]:
    return {held.engine: held.state for held in stage.host.residency.inventory()}


def clean(stage: Stage) -> bool:
    return all(message.clean for message in stage.told if isinstance(message, Released))


@pytest.mark.parametrize("engine", ["mms", "vits", "xtts"])
def test_parking_gives_the_whole_card_back_and_coming_back_speaks_the_same(stage, gpu, engine):
    first = sound(speak(stage, engine))
    [held] = stage.host.residency.inventory()
    assert gpu.used > 0 and held.state == "loaded" and held.device_bytes > 0 and held.ram_bytes == 0
    stage.host.unload(park=True)
    [parked] = stage.host.residency.inventory()
    assert gpu.used <= (WINDOW if engine == "vits" else 0) and parked.state == "parked"
    assert parked.device_bytes == 0 and parked.ram_bytes == held.device_bytes
    assert sound(speak(stage, engine)) == first
    assert states(stage) == {engine: "loaded"} and gpu.used > 0
    stage.host.unload()
    assert gpu.used == 0 and clean(stage)


def test_coming_back_reads_no_file(stage, gpu, settings):
    first = sound(speak(stage, "mms"))
    stage.host.unload(park=True)
    shutil.rmtree(settings.cache)
    assert sound(speak(stage, "mms")) == first


def test_engines_that_take_turns_on_a_small_card_stay_within_it_and_lose_nothing(settings, tmp_path):
    alone, sizes, parked = {}, {}, set()
    with card(400 * MIB) as gpu:
        stage = staged(settings, tmp_path)
        for engine in ("mms", "vits", "bark"):
            alone[engine] = speak(stage, engine)
            sizes[engine] = gpu.used
            stage.host.unload()
    working = {engine: finished.measurements["working_bytes"] for engine, finished in alone.items()}
    with card(max(sizes[e] + working[e] for e in sizes) + MIB) as gpu:
        stage = staged(settings, tmp_path)
        for engine in ("mms", "vits", "bark", "mms", "bark", "vits", "vits", "mms"):
            finished = speak(stage, engine, working=working[engine])
            assert sound(finished) == sound(alone[engine])
            assert finished.placement["strategy"] == "resident" and gpu.peak <= gpu.total
            loaded = sum(sizes[e] for e, state in states(stage).items() if state == "loaded")
            assert 0 <= gpu.used - loaded <= WINDOW
            parked |= set(stage.host.residency.parked)
        assert set(states(stage)) == {"mms", "vits", "bark"} and clean(stage)
        assert parked, "nobody had to leave"


def test_what_another_process_takes_counts_in_every_plan(stage, gpu):
    def placed(engine_fits: bool) -> str:
        gpu.elsewhere = 0 if engine_fits else gpu.total
        return stage.run()[-1].placement["strategy"]

    assert [placed(True), placed(False), placed(False), placed(True)] == [
        "resident",
        "cpu",
        "cpu",
        "resident",
    ]
    assert clean(stage)


def test_memory_taken_between_plan_and_load_is_met_by_each_step_of_the_ladder_once(stage, gpu, monkeypatch):
    from tests.unruly.engine import Unruly

    load, tried = Unruly.load, []

    def taken_meanwhile(self, weights, placement):
        tried.append(placement.strategy)
        gpu.elsewhere = gpu.total
        torch.empty(1000, device=placement.device)
        load(self, weights, placement)

    monkeypatch.setattr(Unruly, "load", taken_meanwhile)
    memory = stage.host.memory
    monkeypatch.setattr(memory, "limits", _as_if_free(memory, gpu))
    events = stage.run()
    assert events[-1].placement["strategy"] == "cpu" and clean(stage)
    assert tried == ["resident", "device_map", "cpu"]
    assert sum("ran out of memory" in e.note for e in events if isinstance(e, Loading)) == 2
    gc.collect()
    assert gpu.used == 0


def _as_if_free(memory, gpu):
    """What other processes take is seen too late."""
    limits = memory.limits

    def asked():
        gpu.elsewhere = 0
        return limits()

    return asked


def _run_out(layers: torch.nn.Module, size: int) -> None:
    """As in a library: the frame that the error comes from holds the model."""
    torch.empty(size, dtype=torch.uint8, device=layers[0].weight.device)


@pytest.mark.parametrize("enough_at", ["device_map", "cpu"])
def test_memory_that_runs_out_in_the_middle_is_met_once(stage, gpu, monkeypatch, enough_at):
    from tests.unruly.engine import Unruly

    generate, tried = Unruly.generate, []

    def hungry(self, request, options, run):
        [held] = stage.host.residency.inventory()
        tried.append(held.words)
        strategy = stage.host.residency._residents.copy().popitem()[1].placement.strategy
        if strategy != enough_at:
            _run_out(self.layers, gpu.total)
        return generate(self, request, options, run)

    monkeypatch.setattr(Unruly, "generate", hungry)
    last = stage.run()[-1]
    assert len(tried) == 2 and clean(stage)
    if enough_at == "device_map":
        assert isinstance(last, Finished) and last.placement["strategy"] == "device_map"
    else:
        assert isinstance(last, Failed) and "ran out of memory" in last.reason
    stage.host.unload()
    assert gpu.used == 0 and clean(stage)


def test_an_engine_that_runs_out_of_memory_as_it_comes_back_takes_the_next_step(stage, gpu, monkeypatch):
    stage.run()
    stage.host.unload(park=True)
    memory = stage.host.memory
    monkeypatch.setattr(memory, "limits", _as_if_free(memory, gpu))
    from core.worker.arrange import Arrangement

    unpark = Arrangement.unpark

    def taken_meanwhile(self):
        gpu.elsewhere = gpu.total
        unpark(self)

    monkeypatch.setattr(Arrangement, "unpark", taken_meanwhile)
    last = stage.run()[-1]
    assert isinstance(last, Finished) and last.placement["strategy"] == "device_map"
    assert clean(stage)


def test_a_budget_is_the_card_and_can_be_changed_while_engines_are_loaded(gpu, settings, tmp_path):
    stage = staged(settings, tmp_path, memory_budget=300 * MIB)
    speak(stage, "mms")
    speak(stage, "vits")
    assert set(states(stage).values()) == {"loaded"} and gpu.share == pytest.approx(300 / 400)
    assert stage.host.pulse().device_total == 300 * MIB
    one = max(h.device_bytes for h in stage.host.residency.inventory())
    stage.host.set_budget(one)
    assert states(stage) == {"vits": "loaded", "mms": "parked"} and gpu.used <= one + WINDOW
    assert gpu.share == pytest.approx(one / gpu.total)
    stage.host.set_budget(100)
    assert set(states(stage).values()) == {"parked"} and gpu.used <= WINDOW
    stage.host.set_budget(None)
    assert gpu.share == 1.0 and stage.host.pulse().device_total == gpu.total
    speak(stage, "mms")
    assert states(stage) == {"mms": "loaded", "vits": "parked"}


def test_host_memory_has_a_budget_of_its_own(gpu, settings, tmp_path):
    stage = staged(settings, tmp_path, ram_budget=1)
    speak(stage, "mms")
    stage.host.unload(park=True)
    assert states(stage) == {} and stage.host.pulse().ram_budget == 1


def test_idle_engines_are_parked_and_then_let_go(gpu, settings, tmp_path):
    stage = staged(settings, tmp_path, idle_timeout=100, park_timeout=1000)
    now = [0.0]
    stage.host.residency._clock = lambda: now[0]
    stage.run()
    for seconds, state in ((99, "loaded"), (100, "parked"), (1099, "parked"), (1100, None)):
        now[0] = seconds
        stage.host.tick()
        assert states(stage).get("unruly") == state
    assert gpu.used == 0 and clean(stage)


def test_an_engine_stays_in_its_placement_until_a_better_one_has_room(stage, gpu, monkeypatch):
    from tests.unruly.engine import Unruly

    load, loads = Unruly.load, []

    def counted(self, weights, placement):
        loads.append(placement)
        load(self, weights, placement)

    monkeypatch.setattr(Unruly, "load", counted)
    stage.run(forced="device_map")
    gpu.elsewhere = gpu.total - 1000  # a part of the weights has no room now
    stage.run(forced="device_map")
    whole, part = (placement.device_share for placement in loads)
    assert 0 < part < whole
    gpu.elsewhere -= 50
    stage.run(forced="device_map")
    assert len(loads) == 2, "a little more room is no reason"
    gpu.elsewhere = 0
    stage.run()
    assert loads[-1].strategy == "resident"
    stage.run()
    assert [placement.strategy for placement in loads].count("resident") == 1 and clean(stage)


def test_on_a_cpu_a_budget_makes_parking_a_matter_of_books(settings, tmp_path):
    for budget, expected in ((None, {}), (300 * MIB, {"unruly": "parked"})):
        stage = Stage(settings.model_copy(update={"memory_budget": budget}), tmp_path / "job")
        first = stage.run()[-1].media[0]["sha256"]
        stage.host.unload(park=True)
        assert states(stage) == expected
        assert stage.run()[-1].media[0]["sha256"] == first


def test_two_checkpoints_of_one_engine_share_the_room_like_any_others(stage, gpu, tmp_path):
    from tests.unruly.miniature import build

    folder = tmp_path / "other"
    folder.mkdir()
    build(folder, Checkpoint())
    stage.run()
    stage.run(weights=str(folder))
    first, second = stage.host.residency.inventory()
    assert first.weights == "other" != second.weights
