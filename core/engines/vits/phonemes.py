"""Phonemes for Coqui from eSpeak NG's library, where Coqui itself would run the `espeak-ng` command."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import espeakng_loader
from TTS.tts.utils.text import phonemizers
from TTS.tts.utils.text.phonemizers.base import BasePhonemizer
from TTS.tts.utils.text.phonemizers.espeak_wrapper import ESpeak
from TTS.tts.utils.text.punctuation import Punctuation

# Names and values from espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000  # report missing data instead of ending the process
_UTF8 = 1
_IPA = 2

_LOCK = threading.Lock()  # the library keeps its state in globals


class LibraryPhonemizer(BasePhonemizer):
    """eSpeak NG behind Coqui's phonemizer interface; the phonemes are those of `espeak-ng --ipa=1`.

    A fresh machine has no `espeak-ng` command, and one more version of it would be one more pronunciation:
    the library that espeakng-loader carries is the same everywhere.
    """

    def __init__(self, language: str) -> None:
        super().__init__(language, punctuations=Punctuation.default_puncs(), keep_puncs=True)

    @staticmethod
    def name() -> str:
        return ESpeak.name()

    @classmethod
    def is_available(cls) -> bool:
        return True

    def version(self) -> str:
        version: bytes = _library().espeak_Info(None)
        return version.decode()

    @staticmethod
    def supported_languages() -> dict[str, str]:
        return {"en": "English", "en-us": "English (America)", "en-gb": "English (Great Britain)"}

    def _init_language(self, language: str) -> str:
        language = super()._init_language(language)
        return "en-us" if language == "en" else language  # as Coqui's wrapper reads it

    def _phonemize(self, text: str, separator: str = "") -> str:
        phonemes = "".join(clause.strip() for clause in _clauses(text, self._language))
        # A word read by another language's rules comes between flags such as (fr) and (en).
        return re.sub(r"\(.+?\)", "", phonemes).replace("_", separator)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Info.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int]
    data = espeakng_loader.get_data_path().encode()
    if library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT) < 0:
        raise RuntimeError("eSpeak NG cannot read its data; reinstall espeakng-loader.")
    return library


def _clauses(text: str, voice: str) -> list[str]:
    """IPA of each clause of `text`, with "_" between phonemes."""
    with _LOCK:
        library = _library()
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"eSpeak NG has no voice {voice!r}; reinstall espeakng-loader.")
        rest = ctypes.c_char_p(text.encode())
        clauses = []
        while rest.value is not None:  # each call reads one clause and moves the pointer behind it
            phonemes = library.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, ord("_") << 8 | _IPA)
            clauses.append((phonemes or b"").decode())
        return clauses


@contextmanager
def installed() -> Iterator[None]:
    """While this is open, Coqui builds this phonemizer wherever a configuration asks for "espeak"."""
    phonemizers.get_default_phonemizer("be")  # Coqui fills its table at the first question only
    table = phonemizers.PHONEMIZERS
    before = table[LibraryPhonemizer.name()]
    table[LibraryPhonemizer.name()] = LibraryPhonemizer
    try:
        yield
    finally:
        table[LibraryPhonemizer.name()] = before
