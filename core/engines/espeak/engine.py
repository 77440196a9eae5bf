"""Speaks through eSpeak NG's C library, loaded with ctypes. No torch.

The library keeps its state in C variables, and some of it (pitch flutter, glottal cycles, gain) no call
resets: the second utterance of a process differs from the first. So each `generate` works on a library
mapped into memory afresh, from a copy of our own that nobody else in the process holds open. That takes
5 ms, and makes the same seed give the same samples.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import espeakng_loader
import numpy as np
import numpy.typing as npt

from core.engines.base import Engine, Placement, Run
from core.engines.espeak.card import CARD, EspeakOptions, ssml
from core.engines.speaking import join, speak_by_sentence
from core.errors import SoundstageError
from core.media import Audio
from core.requests import SpeechRequest

# Names and values from espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000  # report missing data instead of ending the process
_POSITION_CHARACTER = 1
_CHARS_UTF8, _SSML = 0x1, 0x10
_RATE, _PITCH, _RANGE, _WORDGAP = 1, 3, 4, 7

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_UriCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
_NO_FILES = _UriCallback(lambda kind, uri, base: 1)  # 1: do not play the file of an <audio> tag
_LOCK = threading.Lock()  # two threads must not map and unmap one file at once

# Where the voice is not called like the language.
_VOICES = {"zh": "cmn", "no": "nb"}


class Espeak(Engine):
    def load(self, weights: Path | None, placement: Placement) -> None:
        source = Path(espeakng_loader.get_library_path())
        self._folder = tempfile.TemporaryDirectory(prefix="soundstage-espeak-")
        self._library = Path(shutil.copy(source, self._folder.name))
        with _LOCK, _fresh(self._library):
            pass  # an unusable library shows now rather than at the first request

    def generate(self, request: SpeechRequest, options: EspeakOptions, run: Run) -> Audio:
        with _LOCK, _fresh(self._library) as library:
            speaker = _Speaker(library, run)
            speaker.set_up(request.language, options)
            if not options.markup:
                return speak_by_sentence(request.text, CARD.sample_rate, run, speaker.speak, limit=1000)
            # Tags may span sentences, so a marked-up text is spoken in one piece.
            spoken = join([speaker.speak(ssml(request.text), _SSML)], CARD.sample_rate)
            run.step(1, 1, "text")
            return spoken

    def close(self) -> None:
        self._folder.cleanup()


class _Speaker:
    """One mapped library, with a voice."""

    def __init__(self, library: ctypes.CDLL, run: Run) -> None:
        self._library = library
        self._run = run
        self._pieces: list[bytes] = []
        self._stopped_by: BaseException | None = None
        self._callback = _Callback(self._receive)  # kept: the library holds only its address
        library.espeak_SetSynthCallback(self._callback)
        library.espeak_SetUriCallback(_NO_FILES)

    def set_up(self, language: str, options: EspeakOptions) -> None:
        voice = _VOICES.get(language, language) if options.accent == "standard" else options.accent
        name = voice if options.variant == "plain" else f"{voice}+{options.variant}"
        if self._library.espeak_SetVoiceByName(name.encode()):
            raise SoundstageError(
                f"The installed eSpeak NG has no voice {name!r}; reinstall espeakng-loader."
            )
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(self._run.seed))  # breath is noise
        for parameter, value in (
            (_RATE, options.speed),
            (_PITCH, options.pitch),
            (_RANGE, options.pitch_range),
            (_WORDGAP, options.word_gap),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)

    def speak(self, text: str, flags: int = 0) -> npt.NDArray[np.float32]:
        """Samples of `text`, (n,) float32 in [-1, 1), none if silent; raises what `run` raised meanwhile."""
        self._pieces.clear()
        data = text.encode()
        status = self._library.espeak_Synth(
            data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8 | flags, None, None
        )
        if self._stopped_by:
            raise self._stopped_by
        if status:
            raise SoundstageError(f"eSpeak NG failed with its error {status}.")
        samples = np.frombuffer(b"".join(self._pieces), np.int16)
        return (samples if samples.any() else samples[:0]).astype(np.float32) / np.float32(32768)

    def _receive(self, samples: int | None, count: int, events: int | None) -> int:
        # An exception cannot travel through C: it is kept for `speak`, and 1 asks the library to stop.
        try:
            self._run.check()
            if samples:
                self._pieces.append(ctypes.string_at(samples, 2 * count))
        except BaseException as stop:
            self._stopped_by = stop
            return 1
        return 0


@contextmanager
def _fresh(file: Path) -> Iterator[ctypes.CDLL]:
    """The library with all its variables at their first values; unmapped again at the end."""
    library = ctypes.CDLL(str(file))
    try:
        data = espeakng_loader.get_data_path().encode()
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
        if rate != CARD.sample_rate:
            raise SoundstageError("eSpeak NG cannot read its language data; reinstall espeakng-loader.")
        yield library
        library.espeak_Terminate()
    finally:
        _unmap(library)


def _unmap(library: ctypes.CDLL) -> None:
    handle = ctypes.c_void_p(library._handle)
    if sys.platform == "win32":
        ctypes.windll.kernel32.FreeLibrary(handle)
    else:
        ctypes.CDLL(None).dlclose(handle)


ENGINE = Espeak
