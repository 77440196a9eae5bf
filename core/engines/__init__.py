"""One folder an engine: card.py (data), engine.py (load and generate), miniature.py (a tiny checkpoint)."""
