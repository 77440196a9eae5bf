"""The queue's promises, over any sequence of visitors, engines and stops."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import BadInput
from core.events import Failed, Finished, Step, Stopped
from core.jobs import Job, Jobs, choose, line_up
from core.requests import Order, SpeechRequest
from core.worker.process import Pulse, RunJob
from tests.support import until

PATIENCE = 4


def order(engine: str = "a") -> Order:
    return Order(engine=engine, request=SpeechRequest(text="hello"), seed=0)


class HandWorker:
    """A worker whose jobs end when the test says so."""

    def __init__(self) -> None:
        self.state = "ready"
        self.pulse: Pulse | None = None
        self.job: str | None = None
        self.engines: list[str] = []

    def start(self, listener) -> None:
        self.listener = listener

    def run(self, message) -> None:
        assert self.job is None
        self.job = message.job
        self.engines.append(message.order.engine)

    def stop(self, job) -> None:
        if job == self.job:
            self.end(Stopped())

    def end(self, event=None) -> None:
        job, self.job = self.job, None
        self.pulse = Pulse("CPU", "cpu", 0, 0, 0, 0, 0, (self.engines[-1],), (), 0, 0, True)
        self.listener(job, event or Failed("enough"))


def queue(
    worker: HandWorker, keep=None, limit: int = 100, folder: Path = Path("/nonexistent"), **more
) -> Jobs:
    return Jobs(
        worker,
        message=lambda job: RunJob(job.id, job.order, job.folder, online=False),
        expect=lambda order: 8.0 if order.engine == "a" else None,
        new_folder=lambda job: folder,
        keep=keep or (lambda job, finished: pytest.fail("nothing was finished")),
        limit=limit,
        **{"patience": PATIENCE} | more,
    )


visits = st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abc")), min_size=1, max_size=40)


@given(visits, st.data())
@settings(max_examples=150, deadline=None)
def test_every_job_ends_once_and_in_its_visitors_own_order(visits, data):
    worker = HandWorker()
    jobs = queue(worker)
    left = list(visits)
    ran: dict[str, list[str]] = {}
    submitted: dict[str, list[str]] = {}
    while left or worker.job:
        if left and (worker.job is None or data.draw(st.booleans())):
            visitor, engine = left.pop(0)
            [job] = jobs.submit([order(engine)], visitor)
            submitted.setdefault(visitor, []).append(job.id)
        else:
            running = next(j for v in "xyz" for j in jobs.of(v) if j.id == worker.job)
            ran.setdefault(running.visitor, []).append(running.id)
            worker.end()
    assert ran == submitted
    assert jobs.waiting == 0


@given(visits)
@settings(max_examples=150, deadline=None)
def test_no_job_is_passed_over_more_often_than_the_patience(visits):
    worker = HandWorker()
    jobs = queue(worker)
    all_jobs = [job for visitor, engine in visits for job in jobs.submit([order(engine)], visitor)]
    while worker.job:
        worker.end()
    assert max(job.passed_over for job in all_jobs) <= PATIENCE


@given(visits)
@settings(max_examples=100, deadline=None)
def test_a_visitor_with_one_job_waits_for_at_most_a_few_turns_whatever_others_queue(visits):
    worker = HandWorker()
    jobs = queue(worker)
    for visitor, engine in visits:
        jobs.submit([order(engine)], visitor)
    [mine] = jobs.submit([order("c")], "newcomer")
    turns = 0
    while not mine.over:
        worker.end()
        turns += 1
    # The running one, one of each other visitor, and the times it may be passed over for the loaded engine.
    assert turns <= 1 + 3 + PATIENCE + 1


def test_two_visitors_alternating_two_engines_switch_less_than_first_come_order():
    worker = HandWorker()
    jobs = queue(worker)
    for turn in range(20):
        jobs.submit([order("ab"[turn % 2])], "x")
        jobs.submit([order("ba"[turn % 2])], "y")
    while worker.job:
        worker.end()
    switches = sum(a != b for a, b in zip(worker.engines, worker.engines[1:], strict=False))
    assert Counter(worker.engines) == {"a": 20, "b": 20}
    assert switches <= 20


def test_visitors_take_turns_the_longest_waiting_first():
    x1, x2, y1, z1 = (Job(name, name[0], order()) for name in ("x1", "x2", "y1", "z1"))
    line = line_up([x1, x2, y1, z1], {"x": 3, "y": 2, "z": 4})
    assert line == [y1, x1, z1, x2]
    assert choose(line, (), PATIENCE) == (y1, [])


def test_a_loaded_engine_goes_before_other_visitors_but_not_before_its_own_visitors_jobs():
    x1, x2, y1, y2 = (Job(*names, order(engine)) for *names, engine in ("1xa", "2xc", "3yb", "4yc"))
    line = line_up([x1, x2, y1, y2], {"x": 0, "y": 1})
    assert choose(line, ("b",), PATIENCE) == (y1, [x1])
    assert choose(line, ("c",), PATIENCE) == (x1, [])


def test_a_stream_of_newcomers_does_not_keep_a_visitor_waiting():
    worker = HandWorker()
    jobs = queue(worker)
    mine = jobs.submit([order()] * 3, "x")
    for turn in range(10):
        jobs.submit([order()], f"newcomer {turn}")
        jobs.submit([order()], f"another {turn}")
        worker.end()
    assert [job.over for job in mine] == [True, True, True]


def test_positions_tell_whose_turn_it_is_and_follow_a_stop():
    jobs = queue(HandWorker())
    jobs.submit([order()], "w")  # runs
    _, x2, x3 = jobs.submit([order()] * 3, "x")
    [y1] = jobs.submit([order()], "y")
    assert (y1.position, x2.position, x3.position) == (1, 2, 3)
    jobs.stop("x", x2.id)
    assert (y1.position, x3.position) == (1, 2)
    assert y1.event.position == 1


def test_a_stop_reaches_only_the_visitors_own_jobs():
    worker = HandWorker()
    jobs = queue(worker)
    [theirs] = jobs.submit([order()], "x")
    [mine, later] = jobs.submit([order(), order()], "y")
    assert jobs.stop("y") == 2
    assert (mine.state, later.state, theirs.state) == ("stopped", "stopped", "loading")
    assert jobs.stop("y", theirs.id) == 0
    with pytest.raises(BadInput):
        jobs.get(theirs.id, "y")
    assert jobs.get(theirs.id, "x") is theirs


def test_stopping_the_running_job_starts_the_next():
    worker = HandWorker()
    jobs = queue(worker)
    [first] = jobs.submit([order()], "x")
    [second] = jobs.submit([order()], "y")
    jobs.stop("x")
    assert first.state == "stopped"
    assert worker.job == second.id


def test_too_many_waiting_jobs_are_refused_whole():
    jobs = queue(HandWorker(), limit=2)
    jobs.submit([order()], "x")  # runs at once
    jobs.submit([order()], "x")
    with pytest.raises(BadInput, match="At most 2 of your jobs may wait at once: 1 waiting, 2 asked for"):
        jobs.submit([order(), order()], "x")
    assert len(jobs.of("x")) == 2
    jobs.submit([order()], "y")


def test_watchers_hear_of_their_own_steps_and_of_every_change_of_the_queue():
    worker = HandWorker()
    jobs = queue(worker)
    heard = Counter()
    undo = jobs.listen("x", lambda: heard.update("x"))
    jobs.listen("x", lambda: heard.update("X"))
    jobs.listen("y", lambda: heard.update("y"))
    [job] = jobs.submit([order()], "x")
    assert heard == {"x": 1, "X": 1, "y": 1}
    worker.listener(job.id, Step(1, 4, "mel", 3.0))
    assert heard == {"x": 2, "X": 2, "y": 1}
    assert (job.state, job.fraction, job.note, job.seconds_left) == ("running", 0.25, "mel", 3.0)
    undo()
    worker.end()
    assert heard == {"x": 2, "X": 3, "y": 2}


def test_a_wait_is_foretold_as_far_as_earlier_takes_tell():
    jobs = queue(HandWorker())
    running, second, third, fourth, fifth = jobs.submit([order(e) for e in "aaaba"], "x")
    assert running.seconds_left == pytest.approx(8, abs=1)
    assert second.event.seconds == pytest.approx(8, abs=1)
    assert third.event.seconds == pytest.approx(16, abs=1)
    assert fourth.event.seconds == pytest.approx(24, abs=1)
    assert fifth.event.seconds is None, "nothing is known of the one before it"
    assert fourth.seconds_left is None


def test_a_take_that_cannot_be_kept_fails_its_job_only(tmp_path):
    def keep(job, finished):
        raise OSError("the disk is on fire")

    worker = HandWorker()
    folder = tmp_path / "partial"
    folder.mkdir()
    jobs = queue(worker, keep, folder=folder)
    [job, later] = jobs.submit([order(), order()], "x")
    worker.end(Finished((), {}, {}))
    assert job.state == "failed" and "the disk is on fire" in job.reason
    assert not folder.exists()
    assert worker.job == later.id


def test_a_job_that_cannot_be_handed_over_fails_alone(monkeypatch):
    worker = HandWorker()
    jobs = queue(worker)
    [first] = jobs.submit([order()], "x")
    [bad, good] = jobs.submit([order("b"), order("c")], "x")
    run = worker.run

    def refuse(message):
        if message.order.engine == "b":
            raise TypeError("cannot pickle it")
        run(message)

    monkeypatch.setattr(worker, "run", refuse)
    worker.end()
    assert first.over and bad.state == "failed" and "cannot pickle it" in bad.reason
    assert worker.job == good.id


def test_no_fault_around_the_queue_stops_it(monkeypatch):
    worker = HandWorker()
    jobs = queue(worker)

    def fault(*_):
        raise RuntimeError("Event loop is closed")

    jobs.listen("x", fault)
    monkeypatch.setattr(jobs, "_expect", fault)
    first, second = jobs.submit([order(), order()], "x")
    assert worker.job == first.id
    worker.end()
    assert worker.job == second.id
    monkeypatch.setattr(jobs, "_new_folder", fault)
    third, fourth = jobs.submit([order(), order()], "x")
    worker.end()
    assert (third.state, fourth.state, jobs.waiting) == ("failed", "failed", 0)


def test_stopping_everything_starts_nothing():
    worker = HandWorker()
    jobs = queue(worker)
    jobs.submit([order()] * 3, "x")
    assert jobs.stop("x") == 3
    assert worker.engines == ["a"] and worker.job is None


def test_old_ended_jobs_are_forgotten():
    worker = HandWorker()
    jobs = queue(worker)
    for _ in range(60):
        jobs.submit([order()], "x")
        worker.end()
    assert len(jobs.of("x")) == 40


# Turns: two visitors, two engines that crowd each other out


def crowded(worker: HandWorker, **more) -> Jobs:
    return queue(worker, crowds_out=lambda order: order.engine not in worker.engines[-1:], **more)


def test_the_engine_of_who_was_just_served_stays_for_their_next_job():
    worker = HandWorker()
    jobs = crowded(worker, turn_seconds=600)
    jobs.submit([order("a")], "x")
    [other] = jobs.submit([order("b")], "y")
    worker.end()
    assert worker.job is None and other.state == "queued", "y waits for what x may ask next"
    [again] = jobs.submit([order("a")], "x")
    assert worker.job == again.id
    jobs.stop("y")


def test_a_turn_ends_by_itself():
    worker = HandWorker()
    jobs = crowded(worker, turn_seconds=0.05)
    jobs.submit([order("a")], "x")
    [other] = jobs.submit([order("b")], "y")
    worker.end()
    until(lambda: worker.job == other.id)


def test_nobody_waits_for_a_turn_where_there_is_room_for_both_or_no_one_else():
    for more, second in (({"turn_seconds": 600.0}, "y"), ({"turn_seconds": 600.0, "crowds_out": bool}, "x")):
        worker = HandWorker()
        jobs = queue(worker, **more)
        jobs.submit([order("a")], "x")
        [other] = jobs.submit([order("b")], second)
        worker.end()
        assert worker.job == other.id


def places(mine: int, yours: int, patience: int) -> tuple[dict[str, int], int]:
    """When each of x's and y's jobs runs, and how often the engine changes."""
    worker = HandWorker()
    jobs = crowded(worker, patience=patience)
    names = {job.id: f"x{n}" for n, job in enumerate(jobs.submit([order("a")] * mine, "x"))}
    names |= {job.id: f"y{n}" for n, job in enumerate(jobs.submit([order("b")] * yours, "y"))}
    found: dict[str, int] = {}
    while worker.job:
        found[names[worker.job]] = len(found)
        worker.end()
    return found, sum(one != other for one, other in pairwise(worker.engines))


@given(st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_two_visitors_with_an_engine_each_are_served_in_runs_and_neither_waits_long(mine, yours):
    fair, often = places(mine, yours, patience=0)
    grouped, seldom = places(mine, yours, PATIENCE)
    assert all(grouped[job] <= fair[job] + PATIENCE for job in fair)
    assert seldom <= often / (PATIENCE + 1) + 2
