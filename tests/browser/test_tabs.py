"""Which tab a page looks at, as the studio hears of it. There is one tab so far: the other is made here."""

from __future__ import annotations

import time
from collections.abc import Iterator

import gradio as gr
import pytest

from core.card import Modality
from core.settings import Settings
from core.studio import Studio
from demos import shell
from tests.support import until

pytestmark = pytest.mark.browser


class MusicTab:
    name = "Music"
    modality = Modality.MUSIC

    def __init__(self, studio: Studio, visitor: gr.BrowserState) -> None:
        gr.HTML("<h1>Another tab</h1>")

    def wire(self, ready, tick, slow_tick) -> None:
        pass


@pytest.fixture
def served(settings: Settings, monkeypatch) -> Iterator[tuple[Studio, str]]:
    monkeypatch.setitem(shell.TABS, "music", MusicTab)
    studio = Studio(settings)
    page = shell.build(studio)
    _, address, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **shell.launch_options(studio)
    )
    yield studio, address
    page.server.force_exit = True
    page.close(verbose=False)
    studio.close()


def looked_at(studio: Studio) -> list[str]:
    return sorted(tab for tab, _ in studio._presence._pages.values())


def until_looked_at(studio: Studio, tabs: list[str]) -> None:
    until(lambda: looked_at(studio) == tabs)


def test_the_studio_hears_which_tab_each_page_shows(visit, served):
    studio, address = served
    page = visit(address=address)
    until_looked_at(studio, ["speech"])
    second = visit(address=address)
    second.get_by_role("tab", name="Music").click()
    until_looked_at(studio, ["music", "speech"])
    page.get_by_role("tab", name="Music").click()
    until_looked_at(studio, ["music", "music"])
    time.sleep(shell.TICK_SECONDS + 1)
    assert looked_at(studio) == ["music", "music"], "a sign of life says the same"
    page.close()
    until_looked_at(studio, ["music"])
    second.close()
    until_looked_at(studio, [])
