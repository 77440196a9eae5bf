"""Untrained miniatures of the two VITS checkpoints, in the layout of Coqui's archives."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from TTS.tts.configs.vits_config import VitsConfig
from TTS.tts.models.vits import Vits, VitsArgs

from core.card import Checkpoint
from core.engines.vits.card import SPEAKERS_FILE, VCTK_SPEAKERS
from core.engines.vits.phonemes import installed


def build(folder: Path, checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    args = VitsArgs(
        hidden_channels=32,
        hidden_channels_ffn_text_encoder=32,
        num_layers_text_encoder=1,
        num_layers_posterior_encoder=1,
        num_layers_flow=1,
        upsample_initial_channel_decoder=64,
        init_discriminator=False,
    )
    config = VitsConfig(
        use_phonemes=True,
        phonemizer="espeak",
        phoneme_language="en-us",
        text_cleaner="english_cleaners",
        model_args=args,
    )
    if SPEAKERS_FILE in checkpoint.required:
        speakers = {name: number for number, name in enumerate(["ED\n", *VCTK_SPEAKERS])}
        (folder / SPEAKERS_FILE).write_text(json.dumps(speakers), encoding="utf-8")
        args.speakers_file = config.speakers_file = str(folder / SPEAKERS_FILE)
        args.use_speaker_embedding = config.use_speaker_embedding = True
        args.speaker_embedding_channels = config.speaker_embedding_channels = 16
    with installed():
        model = Vits(config)
    if args.use_speaker_embedding:
        # As in the published configuration, the path is of no use where the checkpoint ends up.
        args.speakers_file = config.speakers_file = f"training/{SPEAKERS_FILE}"
    torch.save({"model": model.state_dict()}, folder / "model_file.pth")
    config.save_json(str(folder / "config.json"))
