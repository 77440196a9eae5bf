"""MMS-TTS voices through transformers' VitsModel, one pass a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForTextToWaveform, VitsConfig, VitsModel, VitsTokenizer
from uroman import Uroman

from core.engines.base import Engine, Placement, Run
from core.engines.loading import load_pretrained, skeleton
from core.engines.mms.card import MmsOptions, spell
from core.engines.speaking import speak_by_sentence
from core.errors import WeightsError
from core.media import Audio
from core.requests import SpeechRequest


class Mms(Engine):
    def load(self, weights: Path | None, placement: Placement) -> None:
        assert weights is not None
        config = json.loads((weights / "config.json").read_text("utf-8"))
        if config.get("model_type") != "vits":
            raise WeightsError(
                f"The folder holds a {config.get('model_type')!r} model; MMS needs a 'vits' one."
            )
        tokenizer = VitsTokenizer.from_pretrained(weights, local_files_only=True)
        if tokenizer.phonemize:
            raise WeightsError("The checkpoint reads phonemes; MMS voices read letters.")
        # Always float32: in half precision the splines of the durations fail, and the model is small.
        model = load_pretrained(
            AutoModelForTextToWaveform, weights, dtype=torch.float32, device=placement.load_device
        )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise WeightsError(
                f"The vocabulary has {tokenizer.vocab_size} entries, the model {model.config.vocab_size}; "
                "they are not of one checkpoint."
            )
        self._tokenizer = tokenizer
        self._device = placement.device
        self._model = model
        # The tokenizer would set up a romanizer for each sentence, which takes seconds.
        self._romanizer = Uroman() if tokenizer.is_uroman else None

    def components(self) -> Mapping[str, torch.nn.Module]:
        return {"model": self._model} if hasattr(self, "_model") else {}

    @staticmethod
    def skeleton(folder: Path) -> Mapping[str, torch.nn.Module]:
        with skeleton():
            return {"model": VitsModel(VitsConfig.from_pretrained(folder))}

    def generate(self, request: SpeechRequest, options: MmsOptions, run: Run) -> Audio:
        self._model.speaking_rate = options.speaking_rate
        self._model.noise_scale = options.noise_scale
        self._model.noise_scale_duration = options.noise_scale_duration

        def speak(sentence: str) -> npt.NDArray[np.float32]:
            return self._speak(spell(sentence, request.language, self._tokenizer.encoder))

        return speak_by_sentence(request.text, self._model.config.sampling_rate, run, speak)

    @torch.inference_mode()
    def _speak(self, text: str) -> npt.NDArray[np.float32]:
        """Samples of one sentence, (n,) float32; none where the vocabulary holds nothing of it."""
        if self._romanizer:
            text = self._romanizer.romanize_string(text)
        letters, _ = self._tokenizer.prepare_for_tokenization(text)
        if not letters.strip():
            return np.zeros(0, np.float32)
        inputs = self._tokenizer(text, return_tensors="pt").to(self._device)
        with self.using("model"):
            samples: npt.NDArray[np.float32] = self._model(**inputs).waveform[0].cpu().numpy()
        return samples


ENGINE = Mms
