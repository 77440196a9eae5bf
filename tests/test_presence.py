"""Who looks at what: any sequence of pages that open, change tabs, close or fall silent."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from core.presence import Presence

LEAVE, SILENCE = 60.0, 150.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def presence() -> tuple[Presence, Clock]:
    clock = Clock()
    return Presence(LEAVE, SILENCE, clock), clock


def test_a_tab_is_left_once_its_last_page_was_gone_for_long_enough():
    kept, clock = presence()
    kept.visit("one", "speech")
    kept.visit("two", "speech")
    clock.now += 10
    kept.leave("one")
    clock.now += LEAVE
    assert kept.left() == frozenset(), "the other page is still there"
    kept.leave("two")
    clock.now += LEAVE - 1
    assert kept.left() == frozenset()
    clock.now += 1
    assert kept.left() == {"speech"}


def test_a_tab_that_was_never_shown_was_not_left():
    kept, clock = presence()
    kept.leave("nobody")
    clock.now += 1000
    assert kept.left() == frozenset()


def test_a_page_that_comes_back_keeps_its_tab():
    kept, clock = presence()
    kept.visit("one", "speech")
    kept.leave("one")
    clock.now += LEAVE - 1
    kept.visit("one again", "speech")
    clock.now += LEAVE
    assert kept.left() == frozenset()


def test_changing_tabs_leaves_the_other_one():
    kept, clock = presence()
    kept.visit("one", "speech")
    clock.now += 30
    kept.visit("one", "music")
    clock.now += LEAVE
    assert kept.left() == {"speech"}


def test_a_page_that_falls_silent_is_gone_and_may_wake_up():
    kept, clock = presence()
    kept.visit("laptop", "speech")
    clock.now += SILENCE
    assert kept.left() == frozenset()
    clock.now += 1
    assert kept.left() == {"speech"}
    kept.visit("laptop", "speech")
    assert kept.left() == frozenset()


moves = st.lists(
    st.one_of(
        st.tuples(st.just("visit"), st.sampled_from("pqr"), st.sampled_from(("speech", "music"))),
        st.tuples(st.just("leave"), st.sampled_from("pqr"), st.none()),
        st.tuples(st.just("wait"), st.sampled_from((1.0, 31.0, 59.0, 61.0, 151.0)), st.none()),
        st.tuples(st.just("look"), st.none(), st.none()),
    ),
    max_size=40,
)


@given(moves)
@settings(max_examples=300, deadline=None)
def test_a_tab_is_left_exactly_when_no_page_showed_it_for_long_enough(moves):
    """Against a second account of it, which keeps the whole history and forgets nothing."""
    kept, clock = presence()
    spans: list[dict] = []  # one for each time a page showed a tab: page, tab, from, last word, end
    for what, who, tab in moves:
        current = next((s for s in spans if s["page"] == who and s["end"] is None), None)
        if what == "wait":
            clock.now += who
        elif what == "look":
            assert kept.left() == left(spans, clock.now)
        elif what == "leave":
            kept.leave(who)
            if current:
                current["end"] = clock.now
        elif current and current["tab"] == tab:
            kept.visit(who, tab)
            current["heard"] = clock.now
        else:
            kept.visit(who, tab)
            if current:
                current["end"] = clock.now
            spans.append({"page": who, "tab": tab, "heard": clock.now, "end": None})
        for span in spans:  # nothing heard for too long: it ended with its last word
            if span["end"] is None and clock.now - span["heard"] > SILENCE:
                span["end"] = span["heard"]
    assert kept.left() == left(spans, clock.now)


def left(spans: list[dict], now: float) -> set[str]:
    over = {id(s) for s in spans if s["end"] is not None and now - s["end"] >= LEAVE}
    return {s["tab"] for s in spans} - {s["tab"] for s in spans if id(s) not in over}
