"""The command line, run as a script would run it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).parents[1]


@pytest.fixture
def app(tmp_path):
    environment = {
        **os.environ,
        "SOUNDSTAGE_HOME": str(tmp_path / "home"),
        "SOUNDSTAGE_CACHE": str(tmp_path / "cache"),
        "SOUNDSTAGE_ENGINE_MODULES": "tests.unruly",
        "SOUNDSTAGE_DEVICE": "cpu",
    }

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "app.py", *arguments],
            cwd=ROOT,
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "app.py", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    run.start = start
    return run


def test_generate_speaks_for_real_and_writes_the_record(app, tmp_path):
    out = tmp_path / "a.wav"
    done = app(
        "generate", "espeak", "--text", "Good morning, dear listeners.", "--seed", "3", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "seed 3" in done.stdout
    samples, rate = soundfile.read(out)
    assert rate == 22050 and 1 < len(samples) / rate < 4 and abs(samples).max() > 0.1
    record = json.loads((tmp_path / "a.wav.json").read_text())
    assert record["order"]["request"]["text"] == "Good morning, dear listeners."
    assert record["order"]["seed"] == 3 and record["engine"] == "espeak"


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_generate_writes_other_formats_by_suffix(app, tmp_path, suffix):
    out = tmp_path / f"a.{suffix}"
    done = app("generate", "espeak", "--text", "Hello there", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == "espeak"
    assert soundfile.info(out).format == suffix.upper()


def test_a_taken_option_changes_the_result(app, tmp_path):
    seconds = []
    for speed in ("100", "300"):
        out = tmp_path / f"{speed}.wav"
        done = app(
            "generate", "espeak", "--text", "One two three four", "-o", f"speed={speed}", "--out", str(out)
        )
        assert done.returncode == 0, done.stderr
        seconds.append(soundfile.info(out).duration)
    assert seconds[0] > 2 * seconds[1]


BAD = {
    "empty text": (["espeak", "--text", "  "], "There is no text to speak"),
    "too long": (["espeak", "--text", "a" * 100_000], "takes at most"),
    "control character": (["espeak", "--text", "ring \x07"], "control character (U+0007) at position 6"),
    "cue": (["espeak", "--text", "ha [laughs]"], "would read the cue [laughs] aloud"),
    "tag": (["unruly", "--text", "<b>ha</b>"], "tag <b>"),
    "engine": (["nobody", "--text", "hello"], "There is no engine 'nobody'"),
    "option": (["espeak", "--text", "hello", "-o", "colour=red"], "there is no option 'colour'"),
    "range": (["espeak", "--text", "hello", "-o", "speed=9999"], "option 'speed' is '9999'"),
    "key": (["espeak", "--text", "hello", "-o", "speed"], "-o wants KEY=VALUE"),
    "language": (["espeak", "--text", "hello", "--language", "tlh"], "does not speak 'tlh'"),
    "seed": (["espeak", "--text", "hello", "--seed", "-4"], "--seed is -4"),
    "weights folder": (["unruly", "--text", "hello", "--weights", "/nowhere/at/all"], "/nowhere/at/all"),
    "budget": (["espeak", "--text", "hello", "--memory-budget", "lots"], "'lots' is not a size"),
    "licence": (["espeak", "--text", "hello", "--accept-licence", "xxts"], "There is no engine 'xxts'"),
    "usage": (["espeak"], "--text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_status_2(app, tmp_path, name):
    arguments, says = BAD[name]
    done = app("generate", *arguments, *([] if name == "usage" else ["--out", str(tmp_path / "a.wav")]))
    assert done.returncode == 2, done
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize("out", ["a.txt", "missing/a.wav", "folder.wav"])
def test_a_file_that_cannot_be_written_is_said_before_work_begins(app, tmp_path, out):
    (tmp_path / "folder.wav").mkdir()
    done = app("generate", "espeak", "--text", "hello", "--out", str(tmp_path / out))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert not (tmp_path / "home").exists()


SETTINGS = {
    "THREADS": ("abc", "The setting threads (SOUNDSTAGE_THREADS) is 'abc': input should be a valid integer"),
    "DEVICE": ("tpu", "The setting device (SOUNDSTAGE_DEVICE) is 'tpu'"),
    "ENGINE_MODULES": ("nowhere", "engine package 'nowhere' cannot be read"),
    "ACCEPT_LICENCES": ("xxts", "There is no engine 'xxts'"),
    "HOME": ("/dev/null/home", "Nothing can be kept in /dev/null/home"),
    "WEIGHTS": ("/nowhere/at/all", "There is no weights folder '/nowhere/at/all'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_setting_of_the_environment_is_one_line(app, tmp_path, name):
    value, says = SETTINGS[name]
    arguments = ("generate", "bark", "--text", "hello", "--out", str(tmp_path / "a.wav"))
    done = app(*arguments, **{f"SOUNDSTAGE_{name}": value})
    assert done.returncode in (1, 2)
    assert says in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_an_empty_setting_is_none(app):
    assert app("takes", "--json", SOUNDSTAGE_THREADS="", SOUNDSTAGE_DEVICE="").returncode == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--auth", "anna"], "--auth wants USER:PASS"),
        (["--port", "123456"], "'--port'"),
        (["--host", "256.0.0.1"], "The page cannot be served at 256.0.0.1"),
    ],
)
def test_serve_refuses_bad_flags_before_anything_starts(app, tmp_path, flags, says):
    done = app("serve", *flags)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "home").exists()


def test_an_unknown_tab_is_refused_with_the_known_ones(app):
    done = app("serve", "--tabs", "speech,nonsense")
    assert done.returncode == 2
    assert done.stderr == "There is no tab 'nonsense'; the tabs are: speech.\n"


def test_a_port_in_use_is_said_in_one_line(app):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = app("--port", port)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"cannot be served at 127.0.0.1:{port}: Address already in use" in done.stderr


def test_an_interrupted_job_leaves_nothing_and_says_130(app, tmp_path):
    arguments = ("generate", "unruly", "--text", "hi", "--weights", "miniature", "-o", "steps=100000")
    out = tmp_path / "a.wav"
    process = app.start(*arguments, "--out", str(out))
    miniature = tmp_path / "cache" / "miniatures" / "unruly"
    while not list(miniature.glob("*.json")):  # it has begun
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "")
    assert not out.exists()
    assert not list((tmp_path / "home" / "takes" / "kept").iterdir())
    assert not list((tmp_path / "home" / "takes" / "partial").iterdir())


def test_a_failure_is_exit_status_1_without_a_traceback_unless_asked(app, tmp_path):
    arguments = ("generate", "unruly", "--text", "hi", "-o", "behave=fail", "--weights", "miniature")
    done = app(*arguments, "--out", str(tmp_path / "a.wav"))
    assert done.returncode == 1
    assert done.stderr == "Unruly failed: a tensor was in the wrong place and more lines\n"
    assert "Traceback" in app(*arguments, "--out", str(tmp_path / "a.wav"), "--debug").stderr


def test_engines_are_listed_for_people_and_for_scripts(app):
    assert "eSpeak NG" in app("engines").stdout
    cards = {card["id"]: card for card in json.loads(app("engines", "--json").stdout)}
    assert cards["espeak"]["modality"] == "speech"
    assert cards["espeak"]["options"]["speed"]["maximum"] == 450


def test_a_licence_accepted_by_the_flag_stays_accepted(app, tmp_path):
    def accepted() -> bool:
        return "Nobody accepted" not in app("doctor").stdout

    assert not accepted()
    out = str(tmp_path / "a.wav")
    done = app("generate", "espeak", "--text", "hello", "--out", out, "--accept-licence", "xtts")
    assert done.returncode == 0, done.stderr
    assert accepted()


def test_takes_lists_what_was_made(app, tmp_path):
    assert json.loads(app("takes", "--json").stdout) == []
    app("generate", "espeak", "--text", "Remember me", "--out", str(tmp_path / "a.wav"))
    [take] = json.loads(app("takes", "--json").stdout)
    assert take["order"]["request"]["text"] == "Remember me"
    assert Path(take["folder"], "audio.wav").is_file()
    assert "Remember me" in app("takes").stdout
    assert not list((tmp_path / "home" / "takes" / "partial").iterdir())
    assert app("takes", "--limit", "-1").returncode == 2
