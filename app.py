"""Soundstage: the command line, and what a Space serves."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from pydantic import ValidationError

from core.card import Ability, Strategy
from core.catalog import Catalog
from core.errors import BadInput, SoundstageError
from core.logs import new_log
from core.settings import Settings

COMMAND_LINE_VISITOR = "command-line"

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    help="Every open voice, sound, video and shape engine behind one door.",
)


class WeightsChoice(StrEnum):
    AUTO = "auto"
    HUB = "hub"
    MINIATURE = "miniature"


PlacementChoice = Literal["auto", Strategy]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Accept = Annotated[
    str,
    typer.Option(
        "--accept-licence", metavar="ENGINES", help="Accept the licence of these engines' weights, for good."
    ),
]
MemoryBudget = Annotated[
    str, typer.Option(metavar="BYTES", help="Plan as if the device's memory were this big: 2GiB.")
]
RamBudget = Annotated[
    str, typer.Option(metavar="BYTES", help="Host memory for parked and offloaded models; 60 % of it.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


def _settings(**given: Any) -> Settings:
    """Settings from the environment, overruled by the flags that were given."""
    try:
        return Settings(**{name: value for name, value in given.items() if value not in (None, "")})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name, message = str(fault["loc"][0]), fault["msg"].removeprefix("Value error, ")
        raise BadInput(
            f"The setting {name} (SOUNDSTAGE_{name.upper()}) is {fault['input']!r}: "
            f"{message[0].lower()}{message[1:]}."
        ) from None


@cli.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; the first free one from 7860 unless given.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also open a public gradio link.")] = False,
    auth: Annotated[
        str, typer.Option(metavar="USER:PASS", help="Ask visitors for this name and password.")
    ] = "",
    weights: Annotated[WeightsChoice | None, typer.Option(help="Which weights to use; auto.")] = None,
    memory_budget: MemoryBudget = "",
    ram_budget: RamBudget = "",
    tabs: Annotated[str, typer.Option(metavar="NAMES", help="Only these tabs: speech,...")] = "",
    accept_licence: Accept = "",
    debug: Debug = False,
) -> None:
    """Serve the page (the default)."""
    host = host or ("0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
    alone = host in ("127.0.0.1", "localhost", "::1") and not share
    settings = _settings(
        weights=weights,
        memory_budget=memory_budget,
        ram_budget=ram_budget,
        tabs=tabs,
        accept_licences=accept_licence,
        operator_page=True if alone and "SOUNDSTAGE_OPERATOR_PAGE" not in os.environ else None,
    )
    user, colon, password = auth.partition(":")
    if auth and not (user and colon and password):
        raise BadInput("--auth wants USER:PASS, like --auth anna:secret.")
    _refuse_address(host, port)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from core.studio import Studio
    from demos import shell

    studio = Studio(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end a service as Ctrl-C does
    try:
        _remember(studio, accept_licence)
        page = shell.build(studio)
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=(user, password) if auth else None,
            show_error=debug,
            prevent_thread_lock=True,
            **shell.launch_options(studio),
        )
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        # Gradio's own ending waits five seconds for open pages; cutting them off is an error to uvicorn.
        logging.getLogger("uvicorn.error").disabled = True
        page.server.force_exit = True
        page.close(verbose=False)
    finally:
        studio.close()


def _remember(studio: Any, accept_licence: str) -> None:
    """What the flag accepted holds from now on; what a setting accepts holds as long as it is set."""
    for engine in studio.settings.accept_licences if accept_licence else ():
        studio.licences.accept(engine)


def _refuse_address(host: str, port: int | None) -> None:
    """Find out before anything starts whether the page could be served there."""
    try:
        # 0 is any free port. As the server will, this takes a port that was in use until just now.
        family, _, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        place = f"{host}:{port}" if port else host
        raise BadInput(
            f"The page cannot be served at {place}: {error.strerror}; choose another --host or --port."
        ) from None


@cli.command()
def engines(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
    debug: Debug = False,
) -> None:
    """List the engines: what they are, what they can do, and their licences."""
    from core.catalog import as_markdown

    cards = Catalog(_settings().engine_modules).cards()
    if as_json:
        _print_json([_card_facts(card) for card in cards])
        return
    if markdown:
        print(as_markdown(cards))
        return
    _table(
        ("engine", "name", "kind", "weights licence", "can"),
        [
            (
                card.id,
                card.name,
                f"{card.modality}, {card.paradigm}" if card.paradigm else str(card.modality),
                card.weights_licence.name if card.weights_licence else "needs none",
                ", ".join(sorted(card.abilities)),
            )
            for card in cards
        ],
    )


def _card_facts(card: Any) -> dict[str, Any]:
    facts: dict[str, Any] = card.model_dump(mode="json", exclude={"options", "pick", "check"})
    facts["options"] = card.options.model_json_schema().get("properties", {})
    return facts


@cli.command()
def generate(
    engine: Annotated[str, typer.Argument(help="Which engine; `engines` lists them.")],
    text: Annotated[str, typer.Option(help="What to speak.")],
    out: Annotated[
        Path, typer.Option(help="File to write: wav, flac or mp3; FILE.json beside it is the record.")
    ],
    language: Annotated[str, typer.Option(help="Language of the text, ISO 639.")] = "en",
    voice: Annotated[
        Path | None,
        typer.Option(help="Reference recording to clone; giving one says that you may use this voice."),
    ] = None,
    voice_text: Annotated[str, typer.Option(help="What is said in the reference.")] = "",
    option: Annotated[
        list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="An engine's option.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; drawn at random unless given.")] = None,
    weights: Annotated[str, typer.Option(help="auto, hub, miniature, or a checkpoint folder.")] = "",
    placement: Annotated[
        PlacementChoice, typer.Option(help="How to fit it into memory; auto takes the fastest that fits.")
    ] = "auto",
    memory_budget: MemoryBudget = "",
    ram_budget: RamBudget = "",
    accept_licence: Accept = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make one thing, and its record beside it."""
    from core.media import WRITTEN_SUFFIXES
    from core.requests import SEED_MAX, Order, SpeechRequest
    from core.studio import Studio

    settings = _settings(
        weights=weights,
        memory_budget=memory_budget,
        ram_budget=ram_budget,
        accept_licences=accept_licence,
        inline=True,
    )
    if out.suffix.lower() not in WRITTEN_SUFFIXES:
        raise BadInput(f"--out is {out.name!r}; its name should end in {', '.join(WRITTEN_SUFFIXES)}.")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise BadInput(f"There is no folder {str(folder)!r} to write {out.name!r} into.")
    if out.is_dir() or not os.access(folder, os.W_OK):
        raise BadInput(f"--out is {str(out)!r}, where no file can be written; name another place.")
    if seed is not None and not 0 <= seed <= SEED_MAX:
        raise BadInput(f"--seed is {seed}; it may be 0 to {SEED_MAX}.")
    order = Order(
        engine=engine,
        request=SpeechRequest(
            text=text, language=language, voice=voice, voice_text=voice_text, consent=voice is not None
        ),
        options=dict(map(_key_value, option or [])),
        seed=secrets.randbelow(SEED_MAX) if seed is None else seed,
        weights=settings.weights,
        forced=None if placement == "auto" else placement,
    )
    with _quiet_libraries(new_log(settings.home, "generate")) as terminal:
        studio = Studio(settings)
        try:
            _remember(studio, accept_licence)
            if voice:
                _must_clone(studio.catalog, engine)
            [job] = studio.submit([order], COMMAND_LINE_VISITOR)
            studio.wait(job, lambda job: _show_progress(job, terminal))
            _clear_line(terminal)
            if job.take is None:
                if debug and job.detail:
                    print(job.detail, file=terminal)
                bad_input = getattr(job.event, "bad_input", False)
                raise BadInput(job.reason) if bad_input else SoundstageError(job.reason)
            record = _export(job.take, out)
        finally:
            studio.close()
    if as_json:
        _print_json(record)
    else:
        cost = job.take.measurements
        print(
            f"{out}: {cost['audio_seconds']:.2f} s of audio in {cost['generate_seconds']:.2f} s, "
            f"seed {order.seed}, weights: {job.take.weights['kind']}"
        )


