"""Where an engine's components go. The first rungs of the ladder: resident on the device, else on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from core.card import Card
from core.engines.base import Placement
from core.errors import DoesNotFit

# Room for activations and the allocator's slack beside the weights; later taken from measured peaks.
WORKING_SHARE = 0.25


@dataclass(frozen=True)
class Room:
    """What can be had, in bytes: on the device, and in host memory. They are the same on a CPU."""

    device: str  # "cpu", "cuda", ...
    device_bytes: int
    ram_bytes: int


def needed(weight_bytes: int) -> int:
    """Bytes that an engine takes, from the bytes of its files."""
    return int(weight_bytes * (1 + WORKING_SHARE))


def plan(card: Card, weight_bytes: int, room: Room) -> Placement:
    """Choose device and dtype for an engine.

    Args:
        weight_bytes: size of the checkpoint's files.
        room: what could be had if every engine without a lease were evicted.

    Raises:
        DoesNotFit: neither the device nor host memory is large enough; says what would be.
    """
    need = needed(weight_bytes)
    if need <= room.device_bytes:
        dtype = "float32" if room.device == "cpu" else card.gpu_dtype
        return Placement(room.device, dtype, "resident")
    if room.device != "cpu" and need <= room.ram_bytes:
        return Placement("cpu", "float32", "cpu")
    most = room.device_bytes if room.device == "cpu" else max(room.device_bytes, room.ram_bytes)
    raise DoesNotFit(
        f"{card.name} needs about {_size(need)}, and {_size(most)} can be had; "
        "choose a smaller checkpoint or raise the memory budget."
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
