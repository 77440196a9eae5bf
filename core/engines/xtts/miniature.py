"""An untrained miniature of XTTS v2: a small GPT before the real decoder, whose size the library fixes."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import torch
from TTS.tts.configs.xtts_config import XttsArgs, XttsConfig
from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
from TTS.tts.models.xtts import Xtts

from core.card import Checkpoint
from core.engines.xtts.card import CARD, SPEAKERS, SPEAKERS_FILE

_CHANNELS = 32
_SCRIPTS = ((0x20, 0x250), (0x300, 0x370), (0x400, 0x460), (0x600, 0x700), (0x900, 0x980), (0x1E00, 0x1F00))


def build(folder: Path, checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    (folder / "vocab.json").write_text(json.dumps(_tokenizer(), ensure_ascii=False), encoding="utf-8")
    config = XttsConfig(
        model_args=XttsArgs(
            gpt_layers=1,
            gpt_n_model_channels=_CHANNELS,
            gpt_n_heads=2,
            gpt_max_audio_tokens=32,  # a third of a second a sentence
            gpt_code_stride_len=256,  # a quarter of the real one, so that the decoder has less to do
            gpt_num_audio_tokens=1026,
            gpt_start_audio_token=1024,
            gpt_stop_audio_token=1025,
            gpt_use_perceiver_resampler=True,
            decoder_input_dim=_CHANNELS,
        ),
        gpt_cond_len=30,
        gpt_cond_chunk_len=4,
        max_ref_len=30,
    )
    model = Xtts(config)
    model.tokenizer = VoiceBpeTokenizer(vocab_file=folder / "vocab.json")
    model.init_models()
    model.hifigan_decoder.waveform_decoder.conv_post.weight.data *= 40  # noise that can be heard
    # Half precision halves a file that the decoder makes large; loading widens it again.
    weights = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"model": weights}, folder / "model.pth")
    config.save_json(str(folder / "config.json"))
    speakers = {
        name: {
            "gpt_cond_latent": torch.randn(1, 32, _CHANNELS),
            "speaker_embedding": torch.nn.functional.normalize(torch.randn(1, 512, 1), dim=1),
        }
        for name in SPEAKERS
    }
    torch.save(speakers, folder / SPEAKERS_FILE)


def _tokenizer() -> dict[str, object]:
    """Single characters of the scripts that XTTS v2 reads, as a byte-pair encoding without merges."""
    languages = [f"[{'zh-cn' if language == 'zh' else language}]" for language in CARD.languages]
    special = ["[STOP]", "[UNK]", "[SPACE]", "[START]", *languages]
    characters = [chr(code) for first, end in _SCRIPTS for code in range(first, end)]
    lower = {c for c in characters if c == c.lower() and unicodedata.category(c)[0] in "LMNPS"}
    vocabulary = {token: number for number, token in enumerate([*special, *sorted(lower)])}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for number, token in enumerate(special)
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "BPE", "unk_token": "[UNK]", "vocab": vocabulary, "merges": []},
    }
