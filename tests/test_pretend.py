"""The pretend card: what it counts, what it refuses, and that models give on it what they give on the CPU."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.catalog import Catalog
from core.engines.base import Placement
from core.engines.quirks import mend_torchaudio
from core.requests import SpeechRequest
from tests.support import RecordingRun, load, miniature, reference, seed_everything

mend_torchaudio()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tests.pretend import Gpu, card, needed  # noqa: E402

pytestmark = needed

MIB = 2**20
ENGINES = [made.id for made in Catalog().cards() if made.has_weights]


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with card(4096 * MIB) as made, torch.no_grad():
        yield made


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def align(module: nn.Module) -> None:
    """Copy weights that are pages of a file: the CPU's last bits depend on how its factors lie in memory."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TOKENS = torch.arange(8)[None]


# What it counts


def test_a_module_moves_as_on_a_card_and_its_bytes_are_counted_until_it_is_dropped(gpu):
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    weight = module[0].weight
    module.to("cuda")
    assert module[0].weight is weight and type(weight) is nn.Parameter
    assert weight.device == torch.device("cuda", 0) and weight.is_cuda
    assert gpu.used == torch.cuda.memory_allocated() == bytes_of(module)
    module.to("cpu")
    assert gpu.used == gpu.storages == 0 and gpu.peak > 0
    module.to("cuda")
    del module, weight
    assert gpu.used == 0


def test_tied_weights_and_views_count_once(gpu):
    module = nn.ModuleDict({"in": nn.Embedding(10, 4), "out": nn.Linear(4, 10, bias=False)})
    module["out"].weight = module["in"].weight
    module.to("cuda")
    assert module["out"].weight is module["in"].weight
    views = [module["in"].weight[2:], module["in"].weight.T, module["in"].weight.view(-1)]
    assert gpu.used == 160 and gpu.storages == 1
    assert {view.untyped_storage()._cdata for view in views} == {module["in"].weight.untyped_storage()._cdata}
    assert views[0].data_ptr() == module["in"].weight.data_ptr() + 2 * 4 * 4
    module = None
    assert gpu.used == 160, "a view keeps the storage"
    views = None
    assert gpu.used == 0


def test_what_an_operation_makes_on_the_way_counts_to_the_peak_only(gpu):
    x = torch.ones(256, device="cuda")
    gpu.reset_peak()
    total = ((x * 2) + 1).sum().item()
    assert (total, gpu.used, gpu.peak) == (768, 1024, 3 * 1024)


def test_views_and_operations_in_place_write_to_the_same_memory(gpu):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    x[1].mul_(10)
    x.T[0].add_(1)
    x[0, 1] = 9
    assert x.tolist() == [[1, 9, 2], [31, 40, 50]]
    assert x.unsqueeze_(0) is x and x.shape == (1, 2, 3)
    made = torch.add(x, x, out=torch.empty(0, device="cuda"))
    assert made.shape == x.shape and made.sum() == 266
    grown = torch.ones(2, device="cuda").resize_(50).fill_(1)
    assert grown.sum() == 50
    del made
    assert gpu.used == x.nbytes + grown.nbytes
    number = torch.view_as_complex(torch.ones(3, 2, device="cuda"))
    assert number.conj().imag.tolist() == [-1, -1, -1]
    assert x.view(torch.int32).dtype == torch.int32


def test_more_than_the_capacity_is_out_of_memory():
    with card(MIB) as gpu:
        held = torch.empty(MIB // 2, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            nn.Linear(400, 400).to("cuda")
        assert gpu.used == held.nbytes
        gpu.elsewhere = MIB // 2
        assert torch.cuda.mem_get_info() == (0, MIB)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(1, device="cuda")
        gpu.elsewhere = 0
        torch.cuda.set_per_process_memory_fraction(0.6)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(MIB // 4, dtype=torch.uint8, device="cuda")
        del held
        assert gpu.used == 0
        assert torch.ones(1, device="cuda").item() == 1


# What it refuses


@pytest.mark.parametrize(
    "mix",
    [
        lambda on, off: on + off,
        lambda on, off: off.add_(on),
        lambda on, off: off.add_(on.sum()),
        lambda on, off: torch.tensor(1.0).add_(on.sum()),
        lambda on, off: torch.cat([on, off]),
        lambda on, off: F.linear(on, off),
        lambda on, off: F.embedding(torch.tensor([1]), on),
        lambda on, off: F.embedding(torch.tensor(1), on),
        lambda on, off: off[torch.tensor([0], device="cuda")],
        lambda on, off: on.index_put_((torch.tensor([0]),), off),
        lambda on, off: F.conv1d(on, off[:, :, None]),
        lambda on, off: F.scaled_dot_product_attention(on[None], on[None], off[None]),
        lambda on, off: torch.where(on > 1, on, off),
        lambda on, off: torch.add(on, on, out=off),
        lambda on, off: nn.LSTM(3, 3)(on),
    ],
)
def test_tensors_on_two_devices_raise(gpu, mix):
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, 3, device="cuda"), torch.ones(3, 3))


