"""What all speech engines share: long text by sentence, pauses between, samples that do not clip.

Sentences are cut by rules of our own: pysbd, which comes with coqui-tts, wants one language per call, knows
neither Portuguese, Korean, Turkish nor Thai, and loses text that holds the signs it uses as placeholders.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from core.engines.base import Run
from core.errors import BadInput, SoundstageError
from core.media import Audio

PAUSE_SECONDS = 0.25  # between two sentences, about the pause a reader makes at a full stop

_CLOSERS = "\"'”’»›)\\]」』）】》〉"
_END = re.compile(
    r"(?P<line>[\r\n\u2028\u2029])"
    # Scripts that put no space after a sentence: CJK, Devanagari, Arabic, Ethiopic, Armenian, Burmese, Khmer.
    rf"|(?P<sign>[。！？｡।॥؟۔።፧։။។]+)[{_CLOSERS}]*"
    rf"|(?P<stop>[.!?…‼⁇⁈⁉]+)[{_CLOSERS}]*(?=\s)"
)
_SOFT = re.compile(r"[、，；：﹐]|[,;:،؛.!?…—](?=\s)")  # where a reader breathes inside a sentence
_ABBREVIATION = re.compile(
    "mr|mrs|ms|mx|dr|drs|prof|rev|hon|st|jr|sr|sgt|capt|cpt|lt|maj|cmdr|gov|sen|pres|vs|cf|viz|etc"
    "|approx|dept|ave|blvd"
    "|hr|fr|frl|nr|bzw|usw|vgl|evtl|inkl|zzgl|ggf"
    "|mm|mme|mmes|mlle|mgr|sra|srta|sres|ud|uds|avda|ltda|exmo|exma|sig|dott|avv|dhr|mevr"
    "|ул|г|гг|тыс|млн|руб|др|пр"
)
_BEFORE_NUMBER = re.compile("no|nos|p|pp|vol|vols|fig|figs|art|arts|ch|sec|eq|tab|op|cap|pág|с|стр|рис")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # "J", "e.g", "U.S": what stands before the last point
_ORDINAL = re.compile(r"\d{1,2}")  # "3. Mai", "1. Open the door"


def split_sentences(text: str, limit: int = 250) -> list[str]:
    """Cut text into sentences of at most `limit` characters.

    Cuts after sentence ends and line breaks (also of CJK, Arabic and Devanagari script), never inside a
    number or after a common abbreviation; a sentence over the limit is cut at a comma, then at a space,
    then anywhere. Joined again, the pieces hold every character of the text but white space.
    """
    if limit < 1:
        raise ValueError("limit must be at least 1")
    pieces: list[str] = []
    start = 0
    for end in (*_sentence_ends(text), len(text)):
        if sentence := text[start:end].strip():
            pieces += _within(sentence, limit)
        start = end
    return pieces


def speak_by_sentence(
    text: str,
    rate: int,
    run: Run,
    speak: Callable[[str], npt.NDArray[np.float32]],
    limit: int = 250,
) -> Audio:
    """Speak each sentence with `speak`, report a step each, join with pauses.

    `speak` goes from text to (n,) float32 in [-1, 1]. It may return no samples for a piece with nothing to
    say, such as a lone dash.
    """
    sentences = split_sentences(text, limit)
    run.check()
    pieces = []
    for count, sentence in enumerate(sentences, 1):
        pieces.append(speak(sentence))
        run.step(count, len(sentences), "sentences")
    return join(pieces, rate)


def join(pieces: Sequence[npt.NDArray[np.float32]], rate: int, pause: float = PAUSE_SECONDS) -> Audio:
    """Join mono pieces with `pause` seconds of silence between, scaled down if a sample exceeds 1.

    Raises:
        BadInput: no piece holds a sample.
        SoundstageError: a sample is not a finite number.
    """
    spoken = [np.asarray(piece, np.float32) for piece in pieces if piece.size]
    if not spoken:
        raise BadInput("The text holds nothing that this engine can say; write it in words.")
    silence = np.zeros(round(pause * rate), np.float32)
    samples = np.concatenate([part for piece in spoken for part in (silence, piece)][1:])
    peak = float(np.abs(samples).max())
    if not np.isfinite(peak):
        raise SoundstageError("The model gave samples that are not numbers; try another seed or float32.")
    return Audio(samples / np.float32(peak) if peak > 1 else samples, rate)


def _sentence_ends(text: str) -> Iterator[int]:
    # Somebody who never types a capital would otherwise get one endless sentence.
    has_capitals = text != text.lower()
    for match in _END.finditer(text):
        following = text[match.end() : match.end() + 1]
        if match["sign"]:
            # 「はい。」と言った: the quotation ends here, the sentence goes on.
            quoted = match.end() > match.end("sign")
            if not (quoted and following.isalnum()):
                yield match.end()
        elif match["line"] or not _goes_on(text, match, has_capitals):
            yield match.end()


def _goes_on(text: str, stop: re.Match[str], has_capitals: bool) -> bool:
    """Whether the sentence continues after this point, question or exclamation mark."""
    following = re.compile(r"\w").search(text, stop.end())
    first = following[0] if following else ""
    # Georgian letters count as lower case but never begin a word as capitals.
    if has_capitals and first.islower() and first.title() != first:
        return True
    if stop[0] != ".":
        return False
    words = text[max(0, stop.start() - 24) : stop.start()].split()
    word = words[-1].lstrip("(\"'“‘«¿¡[„").casefold() if words else ""
    return bool(
        _ABBREVIATION.fullmatch(word)
        or (_BEFORE_NUMBER.fullmatch(word) and first.isdigit())
        or _INITIALS.fullmatch(word)
        or _ORDINAL.fullmatch(word)
    )


def _within(sentence: str, limit: int) -> Iterator[str]:
    """Cut one sentence into pieces of at most `limit` characters."""
    while len(sentence) > limit:
        # One character more is looked at: a space just behind the limit makes the whole window a piece.
        window = sentence[: limit + 1]
        cut = max((m.end() for m in _SOFT.finditer(window) if m.end() <= limit), default=0)
        cut = cut or max((m.start() for m in re.finditer(r"\s", window)), default=0)
        cut = cut or _between_letters(sentence, limit)
        yield sentence[:cut].rstrip()
        sentence = sentence[cut:].lstrip()
    yield sentence


def _between_letters(sentence: str, limit: int) -> int:
    """The last cut within `limit` that parts no letter from its accents or vowel signs."""
    for cut in range(limit, 0, -1):
        if unicodedata.category(sentence[cut])[0] != "M":
            return cut
    return limit
