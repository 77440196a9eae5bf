"""Takes on disk: kept whole or not at all, found by their owner only, and by several servers at once."""

from __future__ import annotations

import csv
import io
import json
import logging
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from core.errors import BadInput, DiskFull, SoundstageError
from core.media import Audio, write_audio
from core.requests import Order, SpeechRequest
from core.takes import Take, Takes, as_csv, export_zip

SOUND = Audio((0.3 * np.sin(np.arange(2400) / 10)).astype(np.float32), 24000)


def a_take(text: str = "Good morning.", voice: Path | None = None, **facts: Any) -> Take:
    order = Order(engine="espeak", request=SpeechRequest(text=text, voice=voice, consent=True), seed=7)
    given: dict[str, Any] = {
        "engine": "espeak",
        "modality": "speech",
        "order": order,
        "weights": {"kind": "hub", "repository": "a/b", "commit": "c0ffee"},
        "placement": {"device": "cpu"},
        "media": [{"file": "audio.wav", "kind": "audio", "rate": 24000, "lufs": -21.5}],
        "measurements": {"generate_seconds": 1.3, "load_seconds": 2.0, "device_peak_bytes": None},
        "licences": {"code": "GPL-3.0", "weights": "", "commercial": True},
    }
    return Take(**(given | facts))


def keep(takes: Takes, owner: str = "anna", take: Take | None = None) -> Take:
    partial = takes.new_folder("job")
    write_audio(partial / "audio.wav", SOUND)
    return takes.keep(partial, take or a_take(), owner)


def everything(folder: Path) -> set[str]:
    """The files and folders that hold takes or parts of them."""
    return {p.name for p in (folder / "kept").iterdir()} | {p.name for p in folder.glob("partial/*/*")}


@pytest.fixture
def takes(tmp_path: Path) -> Takes:
    return Takes(tmp_path / "takes")


def test_a_kept_take_is_found_with_all_that_it_was_given(takes: Takes) -> None:
    given = a_take(group="press-1", versions={"torch": "2.13"})
    kept = keep(takes, take=given)
    found = takes.get(kept.id, owner="anna")
    assert found == kept
    assert found.model_dump() == given.model_dump()
    assert (found.folder / "audio.wav").is_file()
    assert takes.list(owner="anna") == [kept]


def test_the_record_holds_neither_its_place_nor_its_owner(takes: Takes) -> None:
    kept = keep(takes, owner="a-very-secret-token")
    record = (kept.folder / "record.json").read_text()
    assert json.loads(record)["order"]["request"]["text"] == "Good morning."
    assert str(takes.folder) not in record
    for file in takes.folder.rglob("*"):
        assert file.is_dir() or b"a-very-secret-token" not in file.read_bytes()


def test_ids_cannot_be_guessed() -> None:
    ids = {a_take().id for _ in range(100)}
    assert len(ids) == 100
    assert min(map(len, ids)) >= 22  # 128 bits in base 64


def test_another_visitors_take_behaves_as_absent(takes: Takes) -> None:
    kept = keep(takes, owner="anna")
    assert takes.list(owner="ben") == []
    with pytest.raises(BadInput) as foreign:
        takes.get(kept.id, owner="ben")
    with pytest.raises(BadInput) as absent:
        takes.get("no-such-take-anywhere", owner="ben")
    assert str(foreign.value) == str(absent.value)
    with pytest.raises(BadInput):
        takes.delete(kept.id, "ben")
    assert takes.get(kept.id) == kept, "the operator sees everyone's"


def test_the_newest_come_first_and_no_more_than_asked(takes: Takes) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    kept = [keep(takes, take=a_take(made=start + timedelta(seconds=n))) for n in (2, 0, 4, 1, 3)]
    newest = sorted(kept, key=lambda take: take.made, reverse=True)
    assert takes.list() == newest
    assert takes.list(limit=2) == newest[:2]
    assert takes.list(modality="music") == []  # type: ignore[arg-type]


def test_a_deleted_take_leaves_nothing(takes: Takes) -> None:
    kept = keep(takes)
    takes.delete(kept.id, "anna")
    assert everything(takes.folder) == set()
    assert takes.list() == []
    with pytest.raises(BadInput, match="no such take"):
        takes.delete(kept.id, "anna")


def test_a_take_that_vanished_from_disk_is_skipped_and_said_to_be_gone(takes: Takes) -> None:
    gone, there = keep(takes), keep(takes)
    shutil.rmtree(gone.folder)
    assert takes.list(limit=1) == [there]
    with pytest.raises(BadInput, match="gone from the disk"):
        takes.get(gone.id, "anna")
    takes.delete(gone.id, "anna")
    with pytest.raises(BadInput, match="no such take"):
        takes.get(gone.id, "anna")


