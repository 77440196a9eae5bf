"""The Speech tab in a real browser, against a real server with miniatures."""

from __future__ import annotations

import csv
import json
import re
import zipfile

import pytest
from playwright.sync_api import expect

from tests.browser.acts import TEXT, choose, reload, set_option, speak, start_long_job, track, wait_for

pytestmark = pytest.mark.browser


def test_two_engines_speak_and_their_players_play(visit):
    page = visit()
    speak(page, ["espeak", "mms"], " ".join([TEXT] * 4))
    for engine in ("espeak", "mms"):
        done = wait_for(page, engine, "done")
        path = done.locator("svg.wave path").first.get_attribute("d")
        assert path is not None and path.count(",") >= 400, "a waveform of hundreds of points"
        picture = done.locator("img.mel").element_handle()
        page.wait_for_function("image => image.complete && image.naturalWidth > 50", arg=picture)
        audio = done.locator("audio").element_handle()
        page.wait_for_function("audio => audio.duration > 5", arg=audio)
        done.get_by_role("button", name="Play").click()
        page.wait_for_function("audio => audio.currentTime > 0.2", arg=audio)
        expect(done.get_by_role("button", name="Pause")).to_be_visible()
    first = track(page, "espeak").locator("audio").element_handle()
    assert first.evaluate("audio => audio.paused && !audio.ended"), "one player at a time"
    assert float(track(page, "mms").locator("[data-clock]").inner_text().split()[0]) > 0
    expect(page.get_by_role("heading", name="What each one cost")).to_be_visible()
    expect(page.locator(".comparison tbody tr")).to_have_count(2)
    expect(track(page, "mms").locator(".noise")).to_have_text("untrained miniature: noise")


def test_tracks_share_one_time_axis(visit):
    page = visit()
    speak(page, ["espeak", "mms"])
    seconds, widths = [], []
    for engine in ("espeak", "mms"):
        done = wait_for(page, engine, "done")
        seconds.append(float(done.locator("[data-seek]").get_attribute("max")))
    for engine in ("espeak", "mms"):
        box = track(page, engine).locator(".wave-lane .plot").bounding_box()
        widths.append(box["width"])
    assert abs(widths[0] / widths[1] - seconds[0] / seconds[1]) < 0.02


def test_seeking_by_keyboard_moves_the_audio(visit):
    page = visit()
    speak(page, ["espeak"])
    done = wait_for(page, "espeak", "done")
    audio = done.locator("audio").element_handle()
    page.wait_for_function("audio => audio.duration > 0.5", arg=audio)
    done.locator("[data-seek]").focus()
    page.keyboard.press("End")
    page.wait_for_function("audio => audio.currentTime > audio.duration * 0.9", arg=audio)


def test_reload_finds_the_running_job_and_stop_ends_it(visit):
    page = visit()
    start_long_job(page)
    reload(page)
    progress = wait_for(page, "unruly", "running").locator("progress")
    before = float(progress.get_attribute("value"))
    page.wait_for_function("([bar, before]) => bar.value > before", arg=[progress.element_handle(), before])
    page.click("#stop")
    stopped = wait_for(page, "unruly", "stopped")
    expect(stopped.locator(".reason")).to_have_text("Stopped.")


def test_reload_finds_finished_work(visit):
    page = visit()
    speak(page, ["espeak"])
    wait_for(page, "espeak", "done")
    reload(page)
    done = wait_for(page, "espeak", "done")
    page.wait_for_function("audio => audio.duration > 0.5", arg=done.locator("audio").element_handle())


def test_two_tabs_of_one_browser_watch_the_same_job(visit):
    page = visit()
    start_long_job(page)
    second = visit(page.context)
    wait_for(second, "unruly", "running")
    second.click("#stop")
    wait_for(second, "unruly", "stopped")
    wait_for(page, "unruly", "stopped")


def test_another_browser_sees_nothing_and_stops_nothing(visit):
    page, stranger = visit(), visit()
    start_long_job(page)
    stranger.click("#stop")
    speak(stranger, ["espeak"], "Mine.")
    expect(track(stranger, "espeak")).to_have_attribute("data-state", "queued")
    assert track(stranger, "unruly").count() == 0
    expect(track(page, "unruly")).to_have_attribute("data-state", "running")
    page.click("#stop")
    wait_for(page, "unruly", "stopped")
    wait_for(stranger, "espeak", "done")
    assert track(page, "espeak").count() == 0
    expect(page.locator("[data-take]")).to_have_count(0)


def test_one_of_several_jobs_can_be_stopped(visit):
    page = visit()
    set_option(page, "unruly", "Steps", "60000")
    speak(page, ["unruly", "mms"])
    one, other = ("unruly", "mms")
    wait_for(page, one, "running")
    track(page, one).get_by_role("button", name="Stop").click()
    wait_for(page, one, "stopped")
    wait_for(page, other, "done")


