"""Loading of checkpoints of some hundred MB, against what the libraries themselves offer.

Both sides read every weight once before the clock stops: weights that are mapped from their file are
otherwise not yet there. Time is taken turn about in one process; peak memory, each in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.engines.quirks import mend_torchaudio
from tests.benchmarks.rows import Row, median
from tests.support import miniature

ROUNDS = 9
BOUND = 0.9  # of the library's time
COPIES = 1.2  # of the weights' bytes: one, and the tables that a skeleton holds until they are read
MB = 1_000_000
NEW_PEAK = "5"  # to /proc/self/clear_refs: forget the highest resident size so far


def measure() -> list[Row]:
    mend_torchaudio()
    rows = []
    for engine, build in BUILDERS.items():
        with tempfile.TemporaryDirectory() as place:
            build(Path(place))
            rows += [_time(engine, Path(place), dtype) for dtype in DTYPES[engine]]
            rows.append(_memory(engine, Path(place)))
    return rows


def _time(engine: str, folder: Path, dtype: str) -> Row:
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(ROUNDS + 1):
        for who, taken in seconds.items():
            started = time.perf_counter()
            loaded = LOADERS[engine, who](folder, dtype)
            _read(loaded)
            taken.append(time.perf_counter() - started)
            del loaded
            gc.collect()
    plain, ours = (median(taken[1:]) for taken in seconds.values())  # the first brings files into the cache
    return Row(
        f"Time to load {engine} of {_bytes(folder) / MB:.0f} MB in {dtype}, over the plain library's",
        f"{ours / plain:.2f} x ({ours:.2f} s over {plain:.2f} s)",
        f"{BOUND} x",
        ours / plain <= BOUND,
        f"every weight read; on {_device()}; median of {ROUNDS}",
    )


def _memory(engine: str, folder: Path) -> Row:
    weights = _bytes(folder)
    plain, ours = (_peak(engine, who, folder) / weights for who in ("plain", "ours"))
    return Row(
        f"Peak memory of loading {engine}, over its weights",
        f"{ours:.2f} x",
        f"{COPIES} x",
        ours <= COPIES,
        f"{weights / MB:.0f} MB; the plain library {plain:.2f} x",
    )


def _peak(engine: str, who: str, folder: Path) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.loading", engine, who, str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _measure_peak(engine: str, who: str, folder: Path) -> int:
    """Bytes by which the highest resident size rises over that before; a small checkpoint goes first."""
    _read(LOADERS[engine, who](miniature(engine), "float32"))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text(NEW_PEAK)
    _read(LOADERS[engine, who](folder, "float32"))
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _target() -> str:
    return "cpu" if _device() == "cpu" else "cuda"


def _bytes(folder: Path) -> int:
    files = (file for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin"))
    return sum(file.stat().st_size for file in files)


def _read(models: list[Any]) -> None:
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().sum().item()


def _mms_wide(folder: Path) -> None:
    from transformers import VitsConfig, VitsModel

    config = VitsConfig(vocab_size=38, hidden_size=384, ffn_dim=1024, flow_size=256, num_hidden_layers=8)
    VitsModel(config).save_pretrained(folder)


def _bark_wide(folder: Path) -> None:
    import torch
    from transformers import BarkConfig, BarkModel

    shutil.copytree(miniature("bark"), folder, dirs_exist_ok=True)
    config = BarkConfig.from_pretrained(folder)
    for stage in (config.semantic_config, config.coarse_acoustics_config, config.fine_acoustics_config):
        stage.hidden_size, stage.num_heads, stage.num_layers = 384, 8, 6
    config.codec_config = type(config.codec_config)()  # the hub's, whole
    config.save_pretrained(folder)
    torch.save(BarkModel(config).state_dict(), folder / "pytorch_model.bin")


def _f5_wide(folder: Path) -> None:
    from f5_tts.model import CFM, DiT
    from safetensors.torch import save_file

    from core.engines.f5.card import MODEL_FILE, VOCABULARY_FILE

    shutil.copytree(miniature("f5"), folder, dirs_exist_ok=True)
    with (folder / VOCABULARY_FILE).open(encoding="utf-8") as lines:
        tokens = len([*lines])
    model = CFM(DiT(dim=768, depth=10, heads=12, ff_mult=2, text_num_embeds=tokens, mel_dim=100))
    tensors = {f"ema_model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / MODEL_FILE)


def _plain(folder: Path, dtype: str) -> list[Any]:
    import torch
    from transformers import AutoModelForTextToWaveform

    model = AutoModelForTextToWaveform.from_pretrained(folder, dtype=getattr(torch, dtype))
    return [model.to(_target()).eval()]


def _ours(folder: Path, dtype: str) -> list[Any]:
    import torch
    from transformers import AutoModelForTextToWaveform

    from core.engines.loading import load_pretrained

    return [
        load_pretrained(
            AutoModelForTextToWaveform, folder, dtype=getattr(torch, dtype), device=_target()
        )
    ]  # fmt: skip


def _f5_plain(folder: Path, dtype: str) -> list[Any]:
    import torch
    from f5_tts.infer.utils_infer import load_model, load_vocoder
    from f5_tts.model import DiT

    from core.engines.f5.card import MODEL_FILE, VOCABULARY_FILE, VOCODER_FOLDER
    from core.engines.f5.engine import architecture

    file, device = folder / MODEL_FILE, _target()
    with contextlib.redirect_stdout(io.StringIO()):
        model = load_model(
            DiT, architecture(file), str(file), vocab_file=str(folder / VOCABULARY_FILE), device=device
        )
        vocoder = load_vocoder(is_local=True, local_path=str(folder / VOCODER_FOLDER), device=device)
    return [model.to(device, getattr(torch, dtype)).eval(), vocoder]


def _f5_ours(folder: Path, dtype: str) -> list[Any]:
    from core.engines.base import Placement
    from core.engines.f5.engine import F5Engine

    engine = F5Engine()
    engine.load(folder, Placement(_target(), dtype))
    return [engine.model, engine.vocoder]


BUILDERS = {"mms": _mms_wide, "bark": _bark_wide, "f5": _f5_wide}
DTYPES = {"mms": ["float32"], "bark": ["float32", "bfloat16"], "f5": ["float32"]}
LOADERS: dict[tuple[str, str], Callable[[Path, str], list[Any]]] = {
    ("mms", "plain"): _plain,
    ("mms", "ours"): _ours,
    ("bark", "plain"): _plain,
    ("bark", "ours"): _ours,
    ("f5", "plain"): _f5_plain,
    ("f5", "ours"): _f5_ours,
}


if __name__ == "__main__":
    mend_torchaudio()
    print(_measure_peak(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
