"""From a card's checkpoint to a folder on this machine: the real weights, a miniature, or a folder given."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.card import Card, Checkpoint
from core.errors import BadInput, SoundstageError, WeightsError
from core.media import room_for
from core.weights import hub
from core.weights.folders import (
    assemble,
    build_once,
    bytes_of,
    damage,
    human,
    links_hold,
    missing,
    parts,
)
from core.weights.hub import Hub
from core.weights.licences import Licences, may_use
from core.weights.transfer import Meter, Report, Unreachable, watched

__all__ = ["Hub", "Licences", "Plan", "Report", "Resolved", "human", "may_use", "plan", "resolve"]

Kind = Literal["none", "hub", "download", "miniature", "folder"]


@dataclass(frozen=True)
class Plan:
    """Which weights a job would use, as far as the cache tells."""

    kind: Kind
    sentence: str  # for the page
    folder: Path | None = None  # where it is known before the worker resolves it
    cached: dict[str, Path] = field(default_factory=dict, repr=False)  # the parts' folders, by sub-folder

    @property
    def real(self) -> bool:
        return self.kind in ("hub", "download", "folder")


@dataclass(frozen=True)
class Resolved:
    """The weights a job really used."""

    folder: Path | None
    kind: str  # none, hub, miniature or folder
    repository: str
    # Of the repository; else a hash: of an archive, a miniature's builder, the sizes and dates of a folder.
    commit: str
    bytes: int
    also: dict[str, str] = field(default_factory=dict)  # further repositories and their commits
    note: str = ""  # why these weights are not those first planned; else empty


def plan(card: Card, checkpoint: Checkpoint, choice: str, online: bool, *, size: int | None = None) -> Plan:
    """Find out which weights would be used, from the cache alone.

    Args:
        choice: auto, hub, miniature, or a checkpoint folder.
        online: whether the hub answers (`Hub.online`).
        size: bytes of the download where known (`Hub.size`), for the sentence.

    Raises:
        BadInput: the folder is missing or is not this checkpoint.
        WeightsError: `hub` was asked for, and the weights are neither cached nor within reach.
    """
    if not card.has_weights or not (checkpoint.repository or checkpoint.archive):
        return Plan("none", "No weights needed.")
    if choice == "miniature":
        return Plan("miniature", "Untrained miniature, as asked: the sound is noise.")
    if choice not in ("auto", "hub"):
        return _given(card, checkpoint, choice)
    cached = _cached(checkpoint)
    absent = _absent(checkpoint, cached, online)
    if not absent:
        folder = None if checkpoint.also else cached[""]
        return Plan("hub", "Real weights, in the cache.", folder, cached)
    if online:
        amount = human(size) if size else "they"
        return Plan("download", f"Real weights; {amount} will be downloaded first.", None, cached)
    if choice == "hub":
        names = ", ".join(part.repository or part.archive for part in absent)
        raise WeightsError(
            f"{card.name} needs {names}, which is not in the cache, and the hub cannot be reached; "
            "go online once, or choose the miniature."
        )
    return Plan("miniature", "Untrained miniature: this machine is offline, so the sound is noise.")


def _given(card: Card, checkpoint: Checkpoint, choice: str) -> Plan:
    folder = Path(choice).expanduser()
    if not choice or not folder.is_dir():
        raise BadInput(
            f"There is no weights folder {choice!r}; weights are auto, hub, miniature or an existing folder."
        )
    if lacks := missing(folder, checkpoint):
        raise BadInput(
            f"The folder {choice!r} is not a checkpoint of {card.name}: it lacks {', '.join(lacks)}."
        )
    return Plan("folder", f"Weights of the folder {folder.name}.", folder)


def _cached(checkpoint: Checkpoint) -> dict[str, Path]:
    """The folders of the parts that are in the cache, by sub-folder."""
    return {name: folder for name, part in parts(checkpoint) if (folder := hub.cached(part))}


def _absent(checkpoint: Checkpoint, cached: dict[str, Path], online: bool) -> list[Checkpoint]:
    """The parts that are not in the cache; an optional one counts only where it could be had."""
    return [p for name, p in parts(checkpoint) if name not in cached and (online or not p.optional)]


def resolve(
    card: Card,
    checkpoint: Checkpoint,
    choice: str,
    *,
    online: bool,
    cache: Path,
    package: str,
    report: Report,
) -> Resolved:
    """Have the weights on this machine: download or build them where needed. For the worker.

    Args:
        choice: auto, hub, miniature, or a checkpoint folder.
        cache: folder for what can be built again at any time.
        package: the engine's package; its `miniature` module is imported when one has to be built.
        report: called several times a second while something is under way; what it raises stops that. A
            download stopped so goes on from there at the next try.

    Raises:
        BadInput, WeightsError: as `plan`, and when a download or a build failed or a file is damaged.
            With `auto`, a hub that does not answer after all is no error: the miniature is used, and
            `note` says why.
    """
    chosen = plan(card, checkpoint, choice, online)
    if chosen.kind == "none":
        return Resolved(None, "none", "", "", 0)
    if chosen.kind == "folder":
        assert chosen.folder is not None
        _refuse_damage(chosen.folder, "Give a whole copy.")
        return Resolved(chosen.folder, "folder", "", _state(chosen.folder), bytes_of(chosen.folder))
    if chosen.kind == "miniature":
        return _miniature(card, checkpoint, cache, package, report)
    found = chosen.cached
    if chosen.kind == "download":
        absent = _absent(checkpoint, found, online=True)
        try:
            watched(lambda meter: _download(absent, meter), report)
        except Unreachable as error:
            if choice != "auto":
                raise
            note = f"{error} The untrained miniature is used instead: the sound is noise."
            report(note, 0, 0)
            return _miniature(card, checkpoint, cache, package, report, note)
        found = _cached(checkpoint)
    return _real(card, checkpoint, found, cache, report)


def _wait(report: Report) -> Callable[[], None]:
    return lambda: report("Waiting for another process that prepares the same weights", 0, 0)


def _refuse_damage(folder: Path, mend: str) -> None:
    if fault := damage(folder):
        raise WeightsError(f"The weights cannot be used: {fault}. {mend}")


def _download(absent: list[Checkpoint], meter: Meter) -> None:
    for part in absent:
        try:
            hub.download(part, meter)
        except WeightsError:
            if not part.optional:
                raise


def _real(
    card: Card, checkpoint: Checkpoint, found: dict[str, Path], cache: Path, report: Report
) -> Resolved:
    for folder in found.values():
        _refuse_damage(folder, f"Delete {folder}, and it will be downloaded again.")
    commits = {p.repository: hub.commit(p, found[name]) for name, p in parts(checkpoint) if name in found}
    main = commits.pop(checkpoint.repository)
    folder = found[""]
    if checkpoint.also:
        stamp = _stamp(json.dumps([main, *sorted(commits.items())]))
        folder = cache / "assembled" / f"{card.id}-{stamp}"
        build_once(folder, lambda: links_hold(folder), lambda empty: assemble(empty, found), _wait(report))
    return Resolved(folder, "hub", checkpoint.repository, main, bytes_of(folder), commits)


def _miniature(
    card: Card, checkpoint: Checkpoint, cache: Path, package: str, report: Report, note: str = ""
) -> Resolved:
    spec = importlib.util.find_spec(f"{package}.miniature")
    if spec is None or spec.origin is None:
        raise WeightsError(f"{card.name} has no miniature; it needs its real weights.")
    stamp = _stamp(Path(spec.origin).read_text("utf-8") + checkpoint.model_dump_json())
    name = (checkpoint.repository or checkpoint.archive).rsplit("/", 1)[-1]
    folder = cache / "miniatures" / card.id / f"{name}-{stamp}"
    record = folder.with_name(folder.name + ".json")

    def build(empty: Path) -> None:
        report(note or "Building the untrained miniature", 0, 0)
        try:
            with room_for(f"the miniature of {card.name}"):
                importlib.import_module(f"{package}.miniature").build(empty, checkpoint)
        except SoundstageError:
            raise
        except Exception as error:
            raise WeightsError(f"The miniature of {card.name} could not be built: {error}") from error
        record.write_text(json.dumps(_sizes(empty)))

    def good() -> bool:
        return record.is_file() and record.read_text() == json.dumps(_sizes(folder)) and not damage(folder)

    build_once(folder, good, build, _wait(report))
    return Resolved(folder, "miniature", checkpoint.repository, stamp, bytes_of(folder), note=note)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def _state(folder: Path) -> str:
    """Changes when a file of the folder is replaced, so that weights loaded earlier are not taken for it."""
    files = [(f, f.stat()) for f in sorted(folder.rglob("*")) if f.is_file()]
    return _stamp(json.dumps([(str(f.relative_to(folder)), s.st_size, s.st_mtime_ns) for f, s in files]))


def _stamp(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
