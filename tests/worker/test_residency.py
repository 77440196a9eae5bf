"""Leases, eviction and the proof of release, on small real torch modules."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.engines.base import Engine, Placement
from core.worker.arrange import Arrangement
from core.worker.residency import Key, Residency


class Small(Engine):
    closed = False

    def load(self, weights, placement) -> None:
        self.layer = torch.nn.Linear(4, 4)
        self.layer.itself = [self.layer]  # a cycle, as real pipelines have

    def generate(self, request, options, run):
        raise NotImplementedError

    def close(self) -> None:
        type(self).closed = True


def key(name: str, device: str = "cpu") -> Key:
    return Key(name, Path(name), "1", Placement(device))


def make() -> tuple[Engine, Arrangement]:
    engine = Small()
    engine.load(None, Placement())
    return engine, Arrangement(engine.components(), Placement(), frozenset(), Path())


def residency(room: int = 100, told=None, device_used=lambda: None, settle=gc.collect) -> Residency:
    return Residency(lambda device: room, settle, device_used, told or (lambda released: None))


def test_an_engine_is_loaded_once_and_kept():
    keeper, made = residency(), []
    for _ in range(3):
        with keeper.lease(key("a"), 10, lambda: made.append(1) or make()) as resident:
            assert resident.leases == 1
    assert len(made) == 1 and keeper.loaded == ("a",)


def test_the_least_recently_used_goes_first_when_room_is_needed():
    keeper = residency(room=30)
    for name in "abca":
        with keeper.lease(key(name), 10, make):
            pass
    with keeper.lease(key("d"), 10, make):
        assert keeper.loaded == ("d", "a", "c")


def test_a_leased_engine_is_never_evicted():
    keeper = residency(room=10)
    with keeper.lease(key("a"), 10, make), keeper.lease(key("b"), 10, make):
        assert set(keeper.loaded) == {"a", "b"}
        assert keeper.release_all() == []


def test_released_parameters_are_dead_and_the_engine_was_closed():
    told = []
    keeper = residency(told=told.append)
    gc.disable()
    try:
        with keeper.lease(key("a"), 10, make) as resident:
            references = list(resident.parameters)
        del resident
        assert len(references) == 2 and all(reference() is not None for reference in references)
        [released] = keeper.release_all()
    finally:
        gc.enable()
    assert released.clean and released.alive == 0 and told == [released]
    assert all(reference() is None for reference in references)
    assert Small.closed and keeper.loaded == ()


def test_an_engine_that_does_not_close_cleanly_is_released_all_the_same(monkeypatch):
    def fail(self) -> None:
        raise OSError("its folder is gone")

    monkeypatch.setattr(Small, "close", fail)
    keeper = residency()
    with keeper.lease(key("a"), 10, make):
        pass
    [released] = keeper.release_all()
    assert released.clean and keeper.loaded == ()


def test_a_parameter_that_something_still_holds_is_told():
    keeper = residency()
    with keeper.lease(key("a"), 10, make) as resident:
        held = resident.engine.layer.weight
    del resident
    [released] = keeper.release_all()
    assert not released.clean and released.alive == 1
    assert held is not None


def test_device_memory_that_stays_is_told():
    used = iter([1000, 1000 + 5 * 2**20])
    keeper = residency(device_used=lambda: next(used))
    with keeper.lease(key("a"), 10, make):
        pass
    [released] = keeper.release_all()
    assert not released.clean and released.device_bytes_left == 5 * 2**20


def test_a_load_that_fails_leaves_nothing():
    keeper = residency()

    def fail() -> tuple[Engine, Arrangement]:
        raise ValueError("truncated")

    with pytest.raises(ValueError, match="truncated"), keeper.lease(key("a"), 10, fail):
        pass
    assert keeper.loaded == () and keeper.held == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 40)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_sequence_of_leases_exceeds_the_room_with_more_than_the_one_in_use(sequence):
    keeper = residency(room=50, settle=lambda: None)
    sizes: dict[str, int] = {}
    for name, size in sequence:
        size = sizes.setdefault(name, size)
        with keeper.lease(key(name), size, make):
            assert keeper.held <= 50
            assert keeper.loaded[0] == name or name in keeper.loaded
    assert keeper.held == sum(sizes[name] for name in keeper.loaded)
