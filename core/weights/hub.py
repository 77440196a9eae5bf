"""The Hugging Face hub: does it answer, what is cached, how large is the rest, and the download.

huggingface_hub 1.x throws a half-fetched file away when a download ends early and looks at nothing for 10 MB
at a time. So the large files (LFS) are fetched here, by Range, straight to their place in the hub's cache
("blobs/<sha256>", the layout its documentation describes); `snapshot_download` then brings the small files
and links everything. Should that layout change, the library would only fetch them once more.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import httpx

from core.card import Checkpoint
from core.errors import WeightsError
from core.weights import archive
from core.weights.folders import hold, human, missing, parts
from core.weights.transfer import TIMEOUT, Meter, Unreachable, fetch

PROBE_SECONDS = 2.0
FRESH_SECONDS = 300.0
_TRUE = {"1", "ON", "YES", "TRUE"}  # what huggingface_hub takes for true


class Hub:
    """Whether the hub answers, found out in the background. One per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._answer = False
        self._asked = 0.0
        self._sizes: dict[Checkpoint, int | None] = {}

    def probe(self) -> None:
        """Ask the hub in the background, unless it was asked in the last five minutes."""
        with self._lock:
            if self._asked and time.monotonic() - self._asked < FRESH_SECONDS:
                return
            self._asked = time.monotonic()
        if offline_by_setting():
            self._settle(False)
        else:
            threading.Thread(target=lambda: self._settle(_answers()), name="hub-probe", daemon=True).start()

    def _settle(self, answer: bool) -> None:
        self._answer = answer
        self._answered.set()

    def online(self, wait: float = PROBE_SECONDS) -> bool:
        """The last answer. The first may take `wait` seconds from the question on; until then it is no."""
        self.probe()
        self._answered.wait(max(0.0, self._asked + wait - time.monotonic()))
        return self._answer

    def size(self, checkpoint: Checkpoint) -> int | None:
        """Bytes that a download of `checkpoint` would bring, or None while that is not known.

        The first call asks the hub in the background.
        """
        with self._lock:
            if checkpoint in self._sizes or not self._answer:
                return self._sizes.get(checkpoint)
            self._sizes[checkpoint] = None
        threading.Thread(target=self._measure, args=(checkpoint,), name="hub-size", daemon=True).start()
        return None

    def _measure(self, checkpoint: Checkpoint) -> None:
        try:
            self._sizes[checkpoint] = sum(remote_size(p) for _, p in parts(checkpoint) if not cached(p))
        except Exception:  # a size that cannot be had stays unknown; the download itself tells why
            self._sizes.pop(checkpoint, None)


def offline_by_setting() -> bool:
    """Whether HF_HUB_OFFLINE (or the older TRANSFORMERS_OFFLINE) forbids asking."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in _TRUE


def _answers() -> bool:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (401, 404, 405)  # a mirror without a front page; a proxy's refusal is another
    except (OSError, ValueError):
        return False


def cached(checkpoint: Checkpoint) -> Path | None:
    """The folder of one repository (or archive) in the cache if everything wanted is there. No network."""
    if checkpoint.archive:
        return archive.cached(checkpoint)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            checkpoint.repository,
            revision=checkpoint.revision,
            allow_patterns=list(checkpoint.files) or None,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    alone = checkpoint.model_copy(update={"also": ()})
    return None if missing(Path(folder), alone) else Path(folder)


def commit(checkpoint: Checkpoint, folder: Path) -> str:
    """The commit of a cached folder; for an archive its sha256."""
    return archive.commit(folder) if checkpoint.archive else folder.name


def remote_size(checkpoint: Checkpoint) -> int:
    """Bytes of the wanted files of one repository, or of the archive, as the server says."""
    if checkpoint.archive:
        return archive.size(checkpoint)
    return sum(file.size or 0 for file in _listing(checkpoint)[1])


def _listing(checkpoint: Checkpoint) -> tuple[str, list[Any]]:
    """Commit and wanted files (huggingface_hub's RepoSibling, with sizes) of a repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    info = HfApi().model_info(
        checkpoint.repository, revision=checkpoint.revision, files_metadata=True, timeout=TIMEOUT
    )
    patterns = list(checkpoint.files) or None
    files = list(filter_repo_objects(info.siblings or [], allow_patterns=patterns, key=lambda f: f.rfilename))
    return str(info.sha), files