def test_a_damaged_record_is_skipped(takes: Takes) -> None:
    damaged, there = keep(takes), keep(takes)
    assert takes.list() == [there, damaged]
    (damaged.folder / "record.json").write_text('{"id": ')
    assert takes.list() == [there]


def test_a_take_without_its_file_is_not_kept(takes: Takes) -> None:
    partial = takes.new_folder("job")
    with pytest.raises(SoundstageError, match=r"audio\.wav was not written"):
        takes.keep(partial, a_take(), "anna")
    assert everything(takes.folder) == set()


def test_a_discarded_job_leaves_nothing(takes: Takes) -> None:
    partial = takes.new_folder("job")
    (partial / "audio.wav").write_bytes(b"half")
    takes.discard(partial)
    assert everything(takes.folder) == set()


# Made again from its own record


def test_a_take_carries_its_reference_recording(takes: Takes, tmp_path: Path) -> None:
    voice = tmp_path / "My Voice.WAV"
    write_audio(voice, SOUND)
    kept = keep(takes, take=a_take(voice=voice))
    voice.unlink()
    shutil.copytree(takes.folder, tmp_path / "moved")
    moved = Takes(tmp_path / "moved").get(kept.id)
    assert moved.order.request.voice == Path("reference.wav")
    order = Takes(tmp_path / "moved").order_of(moved)
    assert order.request.voice == moved.folder / "reference.wav"
    assert order.request.voice.is_file()
    assert order.request.model_copy(update={"voice": voice}) == a_take(voice=voice).order.request
    (moved.folder / "reference.wav").unlink()
    with pytest.raises(SoundstageError, match="reference recording of this take is gone"):
        takes.order_of(moved)


def test_a_reference_is_not_kept_under_a_name_that_a_browser_would_run(takes: Takes, tmp_path: Path) -> None:
    voice = tmp_path / "voice.html"
    voice.write_text("<script>")
    kept = keep(takes, take=a_take(voice=voice))
    assert [p.name for p in kept.folder.glob("reference*")] == ["reference.audio"]


def test_a_result_is_kept_though_its_reference_is_gone(takes: Takes, tmp_path: Path) -> None:
    kept = keep(takes, take=a_take(voice=tmp_path / "gone.wav"))
    with pytest.raises(SoundstageError, match="reference recording"):
        takes.order_of(kept)


# Forecasts


def test_measured_peaks_are_remembered_with_the_size_of_their_request(takes: Takes) -> None:
    resident = {"device": "cuda", "strategy": "resident"}
    for n, placement in enumerate((resident, resident, {"device": "cuda", "strategy": "model_offload"})):
        cost = {
            "units": 10.0 + n,
            "working_bytes": 1000 * (n + 1),
            "planned_bytes": 5,
            "generate_seconds": 1.0,
        }
        keep(takes, take=a_take("hello", measurements=cost, placement=placement))
    assert sorted(takes.peaks("espeak", "a/b", "cuda", "hub")) == [(10.0, 1000), (11.0, 2000)]
    assert takes.peaks("espeak", "a/b", "cpu", "hub") == []
    pace = takes.pace("espeak", "a/b", "cuda")
    assert pace is not None and pace.planned_bytes == 5


def test_the_pace_is_the_median_of_the_latest(takes: Takes) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    assert takes.pace("espeak", "a/b", "cpu") is None
    for n in range(25):  # the first five are too old to count
        seconds = 1000.0 if n < 5 else float(n)
        cost = {"generate_seconds": seconds, "load_seconds": 9.0 if n == 10 else 0.0}
        keep(takes, take=a_take("0123456789", made=start + timedelta(seconds=n), measurements=cost))
    pace = takes.pace("espeak", "a/b", "cpu", kind="hub")
    assert pace is not None
    assert pace.seconds_per_unit == pytest.approx(1.45)  # the median of 5..24 is 14.5, over 10 characters
    assert (pace.load_seconds, pace.takes) == (9.0, 20)
    for other in (("bark", "a/b", "cpu"), ("espeak", "x/y", "cpu"), ("espeak", "a/b", "cuda")):
        assert takes.pace(*other) is None
    assert takes.pace("espeak", "a/b", "cpu", kind="miniature") is None


# The index


def test_the_index_is_made_anew_from_the_folders_with_owners(takes: Takes) -> None:
    annas, bens = keep(takes, "anna"), keep(takes, "ben")
    for file in takes.folder.glob("index*"):
        file.unlink()
    assert takes.list("anna") == [annas]
    assert takes.list("ben") == [bens]
    takes.rebuild()
    assert takes.list("anna") == [annas]


