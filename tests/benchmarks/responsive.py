"""A light event of the page while a model computes, against the same event while nothing does."""

from __future__ import annotations

import time

import httpx
from gradio_client import Client

from tests.benchmarks.rows import Row, quantile
from tests.benchmarks.servers import ours
from tests.benchmarks.stage import TEXT

EVENTS = 400
PAUSE = 0.02  # seconds between two events: what ten open pages ask for
ENGINE = "bark"
BUSY_TEXT = " ".join([TEXT] * 60)


def measure() -> list[Row]:
    with ours() as server, httpx.Client(base_url=server.address, trust_env=False, timeout=30) as page:
        dependencies = server.config()["dependencies"]
        # What an open page asks at its load and then every few seconds.
        [header] = [d["id"] for d in dependencies if {"load", "tick"} <= {event for _, event in d["targets"]}]
        client = Client(server.address, verbose=False)
        client.predict(TEXT, ENGINE, api_name="/speech_generate")  # loaded, and all first imports over
        idle = _times(page, header)
        job = client.submit(BUSY_TEXT, ENGINE, api_name="/speech_generate")
        while "busy" not in _ask(page, header):
            time.sleep(PAUSE)
        busy = _times(page, header)
        computed_throughout = not job.done() and "busy" in _ask(page, header)
        job.cancel()
    slow, fast = quantile(busy, 0.99), quantile(idle, 0.99)
    return [
        Row(
            "p99 of a light event while a model computes, over idle",
            f"{slow / fast:.2f} x ({slow * 1e3:.0f} ms over {fast * 1e3:.0f} ms)",
            "2 x",
            slow <= 2 * fast and computed_throughout,
            f"the header's figures, {EVENTS} times; medians {quantile(busy, 0.5) * 1e3:.1f} "
            f"and {quantile(idle, 0.5) * 1e3:.1f} ms",
        )
    ]


def _ask(page: httpx.Client, function: int) -> str:
    body = {"data": [None], "fn_index": function, "session_hash": "benchmark"}
    answer = page.post("/gradio_api/run/predict", json=body)
    answer.raise_for_status()
    return answer.text


def _times(page: httpx.Client, function: int) -> list[float]:
    times = []
    for _ in range(EVENTS):
        started = time.perf_counter()
        _ask(page, function)
        times.append(time.perf_counter() - started)
        time.sleep(PAUSE)
    return times
