"""Leases, parking, eviction and the proof of release, on small real torch modules."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from core.engines.base import Engine, Placement
from core.worker.arrange import Arrangement
from core.worker.residency import Bytes, Claim, Key, Limits, NoRoom, Residency, Speed, worth


class Small(Engine):
    closed = 0

    def load(self, weights, placement) -> None:
        self.layer = torch.nn.Linear(4, 4)

    def generate(self, request, options, run):
        raise NotImplementedError

    def close(self) -> None:
        Small.closed += 1


class Stubborn(Arrangement):
    """Fails where it is told to."""

    fails = ""

    def park(self) -> None:
        super().park()
        if self.fails == "park":
            raise RuntimeError("out of pinned memory")

    def unpark(self) -> None:
        super().unpark()
        if self.fails == "unpark":
            raise torch.OutOfMemoryError("CUDA out of memory")

    def rest(self) -> None:
        super().rest()
        if self.fails == "rest":
            raise RuntimeError("CUDA error: unspecified launch failure")


RESIDENT, SPREAD = Placement(), Placement(strategy="device_map")  # the second cannot be parked


def make(placement: Placement = RESIDENT) -> tuple[Engine, Stubborn]:
    engine = Small()
    engine.load(None, placement)
    if placement.strategy == "resident":
        return engine, Stubborn(engine.components(), placement, frozenset(), Path())
    arrangement = Stubborn({}, RESIDENT, frozenset(), Path())
    arrangement.placement = placement
    return engine, arrangement


def key(name: str) -> Key:
    return Key(name, Path(name), "1")


def claim(size: int, working: int = 0) -> Claim:
    return Claim(Bytes(size + working), Bytes(size), parked=Bytes(0, size))


class Keeper(Residency):
    """With a clock that a test turns, and limits of its own."""

    def __init__(
        self, device: int = 100, ram: int = 0, device_used=lambda: None, settle=lambda: None, **limits
    ) -> None:
        self.now = 0.0
        self.released = []
        self.limits = Limits(device, ram, **limits)
        super().__init__(settle, lambda: None, device_used, self.released.append, lambda: self.now)

    def hold(self, name: str, size: int | Claim = 10, made=make, placement=RESIDENT, seconds=1.0):
        """A lease; a load takes so many seconds."""
        self.now += 1
        wanted = size if isinstance(size, Claim) else claim(size)

        def load():
            self.now += seconds
            return made()

        return self.lease(key(name), placement, wanted, self.limits, load)

    def visit(self, *names: str, **given) -> None:
        for name in names:
            with self.hold(name, **given):
                pass

    def states(self) -> dict[str, str]:
        return {held.engine: held.state for held in self.inventory()}


def failing(error: BaseException):
    def fail():
        raise error

    return fail


def test_an_engine_is_loaded_once_and_kept():
    keeper, made = Keeper(), []
    for _ in range(3):
        with keeper.hold("a", made=lambda: made.append(1) or make()) as resident:
            assert resident.leases == 1 and keeper.states() == {"a": "in use"}
    assert len(made) == 1 and keeper.loaded == ("a",)


def test_several_stay_on_the_device_while_they_fit():
    keeper = Keeper(device=30)
    keeper.visit("a", "b", "c")
    assert keeper.loaded == ("c", "b", "a") and keeper.held == Bytes(30)


def test_where_coming_back_costs_the_same_the_least_recently_used_goes_first():
    keeper = Keeper(device=30)
    keeper.visit("a", "b", "c", "a", "d")
    assert keeper.loaded == ("d", "a", "c")


def test_only_the_one_at_work_takes_working_memory():
    keeper = Keeper(device=25)
    with keeper.hold("a", claim(10, working=5)):
        assert keeper.held == Bytes(15)
    assert keeper.held == Bytes(10)
    with keeper.hold("b", claim(10, working=5)):
        assert keeper.held == Bytes(25) and set(keeper.loaded) == {"a", "b"}
        assert keeper.resting == Bytes(20) and keeper.leased == Bytes(15)
    with keeper.hold("a", claim(10, working=15)):
        assert keeper.loaded == ("a",), "a job that needs more sends the other away"


def test_what_is_evicted_is_parked_while_host_memory_has_room():
    keeper = Keeper(device=10, ram=20)
    keeper.visit("a", "b", "c")
    assert keeper.states() == {"c": "loaded", "b": "parked", "a": "parked"}
    assert keeper.held == Bytes(10, 20) and not keeper.released
    keeper.visit("d")
    assert keeper.states() == {"d": "loaded", "c": "parked", "b": "parked"}
    assert [released.engine for released in keeper.released] == ["a"]


def test_a_parked_engine_comes_back_without_being_loaded():
    keeper, made = Keeper(device=10, ram=20), []

    def noting(name: str):
        return lambda: made.append(name) or make()

    for name in "aba":
        with keeper.hold(name, made=noting(name)) as resident:
            assert all(p.is_inference() is False for p in resident.engine.layer.parameters())
    assert made == ["a", "b"] and keeper.states() == {"a": "loaded", "b": "parked"}
    assert keeper.parked == ("b",) and keeper.loaded == ("a",)
    [a, b] = keeper.inventory()
    assert (a.device_bytes, a.ram_bytes, b.device_bytes, b.ram_bytes) == (10, 0, 0, 10)


def test_what_cannot_be_parked_is_let_go():
    keeper = Keeper(device=10, ram=100)
    keeper.visit("a", placement=SPREAD, made=lambda: make(SPREAD))
    keeper.visit("b")
    assert keeper.states() == {"b": "loaded"}


def test_where_parking_saves_nothing_engines_are_let_go():
    keeper = Keeper(device=10, ram=100, both=100, parking=False)
    keeper.visit("a", "b")
    assert keeper.states() == {"b": "loaded"}


def test_one_memory_for_both_is_never_passed_though_each_pool_has_room():
    keeper = Keeper(device=20, ram=20, both=30)
    keeper.visit("a", "b", "c", "d")
    assert keeper.held.both == 30 and keeper.held.device == 20
    keeper.visit("a", "b", "c", "d")
    assert keeper.held.both == 30


def test_parking_does_not_send_away_what_took_longer_to_load():
    keeper = Keeper(device=10, ram=10)
    keeper.visit("slow", seconds=50)
    keeper.visit("b", "c")  # b, quick to load again, has to go when c comes
    assert keeper.states() == {"c": "loaded", "slow": "parked"}
    assert [released.engine for released in keeper.released] == ["b"]


def test_a_claim_on_host_memory_sends_parked_ones_away():
    keeper = Keeper(device=10, ram=15)
    keeper.visit("a", "b")
    with keeper.hold("c", Claim(Bytes(2, 12), Bytes(0, 12), Bytes(0, 12))):
        assert keeper.held.ram <= 15 and "a" not in keeper.states()


def test_another_placement_replaces_the_engine_and_the_same_keeps_it():
    keeper, made = Keeper(device=10), []

    def spread():
        made.append(keeper.held)
        return make(SPREAD)

    keeper.visit("a")
    keeper.visit("a", placement=SPREAD, made=spread)
    assert made == [Bytes()], "the old one was not let go first"
    keeper.visit("a", placement=SPREAD, made=spread)
    assert len(made) == 1 and keeper.placement(key("a")) == SPREAD


def test_a_leased_engine_is_never_evicted():
    keeper = Keeper(device=10)
    with keeper.hold("a"):
        with pytest.raises(NoRoom), keeper.hold("b"):
            pass
        assert keeper.release_all() == [] and keeper.states() == {"a": "in use"}
        keeper.leave_device(keeper.limits)
        keeper.now += 1e9
        keeper.age(keeper.limits, 1, 2)
        keeper.fit(Limits(0, 0))
        with keeper.hold("a", placement=SPREAD) as again:
            assert again.placement == RESIDENT, "it is shared as it is"
        assert keeper.states() == {"a": "in use"}


def test_an_engine_without_weights_sends_nobody_away():
    keeper = Keeper()
    keeper.visit("a")
    with keeper.lease(key("espeak"), RESIDENT, Claim(), Limits(0, 0), make):
        assert set(keeper.loaded) == {"espeak", "a"}


def test_leaving_gives_the_device_back_and_not_host_memory():
    keeper = Keeper(device=30, ram=15)
    keeper.visit("a", "b")
    keeper.leave_device(keeper.limits, "b")
    assert keeper.states() == {"a": "loaded", "b": "parked"}
    keeper.leave_device(keeper.limits)
    assert keeper.held.device == 0 and keeper.held.ram <= 15


def test_idle_engines_leave_the_device_first_and_host_memory_later():
    keeper = Keeper(device=30, ram=30)
    keeper.visit("a")
    keeper.now += 5
    keeper.visit("b")
    keeper.now += 6
    keeper.age(keeper.limits, 10, 20)
    assert keeper.states() == {"a": "parked", "b": "loaded"}
    keeper.now += 10
    keeper.age(keeper.limits, 10, 20)
    assert keeper.states() == {"b": "parked"}


def test_a_smaller_budget_holds_at_once():
    keeper = Keeper(device=30, ram=30)
    keeper.visit("a", "b", "c")
    keeper.fit(Limits(20, 30))
    assert keeper.states() == {"c": "loaded", "b": "loaded", "a": "parked"}
    keeper.fit(Limits(5, 12))
    assert keeper.held.device == 0 and keeper.held.ram <= 12


def test_released_parameters_are_dead_and_the_engine_was_closed():
    keeper, before = Keeper(settle=gc.collect), Small.closed
    gc.disable()
    try:
        with keeper.hold("a") as resident:
            resident.engine.layer.itself = [resident.engine.layer]  # a cycle, as real pipelines have
            references = list(resident.parameters)
        del resident
        assert len(references) == 2 and all(reference() is not None for reference in references)
        [released] = keeper.release_all()
    finally:
        gc.enable()
    assert released.clean and released.alive == 0 and keeper.released == [released]
    assert released.holders == ()
    assert all(reference() is None for reference in references)
    assert Small.closed == before + 1 and keeper.loaded == ()


def test_an_engine_that_does_not_close_cleanly_is_released_all_the_same(monkeypatch):
    monkeypatch.setattr(Small, "close", failing(OSError("its folder is gone")))
    keeper = Keeper()
    keeper.visit("a")
    [released] = keeper.release_all()
    assert released.clean and keeper.loaded == ()


KEPT = []


def test_a_parameter_that_something_still_holds_is_told_with_its_holder(caplog):
    keeper = Keeper()
    with keeper.hold("a") as resident:
        KEPT.append({"cache": resident.engine.layer})
    del resident
    try:
        [released] = keeper.release_all()
    finally:
        KEPT.clear()
    assert not released.clean and released.alive == 2
    assert any(f"Linear < list < {__name__}.KEPT" in line for line in released.holders), released.holders
    assert f"{__name__}.KEPT" in caplog.text


def test_device_memory_that_stays_is_told():
    used = [1000]
    keeper = Keeper(device_used=lambda: used[0])
    keeper.visit("a")
    used[0] += 5 * 2**20
    [released] = keeper.release_all()
    assert not released.clean and released.device_bytes_left == 5 * 2**20


@pytest.mark.parametrize("left", [0, 4 * 2**20])
def test_a_release_beside_others_is_measured_by_what_it_took(left):
    used = [0]

    def take(size: int):
        def made():
            used[0] += size
            return make()

        return made

    keeper = Keeper(device_used=lambda: used[0])
    keeper.visit("a", made=take(10 * 2**20))
    keeper.visit("b", made=take(20 * 2**20))
    give_back = 10 * 2**20 - left

    def settle() -> None:
        used[0] -= give_back

    keeper._settle = settle
    [released] = keeper.release_all("a")
    assert released.device_bytes_left == left and released.clean is not bool(left)


def test_parking_that_does_not_give_the_device_back_becomes_a_release(caplog):
    used = [0]
    keeper = Keeper(device=10, ram=10, device_used=lambda: used[0])
    with keeper.hold("a"):
        used[0] = 5 * 2**20  # a library's cache, which stays
    keeper.leave_device(keeper.limits)
    assert keeper.states() == {} and "when it was parked" in caplog.text
    assert not keeper.released[-1].clean


def test_garbage_of_the_last_job_is_no_reason_against_parking():
    used = [0]
    keeper = Keeper(10, 10, device_used=lambda: used[0], settle=lambda: used.__setitem__(0, 0))
    with keeper.hold("a"):
        used[0] = 5 * 2**20
    keeper.leave_device(keeper.limits)
    assert keeper.states() == {"a": "parked"}


@pytest.mark.parametrize("error", [ValueError("truncated"), KeyboardInterrupt()])
def test_a_load_that_fails_leaves_nothing(error):
    keeper = Keeper()
    with pytest.raises(type(error)), keeper.hold("a", made=failing(error)):
        pass
    assert keeper.loaded == () and keeper.held == Bytes()
    keeper.visit("a")


def test_an_engine_that_cannot_be_parked_after_all_is_let_go():
    keeper = Keeper(device=10, ram=10)
    with keeper.hold("a") as resident:
        resident.arrangement.fails = "park"
    del resident
    keeper.visit("b")
    assert keeper.states() == {"b": "loaded"} and keeper.released[-1].clean


def test_an_engine_that_cannot_come_back_is_let_go_and_loaded_by_the_next():
    keeper = Keeper(device=10, ram=20)
    with keeper.hold("a") as resident:
        resident.arrangement.fails = "unpark"
    del resident
    keeper.visit("b")
    with pytest.raises(torch.OutOfMemoryError), keeper.hold("a"):
        pass
    assert keeper.states() == {"b": "parked"} and keeper.released[-1].clean
    keeper.visit("a")
    assert keeper.states() == {"a": "loaded", "b": "parked"}


def test_an_engine_that_finds_no_rest_is_let_go():
    keeper = Keeper()
    with keeper.hold("a") as resident:
        resident.arrangement.fails = "rest"
    del resident
    assert keeper.states() == {} and keeper.released[-1].clean


def test_two_threads_that_send_each_other_away_both_come_through():
    keeper = Keeper(device=10, ram=10)
    done = Counter()

    def visit(name: str) -> None:
        while done[name] < 8:
            with suppress(NoRoom), keeper.lease(key(name), RESIDENT, claim(10), keeper.limits, make):
                done[name] += 1
            time.sleep(0)  # NoRoom while the other is at work
            keeper.inventory()

    threads = [threading.Thread(target=visit, args=(name,), daemon=True) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == {"a": 8, "b": 8}
    assert keeper.held.device <= 10 and keeper.held.ram <= 10


positive = st.floats(1e-2, 1e6)
sizes = st.integers(1, 2**40)


@given(positive, sizes, positive, st.floats(1.01, 100))
def test_worth_rises_with_the_cost_and_falls_with_size_and_rest(seconds, size, idle, more):
    base = worth(seconds, size, idle)
    assert worth(seconds * more, size, idle) > base
    assert worth(seconds, int(size * more) + 1, idle) < base
    assert worth(seconds, size, idle * more) < base
    assert worth(seconds * more, size, idle * more) == pytest.approx(base)


@given(st.lists(st.tuples(sizes, positive), min_size=2, unique_by=lambda pair: pair[1]), positive)
def test_with_one_speed_for_all_the_least_recently_used_is_worth_the_least(residents, speed):
    order = sorted(residents, key=lambda pair: worth(pair[0] / speed, *pair))
    idles = [idle for _, idle in order]
    assert all(a >= b or a == pytest.approx(b) for a, b in pairwise(idles))


def test_a_speed_follows_what_is_measured():
    speed = Speed(100.0)
    assert speed.seconds(200) == 2.0
    for _ in range(20):
        speed.note(1000, 1.0)
    assert speed.seconds(1000) == pytest.approx(1.0, rel=0.01)


NAMES = st.sampled_from("abcde")
SIZES = {"a": 10, "b": 20, "c": 30, "d": 45, "e": 15}


class Sequences(RuleBasedStateMachine):
    """Whatever happens in whatever order, no pool is overfull, and nobody at work is disturbed."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.keeper = Keeper(device=60, ram=50, both=100)
        self.stacks: dict[int, tuple[ExitStack, str, object]] = {}
        self.loads, self.count = Counter(), 0

    def _made(self, name: str, placement: Placement, fails: str):
        def made():
            engine, arrangement = make(placement)
            arrangement.fails = fails
            self.loads[name] += 1
            return engine, arrangement

        return made

    def _claim(self, name: str, working: int, *, offloaded: bool) -> Claim:
        size = SIZES[name]
        if offloaded:
            return Claim(Bytes(size // 2 + working, size), Bytes(0, size), Bytes(0, size))
        return claim(size, working)

    @rule(
        target=leases,
        name=NAMES,
        working=st.integers(0, 20),
        offloaded=st.booleans(),
        placement=st.sampled_from([RESIDENT, SPREAD]),
        fails=st.sampled_from(["", "", "", "park", "unpark", "rest"]),
    )
    def lease(self, name, working, offloaded, placement, fails):
        self.count += 1
        stack = ExitStack()
        wanted = self._claim(name, working, offloaded=offloaded and placement is RESIDENT)
        before = self.keeper.leased
        try:
            held = self.keeper.hold(name, wanted, self._made(name, placement, fails), placement)
            resident = stack.enter_context(held)
        except torch.OutOfMemoryError:
            assert key(name) not in self.keeper._residents
            return self.count
        except NoRoom:
            over, limits = before + wanted.busy, self.keeper.limits
            assert over.device > limits.device or over.ram > limits.ram or over.both > limits.both
            return self.count
        self.stacks[self.count] = stack, name, resident.engine
        return self.count

    @rule(lease=consumes(leases), cancelled=st.booleans())
    def end(self, lease, cancelled):
        stack, _, _ = self.stacks.pop(lease, (ExitStack(), "", None))
        if cancelled:
            with suppress(KeyboardInterrupt), stack:
                raise KeyboardInterrupt
        stack.close()

    @rule(name=NAMES)
    def load_that_fails(self, name):
        if key(name) in self.keeper._residents:
            return
        with (
            pytest.raises((ValueError, NoRoom)),
            self.keeper.hold(name, claim(SIZES[name]), failing(ValueError("truncated"))),
        ):
            pass

    @rule(name=st.sampled_from(["", *SIZES]))
    def unload(self, name):
        self.keeper.release_all(name)
        assert not self.leaseless(name)

    @rule(name=st.sampled_from(["", *SIZES]))
    def leave(self, name):
        self.keeper.leave_device(self.keeper.limits, name)
        assert not [held for held in self.leaseless(name) if held.device_bytes]

    @rule(seconds=st.floats(0, 30))
    def rest_a_while(self, seconds):
        self.keeper.now += seconds
        self.keeper.age(self.keeper.limits, 10, 20)
        assert all(held.idle_seconds < 20 for held in self.keeper.inventory())
        assert all(held.idle_seconds < 10 for held in self.leaseless("") if held.device_bytes)

    @precondition(lambda self: not self.stacks)  # the worker takes it up between jobs
    @rule(device=st.integers(0, 80), ram=st.integers(0, 80), both=st.integers(0, 120))
    def budget(self, device, ram, both):
        self.keeper.limits = Limits(device, ram, both=both)
        self.keeper.fit(self.keeper.limits)

    def leaseless(self, name: str):
        return [h for h in self.keeper.inventory() if h.state != "in use" and name in ("", h.engine)]

    @invariant()
    def within_the_limits(self):
        held, limits = self.keeper.held, self.keeper.limits
        assert held.device <= limits.device and held.ram <= limits.ram and held.both <= limits.both

    @invariant()
    def whoever_is_at_work_keeps_its_engine(self):
        for _, name, engine in self.stacks.values():
            resident = self.keeper._residents[key(name)]
            assert resident.engine is engine and resident.leases and not resident.parked
            assert vars(engine), "it was let go"

    @invariant()
    def the_inventory_is_right(self):
        inventory = self.keeper.inventory()
        assert {h.engine for h in inventory if h.state == "parked"} == set(self.keeper.parked)
        assert {h.engine for h in inventory if h.state != "parked"} == set(self.keeper.loaded)
        assert {h.engine for h in inventory if h.state == "in use"} == {n for _, n, _ in self.stacks.values()}
        assert sum(h.device_bytes for h in inventory) == self.keeper.held.device
        assert sum(h.ram_bytes for h in inventory) == self.keeper.held.ram

    @invariant()
    def every_load_is_released_once(self):
        released = Counter(r.engine for r in self.keeper.released)
        present = Counter(h.engine for h in self.keeper.inventory())
        assert released + present == self.loads
        assert all(r.clean for r in self.keeper.released)

    def teardown(self):
        for stack, _, _ in self.stacks.values():
            stack.close()
        self.keeper.release_all()
        assert Counter(r.engine for r in self.keeper.released) == self.loads


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
