"""Weights: what is planned from the cache, and every way to get them against a hub on the loopback."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from core import weights
from core.card import Card, Checkpoint, Licence, Modality
from core.errors import BadInput, LicenceNeeded, WeightsError
from core.weights import transfer
from core.weights.folders import damage, human
from tests.hub_server import LoopbackHub, loopback_hub, point_at

SIZE = 3_000_000
REPOSITORY = "lab/tiny-voice"
CHECKPOINT = Checkpoint(repository=REPOSITORY, required=("config.json", "model.safetensors"))
PACKAGE = "engine_of_the_weights_test"


class Cancelled(Exception):
    pass


class Log:
    """A report that remembers; `at` is called with each one."""

    def __init__(self, at: Callable[[str, int, int], None] = lambda *_: None) -> None:
        self.lines: list[tuple[str, int, int]] = []
        self.at = at

    def __call__(self, note: str, done: int, total: int) -> None:
        self.lines.append((note, done, total))
        self.at(note, done, total)


def card(**facts: Any) -> Card:
    return Card(
        **{
            "id": "tiny",
            "name": "Tiny",
            "modality": Modality.SPEECH,
            "summary": "For the tests.",
            "code_licence": Licence(name="MIT"),
            "weights_licence": Licence(name="MIT"),
            **facts,
        }
    )


def write_checkpoint(folder: Path, size: int = SIZE, seed: int = 1) -> Path:
    """A repository with a safetensors file of `size` bytes of numbers that do not repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"hidden": 4}')
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    numbers = hashlib.shake_256(bytes([seed])).digest(size)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + numbers)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A loopback hub with one repository, and huggingface_hub pointed at it with an empty cache."""
    with loopback_hub() as served:
        served.repositories[REPOSITORY] = write_checkpoint(tmp_path / "served")
        point_at(served, tmp_path / "home", monkeypatch)
        monkeypatch.setattr(transfer, "PAUSE", 0.01)
        yield served


@pytest.fixture(autouse=True)
def engine_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine's package whose miniature counts how often it was built."""
    package = tmp_path / "packages" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "miniature.py").write_text(
        textwrap.dedent(
            """
            from pathlib import Path

            built = []

            def build(folder, checkpoint):
                built.append(folder)
                assert list(folder.iterdir()) == []
                (folder / "config.json").write_text("{}")
                (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
            """
        )
    )
    monkeypatch.syspath_prepend(package.parent)
    for name in [m for m in sys.modules if m.startswith(PACKAGE)]:
        del sys.modules[name]
    return package


def builds() -> int:
    return len(sys.modules[f"{PACKAGE}.miniature"].built)


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., weights.Resolved]:
    def call(
        choice: str = "auto", online: bool = True, checkpoint: Checkpoint = CHECKPOINT, report: Any = None
    ) -> weights.Resolved:
        return weights.resolve(
            card(),
            checkpoint,
            choice,
            online=online,
            cache=tmp_path / "cache",
            package=PACKAGE,
            report=report or Log(),
        )

    return call


# From the hub


def test_first_download_shows_its_size_and_progress_and_records_the_commit(hub, resolve):
    half = hub.hold["model.safetensors"] = threading.Event()
    log = Log(lambda note, done, total: half.set() if 0 < done < total else None)

    got = resolve(report=log)

    size = (hub.repositories[REPOSITORY] / "model.safetensors").stat().st_size
    assert got.kind == "hub" and got.repository == REPOSITORY and got.commit == hub.commit(REPOSITORY)
    served = hub.repositories[REPOSITORY]
    for name in ("config.json", "model.safetensors"):
        assert (got.folder / name).read_bytes() == (served / name).read_bytes()
    assert any(note == f"Downloading {REPOSITORY}, 3 MB" and total == size for note, _, total in log.lines)
    done = [done for note, done, _ in log.lines if note.startswith("Downloading")]
    assert done == sorted(done) and any(0 < d < size for d in done) and done[-1] == size
    assert got.bytes == sum(f.stat().st_size for f in served.iterdir())


