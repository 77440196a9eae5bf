"""Takes on disk. The folders are the truth; the SQLite index beside them can be made again from them.

<takes>/kept/<id>/         media, record.json, and .owner (a hash): all that may be served to a browser
<takes>/partial/<server>/  work in progress of one running server, which holds <server>.lock
<takes>/index.sqlite3      what `list` and `pace` look things up in
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import sqlite3
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from core import __version__
from core.card import Modality
from core.errors import BadInput, DiskFull, SoundstageError
from core.media import AUDIO_SUFFIXES, room_for, write_whole
from core.requests import Order

log = logging.getLogger(__name__)

RECORD = "record.json"
OWNER = ".owner"
PARSED = 256  # records kept in memory, each about 60 kB
REMEMBERED = 20  # takes that a forecast looks back on
_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_SCHEMA = 2  # a higher number makes every index anew
_TABLE = (
    "DROP TABLE IF EXISTS takes",
    """CREATE TABLE takes (
        id TEXT PRIMARY KEY, made REAL NOT NULL, modality TEXT NOT NULL, owner TEXT NOT NULL,
        engine TEXT NOT NULL, repository TEXT NOT NULL, kind TEXT NOT NULL, device TEXT NOT NULL,
        units REAL NOT NULL, generate_seconds REAL, load_seconds REAL,
        strategy TEXT NOT NULL, working_bytes INTEGER, planned_bytes INTEGER)""",
    "CREATE INDEX by_owner ON takes (owner, made)",
    "CREATE INDEX by_engine ON takes (engine, made)",
)
T = TypeVar("T")


class Take(BaseModel):
    """A finished job. `record.json` holds everything of it but its own place."""

    model_config = ConfigDict(frozen=True)

    # Not to be guessed, because files are served by it.
    id: str = Field(default_factory=lambda: secrets.token_urlsafe(16))
    made: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    engine: str
    modality: Modality
    order: Order  # a kept take names its reference recording relative to `folder`: see `Takes.order_of`
    weights: dict[str, Any] = {}  # kind, repository, commit, bytes
    media: list[dict[str, Any]] = []  # each: file, kind, and facts about it
    measurements: dict[str, float | int | None] = {}
    placement: dict[str, str] = {}
    versions: dict[str, str] = {}
    group: str = ""
    licences: dict[str, str | bool] = {}  # code, weights, commercial
    soundstage: str = __version__
    folder: Path = Field(default=Path(), exclude=True)


TakeList = list[Take]  # inside Takes, `list` is its method
RowList = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Pace:
    """What an engine took lately, over at most `REMEMBERED` takes."""

    seconds_per_unit: float  # of generating, median; the unit is `Card.units`
    load_seconds: float  # longest
    planned_bytes: int | None  # on the device, the latest
    takes: int


class Takes:
    """The takes of one folder, which several servers may use at once, each from several threads.

    Args:
        folder: made if it is not there.

    Raises:
        SoundstageError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept = folder / "kept"
        self._partial = folder / "partial"
        self._index = folder / "index.sqlite3"
        try:
            self.kept.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            with self._alone():
                self._sweep()
                # Held as long as this process lives: it tells others that these partial folders are in use.
                self._own = self._partial / secrets.token_hex(8)
                self._life = self._own.with_suffix(".lock").open("w")
                fcntl.flock(self._life, fcntl.LOCK_EX)
                self._own.mkdir()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DiskFull(f"There is no room left on the disk for takes in {folder}.") from None
            raise SoundstageError(
                f"Takes cannot be kept in {folder}: {os.strerror(error.errno or 0)}; "
                "name another place by SOUNDSTAGE_HOME."
            ) from None

    def close(self) -> None:
        """Give up this server's partial folders."""
        shutil.rmtree(self._own, ignore_errors=True)
        self._own.with_suffix(".lock").unlink(missing_ok=True)
        self._life.close()

    def new_folder(self, job: str) -> Path:
        """A private folder for a job's files, on the file system of the takes."""
        with room_for("a new take"):
            return Path(tempfile.mkdtemp(prefix=f"{job}-", dir=self._own))

    def keep(self, partial: Path, take: Take, owner: str) -> Take:
        """Turn a job's folder into a take, which exists once this returns; if it raises, nothing is left.

        A reference recording that the order names is copied in.

        Args:
            partial: from `new_folder`, with every file that `take.media` names.
            owner: a visitor's secret; only its hash is stored.

        Raises:
            DiskFull: there is no room.
            SoundstageError: a file is missing.
        """
        kept = self.kept / take.id
        assert _ID.fullmatch(take.id), take.id
        try:
            for medium in take.media:
                if not (partial / medium["file"]).is_file():
                    raise SoundstageError(f"{medium['file']} was not written; the result is lost.")
            with room_for("the take"):
                take = _with_reference(take, partial)
                write_whole(partial / RECORD, take.model_dump_json(indent=2).encode())
                write_whole(partial / OWNER, _hash(owner).encode())
                partial.rename(kept)
            try:
                self._in_index(lambda index: _insert(index, take, _hash(owner)))
            except BaseException:
                kept.rename(partial)
                raise
        except BaseException:
            self.discard(partial)
            raise
        return take.model_copy(update={"folder": kept})

    def discard(self, partial: Path) -> None:
        """Remove a job's folder."""
        shutil.rmtree(partial, ignore_errors=True)

    def get(self, id: str, owner: str | None = None) -> Take:
        """One take; `owner=None` is for the operator.

        Raises:
            BadInput: there is none, it is someone else's, or its files are gone.
        """
        self._must_own(id, owner)
        take = self._read(id)
        if take is None:
            raise BadInput("The files of this take are gone from the disk.")
        return take

    def delete(self, id: str, owner: str | None) -> None:
        """Remove a take and its files; `BadInput` if there is none, or it is someone else's."""
        self._must_own(id, owner)
        going = self._own / f"deleted-{secrets.token_hex(4)}"
        with room_for("the folder of takes"), suppress(FileNotFoundError):
            (self.kept / id).rename(going)
        self.discard(going)
        with suppress(DiskFull):  # a row without a folder is passed over
            self._rows("DELETE FROM takes WHERE id = ?", (id,))

    def order_of(self, take: Take) -> Order:
        """The order that makes a kept take again.

        Raises:
            SoundstageError: its reference recording is gone.
        """
        voice = take.order.request.voice
        if voice is None:
            return take.order
        file = take.folder / voice
        if not file.is_file():
            raise SoundstageError("The reference recording of this take is gone from the disk.")
        return _with_voice(take.order, file)

    def pace(self, engine: str, repository: str, device: str, kind: str | None = None) -> Pace | None:
        """What this engine took lately with these weights on this device; None if it never ran.

        Args:
            kind: of weights ("hub", "miniature", "folder"); None takes all together.
        """
        rows = self._rows(
            "SELECT generate_seconds / units, load_seconds, planned_bytes FROM takes "
            "WHERE engine = ? AND repository = ? AND device = ? AND (kind = ? OR ? IS NULL) "
            "AND units > 0 AND generate_seconds IS NOT NULL ORDER BY made DESC LIMIT ?",
            (engine, repository, device, kind, kind, REMEMBERED),
        )
        if not rows:
            return None
        # An engine that was still loaded took no time to load: the longest is that of a real load.
        return Pace(
            seconds_per_unit=statistics.median(row[0] for row in rows),
            load_seconds=max(row[1] or 0.0 for row in rows),
            planned_bytes=rows[0][2],
            takes=len(rows),
        )

    def peaks(self, engine: str, repository: str, device: str, kind: str) -> RowList:
        """Size of the request and working memory in bytes of this engine's latest takes, of each."""
        return self._rows(
            "SELECT units, working_bytes FROM takes WHERE engine = ? AND repository = ? AND device = ? "
            "AND kind = ? AND strategy = 'resident' AND working_bytes IS NOT NULL ORDER BY made DESC LIMIT ?",
            (engine, repository, device, kind, REMEMBERED),
        )

    def rebuild(self) -> None:
        """Make the index anew from the folders."""
        self._in_index(self._fill)

    def list(self, owner: str | None = None, modality: Modality | None = None, limit: int = 50) -> TakeList:
        """The newest takes first; `owner=None` lists everyone's, for the operator.

        A take whose files are gone from the disk is left out.
        """
        rows = self._rows(
            "SELECT id FROM takes WHERE (owner = ?1 OR ?1 IS NULL) AND (modality = ?2 OR ?2 IS NULL) "
            "ORDER BY made DESC, id DESC",
            (None if owner is None else _hash(owner), modality),
        )
        there = (take for (id,) in rows if (take := self._read(id)))
        return [*islice(there, limit)]

    def _must_own(self, id: str, owner: str | None) -> None:
        rows = self._rows("SELECT owner FROM takes WHERE id = ?", (id,))
        if not rows or (owner is not None and rows[0][0] != _hash(owner)):
            raise BadInput("There is no such take; it may have been deleted.")

    def _read(self, id: str) -> Take | None:
        record = self.kept / id / RECORD
        try:
            state = record.stat()
            return _parsed(record, state.st_mtime_ns, state.st_size)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            log.warning("the record of take %s cannot be read: %s", id, error)
        except ValidationError as error:
            log.warning(
                "the record of take %s is damaged: %s", id, error.errors(include_input=False)[0]["msg"]
            )
        return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One server at a time, and one thread of it."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _sweep(self) -> None:
        """Remove what servers that ended in the middle of a job left behind."""
        for lock in self._partial.glob("*.lock"):
            # Still held by a running server, or just given up by one that closes.
            with suppress(BlockingIOError, FileNotFoundError), lock.open() as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()

    def _rows(self, query: str, values: tuple[Any, ...]) -> RowList:
        return self._in_index(lambda index: index.execute(query, values).fetchall())

    def _in_index(self, use: Callable[[sqlite3.Connection], T]) -> T:
        """Call `use` with the index. A damaged index is set aside and made anew."""
        with room_for(f"the index of takes in {self.folder}"):
            try:
                try:
                    with closing(self._connect()) as index:
                        return use(index)
                except sqlite3.DatabaseError as error:
                    if _code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                        raise
                    self._set_aside(error)
                    with closing(self._connect()) as index:
                        return use(index)
            except sqlite3.Error as error:
                if _code(error) == sqlite3.SQLITE_FULL or shutil.disk_usage(self.folder).free < 1 << 16:
                    raise DiskFull("There is no room left on the disk for the index of takes.") from None
                reason = f"The index of takes in {self.folder} cannot be used: {error}."
                raise SoundstageError(reason) from error

    def _connect(self) -> sqlite3.Connection:
        # A connection for each use: cheap, safe between threads, and none holds on to an index set aside.
        # The journal is SQLite's usual one: its write-ahead log needs room on the disk even to read, and
        # shared memory, which the network folder of a Space does not have.
        index = sqlite3.connect(self._index, timeout=30, isolation_level=None)
        try:
            index.execute("PRAGMA synchronous = OFF")  # after a power cut it is made anew from the folders
            if not _is_made(index):
                with self._alone():
                    if not _is_made(index):
                        self._fill(index)
        except BaseException:
            index.close()
            raise
        return index

    def _fill(self, index: sqlite3.Connection) -> None:
        index.execute("BEGIN IMMEDIATE")
        try:
            for statement in _TABLE:
                index.execute(statement)
            for folder in self.kept.iterdir():
                take = self._read(folder.name)
                if take and take.id == folder.name:
                    owner = folder / OWNER
                    _insert(index, take, owner.read_text() if owner.exists() else "")
            index.execute(f"PRAGMA user_version = {_SCHEMA}")
            index.execute("COMMIT")
        except BaseException:
            index.execute("ROLLBACK")
            raise

    def _set_aside(self, error: Exception) -> None:
        with self._alone():
            with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(self._index)) as index:
                if index.execute("PRAGMA quick_check").fetchone() == ("ok",):
                    return  # another server was faster
            aside = self._index.with_name(f"index.damaged-{secrets.token_hex(4)}.sqlite3")
            log.warning("the index of takes is damaged (%s); kept as %s and made anew", error, aside.name)
            self._index.rename(aside)
            self._index.with_name(f"{self._index.name}-journal").unlink(missing_ok=True)


