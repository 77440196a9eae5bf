"""On a GPU: the parts of full-size video models with random weights, on budgets far below their size.

Needs CUDA, and for Wan 14B some 80 GB of host memory; elsewhere nothing is measured. Time is compared with
the fastest placement that the whole card allows. tests/worker/test_video_parts.py runs it in small.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from core.catalog import Catalog
from core.errors import DoesNotFit
from core.worker.arrange import Arrangement
from core.worker.devices import Device
from core.worker.footprint import measure as count
from core.worker.placement import Demand, Room, Rung, plan
from tests.benchmarks.rows import Row

BUDGETS = (8, 12, 24)  # GiB
WORKING = 3 * 2**30  # bytes beside the weights for these sizes; the peak shows whether that is enough
STEPS = 2
Modules = Mapping[str, torch.nn.Module]


@dataclass(frozen=True)
class Model:
    """Components on the meta device, and one step of each.

    Attributes:
        tokens: length of the prompt.
        latents: their shape, as the transformer takes them.
    """

    name: str
    build: Callable[[], Modules]
    tokens: int
    latents: tuple[int, ...]


def cogvideox() -> Modules:
    """CogVideoX-5b."""
    from diffusers import CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    encoder = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    # Without its rotary table, which is an input, and changes neither memory nor the layers' work.
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
    )
    return {"text_encoder": T5EncoderModel(encoder), "transformer": transformer}


def wan() -> Modules:
    """Wan 2.1 T2V 14B."""
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = UMT5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=256384,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformer = WanTransformer3DModel(num_attention_heads=40, num_layers=40, ffn_dim=13824)
    return {"text_encoder": UMT5EncoderModel(encoder), "transformer": transformer}


MODELS = (
    Model("CogVideoX-5b", cogvideox, 226, (1, 13, 16, 60, 90)),  # 49 frames of 720 x 480
    Model("Wan 2.1 14B", wan, 512, (1, 16, 13, 60, 104)),  # 49 frames of 832 x 480
)


def measure() -> list[Row]:
    if not torch.cuda.is_available():
        print("gpu: no CUDA device here; nothing measured", file=sys.stderr)
        return []
    device = Device("cuda", 1)
    return [row for model in MODELS for row in rows(model, device, BUDGETS, WORKING)]


def rows(model: Model, device: Device, budgets: tuple[float, ...], working: int) -> list[Row]:
    """One row a budget in GiB: the placement, the device's peak, and time over resident where that fits."""
    resident = _try(model, device, None, working)
    found = []
    for gib in budgets:
        budget = int(gib * 2**30)
        try:
            rung, peak, seconds = _try(model, device, budget, working)
        except (DoesNotFit, torch.OutOfMemoryError) as error:
            found.append(Row(f"{model.name} in {gib} GiB", "does not run", "runs", False, str(error)[:200]))
            continue
        times = f"{seconds / resident[2]:.2f} x the time of {resident[0].placement.strategy}"
        found.append(
            Row(
                f"{model.name} in {gib} GiB, peak",
                f"{peak / 2**30:.2f} GiB",
                "within the budget",
                peak <= budget,
                f"{rung.placement.strategy}, {times}; {device.title}",
            )
        )
    return found


def _try(model: Model, device: Device, budget: int | None, working: int) -> tuple[Rung, int, float]:
    """The placement, the device's peak in bytes, and the seconds of a few steps after a first one."""
    card = Catalog().card("bark").model_copy(
        update={
            "name": model.name, "gpu_dtype": "bfloat16", "quantisations": (), "whole": frozenset(),
            "strategies": ("resident", "model_offload", "group_block", "group_leaf"),
        }
    )  # fmt: skip
    with torch.device("meta"):
        modules = dict(model.build())
    free = device.free()
    room = Room(device.name, min(free, budget or free), 10**12)
    rung = plan(Demand(card, count(modules), working), room)
    for module in modules.values():
        module.to(torch.bfloat16).to_empty(device=rung.placement.load_device)
        if tie := getattr(module, "tie_weights", None):
            tie()
        for tensor in module.parameters():
            tensor.data.normal_(std=0.02)
        module.eval()
    device.limit(budget)
    with tempfile.TemporaryDirectory() as scratch:
        arrangement = Arrangement(modules, rung.placement, frozenset(), Path(scratch))
        try:
            device.reset_peak()
            _steps(model, modules, arrangement, device, 1)  # streams learn the order of the layers in it
            started = time.perf_counter()
            _steps(model, modules, arrangement, device, STEPS)
            device.wait()
            return rung, device.peak() or 0, time.perf_counter() - started
        finally:
            arrangement.undo()
            device.limit(None)
            modules.clear()
            del module
            gc.collect()
            device.settle()


@torch.no_grad()
def _steps(model: Model, modules: Modules, arrangement: Arrangement, device: Device, steps: int) -> None:
    with arrangement.using("text_encoder"):
        tokens = torch.arange(model.tokens)[None].to(device.name)
        states = modules["text_encoder"](tokens).last_hidden_state
    latents = torch.randn(model.latents, dtype=states.dtype, device=device.name)
    step = torch.tensor([500]).to(device.name)
    with arrangement.using("transformer"):
        for _ in range(steps):
            modules["transformer"](hidden_states=latents, encoder_hidden_states=states, timestep=step)
