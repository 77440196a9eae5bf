"""Builds an untrained MMS checkpoint: the real layout and classes, a hundred thousand random weights."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import VitsConfig, VitsModel

from core.card import Checkpoint
from core.engines.mms.card import VOICES

_LETTERS = {
    "deu": "äöüß",
    "fra": "àâæçèéêëîïôœùûüÿ",
    "spa": "áéíñóúü",
    "por": "àáâãçéêíóôõúü",
    "nld": "áèéëïóöü",
    "pol": "ąćęłńóśźż",
    "ron": "ăâîşţ",
    "hun": "áéíóöőúüű",
    "swe": "åäöé",
    "fin": "äöå",
    "cat": "àçèéíïòóúü·",
    "cym": "âêîôûŵŷëï",
    "tur": "çğıöşüâîû",
    "azj-script_latin": "çəğıöşü",
    "vie": "ăâđêôơưàảãáạằẳẵắặầẩẫấậèẻẽéẹềểễếệìỉĩíịòỏõóọồổỗốộờởỡớợùủũúụừửữứựỳỷỹýỵ",
    "tgl": "ñ",
    "hau": "ɓɗƙƴ",
    "yor": "àáèéẹìíòóọṣùúńǹ\u0300\u0301",
}
_BLOCKS = {
    "CYRILLIC": (0x0430, 0x04FF),
    "GREEK": (0x0390, 0x03CE),
    "HEBREW": (0x05D0, 0x05EA),
    "ARABIC": (0x0621, 0x06D3),
    "DEVANAGARI": (0x0900, 0x097F),
    "BENGALI": (0x0980, 0x09FF),
    "GUJARATI": (0x0A80, 0x0AFF),
    "GURMUKHI": (0x0A00, 0x0A7F),
    "TAMIL": (0x0B80, 0x0BFF),
    "TELUGU": (0x0C00, 0x0C7F),
    "KANNADA": (0x0C80, 0x0CFF),
    "MALAYALAM": (0x0D00, 0x0D7F),
    "THAI": (0x0E00, 0x0E7F),
}
_ROMANIZED = ("kor", "amh")  # as their tokenizer_config.json says on the hub


def build(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of one language into `folder`."""
    code = checkpoint.repository.removeprefix("facebook/mms-tts-")
    script = next(script for found, _, script in VOICES.values() if found == code)
    letters = _alphabet(code, script)
    _write(folder / "vocab.json", {letter: number for number, letter in enumerate(letters)})
    # The hub's checkpoints, too, use their first letter as padding, and as the blank between letters.
    special = {"pad_token": letters[0], "unk_token": "<unk>"}
    _write(folder / "special_tokens_map.json", special)
    _write(
        folder / "tokenizer_config.json",
        {
            "add_blank": True,
            "is_uroman": code in _ROMANIZED,
            "language": code,
            "normalize": True,
            "phonemize": False,
            "tokenizer_class": "VitsTokenizer",
            **special,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VitsModel(
            VitsConfig(
                vocab_size=len(letters),
                hidden_size=16,
                ffn_dim=16,
                flow_size=16,
                num_hidden_layers=1,
                spectrogram_bins=65,
                upsample_initial_channel=32,
                duration_predictor_filter_channels=16,
                prior_encoder_num_wavenet_layers=1,
                posterior_encoder_num_wavenet_layers=1,
            )
        )
    _calm(model)
    model.save_pretrained(folder)


def _alphabet(code: str, script: str) -> str:
    common = " '-_"
    if script == "LATIN" or code in _ROMANIZED:
        return "abcdefghijklmnopqrstuvwxyz" + _LETTERS.get(code, "") + common
    first, last = _BLOCKS[script]
    signs = (chr(number) for number in range(first, last + 1))
    return "".join(s for s in signs if unicodedata.category(s) in ("Ll", "Lo", "Mn", "Mc")) + common


@torch.no_grad()
def _calm(model: VitsModel) -> None:
    """Give random weights the pace of speech, about 4 frames a letter, and a bearable loudness."""
    spread = 3.0
    rhythm = model.duration_predictor.flows[0]  # log(frames) = (x - translate) / exp(log_scale)
    rhythm.log_scale.fill_(spread)
    rhythm.translate.fill_(-math.log(2) * math.exp(spread))
    model.decoder.conv_post.weight.mul_(0.02)


def _write(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf-8")
