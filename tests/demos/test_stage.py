from datetime import UTC, datetime, timedelta
from typing import Any

from core.card import Modality
from core.jobs import Job
from core.requests import Order, SpeechRequest
from core.takes import Take
from demos.stage import stage, verdict

START = datetime(2026, 1, 1, tzinfo=UTC)


def order(engine: str, group: str) -> Order:
    return Order(engine=engine, request=SpeechRequest(text="Hello."), seed=1, group=group)


def take(engine: str, group: str, minute: int, sha256: str = "same", **more: Any) -> Take:
    return Take(
        engine=engine,
        modality=Modality.SPEECH,
        order=order(engine, group),
        group=group,
        made=START + timedelta(minutes=minute),
        media=[{"file": "audio.wav", "sha256": sha256}],
        **more,
    )


def job(engine: str, group: str, minute: int, made: Take | None = None, **more: Any) -> Job:
    created = (START + timedelta(minutes=minute)).timestamp()
    state = "done" if made else "running"
    fields = {"state": state, "created": created, "take": made} | more
    return Job(f"{engine}-{minute}", "visitor", order(engine, group), **fields)


def test_the_newest_press_is_on_stage_and_the_rest_below():
    old = take("a", "first", 0)
    jobs = [job("a", "second", 1), job("b", "second", 1)]
    shown = stage(jobs, [old])
    assert [slot.order.engine for slot in shown.slots] == ["a", "b"]
    assert [piece.take for piece in shown.earlier] == [old]


def test_takes_stand_for_jobs_that_a_restart_forgot():
    newest, old = take("a", "second", 5), take("a", "first", 0)
    shown = stage([], [newest, old])
    assert [slot.take for slot in shown.slots] == [newest]
    assert [piece.take for piece in shown.earlier] == [old]


def test_a_repetition_belongs_to_its_original_and_leaves_the_stage_as_it_is():
    first, other = take("a", "first", 0), take("b", "second", 1)
    repeated = take("a", "first", 2)
    shown = stage([job("a", "first", 2, repeated)], [repeated, other, first])
    assert [slot.take for slot in shown.slots] == [other]
    original = next(piece for piece in shown.earlier if piece.take is first)
    assert [piece.take for piece in original.again] == [repeated]


def test_a_job_whose_take_was_deleted_is_gone_with_it():
    shown = stage([job("a", "first", 0, take("a", "first", 0))], [])
    assert shown.slots == [] and shown.earlier == []


def test_a_failed_job_stays_on_stage_but_not_in_the_list_below():
    failed = job("a", "first", 0, state="failed", reason="No.")
    assert [slot.state for slot in stage([failed], []).slots] == ["failed"]
    later = stage([failed, job("b", "second", 1)], [])
    assert later.earlier == []


def test_the_verdict_tells_same_from_other_from_failed():
    first = take("a", "g", 0)
    for again, kind in (
        (job("a", "g", 1, take("a", "g", 1)), "same"),
        (job("a", "g", 1, take("a", "g", 1, sha256="other")), "other"),
        (job("a", "g", 1), "busy"),
        (job("a", "g", 1, state="failed", reason="Out of memory."), "failed"),
    ):
        takes = [first, again.take] if again.take else [first]
        original = next(p for p in stage([again], takes).slots if p.take is first)
        found = verdict(original)
        assert found is not None and found[0] == kind


def test_looks_change_when_a_repetition_ends():
    first, again = take("a", "g", 0), take("a", "g", 1)
    alone = stage([], [first]).slots[0].looks
    assert stage([job("a", "g", 1)], [first]).slots[0].looks != alone
    assert stage([], [again, first]).slots[0].looks != alone
    assert stage([], [first]).slots[0].looks == alone
