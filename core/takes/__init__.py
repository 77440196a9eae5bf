"""Finished work on disk: a folder and a record each, an index over them, and ways to take them home."""

from core.takes.sharing import as_csv, export_zip
from core.takes.store import Pace, Take, Takes

__all__ = ["Pace", "Take", "Takes", "as_csv", "export_zip"]
