"""The page process stays light: building the whole page imports no heavy library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "torchaudio", "transformers", "diffusers", "accelerate", "TTS", "f5_tts", "librosa")
ROOT = Path(__file__).parents[1]

BUILD = """
import sys
import app
from core.settings import Settings
from core.studio import Studio
from demos import shell
if __name__ == "__main__":
    studio = Studio(Settings())
    try:
        page = shell.build(studio)
        shell.launch_options(studio)
        assert len(page.blocks) > 50
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
    finally:
        studio.close()
"""


def test_building_the_page_imports_no_heavy_library(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SOUNDSTAGE_HOME": str(tmp_path / "home"),
            "SOUNDSTAGE_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert "gradio" in imported and "numpy" in imported
    assert not set(HEAVY) & set(imported)
