"""A real worker process, and everything that can befall it."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.errors import SoundstageError
from core.events import Failed, Finished, Step, Stopped
from core.logs import KEPT, new_log
from core.requests import Order, SpeechRequest
from core.settings import Settings
from core.worker.process import RunJob, WorkerProcess
from tests.support import until

PATIENCE = 200  # seconds to wait for an event; importing torch on a busy machine takes a while


class Bench:
    """One worker process, with its events at hand."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.worker = WorkerProcess(settings)
        self.events: queue.Queue = queue.Queue()
        self.worker.start(lambda job, event: self.events.put((job, event)))

    def begin(
        self,
        behave: str = "well",
        job: str = "job",
        steps: int = 3,
        seed: int = 1,
        weights: str = "miniature",
    ) -> None:
        folder = self.folder / job
        folder.mkdir(parents=True, exist_ok=True)
        order = Order(
            engine="unruly",
            request=SpeechRequest(text="hello"),
            options={"behave": behave, "steps": steps},
            seed=seed,
            weights=weights,
        )
        self.worker.run(RunJob(job, order, folder, online=False))

    def until(self, *kinds: type, job: str = "job"):
        while True:
            name, event = self.events.get(timeout=PATIENCE)
            if name == job and isinstance(event, kinds):
                return event

    def end(self, job: str = "job"):
        return self.until(Finished, Failed, Stopped, job=job)

    def works(self) -> bool:
        self.begin(job="after")
        return isinstance(self.end("after"), Finished)

    @contextmanager
    def limits(self, **limits: float) -> Iterator[None]:
        """Other limits for as long as a test needs them short: a busy machine must not end the others."""
        before = self.worker._settings
        self.worker._settings = before.model_copy(update=limits)
        yield
        self.worker._settings = before


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    settings = Settings(
        home=folder / "home",
        cache=folder / "cache",
        device="cpu",
        threads=1,
        engine_modules=("tests.unruly",),
    )
    made = Bench(settings, folder)
    yield made
    made.worker.close()


def test_a_job_finishes_with_files_and_measurements(bench):
    bench.begin()
    finished = bench.end()
    assert isinstance(finished, Finished), finished
    assert {m["file"] for m in finished.media} == {"audio.wav"}
    assert (bench.folder / "job" / "audio.wav").stat().st_size > 30_000
    cost = finished.measurements
    assert cost["generate_seconds"] >= 0 and cost["audio_seconds"] == 1.0
    assert cost["ram_peak_bytes"] >= cost["ram_before_bytes"] > 0
    assert finished.weights["kind"] == "miniature"
    assert finished.placement == {
        "device": "cpu", "dtype": "float32", "strategy": "resident", "words": "all on the CPU",
    }  # fmt: skip


def test_torch_is_in_the_worker_and_not_here(bench):
    code = "import sys, core.worker.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        ("crash", "crashed (SIGSEGV)"),
        ("killed", "most likely because the machine ran out of memory"),
        ("exit", "ended by itself (exit code 3)"),
    ],
)
def test_a_process_that_dies_ends_its_job_with_the_reason_and_is_replaced(bench, behave, says):
    before = bench.worker.restarts
    bench.begin(behave)
    failed = bench.end()
    assert isinstance(failed, Failed) and says in failed.reason
    assert bench.works()
    assert bench.worker.restarts == before + 1


def test_a_crash_keeps_the_stack_for_the_details(bench):
    bench.begin("crash")
    assert "string_at" in bench.end().detail


def test_the_details_of_a_crash_tell_nothing_of_earlier_jobs(bench):
    bench.begin(seed=1111)
    bench.end()
    bench.begin("crash", seed=2222)
    detail = bench.end().detail
    assert "seed 2222" in detail and "seed 1111" not in detail


def test_a_hang_is_ended_after_the_silence_limit(bench):
    assert bench.works()
    with bench.limits(silence_limit=3.0):
        bench.begin("hang")
        failed = bench.end()
    assert isinstance(failed, Failed) and "no step for 3 s" in failed.reason
    assert bench.works()


def test_an_ignored_stop_ends_the_process_after_the_grace(bench):
    bench.begin("deaf")
    bench.until(Step)
    with bench.limits(cancel_grace=1.0):
        bench.worker.stop("job")
        stopped = bench.end()
    assert isinstance(stopped, Stopped) and "did not stop within 1 s" in stopped.reason
    assert bench.works()


