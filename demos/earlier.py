"""The list of what this browser made before, and of what it still waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.card import Card
from demos import figures
from demos.stage import Piece, verdict
from demos.tracks import download_name
from demos.views import address, render

EXCERPT = 80  # characters of a take's text


def earlier(pieces: Sequence[Piece], cards: Mapping[str, Card]) -> str:
    """HTML of the list."""
    return render("takes", rows=[_row(piece, cards[piece.order.engine]) for piece in pieces])


def _row(piece: Piece, card: Card) -> dict[str, Any]:
    take, text, found = piece.take, piece.order.request.text, verdict(piece)
    row = {
        "name": card.name,
        "excerpt": text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1].rstrip()}…",
        "noise": piece.noise,
        "verdict": found[1] if found else "A repetition." if piece.repeats else "",
    }
    if take is None:
        return row | {"id": piece.key, "listen": "", "length": piece.state, "made": "not yet made"}
    medium = take.media[0]
    return row | {
        "id": take.id,
        "listen": address(take.folder / medium["listen"]),
        "original": address(take.folder / medium["file"]),
        "download": download_name(take),
        "length": figures.seconds(medium["seconds"]),
        "made": figures.moment(take.made),
    }