def _must_clone(catalog: Catalog, engine: str) -> None:
    if Ability.CLONE not in catalog.card(engine).abilities:
        able = ", ".join(card.id for card in catalog.cards() if Ability.CLONE in card.abilities)
        raise BadInput(f"{catalog.card(engine).name} clones no voice; leave --voice out, or use: {able}.")


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise BadInput(f"-o wants KEY=VALUE, not {text!r}.")
    return key.strip(), value


def _export(take: Any, out: Path) -> dict[str, Any]:
    """Write a take's medium and its record to where the command line asked."""
    from core.media import convert_audio, write_whole

    medium = take.folder / take.media[0]["file"]
    if out.suffix.lower() == medium.suffix:
        write_whole(out, medium.read_bytes())
    else:
        convert_audio(medium, out)
    record: dict[str, Any] = json.loads((take.folder / "record.json").read_bytes())
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_whole(out.with_name(out.name + ".json"), text.encode())
    return record


@cli.command()
def takes(
    as_json: Json = False,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 50,
    debug: Debug = False,
) -> None:
    """List finished work of everyone on this installation."""
    from core.takes import Takes

    with closing(Takes(_settings().takes_folder)) as kept:
        found = kept.list(limit=limit)
    if as_json:
        _print_json([take.model_dump(mode="json") | {"folder": str(take.folder)} for take in found])
        return
    _table(
        ("made", "engine", "seconds", "weights", "seed", "text", "folder"),
        [
            (
                f"{take.made:%Y-%m-%d %H:%M}",
                take.engine,
                f"{take.measurements.get('audio_seconds') or 0:.1f}",
                take.weights["kind"],
                str(take.order.seed),
                take.order.request.text[:40].replace("\n", " "),
                str(take.folder),
            )
            for take in found
        ],
    )


