"""Engine tests import torch's companions: mend them first, as the worker does."""

from core.engines.quirks import mend_torchaudio

mend_torchaudio()
