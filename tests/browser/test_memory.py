"""What is in memory, as the header shows it and lets people change it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.acts import speak, start_long_job, track, wait_for
from tests.browser.conftest import start_server, stop_server
from tests.browser.test_speech import PALE_TEXT

pytestmark = pytest.mark.browser
LEAVE_SECONDS = 1.0
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def own_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that nobody else visits, and that gives engines back soon."""
    server, address = start_server(
        tmp_path_factory.mktemp("memory"), SOUNDSTAGE_LEAVE_SECONDS=str(LEAVE_SECONDS)
    )
    yield address
    stop_server(server)


def button(page: Page) -> Locator:
    return page.locator("#memory-chip button[aria-expanded]")


def sheet(page: Page) -> Locator:
    return page.locator("#memory")


def row(page: Page, engine: str) -> Locator:
    return sheet(page).locator(f'[data-held="{engine}"]')


def in_header(page: Page) -> str:
    """What the button says once the page has asked."""
    expect(button(page)).to_contain_text(re.compile("loaded"), timeout=PATIENCE)
    return button(page).inner_text()


def all_engines(page: Page) -> list[str]:
    boxes = page.locator("#engines input[name=engine]").all()
    return [engine for box in boxes if (engine := box.get_attribute("value")) is not None]


def clone_a_voice(page: Page) -> None:
    page.locator("#voice-fold > button").click()
    page.locator("#voices [data-pick]").first.click()
    page.get_by_label("I may use this voice").check()


def test_the_operator_holds_engines_to_a_part_of_the_memory(visit, own_site):
    page = visit(address=own_site)
    in_header(page)
    button(page).click()
    half = sheet(page).locator('[data-act="budget"][data-id="0.5"]')
    words = half.inner_text()
    half.click()
    expect(half).to_have_attribute("aria-pressed", "true", timeout=PATIENCE)
    expect(sheet(page).locator("figcaption").first).to_contain_text(f"free of {words}")
    expect(sheet(page)).to_be_visible()
    sheet(page).get_by_role("button", name="all of it").click()
    expect(half).to_have_attribute("aria-pressed", "false", timeout=PATIENCE)


def test_every_engine_is_seen_loaded_and_unloaded(visit, own_site):
    page = visit(address=own_site)
    assert "nothing loaded" in in_header(page)
    engines = all_engines(page)
    clone_a_voice(page)
    speak(page, engines)
    for engine in engines:
        wait_for(page, engine, "done")
    button(page).click()
    for engine in engines:
        expect(row(page, engine).locator(".state")).to_have_text("loaded", timeout=PATIENCE)
    expect(button(page)).to_contain_text(f"{len(engines)} loaded")
    pieces = sheet(page).locator(".piece-loaded[title]")
    assert pieces.count() >= len(engines) - 1, "each that takes memory is a piece of the bar"
    first = engines[1]
    row(page, first).get_by_role("button", name="Unload").click()
    expect(row(page, first)).to_have_count(0)
    expect(button(page)).to_contain_text(f"{len(engines) - 1} loaded")
    sheet(page).get_by_role("button", name="Unload all").click()
    expect(sheet(page)).to_contain_text("No engine is in memory")
    expect(button(page)).to_contain_text("nothing loaded")
    expect(sheet(page).locator(".stack")).to_be_visible()
    assert pieces.count() == 0


def test_memory_returns_after_each_visit(visit, own_site):
    for _ in range(2):
        page = visit(address=own_site)
        speak(page, ["mms", "espeak"])
        for engine in ("mms", "espeak"):
            wait_for(page, engine, "done")
        expect(button(page)).to_contain_text("2 loaded", timeout=PATIENCE)
        page.context.close()
        until = time.monotonic() + PATIENCE / 1000
        while True:  # a look at the header is a visit, so it is a short one
            time.sleep(LEAVE_SECONDS + 2)
            page = visit(address=own_site)
            shown = in_header(page)
            page.context.close()
            if "nothing loaded" in shown:
                break
            assert time.monotonic() < until, shown


def test_nothing_a_visitor_unloads_ends_the_job_of_another(visit):
    page, stranger = visit(), visit()
    start_long_job(page)
    button(stranger).click()
    unload = row(stranger, "unruly").get_by_role("button", name="Unload")
    expect(unload).to_be_disabled(timeout=PATIENCE)
    expect(unload).to_have_attribute("title", "A job is using it.")
    for hostile in (unload, sheet(stranger).get_by_role("button", name="Unload all")):
        hostile.evaluate("button => { button.disabled = false; button.click() }")
    bar = track(page, "unruly").locator("progress").element_handle()
    before = float(bar.get_attribute("value"))
    page.wait_for_function("([bar, before]) => bar.value > before", arg=[bar, before])
    expect(row(stranger, "unruly").locator(".state")).to_have_text("in use")
    page.click("#stop")
    wait_for(page, "unruly", "stopped")
    expect(unload).to_be_enabled(timeout=PATIENCE)