@cli.command()
def doctor(
    memory: Annotated[
        bool, typer.Option("--memory", help="Run every engine once, and show what it held and gave back.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check versions, device, disk, hub and licences, and say how to mend what is wrong."""
    if memory:
        _memory_round(as_json)
        return
    from core.doctor import examine

    findings = list(examine(_settings()))
    if as_json:
        _print_json([vars(finding) for finding in findings])
    else:
        marks = {True: "ok  ", None: "note", False: "FAIL"}
        for finding in findings:
            print(f"{marks[finding.ok]}  {finding.name}: {finding.says}")
            if finding.ok is not True and finding.mend:
                print(f"      {finding.mend}")
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


def _memory_round(as_json: bool) -> None:
    from core.memory_round import visit_all
    from core.studio import Studio

    voices = Path(__file__).with_name("assets") / "voices"
    example = json.loads((voices / "voices.json").read_text("utf-8"))[0]
    visits = []
    with closing(Studio(_settings())) as studio:
        for visit in visit_all(studio, voices / example["file"], example["text"]):
            print(f"{visit.engine}: {visit.fault or 'done'}", file=sys.stderr)
            visits.append(visit)
        device = studio.status().device
    if as_json:
        _print_json([vars(visit) for visit in visits])
    else:
        _show_visits(visits, device)
    if not all(visit.clean for visit in visits):
        raise typer.Exit(1)


def _show_visits(visits: list[Any], device: str) -> None:
    columns = ["planned", "ram_before", "ram_peak", "ram_after_release"]
    if device != "CPU":  # whose memory is the RAM
        columns[1:1] = ["before", "peak", "after_release"]
    rows = []
    for visit in visits:
        sizes = (getattr(visit, column) for column in columns)
        told = ("–" if size is None else f"{size / 2**20:,.1f}" for size in sizes)
        alive = "–" if visit.alive is None else str(visit.alive)
        rows.append((visit.engine, visit.weights, visit.placement, *told, alive))
    print(f"Memory in MiB, on {device}; alive counts the parameters left after the release:")
    names = (column.replace("_", " ").replace("ram", "RAM") for column in columns)
    _table(("engine", "weights", "placement", *names, "alive"), rows)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_progress(job: Any, terminal: TextIO) -> None:
    if terminal.isatty():
        share = "" if job.fraction is None else f" {job.fraction:4.0%}"
        left = "" if job.seconds_left is None else f", {job.seconds_left:.0f} s left"
        print(f"\r\033[K{job.state}{share} {job.note}{left}", end="", file=terminal, flush=True)


def _clear_line(terminal: TextIO) -> None:
    if terminal.isatty():
        print("\r\033[K", end="", file=terminal, flush=True)


@contextmanager
def _quiet_libraries(log: Path) -> Iterator[TextIO]:
    """Send what libraries print, from Python and from C, to a file; yields the real standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    kept = [os.dup(1), os.dup(2)]
    try:
        with os.fdopen(os.dup(kept[1]), "w") as terminal:
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for place, saved in enumerate(kept, start=1):
            os.dup2(saved, place)
            os.close(saved)
        os.close(descriptor)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failure, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
        arguments = ["serve", *arguments]
    debug = "--debug" in arguments
    try:
        result = typer.main.get_command(cli).main(arguments, prog_name="app.py", standalone_mode=False)
        return int(result or 0)
    except BadInput as error:
        status, sentence = 2, str(error)
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except typer.TyperException as error:
        # Its usage errors say more in a method of their own, which the public base class lacks.
        status, sentence = 2, getattr(error, "format_message", error.__str__)()
    except SoundstageError as error:
        status, sentence = 1, str(error)
    except Exception as error:
        if debug:
            raise
        status, sentence = 1, f"{type(error).__name__}: {error} (--debug shows more)"
    print(" ".join(sentence.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
