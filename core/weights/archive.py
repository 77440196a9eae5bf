"""Weights published as a zip outside the hub: fetched, checked and unpacked once."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

import httpx

from core.card import Checkpoint
from core.errors import WeightsError
from core.weights.folders import build_once, hold, human, missing
from core.weights.transfer import TIMEOUT, Meter, fetch

_EXPANDED_LIMIT = 50 * 10**9  # bytes; no checkpoint is that large, a zip bomb is
_GROWTH_LIMIT = 200  # unpacked over packed; weights hardly shrink, a zip bomb does


def _place(checkpoint: Checkpoint) -> Path:
    """Where the archive of a checkpoint is unpacked: huggingface_hub's folder for files from elsewhere."""
    from huggingface_hub import cached_assets_path, constants

    url = httpx.URL(checkpoint.archive)
    stamp = hashlib.sha256(str(url).encode()).hexdigest()[:12]
    return (
        cached_assets_path("soundstage", "archives", assets_dir=constants.HF_ASSETS_CACHE)
        / f"{PurePosixPath(url.path).stem}-{stamp}"
    )


def cached(checkpoint: Checkpoint) -> Path | None:
    """The unpacked archive, if it is there and complete."""
    folder = _place(checkpoint)
    whole = folder.is_dir() and not missing(folder, checkpoint) and _record(folder).is_file()
    return folder if whole else None


def commit(folder: Path) -> str:
    """The sha256 of the zip that `folder` came from: an archive has no other version."""
    return str(json.loads(_record(folder).read_text())["sha256"])


def _record(folder: Path) -> Path:
    return folder.with_name(folder.name + ".json")


def size(checkpoint: Checkpoint) -> int:
    """Bytes of the zip, as its server says; 0 if it does not."""
    answer = httpx.head(checkpoint.archive, timeout=TIMEOUT, follow_redirects=True)
    answer.raise_for_status()
    return int(answer.headers.get("Content-Length", 0))


def download(checkpoint: Checkpoint, meter: Meter) -> Path:
    """Fetch and unpack the archive; raises `WeightsError`."""
    folder = _place(checkpoint)
    packed = folder.with_name(folder.name + ".zip")
    meter.say(f"Downloading {PurePosixPath(checkpoint.archive).name}")
    with hold(folder.with_name(folder.name + ".fetch.lock"), meter.check):
        if found := cached(checkpoint):
            return found
        try:
            with httpx.Client() as client:
                fetch(client, checkpoint.archive, packed, meter)
        except httpx.HTTPStatusError as error:
            raise WeightsError(
                f"{checkpoint.archive} cannot be had: its server answered {error.response.status_code}."
            ) from error
        meter.note = f"Unpacking {PurePosixPath(checkpoint.archive).name}"
        try:
            with packed.open("rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
            build_once(folder, lambda: False, lambda empty: unpack(packed, empty, meter), meter.check)
            _record(folder).write_text(json.dumps({"url": checkpoint.archive, "sha256": digest}))
        finally:
            packed.unlink(missing_ok=True)
    if lacks := missing(folder, checkpoint):
        raise WeightsError(f"{checkpoint.archive} has no {', '.join(lacks)}.")
    return folder


def unpack(packed: Path, folder: Path, meter: Meter) -> None:
    """Unpack a zip into an empty folder; one top folder that holds everything is left out.

    Raises:
        WeightsError: not a zip, damaged, too large, or with names or links that lead outside.
    """
    try:
        with zipfile.ZipFile(packed) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            _refuse_odd(packed, members)
            tops = {PurePosixPath(m.filename).parts[0] for m in members}
            nested = len(tops) == 1 and all(len(PurePosixPath(m.filename).parts) > 1 for m in members)
            for member in members:
                meter.check()
                parts = PurePosixPath(member.filename).parts[1 if nested else 0 :]
                place = folder.joinpath(*parts)
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, place.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise WeightsError(f"The archive {packed.stem} is damaged ({error}); try again.") from error


def _refuse_odd(packed: Path, members: list[zipfile.ZipInfo]) -> None:
    expanded = sum(m.file_size for m in members)
    if expanded > _EXPANDED_LIMIT or expanded > _GROWTH_LIMIT * max(packed.stat().st_size, 1 << 20):
        raise WeightsError(
            f"The archive {packed.stem} would unpack to {human(expanded)}: too much for weights."
        )
    if (free := shutil.disk_usage(packed.parent).free) < expanded:
        raise WeightsError(
            f"The archive {packed.stem} needs {human(expanded)} of disk, and {human(free)} are free."
        )
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise WeightsError(
                f"The archive {packed.stem} holds {member.filename!r}, which leads out of its folder."
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise WeightsError(
                f"The archive {packed.stem} holds a link, {member.filename!r}; it was not unpacked."
            )