def test_a_heeded_stop_keeps_the_process(bench):
    before = bench.worker.restarts
    bench.begin(steps=100_000)
    bench.until(Step)
    bench.worker.stop("job")
    assert bench.end() == Stopped()
    assert bench.works()
    assert bench.worker.restarts == before


def test_a_failure_and_too_little_memory_are_told_in_a_sentence_each(bench):
    before = bench.worker.restarts
    bench.begin("fail")
    failed = bench.end()
    assert failed.reason == "Unruly failed: a tensor was in the wrong place and more lines"
    assert "RuntimeError" in failed.detail
    bench.begin("memory")
    assert "ran out of memory" in bench.end().reason
    assert bench.works()
    assert bench.worker.restarts == before


def test_a_release_that_leaves_something_behind_is_mended_by_a_new_process(bench):
    before = bench.worker.restarts
    bench.begin("leak")
    assert isinstance(bench.end(), Finished)
    bench.worker.unload()
    assert bench.works()
    assert bench.works()
    assert bench.worker.restarts == before + 1


def test_what_a_release_left_behind_is_given_back_though_no_job_comes(bench):
    bench.begin("leak")
    bench.end()
    pidfd = os.pidfd_open(bench.worker.pid)
    bench.worker.unload()
    assert select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)
    assert bench.works()


@contextmanager
def parking(bench: Bench, budget: int) -> Iterator[None]:
    """With a budget an engine is parked on a CPU, too."""
    bench.worker.set_budget(budget)
    yield
    bench.worker.set_budget(None)


def until_told(bench: Bench, parked: tuple[str, ...]) -> None:
    until(lambda: bench.worker.pulse and bench.worker.pulse.parked == parked, PATIENCE)


def test_leaving_an_engine_parks_it_and_its_next_job_brings_it_back(bench):
    with parking(bench, 2**30):
        assert bench.works()
        bench.worker.unload("unruly", park=True)
        until_told(bench, ("unruly",))
        assert bench.worker.pulse.loaded == () and bench.worker.pulse.ram_held > 0
        assert bench.works()
        until_told(bench, ())
    bench.worker.unload()


def test_a_process_killed_while_it_parks_is_replaced_and_keeps_the_changed_budget(bench):
    before = bench.worker.restarts
    with parking(bench, 2**30):
        bench.begin("die when parked")
        assert isinstance(bench.end(), Finished)
        pidfd = os.pidfd_open(bench.worker.pid)
        bench.worker.unload(park=True)
        assert select.select([pidfd], [], [], PATIENCE)[0]
        os.close(pidfd)
        assert bench.works()
        assert bench.worker.pulse.device_total == 2**30
    assert bench.worker.restarts == before + 1


def test_a_job_in_whose_way_parking_kills_the_process_ends_with_the_reason(bench):
    (other := bench.folder / "other").mkdir()
    (other / "weights.bin").write_bytes(bytes(1000))
    with parking(bench, 2000):  # one checkpoint needs 1440 bytes, and holds 1152 between jobs
        bench.begin("die when parked")
        assert isinstance(bench.end(), Finished)
        bench.begin(weights=str(other))
        failed = bench.end()
        assert isinstance(failed, Failed) and "was killed" in failed.reason
        assert bench.works()


def test_a_job_whose_engine_kills_the_process_as_it_comes_back_ends_with_the_reason(bench):
    with parking(bench, 2**30):
        bench.begin("die when brought back")
        assert isinstance(bench.end(), Finished)
        bench.worker.unload(park=True)
        bench.begin()
        failed = bench.end()
        assert isinstance(failed, Failed) and "was killed" in failed.reason
        assert bench.works()


def test_an_idle_engine_leaves_the_device_by_itself(settings, tmp_path):
    bench = Bench(settings.model_copy(update={"memory_budget": 2**30, "idle_timeout": 0.1}), tmp_path)
    try:
        assert bench.works()
        until_told(bench, ("unruly",))
        assert bench.works()
        assert bench.worker.restarts == 0
    finally:
        bench.worker.close()


def test_a_process_that_the_system_refuses_is_asked_for_again(bench, monkeypatch):
    assert bench.works()
    monkeypatch.setattr("core.worker.process._LONGEST_BACKOFF", 0.01)
    spawn, refused = bench.worker._spawn, []

    def refuse_at_first() -> None:
        if len(refused) < 2:
            refused.append(True)
            raise BlockingIOError("Resource temporarily unavailable")
        spawn()

    monkeypatch.setattr(bench.worker, "_spawn", refuse_at_first)
    bench.worker._early_deaths = 5000  # hours of trying
    os.kill(bench.worker.pid, signal.SIGKILL)
    assert bench.works()
    assert len(refused) == 2


