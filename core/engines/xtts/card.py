"""XTTS v2: clones a voice from six seconds, in 17 languages, and streams."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from core.card import Ability, Card, Checkpoint, Licence, Modality, Options, Paradigm, Working, knob
from core.errors import BadInput, WeightsError
from core.requests import SpeechRequest

SPEAKERS_FILE = "speakers_xtts.pth"
LANGUAGES = (
    "en", "es", "fr", "de", "it", "pt", "pl", "tr", "ru", "nl", "cs", "ar", "zh", "hu", "ko", "ja", "hi",
)  # fmt: skip

# The names in the published speakers_xtts.pth, as Coqui's server lists them.
SPEAKERS = (
    "Claribel Dervla", "Daisy Studious", "Gracie Wise", "Tammie Ema", "Alison Dietlinde", "Ana Florence",
    "Annmarie Nele", "Asya Anara", "Brenda Stern", "Gitta Nikolina", "Henriette Usha", "Sofia Hellen",
    "Tammy Grit", "Tanja Adelina", "Vjollca Johnnie", "Andrew Chipper", "Badr Odhiambo",
    "Dionisio Schuyler", "Royston Min", "Viktor Eka", "Abrahan Mack", "Adde Michal", "Baldur Sanjin",
    "Craig Gutsy", "Damien Black", "Gilberto Mathias", "Ilkin Urbano", "Kazuhiko Atallah", "Ludvig Milivoj",
    "Suad Qasim", "Torcull Diarmuid", "Viktor Menelaos", "Zacharie Aimilios", "Nova Hogarth", "Maja Ruoho",
    "Uta Obando", "Lidiya Szekeres", "Chandra MacFarland", "Szofi Granger", "Camilla Holmström",
    "Lilya Stainthorpe", "Zofija Kendrick", "Narelle Moon", "Barbora MacLean", "Alexandra Hisakawa",
    "Alma María", "Rosemary Okafor", "Ige Behringer", "Filip Traverse", "Damjan Chapman", "Wulf Carlevaro",
    "Aaron Dreschner", "Kumar Dahl", "Eugenio Mataracı", "Ferran Simen", "Xavier Hayasaka", "Luis Moray",
    "Marcos Rudaski",
)  # fmt: skip

_TRANSCRIBED = (
    "zh",
    "ja",
    "ko",
)  # the library spells these in Latin letters before it looks at the vocabulary

# What num2words, which the library asks to spell numbers, cannot do.
_UNSPELT = {
    "hi": (re.compile(r"[0-9]"), "digits in Hindi"),
    "cs": (re.compile(r"[0-9]+\.(?=\s|$)"), "ordinal numbers in Czech"),
}


class XttsOptions(Options):
    """The defaults are those of the published config.json."""

    speaker: str = knob(
        SPEAKERS[0], "built-in voice; a reference recording goes before it", suggestions=list(SPEAKERS)
    )
    temperature: float = knob(0.75, "variety; lower is steadier, higher is livelier", gt=0, le=2, step=0.05)
    repetition_penalty: float = knob(5.0, "how hard repeated sounds are held back", ge=1, le=20, step=0.5)
    top_k: int = knob(50, "sample from this many likeliest tokens; 0: from all", ge=0, le=1000)
    top_p: float = knob(
        0.85, "sample from the likeliest tokens up to this probability", gt=0, le=1, step=0.01
    )
    speed: float = knob(1.0, "speaking rate; 2 is twice as fast", ge=0.5, le=2.0, step=0.05)
    chunk_tokens: int = knob(20, "tokens (46 ms of sound each) in one streamed piece", ge=5, le=200)


def check(request: SpeechRequest, options: XttsOptions, weights: Path | None) -> None:
    """Refuse what the tokenizer cannot spell, and voices that the checkpoint does not have."""
    if not any(character.isalnum() for character in request.text):
        raise BadInput("The text has no letter or digit for XTTS v2 to speak; type a sentence.")
    pattern, what = _UNSPELT.get(request.language, (None, ""))
    if pattern and (found := pattern.search(request.text)):
        raise BadInput(f"XTTS v2 cannot read {what}; write {found[0]!r} in words.")
    if weights is None:
        return
    if request.language not in _TRANSCRIBED:
        _check_letters(request.text, weights)
    if request.voice is None:
        _check_speaker(options.speaker, weights)


def _check_letters(text: str, weights: Path) -> None:
    known = {character for token in _vocabulary(weights) for character in token} | set("ªº")  # as in "1º"
    unknown = next((c for c in text.lower() if c.isalpha() and c not in known), None)
    if unknown:
        raise BadInput(f"XTTS v2 has no sign for {unknown!r}; spell it in letters of the chosen language.")


def _check_speaker(speaker: str, weights: Path) -> None:
    file = weights / SPEAKERS_FILE
    if not file.exists():
        raise BadInput("This checkpoint of XTTS v2 has no built-in voices; add a reference recording.")
    speakers = _speakers(file, file.stat().st_mtime_ns)
    if speaker not in speakers:
        raise BadInput(f"XTTS v2 has no voice {speaker!r}; its voices are: {', '.join(speakers)}.")


@lru_cache(maxsize=4)
def _speakers(file: Path, modified: int) -> list[str]:
    """The names, read once: they do not change between two jobs."""
    return speakers_in(file)


def _vocabulary(weights: Path) -> list[str]:
    """The tokens of vocab.json, which is in the format of Hugging Face's tokenizers."""
    try:
        tokenizer = json.loads((weights / "vocab.json").read_text(encoding="utf-8"))
        return list(tokenizer["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError("The checkpoint's vocab.json is damaged or foreign.") from error


# What zipfile and pickle raise on a file that is not theirs.
_UNREADABLE_FILE = (
    OSError, zipfile.BadZipFile, pickle.UnpicklingError, StopIteration,
    AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError,
)  # fmt: skip


class _Outline(pickle.Unpickler):
    """Reads the plain structure of a pickle; everything else in it becomes None, and nothing is called."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        return lambda *_args: None

    def persistent_load(self, _reference: Any) -> None:
        return None


def speakers_in(file: Path) -> list[str]:
    """The names in a speakers_xtts.pth, a dictionary by name that `torch.save` wrote; read without torch."""
    try:
        with zipfile.ZipFile(file) as archive:
            data = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(data) as stream:
                return list(_Outline(stream).load())
    except _UNREADABLE_FILE as error:
        raise WeightsError(f"The checkpoint's {SPEAKERS_FILE} is damaged or foreign.") from error


CARD = Card(
    id="xtts",
    name="XTTS v2",
    modality=Modality.SPEECH,
    summary="Speaks 17 languages in any voice heard for six seconds, and starts to play before it is done.",
    pipeline="text -> tokens + reference voice -> audio tokens (GPT) -> waveform (HiFi-GAN)",
    paradigm=Paradigm.TOKENS,
    checkpoints=(
        Checkpoint(
            # Coqui's own files, published again by the library's maintainers and named by its model list: in
            # them the configuration is plain data. In coqui/XTTS-v2 it is a pickled class, which the library
            # replaces by writing model.pth anew, into the download cache too.
            repository="tts-hub/XTTS-v2",
            files=("config.json", "model.pth", "vocab.json", SPEAKERS_FILE),
            required=("config.json", "model.pth", "vocab.json"),
            parameters=467_000_000,
        ),
    ),
    code_licence=Licence(name="MPL-2.0", url="https://github.com/idiap/coqui-ai-TTS/blob/main/LICENSE.txt"),
    weights_licence=Licence(
        name="Coqui Public Model License (CPML)",
        url="https://tts-hub.github.io/cpml",
        commercial=False,
        must_accept=True,
    ),
    languages=LANGUAGES,
    # No model offload: the two parts take turns with every few tokens.
    strategies=("resident", "group_leaf", "device_map", "cpu"),
    whole=frozenset({"decoder"}),
    working=Working(share=0.4),  # the decoder of 602 tokens, 422 MiB, and 240 MiB of keys and values
    sample_rate=24000,
    abilities=frozenset({Ability.CLONE, Ability.STREAM}),
    reference_seconds=(6, 30),  # shorter ones clone badly, as Coqui says; config.json cuts after 30 s
    options=XttsOptions,
    source="https://arxiv.org/abs/2406.04904",
    check=check,
)