def test_the_sheet_is_used_by_keyboard_alone(visit, own_site):
    page = visit(address=own_site)
    speak(page, ["mms", "vits"])
    for engine in ("mms", "vits"):
        wait_for(page, engine, "done")
    button(page).focus()
    expect(sheet(page)).to_be_hidden()
    page.keyboard.press("Enter")
    expect(button(page)).to_have_attribute("aria-expanded", "true")
    expect(row(page, "mms").get_by_role("button")).to_be_enabled(timeout=PATIENCE)
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Unload":
            break
    engine = page.evaluate("document.activeElement.dataset.id")
    page.keyboard.press("Enter")
    expect(row(page, engine)).to_have_count(0)
    assert page.evaluate("document.activeElement.textContent") == "Unload", "the next one's button"
    page.keyboard.press("Enter")
    expect(sheet(page)).to_contain_text("No engine is in memory")
    assert page.evaluate("document.activeElement.closest('#memory') !== null"), "the focus is not lost"
    page.keyboard.press("Escape")
    expect(sheet(page)).to_be_hidden()
    expect(button(page)).to_be_focused()
    expect(button(page)).to_have_attribute("aria-expanded", "false")


def test_the_sheet_stays_open_while_its_figures_change(visit, own_site):
    page = visit(address=own_site)
    speak(page, ["mms"])
    wait_for(page, "mms", "done")
    button(page).click()
    idle = row(page, "mms").locator("[data-name=Idle]")
    expect(idle).to_be_visible(timeout=PATIENCE)
    before = idle.inner_text()
    expect(idle).not_to_have_text(before, timeout=PATIENCE)
    expect(sheet(page)).to_be_visible()
    page.locator("h1").click()
    expect(sheet(page)).to_be_hidden()


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_sheet_fits_a_phone_and_can_be_read(visit, own_site, mode: str):
    page = visit(
        address=own_site,
        viewport={"width": 390, "height": 844},
        is_mobile=True,
        has_touch=True,
        color_scheme=mode,
    )
    speak(page, ["mms", "espeak"])
    for engine in ("mms", "espeak"):
        wait_for(page, engine, "done")
    button(page).tap()
    expect(row(page, "mms").get_by_role("button", name="Unload MMS")).to_be_visible(timeout=PATIENCE)
    box = sheet(page).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    outside = sheet(page).evaluate(
        """(sheet) => [...sheet.querySelectorAll('*')]
        .filter((e) => e.checkVisibility() && !e.closest('.unseen'))
        .filter((e) => { const box = e.getBoundingClientRect(); return box.right > 391 || box.left < -1 })
        .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert outside == []
    assert page.evaluate(PALE_TEXT) == []


def test_the_line_below_speak_foretells_the_press(visit):
    page = visit()
    line = page.locator("#forecast")
    speak(page, ["mms"])
    wait_for(page, "mms", "done")
    page.fill("#text textarea", "Something else to say, and rather more of it.")
    expect(line).to_contain_text("bout ", timeout=PATIENCE)
    page.fill("#text textarea", "")
    page.locator("#text textarea").blur()
    expect(line).to_have_text("")
    page.wait_for_timeout(1500)  # whatever the typing set off is over
    page.locator("#examples [data-pick]").first.click()
    expect(line).to_contain_text("bout ", timeout=8_000)  # sooner than it is refreshed anyway


def test_a_placement_can_be_forced(visit):
    page = visit()
    speak(page, ["mms"])
    wait_for(page, "mms", "done")
    page.locator("#advanced > button").click()
    page.locator("#placement input").click()
    page.get_by_role("option", name="block by block").click()  # the engines chosen at first lack this way
    page.click("#speak")
    expect(page.locator("[data-take]")).to_have_count(1, timeout=PATIENCE)
    done = wait_for(page, "mms", "done")
    done.get_by_text("Details").click()
    done.get_by_text("The whole record").click()
    assert '"forced": "group_block"' in done.locator("pre").inner_text()
    expect(done.locator(".facts")).to_contain_text("brought to the CPU block by block")
