"""The licence gate: weights whose licence has to be accepted are used only after a person did so."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from core.card import Card
from core.errors import LicenceNeeded

if TYPE_CHECKING:
    from core.weights import Plan


def may_use(card: Card, plan: Plan, accepted: frozenset[str]) -> None:
    """Raise `LicenceNeeded` when real weights are planned whose licence nobody accepted yet.

    Miniatures pass: they are this project's own.
    """
    licence = card.weights_licence
    if licence is None or not licence.must_accept or not plan.real or card.id in accepted:
        return
    terms = "non-commercial use only; " if not licence.commercial else ""
    where = f" ({terms}{licence.url})" if licence.url else ""
    raise LicenceNeeded(
        card.id,
        f"{card.name}'s weights are under the {licence.name}{where}; accept it first, on the page or with "
        f"--accept-licence {card.id}.",
    )


class Licences:
    """What the operator of this installation accepted, kept over restarts.

    Args:
        home: folder that holds `licences.json`.
        always: engines accepted by a setting, beside those in the file.
    """

    def __init__(self, home: Path, always: Iterable[str] = ()) -> None:
        self._file = home / "licences.json"
        self._always = frozenset(always)

    def accepted(self) -> frozenset[str]:
        """Ids of the engines whose licence was accepted. A damaged file counts as nobody having accepted."""
        try:
            kept = json.loads(self._file.read_text("utf-8"))["accepted"]
            return self._always | frozenset(str(engine) for engine in kept)
        except (OSError, ValueError, KeyError, TypeError):
            return self._always

    def accept(self, engine: str) -> None:
        """Remember that `engine`'s licence was accepted."""
        kept = sorted((self.accepted() - self._always) | {engine})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self._file.parent, prefix=self._file.name)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"accepted": kept}, out)
        Path(partial).replace(self._file)  # a reader sees the old file or the new, never half of one
