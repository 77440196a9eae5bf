"""Bark's stages, each on its own: text -> semantic -> coarse -> fine tokens -> waveform.

Run one after the other they do what `BarkModel.generate` does, random draws included; apart, each can be
watched, stopped, and its tokens kept. What they make for one sentence is also a voice for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt
import torch
from transformers import BarkModel, StoppingCriteria, StoppingCriteriaList
from transformers.models.bark.generation_configuration_bark import (
    BarkCoarseGenerationConfig,
    BarkFineGenerationConfig,
    BarkSemanticGenerationConfig,
)

Voice = Mapping[str, torch.Tensor]
"""A history prompt: `semantic_prompt` (n,), `coarse_prompt` (2, T) and `fine_prompt` (8, T), int64."""

Watch = Callable[[int, int], None]
"""Called with (done, of) after every step of a stage; what it raises ends the stage."""


@dataclass(frozen=True)
class Stages:
    """The stages of one loaded model, with its own generation settings."""

    model: BarkModel

    @property
    def semantic_config(self) -> BarkSemanticGenerationConfig:
        return BarkSemanticGenerationConfig(**self.model.generation_config.semantic_config)

    @property
    def coarse_config(self) -> BarkCoarseGenerationConfig:
        return BarkCoarseGenerationConfig(**self.model.generation_config.coarse_acoustics_config)

    @property
    def fine_config(self) -> BarkFineGenerationConfig:
        return BarkFineGenerationConfig(**self.model.generation_config.fine_acoustics_config)

    @property
    def codebook_size(self) -> int:
        return int(self.model.generation_config.codebook_size)

    @property
    def coarse_per_semantic(self) -> float:
        """Coarse tokens for one semantic token: about 3 (two codebooks at 75 Hz against 49.9 Hz)."""
        coarse = self.coarse_config
        return float(
            coarse.coarse_rate_hz / self.semantic_config.semantic_rate_hz * coarse.n_coarse_codebooks
        )

    def semantic(
        self,
        inputs: Mapping[str, torch.Tensor],
        voice: Voice | None,
        temperature: float,
        min_eos_p: float | None,
        watch: Watch,
    ) -> torch.Tensor:
        """Text to semantic tokens.

        Args:
            inputs: the processor's `input_ids` and `attention_mask`, each (1, 256).
            min_eos_p: end once the end token is this likely; None leaves it to the draw.

        Returns:
            (1, n) tokens without the end token; n may be 0.
        """
        config = self.semantic_config
        config.temperature, config.min_eos_p = temperature, min_eos_p
        tokens = self.model.semantic.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            semantic_generation_config=config,
            history_prompt=voice,
            stopping_criteria=_watching(watch, config.max_new_tokens),
        )
        return tokens[:, : int((tokens[0] != config.eos_token_id).sum())]

    def coarse(
        self, semantic: torch.Tensor, voice: Voice | None, temperature: float, watch: Watch
    ) -> torch.Tensor:
        """Semantic tokens (1, n) to coarse tokens (1, 2 T): codebooks by turns, in the model's numbering."""
        config = self.coarse_config
        config.temperature = temperature
        frames = int(semantic.shape[1] * self.coarse_per_semantic / config.n_coarse_codebooks)
        steps = frames * config.n_coarse_codebooks
        return self.model.coarse_acoustics.generate(
            semantic,
            semantic_generation_config=self.semantic_config,
            coarse_generation_config=config,
            codebook_size=self.codebook_size,
            history_prompt=voice,
            stopping_criteria=_watching(watch, steps),
        )

    def fine(
        self, coarse: torch.Tensor, voice: Voice | None, temperature: float, watch: Watch
    ) -> torch.Tensor:
        """Coarse tokens (1, 2 T) to all codebooks (1, 8, T)."""
        steps = self._fine_steps(coarse.shape[1] // self.coarse_config.n_coarse_codebooks, voice)
        done = 0

        def told(*_: object) -> None:
            nonlocal done
            done += 1
            watch(done, steps)

        # This stage knows no stopping criteria and calls `forward` directly, past hooks of its own; its last
        # norm is called once for each codebook of each window.
        hook = self.model.fine_acoustics.layernorm_final.register_forward_hook(told)
        try:
            return self.model.fine_acoustics.generate(
                coarse,
                semantic_generation_config=self.semantic_config,
                coarse_generation_config=self.coarse_config,
                fine_generation_config=self.fine_config,
                codebook_size=self.codebook_size,
                history_prompt=voice,
                temperature=temperature,
            )
        finally:
            hook.remove()

    def decode(self, fine: torch.Tensor) -> npt.NDArray[np.float32]:
        """All codebooks (1, 8, T) to a waveform (320 T,) at 24 kHz."""
        return np.asarray(self.model.codec_decode(fine)[0].float().cpu().numpy(), np.float32)

    def as_voice(self, semantic: torch.Tensor, coarse: torch.Tensor, fine: torch.Tensor) -> Voice:
        """What was spoken, as the history prompt that continues in the same voice."""
        books = self.coarse_config.n_coarse_codebooks
        codes = torch.remainder(coarse - self.semantic_config.semantic_vocab_size, self.codebook_size)
        return {
            "semantic_prompt": semantic[0].long(),
            "coarse_prompt": codes.view(-1, books).T.long(),
            "fine_prompt": fine[0].long(),
        }

    def fault_of(self, voice: Voice) -> str:
        """Why a voice preset cannot be used, or nothing: a wrong number would be read outside a table."""
        semantic, coarse, fine = (voice[f"{stage}_prompt"] for stage in ("semantic", "coarse", "fine"))
        books = (self.coarse_config.n_coarse_codebooks, self.fine_config.n_fine_codebooks)
        if (semantic.ndim, coarse.ndim, fine.ndim) != (1, 2, 2) or (len(coarse), len(fine)) != books:
            return f"its shapes are {[tuple(t.shape) for t in (semantic, coarse, fine)]}"
        limits = (self.semantic_config.semantic_vocab_size, self.codebook_size, self.codebook_size)
        for tokens, limit in zip((semantic, coarse, fine), limits, strict=True):
            if tokens.is_floating_point() or not tokens.numel() or tokens.min() < 0 or tokens.max() >= limit:
                return f"its tokens are not whole numbers from 0 to {limit - 1}"
        return ""

    def _fine_steps(self, frames: int, voice: Voice | None) -> int:
        """Codebooks to predict, times windows: counted as `BarkFineModel.generate` does."""
        config = self.fine_config
        history = 0 if voice is None else min(voice["fine_prompt"].shape[1], config.max_fine_history_length)
        beyond = frames - (config.max_fine_input_length - history)
        windows = 1 + max(0, ceil(beyond / config.max_fine_history_length))
        return int(windows * (config.n_fine_codebooks - self.coarse_config.n_coarse_codebooks))


class _Watching(StoppingCriteria):
    """Never asks for a stop: that would only let the later stages run on what there is."""

    def __init__(self, watch: Watch, steps: int) -> None:
        self.watch = watch
        self.steps = steps
        self.done = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.done += 1
        self.watch(self.done, self.steps)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _watching(watch: Watch, steps: int) -> StoppingCriteriaList:
    return StoppingCriteriaList([_Watching(watch, steps)])
