"""What an engine is and what it can do, in plain data: read by the page without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Modality(StrEnum):
    SPEECH = "speech"
    MUSIC = "music"
    SOUND = "sound"
    VIDEO = "video"
    SHAPE = "shape"


class Paradigm(StrEnum):
    """How a speech engine gets from text to waveform."""

    RULES = "rule-based"
    SPECTROGRAM = "spectrogram-based"
    TOKENS = "token-based"


class Ability(StrEnum):
    CLONE = "clone"  # speaks in the voice of a reference recording
    STREAM = "stream"  # first sound before the end
    CUES = "cues"  # [laughs]-like tags are performed, not read aloud
    MARKUP = "markup"  # SSML-like <tags> are understood


Strategy = Literal["resident", "model_offload", "group_block", "group_leaf", "device_map", "cpu"]
"""Where the components of an engine go, in the order in which they are tried:

- resident: all of them on the device;
- model_offload: each is moved there while it works (accelerate and diffusers call it so);
- group_block, group_leaf: the layers of each are moved there one block, or one layer, at a time (diffusers);
- device_map: as many layers as fit stay there, the next in host memory, the last on disk (accelerate);
- cpu: all of them in host memory, and the work is done there.
"""


class Working(BaseModel):
    """Device memory a job takes beside the weights, in bytes: a guess until there are measured takes."""

    model_config = ConfigDict(frozen=True)

    share: float = 0.25  # of the weights' bytes
    fixed: int = 0
    per_unit: float = 0.0  # for each of `Card.units`


class Options(BaseModel):
    """An engine's own knobs.

    Give each field a default, bounds (`ge`, `le`) or `Literal` choices, and a one-line description: the
    page's controls, the command line's `-o key=value`, the API and the saved take all come from here.
    `json_schema_extra` may hold `step` (of a slider) and `suggestions` (values for a free-text field).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Licence(BaseModel):
    """A licence as the package or model card states it."""

    model_config = ConfigDict(frozen=True)

    name: str
    url: str = ""
    commercial: bool = True
    must_accept: bool = False  # the weights may be used only after a person agreed


class Checkpoint(BaseModel):
    """One set of weights of an engine, and where it lives."""

    model_config = ConfigDict(frozen=True)

    repository: str = ""  # on the hub, "suno/bark-small"; empty when the engine needs no weights
    label: str = ""
    revision: str = "main"
    files: tuple[str, ...] = ()  # glob patterns of the files wanted; empty means all
    required: tuple[str, ...] = ()  # files without which a folder is not this checkpoint
    archive: str = ""  # a zip outside the hub, for weights that are published only there
    parameters: int = 0
    also: tuple[Checkpoint, ...] = ()
    """Further repositories the engine reads, a vocoder say.

    The folder handed to the engine holds this checkpoint's own files at its root, and those of each of these
    in a sub-folder named after the last part of its repository ("charactr/vocos-mel-24khz" ->
    "vocos-mel-24khz/"). `files` and `required` of each are relative to its own sub-folder.
    """
    optional: bool = False  # as one of `also`: fetched with the others, but no error where it cannot be had

    def at(self, commits: Mapping[str, str]) -> Checkpoint:
        """This checkpoint with the commits named for its repositories."""
        also = tuple(part.at(commits) for part in self.also)
        revision = commits.get(self.repository, self.revision)
        return self.model_copy(update={"also": also, "revision": revision})

    @property
    def folder(self) -> str:
        """The sub-folder of the main checkpoint that holds this one, when it is one of `also`."""
        return self.repository.rsplit("/", 1)[-1]


class Card(BaseModel):
    """What one engine is. `core/engines/<id>/card.py` holds it as `CARD`."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    id: str
    name: str
    modality: Modality
    summary: str  # one sentence for someone who never heard of it
    pipeline: str = ""  # the way from text to result, "text -> phonemes -> mel -> waveform"
    paradigm: Paradigm | None = None
    checkpoints: tuple[Checkpoint, ...] = (Checkpoint(),)
    code_licence: Licence
    weights_licence: Licence | None = None  # None: there are no weights
    languages: tuple[str, ...] = ()  # ISO 639-1 codes, or 639-3 where there is none; empty means any
    sample_rate: int = 0  # of the audio it returns, Hz
    abilities: frozenset[Ability] = frozenset()
    text_limit: int = 5000  # characters in one request
    reference_seconds: tuple[float, float] | None = None  # shortest and longest useful reference
    reference_required: bool = False  # cannot speak without a reference
    gpu_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of its weights on a GPU
    strategies: tuple[Strategy, ...] = ("resident", "cpu")  # each gives the same result (tested)
    whole: frozenset[str] = frozenset()
    """What is never taken apart: components ("codec"), and single layers that stay on the device when their
    component is streamed or spread, because the library looks where they are ("encoder.embedding").
    """
    quantisations: tuple[Literal["int8"], ...] = ()  # of its weights on a GPU too small for them
    working: Working = Working()
    reproducible: bool = True  # same seed, same machine: bitwise the same media (tested)
    reproducible_note: str = ""
    options: type[Options] = Options
    source: str = ""  # paper or project page
    pick: Callable[[Any, Any], Checkpoint] | None = None  # (request, options) -> checkpoint
    check: Callable[[Any, Any, Path | None], None] | None = None
    """Engine's own refusals: `(request, options, weights folder or None)`; raises BadInput."""

    def checkpoint(self, request: Any, options: Options) -> Checkpoint:
        """The checkpoint that serves this request."""
        return self.pick(request, options) if self.pick else self.checkpoints[0]

    @staticmethod
    def units(request: Any) -> float:
        """How much is asked for, in what working memory and time grow with: characters of the text."""
        return float(len(request.text))

    @property
    def has_weights(self) -> bool:
        return self.weights_licence is not None

    @property
    def parameters(self) -> int:
        """Parameters of the largest checkpoint."""
        return max(c.parameters for c in self.checkpoints)


def knob(default: Any, description: str, **bounds: Any) -> Any:
    """A field of `Options`: default, one-line description, and pydantic's bounds.

    `step=` and `suggestions=` go to the page's control.
    """
    extra: dict[str, Any] = {k: bounds.pop(k) for k in ("step", "suggestions") if k in bounds}
    return Field(default, description=description, json_schema_extra=extra or None, **bounds)
