"""Checkpoint folders: what is missing or damaged in one, and one put together from several repositories."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from core.card import Checkpoint

_TORCH = {".pth", ".pt", ".ckpt"}
_CHECKED = _TORCH | {".bin", ".safetensors", ".json", ".npz", ".h5", ".onnx"}
_NEVER_EMPTY = _CHECKED | {".txt", ".yaml", ".npy"}
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses longer headers
_JSON_LIMIT = 1_000_000  # bytes; larger ones (big vocabularies) are left to the engine to read


def human(size: int) -> str:
    """`size` bytes for people: "1.9 GB", "32 MB"."""
    if size >= 10**9:
        return f"{size / 10**9:.1f} GB"
    if size >= 10**6:
        return f"{size / 10**6:.0f} MB"
    return f"{max(1, round(size / 1000))} kB" if size else "0 bytes"


def parts(checkpoint: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
    """The checkpoint itself and those in `also`, each with its sub-folder ("" for the first)."""
    yield "", checkpoint
    for other in checkpoint.also:
        yield other.folder, other


def missing(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Required files that `folder` lacks, by path; an optional part may be absent as a whole."""
    lacks: list[str] = []
    for name, part in parts(checkpoint):
        if part.optional and not (folder / name).is_dir():
            continue
        lacks += [str(Path(name, file)) for file in part.required if not (folder / name / file).is_file()]
    return lacks


def damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, or "" if nothing shows without loading it.

    Reads headers and ends only: it costs a few milliseconds, whatever the size.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix in _NEVER_EMPTY and file.is_file() and (fault := _fault(file)):
            return f"{file.relative_to(folder)} {fault}"
    return ""


def _fault(file: Path) -> str:
    size = file.stat().st_size
    if not size:
        return "is empty (0 bytes)"
    with file.open("rb") as source:
        start = source.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "is only a pointer of Git LFS, not the file itself (run `git lfs pull`)"
    if file.suffix == ".safetensors":
        return _safetensors_fault(file, size)
    if file.suffix in _TORCH or (file.name.startswith("pytorch_model") and file.suffix == ".bin"):
        if start.startswith(b"PK"):
            return "" if zipfile.is_zipfile(file) else "is truncated"
        return (
            "" if start.startswith(b"\x80") else "is not a PyTorch file"
        )  # 0x80: a pickle, before torch 1.6
    if file.suffix == ".json" and size <= _JSON_LIMIT:
        return _json_fault(file)
    return ""


def _json_fault(file: Path) -> str:
    text = file.read_bytes()
    try:
        content = json.loads(text)
    except ValueError:
        # Coqui's older configs hold comments, which its own reader strips: those end as JSON does.
        if not text.rstrip().endswith((b"}", b"]")):
            return "is not readable JSON: truncated, or another file under that name"
        return ""
    if file.name.endswith("config.json") and not isinstance(content, dict):
        return "holds no settings by name"
    return ""


def _safetensors_fault(file: Path, size: int) -> str:
    """By the format's description: 8 bytes of header length, the header as JSON, then the tensors' bytes."""
    try:
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            if not 0 < length <= min(_HEADER_LIMIT, size - 8):
                return "is truncated or not a safetensors file"
            header = json.loads(source.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "is not a safetensors file"
    if size == expected:
        return ""
    return f"is truncated: {size:,} of {expected:,} bytes" if size < expected else "has bytes after its end"


def bytes_of(folder: Path) -> int:
    """Bytes of all files under `folder`, links followed."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def build_once(
    folder: Path, good: Callable[[], bool], build: Callable[[Path], None], idle: Callable[[], None]
) -> None:
    """Make `folder` with `build(empty folder beside it)` unless it is there and `good()`.

    Several processes may ask at once: one builds, the others wait, and none ever sees half a folder.
    `idle` is called while waiting, and may raise.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold(folder.with_name(folder.name + ".lock"), idle):
        if folder.is_dir() and good():
            return
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            build(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def hold(file: Path, idle: Callable[[], None]) -> Iterator[None]:
    """Hold a lock between processes; `idle` is called a few times a second while another one has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    patience = 0.0
    while not lock.is_locked:
        if patience:
            idle()
        with suppress(Timeout):
            lock.acquire(timeout=patience)
        patience = 0.2
    try:
        yield
    finally:
        lock.release()


def assemble(folder: Path, sources: Mapping[str, Path]) -> None:
    """Fill the empty `folder`, by sub-folder, with links to each source's files; copies where links fail."""
    for name, source in sources.items():
        for file in sorted(source.rglob("*")):
            if not file.is_file():
                continue
            place = folder / name / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.symlink_to(file.resolve())
            except OSError:
                shutil.copyfile(file, place)


def links_hold(folder: Path) -> bool:
    """Whether every link in an assembled folder still leads to a file."""
    return all(file.exists() for file in folder.rglob("*"))
