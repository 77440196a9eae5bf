"""Placements carried out on small models: what moves, what stays, and that nothing is left behind."""

from __future__ import annotations

import gc
import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn

from core.engines.base import Placement
from core.errors import DiskFull
from core.worker import arrange
from core.worker.arrange import Arrangement, Shelf
from core.worker.footprint import measure
from tests import pretend

WAYS = ("resident", "model_offload", "group_block", "group_leaf", "device_map")


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * torch.tanh(self.mix(self.norm(x)))


class Tied(nn.Module):
    """Tied weights, an LSTM, loose parameters and buffers, and a layer whose place the model asks for."""

    def __init__(self, width: int = 16, words: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.place = nn.Embedding(8, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(4))
        self.memory = nn.LSTM(width, width, batch_first=True)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(width, width, 3, padding=1))
        self.loose = nn.Parameter(torch.rand(width))
        self.register_buffer("table", torch.rand(8, width), persistent=False)
        self.register_buffer("flags", torch.ones(8, dtype=torch.bool))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(self.place.weight.device)  # as Bark does it
        x = self.embedding(tokens) + self.place(torch.arange(8, device=tokens.device))
        x = x + self.loose + self.table * self.flags[:, None]
        for layer in self.layers:
            x = layer(x)
        x, _ = self.memory(x)
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Codec(nn.Module):
    """Used by a method that is not `forward`."""

    def __init__(self, words: int = 40) -> None:
        super().__init__()
        self.out = nn.Linear(words, 4)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)


WHOLE = frozenset({"codec", "tied.place"})
TOKENS = torch.arange(8)[None] * 3


def build() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"tied": Tied().eval(), "codec": Codec().eval()}


@torch.inference_mode()
def work(parts: dict[str, nn.Module], arrangement: Arrangement | None = None, device: str = "cpu"):
    def using(name: str):
        return arrangement.using(name) if arrangement else torch.inference_mode()

    with using("tied"):
        x = parts["tied"](TOKENS.to(device))
    with using("codec"):
        return parts["codec"].decode(x.to(device)).cpu()


def placement(strategy: str, device: str = "cpu", share: float = 0.4) -> Placement:
    moving = sum(c.moving("float32") for c in measure(build(), WHOLE).components)
    ram = moving // 4 if device != "cpu" else 0
    return Placement(device, "float32", strategy, device_share=int(share * moving), ram_share=ram)


def loaded(at: Placement) -> dict[str, nn.Module]:
    return {name: part.to(at.load_device) for name, part in build().items()}


@pytest.fixture
def gpu():
    with pretend.card(2**26) as card:
        yield card


def tensors(parts: dict[str, nn.Module]) -> list[torch.Tensor]:
    return [t for part in parts.values() for t in (*part.parameters(), *part.buffers())]


@pytest.mark.parametrize("strategy", WAYS)
def test_the_result_is_that_of_the_model_alone(strategy, tmp_path):
    at = placement(strategy)
    parts = loaded(at)
    arrangement = Arrangement(parts, at, WHOLE, tmp_path)
    for _ in range(3):
        assert torch.equal(work(parts, arrangement), work(build()))
        arrangement.rest()


@pretend.needed
@pytest.mark.parametrize("strategy", WAYS)
def test_on_a_card_it_is_too_and_parked_it_is_all_in_host_memory(strategy, gpu, tmp_path):
    at = placement(strategy, "cuda")
    parts = loaded(at)
    arrangement = Arrangement(parts, at, WHOLE, tmp_path)
    assert torch.equal(work(parts, arrangement, "cuda"), work(build()))
    if arrangement.can_park:
        for _ in range(2):
            arrangement.park()
            gc.collect()
            assert gpu.used == 0 and all(t.device.type == "cpu" for t in tensors(parts))
            arrangement.unpark()
            assert torch.equal(work(parts, arrangement, "cuda"), work(build()))
    else:
        assert strategy == "device_map"
    arrangement.undo()
    del parts
    gc.collect()
    assert gpu.used == 0


