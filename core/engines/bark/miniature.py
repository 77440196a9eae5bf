"""An untrained Bark: the hub's files and token numbers, one thin layer a stage, pieces of a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import BarkConfig, BarkModel, BertTokenizer

from core.card import Checkpoint
from core.engines.bark.card import CUES, LANGUAGES, VOICES_FILE

SEED = 20260101
# Numbers that Bark's stages hand to each other; they are what makes a checkpoint Bark's.
SEMANTIC = {"input_vocab_size": 129_600, "output_vocab_size": 10_048}
COARSE = {"input_vocab_size": 12_096, "output_vocab_size": 12_096}
FINE = {"input_vocab_size": 1_056, "output_vocab_size": 1_056, "n_codes_total": 8, "n_codes_given": 1}
# Letters of the languages that Bark speaks, as the real vocabulary has them: Latin, Cyrillic, Devanagari,
# punctuation, kana, ideographs, Hangul, full-width forms.
_WITHIN_WORDS = (
    (0x21, 0x7E),
    (0xA1, 0x17F),
    (0x400, 0x45F),
    (0x900, 0x97F),
    (0x3040, 0x30FF),
    (0xAC00, 0xD7A3),
)
_ALONE = ((0x2010, 0x203A), (0x20A0, 0x20BF), (0x3000, 0x303F), (0x4E00, 0x9FFF), (0xFF01, 0xFF5E))


def build(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint into `folder`."""
    torch.manual_seed(SEED)
    layer = {
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "block_size": 1024,
        "dropout": 0.0,
        "bias": False,
    }
    config = BarkConfig(
        semantic_config=layer | SEMANTIC,
        coarse_acoustics_config=layer | COARSE,
        fine_acoustics_config=layer | FINE,
        codec_config={
            "model_type": "encodec",
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_dim": 16,
            "num_lstm_layers": 1,
            "num_residual_layers": 1,
            "target_bandwidths": [6.0],  # 8 codebooks, all that Bark fills
        },
    )
    config.architectures = ["BarkModel"]
    model = BarkModel(config)
    with torch.no_grad():
        # As initialised, all tokens are equally likely, and the codec gives a constant for any of them.
        for stage in (model.semantic, model.coarse_acoustics):
            stage.lm_head.weight.normal_()
        for book in model.codec_model.quantizer.layers:
            book.codebook.embed.normal_(std=100)
        for name, parameter in model.codec_model.decoder.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    _write_generation_config(folder)
    _write_tokenizer(folder)
    _write_voices(folder)


def _write_generation_config(folder: Path) -> None:
    # By hand: BarkGenerationConfig.save_pretrained raises in transformers 5.23.
    sampling = {"do_sample": True, "temperature": 0.7}
    settings = {
        "model_type": "bark",
        "sample_rate": 24_000,
        "codebook_size": 1024,
        "semantic_config": {
            **sampling,
            "max_new_tokens": 52,  # 1 s, where the real one may go on to 768, for 15 s
            "eos_token_id": 10_000,
            "pad_token_id": 10_000,
        },
        "coarse_acoustics_config": {**sampling, "pad_token_id": 12_048, "eos_token_id": 12_049},
        "fine_acoustics_config": {"temperature": 0.5},
    }
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2), "utf-8")


def _write_tokenizer(folder: Path) -> None:
    def letters(ranges: tuple[tuple[int, int], ...]) -> list[str]:
        return [chr(c) for first, last in ranges for c in range(first, last + 1)]

    inside = letters(_WITHIN_WORDS)
    words = [cue.strip("[]") for cue in CUES]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *inside, *(f"##{c}" for c in inside)]
    vocabulary = list(dict.fromkeys([*tokens, *letters(_ALONE), *words]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)


def _write_voices(folder: Path) -> None:
    """Ten presets a language: a second of random tokens each."""
    draw = np.random.default_rng(SEED)
    (folder / "speaker_embeddings" / "v2").mkdir(parents=True)
    presets: dict[str, object] = {"repo_or_path": "suno/bark"}
    for name in (f"v2/{language}_speaker_{n}" for language in LANGUAGES for n in range(10)):
        prompts = {
            "semantic_prompt": draw.integers(10_000, size=50),
            "coarse_prompt": draw.integers(1024, size=(2, 75)),
            "fine_prompt": draw.integers(1024, size=(8, 75)),
        }
        presets[name] = {part: f"speaker_embeddings/{name}_{part}.npy" for part in prompts}
        for part, tokens in prompts.items():
            np.save(folder / f"speaker_embeddings/{name}_{part}.npy", tokens, allow_pickle=False)
    (folder / VOICES_FILE).write_text(json.dumps(presets), "utf-8")
