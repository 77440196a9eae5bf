"""How large an engine's components are: counted on the meta device from configs alone, kept as data.

`python -m core.worker.footprint` counts them anew and writes `footprints.json` into the engines' folders.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from core.card import Card
from core.catalog import Catalog

if TYPE_CHECKING:
    import torch

FILE = "footprints.json"  # in an engine's folder: repository -> its components
CONFIGS = "configs"  # there, too: the configs of its checkpoints, by the last part of the repository

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Component:
    """One component in numbers of floats, whose bytes follow the precision it is loaded in.

    What is streamed needs room for the piece that works, for the next one, which is fetched meanwhile, and
    for the tensors that belong to no piece.
    """

    name: str
    floats: int
    fixed: int = 0  # bytes of what keeps its type: integers, flags
    linear: int = 0  # floats in the weights of linear layers, which int8 makes a byte each
    rows: int = 0  # of these weights, each of which then has a scale and, in a byte, a zero point
    block: int = 0  # floats on the device at once when it is streamed block by block
    leaf: int = 0  # the same, layer by layer
    largest: int = 0  # floats of its largest piece, which a device map keeps in one place
    stays: int = 0  # floats on the device all the time, streamed or spread: buffers, layers of `Card.whole`
    whole: bool = False  # it cannot be taken apart

    def bytes(self, dtype: str, quantisation: str = "") -> int:
        if quantisation:
            floats = self.floats - self.linear + self.rows
            return floats * ITEM_BYTES[dtype] + self.linear + self.rows + self.fixed
        return self.floats * ITEM_BYTES[dtype] + self.fixed

    def staying(self, dtype: str) -> int:
        """Bytes that never leave the device, in any way of running it there."""
        return self.bytes(dtype) if self.whole else self.stays * ITEM_BYTES[dtype] + self.fixed

    def moving(self, dtype: str) -> int:
        """Bytes of all the others."""
        return self.bytes(dtype) - self.staying(dtype)

    def streamed(self, dtype: str, *, by_leaf: bool) -> int:
        """Bytes on the device at once under group offload, beside those that stay."""
        return 0 if self.whole else (self.leaf if by_leaf else self.block) * ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Footprint:
    components: tuple[Component, ...]

    def bytes(self, dtype: str, quantisation: str = "") -> int:
        return sum(component.bytes(dtype, quantisation) for component in self.components)

    @property
    def floats(self) -> int:
        return sum(component.floats for component in self.components)


def measure(modules: Mapping[str, torch.nn.Module], whole: Set[str] = frozenset()) -> Footprint:
    """Count components; they may be on the meta device. Tied tensors count once.

    Args:
        whole: what of them cannot be taken apart (`Card.whole`).
    """
    return Footprint(tuple(_measure(name, module, whole) for name, module in modules.items()))


def _measure(name: str, module: torch.nn.Module, whole: Set[str]) -> Component:

    tensors = list(_tensors(module))
    floats = _floats(tensors)
    small = list({id(layer.weight): layer.weight for layer in linear_layers(module)}.values())
    kept = [t for layer in layers_kept(name, module, whole).values() for t in layer.parameters()]
    stays = {id(t): t for t in (*kept, *module.buffers())}
    moving = [t for t in tensors if id(t) not in stays]
    blocks = [[t for t in block.parameters() if id(t) not in stays] for block in blocks_of(module)]
    in_blocks = {id(t) for block in blocks for t in block}
    leaves = [
        _floats(t for t in m.parameters(isinstance(m, leaf_classes())) if id(t) not in stays)
        for m in module.modules()
    ]
    largest, leaf = max(map(_floats, blocks), default=0), max(leaves, default=0)
    loose = _floats(t for t in moving if id(t) not in in_blocks)
    return Component(
        name=name,
        floats=floats,
        fixed=sum(t.numel() * t.element_size() for t in tensors if not t.is_floating_point()),
        linear=sum(weight.numel() for weight in small),
        rows=sum(len(weight) for weight in small),
        block=min(_floats(moving), loose + 2 * largest),
        leaf=min(_floats(moving), 2 * leaf),
        largest=max(largest, leaf),
        stays=_floats(stays.values()),
        whole=name in whole,
    )


def layers_kept(name: str, module: torch.nn.Module, whole: Set[str]) -> dict[str, torch.nn.Module]:
    """The layers of a component, by path, that stay on the device (`Card.whole`)."""
    paths = sorted(entry.removeprefix(f"{name}.") for entry in whole if entry.startswith(f"{name}."))
    return {path: module.get_submodule(path) for path in paths}


def blocks_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The members of its lists of layers or, where it has none, of those in its children."""
    found = [child for child in module.children() if _is_list(child)]
    return [
        part
        for child in found or module.children()
        for part in (_members(child) if found else blocks_of(child))
    ]


