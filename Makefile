# `make demo` trains all four stages on the tiny checkpoint; `make test` runs the tests. Both set up .venv first.
# `make floor` tests with the oldest TRL that is supported, and `make vllm` with vLLM, each in an environment of its own.
PYTHON ?= python3
BIN := .venv/bin
FLOOR := .venv-floor/bin
VLLM := .venv-vllm/bin

.PHONY: demo test quick floor vllm smoke learning zoo soak check format clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-floor/ready: pyproject.toml constraints.txt constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	grep -vE '^(peft|transformers|trl)==' constraints.txt | cat - constraints-floor.txt > .venv-floor/constraints.txt
	$(FLOOR)/pip install --quiet --constraint .venv-floor/constraints.txt torch
	$(FLOOR)/pip install --quiet --constraint .venv-floor/constraints.txt --editable . pytest pytest-xdist
	touch $@

.venv-vllm/ready: pyproject.toml constraints.txt requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	grep -vE '^(fastapi|openai)==' constraints.txt > .venv-vllm/constraints.txt
	$(VLLM)/pip install --quiet --constraint .venv-vllm/constraints.txt torch
	$(VLLM)/pip install --quiet --constraint .venv-vllm/constraints.txt --editable . pytest
	$(VLLM)/pip install --quiet --no-deps --requirement requirements-vllm.txt
	touch $@

demo: .venv/ready
	$(BIN)/rlhf-pipeline run tiny

# A process per core, each with one thread: threads that wait for each other would take longer.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Those that neither start processes nor train: about three minutes.
quick: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

# What depends on TRL: the stages end to end, first losses, exact resuming, the keys that are settable and refused, and
# the equality with TRL's own PPO, which is to be had there alone.
floor: .venv-floor/ready
	OMP_NUM_THREADS=1 $(FLOOR)/python -m pytest --numprocesses auto --dist worksteal \
		tests/ppo/test_same_as_trl.py tests/ppo/test_config.py tests/ppo/test_former.py tests/ppo/test_keys.py \
		tests/stages tests/recipe/test_library_keys.py

# Replies that vLLM samples, on the CPU: that they are those of the same distribution, and runs that are made of them.
vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 $(VLLM)/python -m pytest -m vllm tests/ppo/test_vllm_engine.py

# Every shipped recipe for two steps a stage, on a tiny checkpoint of its model: docs/ci.md says what that shows.
smoke: .venv/ready
	set -e; for recipe in recipes/*.yaml; do $(BIN)/rlhf-pipeline smoke $$recipe; done

# Every tiny recipe on three seeds that nothing was tuned on: does each policy gain what it should? Half an hour.
learning: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/learning.py --seeds 1 2 3

# Every causal architecture of Transformers, made small at random: what holds of it. Renews docs/architectures.md, in
# about half an hour.
zoo: .venv/ready
	$(BIN)/python benchmarks/architectures.py --page docs/architectures.md > /dev/null

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
	rm -rf .venv .venv-floor .venv-vllm build dist runs .mypy_cache .pytest_cache .ruff_cache
