# `make` sets up .venv and trains the embedded default; `make test` runs lint and tests.
PYTHON ?= python3
BIN := .venv/bin

train: .venv/installed
	$(BIN)/python train.py

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out

.PHONY: train test clean
