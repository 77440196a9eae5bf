"""The doctor: one thing is broken at a time, and the finding names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import huggingface_hub.constants
import pytest

from core import doctor, weights
from core.card import Card, Checkpoint, Licence, Modality

ROOT = Path(doctor.__file__).parents[1]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, status: int = 0) -> None:
    (folder / name).write_text(f"#!/bin/sh\nexit {status}\n")
    (folder / name).chmod(0o755)


def card(**facts) -> Card:
    return Card(
        **{
            "id": "tiny",
            "name": "Tiny",
            "modality": Modality.SPEECH,
            "summary": "For the tests.",
            "checkpoints": (Checkpoint(repository="lab/tiny-voice", label="English"),),
            "code_licence": Licence(name="MIT"),
            "weights_licence": Licence(name="MIT"),
            **facts,
        }
    )


def test_ffmpeg_and_ffprobe_are_needed_as_a_pair(path):
    assert doctor.ffmpeg().says == "There is no ffmpeg, and nothing here needs one."
    program(path, "ffmpeg")
    alone = doctor.ffmpeg()
    assert alone.ok is False and "There is ffmpeg without ffprobe" in alone.says and alone.mend
    program(path, "ffprobe")
    assert doctor.ffmpeg().ok is True
    (path / "ffmpeg").unlink()
    assert "There is ffprobe without ffmpeg" in doctor.ffmpeg().says


def test_an_ffmpeg_that_does_not_run_is_found(path):
    program(path, "ffmpeg")
    program(path, "ffprobe", status=1)
    found = doctor.ffmpeg()
    assert found.ok is False and "ffprobe at" in found.says and "does not run" in found.says


def test_a_home_that_cannot_be_written_is_found(settings, tmp_path):
    assert [f.ok for f in doctor.folders(settings)] == [True, True]
    (tmp_path / "file").touch()
    broken = settings.model_copy(update={"home": tmp_path / "file" / "home"})
    home, cache = doctor.folders(broken)
    assert home.ok is False and "cannot be written" in home.says and "SOUNDSTAGE_HOME" in home.mend
    assert cache.ok is True


@pytest.mark.parametrize(("free", "ok"), [(5 * 10**8, False), (5 * 10**9, None), (5 * 10**10, True)])
def test_a_disk_that_fills_up_is_found(settings, monkeypatch, free, ok):
    usage = namedtuple("Usage", "free")(free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    found = doctor.disk(settings)
    assert found.ok is ok and weights.human(free) in found.says
    assert bool(found.mend) is (ok is not True)


def test_packages_that_are_absent_or_of_another_version_are_named(tmp_path):
    file = tmp_path / "requirements.txt"
    pin = f"pydantic=={version('pydantic')}"
    file.write_text(f"# why\n{pin}  # a reason\nnumpy=={version('numpy')} ; python_version > '3'\n")
    assert doctor.packages(file).ok is True
    file.write_text(f"{pin}\nnumpy==0.0.1\n")
    other = doctor.packages(file)
    assert other.ok is None and f"numpy {version('numpy')} (wanted 0.0.1)" in other.says
    file.write_text(f"{pin}\nno-such-package==1.0\nnumpy==0.0.1\n")
    absent = doctor.packages(file)
    assert (
        absent.ok is False
        and "Not installed: no-such-package." in absent.says
        and "pip install" in absent.mend
    )
    file.unlink()
    assert doctor.packages(file).ok is None


def test_a_hub_out_of_reach_is_a_note_that_tells_setting_from_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.reach(weights.Hub()).mend
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = doctor.reach(weights.Hub())
    assert found.ok is None and found.says.startswith("http://127.0.0.1:9 does not answer")


def test_a_licence_that_nobody_accepted_is_a_note(settings):
    gated = card(weights_licence=Licence(name="CPML", url="https://example.org/cpml", must_accept=True))
    first, _ = doctor.engine(gated, settings, False, frozenset())
    assert first.ok is None and "CPML" in first.says
    assert "example.org/cpml" in first.mend and "--accept-licence tiny" in first.mend
    assert [f.name for f in doctor.engine(gated, settings, False, frozenset({"tiny"}))] == ["Tiny weights"]


def test_the_state_of_each_engines_weights_is_told(settings):
    (offline,) = doctor.engine(card(), settings, False, frozenset())
    assert offline.ok is None and "Untrained miniature" in offline.says and "Go online" in offline.mend
    (online,) = doctor.engine(card(), settings, True, frozenset())
    assert online.ok is True and "will be downloaded first" in online.says
    (refused,) = doctor.engine(card(), settings.model_copy(update={"weights": "/no"}), True, frozenset())
    assert refused.ok is False and "There is no weights folder '/no'" in refused.says


def test_damaged_weights_in_the_cache_are_found(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--lab--tiny-voice"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    two = card(checkpoints=(*card().checkpoints, Checkpoint(repository="lab/other", label="Hindi")))
    (whole,) = doctor.engine(two, settings, True, frozenset())
    assert whole.ok is True
    assert "English: Real weights, in the cache." in whole.says and "Hindi: Real weights; they" in whole.says
    (snapshot / "model.safetensors").write_bytes(b"\2")
    (spoilt,) = doctor.engine(two, settings, True, frozenset())
    assert spoilt.ok is False and "model.safetensors is not a safetensors file" in spoilt.says
    assert spoilt.mend == f"Delete {snapshot}, and it will be downloaded again."


def fake(folder: Path, name: str, error: str) -> None:
    """A package of that name whose import fails."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"raise {error}\n")


