"""HTML of the page, from `demos/templates`. Values are escaped; addresses lead to this server only."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ASSETS = Path(__file__).parent.parent / "assets"

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    return _templates.get_template(f"{template}.html").render(values)


def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def drawing(name: str) -> Markup:
    """An SVG of the project's own, to stand in a page as it is."""
    return Markup(asset(name))


def address(file: Path) -> str:
    """Where Gradio serves a file of an allowed folder; relative, so that it works behind any proxy."""
    return f"gradio_api/file={quote(str(file))}"
