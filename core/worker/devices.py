"""Which device there is, and how much memory is used: now, at the peak, in all. Bytes throughout."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from functools import cache
from pathlib import Path

import psutil

from core.errors import BadInput

_PROC = Path("/proc/self")


def ram_used() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def ram_total() -> int:
    """Memory of the machine, or of the container where that is less (cgroup v2)."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def ram_available() -> int:
    return min(int(psutil.virtual_memory().available), max(0, ram_total() - ram_used()))


def reset_ram_peak() -> bool:
    """Start a new high-water mark of resident memory; False where there is none (proc(5): clear_refs)."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def ram_peak() -> int | None:
    """Highest resident memory since `reset_ram_peak`; None where the system cannot tell."""
    try:
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Device:
    """The device that models run on: its name and its memory.

    Args:
        wanted: auto, cpu, cuda, cuda:N or mps.
        threads: CPU threads of a model.
    """

    def __init__(self, wanted: str, threads: int) -> None:
        # The thread pools of torch, OpenMP and MKL are sized when first used.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        import torch

        from core.engines.quirks import mend_torchaudio

        mend_torchaudio()
        torch.set_num_threads(threads)
        self._torch = torch
        self.name = self._pick(wanted)
        if self.is_cuda:
            torch.cuda.init()

    def _pick(self, wanted: str) -> str:
        torch = self._torch
        if wanted == "auto":
            if torch.cuda.is_available():
                return "cuda"
            return "mps" if torch.backends.mps.is_available() else "cpu"
        kind, _, index = wanted.partition(":")
        there = {
            "cpu": True,
            "cuda": torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count(),
            "mps": torch.backends.mps.is_available(),
        }
        if not there.get(kind, False):
            raise BadInput(f"There is no device {wanted!r} here; use auto or cpu.")
        return wanted

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")

    @property
    def title(self) -> str:
        """A name for people."""
        if self.is_cuda:
            return str(self._torch.cuda.get_device_name(self.name))
        return "Apple GPU" if self.name == "mps" else "CPU"

    def used(self) -> int:
        """Bytes held by tensors on the device; on the CPU, resident memory."""
        if self.is_cuda:
            return int(self._torch.cuda.memory_allocated(self.name))
        if self.name == "mps":
            return int(self._torch.mps.current_allocated_memory())
        return ram_used()

    def total(self) -> int:
        if self.is_cuda:
            return int(self._torch.cuda.mem_get_info(self.name)[1])
        return ram_total()

    def free(self) -> int:
        """Bytes that can still be taken; blocks that the allocator caches count as free."""
        if self.is_cuda:
            cached = self._torch.cuda.memory_reserved(self.name) - self._torch.cuda.memory_allocated(
                self.name
            )
            return int(self._torch.cuda.mem_get_info(self.name)[0] + cached)
        return ram_available()

    def limit(self, budget: int | None) -> None:
        """Let this process take no more than a budget, as if the card were that small."""
        if self.is_cuda:
            share = 1.0 if budget is None else min(1.0, budget / self.total())
            self._torch.cuda.set_per_process_memory_fraction(share, self.name)

    def wait(self) -> None:
        """Until all that was asked of it is done."""
        if self.is_cuda:
            self._torch.cuda.synchronize(self.name)

    def reset_peak(self) -> None:
        reset_ram_peak()
        if self.is_cuda:
            self._torch.cuda.reset_peak_memory_stats(self.name)

    def peak(self) -> int | None:
        """Highest use since `reset_peak`; None where nothing tells."""
        if self.is_cuda:
            return int(self._torch.cuda.max_memory_allocated(self.name))
        return None if self.name == "mps" else ram_peak()

    def settle(self) -> None:
        """Give freed memory back: first the garbage, then the allocators' caches."""
        gc.collect()
        self.trim()

    def trim(self) -> None:
        """Give the allocators' caches back."""
        if self.is_cuda:
            self._torch.cuda.synchronize(self.name)
            # The work space that cuBLAS keeps would look like something an engine left.
            if clear := getattr(self._torch._C, "_cuda_clearCublasWorkspaces", None):
                clear()
            self._torch.cuda.empty_cache()
            self._torch.accelerator.empty_host_cache()  # of pinned memory
        elif self.name == "mps":
            self._torch.mps.empty_cache()
        if trim := _malloc_trim():
            trim(0)
