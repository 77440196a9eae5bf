"""Takes to take home: a table for a spreadsheet, and a zip with a page that plays them offline."""

from __future__ import annotations

import csv
import io
import json
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from core.media import room_for
from core.takes.store import Take

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_csv(takes: Sequence[Take]) -> str:
    """The takes as a table, one row each, for a spreadsheet; measurements in seconds and bytes.

    Text that a spreadsheet would run as a formula gets an apostrophe in front, by which it stays text.
    """
    rows = [_row(take) for take in takes]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    return table.getvalue()


def export_zip(takes: Sequence[Take], file: Path, names: Mapping[str, str] | None = None) -> None:
    """Write all files of the takes, reference recordings included, and an index.html over them into a zip.

    Args:
        names: engine id -> the name to show.

    Raises:
        DiskFull: there is no room; no half file is left.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    with room_for(file.name):
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                archive.writestr("index.html", _page(takes, names or {}))
                archive.writestr("comparison.csv", as_csv(takes))
                for number, take in enumerate(takes, 1):
                    for part in sorted(take.folder.iterdir()):
                        if not part.name.startswith("."):
                            archive.write(part, f"{_place(number, take)}/{part.name}")
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _row(take: Take) -> dict[str, Any]:
    order, sound = take.order, take.media[0] if take.media else {}
    return {
        "engine": take.engine,
        "text": order.request.text,
        "language": order.request.language,
        "seed": order.seed,
        "options": json.dumps(order.options, sort_keys=True, default=str),
        "weights": take.weights.get("kind", ""),
        "repository": take.weights.get("repository", ""),
        "commit": take.weights.get("commit", ""),
        **{key: take.placement.get(key, "") for key in ("device", "dtype", "strategy")},
        "rate": sound.get("rate"),
        "lufs": sound.get("lufs"),
        **take.measurements,
        "code_licence": take.licences.get("code", ""),
        "weights_licence": take.licences.get("weights", ""),
        "commercial_use": take.licences.get("commercial", ""),
        "made": take.made.isoformat(timespec="seconds"),
        "soundstage": take.soundstage,
        "take": take.id,
    }


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _place(number: int, take: Take) -> str:
    return f"{number:02d}-{take.engine}"


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Soundstage: $count</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#d5d9e2, #353b4a); --soft: light-dark(#5b6475, #a3abbd) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
article { border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.25rem; margin: 1.25rem 0 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 0 }
p { margin: .5rem 0 } .soft { color: var(--soft); font-size: .9rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
audio { width: 100%; margin: .5rem 0 } img { width: 100%; height: 6rem; border-radius: 6px }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .15rem 1.25rem .15rem 0; border-top: 1px solid var(--line) }
th { font-weight: 400; color: var(--soft); text-align: left }
</style>
</head>
<body>
<h1>Soundstage: $count</h1>
<p class="soft">AI-generated sound. Unpack the whole zip, and this page plays it without a network, all takes
equally loud. Each folder has the sound as it was made, and the record from which it can be made again.</p>
$articles
</body>
</html>
""")

_ARTICLE = Template("""<article>
<h2>$name</h2>
<p class="text" dir="auto">$text</p>
$players
<p class="soft">$facts</p>
<p class="soft">AI-generated. $licence</p>
<table>
$rows
</table>
</article>""")


def _page(takes: Sequence[Take], names: Mapping[str, str]) -> str:
    count = f"{len(takes)} take" + ("" if len(takes) == 1 else "s")
    articles = [_article(_place(n, take), take, names) for n, take in enumerate(takes, 1)]
    return _PAGE.substitute(count=count, articles="\n".join(articles))


def _article(place: str, take: Take, names: Mapping[str, str]) -> str:
    players = [_player(place, medium) for medium in take.media]
    if voice := take.order.request.voice:
        players.append(f'<p class="soft">Voice it was asked to speak in</p>{_audio(place, str(voice))}')
    weights = " ".join(str(take.weights.get(key) or "") for key in ("kind", "repository", "commit")).strip()
    facts = [
        f"seed {take.order.seed}",
        f"weights: {weights or 'none needed'}",
        f"made {take.made:%Y-%m-%d %H:%M} UTC",
    ]
    facts += [f"{name}: {value}" for name, value in take.order.options.items()]
    rows = [
        f"<tr><th scope='row'>{escape(name.replace('_', ' '))}</th><td>{escape(value)}</td></tr>"
        for name, value in map(_said, take.measurements.items())
    ]
    return _ARTICLE.substitute(
        name=escape(names.get(take.engine, take.engine)),
        text=escape(take.order.request.text),
        players="\n".join(players),
        facts=escape(" · ".join(facts)),
        licence=escape(_licence(take)),
        rows="\n".join(rows),
    )


def _player(place: str, medium: Mapping[str, Any]) -> str:
    picture = (Path(medium["file"]).with_name("mel.png").name,) if medium.get("mel") else ()
    images = [f'<img src="{escape(f"{place}/{name}")}" alt="mel spectrogram">' for name in picture]
    return _audio(place, medium.get("listen") or medium["file"]) + "".join(images)


def _audio(place: str, name: str) -> str:
    return f'<audio controls preload="none" src="{escape(f"{place}/{name}")}"></audio>'


def _licence(take: Take) -> str:
    code, weights = take.licences.get("code"), take.licences.get("weights")
    parts = [f"code: {code}" if code else "", f"weights: {weights}" if weights else ""]
    use = "" if take.licences.get("commercial", True) else "no commercial use"
    return "Licences: " + "; ".join(p for p in (*parts, use) if p) + "."


def _said(measurement: tuple[str, float | int | None]) -> tuple[str, str]:
    """A measurement's name and value with its unit, which its name ends in."""
    name, value = measurement
    what, _, unit = name.rpartition("_")
    if value is None:
        return (what if unit in ("seconds", "bytes") else name), "not measured"
    if unit == "seconds":
        return what, f"{value:.2f} s"
    if unit == "bytes":
        return what, f"{value / 2**20:,.0f} MiB"
    return name, f"{value:,.3g}"
