"""What a visitor does on the page, in the words of the tests."""

from __future__ import annotations

from collections.abc import Iterable

from playwright.sync_api import Locator, Page, expect

TEXT = "The kettle clicked off. Snow fell on the garden wall."


def reload(page: Page) -> None:
    page.reload()
    page.wait_for_selector("#speak:not([disabled])")


def choose(page: Page, engines: Iterable[str]) -> None:
    """Tick exactly these engines."""
    wanted = set(engines)
    for box in page.locator("#engines input[name=engine]").all():
        box.set_checked(box.get_attribute("value") in wanted)


def speak(page: Page, engines: Iterable[str], text: str = TEXT) -> None:
    choose(page, engines)
    page.fill("#text textarea", text)
    page.click("#speak")


def track(page: Page, engine: str) -> Locator:
    return page.locator(f'.track[data-engine="{engine}"]')


def wait_for(page: Page, engine: str, state: str) -> Locator:
    """The engine's track, once it is in that state."""
    expect(track(page, engine)).to_have_attribute("data-state", state, timeout=60_000)
    return track(page, engine)


def start_long_job(page: Page, steps: int = 60_000) -> None:
    """Start a job that reports steps for a minute unless it is stopped."""
    set_option(page, "unruly", "Steps", str(steps))
    speak(page, ["unruly"], "This one takes its time.")
    wait_for(page, "unruly", "running")


def set_option(page: Page, engine: str, label: str, value: str) -> None:
    """Set a number among an engine's options."""
    choose(page, [engine])
    if not page.locator(".options").first.is_visible():
        page.locator("#advanced > button").click()
    options = page.locator(".options:visible")
    field = options.get_by_label(f"number input for {label}")
    slider = options.get_by_label(f"range slider for {label}")
    # Gradio drops what is typed while it mounts a control; a person would see that and type again.
    for _ in range(5):
        field.fill(value)
        field.press("Tab")
        page.evaluate("() => new Promise(done => setTimeout(done, 250))")
        if field.input_value() == slider.input_value() == value:
            break