def test_a_broken_torch_is_found_without_importing_it_here(settings, tmp_path, monkeypatch):
    fake(tmp_path / "fakes", "torch", "ImportError('libtorch_cpu.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    (found,) = doctor.libraries(settings)
    assert found.ok is False and "libtorch_cpu.so: cannot open" in found.says and "pip install" in found.mend


def test_broken_companions_of_torch_and_an_absent_device_are_found(settings, tmp_path, monkeypatch):
    fake(tmp_path / "fakes", "torchaudio", "OSError('libcudart.so.12: cannot open')")
    fake(tmp_path / "fakes", "torchvision", "RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    found = {f.name: f for f in doctor.libraries(settings.model_copy(update={"device": "cuda:77"}))}
    assert found["torch"].ok is True
    assert found["device"].ok is False and "no device 'cuda:77'" in found["device"].says
    assert found["torchaudio"].ok is False and "libcudart.so.12" in found["torchaudio"].says
    assert found["torchvision"].ok is False and "torchvision::nms does not exist" in found["torchvision"].says
    assert "pip uninstall torchvision" in found["torchvision"].mend


def test_the_command_prints_every_finding_and_imports_no_torch_itself(tmp_path):
    environment = {
        **os.environ,
        "SOUNDSTAGE_HOME": str(tmp_path / "home"),
        "SOUNDSTAGE_CACHE": str(tmp_path / "cache"),
        "SOUNDSTAGE_DEVICE": "cpu",
    }
    script = (
        "import json, sys; from core.doctor import examine; from core.settings import Settings; "
        "found = [vars(f) for f in examine(Settings())]; print(json.dumps([found, 'torch' in sys.modules]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr
    found, torch_here = json.loads(ran.stdout)
    assert not torch_here
    names = [f["name"] for f in found]
    assert {
        "Python",
        "packages",
        "home",
        "cache",
        "disk",
        "ffmpeg",
        "hub",
        "torch",
        "device",
        "torchaudio",
    } <= set(names)
    assert len(names) == len(set(names))
    for finding in found:
        assert finding["says"].endswith(".")
        assert finding["ok"] is not False or finding["mend"]
    (torchaudio,) = [f for f in found if f["name"] == "torchaudio"]
    assert torchaudio["ok"] is True
