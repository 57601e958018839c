# The same targets serve people and CI. Needs Python >= 3.10, git and make; no compiler, no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test check slow bench docs clean

setup: $(STAMP)

# constraints.txt pins torch's CPU build: a plain "torch" brings gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: setup  ## the bundled model with a quarter of its experts in memory
	$(BIN)/moe-infinity run --ram-slots 64 --max-new-tokens 100 --temperature 0.6 \
	  "Question: A farmer has 12 cows and buys 5 more. How many cows does the farmer have? Answer:"

test: setup
	$(BIN)/python -m pytest -q

check: setup  ## lint, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

slow: setup  ## every family, gigabytes of disk
	$(BIN)/python -m pytest -q -m slow

bench: setup  ## results in benchmarks/results; needs about 25 GB of disk and, for limits, root
	$(BIN)/python benchmarks/budget.py

docs: setup  ## render README tables and docs/families.md from checked-in results
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
