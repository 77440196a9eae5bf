"""Which open pages look at which tab, so that what everyone left can be given back.

A page says that it shows a tab, again and again while it is open. One that says nothing for long is gone: its
browser crashed, or the laptop was closed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SILENCE_SECONDS = 150.0  # Chromium lets a page in the background speak once a minute


class Presence:
    """Safe to use from any thread.

    Args:
        leave_seconds: how long no page may show a tab before it counts as left.
        silence_seconds: how long a page may say nothing before it counts as closed.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        leave_seconds: float,
        silence_seconds: float = SILENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leave_seconds = leave_seconds
        self._silence_seconds = silence_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._pages: dict[str, tuple[str, float]] = {}  # page -> its tab, and when it last said so
        self._shown: dict[str, float] = {}  # tab -> when a page last showed it

    def visit(self, page: str, tab: str) -> None:
        """This page shows this tab now: it was opened, it changed tabs, or it is still there."""
        with self._lock:
            self._close(page)
            self._pages[page] = (tab, self._clock())
            self._shown[tab] = self._clock()

    def leave(self, page: str) -> None:
        """This page was closed. A page that nobody knows may leave, too."""
        with self._lock:
            self._close(page)

    def left(self) -> frozenset[str]:
        """Tabs that a page has shown, and none for `leave_seconds`."""
        with self._lock:
            now = self._clock()
            for page in [p for p, (_, heard) in self._pages.items() if self._silent(heard)]:
                self._close(page)
            present = {tab for tab, _ in self._pages.values()}
            return frozenset(
                tab
                for tab, seen in self._shown.items()
                if tab not in present and now - seen >= self._leave_seconds
            )

    def _close(self, page: str) -> None:
        if known := self._pages.pop(page, None):
            tab, heard = known
            last = heard if self._silent(heard) else self._clock()
            self._shown[tab] = max(self._shown[tab], last)

    def _silent(self, heard: float) -> bool:
        return self._clock() - heard > self._silence_seconds
