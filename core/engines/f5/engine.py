"""Speaks with F5-TTS, one sentence a call, in the reference's voice."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open

from core.engines.base import Engine, Placement, Run
from core.engines.f5.card import (
    CARD,
    MODEL_FILE,
    REFERENCE_SECONDS,
    VOCABULARY_FILE,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
    F5Options,
)
from core.engines.f5.reference import as_sentence, prepare, transcribe
from core.engines.loading import fill, load_parallel, read_ahead, read_tensors, skeleton
from core.engines.quirks import works_on
from core.engines.speaking import join, split_sentences
from core.errors import BadInput, WeightsError
from core.media import Audio, read_audio
from core.requests import SpeechRequest


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The library prints as it loads, and its import warns and appends to the module search path."""
    path = list(sys.path)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.path[:] = path


with _quietly():
    from f5_tts.infer import utils_infer
    from f5_tts.infer.utils_infer import infer_batch_process
    from f5_tts.model import CFM, DiT
    from f5_tts.model.modules import vocos_mel_stft_cache
    from f5_tts.model.utils import get_tokenizer
    from vocos import Vocos


# What a vocoder's config.yaml may call: Vocos imports and calls whatever it names there.
_VOCODER_CLASSES = {
    "feature_extractor": "vocos.feature_extractors.MelSpectrogramFeatures",
    "backbone": "vocos.models.VocosBackbone",
    "head": "vocos.heads.ISTFTHead",
}
_VOCODER_FILE = "pytorch_model.bin"
_AVERAGED = "ema_model."  # of the parameters while training; what speaks
_PREFIX = _AVERAGED + "transformer."
_SHAPE_FILE = "config.json"  # arguments of `DiT`, where no weights are at hand whose shapes show them
_SECONDS_AT_ONCE = 22  # reference and sentence together, as the library's own `infer_process` allows
_SHORTEST_LIMIT = 20  # characters


class F5Engine(Engine):
    """Spectrogram-based: each step moves noise closer to the mel spectrogram of the sentence."""

    def load(self, weights: Path | None, placement: Placement) -> None:
        assert weights is not None
        self.device, self.dtype = placement.device, placement.torch_dtype
        self.whisper = weights / WHISPER_FOLDER
        vocoder = weights / VOCODER_FOLDER
        _check_vocoder(vocoder / "config.yaml")
        read_ahead([weights / MODEL_FILE, vocoder / _VOCODER_FILE])
        with _quietly():
            loaded = load_parallel(
                {
                    "model": lambda: _load_model(weights, self.dtype, placement.load_device),
                    "vocoder": lambda: _load_vocoder(vocoder, placement.load_device),
                }
            )
        self.model, self.vocoder = loaded["model"], loaded["vocoder"]
        self.model.mel_spec.cpu()  # it has no weights, and goes where the recording is
        works_on(self.model, self.device)

    def components(self) -> Mapping[str, torch.nn.Module]:
        """The flow's transformer and the vocoder; around the former there is nothing that has weights."""
        return _components(self.model, self.vocoder) if hasattr(self, "model") else {}

    @staticmethod
    def skeleton(folder: Path) -> Mapping[str, torch.nn.Module]:
        vocoder = folder / VOCODER_FOLDER / "config.yaml"
        _check_vocoder(vocoder)
        weights = folder / MODEL_FILE
        if weights.is_file():
            _, tokens = get_tokenizer(str(folder / VOCABULARY_FILE), "custom")
            shape = architecture(weights) | {"text_num_embeds": tokens}
        else:
            shape = json.loads((folder / _SHAPE_FILE).read_text("utf-8"))
        with skeleton(), _quietly():
            model = CFM(DiT(**shape, mel_dim=utils_infer.n_mel_channels))
            return _components(model, Vocos.from_hparams(str(vocoder)))

    def generate(self, request: SpeechRequest, options: F5Options, run: Run) -> Audio:
        """Sentences are joined with pauses; the library's cross-fade is for texts cut inside a sentence."""
        reference, words = self._reference(request)
        sentences = split_sentences(request.text, self._limit(request.text, reference, words, options.speed))
        steps, done = len(sentences) * options.steps, 0

        def told(*_: object) -> None:
            nonlocal done
            done += 1
            run.step(done, steps, f"sentence {-(-done // options.steps)} of {len(sentences)}")

        run.check()
        hook = self.model.transformer.register_forward_hook(told)
        try:
            return join([self._speak(s, reference, words, options) for s in sentences], CARD.sample_rate)
        finally:
            hook.remove()
            # The library keeps the tables of its spectrogram on the device, in a module's variable.
            vocos_mel_stft_cache.clear()
            self.model.mel_spec.cpu()

    def _speak(self, sentence: str, reference: Audio, words: str, options: F5Options) -> np.ndarray:
        wave, _rate, _mel = next(
            infer_batch_process(
                (torch.from_numpy(reference.samples)[None], reference.rate),
                words,
                [sentence],  # several would run in threads at once
                _Moved(self.model.sample, partial(self.using, "transformer")),
                _Moved(self.vocoder.decode, partial(self.using, "vocoder")),
                progress=None,
                nfe_step=options.steps,
                cfg_strength=options.cfg_strength,
                sway_sampling_coef=options.sway_sampling_coef,
                speed=options.speed,
                device=self.device,
            )
        )
        return np.asarray(wave, np.float32)

    def _reference(self, request: SpeechRequest) -> tuple[Audio, str]:
        """The prepared recording, and its words: those given, unless only a part of it is heard."""
        assert request.voice is not None
        longest = REFERENCE_SECONDS[1]
        recording = read_audio(request.voice, rate=CARD.sample_rate, limit_seconds=longest + 1)
        heard = prepare(recording, longest)
        words = request.voice_text.strip()
        if self.whisper.is_dir() and (not words or recording.seconds > longest):
            words = transcribe(heard, self.whisper, self.device, self.dtype)
        if not words:
            raise BadInput("No words could be made out in the reference recording; type what is said in it.")
        return heard, as_sentence(words)

    @staticmethod
    def _limit(text: str, reference: Audio, words: str, speed: float) -> int:
        """Characters of `text` that fit into one call, at the reference's pace in UTF-8 bytes a second."""
        pace = len(words.encode()) / reference.seconds * speed
        bytes_at_once = pace * (_SECONDS_AT_ONCE - reference.seconds)
        return max(_SHORTEST_LIMIT, int(bytes_at_once * len(text) / len(text.encode())))