def download(checkpoint: Checkpoint, meter: Meter) -> Path:
    """Bring one repository (or archive) into the cache; raises `WeightsError`."""
    if checkpoint.archive:
        return archive.download(checkpoint, meter)
    try:
        return _download(checkpoint, meter)
    except (WeightsError, httpx.TransportError, OSError, httpx.HTTPError) as error:
        raise _explained(error, checkpoint.repository, begun=meter.done > 0) from error


def _download(checkpoint: Checkpoint, meter: Meter) -> Path:
    from huggingface_hub import constants, get_session, hf_hub_url, snapshot_download
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status

    repository = checkpoint.repository
    meter.say(f"Asking the hub for {repository}")
    commit, files = _listing(checkpoint)
    names = {file.rfilename for file in files}
    if lacks := [name for name in checkpoint.required if name not in names]:
        raise WeightsError(f"The repository {repository} has no {', '.join(lacks)}.")

    cache = Path(constants.HF_HUB_CACHE)
    name = f"models--{repository.replace('/', '--')}"
    blobs = cache / name / "blobs"
    large = {file.lfs.sha256: file for file in files if file.lfs}
    wanted = {sha: file for sha, file in large.items() if not (blobs / sha).exists()}
    total = sum(file.size for file in wanted.values())
    blobs.mkdir(parents=True, exist_ok=True)
    _check_room(repository, blobs, sum(_left(blobs / sha, file.size) for sha, file in wanted.items()))

    meter.note, meter.total = f"Downloading {repository}, {human(total)}", total
    for sha, file in wanted.items():
        before = meter.done
        with hold(cache / ".locks" / name / f"{sha}.lock", meter.check):  # the library's own lock
            if not (blobs / sha).exists():
                fetched = blobs / f"{sha}.fetched"
                fetch(
                    get_session(),
                    hf_hub_url(repository, file.rfilename, revision=commit),
                    fetched,
                    meter,
                    size=file.size,
                    headers=build_hf_headers(),
                    refuse=hf_raise_for_status,
                )
                _verify(fetched, sha, file.rfilename, meter)
                fetched.replace(blobs / sha)
        meter.done = before + file.size

    disable_progress_bars()  # they would write over the server's log
    folder = snapshot_download(
        repository, revision=checkpoint.revision, allow_patterns=list(checkpoint.files) or None
    )
    return Path(folder)


def _left(blob: Path, size: int) -> int:
    partial = blob.with_name(blob.name + ".fetched.incomplete")
    return size - (partial.stat().st_size if partial.exists() else 0)


def _check_room(repository: str, folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise WeightsError(
            f"{repository} needs {human(need)} of disk and {human(free)} are free at {folder}; "
            "make room, or point HF_HOME at a larger disk."
        )


def _verify(file: Path, sha: str, name: str, meter: Meter) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while piece := source.read(1 << 22):
            meter.check()
            digest.update(piece)
    if digest.hexdigest() != sha:
        file.unlink()
        raise WeightsError(f"{name} arrived damaged and was thrown away; try again.")


def _explained(error: Exception, repository: str, begun: bool) -> WeightsError:
    """The sentence for what huggingface_hub or the network raised."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    match error:
        case WeightsError():
            return error
        case errors.GatedRepoError():
            return WeightsError(
                f"{repository} is gated: accept its terms at {page}, then set HF_TOKEN to your token."
            )
        case errors.RepositoryNotFoundError():
            return WeightsError(
                f"The hub has no repository {repository} that you may read; if it is private, set HF_TOKEN."
            )
        case errors.RevisionNotFoundError():
            return WeightsError(f"The repository {repository} has no such revision.")
        case errors.RemoteEntryNotFoundError():
            return WeightsError(f"A file of the repository {repository} is gone from the hub.")
        case errors.LocalEntryNotFoundError() if isinstance(error.__cause__, errors.FileMetadataError):
            return WeightsError(f"{constants.ENDPOINT} does not answer about {repository} as a hub does.")
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | httpx.TransportError():
            if begun:
                return WeightsError(
                    f"The connection to the hub was lost; what came of {repository} is kept for the next try."
                )
            return Unreachable(f"The hub does not answer, so {repository} could not be downloaded.")
        case errors.HfHubHTTPError() if status in (401, 403):
            return WeightsError(
                f"The hub refuses {repository} ({status}): set HF_TOKEN to a token that may read it, "
                f"and accept its terms at {page} if it asks for that."
            )
        case errors.HfHubHTTPError():
            return WeightsError(f"The hub answered {status} for {repository}; try again later.")
        case OSError() if error.errno == errno.ENOSPC:
            return WeightsError(f"The disk is full; {repository} could not be downloaded.")
        case _:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return WeightsError(f"{repository} could not be downloaded: {reason}")