@lru_cache(maxsize=PARSED)
def _parsed(record: Path, _written: int, _size: int) -> Take:
    """A record, parsed once while its file stays as it is: a page lists its takes several times a second."""
    take = Take.model_validate_json(record.read_bytes())
    return take.model_copy(update={"folder": record.parent})


def _is_made(index: sqlite3.Connection) -> bool:
    return index.execute("PRAGMA user_version").fetchone() == (_SCHEMA,)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary error code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _insert(index: sqlite3.Connection, take: Take, owner_hash: str) -> None:
    measured = take.measurements
    index.execute(
        "INSERT OR REPLACE INTO takes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            take.id,
            take.made.timestamp(),
            take.modality,
            owner_hash,
            take.engine,
            take.weights.get("repository", ""),
            take.weights.get("kind", ""),
            take.placement.get("device", ""),
            measured.get("units", len(take.order.request.text)),
            measured.get("generate_seconds"),
            measured.get("load_seconds"),
            take.placement.get("strategy", ""),
            measured.get("working_bytes"),
            measured.get("planned_bytes"),
        ),
    )


def _hash(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()


def _with_reference(take: Take, partial: Path) -> Take:
    """Copy the reference recording beside the media, and name it there."""
    voice = take.order.request.voice
    if voice is None:
        return take
    # A suffix is a visitor's word, and a browser goes by it.
    suffix = voice.suffix.lower()
    name = f"reference{suffix if suffix in AUDIO_SUFFIXES else '.audio'}"
    try:
        shutil.copyfile(voice, partial / name)
    except FileNotFoundError:
        log.warning("take %s cannot be made again: its reference %s is gone", take.id, voice.name)
    return take.model_copy(update={"order": _with_voice(take.order, Path(name))})


def _with_voice(order: Order, voice: Path) -> Order:
    return order.model_copy(update={"request": order.request.model_copy(update={"voice": voice})})
