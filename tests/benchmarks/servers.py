"""Servers as child processes: ours, and a bare Gradio app with the same components."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.benchmarks.stage import cache

ROOT = Path(__file__).parents[2]

BARE = """
import os, sys, json
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr
from gradio.blocks import BlockContext
kinds = {}
todo = [gr.blocks.Block]
while todo:
    for kind in todo.pop().__subclasses__():
        todo.append(kind)
        kinds.setdefault(kind.__name__.lower(), kind)
names, port = json.loads(sys.argv[1]), int(sys.argv[2])
with gr.Blocks() as page:
    for name in names:
        kind = kinds[name]
        if issubclass(kind, BlockContext):
            with kind():
                pass
        else:
            kind()
page.launch(server_port=port, run_history=False, quiet=True)
"""


@dataclass
class Server:
    address: str
    process: psutil.Process
    seconds: float  # from the start of the process to the first served page

    def config(self) -> dict[str, Any]:
        return httpx.get(f"{self.address}/config", timeout=30).json()


@contextmanager
def ours(**settings: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as home:
        environment = {"SOUNDSTAGE_HOME": home, "SOUNDSTAGE_CACHE": str(cache()), **settings}
        with _served(["app.py", "serve", "--weights", "miniature", "--port"], environment) as server:
            yield server


@contextmanager
def bare(components: list[str]) -> Iterator[Server]:
    with _served(["-c", BARE, json.dumps(components)], {}) as server:
        yield server


@contextmanager
def _served(arguments: list[str], environment: dict[str, str]) -> Iterator[Server]:
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments, str(port)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(trust_env=False) as client:
            while True:
                assert child.poll() is None, "the server ended"
                try:
                    if client.get(address, timeout=30).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.02)
        yield Server(address, psutil.Process(child.pid), time.perf_counter() - started)
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
