"""An untrained F5-TTS: the hub's files and vocabulary, a thin transformer and a thin vocoder."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from f5_tts.model import CFM, DiT
from safetensors.torch import save_file
from vocos import Vocos

from core.card import Checkpoint
from core.engines.f5.card import MODEL_FILE, VOCABULARY_FILE, VOCODER_FOLDER

SEED = 20260101
ARCHITECTURE = {"dim": 32, "depth": 2, "heads": 1, "ff_mult": 2, "text_dim": 32, "conv_layers": 1}
MEL_BANDS = 100
VOCODER = {
    "feature_extractor": {
        "class_path": "vocos.feature_extractors.MelSpectrogramFeatures",
        "init_args": {
            "sample_rate": 24_000,
            "n_fft": 1024,
            "hop_length": 256,
            "n_mels": MEL_BANDS,
            "padding": "center",
        },
    },
    "backbone": {
        "class_path": "vocos.models.VocosBackbone",
        "init_args": {"input_channels": MEL_BANDS, "dim": 32, "intermediate_dim": 64, "num_layers": 2},
    },
    "head": {
        "class_path": "vocos.heads.ISTFTHead",
        "init_args": {"dim": 32, "n_fft": 1024, "hop_length": 256, "padding": "center"},
    },
}


def build(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint, with its vocoder in the sub-folder, into `folder`.

    Whisper, which is optional, is left out: untrained it would make words up.
    """
    torch.manual_seed(SEED)
    (folder / MODEL_FILE).parent.mkdir()
    # The package carries the very vocabulary of the hub.
    shutil.copyfile(str(files("f5_tts") / "infer" / "examples" / "vocab.txt"), folder / VOCABULARY_FILE)
    with (folder / VOCABULARY_FILE).open(encoding="utf-8") as lines:
        tokens = len({*lines})
    model = CFM(DiT(**ARCHITECTURE, text_num_embeds=tokens, mel_dim=MEL_BANDS))
    with torch.no_grad():
        # Its last layers start at zero: the flow would be none, and the noise remain what it was.
        for parameter in model.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    save_file(
        {f"ema_model.{name}": tensor for name, tensor in model.state_dict().items()}, folder / MODEL_FILE
    )

    vocoder = folder / VOCODER_FOLDER
    vocoder.mkdir()
    (vocoder / "config.yaml").write_text(yaml.safe_dump(VOCODER, sort_keys=False), "utf-8")
    torch.save(Vocos.from_hparams(str(vocoder / "config.yaml")).state_dict(), vocoder / "pytorch_model.bin")
