"""Fixtures of the whole test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests share the machine with each other; a model on many threads would starve the rest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub; the loopback hub's tests lift this themselves
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@pytest.fixture
def settings(tmp_path: Path):
    """Settings of a server of its own, with the engine that misbehaves on demand."""
    from core.settings import Settings

    return Settings(
        home=tmp_path / "home",
        cache=tmp_path / "cache",
        device="cpu",
        threads=1,
        engine_modules=("tests.unruly",),
    )
