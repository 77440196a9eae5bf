"""Models loaded our way are those of `from_pretrained`, bit for bit; broken checkpoints are named."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from core.engines import loading
from core.engines.loading import fill, load_parallel, load_pretrained, read_tensors, skeleton
from core.errors import WeightsError
from tests.support import miniature

GPT2 = GPT2Config(
    vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
)
LLAMA = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def as_torch_file(folder: Path, **how: Any) -> Path:
    """The same checkpoint as pytorch_model.bin, also of several files."""
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), folder / file.name.replace("model", "pytorch_model").replace(
            ".safetensors", ".bin"
        ), **how)  # fmt: skip
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        changed = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(changed)
        index.unlink()
    return folder


def gpt2(folder: Path, **how: Any) -> Path:
    torch.manual_seed(1)
    return saved(GPT2LMHeadModel(GPT2), folder, **how)


def base_of_gpt2(folder: Path) -> Path:
    """Without the head, and so without the prefix that its model's names have."""
    torch.manual_seed(1)
    GenerationConfig(max_length=33).save_pretrained(folder)
    return saved(GPT2Model(GPT2), folder)


def gpt2_in_shards(folder: Path) -> Path:
    gpt2(folder, max_shard_size="20KB")
    assert len([*folder.glob("model-*.safetensors")]) > 2
    return folder


def gpt2_with_its_tied_head(folder: Path) -> Path:
    """As torch.save leaves it: one tensor under two names."""
    gpt2(folder)
    as_torch_file(folder)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def llama(folder: Path) -> Path:
    torch.manual_seed(2)
    return saved(LlamaForCausalLM(LlamaConfig(**LLAMA)), folder)


def mixtral(folder: Path) -> Path:
    torch.manual_seed(3)
    return saved(MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=2)), folder)


def t5(folder: Path) -> Path:
    torch.manual_seed(4)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return saved(T5ForConditionalGeneration(T5Config(vocab_size=100, **sizes)), folder)


def whisper(folder: Path) -> Path:
    torch.manual_seed(5)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(vocab_size=100, d_model=32, **layers, **heads, **tokens)
    return saved(WhisperForConditionalGeneration(config), folder)