def test_a_listener_that_fails_does_not_end_the_watch(bench, monkeypatch):
    listener, failed = bench.worker._listener, []

    def fail_once(job, event) -> None:
        if not failed:
            failed.append(event)
            raise RuntimeError("not my day")
        listener(job, event)

    monkeypatch.setattr(bench.worker, "_listener", fail_once)
    assert bench.works()
    assert failed


def test_a_signal_without_a_name_is_told_by_its_number(bench):
    assert "crashed (signal 40)" in bench.worker._cause_of_death(-40).reason


def test_a_device_that_is_not_there_is_told_by_each_job(settings, tmp_path):
    bench = Bench(settings.model_copy(update={"device": "cuda:99"}), tmp_path)
    try:
        for _ in range(2):
            bench.begin()
            assert bench.end() == Failed(
                "There is no device 'cuda:99' here; use auto or cpu.", bad_input=True
            )
        assert bench.worker.restarts == 0 and bench.worker.state == "ready"
    finally:
        bench.worker.close()


def test_the_oldest_logs_go(tmp_path):
    for number in range(30):
        file = tmp_path / "logs" / f"worker-{number}.log"
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (number, number))
    other = tmp_path / "logs" / "generate-1.log"
    other.touch()
    new_log(tmp_path, "worker").touch()
    kept = {file.name for file in (tmp_path / "logs").glob("worker-*")}
    assert len(kept) == KEPT and f"worker-{os.getpid()}.log" in kept and "worker-29.log" in kept
    assert other.exists()


def test_a_home_that_cannot_be_written_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SoundstageError, match=r"Nothing can be kept in .*file: Not a directory; name"):
        new_log(tmp_path / "file", "worker")


def test_a_kill_from_outside_in_the_middle_of_a_job_leaves_the_next_one_well(bench):
    bench.begin(steps=100_000)
    bench.until(Step)
    os.kill(bench.worker.pid, signal.SIGKILL)
    assert "was killed" in bench.end().reason
    assert bench.works()


def test_a_job_given_to_a_process_that_just_died_is_given_to_the_next(bench):
    assert bench.works()
    pid = bench.worker.pid
    os.kill(pid, signal.SIGKILL)
    bench.begin()
    assert isinstance(bench.end(), Finished)
    assert bench.worker.pid != pid


def test_same_seed_gives_the_same_file_and_another_seed_another(bench):
    sums = []
    for job, seed in (("one", 5), ("two", 5), ("three", 6)):
        bench.begin(job=job, seed=seed)
        sums.append(bench.end(job).media[0]["sha256"])
    assert sums[0] == sums[1] != sums[2]


def test_a_process_without_a_sign_of_life_is_replaced(settings, tmp_path):
    bench = Bench(settings, tmp_path)
    try:
        assert bench.works()
        with bench.limits(heartbeat_limit=6.0):
            bench.begin("frozen")
            failed = bench.end()
        assert isinstance(failed, Failed) and "no sign of life for 6 s" in failed.reason
        assert bench.works()
    finally:
        bench.worker.close()


def test_a_process_that_takes_long_to_start_is_waited_for(settings, tmp_path):
    settings = settings.model_copy(update={"heartbeat_limit": 1.0})  # it beats every 2 s
    bench = Bench(settings, tmp_path)
    try:
        bench.begin()
        until(lambda: bench.worker.pulse and bench.worker.pulse.ready, PATIENCE)
        assert bench.worker.restarts == 0
    finally:
        bench.worker.close()


def test_the_worker_ends_with_its_page(settings, tmp_path):
    code = textwrap.dedent(
        """
        import os, sys
        from core.settings import Settings
        from core.worker.process import WorkerProcess
        if __name__ == "__main__":
            worker = WorkerProcess(Settings(device="cpu"))
            worker.start(lambda job, event: None)
            print(worker.pid, flush=True)
            sys.stdin.read()
            os._exit(1)
        """
    )
    script = tmp_path / "page.py"
    script.write_text(code)
    environment = {**os.environ, "SOUNDSTAGE_HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    page = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    pid = int(page.stdout.readline())
    pidfd = os.pidfd_open(pid)
    page.communicate("")
    ended, _, _ = select.select([pidfd], [], [], PATIENCE)  # readable once the process has ended
    assert ended
