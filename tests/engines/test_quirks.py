"""torchaudio imports and works, whichever build of torch is beside it."""

import subprocess
import sys

PROGRAM = """
import sys
from core.engines.quirks import mend_torchaudio
mend_torchaudio()
mend_torchaudio()
import torch, torchaudio
tone = torch.sin(torch.arange(24000) * 0.1)[None]
print(torchaudio.functional.resample(tone, 24000, 16000).shape[1])
print(torchaudio.transforms.MelSpectrogram(24000)(tone).isfinite().all().item())
"""


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_torchaudio_imports_and_works_after_mending() -> None:
    assert python(PROGRAM).split() == ["16000", "True"]


def test_mending_does_not_import_torchaudio() -> None:
    program = "import sys, core.engines.quirks as q; q.mend_torchaudio(); print('torchaudio' in sys.modules)"
    assert python(program).strip() == "False"