@pretend.needed
def test_a_streamed_model_holds_only_what_stays_between_jobs(gpu, tmp_path):
    [tied, codec] = measure(build(), WHOLE).components
    for strategy in ("group_block", "group_leaf"):
        at = placement(strategy, "cuda")
        parts = loaded(at)
        arrangement = Arrangement(parts, at, WHOLE, tmp_path)
        work(parts, arrangement, "cuda")
        gc.collect()
        kept = parts["tied"].place.weight.nbytes + codec.bytes("float32")
        assert gpu.used == kept <= tied.staying("float32") + codec.staying("float32")
        arrangement.undo()
        parts.clear()


@pretend.needed
def test_what_was_stopped_in_a_layer_leaves_nothing_there(gpu, tmp_path):
    for strategy in ("group_block", "group_leaf", "model_offload"):
        at = placement(strategy, "cuda")
        parts = loaded(at)
        arrangement = Arrangement(parts, at, WHOLE, tmp_path)
        gc.collect()
        before = gpu.used

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        hook = parts["tied"].layers[2].mix.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            work(parts, arrangement, "cuda")
        hook.remove()
        gc.collect()
        assert gpu.used > before
        arrangement.rest()
        gc.collect()
        assert gpu.used == before
        assert torch.equal(work(parts, arrangement, "cuda"), work(build()))
        arrangement.undo()
        parts.clear()


@pretend.needed
def test_components_take_turns_on_the_card(gpu, tmp_path):
    at = placement("model_offload", "cuda")
    parts = loaded(at)
    arrangement = Arrangement(parts, at, WHOLE, tmp_path)
    sizes = {c.name: c.bytes("float32") for c in measure(parts).components}
    for name in ("tied", "codec", "tied"):
        with arrangement.using(name):
            assert gpu.used == sizes[name]
        assert gpu.used == sizes[name], "it stays until another is needed"
    with arrangement.using("tied", "codec"):
        assert gpu.used == sum(sizes.values())
    arrangement.rest()
    assert gpu.used == 0


def hooks_of(part: nn.Module) -> list[str]:
    """Whatever a library hung on a module and its layers."""
    strange = {"_hf_hook", "_old_forward", "_diffusers_hook"}
    found = [f"{path}.{name}" for path, m in part.named_modules() for name in strange & vars(m).keys()]
    for path, m in part.named_modules():
        # A library puts the method back, where it need only have taken its own away.
        if (
            getattr(m.forward, "__func__", None) is not type(m).forward
            or m._forward_hooks
            or m._forward_pre_hooks
        ):
            found.append(path)
    return found


@pytest.mark.parametrize("strategy", WAYS)
def test_undone_it_leaves_no_hook_and_no_file(strategy, tmp_path):
    at = placement(strategy, share=0)
    parts = loaded(at)
    before = {name: hooks_of(part) for name, part in parts.items()}
    arrangement = Arrangement(parts, at, WHOLE, tmp_path)
    work(parts, arrangement)
    if strategy in ("group_block", "group_leaf", "device_map"):
        assert hooks_of(parts["tied"]) != before["tied"]
    assert bool(list(tmp_path.rglob("*"))) == (strategy == "device_map")
    arrangement.undo()
    assert {name: hooks_of(part) for name, part in parts.items()} == before
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(arrange.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 100, 100))
    at = placement("device_map", share=0)
    parts = loaded(at)
    with pytest.raises(
        DiskFull, match=r"MiB of weights have to wait on disk, and 0 MiB are free in .*; make"
    ):
        Arrangement(parts, at, WHOLE, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert shutil.disk_usage(tmp_path).free > 0
    Arrangement(loaded(at), at, WHOLE, tmp_path).undo()


def test_a_shelf_gives_back_the_very_numbers_and_ties():
    tied = build()["tied"]
    numbers = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    shelf = Shelf(tied, "cpu")
    shelf.take()
    assert shelf.on_device
    shelf.put_back()
    shelf.fill()
    shelf.take()
    shelf.empty()
    assert tied.head.weight is tied.embedding.weight
    assert all(torch.equal(numbers[name], tensor) for name, tensor in tied.state_dict().items())


def test_int8_leaves_tied_weights_alone(tmp_path):
    parts = build()
    Arrangement(parts, Placement("cpu", quantisation="int8"), WHOLE, tmp_path)
    assert type(parts["tied"].head.weight.data) is torch.Tensor
    assert type(parts["tied"].layers[0].mix.weight.data) is not torch.Tensor
    assert torch.allclose(work(parts), work(build()), atol=0.1)
    assert not torch.equal(work(parts), work(build()))
