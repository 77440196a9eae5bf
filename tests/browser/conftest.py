"""A real server and a real browser. Without a Chromium these tests are skipped, but never in CI."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 90.0
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)  # fmt: skip


def chromium() -> str | None:
    """Debian's Chromium, or the one that CHROMIUM names."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def start_server(
    home: Path, weights: str = "miniature", **settings: str
) -> tuple[subprocess.Popen[bytes], str]:
    """Start `app.py serve` on a free port; returns the process and the page's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "SOUNDSTAGE_HOME": str(home / "home"),
        "SOUNDSTAGE_CACHE": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "SOUNDSTAGE_THREADS": "1",
        **settings,
    }
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py", "serve", "--port", str(port), "--weights", weights],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{address}config", timeout=5):
                return server, address
        except (URLError, OSError):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                pytest.fail(f"the server did not start:\n{(home / 'server.log').read_text()[-3000:]}")
            time.sleep(0.1)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on miniatures, with the engine that misbehaves on demand; yields its address."""
    server, address = start_server(
        tmp_path_factory.mktemp("site"),
        SOUNDSTAGE_WEIGHTS="miniature",
        SOUNDSTAGE_ENGINE_MODULES="tests.unruly",
    )
    yield address
    stop_server(server)


@pytest.fixture(scope="session")
def browser():
    """One Chromium for the whole run."""
    executable = chromium()
    if executable is None:
        message = "there is no Chromium; install the package chromium, or name one by CHROMIUM"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def visit(browser, site: str) -> Iterator[Callable]:
    """Opens the page as a new visitor (or as the one of a given context), and watches what it does.

    At the end no page may have asked another host for anything, or have thrown an error.
    """
    contexts, strangers, errors = [], [], []

    def open_page(context=None, address: str = site, **settings):
        if context is None:
            context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
            context.set_default_timeout(40_000)
            contexts.append(context)
            context.on("request", lambda request: _note_stranger(request.url, address, strangers))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#speak:not([disabled])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert strangers == [], "the page asked other hosts"
    assert errors == [], "the page threw errors"


def _note_stranger(url: str, page: str, strangers: list[str]) -> None:
    parts = urlparse(url)
    if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != urlparse(page).netloc:
        strangers.append(url)
