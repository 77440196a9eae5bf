"""The page: Gradio and `core.studio`, nothing else."""
