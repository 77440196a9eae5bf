"""Real weights whose licence has to be accepted: here found in the hub's cache, where a test put them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from core.engines.quirks import mend_torchaudio
from core.engines.xtts.card import CARD as XTTS
from tests.browser.acts import choose, reload, speak, wait_for
from tests.browser.conftest import start_server, stop_server
from tests.support import miniature

pytestmark = pytest.mark.browser
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def gated_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose hub cache holds XTTS's repository (filled from the miniature) and nothing else."""
    mend_torchaudio()
    home = tmp_path_factory.mktemp("gated")
    repository = home / "hub" / f"models--{XTTS.checkpoints[0].repository.replace('/', '--')}"
    shutil.copytree(miniature("xtts"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    server, address = start_server(home, "auto", HF_HUB_CACHE=str(home / "hub"), HF_HUB_OFFLINE="1")
    yield address
    stop_server(server)


def test_a_licence_is_accepted_on_the_page_before_its_weights_are_used(visit, gated_site):
    page = visit(address=gated_site)
    accept = page.get_by_label("I accept the")
    expect(accept).to_have_count(0)
    choose(page, ["xtts"])
    expect(accept).to_be_visible()
    speak(page, ["xtts"], "Good evening.")
    expect(page.get_by_role("alert")).to_contain_text("accept it first")
    accept.check()
    page.click("#speak")
    done = wait_for(page, "xtts", "done")
    expect(done.locator(".facts")).to_contain_text(XTTS.checkpoints[0].repository)
    assert done.locator(".noise").count() == 0
    reload(page)
    choose(page, ["xtts"])
    expect(page.get_by_label("I accept the")).to_be_checked()
