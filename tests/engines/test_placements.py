"""Every engine, in every way of running it that its card names, speaks as with all of it in one place."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

from core.catalog import Catalog
from core.engines.base import Cancelled, Engine, Placement
from core.events import Finished
from core.requests import Order, SpeechRequest
from core.settings import Settings
from core.worker.arrange import Arrangement
from core.worker.footprint import Footprint, measure
from core.worker.host import Host
from core.worker.messages import JobEvent, RunJob
from core.worker.placement import Demand, Room, Rung, ladder
from tests import pretend
from tests.support import RecordingRun, load, miniature, reference, seed_everything

CARDS = {card.id: card for card in Catalog().cards() if card.has_weights}
TEXT = "Good morning. We speak."
SHARES = (0.0, 0.5)  # of what a device map may spread, on the device
WAYS = [
    (card.id, strategy, share)
    for card in CARDS.values()
    for strategy in card.strategies
    for share in (SHARES if strategy == "device_map" else (0.0,))
    if strategy != "cpu"  # resident, on another device
]


@cache
def weights(engine: str) -> Path:
    """The miniature; Bark's with sentences of a tenth of a second, for it is slow on the pretend card."""
    folder = miniature(engine)
    config = json.loads((folder / "generation_config.json").read_text()) if engine == "bark" else {}
    if not config:
        return folder
    short = folder.with_name(f"{folder.name}-short")
    if not short.exists():
        partial = Path(
            shutil.copytree(folder, folder.with_name(f"{folder.name}-partial"), dirs_exist_ok=True)
        )
        config["semantic_config"]["max_new_tokens"] = 5
        (partial / "generation_config.json").write_text(json.dumps(config))
        partial.rename(short)
    return short


@cache
def footprint(engine: str) -> Footprint:
    kind = __import__(f"core.engines.{engine}.engine", fromlist=["ENGINE"]).ENGINE
    return measure(kind.skeleton(weights(engine)), CARDS[engine].whole)


def speak(engine: str, loaded: Engine, stop_after: int | None = None) -> np.ndarray:
    card = CARDS[engine]
    few = {"steps": 4} if "steps" in card.options.model_fields else {}
    seed_everything(5)
    request = SpeechRequest(text=TEXT, **reference(card))
    return loaded.generate(request, card.options(**few), RecordingRun(5, stop_after)).samples


def own_memory(loaded: Engine) -> None:
    """Copy weights that are pages of a file: how they lie in memory decides the last bits of a product."""
    for module in loaded.components().values():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()


@contextmanager
def arranged(engine: str, placement: Placement, scratch: Path) -> Iterator[tuple[Engine, Arrangement]]:
    loaded = load(engine, weights(engine), **asdict(placement))
    if placement.load_device == "cpu":
        own_memory(loaded)
    arrangement = Arrangement(loaded.components(), placement, CARDS[engine].whole, scratch)
    loaded.using = arrangement.using
    try:
        yield loaded, arrangement
    finally:
        arrangement.undo()
        loaded.close()
        vars(loaded).clear()


@cache
def expected(engine: str) -> np.ndarray:
    """What it says with all its weights in host memory."""
    loaded = load(engine, weights(engine))
    own_memory(loaded)
    spoken = speak(engine, loaded)
    loaded.close()
    return spoken


def moving(engine: str) -> int:
    return sum(c.moving("float32") for c in footprint(engine).components)


@pytest.mark.parametrize(("engine", "strategy", "share"), WAYS)
def test_it_speaks_the_same_on_a_cpu(engine, strategy, share, tmp_path):
    placement = Placement("cpu", "float32", strategy, device_share=int(share * moving(engine)))
    with arranged(engine, placement, tmp_path) as (loaded, arrangement):
        np.testing.assert_array_equal(speak(engine, loaded), expected(engine))
        with pytest.raises(Cancelled):
            speak(engine, loaded, stop_after=1)
        arrangement.rest()
        if arrangement.can_park:
            arrangement.park()
            arrangement.unpark()
        np.testing.assert_array_equal(speak(engine, loaded), expected(engine))
    assert not list(tmp_path.rglob("*"))


@pytest.fixture
def gpu() -> Iterator[pretend.Gpu]:
    with pretend.card(2**30) as card:
        yield card


_working: dict[str, int] = {}