def test_bad_input_is_named_and_nothing_is_queued(visit):
    page = visit()
    alert = page.get_by_role("alert")
    speak(page, ["espeak"], "")
    expect(alert).to_have_text("There is no text to speak; type a sentence.")
    speak(page, ["espeak", "bark"], "Well [laughs] that is new.")
    expect(alert).to_contain_text("would read the cue [laughs] aloud")
    choose(page, [])
    page.click("#speak")
    expect(alert).to_contain_text("No engine is chosen")
    assert page.locator(".track").count() == 0
    speak(page, ["espeak"])
    wait_for(page, "espeak", "done")
    expect(alert).to_have_count(0)


def test_a_failure_keeps_its_reason_and_what_the_others_made(visit):
    page = visit()
    choose(page, ["unruly"])
    page.locator("#advanced > button").click()
    page.locator(".options:visible").get_by_label("Behave").click()
    page.get_by_role("option", name="fail", exact=True).click()
    speak(page, ["espeak", "unruly"])
    wait_for(page, "espeak", "done")
    failed = wait_for(page, "unruly", "failed")
    expect(failed.locator(".reason")).to_contain_text("a tensor was in the wrong place")


def test_cloning_asks_for_consent(visit):
    page = visit()
    expect(page.locator("#consent")).to_have_count(0)
    page.locator("#voice-fold > button").click()
    page.locator("#voices [data-pick]").first.click()
    consent = page.get_by_label("I may use this voice")
    expect(consent).to_be_visible()
    expect(page.locator("#voice-text textarea")).not_to_have_value("")
    speak(page, ["xtts"], "Good morning.")
    expect(page.get_by_role("alert")).to_contain_text("Confirm that you may use this voice")
    consent.check()
    page.click("#speak")
    done = wait_for(page, "xtts", "done")
    done.get_by_text("Details").click()
    expect(done.locator(".pairs")).to_contain_text("cloned from a reference, with consent")


def test_a_take_made_again_is_bitwise_the_same(visit):
    page = visit()
    speak(page, ["mms"])
    done = wait_for(page, "mms", "done")
    done.get_by_role("button", name="Make").click()
    expect(done.locator(".verdict")).to_have_text("Made again: bitwise identical.", timeout=60_000)
    expect(page.locator("[data-take]")).to_have_count(1)


def test_earlier_takes_play_and_can_be_deleted(visit):
    page = visit()
    speak(page, ["espeak"], "The first one.")
    wait_for(page, "espeak", "done")
    speak(page, ["espeak"], "The second one.")
    row = page.locator("[data-take]", has_text="The first one.")
    expect(row).to_have_count(1, timeout=60_000)
    row.get_by_role("button", name="Play").click()
    page.wait_for_function("audio => audio.currentTime > 0.1", arg=row.locator("audio").element_handle())
    row.get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)


def test_csv_and_zip_can_be_taken_home(visit, tmp_path):
    page = visit()
    speak(page, ["espeak", "mms"])
    for engine in ("espeak", "mms"):
        wait_for(page, engine, "done")
    with page.expect_download() as table:
        page.click("#csv")
    table.value.save_as(tmp_path / "runs.csv")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [row["engine"] for row in rows] == ["espeak", "mms"]
    assert all(float(row["generate_seconds"]) > 0 and row["text"] == TEXT for row in rows)
    with page.expect_download() as archive:
        page.click("#zip")
    archive.value.save_as(tmp_path / "takes.zip")
    with zipfile.ZipFile(tmp_path / "takes.zip") as files:
        names = files.namelist()
        record = json.loads(files.read(next(n for n in names if n.endswith("espeak/record.json"))))
    assert "index.html" in names
    assert sum(name.endswith("audio.wav") for name in names) == 2
    assert record["order"]["request"]["text"] == TEXT


def test_sound_is_heard_while_it_is_made_and_to_its_end(visit):
    page = visit()
    # Later chunks are gone by the time they are asked for, as when a job ends: the rest comes from the whole.
    page.route(re.compile(r"chunk-\d*[1-9]\.wav"), lambda route: route.fulfill(status=404))
    speak(page, ["xtts"], " ".join(["One more sentence to speak."] * 8))
    live = page.get_by_role("button", name="Listen while it is made")
    live.click(timeout=60_000)
    page.wait_for_function("[...soundstage.streams.values()].some(s => s.seen === 1)")
    assert track(page, "xtts").get_attribute("data-state") == "running", "heard before it is finished"
    expect(live).to_have_attribute("aria-pressed", "true")
    done = wait_for(page, "xtts", "done")
    length = float(done.locator("[data-seek]").get_attribute("max"))
    page.wait_for_function(
        "length => [...soundstage.streams.values()].some(s => Math.abs(s.played - length) < 0.02)", arg=length
    )


