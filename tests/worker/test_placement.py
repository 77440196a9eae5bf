"""The first rungs of the ladder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.catalog import Catalog
from core.engines.base import Placement
from core.errors import DoesNotFit
from core.worker.placement import Room, needed, plan

GIB = 2**30
card = Catalog(("tests.unruly",)).card("unruly")
half = card.model_copy(update={"gpu_dtype": "float16"})


def room(device: str = "cuda", device_bytes: int = 8 * GIB, ram_bytes: int = 16 * GIB) -> Room:
    return Room(device, device_bytes, ram_bytes)


def test_what_fits_is_resident_in_the_cards_precision():
    assert plan(card, GIB, room()) == Placement("cuda", "float32", "resident")
    assert plan(half, GIB, room()) == Placement("cuda", "float16", "resident")
    assert plan(half, GIB, room("cpu")) == Placement("cpu", "float32", "resident")


def test_what_does_not_fit_the_gpu_runs_on_the_cpu():
    assert plan(half, 10 * GIB, room()) == Placement("cpu", "float32", "cpu")


def test_what_fits_nowhere_is_refused_with_the_need():
    with pytest.raises(DoesNotFit, match=r"needs about 37\.5 GiB, and 16\.0 GiB can be had"):
        plan(card, 30 * GIB, room())


@given(st.integers(0, 40 * GIB), st.integers(0, 40 * GIB), st.integers(0, 40 * GIB))
def test_a_plan_never_exceeds_what_its_device_has(size, device_bytes, ram_bytes):
    try:
        placement = plan(card, size, room("cuda", device_bytes, ram_bytes))
    except DoesNotFit:
        assert needed(size) > max(device_bytes, ram_bytes)
    else:
        assert needed(size) <= (device_bytes if placement.device == "cuda" else ram_bytes)
