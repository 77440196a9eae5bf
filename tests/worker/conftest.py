"""Some worker tests import libraries that import torchaudio: mend it first, as the worker does."""

from core.engines.quirks import mend_torchaudio

mend_torchaudio()