def test_everything_is_reached_by_keyboard_alone(visit):
    page = visit()
    page.locator("#text textarea").focus()
    page.keyboard.type("Only keys.")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.value") == "bark":
            break
    assert page.evaluate("document.activeElement.type") == "checkbox"
    was = page.evaluate("document.activeElement.checked")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.checked") is not was
    if not was:
        page.keyboard.press("Space")
    ring = page.evaluate("getComputedStyle(document.activeElement.closest('.engine')).outlineStyle")
    assert ring == "solid", "focus is seen"
    page.keyboard.press("Control+Enter")
    done = wait_for(page, "espeak", "done")
    done.get_by_role("button", name="Play").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("audio => audio.currentTime > 0.1", arg=done.locator("audio").element_handle())


def test_engines_say_why_they_do_not_fit(visit):
    page = visit()
    card = page.locator(".engine", has=page.locator("input[value=f5]"))
    expect(card.locator("em")).to_have_text("needs a voice")
    page.get_by_label("Language").click()
    page.get_by_label("Language").fill("Swahili")
    page.get_by_role("option", name="Swahili").click()
    expect(card.locator("em")).to_have_text("no Swahili")
    expect(card.locator("input")).to_be_disabled()
    expect(page.locator("#engines input[value=espeak]")).to_be_enabled()


def test_examples_follow_the_language_and_fill_the_text(visit):
    page = visit()
    page.get_by_label("Language").click()
    page.get_by_label("Language").fill("German")
    page.get_by_role("option", name="German", exact=True).click()
    expect(page.locator("#examples [data-pick]").first).to_contain_text("Am frühen Morgen")
    page.locator("#examples [data-pick]").first.click()
    expect(page.locator("#text textarea")).to_have_value(re.compile("^Am frühen Morgen"))
    length = len(page.locator("#text textarea").input_value())
    expect(page.locator("#count")).to_contain_text(f"{length} characters")


def test_a_phone_scrolls_only_down(visit):
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    speak(page, ["espeak", "mms"])
    for engine in ("espeak", "mms"):
        wait_for(page, engine, "done")
    expect(page.locator(".comparison")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    outside = page.evaluate(
        """() => [...document.querySelectorAll('.gradio-container *')]
        .filter((e) => e.checkVisibility() && !e.closest('.table-scroll, .unseen, svg'))
        .filter((e) => { const box = e.getBoundingClientRect(); return box.right > 391 || box.left < -1 })
        .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert outside == [], "nothing lies beyond the screen's edge"


def test_text_has_contrast_in_light_and_dark(visit):
    for mode in ("light", "dark"):
        page = visit(color_scheme=mode)
        speak(page, ["espeak", "mms"])
        for engine in ("espeak", "mms"):
            wait_for(page, engine, "done")
        assert page.evaluate("document.body.classList.contains('dark')") is (mode == "dark")
        pale = page.evaluate(PALE_TEXT)
        assert pale == [], f"{mode}: text paler than 4.5 to 1"


def test_the_lamp_switches_the_light_and_is_remembered(visit):
    page = visit(color_scheme="light")
    page.get_by_role("button", name="Switch between light and dark").click()
    page.wait_for_function("document.body.classList.contains('dark')")
    reload(page)
    page.wait_for_function("document.body.classList.contains('dark')")


def test_controls_have_names(visit):
    page = visit()
    speak(page, ["espeak"])
    wait_for(page, "espeak", "done")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, a[href], input, select, textarea, audio[controls]')]
        .filter((e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: false }))
        .filter((e) => !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.title
            && !(e.labels && e.labels.length) && !e.getAttribute('aria-labelledby'))
        .map((e) => e.outerHTML.slice(0, 160))"""
    )
    assert nameless == []


PALE_TEXT = """() => {
  const parse = (text) => {
    const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
    const pen = canvas.getContext('2d', { willReadFrequently: true });
    pen.fillStyle = text; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      const colour = parse(style.backgroundColor);
      if (style.backgroundColor !== 'rgba(0, 0, 0, 0)' && colour[3] > 250) return colour;
    }
    return [255, 255, 255, 255];
  };
  const pale = [];
  for (const e of document.querySelectorAll('.gradio-container *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest('[disabled], .hertz, .unfit, svg')) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(parse(style.color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) pale.push(`${ratio.toFixed(2)} ${e.className} ${e.textContent.trim().slice(0, 30)}`);
  }
  return pale;
}"""