def holders_of(module: torch.nn.Module) -> list[str]:
    """Names of the children, at any depth, on the way from a component to its lists of layers."""
    if any(_is_list(child) for child in module.children()):
        return []
    return [
        found
        for name, child in module.named_children()
        if blocks_of(child)
        for found in (name, *holders_of(child))
    ]


def _is_list(module: torch.nn.Module) -> bool:
    import torch
    from torch.nn.utils.parametrize import ParametrizationList

    lists = torch.nn.ModuleList | torch.nn.Sequential
    return isinstance(module, lists) and not isinstance(module, ParametrizationList)


def _members(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for child in module.children() for part in (_members(child) if _is_list(child) else [child])]


def linear_layers(module: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    """Linear layers whose weight no other layer holds, too: int8 can make it small."""
    import torch

    layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    others = (m for m in module.modules() if not isinstance(m, torch.nn.Linear))
    shared = {id(t) for m in others for t in m.parameters(recurse=False)}
    yield from (layer for layer in layers if id(layer.weight) not in shared)


def leaf_classes() -> tuple[type[torch.nn.Module], ...]:
    """Layers that are streamed with all they hold: weight and bias, also where both are parametrized.

    As diffusers has them (`hooks/_common.py`); of any other module the tensors of its own are a piece.
    """
    from torch import nn

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return (*convolutions, *transposed, nn.Linear, nn.Embedding)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, each once."""
    yield from module.parameters()
    yield from {id(b): b for b in module.buffers()}.values()


def _floats(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors if t.is_floating_point())


@cache
def shipped(folder: Path) -> dict[str, Footprint]:
    """Footprints by repository, as an engine's folder states them; empty where it states none."""
    file = folder / FILE
    if not file.is_file():
        return {}
    return {
        repository: Footprint(tuple(Component(**component) for component in components))
        for repository, components in json.loads(file.read_text("utf-8")).items()
    }


def as_json(footprints: Mapping[str, Footprint]) -> str:
    """What `shipped` reads."""
    plain = {name: [asdict(c) for c in f.components] for name, f in footprints.items()}
    return json.dumps(plain, indent=1) + "\n"


def counted(card: Card, package: str) -> dict[str, Footprint]:
    """Footprints by repository, from the configs in an engine's folder.

    A checkpoint without configs there is counted from its own, once it is on this machine.
    """
    from core.engines.quirks import mend_torchaudio

    mend_torchaudio()
    engine = importlib.import_module(f"{package}.engine").ENGINE
    folders = {c.repository: folder_of(package) / CONFIGS / c.folder for c in card.checkpoints}
    return {
        repository: measure(engine.skeleton(folder), card.whole)
        for repository, folder in folders.items()
        if folder.is_dir()
    }


def folder_of(package: str) -> Path:
    return Path(importlib.import_module(package).__path__[0])


def _write_all() -> None:
    catalog = Catalog()
    for card in catalog.cards():
        package = catalog.package(card.id)
        if card.has_weights:
            (folder_of(package) / FILE).write_text(as_json(counted(card, package)), "utf-8")


if __name__ == "__main__":
    _write_all()