def test_what_may_come_from_host_memory_may_come_from_there(gpu):
    on = torch.arange(3.0, device="cuda")
    assert (on + torch.tensor(1.0)).tolist() == [1, 2, 3]
    assert (torch.tensor(1.0) * on).device.type == "cuda"
    assert on[torch.tensor([2, 0])].tolist() == [2, 0]
    assert on[torch.tensor([True, False, True])].tolist() == [0, 2]
    assert torch.where(on > 1, on, torch.tensor(5.0)).tolist() == [5, 5, 2]
    assert torch.zeros(3).copy_(on).tolist() == on.copy_(torch.arange(3)).tolist() == [0, 1, 2]
    packed = nn.utils.rnn.pack_padded_sequence(on.view(3, 1, 1), torch.tensor([3]))
    assert packed.data.is_cuda and not packed.batch_sizes.is_cuda


def test_numpy_wants_a_copy_in_host_memory(gpu):
    x = torch.arange(3.0, device="cuda")
    for convert in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            convert()
    assert x.cpu().numpy().tolist() == x.tolist() == [0, 1, 2] and x[1].item() == 1
    assert "device='cuda:0'" in repr(x)


def test_there_is_no_second_card(gpu):
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="cuda:1")
    with pytest.raises(RuntimeError, match="one pretend card"), card(1):
        pass


# What torch says and takes


def test_torch_says_that_there_is_a_card(gpu):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    x = torch.ones(4, device="cuda")
    assert torch.cuda.mem_get_info() == (gpu.total - x.nbytes, gpu.total)
    assert torch.cuda.get_device_properties(0).total_memory == gpu.total
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated("cuda") == torch.cuda.memory_reserved() == x.nbytes
    with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream()):
        x.record_stream(torch.cuda.current_stream())
    assert isinstance(x.device, torch.device) and isinstance(torch.default_generator, torch.Generator)


def test_a_bare_number_names_the_card(gpu):
    for made in (
        torch.ones(1, device=0),
        torch.ones(1).to(0),
        torch.ones(1).cuda(0),
        torch.tensor([1], device=0),
    ):
        assert made.device == torch.device(0) == torch.device("cuda:0")
    assert nn.Linear(1, 1).to(0).weight.is_cuda


def test_pinned_memory_is_told_apart(gpu):
    x = torch.ones(3)
    assert x.pin_memory().is_pinned() and torch.empty(3, pin_memory=True).is_pinned()
    assert not x.is_pinned() and gpu.used == 0


def test_random_numbers_are_those_of_the_cpu(gpu):
    def draw(device: str) -> list[torch.Tensor]:
        torch.manual_seed(7)
        torch.cuda.manual_seed_all(7)
        seeded = torch.Generator(device).manual_seed(3)
        return [
            torch.randn(3, device=device),
            torch.rand(3, device=device, generator=seeded),
            torch.randperm(5, device=device),
            torch.multinomial(torch.ones(9, device=device), 3),
            F.dropout(torch.ones(9, device=device)),
        ]

    for host, on_card in zip(draw("cpu"), draw("cuda"), strict=True):
        assert on_card.is_cuda and torch.equal(host, on_card.cpu())
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())


def test_it_holds_in_every_thread_and_in_inference_mode(gpu):
    made = []

    def work() -> None:
        with torch.inference_mode():
            x = torch.ones(3, device="cuda")
            x += 1
            made.append(x[1:] * 2)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert made[0].is_cuda and made[0].is_inference() and made[0].tolist() == [4, 4]


