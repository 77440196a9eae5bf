"""Speaks with Bark, sentence by sentence, through its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForTextToWaveform, AutoProcessor, BarkConfig, BarkModel

from core.engines.bark.card import CARD, BarkOptions, preset, voices
from core.engines.bark.stages import Stages, Voice
from core.engines.base import Engine, Placement, Run
from core.engines.loading import load_pretrained, skeleton
from core.engines.quirks import works_on
from core.engines.speaking import join, split_sentences
from core.errors import WeightsError
from core.media import Audio
from core.requests import SpeechRequest

# Bark speaks for at most 15 s at once (768 semantic tokens at 49.9 Hz). A reader says about 14 letters a
# second, or 4 to 5 characters of a script that writes a syllable in one.
_LETTERS_PER_SECOND = {"zh": 4, "ja": 5, "ko": 5}
_OTHERS_PER_SECOND = 14
_PIECE_SECONDS = 13
_VOICE_SECONDS = 1.0  # a shorter piece says too little about the voice to go on with
_GENERATION = ("semantic_config", "coarse_acoustics_config", "fine_acoustics_config")
_FINE_STEP = 10  # one step of the fine stage reads 1024 frames at once: about as long as ten tokens


class BarkEngine(Engine):
    """A sentence is at most 768 semantic tokens, three times as many coarse ones, and six fine passes."""

    def load(self, weights: Path | None, placement: Placement) -> None:
        assert weights is not None
        config = AutoConfig.from_pretrained(weights)
        if not isinstance(config, BarkConfig):
            raise WeightsError(f"The folder holds a checkpoint of {config.model_type!r}, not of Bark.")
        self.weights = weights
        self.processor = AutoProcessor.from_pretrained(weights)
        self.model = load_pretrained(
            AutoModelForTextToWaveform, weights, dtype=placement.torch_dtype, device=placement.load_device
        )
        if absent := [name for name in _GENERATION if not hasattr(self.model.generation_config, name)]:
            raise WeightsError(f"generation_config.json of this checkpoint lacks {', '.join(absent)}.")
        self.device = placement.device
        works_on(self.model, self.device)
        for stage in (self.model.semantic, self.model.coarse_acoustics, self.model.fine_acoustics):
            works_on(stage, self.device)
        self.stages = Stages(self.model)

    def components(self) -> Mapping[str, torch.nn.Module]:
        return _components(self.model) if hasattr(self, "model") else {}

    @staticmethod
    def skeleton(folder: Path) -> Mapping[str, torch.nn.Module]:
        config = AutoConfig.from_pretrained(folder)
        with skeleton():
            model = BarkModel(config)
        model.tie_weights()
        return _components(model)

    @torch.inference_mode()
    def generate(self, request: SpeechRequest, options: BarkOptions, run: Run) -> Audio:
        """All sentences in one voice: the preset's, or without one that of the first sentence spoken."""
        speed = _LETTERS_PER_SECOND.get(request.language, _OTHERS_PER_SECOND)
        sentences = split_sentences(request.text, limit=speed * _PIECE_SECONDS)
        voice = self._preset(options, request.language)
        progress = _Progress.over(sentences, speed, self.stages, run)
        pieces = []
        for sentence in sentences:
            run.check()
            piece, spoken = self._speak(sentence, voice, options, progress)
            pieces.append(piece)
            if voice is None and piece.size >= _VOICE_SECONDS * CARD.sample_rate:
                voice = spoken
            progress.next_sentence()
        return join(pieces, CARD.sample_rate)

    def _speak(
        self, text: str, voice: Voice | None, options: BarkOptions, progress: _Progress
    ) -> tuple[npt.NDArray[np.float32], Voice | None]:
        """One sentence's waveform (n,), and its tokens as a voice to go on with."""
        stages = self.stages
        inputs = self.processor(text).to(self.device)
        with self.using("semantic"):
            semantic = stages.semantic(
                inputs, voice, options.semantic_temperature, options.min_eos_p or None, progress.semantic
            )
        if not semantic.shape[1]:
            return np.zeros(0, np.float32), None
        with self.using("coarse"):
            coarse = stages.coarse(semantic, voice, options.coarse_temperature, progress.coarse)
        with self.using("fine"):
            fine = stages.fine(coarse, voice, options.fine_temperature, progress.fine)
        with self.using("codec"):
            return stages.decode(fine), stages.as_voice(semantic, coarse, fine)

    def _preset(self, options: BarkOptions, language: str) -> Voice | None:
        name = preset(options, language, voices(self.weights))
        if not name:
            return None
        try:
            loaded = self.processor("", voice_preset=name)["history_prompt"]
            voice = {part: tokens.to(self.device) for part, tokens in loaded.items()}
            fault = self.stages.fault_of(voice)
        except (OSError, ValueError, TypeError, EOFError) as error:
            fault = " ".join(str(error).split())
        if fault:
            raise WeightsError(f"The voice preset {name!r} of this checkpoint is damaged: {fault}")
        return voice


def _components(model: BarkModel) -> dict[str, torch.nn.Module]:
    return {
        "semantic": model.semantic,
        "coarse": model.coarse_acoustics,
        "fine": model.fine_acoustics,
        "codec": model.codec_model,
    }


@dataclass
class _Progress:
    """One count over all stages of all sentences.

    How many tokens a sentence takes is known only once its semantic stage has ended, so each sentence has a
    share of the whole by the length of its text, and each stage moves within its part of that share.
    """

    run: Run
    expected: list[int]  # semantic tokens of each sentence
    coarse_per_semantic: float
    sentence: int = 0

    @classmethod
    def over(cls, sentences: list[str], speed: int, stages: Stages, run: Run) -> _Progress:
        config = stages.semantic_config
        tokens = [ceil(len(text) / speed * config.semantic_rate_hz) for text in sentences]
        return cls(run, [min(t, config.max_new_tokens) for t in tokens], stages.coarse_per_semantic)

    def semantic(self, done: int, _most: int) -> None:
        self._tell("semantic", 0, done, self.expected[self.sentence])

    def coarse(self, done: int, of: int) -> None:
        self._tell("coarse", 1, done, of)

    def fine(self, done: int, of: int) -> None:
        self._tell("fine", 2, done, of)

    def next_sentence(self) -> None:
        self.sentence += 1

    def _parts(self, sentence: int) -> tuple[int, int, int]:
        tokens = self.expected[sentence]
        return tokens, ceil(tokens * self.coarse_per_semantic), 6 * _FINE_STEP

    def _tell(self, stage: str, index: int, done: int, of: int) -> None:
        shares = [sum(self._parts(n)) for n in range(len(self.expected))]
        parts = self._parts(self.sentence)
        before = sum(shares[: self.sentence]) + sum(parts[:index])
        note = f"sentence {self.sentence + 1} of {len(shares)}, {stage} {done}"
        self.run.step(before + parts[index] * min(done, of) // of, sum(shares), note)


ENGINE = BarkEngine
