# The same targets serve people and CI. Needs Python 3.11 or newer, git and make; no compiler, no
# GPU. (The package itself runs on 3.10; the pinned versions here do not.)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test check slow gpu bench traces docs clean

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
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

check: setup  ## lint, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

slow: setup  ## every family, gigabytes of disk; a browser (Debian's chromium) drives the live view
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[slow]"
	$(BIN)/python -m pytest -q -m slow

gpu: setup  ## on a machine with an NVIDIA GPU and a CUDA build of torch in $(VENV)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -m gpu

# Where large checkpoints are made: about 40 GB, and as much again for accelerate's copy.
WORK ?= scratch
MAKE_CHECKPOINT := $(BIN)/python benchmarks/make_checkpoint.py

bench: setup  ## every benchmark, results in benchmarks/results; kernel limits need root
	$(BIN)/pip install --quiet accelerate
	test -d $(WORK)/widened16 || $(MAKE_CHECKPOINT) --widen 16 $(WORK)/widened16
	test -d $(WORK)/widened8 || $(MAKE_CHECKPOINT) --widen 8 $(WORK)/widened8
	test -d $(WORK)/widened4 || $(MAKE_CHECKPOINT) --widen 4 --dtype float32 $(WORK)/widened4
	test -d $(WORK)/olmoe_random || $(MAKE_CHECKPOINT) --shape olmoe-1b-7b $(WORK)/olmoe_random
	test -d $(WORK)/olmoe_uniform8 || $(MAKE_CHECKPOINT) --shape olmoe-1b-7b --layers 8 \
	  --routing uniform --seed 5 $(WORK)/olmoe_uniform8
	test -d $(WORK)/qwen3_8 || $(MAKE_CHECKPOINT) --shape qwen3-30b-a3b --layers 8 --seed 3 $(WORK)/qwen3_8
	test -d $(WORK)/dsv2lite8 || $(MAKE_CHECKPOINT) --shape deepseek-v2-lite --experts 8 $(WORK)/dsv2lite8
	$(BIN)/python benchmarks/widened.py --fp32 $(WORK)/widened4 --bf16 $(WORK)/widened16
	$(BIN)/python benchmarks/budget.py $(WORK)/widened16
	$(BIN)/python benchmarks/budget.py $(WORK)/olmoe_random --accelerate $(WORK)/accelerate
	$(BIN)/python benchmarks/prefill.py $(WORK)/widened16
	$(BIN)/python benchmarks/kernel_speed.py
	$(BIN)/python benchmarks/depth.py
	$(BIN)/python benchmarks/latent_depth.py $(WORK)/dsv2lite8
	$(BIN)/python benchmarks/plan_accuracy.py $(WORK)/widened8=1GiB $(WORK)/widened8=1536MiB \
	  $(WORK)/olmoe_uniform8=2GiB $(WORK)/olmoe_uniform8=4GiB $(WORK)/qwen3_8=3GiB $(WORK)/qwen3_8=5GiB
	$(BIN)/python benchmarks/families.py

DOMAINS := --prompts benchmarks/prompts/domains.jsonl
SEEDS := 11 12 13 14 15

traces: setup  ## what benchmarks/{policies,prediction,gpu_link}.py replay: the bundled model's routing
	mkdir -p $(WORK)/traces
	$(BIN)/moe-infinity trace $(DOMAINS) --logits --hidden --foresight 3 -o $(WORK)/traces/domains.safetensors
	for seed in $(SEEDS); do $(BIN)/moe-infinity trace $(DOMAINS) --temperature 0.8 --seed $$seed \
	  -o $(WORK)/traces/s$$seed.safetensors || exit 1; done

docs: setup  ## render README tables and docs/families.md from checked-in results
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
