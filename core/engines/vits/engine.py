"""Coqui VITS through Coqui's `TTS`, sentence by sentence."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from TTS.api import TTS
from TTS.tts.configs.vits_config import VitsConfig
from TTS.tts.models.vits import Vits as VitsModel

from core.engines.base import Engine, Placement, Run
from core.engines.loading import skeleton
from core.engines.quirks import works_on
from core.engines.speaking import speak_by_sentence
from core.engines.vits.card import SPEAKERS_FILE, VitsOptions, speaker_of
from core.engines.vits.phonemes import installed
from core.errors import WeightsError
from core.media import Audio
from core.requests import SpeechRequest


class Vits(Engine):
    def load(self, weights: Path | None, placement: Placement) -> None:
        """Weights stay in float32: the flow and the duration predictor are not stable in less."""
        assert weights is not None
        self._weights = weights
        with tempfile.TemporaryDirectory() as folder, installed():
            config = Path(folder) / "config.json"
            config.write_text(json.dumps(_relocated(weights)), encoding="utf-8")
            model_file = weights / "model_file.pth"
            try:
                self.tts = TTS(model_path=str(model_file), config_path=str(config), progress_bar=False)
            except (KeyError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise WeightsError(f"{model_file.name} is damaged or foreign: {reason}") from error
        model = self.tts.synthesizer.tts_model
        model.disc = None  # the discriminator, more than half of the parameters, serves training only
        self._length_scale = model.length_scale
        self.tts.to(placement.load_device)
        works_on(model, placement.device)

    def components(self) -> Mapping[str, torch.nn.Module]:
        return {"model": self.tts.synthesizer.tts_model} if hasattr(self, "tts") else {}

    @staticmethod
    def skeleton(folder: Path) -> Mapping[str, torch.nn.Module]:
        settings = _relocated(folder)
        settings["model_args"]["init_discriminator"] = False
        config = VitsConfig()
        config.from_dict(settings)
        with skeleton(), installed():
            return {"model": VitsModel(config)}

    def generate(self, request: SpeechRequest, options: VitsOptions, run: Run) -> Audio:
        model = self.tts.synthesizer.tts_model
        model.length_scale = self._length_scale / options.speed
        model.inference_noise_scale = options.noise_scale
        model.inference_noise_scale_dp = options.rhythm_noise_scale
        speaker = speaker_of(options, self._weights)

        def speak(sentence: str) -> npt.NDArray[np.float32]:
            if not any(character.isalnum() for character in sentence):
                return np.zeros(0, np.float32)  # a lone dash has no phonemes, which the library cannot take
            with self.using("model"):
                waveform: npt.NDArray[np.float32] = model.synthesize(sentence, speaker=speaker)["wav"]
            return waveform

        try:
            with torch.inference_mode():
                return speak_by_sentence(request.text, model.config.audio.sample_rate, run, speak)
        finally:
            for layer in model.text_encoder.encoder.attn_layers:
                layer.attn = None  # the library keeps the last sentence's, which grows with its square


def _relocated(weights: Path) -> dict[str, Any]:
    """The checkpoint's configuration, with the paths of the machine it was trained on put right.

    Coqui's downloader rewrites config.json in place for this; a folder that is not ours is left alone.
    """
    try:
        config: dict[str, Any] = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"The checkpoint's config.json cannot be read: {error}.") from error
    if config.get("model") != "vits":
        raise WeightsError(f"The checkpoint is no Coqui VITS: its config.json says {config.get('model')!r}.")
    speakers = weights / SPEAKERS_FILE
    for part in (config, config.setdefault("model_args", {})):
        part["speakers_file"] = str(speakers) if speakers.exists() else None
        # They name a network that judged voices in training; it is not part of the checkpoint.
        part.pop("speaker_encoder_model_path", None)
        part.pop("speaker_encoder_config_path", None)
    return config


ENGINE = Vits
