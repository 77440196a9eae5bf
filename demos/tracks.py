"""One result as a track: player, waveform and mel spectrogram on a time axis shared by all tracks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from core.card import Card
from core.events import Loading, Queued, Step
from core.jobs import Job
from core.takes import Take
from demos import figures
from demos.stage import Piece, verdict
from demos.views import address, render


def longest(slots: Sequence[Piece]) -> float:
    """Seconds that the common time axis spans."""
    return max((s.take.media[0]["seconds"] for s in slots if s.take), default=1.0)


def track(piece: Piece, card: Card, span: float) -> str:
    """The HTML of one slot; `span` is the length of the common time axis in seconds."""
    common = {"card": card, "key": piece.key, "state": piece.state, "noise": piece.noise}
    if piece.take:
        return render("track", **common, **_finished(piece.take, card, span), again=_again(piece))
    assert piece.job is not None
    return render("track", **common, **_on_its_way(piece.job), share=1.0)


def _on_its_way(job: Job) -> dict[str, Any]:
    heard = sum(chunk.seconds for chunk in job.chunks)
    return {
        "note": _note(job),
        "fraction": job.fraction,
        "left": _left(job),
        "chunks": [address(job.folder / chunk.file) for chunk in job.chunks if job.folder],
        "chunk_seconds": figures.seconds(heard),
        "reason": job.reason,
    }


def _note(job: Job) -> str:
    match job.event:
        case Queued(position=ahead, seconds=wait):
            place = f"in the queue, {ahead} before it" if ahead else "next in the queue"
            return f"{place}; starts in about {figures.seconds(max(1, round(wait)))}" if wait else place
        case Loading(note=note, done=done, total=total):
            return f"{note}: {figures.size(done)} of {figures.size(total)}" if total else note
        case Step(note=note, done=done, total=total):
            return f"{note or 'steps'}: {done:,} of {total:,}" if total else note
    return ""


def _left(job: Job) -> str:
    if job.seconds_left is None or job.state == "queued":
        return ""
    return f"about {figures.seconds(max(1, round(job.seconds_left)))} left"


def _finished(take: Take, card: Card, span: float) -> dict[str, Any]:
    medium = take.media[0]
    peaks = medium["peaks"]
    return {
        "take": take,
        "share": medium["seconds"] / span,
        "length": medium["seconds"],
        "listen": address(take.folder / medium["listen"]),
        "original": address(take.folder / medium["file"]),
        "download": download_name(take),
        "wave": waveform(peaks),
        "wave_width": len(peaks),
        "mel": address(take.folder / medium["mel"]["file"]),
        "hertz": [(tick["top"], _hertz(tick["hz"])) for tick in medium["mel"]["ticks"]],
        "ticks": figures.time_ticks(span),
        "facts": [(name, value) for name, value in facts(take) if value != figures.NONE],
        "record": _record(take, card),
        "json": json.dumps(
            take.model_dump(mode="json", exclude={"media": {"__all__": {"peaks"}}}),
            indent=2,
            ensure_ascii=False,
        ),
    }


def _hertz(value: float) -> str:
    return f"{value / 1000:g} kHz" if value >= 1000 else f"{value:g} Hz"


def waveform(peaks: Sequence[Sequence[float]]) -> str:
    """An SVG path around `(lowest, highest)` pairs in [-1, 1], in a box of len(peaks) by 100.

    The loudest peak fills the height: what is played has equal loudness too.
    """
    loudest = max((max(-low, high) for low, high in peaks), default=0.0)
    reach = 48 / max(loudest, 1e-3)
    top = [f"{x},{50 - max(reach * high, 0.6):.1f}" for x, (_, high) in enumerate(peaks)]
    bottom = [f"{x},{50 - min(reach * low, -0.6):.1f}" for x, (low, _) in reversed(list(enumerate(peaks)))]
    return f"M{' '.join(top)} {' '.join(bottom)}Z" if peaks else ""


def facts(take: Take) -> list[tuple[str, str]]:
    """What a run cost, as name and figure."""
    cost: Mapping[str, Any] = take.measurements
    one_memory = take.placement.get("device") == "cpu"  # then what was measured of the device is RAM
    return [
        ("Duration", figures.seconds(cost.get("audio_seconds"))),
        ("First sound", figures.seconds(cost.get("first_audio_seconds"))),
        (
            "Loading",
            figures.seconds(cost.get("load_seconds")) if cost.get("load_seconds") else "loaded before",
        ),
        ("Generation", figures.seconds(cost.get("generate_seconds"))),
        ("Real-time factor", figures.factor(cost.get("real_time_factor"))),
        ("GPU before, peak, after", figures.NONE if one_memory else _course(cost, "device")),
        ("RAM before, peak, after", _course(cost, "ram")),
        ("Placement", take.placement.get("words") or take.placement.get("strategy", figures.NONE)),
        ("Weights", weights(take)),
    ]


def _course(cost: Mapping[str, Any], memory: str) -> str:
    return figures.course(*(cost.get(f"{memory}_{when}_bytes") for when in ("before", "peak", "after")))


def weights(take: Take) -> str:
    """Which weights made a take, in a few words."""
    names = {"miniature": "untrained miniature: noise", "none": "needs none"}
    kind = str(take.weights.get("kind", ""))
    return names.get(kind) or str(take.weights.get("repository") or kind)


def download_name(take: Take) -> str:
    words = re.sub(r"\W+", "-", take.order.request.text.lower()).strip("-")[:32].strip("-")
    return f"{take.engine}-{words or 'take'}.wav"


def _record(take: Take, card: Card) -> list[tuple[str, str]]:
    order, medium = take.order, take.media[0]
    options = ", ".join(f"{name} {value}" for name, value in order.options.items())
    loudness = f"{medium['lufs']:.1f} LUFS" if medium.get("lufs") is not None else "too short or silent"
    rows = [
        ("Text", order.request.text),
        ("Language", figures.language(order.request.language)),
        ("Voice", "cloned from a reference, with consent" if order.request.voice else ""),
        ("Seed", str(order.seed)),
        ("Options", options),
        (
            "Weights",
            " ".join(str(take.weights[k]) for k in ("kind", "repository", "commit") if take.weights.get(k)),
        ),
        ("Placement", ", ".join(f"{k} {v}" for k, v in take.placement.items())),
        ("Versions", ", ".join(f"{k} {v}" for k, v in take.versions.items())),
        ("Sound", f"{medium['rate']:,} Hz, {loudness} as made; played at equal loudness"),
        (
            "Same seed",
            card.reproducible_note or ("gives bitwise the same" if card.reproducible else "may differ"),
        ),
        ("Waited", figures.seconds(take.measurements.get("queue_seconds"))),
        ("Made", figures.moment(take.made)),
    ]
    return [(name, value) for name, value in rows if value]


def _again(piece: Piece) -> dict[str, str] | None:
    found = verdict(piece)
    return {"kind": found[0], "sentence": found[1]} if found else None
