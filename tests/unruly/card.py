"""An engine that misbehaves as asked, so that tests see what becomes of the job and of its neighbours."""

from typing import Literal

from core.card import Card, Checkpoint, Licence, Modality, Options, knob

LICENCE = Licence(name="Apache-2.0")


class UnrulyOptions(Options):
    behave: Literal[
        *("well", "crash", "killed", "exit", "hang", "deaf", "frozen", "memory", "fail", "leak", "quit"),
        *("empty", "die when parked", "die when brought back"),
    ] = knob("well", "What to do instead of working.")
    steps: int = knob(3, "How many steps to report.", ge=1, le=100_000)


CARD = Card(
    id="unruly",
    name="Unruly",
    modality=Modality.SPEECH,
    summary="Misbehaves on demand.",
    code_licence=LICENCE,
    weights_licence=LICENCE,
    checkpoints=(Checkpoint(repository="tests/unruly", label="unruly", required=("weights.bin",)),),
    options=UnrulyOptions,
    sample_rate=16000,
)
