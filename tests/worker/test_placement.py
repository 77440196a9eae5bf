"""The ladder of placements: what fits, in which order, and what is said where nothing does."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.catalog import Catalog
from core.engines.base import Placement
from core.errors import DoesNotFit
from core.worker.footprint import Component, Footprint
from core.worker.placement import DOCUMENT, Demand, Room, as_markdown, in_words, ladder, plan

GIB = 2**30
ALL = ("resident", "model_offload", "group_block", "group_leaf", "device_map", "cpu")
card = (
    Catalog(("tests.unruly",))
    .card("unruly")
    .model_copy(update={"strategies": ALL, "gpu_dtype": "float16", "whole": frozenset({"codec"})})
)

# In float16: an encoder of 4 GiB, a transformer of 10 GiB in 40 blocks, a codec of 0.5 GiB.
encoder = Component("encoder", floats=2 * GIB, block=GIB // 5, leaf=GIB // 20, largest=GIB // 12)
transformer = Component(
    "transformer", floats=5 * GIB, linear=4 * GIB, block=GIB // 2, leaf=GIB // 8, largest=GIB // 8
)
codec = Component("codec", floats=GIB // 4, whole=True)
video = Footprint((encoder, transformer, codec))


def demand(working: int = GIB, **changes) -> Demand:
    return Demand(card.model_copy(update=changes), video, working)


def room(gib: float, ram: float = 64, device: str = "cuda", disk: float = 500) -> Room:
    return Room(device, int(gib * GIB), int(ram * GIB), int(disk * GIB))


@pytest.mark.parametrize(
    ("gib", "strategy"),
    [(16, "resident"), (12, "model_offload"), (3, "group_block"), (2, "group_leaf"), (1, "cpu")],
)
def test_the_smaller_the_card_the_further_down_the_ladder(gib, strategy):
    assert plan(demand(), room(gib)).placement.strategy == strategy


def test_weights_in_int8_come_before_streaming_where_the_card_allows_them():
    assert plan(demand(), room(10.8)).placement.strategy == "group_block"
    rung = plan(demand(quantisations=("int8",)), room(11.9, ram=3))
    assert rung.placement == Placement("cuda", "float16", "resident", "int8")
    assert rung.device_bytes == int(11.5 * GIB)


def test_what_host_memory_cannot_hold_goes_to_the_disk():
    rung = plan(demand(), room(6, ram=2))
    assert rung.placement.strategy == "device_map"
    assert rung.disk_bytes == video.bytes("float16") - GIB // 2 - rung.placement.device_share - 2 * GIB
    assert rung.device_bytes == 6 * GIB and rung.ram_bytes == 2 * GIB


def test_a_disk_without_room_is_no_way_out():
    with pytest.raises(DoesNotFit):
        plan(demand(), room(6, ram=2, disk=1))


def test_on_a_cpu_it_is_resident_or_partly_on_disk():
    assert plan(demand(), room(64, device="cpu")).placement == Placement("cpu", "float32", "resident")
    rung = plan(demand(), room(8, device="cpu"))
    assert rung.placement.strategy == "device_map" and rung.placement.ram_share == 0
    assert rung.device_bytes == 8 * GIB


def test_an_engine_is_not_run_in_ways_that_its_card_does_not_allow():
    rungs = ladder(demand(strategies=("resident", "cpu")), room(1))
    assert [rung.placement.strategy for rung in rungs] == ["resident", "cpu"]


def test_what_cannot_be_taken_apart_is_never_streamed_or_spread():
    alone = Demand(card, Footprint((codec,)), GIB)
    assert [rung.placement.strategy for rung in ladder(alone, room(1))] == ["resident", "cpu"]


def test_what_fits_nowhere_is_refused_with_what_would_be_needed():
    with pytest.raises(
        DoesNotFit,
        match=r"Unruly needs about 15\.5 GiB, or with device map 1\.8 GiB on the device, 1\.0 GiB of RAM "
        r"and 13\.0 GiB of disk, and 1\.5 GiB can be had",
    ):
        plan(demand(), room(1.5, ram=1, disk=0))


def test_a_forced_strategy_is_taken_or_refused():
    assert plan(demand(), room(80), forced="group_leaf").placement.strategy == "group_leaf"
    with pytest.raises(DoesNotFit, match="Unruly cannot be run as group offload, layer by layer here"):
        plan(demand(strategies=("resident",)), room(80), forced="group_leaf")


def test_after_a_failure_only_what_stands_further_down_is_tried():
    seen = []
    placement = plan(demand(quantisations=("int8",)), room(80)).placement
    while True:
        seen.append(placement.quantisation or placement.strategy)
        try:
            placement = plan(demand(quantisations=("int8",)), room(80), after=placement).placement
        except DoesNotFit:
            break
    assert seen == ["resident", "model_offload", "int8", "group_block", "group_leaf", "device_map", "cpu"]


@given(
    st.floats(0.1, 100), st.floats(0.1, 100), st.floats(0, 100), st.sampled_from(["cuda", "cpu"]),
    st.floats(0, 8), st.sets(st.sampled_from(ALL), min_size=1),
)  # fmt: skip
def test_a_plan_never_takes_more_than_there_is(gib, ram, disk, device, working, strategies):
    there = room(gib, ram, device, disk)
    wanted = demand(int(working * GIB), strategies=tuple(strategies))
    try:
        rung = plan(wanted, there)
    except DoesNotFit as error:
        assert str(error)
        return
    assert rung.device_bytes <= there.device_bytes and rung.disk_bytes <= there.disk_bytes
    assert rung.ram_bytes <= (there.ram_bytes if device == "cuda" else there.device_bytes)
    if rung.placement.strategy == "device_map":
        kept = rung.placement.device_share + rung.placement.ram_share + rung.disk_bytes
        assert kept + GIB // 4 * (2 if device == "cuda" else 4) == video.bytes(rung.placement.dtype)


@given(st.floats(1, 40), st.floats(0.5, 40))
def test_more_room_never_means_a_slower_way(gib, more):
    def height(there: Room) -> int:
        try:
            return ALL.index(plan(demand(), there).placement.strategy)
        except DoesNotFit:
            return len(ALL)

    assert height(room(gib + more)) <= height(room(gib))


def test_a_placement_is_told_in_words():
    words = {r.placement.strategy: in_words(r.placement, video) for r in ladder(demand(), room(8, ram=4))}
    assert words["resident"] == "all on the GPU"
    assert words["model_offload"] == "encoder, transformer and codec take turns on the GPU"
    assert (
        words["group_block"]
        == "encoder and transformer brought to the GPU block by block; codec stays on the GPU"
    )
    assert words["cpu"] == "all in RAM, the work is done by the CPU"
    assert "of encoder and transformer on the GPU, the rest in RAM and disk" in words["device_map"]


def test_a_placement_can_be_kept_as_text():
    kept = json.loads(json.dumps(plan(demand(), room(12)).placement.record))
    assert kept == {"device": "cuda", "dtype": "float16", "strategy": "model_offload"}


def test_the_table_in_the_documents_is_what_is_planned():
    assert DOCUMENT.read_text("utf-8") == as_markdown(Catalog()), "run python -m core.worker.placement"
