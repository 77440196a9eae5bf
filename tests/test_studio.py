"""The studio as the page uses it, with a real worker process."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.card import Licence, Modality
from core.errors import BadInput, LicenceNeeded, SoundstageError
from core.requests import Order, SpeechRequest
from core.studio import Holding, Studio
from tests.support import until


def order(engine: str = "unruly", text: str = "hello", seed: int = 1, **more) -> Order:
    given = {"weights": "miniature"} | more
    return Order(engine=engine, request=SpeechRequest(text=text), seed=seed, **given)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    from core.settings import Settings

    folder = tmp_path_factory.mktemp("studio")
    made = Studio(
        Settings(
            home=folder / "home",
            cache=folder / "cache",
            device="cpu",
            threads=1,
            engine_modules=("tests.unruly",),
            cancel_grace=2.0,
        )
    )
    yield made
    made.close()


def finish(studio: Studio, job):
    studio.wait(job)
    return job


def test_a_job_becomes_a_take_with_what_it_cost(studio):
    [job] = studio.submit([order(group="press")], "anna")
    take = finish(studio, job).take
    assert job.state == "done" and take is not None, job.reason
    assert studio.list_takes("anna")[0] == take
    assert (take.folder / "audio.wav").is_file() and (take.folder / "record.json").is_file()
    assert take.group == "press" and take.order.seed == 1
    assert take.weights["kind"] == "miniature"
    assert {
        "load_seconds",
        "generate_seconds",
        "real_time_factor",
        "queue_seconds",
    } <= take.measurements.keys()
    assert take.versions["torch"].startswith("2.")
    assert "anna" not in (take.folder / "record.json").read_text()


def test_a_take_made_again_is_bitwise_the_same(studio):
    [job] = studio.submit([order(seed=77)], "anna")
    first = finish(studio, job).take
    second = finish(studio, studio.again(first.id, "anna")).take
    assert second.id != first.id
    assert second.media[0]["sha256"] == first.media[0]["sha256"]
    [other] = studio.submit([order(seed=78)], "anna")
    assert finish(studio, other).take.media[0]["sha256"] != first.media[0]["sha256"]


def test_the_second_job_of_a_kind_is_foretold_from_the_first(studio):
    [job] = studio.submit([order()], "anna")
    finish(studio, job)
    [slow] = studio.submit([order(options={"steps": 100_000})], "anna")
    [next_one] = studio.submit([order(text="hello again")], "anna")
    assert slow.expected is not None and next_one.event.seconds is not None
    studio.stop("anna")
    finish(studio, slow)


def test_a_press_is_forecast_from_takes_and_from_what_is_loaded(studio):
    finish(studio, studio.submit([order()], "anna")[0])
    until(lambda: "Unruly" in studio.status().loaded)
    told = studio.forecast(order(text="hello" * 100))
    assert told.loaded and told.seconds is not None
    assert studio.forecast_line([order()]).startswith("About ")
    studio.unload()
    until(lambda: not studio.status().loaded)
    told = studio.forecast(order())
    assert not told.loaded and told.device_bytes and told.free_bytes
    assert studio.forecast_line([order()]).startswith("Needs about ")
    assert studio.forecast_line([order("nobody")]) == ""


def test_the_budget_is_the_operators_to_change(studio, monkeypatch):
    with pytest.raises(BadInput, match="Only the operator"):
        studio.set_budget(0.5)
    monkeypatch.setattr(studio, "settings", studio.settings.model_copy(update={"operator_page": True}))
    until(lambda: studio.status().memory_total)
    whole = studio.status().device_size
    studio.set_budget(0.5)
    until(lambda: studio.status().memory_total != whole)
    assert studio.status().memory_total == whole // 2 and studio.status().device_size == whole
    studio.set_budget(1.0)
    until(lambda: studio.status().memory_total == whole)


def test_orders_are_queued_all_or_none(studio):
    before = len(studio.jobs("bert"))
    with pytest.raises(BadInput, match="There is no engine 'nobody'"):
        studio.submit([order(), order("nobody")], "bert")
    with pytest.raises(BadInput, match="choose at least one"):
        studio.submit([], "bert")
    assert len(studio.jobs("bert")) == before


def test_another_visitor_sees_stops_and_repeats_nothing_of_mine(studio):
    [job] = studio.submit([order(options={"steps": 100_000})], "anna")
    assert studio.jobs("mallory") == [] and studio.list_takes("mallory") == []
    assert studio.stop("mallory") == 0 and studio.stop("mallory", job.id) == 0
    take = studio.list_takes("anna")[0]
    for forbidden in (
        lambda: studio.take(take.id, "mallory"),
        lambda: studio.again(take.id, "mallory"),
        lambda: studio.delete(take.id, "mallory"),
        lambda: studio.export_zip([take.id], "mallory", Path("x.zip")),
        lambda: studio.job_file(job.id, "mallory", "audio.wav"),
    ):
        with pytest.raises(SoundstageError):
            forbidden()
    assert not job.over
    assert studio.stop("anna", job.id) == 1
    assert finish(studio, job).state == "stopped"


def test_a_job_that_failed_leaves_no_half_take(studio):
    [job] = studio.submit([order(options={"behave": "fail"})], "cleo")
    finish(studio, job)
    assert job.state == "failed" and "wrong place" in job.reason
    assert studio.list_takes("cleo") == []
    assert job.folder is not None and not job.folder.exists()


def test_a_crash_takes_one_job_and_nothing_else(studio):
    jobs = studio.submit([order(options={"behave": b}) for b in ("well", "crash", "well")], "dora")
    for job in jobs:
        studio.wait(job)
    assert [job.state for job in jobs] == ["done", "failed", "done"]
    assert "crashed" in jobs[1].reason


def test_an_inline_studio_that_closes_stops_the_job_in_progress(tmp_path):
    from core.settings import Settings

    inline = Studio(
        Settings(home=tmp_path, cache=tmp_path, device="cpu", engine_modules=("tests.unruly",), inline=True)
    )
    [job] = inline.submit([order(options={"steps": 100_000})], "anna")
    inline.close()
    assert job.state == "stopped"


def test_the_licence_gate_opens_by_acceptance_only(studio, monkeypatch, tmp_path):
    card = studio.catalog.card("unruly")
    gated = card.model_copy(
        update={"weights_licence": Licence(name="CPML", commercial=False, must_accept=True)}
    )
    monkeypatch.setitem(studio.catalog._cards, "unruly", gated)
    (tmp_path / "weights.bin").write_bytes(bytes(10))
    real = order(weights=str(tmp_path))
    with pytest.raises(LicenceNeeded, match="CPML") as refused:
        studio.submit([real], "anna")
    assert refused.value.engine == "unruly"
    studio.check(order())  # a miniature is our own: no gate
    studio.check(real.model_copy(update={"accepted": frozenset({"unruly"})}))
    with pytest.raises(LicenceNeeded):
        studio.check(real)
    studio.licences.accept("unruly")
    studio.check(real)


def test_a_watcher_wakes_at_each_change_of_its_visitors_jobs(studio):
    async def watch() -> list[str]:
        states = []
        changes = studio.changes("eve")
        await anext(changes)
        [job] = studio.submit([order()], "eve")
        async for _ in changes:
            states.append(job.state)
            if job.over:
                break
        await changes.aclose()
        return states

    with ThreadPoolExecutor(1) as elsewhere:  # the browser tests keep a loop running in this thread
        states = elsewhere.submit(asyncio.run, asyncio.wait_for(watch(), 60)).result()
    assert states[-1] == "done"
    assert "eve" not in studio._jobs._listeners


def test_the_header_knows_device_memory_queue_and_what_is_loaded(studio):
    [job] = studio.submit([order()], "anna")
    finish(studio, job)
    studio.unload("nothing")  # answered by a fresh pulse
    status = studio.status()
    assert status.device == "CPU" and status.worker in ("ready", "busy")
    assert 0 < status.ram_used < status.ram_total
    assert status.loaded == ("Unruly",)


def test_the_secret_is_kept_and_private(studio):
    secret = studio.secret()
    assert len(secret) >= 32 and studio.secret() == secret
    assert (studio.settings.home / "secret").stat().st_mode & 0o077 == 0


def test_a_secret_that_was_never_written_whole_is_made_anew(studio):
    (studio.settings.home / "secret").write_text("")
    secret = studio.secret()
    assert len(secret) >= 32 and studio.secret() == secret


def test_a_licence_of_an_unknown_engine_cannot_be_accepted(tmp_path):
    from core.settings import Settings

    with pytest.raises(BadInput, match=r"There is no engine 'xxts'; the engines are: .*xtts"):
        Studio(Settings(home=tmp_path, accept_licences=("xxts",)))


def held(studio: Studio) -> dict[str, Holding]:
    return {holding.engine: holding for holding in studio.status().held}


@pytest.fixture
def short(tmp_path):
    """A studio that gives engines back half a second after everyone has left."""
    from core.settings import Settings

    made = Studio(
        Settings(
            home=tmp_path / "home",
            cache=tmp_path / "cache",
            device="cpu",
            threads=1,
            engine_modules=("tests.unruly",),
            memory_budget=2**30,
            leave_seconds=0.5,
        )
    )
    yield made
    made.close()


def test_the_header_knows_what_each_engine_holds_and_what_is_free(studio):
    [job] = studio.submit([order()], "anna")
    finish(studio, job)
    until(lambda: "unruly" in held(studio) and not held(studio)["unruly"].kept)
    found, status = held(studio)["unruly"], studio.status()
    assert (found.name, found.state, found.words) == ("Unruly", "loaded", "all on the CPU")
    assert found.device_bytes > 0
    assert status.one_memory and 0 < status.memory_free <= status.memory_total
    studio.unload("unruly")
    until(lambda: not studio.status().held)


def test_an_engine_that_a_job_uses_or_waits_for_is_not_unloaded(studio):
    [loaded] = studio.submit([order("espeak")], "anna")
    finish(studio, loaded)
    [slow] = studio.submit([order(options={"steps": 100_000})], "anna")
    until(lambda: held(studio).get("unruly") and held(studio)["unruly"].state == "in use")
    [waiting] = studio.submit([order("espeak")], "bert")
    assert held(studio)["unruly"].kept == "A job is using it."
    assert held(studio)["espeak"].kept == "A job waits for it."
    for engine in ("unruly", "espeak", ""):
        studio.unload(engine)
    assert studio._asked_to_go == {}
    studio.stop("anna")
    finish(studio, slow)
    finish(studio, waiting)
    assert waiting.state == "done"


def test_what_was_asked_to_go_says_so_while_a_job_of_another_engine_runs(studio):
    [loaded] = studio.submit([order("espeak")], "anna")
    finish(studio, loaded)
    [slow] = studio.submit([order(options={"steps": 100_000})], "anna")
    until(lambda: slow.state == "running" and "espeak" in held(studio))
    studio.unload("espeak")
    assert held(studio)["espeak"].kept == "It goes as soon as the job in progress is over."
    studio.stop("anna")
    until(lambda: "espeak" not in held(studio))
    assert slow.state == "stopped"


def test_a_tab_that_everyone_left_gives_its_engines_back(short):
    short.visit("page", Modality.SPEECH)
    [job] = short.submit([order()], "anna")
    finish(short, job)
    until(lambda: held(short).get("unruly") and held(short)["unruly"].idle_seconds > 1.5)
    assert held(short)["unruly"].state == "loaded", "a page still shows the tab"
    short.leave("page")
    until(lambda: not short.status().loaded)


def test_what_everyone_left_is_parked_and_what_is_unloaded_is_gone(short):
    short.visit("page", Modality.SPEECH)
    for job in short.submit([order(), order("espeak")], "anna"):
        finish(short, job)
    short.leave("page")
    until(lambda: [h.state for h in short.status().held] == ["parked"])
    parked = held(short)["unruly"]
    assert parked.device_bytes == 0 < parked.ram_bytes and not parked.kept
    short.unload("unruly")
    until(lambda: not short.status().held)


def test_a_job_that_outlasts_its_page_keeps_its_engine_until_it_is_over(short):
    short.visit("page", Modality.SPEECH)
    [slow] = short.submit([order(options={"steps": 1_500})], "anna")
    short.leave("page")
    finish(short, slow)
    assert slow.state == "done"
    until(lambda: not short.status().loaded)


def test_a_tab_of_another_kind_keeps_nothing_and_takes_nothing(short):
    short.visit("page", Modality.MUSIC)
    [job] = short.submit([order()], "a caller without a page")
    finish(short, job)
    short.leave("page")
    until(lambda: short._presence.left() == {Modality.MUSIC})
    until(lambda: held(short).get("unruly"))
    several_looks = held(short)["unruly"].idle_seconds + 4  # the studio looks every second
    until(
        lambda: short.status().held[0].state != "loaded" or held(short)["unruly"].idle_seconds > several_looks
    )
    assert held(short)["unruly"].state == "loaded"


def test_what_a_release_left_behind_is_said(studio):
    [job] = studio.submit([order(options={"behave": "leak"})], "anna")
    finish(studio, job)
    assert studio.status().leak == ""
    studio.unload("unruly")
    until(lambda: studio.status().leak)
    assert studio.status().leak == (
        "Unruly left 2 of its tensors behind when it was unloaded; "
        "the worker was restarted to give that back."
    )
    until(lambda: studio.status().worker == "ready")


def test_placements_are_those_that_all_engines_with_weights_allow(studio, monkeypatch):
    card = studio.catalog.card("unruly")
    able = card.model_copy(update={"strategies": ("resident", "model_offload", "group_leaf", "cpu")})
    monkeypatch.setitem(studio.catalog._cards, "unruly", able)
    other = card.model_copy(update={"id": "other", "strategies": ("resident", "group_leaf", "cpu")})
    monkeypatch.setitem(studio.catalog._cards, "other", other)
    assert list(studio.placements(["unruly", "espeak"])) == ["resident", "model_offload", "group_leaf"]
    assert studio.placements(["unruly", "other"])["group_leaf"] == "group offload, layer by layer"
    assert "model_offload" not in studio.placements(["unruly", "other"])
    assert studio.placements(["espeak"]) == {}
