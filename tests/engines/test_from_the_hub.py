"""Every engine speaks with weights that came over the hub's protocol, under the real names."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from core import weights
from core.card import Ability, Card, Checkpoint
from core.catalog import Catalog
from core.media import Audio, write_audio
from core.requests import SpeechRequest
from core.weights.folders import damage, parts
from tests.hub_server import LoopbackHub, loopback_hub, point_at, sha256
from tests.support import RecordingRun, load, miniature, seed_everything

CARDS = [card for card in Catalog().cards() if card.has_weights]


def serve(hub: LoopbackHub, checkpoint: Checkpoint, folder: Path, place: Path) -> Checkpoint:
    """Publish a checkpoint's folder as its repositories, or as its archive; returns it as it is asked for."""
    for name, part in parts(checkpoint):
        source = folder / name
        if not source.is_dir():
            continue
        if part.archive:
            hub.files["weights.zip"] = zipped(source, Path(part.archive).stem)
            return checkpoint.model_copy(update={"archive": f"{hub.address}/files/weights.zip"})
        inner = {other for other, _ in parts(checkpoint) if other} if not name else set()
        served = place / part.repository
        shutil.copytree(
            source, served, ignore=lambda at, names, s=source, i=inner: i if Path(at) == s else ()
        )
        hub.repositories[part.repository] = served
    return checkpoint


def zipped(folder: Path, top: str) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, Path(top) / file.relative_to(folder))
    return memory.getvalue()


def request(card: Card, folder: Path) -> SpeechRequest:
    language = card.languages[0] if card.languages and "en" not in card.languages else "en"
    if Ability.CLONE not in card.abilities:
        return SpeechRequest(text="Hello there.", language=language)
    voice = folder / "voice.wav"
    time = np.arange(24000 * 7) / 24000
    hum = 0.3 * np.sin(2 * np.pi * (140 + 30 * np.sin(3 * time)) * time) * (1 + np.sin(9 * time)) / 2
    write_audio(voice, Audio(hum.astype(np.float32), 24000))
    return SpeechRequest(text="Hello there.", language=language, voice=voice, voice_text="Hum.", consent=True)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_an_engine_speaks_with_what_the_hub_sent(card, tmp_path, monkeypatch):
    with loopback_hub() as hub:
        point_at(hub, tmp_path / "home", monkeypatch)
        asked_for = request(card, tmp_path)
        options = card.options()
        checkpoint = card.checkpoint(asked_for, options)
        own = miniature(card.id, card.checkpoints.index(checkpoint))
        checkpoint = serve(hub, checkpoint, own, tmp_path / "served")
        got = weights.resolve(
            card,
            checkpoint,
            "hub",
            online=True,
            cache=tmp_path / "cache",
            package=f"core.engines.{card.id}",
            report=lambda *_: None,
        )
        assert got.kind == "hub" and len(got.commit) in (40, 64)
        came = {f.relative_to(got.folder): f.read_bytes() for f in got.folder.rglob("*") if f.is_file()}
        assert came == {f.relative_to(own): f.read_bytes() for f in own.rglob("*") if f.is_file()}

        hub.asked.clear()
        engine = load(card.id, got.folder)
        seed_everything(1)
        spoken = engine.generate(asked_for, options, RecordingRun(1))
        engine.close()

        assert spoken.samples.size and np.isfinite(spoken.samples).all()
        assert hub.asked == []  # loading and speaking went nowhere
    for blob in (tmp_path / "home").glob("hub/models--*/blobs/*"):
        if len(blob.name) == 64:
            assert sha256(blob) == blob.name, "the engine wrote into the hub's cache"
    assert damage(got.folder) == ""
