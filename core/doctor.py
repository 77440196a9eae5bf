"""Looks an installation over, and says in a sentence each what is wrong and how to mend it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import core
from core import weights
from core.card import Card
from core.catalog import Catalog
from core.errors import SoundstageError
from core.settings import Settings
from core.weights.folders import damage
from core.weights.hub import offline_by_setting

ROOT = Path(core.__file__).parents[1]
_LEAST_FREE = 10**9  # bytes; below it not even a miniature and a few takes are safe
_GOOD_FREE = 10**10  # bytes; the larger checkpoints need 5 GB and more
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)\s*(?:;.*)?$")


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool | None  # None: it works, but worth knowing
    says: str  # one sentence
    mend: str = ""  # one sentence; empty when there is nothing to do


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything, cheap things first."""
    hub = weights.Hub()
    hub.probe()
    yield Finding("Python", True, f"Python {platform.python_version()}.")
    yield packages(ROOT / "requirements.txt")
    yield from folders(settings)
    yield disk(settings)
    yield ffmpeg()
    yield reach(hub)
    cards = Catalog(settings.engine_modules).cards()
    accepted = weights.Licences(settings.home, settings.accept_licences).accepted()
    for card in cards:
        if card.has_weights:
            yield from engine(card, settings, hub.online(), accepted)
    yield from libraries(settings)


