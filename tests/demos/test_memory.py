from hypothesis import given
from hypothesis import strategies as st

from core.studio import Holding, Status
from demos.memory import bars, budgets, in_short, sheet, stack

GIB = 2**30


def holding(name: str = "XTTS v2", state: str = "loaded", device: int = 0, ram: int = 0, **more) -> Holding:
    given = {"idle_seconds": 75.4, "words": "all on the GPU", "kept": ""} | more
    return Holding(name.lower(), name, state, device, ram, **given)


def status(held=(), one_memory: bool = False, **more) -> Status:
    given = {
        "device": "NVIDIA H200", "memory_used": 0, "memory_total": 24 * GIB, "memory_free": 5 * GIB,
        "ram_used": 0, "ram_total": 64 * GIB, "ram_free": 40 * GIB,
        "queue": 0, "loaded": (), "worker": "ready", "leak": "", "device_size": 24 * GIB,
    }  # fmt: skip
    return Status(**given | more, held=tuple(held), one_memory=one_memory)


def test_the_button_says_what_is_loaded_parked_and_free():
    held = [holding(), holding("MMS", "in use"), holding("Bark", "parked")]
    assert in_short(status(held)) == "2 loaded, 1 parked, 5.0 GiB free"
    assert in_short(status()) == "nothing loaded, 5.0 GiB free"
    assert in_short(status(memory_total=0)) == "starting"


def test_a_bar_shows_engines_other_and_free():
    device, ram = bars(status([holding(device=2 * GIB, ram=GIB), holding("Bark", "parked", ram=4 * GIB)]))
    assert [(p.name, p.bytes // GIB, p.kind) for p in device["pieces"]] == [
        ("XTTS v2", 2, "loaded"),
        ("other", 17, "other"),
        ("free", 5, "free"),
    ]
    assert [(p.name, p.bytes // GIB, p.kind) for p in ram["pieces"]] == [
        ("XTTS v2", 1, "loaded"),
        ("Bark", 4, "parked"),
        ("other", 19, "other"),
        ("free", 40, "free"),
    ]


def test_where_the_devices_memory_is_ram_one_bar_says_it():
    [bar] = bars(status([holding(device=GIB)], one_memory=True, memory_total=64 * GIB, memory_free=40 * GIB))
    assert bar["title"] == "RAM" and bar["pieces"][0].bytes == GIB
    [bar] = bars(status(one_memory=True, memory_total=2 * GIB, memory_free=GIB))
    assert bar["title"] == "RAM, within the budget" and bar["total"] == "2.0 GiB"
    assert ">GPU<" not in sheet(status([holding()], one_memory=True))


def test_the_operator_alone_may_hold_engines_to_a_part_of_the_device():
    now = status(memory_total=12 * GIB)
    assert [(b["words"], b["now"]) for b in budgets(now)] == [
        ("all of it", False), ("18 GiB", False), ("12 GiB", True), ("6.0 GiB", False),
    ]  # fmt: skip
    assert "Use at most" in sheet(now, operator=True) and "Use at most" not in sheet(now)
    assert budgets(status(memory_total=0, device_size=0)) == []


sizes = st.integers(0, 100 * GIB)


@given(sizes, sizes, st.lists(sizes, max_size=5))
def test_the_pieces_fill_the_bar_whatever_was_measured(total, free, engines):
    pieces = stack(total, free, [(holding(), size) for size in engines])
    assert sum(piece.bytes for piece in pieces) == max(total, sum(engines), 1)
    assert all(piece.bytes > 0 for piece in pieces)
    assert abs(sum(piece.percent for piece in pieces) - 100) < 1e-6
    assert [p.bytes for p in pieces if p.engine] == [size for size in engines if size]
    assert sum(p.bytes for p in pieces if p.kind == "free") <= free, "free is never overstated"


def test_an_engine_that_is_needed_says_why_it_stays():
    html = sheet(status([holding("Bark", kept="A job waits for it.")]))
    assert html.count('disabled title="A job waits for it."') == 1
    assert 'disabled title="All of them are in use."' in html
    assert "disabled" not in sheet(status([holding("Bark"), holding("MMS")]))


def test_the_sheet_says_idle_time_placement_and_what_was_left_behind():
    html = sheet(status([holding(device=GIB)], leak="XTTS v2 left 12 MiB behind."))
    assert "1 min 15 s" in html and "all on the GPU" in html and "XTTS v2 left 12 MiB behind." in html


def test_what_engines_are_called_is_never_markup():
    html = sheet(status([holding("<b>x</b>", device=GIB, words="<i>", kept='"><b>')], leak="<b>"))
    assert "<b>" not in html and "<i>" not in html
