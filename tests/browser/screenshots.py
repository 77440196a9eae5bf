"""Take the README's screenshots: `make screenshots` writes docs/images/*.png."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.acts import speak, wait_for
from tests.browser.conftest import FLAGS, ROOT, chromium, start_server, stop_server

IMAGES = ROOT / "docs" / "images"
TEXT = "The stage is dark. Then one light comes up, and every voice speaks at once."
ENGINES = ("espeak", "vits", "mms", "xtts")
SHOTS: dict[str, dict[str, Any]] = {
    "speech": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "speech-dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "speech-phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "device_scale_factor": 2},
}  # a phone's page is too long for a README: there, what the screen shows of the first result


def shoot(browser: Browser, address: str, settings: dict[str, Any]) -> bytes:
    """The page after some engines spoke, as png."""
    page = speak_once(browser, address, settings)
    if settings.get("is_mobile"):
        page.locator("#say").evaluate("element => element.scrollIntoView()")
        return page.screenshot(animations="disabled")
    return page.screenshot(full_page=True, animations="disabled")


def shoot_memory(browser: Browser, address: str) -> bytes:
    """The header with its sheet, as png."""
    page = speak_once(browser, address, SHOTS["speech"])
    page.locator("#memory-chip button[aria-expanded]").click()
    states = page.locator("#memory .state")
    expect(states).to_have_text(["loaded"] * len(ENGINES), timeout=20_000)
    height = page.locator("#memory").evaluate("sheet => sheet.getBoundingClientRect().bottom")
    clip = {"x": 0.0, "y": 0.0, "width": 1280.0, "height": height + 28}
    return page.screenshot(clip=clip, animations="disabled")


def save(shot: bytes, name: str, colours: int) -> None:
    image = Image.open(io.BytesIO(shot)).convert("RGB").quantize(colours)
    image.save(IMAGES / f"{name}.png", optimize=True)
    print(IMAGES / f"{name}.png")


def speak_once(browser: Browser, address: str, settings: dict[str, Any]) -> Page:
    page = browser.new_context(**settings).new_page()
    page.goto(address)
    page.wait_for_selector("#speak:not([disabled])")
    speak(page, ENGINES, TEXT)
    for engine in ENGINES:
        wait_for(page, engine, "done")
    page.locator("img.mel").last.evaluate("image => image.decode()")
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    return page


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        server, address = start_server(Path(home))
        try:
            browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
            for name, settings in SHOTS.items():
                # These few are hard to tell from all of them, at a third of the bytes.
                save(shoot(browser, address, settings), name, 128)
            save(shoot_memory(browser, address), "memory", 256)
        finally:
            stop_server(server)


if __name__ == "__main__":
    main()
