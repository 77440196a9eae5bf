"""Mends what libraries get wrong, in one place: broken pairs of them, and where a model says it is."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_EXTENSION = "torchaudio._extension"


def mend_torchaudio() -> None:
    """Make `import torchaudio` work beside a torch that cannot load its compiled extension.

    The newest torchaudio wheel (2.11) links CUDA; beside a CPU build of torch its import raises OSError,
    and takes transformers and diffusers with it, which import it where it is installed. The extension holds
    only faster versions of functions that torchaudio also has in pure torch, and forced alignment, so where
    it does not load, a module that says "not available" stands in for it. Call this before anything imports
    torchaudio, as often as you like; it does nothing where the extension loads or torchaudio is absent.
    """
    if "torchaudio" in sys.modules or _EXTENSION in sys.modules:
        return
    library = _extension_library()
    if library is None or _loads(library):
        return
    stand_in = ModuleType(_EXTENSION)
    vars(stand_in).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        fail_if_no_align=_without_alignment,
    )
    sys.modules[_EXTENSION] = stand_in


def _extension_library() -> Path | None:
    """The shared library that `import torchaudio` loads; found without importing it."""
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next((Path(spec.submodule_search_locations[0]) / "lib").glob("_torchaudio.*"), None)


def _loads(library: Path) -> bool:
    import torch  # noqa: F401  # its libraries must be in the process for the extension to find them

    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def _without_alignment(_function: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(
            "torchaudio's forced alignment needs its compiled extension, which does not load here."
        )

    return refuse


def works_on(module: torch.nn.Module, device: str) -> None:
    """Make `module.device` say where its work is done.

    Libraries put their inputs there, and take it from the first weight, which may wait in host memory or on
    disk. The module becomes a subclass of its own class, as `torch.distributed.fsdp.fully_shard` does it.
    """
    module.__class__ = _working_on(type(module), device)  # type: ignore[arg-type]  # classes can be hashed


@cache
def _working_on(kind: Any, device: str) -> Any:
    import torch

    return type(kind.__name__, (kind,), {"device": property(lambda _: torch.device(device))})
