"""Carries out a placement on loaded components, through accelerate's and diffusers' hooks."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.engines.base import Placement
from core.errors import DiskFull
from core.worker.footprint import blocks_of, holders_of, layers_kept, linear_layers

if TYPE_CHECKING:
    import torch


class Shelf:
    """One component's tensors in host memory, from which it is copied to the device as often as needed.

    Weights do not change, so going back to the shelf copies nothing.
    """

    def __init__(self, module: torch.nn.Module, device: str) -> None:
        self._module = module
        self._device = device
        self._host: list[torch.Tensor] = []
        self.on_device = False

    def take(self) -> None:
        """Copy it to the device."""
        if self.on_device:
            return
        copies: dict[int, torch.Tensor] = {}  # a tied tensor is met twice and copied once

        def copy(host: torch.Tensor) -> torch.Tensor:
            if id(host) not in copies:
                copies[id(host)] = host.to(self._device, non_blocking=True)
            return copies[id(host)]

        if not self._host:
            self._host = self._gather()
        self._change(copy)
        self.on_device = True

    def put_back(self) -> None:
        """Drop the device's copy."""
        if self.on_device:
            self._change(lambda host: host)
            self.on_device = False

    def fill(self) -> None:
        """Copy it from the device to host memory, and leave it there."""
        if not self._host:
            self._host = self._gather()
        self.on_device = True
        self.put_back()

    def empty(self) -> None:
        """Forget the host's copy; what is on the device stays."""
        self._host = []

    def _gather(self) -> list[torch.Tensor]:
        """Host copies, pinned where the device is a GPU, in the order a module visits its tensors."""
        import torch

        found: list[torch.Tensor] = []
        known: dict[int, torch.Tensor] = {}
        pin = self._device.startswith("cuda")

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in known:
                host = tensor.detach().cpu()
                # A subclass, such as a quantised tensor, pins nothing.
                plain = type(host) is torch.Tensor
                known[id(tensor)] = host.pin_memory() if pin and plain else host
            found.append(known[id(tensor)])
            # In host memory the copy takes its place at once, or there would be two of the whole.
            return known[id(tensor)] if tensor.device.type == "cpu" else tensor

        with torch.inference_mode(False), torch.no_grad():
            self._module._apply(note)
        return found

    def _change(self, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        import torch

        number = count()
        # A parameter that was given an inference tensor could not be used outside that mode.
        with torch.inference_mode(False), torch.no_grad():
            self._module._apply(lambda _: to(self._host[next(number)]))


class Arrangement:
    """What was done to an engine's components, and how they are parked and let go.

    Args:
        components: loaded to `placement.load_device`.
        whole: what of them cannot be taken apart (`Card.whole`).
        scratch: a folder for what a device map puts on disk.

    Raises:
        DiskFull: the disk has no room for it.
    """

    def __init__(
        self,
        components: Mapping[str, torch.nn.Module],
        placement: Placement,
        whole: frozenset[str],
        scratch: Path,
    ) -> None:
        self._components = dict(components)
        self.placement = placement
        self._whole = whole
        self._disk: Path | None = None
        self._shelves: dict[str, Shelf] = {}
        try:
            self._install(scratch)
        except BaseException:
            self.undo()
            raise

    def _install(self, scratch: Path) -> None:
        match self.placement.strategy:
            case "resident":
                if self.placement.quantisation:
                    self._quantise()
            case "model_offload":
                self._shelves = {n: Shelf(m, self.placement.device) for n, m in self._components.items()}
            case "group_block" | "group_leaf":
                self._stream()
            case "device_map":
                self._spread(scratch)

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """The named components are on the device inside. They stay until others are needed."""
        if self.placement.strategy == "model_offload":
            for name, shelf in self._shelves.items():
                if name not in names:
                    shelf.put_back()
            for name in names:
                self._shelves[name].take()
        yield

    def rest(self) -> None:
        """The job is over: what was moved in only for it goes back."""
        if self.placement.strategy == "model_offload":
            for shelf in self._shelves.values():
                shelf.put_back()
        for hook in self._streams():  # a job that was stopped in a layer left its piece there
            hook.group.offload_()

    @property
    def can_park(self) -> bool:
        """Whether all of it can wait in host memory; layers that were sent to the disk can not."""
        return self.placement.strategy != "device_map"

    def park(self) -> None:
        """Give the device back, and keep the weights in host memory."""
        self.rest()
        if self.placement.strategy == "resident":
            self._shelves = {n: Shelf(m, self.placement.device) for n, m in self._components.items()}
            for shelf in self._shelves.values():
                shelf.fill()
        else:
            for module in self._staying():
                module.to("cpu")

    def unpark(self) -> None:
        """The way back: copies, and reads no file."""
        if self.placement.strategy == "resident":
            for shelf in self._shelves.values():
                shelf.take()
                shelf.empty()
            self._shelves = {}
        else:
            for module in self._staying():
                module.to(self.placement.device)

    def undo(self) -> None:
        """Take off every hook, and what they hold, so that the components can be let go."""
        if self.placement.strategy in ("group_block", "group_leaf"):
            _take_off_streams(self._components.values())
        elif self.placement.strategy == "device_map":
            from accelerate.hooks import remove_hook_from_module

            for component in self._components.values():
                remove_hook_from_module(component, recurse=True)
        self._components.clear()
        self._shelves.clear()
        if self._disk:
            shutil.rmtree(self._disk, ignore_errors=True)

    def _quantise(self) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        for component in self._components.values():
            layers = set(linear_layers(component))
            quantize_(component, Int8WeightOnlyConfig(), lambda layer, _, known=layers: layer in known)
            component.to(self.placement.device)

    def _stream(self) -> None:
        import torch
        from diffusers.hooks import apply_group_offloading

        device = torch.device(self.placement.device)
        by_block = self.placement.strategy == "group_block"
        for name, component in self._components.items():
            if name in self._whole:
                continue
            holders = holders_of(component) if by_block else []
            with _set_aside(component, layers_kept(name, component, self._whole)):
                apply_group_offloading(
                    component,
                    onload_device=device,
                    offload_device=torch.device("cpu"),
                    offload_type="block_level" if by_block else "leaf_level",
                    num_blocks_per_group=1 if by_block else None,
                    block_modules=holders,
                    # On CUDA pieces are copied from pinned memory, and what they hold there is only dropped.
                    # With lists of layers at several depths diffusers cannot do so.
                    use_stream=device.type == "cuda" and not holders,
                )
            if not by_block:
                _fetch_in_turn(component)
        for hook in self._streams():
            _list_once(hook.group)
        for module in self._staying():
            module.to(device)

    def _staying(self) -> Iterator[torch.nn.Module]:
        """What is never taken apart, of an engine that is streamed or spread."""
        if self.placement.strategy in ("group_block", "group_leaf", "device_map"):
            for name, component in self._components.items():
                if name in self._whole:
                    yield component
                yield from layers_kept(name, component, self._whole).values()

    def _streams(self) -> Iterator[Any]:
        """The hooks that bring pieces to the device."""
        if self.placement.strategy in ("group_block", "group_leaf"):
            for component in self._components.values():
                for module in component.modules():
                    registry = getattr(module, "_diffusers_hook", None)
                    hook = registry.get_hook("group_offloading") if registry else None
                    if hook:
                        yield hook

    def _spread(self, scratch: Path) -> None:
        import torch
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import set_module_tensor_to_device

        scratch.mkdir(parents=True, exist_ok=True)
        self._disk = Path(tempfile.mkdtemp(dir=scratch))
        device = torch.device(self.placement.device)
        here: int | str = device.index or 0 if device.type == "cuda" else device.type
        left = {here: self.placement.device_share}
        if here != "cpu":
            left["cpu"] = self.placement.ram_share
        for name, component in self._components.items():
            if name in self._whole:
                continue
            with _set_aside(component, layers_kept(name, component, self._whole)):
                places = infer_auto_device_map(
                    component,
                    max_memory=dict(left),
                    no_split_module_classes=sorted({type(block).__name__ for block in blocks_of(component)}),
                    offload_buffers=True,  # else it warns of them; the plan has them beside the share
                )
                taken = _bytes_by_place(component, places)
                self._refuse_full_disk(taken.get("disk", 0))
                for place in left:
                    left[place] = max(0, left[place] - taken.get(place, 0))
                if "" in places:  # accelerate finds no weights to offload under that name
                    places = dict.fromkeys((child for child, _ in component.named_children()), places[""])
                # accelerate leaves out the tensors that a module holds beside its children, and never moves
                # them.
                loose = _loose(component, places)
                places.update(dict.fromkeys(loose, here))
                for tensor in loose:
                    set_module_tensor_to_device(component, tensor, device)
                with warnings.catch_warnings():
                    # It knows no tensors that are not of a module.
                    warnings.filterwarnings("ignore", message="The following device_map keys do not match")
                    dispatch_model(
                        component,
                        places,
                        main_device=here,
                        offload_dir=self._disk / name,
                        force_hooks=True,
                    )
        for module in self._staying():
            module.to(device)

    def _refuse_full_disk(self, size: int) -> None:
        """accelerate writes through memory maps, and a disk that fills up meanwhile ends the process."""
        assert self._disk is not None
        free = shutil.disk_usage(self._disk).free
        if size > free:
            raise DiskFull(
                f"{size / 2**20:.0f} MiB of weights have to wait on disk, and {free / 2**20:.0f} MiB are "
                f"free in {self._disk.parent}; make room there, or raise the memory budget."
            )


@contextmanager
def _set_aside(component: torch.nn.Module, layers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Hide layers from what goes through all modules of a component."""
    import torch

    for path in layers:
        component.set_submodule(path, torch.nn.Identity())
    try:
        yield
    finally:
        for path, layer in layers.items():
            component.set_submodule(path, layer)


def _list_once(group: Any) -> None:
    """Leave out of a group's own tensors those of its modules.

    diffusers lists them in both; a buffer, which becomes a new tensor with each move of its module, would be
    on the device twice.
    """
    inside = {id(t) for module in group.modules for t in (*module.parameters(), *module.buffers())}
    group.parameters = [t for t in group.parameters if id(t) not in inside]
    group.buffers = [t for t in group.buffers if id(t) not in inside]


def _fetch_in_turn(component: torch.nn.Module) -> None:
    """Bring each layer when its turn comes, not while the one before it works.

    diffusers would learn the order from the first pass, and bring the wrong ones where a later pass skips
    some: those that made what a model keeps from its first step to the last, say.
    """
    registry = getattr(component, "_diffusers_hook", None)
    if registry:
        registry.remove_hook("lazy_prefetch_group_offloading", recurse=False)
        registry.remove_hook("layer_execution_tracker", recurse=True)


def _loose(module: torch.nn.Module, places: Mapping[str, int | str]) -> list[str]:
    """Names of the parameters and buffers that no entry of a device map covers as part of a module."""
    modules = {path for path, _ in module.named_modules()}
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    covered = tuple(f"{path}." for path in places if path in modules)
    return [name for name in names if not name.startswith(covered)]


def _bytes_by_place(module: torch.nn.Module, places: Mapping[str, int | str]) -> dict[int | str, int]:
    taken: dict[int | str, int] = {}
    modules = dict(module.named_modules())
    for path, place in places.items():
        if path in modules:
            size = sum(t.numel() * t.element_size() for t in modules[path].parameters())
            taken[place] = taken.get(place, 0) + size
    return taken


def _take_off_streams(components: object) -> None:
    from diffusers.hooks import HookRegistry

    for component in components:  # type: ignore[attr-defined]
        for module in component.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if isinstance(registry, HookRegistry):
                for name in list(registry.hooks):
                    with suppress(ValueError):
                        registry.remove_hook(name, recurse=False)
                del module._diffusers_hook
