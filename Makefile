# make run · make test · make lint · make bench · make clean. Each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin

run: .venv/ready
	$(BIN)/python app.py serve

test: .venv/ready-dev lint
	$(BIN)/python -m pytest

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready-dev
	$(BIN)/python -m tests.benchmarks

screenshots: .venv/ready-dev
	$(BIN)/python -m tests.browser.screenshots

clean:
	rm -rf .venv .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks .gradio build
	find . -name __pycache__ -type d -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: run test lint bench screenshots clean