def packages(requirements: Path) -> Finding:
    """Installed versions against the pins of a requirements file."""
    mend = f"Run: pip install -r {requirements.name}"
    if not requirements.is_file():
        return Finding("packages", None, f"There is no {requirements.name}, so versions were not compared.")
    absent, other, same = [], [], 0
    for line in requirements.read_text("utf-8").splitlines():
        if not (pin := _PIN.match(line.strip())):
            continue
        name, wanted = pin.groups()
        try:
            installed = version(name).partition("+")[0]  # "2.13.0+cpu" is a build of 2.13.0
        except PackageNotFoundError:
            absent.append(name)
            continue
        if installed == wanted.partition("+")[0]:
            same += 1
        else:
            other.append(f"{name} {installed} (wanted {wanted})")
    if absent:
        return Finding("packages", False, f"Not installed: {_some(absent)}.", mend)
    if other:
        return Finding("packages", None, f"Other versions than the tested ones: {_some(other)}.", mend)
    return Finding("packages", True, f"All {same} pinned packages are as tested.")


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def folders(settings: Settings) -> Iterator[Finding]:
    """Whether takes and miniatures can be written."""
    for name, folder, setting in (
        ("home", settings.home, "SOUNDSTAGE_HOME"),
        ("cache", settings.cache, "SOUNDSTAGE_CACHE"),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
            yield Finding(
                name,
                False,
                f"{folder} cannot be written: {reason}.",
                f"Let this user write there, or set {setting} to another folder.",
            )
        else:
            yield Finding(name, True, f"{folder} can be written.")


def disk(settings: Settings) -> Finding:
    """Free space where takes, miniatures and weights go."""
    from huggingface_hub import constants

    places = {"takes": settings.home, "miniatures": settings.cache, "weights": Path(constants.HF_HUB_CACHE)}
    free = {what: shutil.disk_usage(_existing(folder)).free for what, folder in places.items()}
    what = min(free, key=lambda name: free[name])
    says = f"{weights.human(free[what])} are free for {what} at {places[what]}."
    if free[what] < _GOOD_FREE:
        mend = "Make room, or move it with SOUNDSTAGE_HOME, SOUNDSTAGE_CACHE or HF_HOME."
        return Finding("disk", False if free[what] < _LEAST_FREE else None, says, mend)
    return Finding("disk", True, says)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def ffmpeg() -> Finding:
    """Gradio uses the two programs as a pair: it asks ffprobe as soon as it sees ffmpeg."""
    there = {name: shutil.which(name) for name in ("ffmpeg", "ffprobe")}
    mend = "Install the ffmpeg package of your system; it brings both."
    if not any(there.values()):
        return Finding("ffmpeg", True, "There is no ffmpeg, and nothing here needs one.")
    if not all(there.values()):
        found, lost = sorted(there, key=lambda name: there[name] is None)
        return Finding("ffmpeg", False, f"There is {found} without {lost}; Gradio needs both or none.", mend)
    for name, program in there.items():
        try:
            subprocess.run([str(program), "-version"], capture_output=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError) as error:
            return Finding("ffmpeg", False, f"{name} at {program} does not run: {error}.", mend)
    return Finding("ffmpeg", True, "ffmpeg and ffprobe are there.")


def reach(hub: weights.Hub) -> Finding:
    """Whether weights can be downloaded."""
    if hub.online():
        return Finding("hub", True, "The Hugging Face hub answers.")
    if offline_by_setting():
        mend = "Unset HF_HUB_OFFLINE to download weights."
        return Finding("hub", None, "HF_HUB_OFFLINE keeps this machine off the hub.", mend)
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return Finding(
        "hub",
        None,
        f"{where} does not answer; engines without cached weights use untrained miniatures.",
        "Check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT.",
    )


def engine(card: Card, settings: Settings, online: bool, accepted: frozenset[str]) -> Iterator[Finding]:
    """One engine's weights and the licence they are under."""
    licence = card.weights_licence
    if licence and licence.must_accept and card.id not in accepted:
        yield Finding(
            f"{card.name} licence",
            None,
            f"Nobody accepted the {licence.name} for this installation; each visitor is asked.",
            f"Read {licence.url or 'it'}, then accept it on the page or with --accept-licence {card.id}.",
        )
    says: dict[str, list[str]] = {}
    worst: bool | None = True
    mend = ""
    for checkpoint in card.checkpoints:
        label = checkpoint.label or checkpoint.repository.rsplit("/", 1)[-1]
        try:
            plan = weights.plan(card, checkpoint, settings.weights, online)
        except SoundstageError as error:
            worst, mend = False, "Choose other weights with --weights or SOUNDSTAGE_WEIGHTS."
            says.setdefault(str(error), []).append(label)
            continue
        if fault := next(filter(None, map(damage, plan.cached.values())), ""):
            spoilt = ", ".join(str(folder) for folder in plan.cached.values() if damage(folder))
            worst, mend = False, f"Delete {spoilt}, and it will be downloaded again."
            says.setdefault(f"The cached weights cannot be used: {fault}.", []).append(label)
            continue
        if plan.kind == "miniature" and worst:
            worst, mend = None, "Go online once to download the real weights."
        says.setdefault(plan.sentence, []).append(label)
    text = " ".join(s if len(says) == 1 else f"{_some(labels)}: {s}" for s, labels in says.items())
    yield Finding(f"{card.name} weights", worst, text, mend)


def libraries(settings: Settings) -> Iterator[Finding]:
    """Device, torchaudio and torchvision, asked in a process of its own."""
    mend = "Run: pip install -r requirements.txt"
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "core.worker.selfcheck", settings.device],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        yield Finding("torch", False, f"torch did not start within {late.timeout:.0f} s.", mend)
        return
    if ran.returncode != 0:
        last = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
        yield Finding("torch", False, f"torch does not start: {last}", mend)
        return
    facts = json.loads(ran.stdout.splitlines()[-1])
    versions, errors = facts["versions"], facts["errors"]
    yield Finding("torch", True, f"torch {versions['torch']}.")
    if facts["device_error"]:
        yield Finding("device", False, facts["device_error"], "Set SOUNDSTAGE_DEVICE to auto.")
    else:
        room = f"{weights.human(facts['free'])} of {weights.human(facts['total'])} memory free"
        yield Finding("device", True, f"{facts['device']}, {room}.")
    yield _torchaudio(versions["torchaudio"], errors["torchaudio"], facts["torchaudio_mended"])
    if errors["torchvision"]:
        yield Finding(
            "torchvision",
            False,
            f"torchvision {versions['torchvision']} does not go with this torch ({errors['torchvision']}).",
            "Run: pip uninstall torchvision. Nothing here needs it.",
        )


def _torchaudio(installed: str, error: str, mended: bool) -> Finding:
    if error:
        return Finding(
            "torchaudio",
            False,
            f"torchaudio {installed} cannot be imported ({error}), and transformers fails with it.",
            "Run: pip install -r requirements.txt",
        )
    if mended:
        return Finding(
            "torchaudio",
            True,
            f"torchaudio {installed} does not load its compiled part beside this torch; "
            "its pure torch code is used.",
        )
    return Finding(
        "torchaudio", True, f"torchaudio {installed}." if installed else "torchaudio is not there."
    )
