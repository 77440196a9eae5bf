"""The parts of a video model: their published sizes, how small cards run them, and that it changes nothing.

No engine of this project has them yet. They are here since they are what placement is for: a text encoder
and a transformer, each larger than many a card, whose layers are nested in two ways.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, WanTransformer3DModel
from transformers import T5Config, T5EncoderModel

from core.catalog import Catalog
from core.engines.base import Placement
from core.worker.arrange import Arrangement
from core.worker.devices import Device
from core.worker.footprint import Footprint, measure
from core.worker.placement import Demand, Room, plan
from tests.benchmarks import gpu
from tests.pretend import card as pretend_card
from tests.pretend import needed

GIB = 2**30
ALL = ("resident", "model_offload", "group_block", "group_leaf", "device_map", "cpu")
CARD = (
    Catalog()
    .card("bark")
    .model_copy(
        update={"gpu_dtype": "bfloat16", "strategies": ALL, "quantisations": (), "whole": frozenset({"vae"})}
    )
)


@pytest.fixture(scope="module")
def cogvideox() -> Footprint:
    """CogVideoX-5b, with the sizes of its published configs."""
    with init_empty_weights():
        encoder = T5Config(
            d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )
        parts = {
            "text_encoder": T5EncoderModel(encoder),
            "transformer": CogVideoXTransformer3DModel(
                num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
            ),
            "vae": AutoencoderKLCogVideoX(),
        }
    return measure(parts, CARD.whole)


def test_published_models_are_as_large_as_is_known_of_them(cogvideox):
    sizes = {part.name: part.bytes("bfloat16") / GIB for part in cogvideox.components}
    assert sizes["text_encoder"] == pytest.approx(9.1, abs=0.05)
    assert sizes["transformer"] == pytest.approx(10.4, abs=0.05)
    with init_empty_weights():
        wan = WanTransformer3DModel(num_attention_heads=40, num_layers=40, ffn_dim=13824)
    assert measure({"transformer": wan}).bytes("bfloat16") / GIB == pytest.approx(26.6, abs=0.05)


@pytest.mark.parametrize(
    ("gib", "strategy"),
    [
        (24, "resident"),
        (16, "model_offload"),
        (12, "group_block"),
        (8, "group_block"),
        (3, "group_leaf"),
        (2, "cpu"),
    ],
)
def test_the_same_model_runs_on_cards_of_every_size(cogvideox, gib, strategy):
    rung = plan(Demand(CARD, cogvideox, 2 * GIB), Room("cuda", gib * GIB, 64 * GIB, 500 * GIB))
    assert rung.placement.strategy == strategy and rung.device_bytes <= gib * GIB


class Parts:
    """A small text encoder and transformer, and what they make of one prompt."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=3,
            num_heads=4,
            vocab_size=100,
            feed_forward_proj="gated-gelu",
        )
        self.encoder = T5EncoderModel(config).eval()
        self.transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=32, num_layers=4, sample_width=8, sample_height=8, sample_frames=9,
            max_text_seq_length=16,
        ).eval()  # fmt: skip

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"text_encoder": self.encoder, "transformer": self.transformer}

    @torch.no_grad()
    def run(self, arrangement: Arrangement, device: str) -> torch.Tensor:
        tokens = torch.arange(16)[None].to(device)
        latents = torch.linspace(-1, 1, 3 * 4 * 64).reshape(1, 3, 4, 8, 8).to(device)
        with arrangement.using("text_encoder"):
            words = self.encoder(tokens).last_hidden_state
        with arrangement.using("transformer"):
            for step in (7, 3):
                noise = self.transformer(latents, words, torch.tensor([step]).to(device), return_dict=False)[
                    0
                ]
                latents = latents - 0.1 * noise
        return latents.cpu()


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


@pytest.fixture(scope="module")
def expected(parts, tmp_path_factory) -> torch.Tensor:
    resident = Arrangement(parts.modules(), Placement(), frozenset(), tmp_path_factory.mktemp("none"))
    return parts.run(resident, "cpu")


def placements(device: str, share: int) -> list[Placement]:
    ways = [Placement(device, "float32", way) for way in ALL[:4]]
    ram = 0 if device == "cpu" else share // 4
    return [*ways, Placement(device, "float32", "device_map", device_share=share, ram_share=ram)]


@needed
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("number", range(5), ids=ALL[:5])
def test_every_placement_makes_the_same_latents(parts, expected, device, number, tmp_path):
    weights = measure(parts.modules())
    where = placements(device, weights.bytes("float32") // 2)[number]
    with pretend_card(2**30) as card:
        mine = copy.deepcopy(parts)
        for module in mine.modules().values():
            module.to(where.load_device)
        arrangement = Arrangement(mine.modules(), where, frozenset(), tmp_path)
        for _ in range(2):
            assert torch.equal(mine.run(arrangement, device), expected)
            arrangement.rest()
            if arrangement.can_park:
                arrangement.park()
                assert card.used == 0
                arrangement.unpark()
        if device == "cuda" and where.strategy != "resident":
            assert card.peak < weights.bytes("float32"), "less than all of it was on the card at once"
        arrangement.undo()
        del mine, module
        gc.collect()
        assert card.used == 0 and not list(tmp_path.iterdir())


@needed
def test_the_measurement_for_a_gpu_runs_in_small_on_the_pretend_one():
    def build() -> dict[str, torch.nn.Module]:
        return Parts().modules()

    weights = measure(build()).bytes("bfloat16")
    budgets = tuple(share * weights / GIB for share in (1.5, 0.9, 0.1))
    with pretend_card(GIB):
        device = Device("cuda", 1)
        small = gpu.Model("Small", build, 16, (1, 3, 4, 8, 8))
        found = gpu.rows(small, device, budgets, working=weights // 3)
    assert [row.holds for row in found] == [True, True, False]
    assert found[0].note.startswith("resident,") and found[1].note.startswith("group_block,")
    assert found[2].measured == "does not run"
