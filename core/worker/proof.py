"""Proof that a release let go: what is still alive, and what holds it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from types import FrameType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

_STARTS = 2  # of what is still alive; the others are held by the same, nearly always
_LEVELS = 24  # from a parameter over its module and its parents, three a parent, to a list in some library
_WIDTH = 3  # holders looked at on each level, since each look goes through all objects there are
_LINES = 5


def holders(alive: Sequence[object]) -> tuple[str, ...]:
    """Say what keeps objects alive, as ways up from each: "Parameter < Linear < list < some.library.CACHE".

    A look through all objects of the process, so only for when something went wrong. What only a running
    function holds is not found.
    """
    level: list[object] = list(alive[:_STARTS])
    ways = {id(held): type(held).__name__ for held in level}
    known = {id(vars(module)): name for name, module in sys.modules.copy().items() if _is_module(module)}
    found: list[str] = []
    above: list[object] = []
    for _ in range(_LEVELS):
        above = []
        for held in level:
            way, dead_end = ways[id(held)], True
            mine = {id(alive), id(level), id(above)}
            for holder in gc.get_referrers(held):
                if id(holder) in mine or isinstance(holder, FrameType):
                    continue
                dead_end = False
                if id(holder) in known:
                    found.append(f"{way} < {known[id(holder)]}.{_name_in(holder, held)}")
                elif id(holder) not in ways and len(above) < _WIDTH:
                    # Every module has dictionaries between itself and its parts.
                    ways[id(holder)] = way if type(holder) is dict else f"{way} < {_words(holder)}"
                    above.append(holder)
            if dead_end:
                found.append(way)
        level = above
    found += [ways[id(held)] for held in level]
    return tuple(dict.fromkeys(found))[:_LINES]


def forget(error: BaseException) -> BaseException:
    """Drop the tracebacks of an error and of those before it: their frames keep whole models alive."""
    step: BaseException | None = error
    seen: set[int] = set()
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        step.__traceback__ = None
        step = step.__cause__ or step.__context__
    return error


def _is_module(module: Any) -> bool:
    return isinstance(module, ModuleType)


def _name_in(holder: Any, held: object) -> str:
    return next((str(name) for name, value in holder.items() if value is held), "?")


def _words(holder: object) -> str:
    if isinstance(holder, FunctionType | MethodType | GeneratorType):
        return f"{type(holder).__name__} {holder.__qualname__}"
    kind = type(holder)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
