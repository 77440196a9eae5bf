"""XTTS v2 through Coqui's `TTS`: always as a stream, token by token, sentence by sentence."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from TTS.api import TTS
from TTS.tts.configs.xtts_config import XttsConfig
from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
from TTS.tts.models.xtts import Xtts as XttsModel

from core.engines.base import Engine, Placement, Run
from core.engines.loading import skeleton
from core.engines.quirks import works_on
from core.engines.speaking import PAUSE_SECONDS, join, split_sentences
from core.engines.xtts.card import CARD, XttsOptions
from core.errors import BadInput, WeightsError
from core.media import Audio, read_audio
from core.requests import SpeechRequest

_REFERENCE_RATE = 22050  # Hz, what the conditioning encoder hears
# A text at the library's limit of characters may fill the longest recording; mostly it needs two thirds.
_USUAL_SHARE = 2 / 3
# num2words' answers to a number that is too large for a language, or of a kind that it does not know there.
_UNSPELT = (ArithmeticError, LookupError, NotImplementedError, RecursionError, ValueError)


class Xtts(Engine):
    def load(self, weights: Path | None, placement: Placement) -> None:
        """Weights stay in float32: the library computes references and waveforms in it."""
        assert weights is not None
        _check_config(weights)
        with _safe_to_load(weights) as folder:
            try:
                self.tts = TTS(
                    model_path=str(folder), config_path=str(folder / "config.json"), progress_bar=False
                )
            except (KeyError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise WeightsError(f"model.pth is damaged or foreign: {reason}") from error
        self.tts.to(placement.load_device)
        self._model.mel_stats = self._model.mel_stats.cpu()  # the library uses it only there
        works_on(self._model, placement.device)
        works_on(self._model.gpt.gpt_inference, placement.device)

    def components(self) -> Mapping[str, torch.nn.Module]:
        return _components(self._model) if hasattr(self, "tts") else {}

    @staticmethod
    def skeleton(folder: Path) -> Mapping[str, torch.nn.Module]:
        config = XttsConfig()
        config.load_json(str(folder / "config.json"))
        with skeleton():
            model = XttsModel(config)
            if (folder / "vocab.json").is_file():
                model.tokenizer = VoiceBpeTokenizer(vocab_file=folder / "vocab.json")
                model.init_models()
            model.gpt.init_gpt_for_inference()
        return _components(model)

    @property
    def _model(self) -> Any:
        return self.tts.synthesizer.tts_model

    def generate(self, request: SpeechRequest, options: XttsOptions, run: Run) -> Audio:
        rate: int = self._model.config.audio.output_sample_rate
        language = "zh-cn" if request.language == "zh" else request.language
        sentences = self._sentences(request.text, language)
        progress = _Progress(run, [self._expected_tokens(s, language) for s in sentences])
        run.check()
        with self.using("gpt", "decoder"):  # the decoder speaks while the GPT still thinks
            voice = self._voice(request, options)
            try:
                spoken = self._speak(sentences, language, voice, options, progress, run)
            finally:
                self._model.gpt.gpt_inference.store_prefix_emb(None)  # the library keeps the last sentence's
        return join([np.concatenate(spoken)] if spoken else [], rate)

    def _speak(
        self,
        sentences: list[str],
        language: str,
        voice: tuple[torch.Tensor, torch.Tensor],
        options: XttsOptions,
        progress: _Progress,
        run: Run,
    ) -> list[npt.NDArray[np.float32]]:
        """Pieces of samples as they come, pauses between the sentences among them."""
        rate = self._model.config.audio.output_sample_rate
        spoken: list[npt.NDArray[np.float32]] = []
        for sentence in sentences:
            if spoken:
                spoken.append(np.zeros(round(PAUSE_SECONDS * rate), np.float32))
                run.chunk(Audio(spoken[-1], rate))
            stream = self._model.inference_stream(
                sentence,
                language,
                *voice,
                stream_chunk_size=options.chunk_tokens,
                temperature=options.temperature,
                repetition_penalty=options.repetition_penalty,
                top_k=options.top_k,
                top_p=options.top_p,
                speed=options.speed,
                stopping_criteria=StoppingCriteriaList([progress]),
            )
            with closing(stream):
                for piece in stream:
                    spoken.append(piece.float().cpu().numpy().copy())
                    run.chunk(Audio(spoken[-1], rate))
            progress.next_sentence()
        return spoken

    def _voice(self, request: SpeechRequest, options: XttsOptions) -> tuple[torch.Tensor, torch.Tensor]:
        """What the GPT, (1, 32, channels), and the decoder, (1, 512, 1), know of the voice."""
        if request.voice is None:
            latents, embedding = self._model.speaker_manager.speakers[options.speaker].values()
            return latents, embedding
        config = self._model.config
        reference = read_audio(request.voice, rate=_REFERENCE_RATE, limit_seconds=config.max_ref_len)
        waveform = torch.from_numpy(reference.samples)[None]
        latents = self._model.get_gpt_cond_latents(
            waveform, _REFERENCE_RATE, length=config.gpt_cond_len, chunk_length=config.gpt_cond_chunk_len
        )
        return latents, self._model.get_speaker_embedding(waveform, _REFERENCE_RATE)

    def _sentences(self, text: str, language: str) -> list[str]:
        """Sentences that fit the model, which counts characters and, with numbers spelled out, tokens."""
        pieces = split_sentences(text, self._character_limit(language))
        spoken = (piece for piece in pieces if any(character.isalnum() for character in piece))
        return [part for piece in spoken for part in self._within_tokens(piece, language)]

    def _within_tokens(self, sentence: str, language: str) -> list[str]:
        try:
            tokens = self._model.tokenizer.encode(sentence.lower(), lang=language)
        except _UNSPELT as error:
            raise BadInput(f"XTTS v2 cannot spell a number in {sentence!r}; write it in words.") from error
        if len(tokens) < self._model.args.gpt_max_text_tokens or len(sentence) == 1:
            return [sentence]
        halves = split_sentences(sentence, (len(sentence) + 1) // 2)
        return [part for half in halves for part in self._within_tokens(half, language)]

    def _character_limit(self, language: str) -> int:
        limit: int = self._model.tokenizer.char_limits[language.split("-")[0]]
        return limit

    def _expected_tokens(self, sentence: str, language: str) -> int:
        full = self._model.gpt.max_gen_mel_tokens
        return max(1, round(_USUAL_SHARE * full * len(sentence) / self._character_limit(language)))


def _components(model: XttsModel) -> dict[str, torch.nn.Module]:
    # What generates tokens holds the very layers of `gpt` under other names: no part of it, only a user.
    # Found twice, they would be planned and moved twice.
    for owner, name in ((model.gpt, "gpt_inference"), (model.gpt.gpt, "wte")):
        if name in owner._modules:
            vars(owner)[name] = owner._modules.pop(name)
    return {"gpt": model.gpt, "decoder": model.hifigan_decoder}


class _Progress(StoppingCriteria):
    """Called by the library after each token: reports a step, which raises if the job was stopped.

    Nobody knows when a sentence will end: one that outlasts its estimate waits there, a shorter one jumps.
    """

    def __init__(self, run: Run, expected: list[int]) -> None:
        self._run = run
        self._expected = expected
        self._sentence = 0
        self._tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._tokens += 1
        self._report(min(self._tokens, self._expected[self._sentence]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def next_sentence(self) -> None:
        self._sentence += 1
        self._tokens = 0
        self._report(0)

    def _report(self, tokens: int) -> None:
        self._run.step(sum(self._expected[: self._sentence]) + tokens, sum(self._expected), "tokens")


def _check_config(weights: Path) -> None:
    try:
        model = json.loads((weights / "config.json").read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"The checkpoint's config.json cannot be read: {error}.") from error
    if model != CARD.id:
        raise WeightsError(f"The checkpoint is no XTTS: its config.json says {model!r}.")


@contextmanager
def _safe_to_load(weights: Path) -> Iterator[Path]:
    """The folder itself, or a copy of one whose model.pth the library would write anew.

    It does that where the configuration in model.pth is a pickled class: the first edition of XTTS v2.
    """
    if _is_plain(weights / "model.pth"):
        yield weights
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for file in weights.iterdir():
            if file.name in CARD.checkpoints[0].files:
                shutil.copy(file, copy)
        yield copy


def _is_plain(model_file: Path) -> bool:
    try:
        with zipfile.ZipFile(model_file) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    except zipfile.BadZipFile:
        return False
    return not any(b"XttsConfig" in content for content in pickles)


ENGINE = Xtts
