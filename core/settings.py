"""Everything that can be set, once: by `SOUNDSTAGE_*` in the environment or by the command line's flags."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: Any) -> Any:
    """`"2GiB"`, `"512 MB"` or `1024` as a number of bytes."""
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if not match:
        raise ValueError(f"{text!r} is not a size; write it like 2GiB or 512MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _split(value: Any) -> Any:
    return tuple(p.strip() for p in value.split(",") if p.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Folder = Annotated[Path, AfterValidator(lambda p: p.expanduser().absolute())]


def _weights(choice: str) -> str:
    # A folder is kept in takes, which may be made again from elsewhere.
    named = choice in ("auto", "hub", "miniature")
    return choice if named else str(Path(choice).expanduser().absolute())


def _data_folder() -> Path:
    # A Space keeps only /data over a restart, where its owner paid for storage.
    space = Path("/data")
    if os.environ.get("SPACE_ID") and os.access(space, os.W_OK):
        return space / "soundstage"
    return platformdirs.user_data_path("soundstage", appauthor=False)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="SOUNDSTAGE_", env_ignore_empty=True, frozen=True, extra="forbid"
    )

    home: Folder = Field(default_factory=_data_folder, description="takes, licence acceptances, logs")
    cache: Folder = Field(
        default_factory=lambda: platformdirs.user_cache_path("soundstage", appauthor=False),
        description="miniatures, which can be built again at any time",
    )
    weights: Annotated[str, AfterValidator(_weights)] = Field(
        "auto", description="auto, hub, miniature, or a checkpoint folder"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps"
    )
    memory_budget: Annotated[int | None, BeforeValidator(parse_bytes)] = Field(
        None, description="plan as if the device had this many bytes"
    )
    operator_page: bool = Field(
        False, description="who sees the page may change the memory budget; set where nobody else sees it"
    )
    ram_budget: Annotated[int | None, BeforeValidator(parse_bytes)] = Field(
        None, description="host memory for parked and offloaded models; unset: 60 % of the machine's"
    )
    idle_timeout: float = Field(
        600.0, gt=0, description="seconds after which an idle model leaves the device"
    )
    park_timeout: float = Field(3600.0, gt=0, description="further seconds until it leaves host memory too")
    threads: int = Field(0, ge=0, description="CPU threads of a model; 0: one less than the cores")
    tabs: Names = Field((), description="tabs to show; empty: all")
    engine_modules: Names = Field((), description="engine packages to add, by module name")
    accept_licences: Names = Field((), description="engines whose weights' licence the operator accepts")
    inline: bool = Field(False, description="run models in this process, without a worker")
    cancel_grace: float = Field(10.0, gt=0, description="seconds a job may ignore a stop before it is killed")
    silence_limit: float = Field(
        600.0, gt=0, description="seconds without any step after which a job is called hung"
    )
    heartbeat_limit: float = Field(60.0, gt=0, description="seconds without a sign of the worker process")
    start_limit: float = Field(300.0, gt=0, description="the same while it starts and imports its libraries")
    leave_seconds: float = Field(
        60.0, gt=0, description="seconds after which engines are given back whose tab no open page shows"
    )
    patience: int = Field(4, ge=0, description="times a job may be passed over for the loaded engine")
    turn_seconds: float = Field(
        3.0,
        ge=0,
        description="seconds an engine stays for its visitor's next job before another crowds it out",
    )
    jobs_per_visitor: int = Field(24, ge=1, description="waiting jobs one visitor may have")

    @property
    def takes_folder(self) -> Path:
        return self.home / "takes"

    @property
    def model_threads(self) -> int:
        """Threads for a model: one core is left to the page, so that it stays responsive."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, cores - 1)