class _Moved:
    """Stands for a model: its one method that the library calls, with the model on the device meanwhile."""

    def __init__(self, call: Callable[..., Any], using: Callable[[], AbstractContextManager[None]]) -> None:
        self._call = call
        self._using = using

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._using():
            return self._call(*args, **kwargs)

    sample = decode = __call__


def _components(model: CFM, vocoder: Vocos) -> dict[str, torch.nn.Module]:
    return {"transformer": model.transformer, "vocoder": vocoder}


def _load_model(weights: Path, dtype: torch.dtype, device: str) -> CFM:
    """The flow-matching model as the library's `load_model` makes it, which draws random weights first."""
    letters, count = get_tokenizer(str(weights / VOCABULARY_FILE), "custom")
    with skeleton():
        model = CFM(
            DiT(
                **architecture(weights / MODEL_FILE),
                text_num_embeds=count,
                mel_dim=utils_infer.n_mel_channels,
            ),
            mel_spec_kwargs={
                "n_fft": utils_infer.n_fft,
                "hop_length": utils_infer.hop_length,
                "win_length": utils_infer.win_length,
                "n_mel_channels": utils_infer.n_mel_channels,
                "target_sample_rate": utils_infer.target_sample_rate,
                "mel_spec_type": "vocos",
            },
            odeint_kwargs={"method": utils_infer.ode_method},
            vocab_char_map=letters,
        ).to(dtype)
    # Beside these the file may hold the training's counters and, from old versions, the spectrogram's tables.
    kept = {
        name.removeprefix(_AVERAGED): tensor
        for name, tensor in read_tensors(weights / MODEL_FILE).items()
        if name.startswith(_PREFIX)
    }
    fill(model, kept, device)
    return model.eval()


def _load_vocoder(folder: Path, device: str) -> Vocos:
    with skeleton():
        vocoder = Vocos.from_hparams(str(folder / "config.yaml"))
    fill(vocoder, read_tensors(folder / _VOCODER_FILE), device)
    return vocoder.eval()


def architecture(file: Path) -> dict[str, int]:
    """The arguments of `DiT` that fit a checkpoint's tensors, read from their shapes.

    The hub's folder does not state them. What no shape shows (padding masked, rotary positions on all heads)
    is as in F5-TTS v1, which are DiT's defaults.
    """
    try:
        with safe_open(file, "pt") as tensors:
            shapes = {
                name.removeprefix(_PREFIX): tensors.get_slice(name).get_shape()
                for name in tensors.keys()  # noqa: SIM118  # not a dict
            }
    except SafetensorError as error:
        raise WeightsError(f"{file.name} is not a whole safetensors file: {error}.") from None
    try:
        dim = shapes["input_embed.proj.bias"][0]
        return {
            "dim": dim,
            "depth": _count(r"transformer_blocks\.(\d+)\.", shapes),
            "heads": shapes["transformer_blocks.0.attn.to_q.weight"][0]
            // (2 * shapes["rotary_embed.inv_freq"][0]),
            "dim_head": 2 * shapes["rotary_embed.inv_freq"][0],
            "ff_mult": shapes["transformer_blocks.0.ff.ff.0.0.weight"][0] // dim,
            "text_dim": shapes["text_embed.text_embed.weight"][1],
            "conv_layers": _count(r"text_embed\.text_blocks\.(\d+)\.", shapes),
        }
    except KeyError as missing:
        raise WeightsError(f"{file.name} holds no F5-TTS model: it lacks the tensor {missing}.") from None


def _count(pattern: str, names: dict[str, list[int]]) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _check_vocoder(file: Path) -> None:
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
        named = {part: config[part]["class_path"] for part in config}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise WeightsError(f"The vocoder's {file.name} cannot be read: {error}") from None
    if named != _VOCODER_CLASSES:
        raise WeightsError(
            f"The vocoder's {file.name} names {', '.join(map(str, named.values()))}; "
            f"it may name only {', '.join(_VOCODER_CLASSES.values())}."
        )


ENGINE = F5Engine
