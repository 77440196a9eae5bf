"""The host in this very process, as a script or a ZeroGPU Space runs it."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from core.card import Licence
from core.events import Failed, Finished, Loading, Step, Stopped
from core.requests import Order, SpeechRequest
from core.worker.host import Host
from core.worker.messages import JobEvent, Released, RunJob


class Stage:
    """A host, and all that it told."""

    def __init__(self, settings, folder: Path) -> None:
        self.told = []
        self.folder = folder
        self.host = Host(settings, self._hear)
        self.on_step = lambda: None

    def _hear(self, message) -> None:
        self.told.append(message)
        if isinstance(message, JobEvent) and isinstance(message.event, Step):
            self.on_step()

    def run(self, behave: str = "well", engine: str = "unruly", steps: int = 3, working=None, **changes):
        options = {"behave": behave, "steps": steps} if engine == "unruly" else {}
        given = {
            "engine": engine,
            "request": SpeechRequest(text="hello"),
            "options": options,
            "seed": 1,
            "weights": "miniature",
        }
        self.folder.mkdir(exist_ok=True)
        self.told.clear()
        self.host.run(RunJob("job", Order(**given | changes), self.folder, online=False, working=working))
        events = [m.event for m in self.told if isinstance(m, JobEvent)]
        assert sum(isinstance(e, Finished | Failed | Stopped) for e in events) == 1
        return events


@pytest.fixture
def stage(settings, tmp_path):
    return Stage(settings, tmp_path / "job")


def test_a_job_tells_loading_then_steps_then_its_end(stage):
    kinds = [type(event) for event in stage.run()]
    assert kinds[0] is Loading and kinds[-1] is Finished and Step in kinds
    assert kinds == sorted(kinds, key=[Loading, Step, Finished].index)


def test_the_second_job_finds_its_engine_loaded(stage, monkeypatch):
    import tests.unruly.engine

    stage.run()
    assert stage.host.residency.loaded == ("unruly",)
    monkeypatch.setattr(tests.unruly.engine.Unruly, "load", lambda *_: pytest.fail("loaded once more"))
    assert isinstance(stage.run()[-1], Finished)
    assert not [m for m in stage.told if isinstance(m, Released)]


def test_an_engine_that_failed_is_not_used_again(stage):
    events = stage.run("fail")
    assert isinstance(events[-1], Failed)
    assert stage.host.residency.loaded == ()
    [released] = [m for m in stage.told if isinstance(m, Released)]
    assert released.clean, "the failure's traceback kept the model alive"


def test_a_library_that_ends_the_process_ends_only_its_job(stage):
    failed = stage.run("quit")[-1]
    assert isinstance(failed, Failed) and failed.reason == "Unruly failed: wrong arguments"
    assert isinstance(stage.run()[-1], Finished)


def test_a_checkpoint_that_does_not_load_keeps_what_the_library_said(stage, monkeypatch):
    import tests.unruly.engine

    def fail(self, weights, placement):
        raise ValueError("unexpected key 'decoder.9'")

    monkeypatch.setattr(tests.unruly.engine.Unruly, "load", fail)
    failed = stage.run()[-1]
    assert failed.reason.startswith("Unruly could not load its checkpoint") and not failed.bad_input
    assert "unexpected key 'decoder.9'" in failed.reason and "Traceback" in failed.detail


def test_no_sound_at_all_is_a_failure_in_a_sentence(stage):
    failed = stage.run("empty")[-1]
    assert isinstance(failed, Failed) and failed.reason.startswith("Unruly gave no sound for this text;")
    assert isinstance(stage.run()[-1], Finished)


def test_real_weights_that_came_within_reach_after_the_order_are_not_used_without_their_licence(
    stage, monkeypatch, tmp_path
):
    gated = stage.host._catalog.card("unruly").model_copy(
        update={"weights_licence": Licence(name="CPML", must_accept=True)}
    )
    monkeypatch.setitem(stage.host._catalog._cards, "unruly", gated)
    real = tmp_path / "real"
    real.mkdir()
    (real / "weights.bin").write_bytes(bytes(10))
    assert isinstance(stage.run()[-1], Finished), "a miniature is free"
    failed = stage.run(weights=str(real))[-1]
    assert isinstance(failed, Failed) and failed.bad_input and "CPML" in failed.reason
    accepted = stage.run(weights=str(real), accepted=frozenset({"unruly"}))[-1]
    assert isinstance(accepted, Finished) and accepted.weights["kind"] == "folder"
    assert isinstance(stage.run(weights=str(real))[-1], Failed), "loaded for one is not accepted by all"


def test_a_stop_before_the_start_stops_before_anything_is_loaded(stage):
    stage.host.stop("job")
    assert stage.run() == [Stopped()]
    assert stage.host.residency.loaded == ()
    assert isinstance(stage.run()[-1], Finished), "an old stop must not stop the next job"


def test_a_stop_between_two_steps_ends_the_job_and_keeps_the_engine(stage):
    stage.on_step = lambda: stage.host.stop("job")
    assert stage.run(steps=100_000)[-1] == Stopped()
    assert stage.host.residency.loaded == ("unruly",)


def test_a_memory_budget_that_is_too_small_says_what_is_needed(settings, tmp_path):
    stage = Stage(settings.model_copy(update={"memory_budget": 100}), tmp_path / "job")
    failed = stage.run()[-1]
    assert isinstance(failed, Failed) and "Unruly needs about" in failed.reason


def test_bad_options_and_unknown_engines_fail_before_loading(stage):
    failed = stage.run(options={"steps": 0})[-1]
    assert failed.bad_input and "option 'steps' is 0" in failed.reason
    failed = stage.run(engine="nobody")[-1]
    assert failed.bad_input and "There is no engine 'nobody'" in failed.reason


def test_a_disk_without_room_is_said_and_leaves_the_host_well(stage, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in ("while the miniature is built", "while the take is written"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            failed = stage.run()[-1]
        assert isinstance(failed, Failed) and "no room left" in failed.reason
        assert isinstance(stage.run()[-1], Finished)


def test_an_engine_without_weights_needs_no_torch(settings, tmp_path):
    code = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from core.requests import Order, SpeechRequest
        from core.settings import Settings
        from core.worker.host import Host
        from core.worker.messages import RunJob
        told = []
        host = Host(Settings(home="{tmp_path}", cache="{tmp_path}"), told.append)
        order = Order(engine="espeak", request=SpeechRequest(text="hello"), seed=1)
        host.run(RunJob("job", order, Path("{tmp_path}"), online=False))
        print(type(told[-1].event).__name__)
        sys.exit("torch" in sys.modules)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Finished" in done.stdout


def test_jobs_from_several_threads_take_turns(stage):
    stage.folder.mkdir()
    order = Order(engine="unruly", request=SpeechRequest(text="hello"), seed=1, weights="miniature")
    jobs = [RunJob(f"job{n}", order, stage.folder, online=False) for n in range(4)]
    threads = [threading.Thread(target=stage.host.run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [m for m in stage.told if isinstance(m, JobEvent)]
    assert sorted(m.job for m in events if isinstance(m.event, Finished)) == [job.job for job in jobs]
    working = [m.job for m in events if isinstance(m.event, Step)]
    assert working == sorted(working, key=working.index), "steps of two jobs were mixed"