def working(engine: str, gpu: pretend.Gpu) -> int:
    """Bytes beside the weights that its job takes on a card, measured where all weights are there, too."""
    if engine in _working:
        return _working[engine]
    with arranged(engine, Placement("cuda"), Path()) as (loaded, _):
        gpu.reset_peak()
        held = gpu.used
        speak(engine, loaded)
        assert held == footprint(engine).bytes("float32"), "a footprint is what is there, to the byte"
        _working[engine] = gpu.peak - held
    return _working[engine]


def rung_of(engine: str, gpu: pretend.Gpu, strategy: str, share: float) -> Rung:
    """As planned for a card that has just the room for it."""
    card = CARDS[engine].model_copy(update={"gpu_dtype": "float32"})
    demand = Demand(card, footprint(engine), working(engine, gpu))
    ram = moving(engine) // 4 if strategy == "device_map" else 2**30
    none = next(r for r in ladder(demand, Room("cuda", 0, ram)) if r.placement.strategy == strategy)
    size = none.device_bytes + int(share * moving(engine))
    return next(r for r in ladder(demand, Room("cuda", size, ram)) if r.placement.strategy == strategy)


@pretend.needed
@pytest.mark.parametrize(("engine", "strategy", "share"), WAYS)
def test_on_a_card_it_speaks_the_same_within_the_bytes_that_were_planned(
    engine, strategy, share, gpu, tmp_path
):
    spoken = expected(engine)
    rung = rung_of(engine, gpu, strategy, share)
    gc.collect()
    assert gpu.used == 0
    gpu.reset_peak()
    with arranged(engine, rung.placement, tmp_path) as (loaded, arrangement):
        np.testing.assert_array_equal(speak(engine, loaded), spoken)
        with pytest.raises(Cancelled):
            speak(engine, loaded, stop_after=1)
        arrangement.rest()
        gc.collect()
        assert gpu.used <= rung.device_bytes - working(engine, gpu)
        if arrangement.can_park:
            arrangement.park()
            gc.collect()
            assert gpu.used == 0
            arrangement.unpark()
        np.testing.assert_array_equal(speak(engine, loaded), spoken)
        assert gpu.peak <= rung.device_bytes
    gc.collect()
    assert gpu.used == 0
    assert not list(tmp_path.rglob("*"))


@pretend.needed
@pytest.mark.parametrize("engine", [card.id for card in CARDS.values() if "int8" in card.quantisations])
def test_int8_makes_its_weights_as_small_as_planned_and_it_still_speaks(engine, gpu, tmp_path):
    size = footprint(engine)
    with arranged(engine, Placement("cpu", quantisation="int8"), tmp_path) as (loaded, _):
        spoken = speak(engine, loaded)
    assert np.isfinite(spoken).all() and spoken.std() > 0.001
    with arranged(engine, Placement("cuda", quantisation="int8"), tmp_path) as (loaded, arrangement):
        assert gpu.used == size.bytes("float32", "int8") < size.bytes("float32")
        np.testing.assert_array_equal(speak(engine, loaded), spoken)
        arrangement.park()
        gc.collect()
        assert gpu.used == 0
        arrangement.unpark()
        np.testing.assert_array_equal(speak(engine, loaded), spoken)
    gc.collect()
    assert gpu.used == 0


@pytest.mark.parametrize(
    ("engine", "strategy"), [("bark", "model_offload"), ("bark", "device_map"), ("vits", "group_leaf")]
)
def test_a_job_may_name_the_way_it_is_run(engine, strategy, tmp_path):
    home = Settings(home=tmp_path / "home", cache=tmp_path / "cache", device="cpu", threads=1)
    told: list[object] = []
    host = Host(home, told.append)
    heard = []
    for number, forced in enumerate((None, strategy)):
        folder = tmp_path / str(number)
        folder.mkdir()
        order = Order(
            engine=engine, request=SpeechRequest(text=TEXT), seed=3, weights="miniature", forced=forced
        )
        host.run(RunJob("job", order, folder, online=False))
        last = [m.event for m in told if isinstance(m, JobEvent)][-1]
        assert isinstance(last, Finished), last
        assert last.placement["strategy"] == (strategy if forced else "resident")
        heard.append(soundfile.read(folder / "audio.wav")[0])
    np.testing.assert_array_equal(*heard)
    host.unload()
