# Everything a newcomer needs: make demo, make test. Both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.PHONY: demo test test-oldest check format docs notebooks bench fuzz trust audit bench-gpu loss-compare clean

demo: $(VENV)/.demo
	$(BIN)/python demo/demo.py --out $(RUN)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, into site/; any warning ends it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The notebooks of the site, run afresh; ONLY=docs/notebooks/NAME.ipynb runs one of them.
ONLY ?=
notebooks: $(VENV)/.notebooks
	$(BIN)/python docs/notebooks.py $(ONLY)

# The suite with the oldest supported versions, in an environment of its own.
PYTHON_OLDEST ?= python3.10
test-oldest:
	PIP_CONSTRAINT=tests/oldest.txt $(MAKE) test VENV=.venv-oldest PYTHON=$(PYTHON_OLDEST)

# The CPU benchmarks, with their results under benchmarks/results/; DATA holds unpacked labelled folders.
DATA ?= data
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/vs_transformers.py
	$(BIN)/python benchmarks/cost_check.py
	$(BIN)/python benchmarks/hog_speed.py
	$(BIN)/python benchmarks/recipe_costs.py --rounds 3 --time-batch-size 8
	$(BIN)/python benchmarks/recipe_costs.py --recipes mae lean lean:mask-ratio=0.9 lean-memory lean-memory:mask-ratio=0.9 --count vit_base_patch16_224 vit_small_patch16_224 --time --batch-size 256 --name lean-cost
	$(BIN)/python benchmarks/pr_mim.py
	$(BIN)/python benchmarks/bim.py
	GOMP_SPINCOUNT=1000 $(BIN)/python benchmarks/block_parallel.py
	$(BIN)/python benchmarks/sharded.py
	$(BIN)/python benchmarks/memory_rivals.py
	$(BIN)/python benchmarks/ablate.py --data $(DATA)

# Thousands of mutated photos through the reader, in a process of its own that is watched.
FUZZ ?= 5000
SEED ?= 0
fuzz: $(VENV)/.dev
	$(BIN)/python benchmarks/fuzz.py --count $(FUZZ) --seed $(SEED)

# What was tried and what survived: kills, signals, full disks, photos, checkpoints, command lines, processes.
SHARE ?= 1
trust: $(VENV)/.dev
	$(BIN)/python benchmarks/trust.py --share $(SHARE)

# Known weaknesses of what is installed; asks the network.
audit: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --skip-editable

# After a refactor: the first ten losses of every recipe, here and at BASE, must be the same bit for bit.
BASE ?= HEAD
loss-compare: $(VENV)/.dev
	$(BIN)/python benchmarks/loss_compare.py --base $(BASE)

# On a machine with a GPU, with that machine's own Python: the pieces that are not finished, one after the other, or PIECE="NAME ...".
# Each takes 8 minutes at most; MINUTES is a limit for all of them. With PHOTOS, a labelled folder: also the recipes compared at real
# scale. WORK holds what is finished: the same command goes on. DRY=1 needs no GPU: tiny models.
PIECE ?=
bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(PIECE) $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(WORK),--work $(WORK)) $(if $(DRY),--dry)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml $(PIP_CONSTRAINT) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@ $(VENV)/.demo

$(VENV)/.notebooks: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[notebooks]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .venv-oldest runs site .pytest_cache .ruff_cache .mypy_cache
