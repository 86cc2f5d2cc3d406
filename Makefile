# `make demo` trains all four stages on the tiny checkpoint; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test smoke soak check format clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/ready
	$(BIN)/rlhf-pipeline run tiny

# A process per core, each with one thread: threads that wait for each other would take longer.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Every shipped recipe for two steps a stage, on a tiny checkpoint of its model: docs/ci.md says what that shows.
smoke: .venv/ready
	set -e; for recipe in recipes/*.yaml; do $(BIN)/rlhf-pipeline smoke $$recipe; done

# Kills a run at random instants and starts it again, 40 times or as often as SOAK_KILLS says.
soak: .venv/ready
	OMP_NUM_THREADS=1 SOAK_KILLS=$${SOAK_KILLS:-40} $(BIN)/python -m pytest tests/test_kill.py -k soak -s

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist runs .mypy_cache .pytest_cache .ruff_cache