def test_second_start_in_a_fresh_process_needs_no_server(tmp_path):
    script = textwrap.dedent(
        """
        import json, sys
        from pathlib import Path
        from core import weights
        from core.card import Card, Checkpoint, Licence
        card = Card(id="tiny", name="Tiny", modality="speech", summary="", code_licence=Licence(name="MIT"),
                    weights_licence=Licence(name="MIT"))
        point = Checkpoint(repository="lab/tiny-voice", required=("config.json", "model.safetensors"))
        hub = weights.Hub()
        online = hub.online()
        kind = weights.plan(card, point, "auto", online).kind
        got = weights.resolve(card, point, "auto", online=online, cache=Path(sys.argv[1]),
                              package="none.such", report=lambda *_: None)
        print(json.dumps([online, kind, got.kind, got.commit, sorted(p.name for p in got.folder.iterdir()),
                          "torch" in sys.modules]))
        """
    )

    def start(address: str) -> list[Any]:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        environment.pop("HF_HUB_OFFLINE", None)
        ran = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "cache")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    with loopback_hub() as served:
        served.repositories[REPOSITORY] = write_checkpoint(tmp_path / "served", 1000)
        first, commit, address = start(served.address), served.commit(REPOSITORY), served.address
    names = ["config.json", "model.safetensors"]
    assert first == [True, "download", "hub", commit, names, False]
    assert start(address) == [False, "hub", "hub", commit, names, False]


def test_cached_weights_are_used_without_asking_the_hub_again(hub, resolve):
    resolve()
    hub.asked.clear()
    assert resolve().kind == "hub"
    assert hub.asked == []