@pytest.mark.parametrize("damage", ["header", "middle", "text"])
def test_a_damaged_index_is_set_aside_and_made_anew(
    takes: Takes, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {keep(takes).id for _ in range(60)}
    index = takes.folder / "index.sqlite3"
    data = bytearray(index.read_bytes())
    if damage == "text":
        data = bytearray(b"This was an index. " * 1000)
    else:
        start = 0 if damage == "header" else 4096
        data[start : start + 3000] = b"\xab" * 3000
    index.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert {take.id for take in takes.list("anna", limit=100)} == kept
    assert "the index of takes is damaged" in caplog.text
    assert list(takes.folder.glob("index.damaged-*.sqlite3"))
    keep(takes)
    assert len(takes.list("anna", limit=100)) == 61


def test_an_index_of_another_version_is_made_anew(takes: Takes) -> None:
    kept = keep(takes)
    with sqlite3.connect(takes.folder / "index.sqlite3") as index:
        index.execute("DROP TABLE takes")
        index.execute("CREATE TABLE takes (something_else)")
        index.execute("PRAGMA user_version = 99")
    assert takes.list("anna") == [kept]


class IndexAgainstFolders(RuleBasedStateMachine):
    """Whatever happens to a folder of takes, each owner finds just the takes that are there, newest first."""

    ids = Bundle("ids")
    owners = st.sampled_from(["anna", "ben"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.takes = Takes(self.folder)
        self.there: dict[str, tuple[str, Take]] = {}

    def teardown(self) -> None:
        self.takes.close()
        shutil.rmtree(self.folder)

    @rule(target=ids, owner=owners, minute=st.integers(0, 59))
    def keep(self, owner: str, minute: int) -> str:
        kept = keep(self.takes, owner, a_take(made=datetime(2026, 1, 1, 0, minute, tzinfo=UTC)))
        self.there[kept.id] = (owner, kept)
        return kept.id

    @rule(id=consumes(ids))
    def delete(self, id: str) -> None:
        self.takes.delete(id, self.there.pop(id)[0])

    @rule(id=consumes(ids))
    def vanish(self, id: str) -> None:
        del self.there[id]
        shutil.rmtree(self.takes.kept / id)

    @rule()
    def rebuild(self) -> None:
        self.takes.rebuild()

    @rule()
    def lose_the_index(self) -> None:
        (self.folder / "index.sqlite3").unlink(missing_ok=True)

    @rule()
    def restart(self) -> None:
        self.takes.new_folder("left-over")
        self.takes.close()
        self.takes = Takes(self.folder)

    @invariant()
    def each_owner_finds_their_own(self) -> None:
        for owner in ("anna", "ben"):
            own = [take for whose, take in self.there.values() if whose == owner]
            own.sort(key=lambda take: (take.made, take.id), reverse=True)
            assert self.takes.list(owner) == own
        for id, (owner, take) in self.there.items():
            assert self.takes.get(id, owner) == take
        assert everything(self.folder) == set(self.there)


IndexAgainstFolders.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestIndexAgainstFolders = IndexAgainstFolders.TestCase


# Several servers


def _serve(folder: Path, owner: str, start: Any) -> None:
    start.wait()
    takes = Takes(folder)
    for _ in range(20):
        keep(takes, owner)


def test_two_servers_keep_takes_in_one_folder_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    servers = [
        context.Process(target=_serve, args=(tmp_path / "takes", owner, start)) for owner in ("anna", "ben")
    ]
    for server in servers:
        server.start()
    for server in servers:
        server.join(60)
        assert server.exitcode == 0
    takes = Takes(tmp_path / "takes")
    assert len(takes.list("anna")) == len(takes.list("ben")) == 20
    assert len(everything(takes.folder)) == 40


def test_a_server_that_died_in_a_job_leaves_nothing_after_the_next_start(tmp_path: Path) -> None:
    crash = (
        "import os, sys; from pathlib import Path; from core.takes import Takes;"
        "folder = Takes(Path(sys.argv[1])).new_folder('job'); (folder / 'audio.wav').write_bytes(b'half');"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", crash, tmp_path]).returncode == 9
    assert len(everything(tmp_path)) == 1
    running = Takes(tmp_path)
    assert everything(tmp_path) == set()
    at_work = running.new_folder("job")
    Takes(tmp_path)
    assert at_work.is_dir(), "a running server's job is left alone"


# Trouble with the disk


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SoundstageError, match=r"cannot be kept in .*/file/takes: Not a directory"):
        Takes(tmp_path / "file" / "takes")


def test_a_folder_that_vanishes_is_told_in_a_sentence(takes: Takes) -> None:
    shutil.rmtree(takes.folder)
    with pytest.raises(SoundstageError, match=r"index of takes in .* cannot be"):
        takes.list()


def test_a_record_is_parsed_once_and_again_when_it_changes(
    takes: Takes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, parsed = keep(takes), []
    assert takes.list() == [kept]
    parse = Take.model_validate_json
    monkeypatch.setattr(Take, "model_validate_json", lambda text: parsed.append(text) or parse(text))
    assert takes.list() == [kept] and not parsed
    record = kept.folder / "record.json"
    record.write_text(record.read_text().replace("Good morning.", "Good evening, all."))
    assert takes.list()[0].order.request.text == "Good evening, all."


LIMITED = """
import resource, sys
from pathlib import Path
from core.errors import DiskFull
from core.takes import Takes
from test_takes import a_take, keep, everything
takes = Takes(Path(sys.argv[1]))
first = keep(takes)
partial = takes.new_folder("job")
(partial / "audio.wav").write_bytes(b"sound")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    takes.keep(partial, a_take("x" * 3000), "anna")
except DiskFull as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert everything(takes.folder) == {first.id}, everything(takes.folder)
assert takes.list("anna") == [first]
keep(takes)
assert len(takes.list("anna")) == 2
"""


def test_a_record_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    """The system's own limit on a file's size stops the write half-way, as a full disk does."""
    told = _in_a_process(LIMITED, tmp_path, "2048")
    assert told.startswith("There is no room left on the disk for record.json")


def _in_a_process(program: str, *arguments: object) -> str:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_index_that_finds_no_room_undoes_the_take(takes: Takes, monkeypatch: pytest.MonkeyPatch) -> None:
    first = keep(takes)
    connect = sqlite3.connect

    def small(*arguments: Any, **named: Any) -> sqlite3.Connection:
        index = connect(*arguments, **named)
        index.execute("PRAGMA max_page_count = 1")  # SQLite's own way to be full
        return index

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(DiskFull, match="index of takes"):
        for _ in range(500):
            keep(takes, take=a_take(weights={"repository": "x" * 4000}))
    monkeypatch.undo()
    assert everything(takes.folder) == {take.id for take in takes.list("anna", limit=1000)}
    assert first in takes.list("anna", limit=1000)


# To take home

WICKED = '<script>alert("1")</script> & $name =1+1'


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.said = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.said += data


def test_a_zip_plays_offline_and_escapes_what_visitors_wrote(takes: Takes, tmp_path: Path) -> None:
    voice = tmp_path / "voice.wav"
    write_audio(voice, SOUND)
    mine = [keep(takes, take=a_take(WICKED, voice=voice)), keep(takes, take=a_take("שלום"))]
    export_zip(mine, tmp_path / "out.zip", {"espeak": "eSpeak <NG>"})
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        files = set(archive.namelist())
        page = _Page(archive.read("index.html").decode())
        assert json.loads(archive.read("02-espeak/record.json"))["id"] == mine[1].id
        assert archive.read("01-espeak/audio.wav") == (mine[0].folder / "audio.wav").read_bytes()
    assert set(page.sources) <= files
    assert {"01-espeak/audio.wav", "02-espeak/audio.wav", "01-espeak/reference.wav"} <= set(page.sources)
    assert "script" not in page.tags
    for said in (
        WICKED,
        "שלום",
        "eSpeak <NG>",
        "seed 7",
        "AI-generated",
        "GPL-3.0",
        "1.30 s",
        "not measured",
    ):
        assert said in page.said
    assert not any(".owner" in name for name in files)


def test_a_zip_that_finds_no_room_leaves_nothing(takes: Takes, tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from core.errors import DiskFull
from core.takes import Takes, export_zip
found = Takes(Path(sys.argv[1])).list()
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    export_zip(found, Path(sys.argv[2]) / "out.zip")
except DiskFull as error:
    print(error)
"""
    keep(takes)
    (tmp_path / "home").mkdir()
    assert "no room left on the disk for out.zip" in _in_a_process(program, takes.folder, tmp_path / "home")
    assert not list((tmp_path / "home").iterdir())


def test_the_table_holds_a_row_a_take_and_no_formula(takes: Takes) -> None:
    written = as_csv([a_take("=HYPERLINK(1)"), a_take('two\nlines, "quoted"', measurements={"extra": -1})])
    first, second = csv.DictReader(io.StringIO(written))
    assert first["text"] == "'=HYPERLINK(1)"
    assert second["text"] == 'two\nlines, "quoted"'
    assert (first["generate_seconds"], first["lufs"], second["extra"]) == ("1.3", "-21.5", "-1")
    assert (second["generate_seconds"], first["repository"], first["seed"]) == ("", "a/b", "7")
