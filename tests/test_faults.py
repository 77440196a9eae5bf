"""A served page and what can befall it from outside: kills, signals, a second server, a full disk."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from gradio_client import Client

from core.requests import Order, SpeechRequest
from core.settings import Settings
from core.studio import Studio
from core.takes import Takes

ROOT = Path(__file__).parents[1]
PATIENCE = 90.0  # seconds: several processes import their libraries on a busy machine
ENDLESS = {"engine": "unruly", "options": {"steps": 100_000}}


def until(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < deadline, "it never came"
        select.select([], [], [], 0.05)
    return found


class Server:
    """`python app.py serve` on miniatures, on a folder that others may use, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.log = folder / f"{port}.log"
        environment = os.environ | {
            "SOUNDSTAGE_HOME": str(folder / "home"),
            "SOUNDSTAGE_CACHE": str(folder / "cache"),
            "SOUNDSTAGE_ENGINE_MODULES": "tests.unruly",
            "SOUNDSTAGE_THREADS": "1",
        }
        command = [sys.executable, "app.py", "serve", "--weights", "miniature", "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"{self.address}/config", timeout=5) as page:
                return page.status == 200
        except OSError:
            return False

    def speak(self, **ask: Any) -> dict[str, Any]:
        """A take's record, by the API."""
        client = Client(self.address, verbose=False)
        given = {"text": "Good day.", "engine": "espeak"} | ask
        return client.predict(**given, api_name="/speech_generate")[1]

    def begin(self, told: list[str], **ask: Any) -> threading.Thread:
        """Ask for a take, and put what comes of it into `told`."""

        def wait() -> None:
            try:
                told.append(self.speak(**ask)["id"])
            except BaseException as error:
                told.append(str(error))

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    def worker(self) -> psutil.Process:
        [worker] = [
            c for c in psutil.Process(self.process.pid).children() if "spawn_main" in str(c.cmdline())
        ]
        return worker

    def kept(self) -> set[str]:
        return {folder.name for folder in (self.folder / "home/takes/kept").iterdir()}

    def jobs(self) -> set[Path]:
        """Folders of jobs under way, of every server here."""
        return set((self.folder / "home/takes/partial").glob("*/*"))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], Server]]:
    started: list[Server] = []

    def start() -> Server:
        started.append(Server(tmp_path))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


def listed(folder: Path) -> set[str]:
    """The ids that `app.py takes` lists."""
    environment = os.environ | {"SOUNDSTAGE_HOME": str(folder / "home")}
    command = [sys.executable, "app.py", "takes", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return {take["id"] for take in json.loads(done.stdout)}


def test_a_page_outlives_its_worker_and_ends_at_a_signal(serve: Callable[[], Server]) -> None:
    server = serve()
    until(server.answers)
    first = server.speak(engine="unruly")["id"]
    told: list[str] = []
    asked = server.begin(told, **ENDLESS)
    until(server.jobs)
    worker = server.worker()
    idle = worker.cpu_times().user
    until(lambda: worker.cpu_times().user > idle + 0.1)  # it has begun; before, the job would be given again
    worker.kill()
    while asked.is_alive():
        assert server.answers()
    assert "The worker process was killed" in told[0]
    assert not server.jobs() and server.kept() == {first}
    assert server.speak(engine="unruly")["id"] in server.kept()

    server.begin(told, **ENDLESS)
    until(server.jobs)
    worker = server.worker()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert "Traceback" not in server.log.read_text()
    assert not list((server.folder / "home/takes/partial").iterdir())


def test_two_servers_share_a_folder_and_one_outlives_the_other(serve: Callable[[], Server]) -> None:
    one, two = serve(), serve()
    until(lambda: one.answers() and two.answers())
    told: list[str] = []
    for thread in [server.begin(told) for server in (one, two) * 3]:
        thread.join(PATIENCE)
    assert set(told) == one.kept() == listed(one.folder) and len(told) == 6

    going = one.begin(told, engine="unruly", options={"steps": 3000})
    until(one.jobs)
    mine = one.jobs()
    two.begin([], **ENDLESS)
    [theirs] = until(lambda: one.jobs() - mine)
    orphan = two.worker()
    two.process.kill()
    two.process.wait()
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)
    assert theirs.exists() and listed(one.folder) == one.kept()  # `takes` swept what the dead one left
    assert not theirs.exists() and mine <= one.jobs(), "only the dead one's"
    going.join(PATIENCE)
    assert len(one.kept()) == 7 == len(set(told)) and not one.jobs()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_fails_a_job_and_not_the_next(small_disk: Path, tmp_path: Path) -> None:
    settings = Settings(home=small_disk, cache=tmp_path / "cache", device="cpu", threads=1, inline=True)
    studio = Studio(settings)

    def speak(text: str) -> Any:
        request = SpeechRequest(text=text)
        [job] = studio.submit([Order(engine="espeak", request=request, seed=1)], "anna")
        return studio.wait(job, interval=0.01)

    try:
        assert speak("Short.").state == "done"
        full = speak("A long walk by the river. " * 60)
        assert full.state == "failed" and full.reason.startswith("There is no room left on the disk for ")
        assert not list(studio.takes._own.iterdir())
        after = speak("Short again.")
        assert after.state == "done" and len(studio.list_takes("anna")) == 2
    finally:
        studio.close()


def test_listing_takes_leaves_nothing_behind(tmp_path: Path) -> None:
    Takes(tmp_path / "home/takes").close()
    assert listed(tmp_path) == set()
    assert not list((tmp_path / "home/takes/partial").iterdir())