def mms_of_2023(folder: Path) -> Path:
    """A voice whose weight normalization has the names it had then."""
    for file in miniature("mms").glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    norm = ".parametrizations.weight.original"
    tensors = {
        name.replace(norm + "0", ".weight_g").replace(norm + "1", ".weight_v"): tensor
        for name, tensor in load_file(miniature("mms") / "model.safetensors").items()
    }
    assert any(name.endswith(".weight_v") for name in tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


CHECKPOINTS: dict[str, tuple[Any, Callable[[Path], Path]]] = {
    "safetensors": (AutoModelForTextToWaveform, lambda _: miniature("mms")),
    "torch file": (AutoModelForTextToWaveform, lambda _: miniature("bark")),
    "names of 2023": (AutoModelForTextToWaveform, mms_of_2023),
    "tied": (AutoModelForCausalLM, gpt2),
    "tied, both in the file": (AutoModelForCausalLM, gpt2_with_its_tied_head),
    "shards": (AutoModelForCausalLM, gpt2_in_shards),
    "torch shards": (AutoModelForCausalLM, lambda folder: as_torch_file(gpt2_in_shards(folder))),
    "torch file from before 1.6": (
        AutoModelForCausalLM,
        lambda folder: as_torch_file(gpt2(folder), _use_new_zipfile_serialization=False),
    ),
    "of the base model": (AutoModelForCausalLM, base_of_gpt2),
    "rotary tables": (AutoModelForCausalLM, llama),
    "encoder and decoder": (AutoModelForSpeechSeq2Seq, whisper),
    "experts to be joined": (AutoModelForCausalLM, mixtral),
    "kept in float32": (AutoModelForSeq2SeqLM, t5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_equals_from_pretrained(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    auto, make = CHECKPOINTS[kind]
    folder = make(tmp_path)
    theirs = auto.from_pretrained(folder, dtype=dtype).eval()
    ours = load_pretrained(auto, folder, dtype=dtype)

    assert type(ours) is type(theirs)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    for held in ("named_parameters", "named_buffers"):
        mine, other = dict(getattr(ours, held)()), dict(getattr(theirs, held)())
        assert mine.keys() == other.keys()  # a tied parameter is named once
        for name, tensor in other.items():
            assert (mine[name].dtype, mine[name].device) == (tensor.dtype, tensor.device), name
            assert torch.equal(mine[name], tensor), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert not any(module.training for module in ours.modules())
    if theirs.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_weights_of_the_right_dtype_are_the_files_own_pages(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    model = load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
    pages = mapped(folder / "model.safetensors")
    assert all(any(p.data_ptr() in part for part in pages) for p in model.parameters())
    del model
    gc.collect()
    assert not mapped(folder / "model.safetensors")


def test_of_cast_weights_no_first_copy_is_kept(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    model = load_pretrained(AutoModelForCausalLM, folder, dtype=torch.bfloat16)
    gc.collect()
    assert model.dtype == torch.bfloat16
    assert not mapped(folder / "model.safetensors")


def mapped(file: Path) -> list[range]:
    """Where in this process a file's pages are."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [line[0].split("-") for line in lines if line[-1] == str(file)]
    return [range(int(first, 16), int(last, 16)) for first, last in ends]


def test_a_file_that_is_replaced_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    file = llama(tmp_path) / "model.safetensors"
    model = load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: torch.zeros_like(t) for name, t in before.items()}, tmp_path / "new")
    (tmp_path / "new").replace(file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_writing_to_a_weight_does_not_write_to_its_file(tmp_path: Path) -> None:
    file = llama(tmp_path) / "model.safetensors"
    before = file.read_bytes()
    model = load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert file.read_bytes() == before


def test_a_missing_tensor_is_named_and_not_made_up(tmp_path: Path) -> None:
    file = llama(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"^The checkpoint lacks 1 tensors, such as model\.norm\.weight"):
        load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)


def test_a_missing_tensor_is_named_where_transformers_loads(tmp_path: Path) -> None:
    file = mixtral(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"^The checkpoint lacks 1 tensors, such as model\.norm\.weight"):
        load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)


def test_a_tied_tensor_that_is_there_under_neither_name_is_missing(tmp_path: Path) -> None:
    file = gpt2(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.wte.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, such as transformer\.wte\.weight"):
        load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    file = llama(tmp_path) / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(7)}, file, metadata={"format": "pt"})
    with pytest.raises(
        WeightsError,
        match=r"^The checkpoint's model\.norm\.weight is of shape \(7,\); the model's is \(32,\)\.$",
    ):
        load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("as_torch", "sentence"),
    [
        (False, r"^model\.safetensors is not a whole safetensors file: "),
        (True, r"^pytorch_model\.bin is damaged or foreign: "),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_file_is_named(as_torch: bool, sentence: str, share: float, tmp_path: Path) -> None:
    gpt2(tmp_path)
    if as_torch:
        as_torch_file(tmp_path)
    file = tmp_path / ("pytorch_model.bin" if as_torch else "model.safetensors")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(WeightsError, match=sentence):
        load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)


def test_a_torch_file_of_something_else_is_named(tmp_path: Path) -> None:
    as_torch_file(gpt2(tmp_path))
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"^pytorch_model\.bin holds no tensors by name\.$"):
        load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)


def test_a_torch_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    as_torch_file(gpt2(tmp_path))
    torch.save({"weight": Runs(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"^pytorch_model\.bin is damaged or foreign: "):
        load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)
    assert not (tmp_path / "ran").exists()


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_folder_without_weights_and_without_a_shard_is_named(tmp_path: Path) -> None:
    folder = gpt2_in_shards(tmp_path)
    index = folder / "model.safetensors.index.json"
    second = sorted(folder.glob("model-*.safetensors"))[1]
    second.unlink()
    with pytest.raises(WeightsError, match=rf"^The checkpoint lacks 1 of its files, {second.name} for one"):
        load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
    for broken in ("", "[]", "{}", json.dumps({"weight_map": 3})):
        index.write_text(broken)
        with pytest.raises(WeightsError, match=r"^model\.safetensors\.index\.json .* cannot be read"):
            load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
    index.unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(4) * 0.5, persistent=False)


def test_a_skeleton_has_no_weights_but_real_tables() -> None:
    with skeleton():
        model = Small()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.table.tolist() == [0.0, 0.5, 1.0, 1.5]


def test_after_a_skeleton_modules_are_built_as_ever() -> None:
    with pytest.raises(ZeroDivisionError), skeleton():
        _ = 1 / 0
    torch.manual_seed(0)
    first = Small().layer.weight
    torch.manual_seed(0)
    assert not first.is_meta and first.any() and torch.equal(first, Small().layer.weight)


def test_a_skeleton_is_filled_in_its_own_dtypes() -> None:
    with skeleton():
        model = Small().half()
    weight = torch.rand(2, 3)
    fill(model, {"layer.weight": weight, "layer.bias": torch.ones(2)})
    assert torch.equal(model.layer.weight, weight.half())
    assert model.table.dtype == torch.float16 and model.layer.weight.requires_grad


def test_a_skeleton_is_filled_whole_or_not_at_all() -> None:
    whole = {"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}
    with skeleton():
        model = Small()
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, such as layer\.bias"):
        fill(model, {"layer.weight": whole["layer.weight"]})
    with pytest.raises(WeightsError, match="holds 1 tensors that its model lacks, such as head"):
        fill(model, whole | {"head": torch.ones(1)})


def test_tensors_of_several_files_are_read_together(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    torch.save({"b": torch.zeros(3), "step": 7}, tmp_path / "two.bin")
    read = read_tensors(tmp_path / "one.safetensors", tmp_path / "two.bin")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"a": [1, 1], "b": [0, 0, 0]}


def test_jobs_run_side_by_side_and_answer_by_name() -> None:
    both = threading.Barrier(2, timeout=20)

    def meet() -> int:
        both.wait()
        return threading.get_ident()

    answers = load_parallel({"one": meet, "two": meet})
    assert list(answers) == ["one", "two"] and len({*answers.values()}) == 2
    assert load_parallel({}) == {}


def test_the_first_error_is_raised_once_the_others_have_ended() -> None:
    failed, ended = threading.Event(), []

    def fails() -> None:
        failed.set()
        raise WeightsError("first")

    def goes_on() -> None:
        failed.wait(20)
        for _ in range(100):
            torch.ones(100, 100) @ torch.ones(100, 100)
        ended.append(True)
        raise WeightsError("second")

    with pytest.raises(WeightsError, match="first"):
        load_parallel({"long": goes_on, "short": fails})
    assert ended


def test_models_built_side_by_side_are_whole(tmp_path: Path) -> None:
    folder = gpt2_in_shards(tmp_path)
    right = AutoModelForCausalLM.from_pretrained(folder).state_dict()

    def job() -> dict[str, torch.Tensor]:
        return load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32).state_dict()

    for _ in range(5):
        for state in load_parallel({str(n): job for n in range(4)}).values():
            assert all(torch.equal(state[name], tensor) for name, tensor in right.items())


def test_memory_is_reserved_at_once_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def empty(size: int, **how: Any) -> None:
        asked.append((size, how["device"]))
        raise torch.OutOfMemoryError  # as little as there is: loading itself must decide

    monkeypatch.setattr(torch, "empty", empty)
    tensors = [torch.ones(10), torch.ones(3, dtype=torch.int8)]
    loading._reserve(tensors, "cpu")
    assert not asked
    loading._reserve(tensors, "cuda:1")
    assert asked == [(43, "cuda:1")]
