"""The round over all engines, on the one that misbehaves on demand."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.memory_round import visit_all
from core.requests import Order
from core.studio import Studio


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    from core.settings import Settings

    folder = tmp_path_factory.mktemp("round")
    made = Studio(
        Settings(
            home=folder / "home", cache=folder / "cache", device="cpu", threads=1, weights="miniature",
            engine_modules=("tests.unruly",),
        )
    )  # fmt: skip
    yield made
    made.close()


def visits(studio: Studio, monkeypatch, behave: str = "well"):
    def behaving(**given):
        options = {"behave": behave} if given["engine"] == "unruly" else {}
        return Order(**given, options=options)

    cards = [studio.catalog.card(engine) for engine in ("espeak", "unruly")]
    monkeypatch.setattr(studio, "cards", lambda: cards)
    monkeypatch.setattr("core.memory_round.Order", behaving)
    return list(visit_all(studio, Path(), ""))


def test_each_engine_tells_what_it_held_and_that_it_was_let_go(studio, monkeypatch):
    rules, unruly = visits(studio, monkeypatch)
    assert rules.engine == "espeak" and rules.clean and rules.planned == 0 and rules.peak is None
    assert unruly.clean and unruly.alive == 0 and unruly.weights == "miniature"
    assert unruly.planned > 0 and unruly.ram_peak >= unruly.ram_before > 0
    assert unruly.ram_after_release > 0
    assert studio.list_takes("doctor") == [], "it leaves no takes"


def test_an_engine_that_leaves_something_behind_is_not_clean(studio, monkeypatch):
    [_, unruly] = visits(studio, monkeypatch, "leak")
    assert unruly.alive == 2 and not unruly.clean


def test_an_engine_that_fails_tells_why_and_the_others_go_on(studio, monkeypatch):
    [rules, unruly] = visits(studio, monkeypatch, "fail")
    assert rules.clean and "wrong place" in unruly.fault and not unruly.clean
