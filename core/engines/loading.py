"""Checkpoints into models, with no second copy and no work that would be thrown away.

Of what `from_pretrained` spends on a model of some hundred MB little is reading: it draws random numbers for
weights that it then replaces, and compiles a pattern for each tensor. Here a model is built without memory,
and takes the checkpoint's tensors as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from core.errors import WeightsError

T = TypeVar("T")

_THREADS = min(4, os.cpu_count() or 1)  # as many as transformers uses for the same
# Held while accelerate and transformers have nn.Module patched, and while parameters are set, which a patched
# nn.Module would throw away.
_patching = threading.RLock()


def load_pretrained(
    auto: Any, folder: Path, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Any:
    """A model as `auto.from_pretrained(folder, dtype=dtype).to(device).eval()` gives it, sooner.

    On a CPU, tensors that already are of `dtype` stay pages of the file, as with transformers: read at their
    first use, and held once, by the system's cache. A file that is replaced as the hub and most tools do it
    (write beside, rename) leaves the model as it is; one that is cut short in place ends the worker, which
    the page then starts anew. Copies would rule that out, at the price of a copy in every load.

    Args:
        auto: an Auto class of transformers, such as `AutoModelForTextToWaveform`.
        folder: a checkpoint in the hub's layout: config.json, safetensors or torch files, whole or in shards.

    Raises:
        WeightsError: a file is missing, cut or foreign, or a parameter is missing or of another shape.
    """
    files = weight_files(folder)
    read_ahead(files)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with skeleton():
        model = auto.from_config(config, dtype=dtype)
    if not _is_plain(model, dtype):
        return _by_transformers(auto, folder, dtype, device)
    missing, _ = _assign(model, _renamed(model, read_tensors(*files)), device)
    with _patching:
        model.tie_weights(missing_keys=missing)
    _refuse([name for name, parameter in model.named_parameters() if parameter.is_meta])
    if model.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval()  # only buffers that no checkpoint holds are left to move


@contextlib.contextmanager
def skeleton() -> Iterator[None]:
    """Modules built inside have parameters without memory, for `fill`; their buffers are real.

    Buffers that no checkpoint holds (rotary tables, window functions) are thus as their module computed them.
    Patches torch for the whole process: one thread at a time, and no other module may be built meanwhile.
    """
    with _patching, init_empty_weights(include_buffers=False), no_init_weights():
        yield


def fill(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], device: str | torch.device = "cpu"
) -> None:
    """Give a skeleton all its tensors, in the dtypes that it has, and move the rest of it to `device`.

    Raises:
        WeightsError: `tensors` and the model's state differ in names or shapes.
    """
    missing, unknown = _assign(model, tensors, device)
    _refuse(missing)
    if unknown:
        raise WeightsError(
            f"The checkpoint holds {len(unknown)} tensors that its model lacks, such as {min(unknown)}."
        )
    model.to(device)


def load_parallel(jobs: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Run the jobs side by side and return their results by name.

    Files are read and sent to the device in parallel; skeletons are built one after another. A job may build
    modules only inside `skeleton`.

    Raises:
        Exception: the first that a job raised, once all have ended.
    """
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        names = {pool.submit(job): name for name, job in jobs.items()}
        errors = [error for future in as_completed(names) if (error := future.exception())]
    if errors:
        raise errors[0]
    return {name: future.result() for future, name in names.items()}


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint in the hub's layout, safetensors first, as transformers chooses."""
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _shards(folder / index)
    raise WeightsError(f"The checkpoint has neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}.")


def read_ahead(files: Sequence[Path]) -> None:
    """Ask the system to read files into its cache while other work goes on; does not wait for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def read_tensors(*files: Path) -> dict[str, torch.Tensor]:
    """All tensors of .safetensors or torch files by name, mapped: their bytes are read at first use.

    Raises:
        WeightsError: a file is cut, or is not a checkpoint.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return {name: tensor for read in pool.map(_read, files) for name, tensor in read.items()}


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index.name} of the checkpoint cannot be read: {error}.") from None
    files = [index.parent / str(name) for name in sorted(names)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise WeightsError(f"The checkpoint lacks {len(absent)} of its files, {absent[0]} for one.")
    return files


def _read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise WeightsError(f"{file.name} is not a whole safetensors file: {error}.") from None
    try:
        # Files from before torch 1.6 are no archives and cannot be mapped.
        read = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{file.name} is damaged or foreign: {reason}") from None
    if not isinstance(read, dict):
        raise WeightsError(f"{file.name} holds no tensors by name.")
    return {name: tensor for name, tensor in read.items() if isinstance(tensor, torch.Tensor)}


def _is_plain(model: Any, dtype: torch.dtype) -> bool:
    """Whether tensors are only renamed on their way in, and all cast to one dtype."""
    renamed_only = all(isinstance(step, WeightRenaming) for step in get_model_conversion_mapping(model))
    return renamed_only and not model._get_dtype_plan(dtype)


def _by_transformers(auto: Any, folder: Path, dtype: torch.dtype, device: str | torch.device) -> Any:
    """Tensors that must be split, joined or kept in float32 are left to those who know how."""
    with _patching:
        model, report = auto.from_pretrained(
            folder, dtype=dtype, device_map=device, local_files_only=True, output_loading_info=True
        )
    _refuse(report["missing_keys"] & dict(model.named_parameters()).keys())
    return model


def _renamed(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of today's classes, as `from_pretrained` finds them (2023's weight_g, say)."""
    wanted = model.state_dict()
    renamings = get_model_conversion_mapping(model)

    def rename(name: str) -> str:
        new, _ = rename_source_key(name, renamings, [], model.base_model_prefix, wanted)
        if new not in wanted and name in wanted:
            new, _ = rename_source_key(name, [], [], model.base_model_prefix, wanted)
        return str(new)

    return {rename(name): tensor for name, tensor in tensors.items()}


def _assign(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], device: str | torch.device
) -> tuple[set[str], set[str]]:
    """Put tensors into the model, on `device` and in its dtypes; names that are missing, and left over."""
    wanted = model.state_dict()
    found = [name for name in tensors if name in wanted]  # in the file's order, which disks like
    for name in found:
        if (own := tuple(wanted[name].shape)) != (read := tuple(tensors[name].shape)):
            raise WeightsError(f"The checkpoint's {name} is of shape {read}; the model's is {own}.")
    _reserve([wanted[name] for name in found], device)

    def place(name: str) -> torch.Tensor:
        # Cast first: the device never holds more than the model's own bytes.
        return tensors[name].to(wanted[name].dtype).to(device)

    work = torch.device(device).type != "cpu" or any(tensors[n].dtype != wanted[n].dtype for n in found)
    with ThreadPoolExecutor(_THREADS) as pool:
        placed = dict(zip(found, (pool.map if work else map)(place, found), strict=True))
    with _patching:
        model.load_state_dict(placed, strict=False, assign=True)
    return wanted.keys() - placed.keys(), tensors.keys() - placed.keys()


def _reserve(tensors: Sequence[torch.Tensor], device: str | torch.device) -> None:
    """One large allocation instead of one a tensor; the allocator keeps it for what comes.

    The idea is that of transformers' `caching_allocator_warmup`.
    """
    if torch.device(device).type == "cuda":
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=device)


def _refuse(missing: Sequence[str] | set[str]) -> None:
    # transformers would go on with random numbers in their place.
    if missing:
        raise WeightsError(f"The checkpoint lacks {len(missing)} tensors, such as {min(missing)}.")
