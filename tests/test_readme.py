"""The README is true."""

from __future__ import annotations

import re
from pathlib import Path

from core.catalog import Catalog, as_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_engines_is_the_catalogues():
    table = re.search(r"<!-- engines:[^\n]*-->\n(.*?)<!-- /engines -->", README, re.DOTALL)[1]
    assert table.strip() == as_markdown(Catalog().cards()), "run: python app.py engines --markdown"


def test_the_pictures_and_files_it_names_are_there():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_the_two_commands_are_the_makefiles():
    makefile = (ROOT / "Makefile").read_text()
    verbs = re.findall(r"(?:^ {4}|`)make (\w+)", README, re.MULTILINE)  # as code, not as a word of a sentence
    assert {"run", "test"} <= set(verbs)
    for verb in verbs:
        assert re.search(rf"^{verb}:", makefile, re.MULTILINE), verb


def test_the_spaces_gradio_is_the_pinned_one():
    version = re.search(r"^sdk_version: (\S+)", README, re.MULTILINE)[1]
    assert f"\ngradio=={version}\n" in (ROOT / "requirements.txt").read_text()
