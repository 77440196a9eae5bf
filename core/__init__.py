"""Soundstage's core: engines, weights, jobs and takes. Knows nothing of Gradio."""

__version__ = "0.1.0"