def test_files_are_loaded_to_the_card_and_saved_from_it(gpu, tmp_path):
    from safetensors.torch import load_file, save_file

    file, weights = io.BytesIO(), {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    torch.save({name: tensor.cuda() for name, tensor in weights.items()}, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cuda")
    assert gpu.used == 40 and loaded["a"].is_cuda and torch.equal(loaded["a"].cpu(), weights["a"])
    file.seek(0)
    assert not torch.load(file, map_location="cpu")["a"].is_cuda
    save_file(weights, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors", device="cuda")
    assert gpu.used == 40 and torch.equal(loaded["b"].cpu(), weights["b"])
    module = nn.BatchNorm1d(3).to("cuda")
    assert copy.deepcopy(module).running_mean.is_cuda


def test_libraries_that_looked_before_look_again():
    from accelerate import PartialState
    from diffusers.utils.torch_utils import TorchDeviceBackend
    from transformers.utils import is_torch_cuda_available

    def seen() -> tuple[Any, ...]:
        devices = TorchDeviceBackend._detect_device_type(), PartialState().device.type
        return *devices, is_torch_cuda_available()

    assert seen() == ("cpu", "cpu", False)
    with card(MIB):
        assert seen() == ("cuda", "cuda", True)
    assert seen() == ("cpu", "cpu", False)


def test_afterwards_the_process_is_as_before():
    real = torch.device, torch.Generator, torch.empty, torch.Tensor.to, torch.cuda.is_available
    with card(MIB):
        left = torch.ones(3, device="cuda")
    assert real == (torch.device, torch.Generator, torch.empty, torch.Tensor.to, torch.cuda.is_available)
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="not linked with support for cuda"):
        torch.ones(1).to("cuda")
    with pytest.raises(RuntimeError):
        left + 1
    with card(MIB), pytest.raises(RuntimeError, match="another pretend card"):
        left + 1


# Models give what they give on the CPU

LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "lstm": (lambda: nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True), torch.randn(2, 6, 5)),
    "gru": (lambda: nn.GRU(5, 7), torch.randn(6, 2, 5)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3)), torch.randn(2, 3, 20)),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.ConvTranspose1d(3, 4, 4, 2)), torch.randn(2, 3, 20)),
    "convolution in 3D": (lambda: nn.Conv3d(3, 8, 3, padding=1), torch.randn(1, 3, 8, 8, 8)),
    "embedding": (lambda: nn.Embedding(10, 4), torch.arange(6).view(2, 3)),
    "attention": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        torch.randn(2, 5, 8),
    ),
    "dropout": (lambda: nn.Sequential(nn.GroupNorm(1, 3), nn.SiLU(), nn.Dropout(0.5)), torch.randn(2, 3, 4)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_bitwise_what_it_gives_on_the_cpu(gpu, name, evaluating):
    make, x = LAYERS[name]
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        module = make().train(not evaluating).to(device)
        result = module(x.to(device))
        results.append(result[0] if isinstance(result, tuple) else result)
    assert results[1].is_cuda and torch.equal(results[0], results[1].cpu())


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def test_a_language_model_generates_what_it_generates_on_the_cpu(gpu):
    model, prompt, sampled = tiny_gpt2(), torch.tensor([[5, 6, 7]]), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        sampled.append(model.to(device).generate(prompt.to(device), max_new_tokens=20, do_sample=True))
    assert gpu.used == bytes_of(model) + sampled[1].nbytes, "its tied head counts once"
    assert sampled[1].is_cuda and torch.equal(sampled[0], sampled[1].cpu())


@pytest.mark.parametrize("where", ["cuda", "auto", 0, {"transformer": 0, "lm_head": 0}])
def test_a_checkpoint_is_loaded_straight_to_the_card(gpu, where, tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=where)
    assert loaded.device.type == "cuda"
    assert torch.equal(loaded(TOKENS.to("cuda")).logits.cpu(), model(TOKENS).logits)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_speaks_as_on_the_cpu_and_leaves_nothing(gpu, engine):
    made = importlib.import_module(f"core.engines.{engine}.card").CARD
    request = SpeechRequest(text="Good morning. Rivers run.", **reference(made))
    spoken = []
    for device in ("cpu", "cuda"):
        loaded = load(engine, miniature(engine), device=device)
        if device == "cpu":
            for module in loaded.components().values():
                align(module)
        held = gpu.used
        assert (held > 0) == (device == "cuda")
        seed_everything(5)
        spoken.append(loaded.generate(request, made.options(), RecordingRun(5)).samples)
        assert (gpu.peak > held) == (device == "cuda")
        loaded.close()
        loaded = module = None
        gc.collect()
    np.testing.assert_array_equal(*spoken)
    assert gpu.used == 0


# Placement


def test_a_model_split_over_card_and_host_memory_gives_the_same(gpu):
    from accelerate import dispatch_model, infer_auto_device_map

    whole = Transformer()
    wanted, size = whole(TOKENS), bytes_of(whole)
    places = infer_auto_device_map(
        whole, max_memory={0: size // 2, "cpu": size}, no_split_module_classes=["Block"]
    )
    assert set(places.values()) == {0, "cpu"}
    split = dispatch_model(whole, places)
    resident = gpu.used
    assert 0 < resident < size / 2
    assert torch.equal(split(TOKENS).cpu(), wanted)
    assert gpu.used == resident and resident < gpu.peak < 0.7 * size


def test_a_device_map_by_hand_and_to_disk_gives_the_same(gpu, tmp_path):
    from accelerate import dispatch_model

    model = Transformer()
    wanted = model(TOKENS)
    places = {"embed": "cuda:0", "head": "cpu"} | {f"blocks.{n}": "cuda:0" for n in range(3)}
    places |= {f"blocks.{n}": "disk" for n in range(3, 6)}
    split = dispatch_model(model, places, offload_dir=tmp_path)
    assert torch.equal(split(TOKENS).cpu(), wanted) and list(tmp_path.glob("blocks.5*"))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("level", "share"),
    [
        ({"offload_type": "leaf_level"}, 0.1),
        ({"offload_type": "block_level", "num_blocks_per_group": 1}, 0.35),
    ],
)
def test_group_offload_gives_the_same_with_a_part_of_the_weights_on_the_card(gpu, level, share, streams):
    from diffusers.hooks import apply_group_offloading

    model = Transformer()
    wanted, size = model(TOKENS), bytes_of(model)
    onto, back = torch.device("cuda"), torch.device("cpu")
    apply_group_offloading(model, onload_device=onto, offload_device=back, use_stream=streams, **level)
    assert gpu.used == 0
    result = model(TOKENS.to("cuda"))
    assert result.is_cuda and torch.equal(result.cpu(), wanted)
    assert gpu.used == result.nbytes and gpu.peak < share * size


def test_model_offload_brings_a_model_in_and_out(gpu):
    from accelerate import cpu_offload_with_hook

    model = Transformer()
    wanted, size = model(TOKENS), bytes_of(model)
    model, hook = cpu_offload_with_hook(model, "cuda:0")
    assert gpu.used == 0
    result = model(TOKENS.to("cuda"))
    assert gpu.used == size + result.nbytes and torch.equal(result.cpu(), wanted)
    hook.offload()
    assert gpu.used == result.nbytes


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_says_the_same_under_every_placement_on_a_card(gpu, engine, tmp_path):
    from core.worker.arrange import Arrangement

    made = importlib.import_module(f"core.engines.{engine}.card").CARD
    request = SpeechRequest(text="Yes. No.", **reference(made))
    options = made.options(steps=4) if "steps" in made.options.model_fields else made.options()
    wanted, size = None, 0
    for strategy in [name for name in made.strategies if name != "cpu"]:
        placement = Placement("cuda", "float32", strategy, device_share=size // 3, ram_share=size // 3)
        loaded = importlib.import_module(f"core.engines.{engine}.engine").ENGINE()
        loaded.load(miniature(engine), placement)
        size = sum(bytes_of(module) for module in loaded.components().values())
        arrangement = Arrangement(loaded.components(), placement, made.whole, tmp_path)
        loaded.using = arrangement.using
        held = gpu.used
        assert held < size or strategy in ("resident", "device_map")
        seed_everything(5)
        spoken = loaded.generate(request, options, RecordingRun(5)).samples
        wanted = spoken if wanted is None else wanted
        np.testing.assert_array_equal(spoken, wanted, err_msg=strategy)
        arrangement.undo()
        loaded.close()
        vars(loaded).clear()
        del arrangement
        gc.collect()
        assert gpu.used == 0, strategy


def test_the_worker_takes_the_card_and_proves_each_release(tmp_path: Path):
    from core.requests import Order
    from core.settings import Settings
    from core.studio import Studio

    with card(2048 * MIB) as gpu:
        folder = {"home": tmp_path / "home", "cache": tmp_path / "cache"}
        studio = Studio(Settings(**folder, device="auto", threads=1, inline=True))
        for made in [made for made in Catalog().cards() if made.has_weights]:
            request = SpeechRequest(text="Good morning.", **reference(made))
            [job] = studio.submit(
                [Order(engine=made.id, request=request, seed=3, weights="miniature")], "anna"
            )
            studio.wait(job)
            assert job.state == "done", (made.id, job.reason, job.detail)
            cost = job.take.measurements
            assert cost["device_peak_bytes"] > cost["device_after_bytes"] > cost["device_before_bytes"]
            assert job.take.placement["device"] == "cuda"
        released = studio._worker._host.residency.release_all()
        assert len(released) == len(ENGINES) and all(each.clean for each in released), released
        assert gpu.used == 0
        studio.close()
