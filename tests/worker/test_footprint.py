"""Sizes of components: counted without weights, and the same as those of the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from core.catalog import Catalog
from core.worker.footprint import (
    FILE,
    Component,
    Footprint,
    as_json,
    blocks_of,
    counted,
    folder_of,
    holders_of,
    linear_layers,
    measure,
    shipped,
)
from tests.support import load, miniature

CATALOG = Catalog()
CARDS = {card.id: card for card in CATALOG.cards() if card.has_weights}
WEIGHT_FILES = (".pth", ".bin")  # a .safetensors file says its shapes in its header, which may be read


def bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*module.parameters(), *module.buffers()})


@pytest.mark.parametrize("engine", CARDS)
def test_what_is_shipped_is_what_the_configs_say(engine):
    package = CATALOG.package(engine)
    found = (folder_of(package) / FILE).read_text("utf-8")
    assert found == as_json(counted(CARDS[engine], package)), "run python -m core.worker.footprint"


@pytest.mark.parametrize("engine", CARDS)
def test_what_is_shipped_has_the_parameters_that_the_card_states(engine):
    card = CARDS[engine]
    folder = folder_of(CATALOG.package(engine))
    known = shipped(folder)
    assert known
    kind = __import__(f"core.engines.{engine}.engine", fromlist=["ENGINE"]).ENGINE
    for checkpoint in card.checkpoints:
        if checkpoint.repository in known:
            modules = kind.skeleton(folder / "configs" / checkpoint.folder).values()
            count = sum(p.numel() for module in modules for p in module.parameters())
            stated = checkpoint.parameters + sum(c.parameters for c in checkpoint.also if not c.optional)
            assert count == pytest.approx(stated, rel=0.003)
            assert known[checkpoint.repository].floats >= count


@pytest.mark.parametrize(
    ("engine", "checkpoint"),
    [(card.id, n) for card in CARDS.values() for n in range(min(2, len(card.checkpoints)))],
)
def test_a_footprint_from_configs_alone_is_that_of_the_weights(engine, checkpoint, tmp_path, monkeypatch):
    weights = miniature(engine, checkpoint)
    configs = Path(
        shutil.copytree(
            weights,
            tmp_path / "configs",
            ignore=shutil.ignore_patterns("*.pth", "*.bin", "model.safetensors"),
        )
    )
    assert not [file for file in configs.rglob("*") if file.suffix in WEIGHT_FILES]
    loaded = load(engine, weights)
    real = dict(loaded.components())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)
        bare = type(loaded).skeleton(configs)
    assert all(p.is_meta for module in bare.values() for p in module.parameters())
    whole = CARDS[engine].whole
    planned = measure(bare, whole)
    assert planned == measure(real, whole)
    assert {c.name: c.bytes("float32") for c in planned.components} == {
        name: bytes_of(module) for name, module in real.items()
    }
    loaded.close()


@pytest.mark.parametrize("engine", CARDS)
def test_components_share_nothing_and_hold_every_parameter(engine):
    loaded = load(engine, miniature(engine))
    parts = [{id(p) for p in module.parameters()} for module in loaded.components().values()]
    assert sum(map(len, parts)) == len(set().union(*parts))
    models = [m for value in vars(loaded).values() for m in _modules_in(value)]
    everything = {id(p) for model in models for p in model.parameters()}
    assert everything <= set().union(*parts)
    loaded.close()


def _modules_in(value: object) -> list[torch.nn.Module]:
    return [value] if isinstance(value, torch.nn.Module) else []


def test_footprints_can_be_kept_as_text(tmp_path):
    part = Component("codec", floats=7, fixed=3, linear=4, rows=2, block=5, leaf=2, largest=1, whole=True)
    (tmp_path / FILE).write_text(as_json({"a/b": Footprint((part,))}))
    assert shipped(tmp_path) == {"a/b": Footprint((part,))}
    assert json.loads((tmp_path / FILE).read_text())["a/b"][0]["floats"] == 7


class Layer(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(width, width, bias=False)
        self.out = torch.nn.Linear(width, 2 * width, bias=False)


class Speaker(torch.nn.Module):
    """An embedding of 48 floats and a head tied to it, two layers of 48, 2 loose ones, a table, a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 4)
        self.layers = torch.nn.ModuleList([Layer(4), Layer(4)])
        self.head = torch.nn.Linear(4, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.loose = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.zeros(6))
        self.register_buffer("flags", torch.zeros(1, dtype=torch.int64))


def test_tied_weights_count_once_and_stay_as_they_are_in_int8():
    [part] = measure({"speaker": Speaker()}).components
    assert part.floats == 48 + 2 * 48 + 2 + 6
    assert (part.fixed, part.linear, part.rows) == (8, 96, 24)
    assert part.bytes("float16") == 2 * 152 + 8
    assert part.bytes("float16", "int8") == 2 * (152 - 96 + 24) + 96 + 24 + 8
    assert len(list(linear_layers(Speaker()))) == 4


def test_what_is_streamed_is_a_piece_and_the_next_beside_what_stays():
    [part] = measure({"speaker": Speaker()}, {"speaker.embedding"}).components
    assert part.stays == 48 + 6 and part.staying("float32") == 4 * 54 + 8
    assert part.moving("float32") == 4 * (96 + 2)
    assert part.block == 2 * 48 + 2  # both layers, and the loose parameter
    assert part.leaf == 2 * 32 and part.largest == 48
    [whole] = measure({"speaker": Speaker()}, {"speaker"}).components
    assert whole.moving("float32") == whole.streamed("float32", by_leaf=True) == 0
    assert whole.staying("float32") == whole.bytes("float32")


def test_blocks_are_the_members_of_the_outermost_lists():
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.speaker = Speaker()
            self.pair = torch.nn.Identity()

    outer = Outer()
    assert blocks_of(outer) == list(outer.speaker.layers)
    assert holders_of(outer) == ["speaker"] and holders_of(outer.speaker) == []


def test_a_parametrized_layer_is_one_layer():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(3, 5, 2))
    holder = torch.nn.Module()
    holder.layers = torch.nn.ModuleList([layer])
    assert blocks_of(holder) == [layer]
    [part] = measure({"holder": holder}).components
    assert part.leaf == part.floats == 30 + 5 + 5
