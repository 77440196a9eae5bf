"""What torch and its companions say of themselves, as JSON: `python -m core.worker.selfcheck DEVICE`.

Run by the doctor in a process of its own, since the page's process imports no torch, and since a broken
library may end the process that imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from typing import Any


def facts(wanted: str) -> dict[str, Any]:
    """Device and memory as the worker would see them, and the companions' import errors ("" for none)."""
    from core.errors import BadInput
    from core.worker.devices import Device

    found: dict[str, Any] = {"device_error": ""}
    try:
        device = Device(wanted, threads=1)
    except BadInput as error:
        found["device_error"] = str(error)
        device = Device("cpu", threads=1)
    found |= {"device": device.title, "total": device.total(), "free": device.free()}
    extension = sys.modules.get("torchaudio._extension")
    found["torchaudio_mended"] = extension is not None and extension.__spec__ is None
    found["versions"] = {name: _version(name) for name in ("torch", "torchaudio", "torchvision")}
    found["errors"] = {name: _import_error(name) for name in ("torchaudio", "torchvision")}
    return found


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _import_error(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return ""
    try:
        importlib.import_module(package)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return ""


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])))