def test_only_the_wanted_files_are_fetched(hub, resolve):
    (hub.repositories[REPOSITORY] / "flax_model.bin").write_bytes(b"x" * 1000)
    wanted = CHECKPOINT.model_copy(update={"files": ("*.json", "*.safetensors")})
    got = resolve(checkpoint=wanted)
    assert sorted(f.name for f in got.folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_cut_connection_is_taken_up_within_the_same_download(hub, resolve):
    hub.cut["model.safetensors"] = [SIZE // 2]
    assert resolve().kind == "hub"
    first, second = hub.gets("/model.safetensors")
    assert first.sent == SIZE // 2
    assert second.range and second.sent <= SIZE // 2 + 1000


def test_a_download_that_broke_is_kept_and_the_next_try_goes_on_from_there(hub, resolve):
    hub.cut["model.safetensors"] = [SIZE // 2] + [0] * transfer.TRIES
    with pytest.raises(WeightsError, match="was lost after 2 MB of 3 MB; that is kept"):
        resolve()
    hub.asked.clear()
    hub.cut.clear()

    got = resolve()

    (asked,) = hub.gets("/model.safetensors")
    assert asked.range == f"bytes={SIZE // 2}-"
    served = hub.repositories[REPOSITORY] / "model.safetensors"
    assert asked.sent == served.stat().st_size - SIZE // 2
    assert (got.folder / "model.safetensors").read_bytes() == served.read_bytes()


def test_a_stop_during_the_download_is_obeyed_and_what_arrived_is_kept(hub, resolve):
    never = hub.hold["model.safetensors"] = threading.Event()

    def stop(note: str, done: int, total: int) -> None:
        if done:
            raise Cancelled

    with pytest.raises(Cancelled):
        resolve(report=Log(stop))
    assert not never.is_set()  # the server was still holding back the second half
    never.set()
    del hub.hold["model.safetensors"]
    hub.asked.clear()

    assert resolve().kind == "hub"
    (asked,) = hub.gets("/model.safetensors")
    assert asked.range


def test_a_file_that_arrives_changed_is_thrown_away(hub, resolve, tmp_path):
    hub.cut["model.safetensors"] = [SIZE // 2] + [0] * transfer.TRIES
    with pytest.raises(WeightsError):
        resolve()
    (partial,) = (tmp_path / "home").rglob("*.incomplete")
    partial.write_bytes(b"\0" * partial.stat().st_size)
    hub.cut.clear()
    with pytest.raises(WeightsError, match=r"model\.safetensors arrived damaged and was thrown away"):
        resolve()
    assert resolve().kind == "hub"


def test_two_processes_that_want_the_same_file_fetch_it_once(hub, resolve):
    gate = hub.hold["model.safetensors"] = threading.Event()
    results: list[weights.Resolved] = []
    first = threading.Thread(target=lambda: results.append(resolve()))
    first.start()

    def second_started(note: str, done: int, total: int) -> None:
        if note.startswith("Downloading"):
            gate.set()

    results.append(resolve(report=Log(second_started)))
    first.join(30)
    assert [r.kind for r in results] == ["hub", "hub"]
    assert len(hub.gets("/model.safetensors")) == 1


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        (
            CHECKPOINT.model_copy(update={"required": ("config.json", "vocab.json")}),
            "The repository lab/tiny-voice has no vocab.json.",
        ),
        (Checkpoint(repository="lab/nowhere"), "The hub has no repository lab/nowhere that you may read"),
        (
            CHECKPOINT.model_copy(update={"revision": "v9"}),
            "The repository lab/tiny-voice has no such revision.",
        ),
    ],
    ids=["file", "repository", "revision"],
)
def test_what_the_hub_does_not_have_is_named(hub, resolve, checkpoint, sentence):
    with pytest.raises(WeightsError) as failed:
        resolve(checkpoint=checkpoint)
    assert sentence in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_gated_repository_tells_how_to_get_in(hub, resolve):
    hub.gated.add(REPOSITORY)
    with pytest.raises(
        WeightsError, match=r"is gated: accept its terms at .*/lab/tiny-voice, then set HF_TOKEN"
    ):
        resolve()


def test_a_full_disk_is_told_before_the_download(hub, resolve, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("core.weights.hub.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(WeightsError, match="needs 3 MB of disk and 1 kB are free"):
        resolve()
    assert hub.gets("/model.safetensors") == []


def test_a_hub_that_went_away_falls_back_to_the_miniature_and_says_so(tmp_path, monkeypatch, hub, resolve):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    log = Log()
    got = resolve(online=True, report=log)
    assert got.kind == "miniature"
    assert "The hub does not answer" in got.note and "miniature is used instead" in got.note
    assert got.note in [note for note, _, _ in log.lines]
    with pytest.raises(WeightsError, match="The hub does not answer"):
        resolve("hub", online=True)


def test_size_is_known_before_the_download(hub):
    asker = weights.Hub()
    assert asker.online()
    assert asker.size(CHECKPOINT) is None  # asked in the background
    wait_for(lambda: asker.size(CHECKPOINT) is not None)
    size = sum(f.stat().st_size for f in hub.repositories[REPOSITORY].iterdir())
    assert asker.size(CHECKPOINT) == size
    assert (
        "3 MB will be downloaded first" in weights.plan(card(), CHECKPOINT, "auto", True, size=size).sentence
    )
    assert hub.gets("/model.safetensors") == []


def wait_for(condition: Callable[[], bool], limit: float = 20) -> None:
    end = time.monotonic() + limit
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        pause.wait(0.01)


# Several repositories


@pytest.fixture
def assembly(hub, tmp_path) -> Checkpoint:
    hub.repositories["lab/vocoder-24khz"] = write_checkpoint(tmp_path / "vocoder", 1000, seed=2)
    hub.repositories["lab/listener"] = write_checkpoint(tmp_path / "listener", 1000, seed=3)
    return CHECKPOINT.model_copy(
        update={
            "also": (
                Checkpoint(repository="lab/vocoder-24khz", required=("model.safetensors",)),
                Checkpoint(repository="lab/listener", required=("config.json",), optional=True),
            )
        }
    )


def test_further_repositories_are_put_into_sub_folders(hub, resolve, assembly):
    got = resolve(checkpoint=assembly)
    for repository, place in {
        REPOSITORY: "",
        "lab/vocoder-24khz": "vocoder-24khz",
        "lab/listener": "listener",
    }.items():
        served = hub.repositories[repository] / "model.safetensors"
        assert (got.folder / place / "model.safetensors").read_bytes() == served.read_bytes()
    assert got.commit == hub.commit(REPOSITORY)
    assert got.also == {name: hub.commit(name) for name in ("lab/vocoder-24khz", "lab/listener")}
    assert resolve(checkpoint=assembly, online=False) == got


def test_an_optional_repository_may_be_absent_and_another_may_not(hub, resolve, assembly):
    del hub.repositories["lab/listener"]
    assert not (resolve(checkpoint=assembly).folder / "listener").exists()
    assert weights.plan(card(), assembly, "auto", online=False).kind == "hub"
    vital = assembly.model_copy(update={"also": (Checkpoint(repository="lab/gone"),)})
    with pytest.raises(WeightsError, match="no repository lab/gone"):
        resolve(checkpoint=vital)


def test_an_assembled_folder_is_made_again_when_its_links_are_broken(hub, resolve, assembly):
    got = resolve(checkpoint=assembly)
    link = got.folder / "vocoder-24khz" / "config.json"
    assert link.is_symlink()
    link.unlink()
    link.symlink_to("/nowhere/at/all")
    assert resolve(checkpoint=assembly).folder == got.folder
    assert link.read_text() == '{"hidden": 4}'


# An archive outside the hub


def zipped(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return memory.getvalue()


@pytest.fixture
def archive(hub) -> Checkpoint:
    numbers = hashlib.shake_256(b"archive").digest(1_000_000)
    hub.files["voice.zip"] = zipped(
        {"voice-v1/config.json": b"{}", "voice-v1/model_file.pth": b"\x80" + numbers}
    )
    return Checkpoint(archive=f"{hub.address}/files/voice.zip", required=("config.json", "model_file.pth"))


def test_an_archive_is_fetched_unpacked_and_known_by_its_hash(hub, resolve, archive):
    log = Log()
    got = resolve(checkpoint=archive, report=log)
    assert sorted(f.name for f in got.folder.iterdir()) == ["config.json", "model_file.pth"]
    assert got.commit == hashlib.sha256(hub.files["voice.zip"]).hexdigest()
    assert (len(hub.files["voice.zip"]),) * 2 in [(done, total) for _, done, total in log.lines]
    hub.asked.clear()
    assert resolve(checkpoint=archive, online=False) == got
    assert hub.asked == []


def test_an_archive_goes_on_where_it_broke(hub, resolve, archive):
    hub.cut["voice.zip"] = [400_000] + [0] * transfer.TRIES
    with pytest.raises(WeightsError, match="was lost after 400 kB of 1 MB"):
        resolve(checkpoint=archive)
    hub.asked.clear()
    hub.cut.clear()
    assert resolve(checkpoint=archive).kind == "hub"
    (asked,) = hub.gets("voice.zip")
    assert asked.range == "bytes=400000-"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (zipped({"../../escaped.txt": b"x"}), "which leads out of its folder"),
        (zipped({"/etc/escaped.txt": b"x"}), "which leads out of its folder"),
        (b"not a zip at all", "is damaged"),
        (zipped({"config.json": b"{}"}), "has no model_file.pth"),
    ],
    ids=["parent", "absolute", "no zip", "incomplete"],
)
def test_a_bad_archive_is_refused(hub, resolve, archive, tmp_path, content, sentence):
    hub.files["voice.zip"] = content
    with pytest.raises(WeightsError, match=sentence):
        resolve(checkpoint=archive)
    assert not list(tmp_path.rglob("escaped.txt"))
    assert weights.plan(card(), archive, "auto", online=False).kind == "miniature"


def test_an_archive_bomb_is_refused(hub, resolve, archive):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("zeros.bin", "w") as out:
        for _ in range(300):
            out.write(bytes(1 << 20))
    hub.files["voice.zip"] = memory.getvalue()
    with pytest.raises(WeightsError, match="would unpack to 315 MB: too much"):
        resolve(checkpoint=archive)


def test_a_missing_archive_is_named(hub, resolve, archive):
    del hub.files["voice.zip"]
    with pytest.raises(WeightsError, match=r"voice\.zip cannot be had: its server answered 404"):
        resolve(checkpoint=archive)


# Miniatures


def test_offline_falls_back_to_a_miniature_that_is_built_once(hub, resolve, tmp_path):
    assert "offline, so the sound is noise" in weights.plan(card(), CHECKPOINT, "auto", False).sentence
    got = resolve(online=False)
    assert got.kind == "miniature" and got.folder.is_relative_to(tmp_path / "cache" / "miniatures" / "tiny")
    assert resolve(online=False) == got == resolve("miniature", online=True)
    assert builds() == 1


@pytest.mark.parametrize("harm", ["truncated", "removed", "added", "overwritten"])
def test_a_damaged_miniature_is_built_again(hub, resolve, harm):
    folder = resolve("miniature").folder
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    if harm == "truncated":
        (folder / "model.safetensors").write_bytes(b"\2")
    elif harm == "overwritten":
        (folder / "model.safetensors").write_bytes(bytes(len(before["model.safetensors"])))
    elif harm == "removed":
        (folder / "config.json").unlink()
    else:
        (folder / "extra.bin").write_bytes(b"x")
    assert {f.name: f.read_bytes() for f in resolve("miniature").folder.iterdir()} == before
    assert builds() == 2


def test_a_changed_builder_or_checkpoint_makes_another_miniature(hub, resolve, engine_package):
    first = resolve("miniature").folder
    other = resolve("miniature", checkpoint=CHECKPOINT.model_copy(update={"revision": "v2"})).folder
    with (engine_package / "miniature.py").open("a") as source:
        source.write("\n# another line\n")
    assert len({first, other, resolve("miniature").folder}) == 3


def test_a_build_that_fails_leaves_nothing_behind(hub, resolve, engine_package, tmp_path):
    with (engine_package / "miniature.py").open("a") as source:
        source.write(
            "\ndef build(folder, checkpoint):\n    (folder / 'half').touch()\n    raise RuntimeError('no')\n"
        )
    with pytest.raises(WeightsError, match="miniature of Tiny could not be built: no"):
        resolve("miniature")
    assert not list((tmp_path / "cache").rglob("half"))


def test_threads_that_ask_at_once_get_one_whole_miniature(hub, resolve):
    results: list[weights.Resolved] = []
    threads = [threading.Thread(target=lambda: results.append(resolve("miniature"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 6 and len({r.folder for r in results}) == 1
    assert builds() == 1


# A folder given, and damage


def test_a_given_folder_is_used_as_it_is(resolve, tmp_path):
    folder = write_checkpoint(tmp_path / "mine", 100)
    got = resolve(str(folder), online=False)
    assert (got.kind, got.folder, got.repository) == ("folder", folder, "")
    assert weights.plan(card(), CHECKPOINT, str(folder), False).real


def test_a_folder_that_is_not_this_checkpoint_names_what_it_lacks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"is not a checkpoint of Tiny: it lacks model\.safetensors"):
        weights.plan(card(), CHECKPOINT, str(tmp_path), True)
    vocoder = Checkpoint(repository="lab/vocoder", required=("vocoder.bin",))
    with pytest.raises(BadInput, match=r"it lacks model\.safetensors, vocoder/vocoder\.bin"):
        weights.plan(card(), CHECKPOINT.model_copy(update={"also": (vocoder,)}), str(tmp_path), True)
    with pytest.raises(BadInput, match="There is no weights folder '/no/such'"):
        weights.plan(card(), CHECKPOINT, "/no/such", True)


def test_a_given_folder_may_lack_an_optional_part_but_not_half_of_it(tmp_path):
    write_checkpoint(tmp_path, 100)
    listener = Checkpoint(repository="lab/listener", required=("vocab.json",), optional=True)
    both = CHECKPOINT.model_copy(update={"also": (listener,)})
    assert weights.plan(card(), both, str(tmp_path), False).kind == "folder"
    (tmp_path / "listener").mkdir()
    with pytest.raises(BadInput, match=r"it lacks listener/vocab\.json"):
        weights.plan(card(), both, str(tmp_path), False)


def truncate(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda f: truncate(f / "model.safetensors", 500), "model.safetensors is truncated: 500 of "),
        (
            lambda f: truncate(f / "model.safetensors", 20),
            "model.safetensors is truncated or not a safetensors",
        ),
        (lambda f: truncate(f / "model.safetensors", 0), "model.safetensors is empty (0 bytes)"),
        (
            lambda f: (f / "model.safetensors").write_text("<html>" * 99),
            "model.safetensors is truncated or not",
        ),
        (lambda f: truncate(f / "config.json", 5), "config.json is not readable JSON"),
        (lambda f: (f / "m.pth").write_bytes(zipped({"a": b"b" * 99})[:-30]), "m.pth is truncated"),
        (lambda f: (f / "m.pth").write_text("<html>"), "m.pth is not a PyTorch file"),
        (
            lambda f: (f / "m.pth").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "m.pth is only a pointer of Git LFS",
        ),
    ],
    ids=["cut", "header", "empty", "page", "json", "zip", "foreign", "pointer"],
)
def test_a_damaged_folder_is_told_before_it_is_loaded(resolve, tmp_path, harm, sentence):
    folder = write_checkpoint(tmp_path / "mine", 1000)
    assert damage(folder) == ""
    harm(folder)
    with pytest.raises(WeightsError) as failed:
        resolve(str(folder), online=False)
    assert f"The weights cannot be used: {sentence}" in str(failed.value)


def test_files_as_the_libraries_write_them_pass(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(3, 2), "b": torch.ones(5, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.save(tensors, tmp_path / "model.pth")
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text('{"rate": 22050 // Hz\n}\n')  # as Coqui's older releases have it
    assert damage(tmp_path) == ""


def test_a_damaged_file_in_the_cache_tells_what_to_delete(hub, resolve):
    got = resolve()
    truncate((got.folder / "model.safetensors").resolve(), 500)
    with pytest.raises(
        WeightsError, match=r"is truncated: 500 of .* Delete .*, and it will be downloaded again"
    ):
        resolve()


# Plans, licences, the probe


def test_an_engine_without_weights_needs_none(resolve):
    bare = card(weights_licence=None)
    assert weights.plan(bare, Checkpoint(), "hub", False).kind == "none"


def test_asking_for_the_hub_while_offline_is_refused(hub):
    with pytest.raises(WeightsError, match=r"Tiny needs lab/tiny-voice, which is not in the cache"):
        weights.plan(card(), CHECKPOINT, "hub", online=False)


def test_planning_costs_no_request(hub):
    for choice in ("auto", "hub", "miniature"):
        weights.plan(card(), CHECKPOINT, choice, online=True)
    assert hub.asked == []


def test_the_licence_gate_opens_once_accepted_and_for_miniatures(tmp_path):
    gated = card(weights_licence=Licence(name="CPML", commercial=False, must_accept=True))
    real = weights.Plan("download", "")
    with pytest.raises(LicenceNeeded, match="Tiny's weights are under the CPML") as refused:
        weights.may_use(gated, real, frozenset({"other"}))
    assert refused.value.engine == "tiny"
    weights.may_use(gated, real, frozenset({"tiny"}))
    weights.may_use(gated, weights.Plan("miniature", ""), frozenset())
    weights.may_use(card(), real, frozenset())
    for kind in ("hub", "folder"):
        with pytest.raises(LicenceNeeded):
            weights.may_use(gated, weights.Plan(kind, ""), frozenset())


def test_an_accepted_licence_survives_a_restart(tmp_path):
    home = tmp_path / "home"
    weights.Licences(home, always=["bark"]).accept("xtts")
    assert weights.Licences(home).accepted() == {"xtts"}
    weights.Licences(home).accept("f5")
    assert weights.Licences(home, always=["bark"]).accepted() == {"bark", "f5", "xtts"}
    assert [f.name for f in home.iterdir()] == ["licences.json"]
    (home / "licences.json").write_text('{"accep')
    assert weights.Licences(home).accepted() == frozenset()


def test_the_probe_hears_the_hub_and_its_absence(hub, monkeypatch):
    assert weights.Hub().online()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not weights.Hub().online()


def test_a_hub_that_hangs_is_a_no_after_the_wait(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hang = threading.Event()
    monkeypatch.setattr("core.weights.hub._answers", lambda: hang.wait(30))
    hub = weights.Hub()
    assert hub.online(wait=0.05) is False
    hang.set()
    wait_for(lambda: hub.online(0))


def test_who_asks_while_the_hub_hangs_waits_for_what_is_left_of_the_first_wait(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    now, hang, waits = [1000.0], threading.Event(), []
    monkeypatch.setattr("core.weights.hub.time.monotonic", lambda: now[0])
    monkeypatch.setattr("core.weights.hub._answers", lambda: hang.wait(30))
    hub = weights.Hub()
    monkeypatch.setattr(hub._answered, "wait", waits.append)
    hub.online()
    now[0] += 1.5
    hub.online()
    now[0] += 1.5
    hub.online()
    hang.set()
    assert waits == [2.0, 0.5, 0.0]


def test_offline_by_setting_asks_nobody(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not weights.Hub().online()
    assert hub.asked == []


def test_the_answer_is_kept_for_five_minutes_and_then_asked_again_in_the_background(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    now, answers = [1000.0], []
    monkeypatch.setattr("core.weights.hub.time.monotonic", lambda: now[0])

    def answer() -> bool:
        answers.append(now[0])
        return len(answers) > 1

    monkeypatch.setattr("core.weights.hub._answers", answer)
    hub = weights.Hub()
    assert not hub.online(20)
    now[0] += 299
    assert not hub.online(20) and len(answers) == 1
    now[0] += 2
    hub.online(20)
    for thread in threading.enumerate():
        if thread.name == "hub-probe":
            thread.join(20)
    assert hub.online() and answers == [1000.0, 1301.0]


def test_sizes_read_well():
    assert [human(n) for n in (0, 1, 1500, 31_900_000, 1_870_000_000)] == [
        "0 bytes",
        "1 kB",
        "2 kB",
        "32 MB",
        "1.9 GB",
    ]
