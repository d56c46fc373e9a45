# Everything a newcomer needs: make demo, make test. Both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.PHONY: demo test check format bench bench-gpu loss-compare clean

demo: $(VENV)/.demo
	$(BIN)/python demo/demo.py --out $(RUN)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The CPU benchmarks, with their results under benchmarks/results/; DATA holds unpacked labelled folders.
DATA    ?= data
SCHEDULE = --batch-size 64 --blr 0.004
CIFAR    = --data $(DATA)/cifar10 $(SCHEDULE)
TINY     = --data $(DATA)/tinyimagenet28 $(SCHEDULE) --input-size 64 --images 400 --epochs 6
PR_MIM   = $(foreach t,50 70,$(addprefix pr-mim-$(t),-plain-random -plain -random) pr-mim-$(t))
DEEP     = --scale cpu-deep --batch-size 32 --blr 0.008
DEEP_C   = --data $(DATA)/cifar10 $(DEEP)
DEEP_T   = --data $(DATA)/tinyimagenet28 $(DEEP) --input-size 64 --images 180
DEPTHS   = mae-depth-3 mae-depth-6 mae-depth-9
BIM      = bim-2 bim-4 bim-12 $(addprefix bim-4-,gentle rising steep layers-2 layers-4) $(DEPTHS)
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/vs_transformers.py
	$(BIN)/python benchmarks/cost_check.py
	$(BIN)/python benchmarks/hog_speed.py
	$(BIN)/python benchmarks/recipe_costs.py --rounds 3 --time-batch-size 8
	$(BIN)/python benchmarks/pr_mim.py
	$(BIN)/python benchmarks/bim.py
	$(BIN)/python benchmarks/ablate.py --data $(DATA)/cifar10
	$(BIN)/python benchmarks/ablate.py $(TINY) --name fastmim-tinyimagenet28-cpu \
		--variants mae mae-half mae-hog mae-hog-half mae-hog-half-time mae-hog-p mae-hog-p-time
	$(BIN)/python benchmarks/ablate.py $(CIFAR) --name fastmim-cifar10-cpu --variants mae mae-hog
	$(BIN)/python benchmarks/ablate.py $(CIFAR) --name pr-mim-cifar10-cpu --variants mae $(PR_MIM)
	$(BIN)/python benchmarks/ablate.py $(TINY) --name pr-mim-tinyimagenet28-cpu --variants mae $(PR_MIM)
	$(BIN)/python benchmarks/ablate.py $(DEEP_C) --name screen-bim-cifar10-cpu --seeds 0 --variants mae $(BIM)
	$(BIN)/python benchmarks/ablate.py $(DEEP_C) --name bim-cifar10-cpu --variants mae bim-4-gentle $(DEPTHS)
	$(BIN)/python benchmarks/ablate.py $(DEEP_T) --name screen-bim-tinyimagenet28-cpu --seeds 0 --variants mae $(BIM)
	$(BIN)/python benchmarks/ablate.py $(DEEP_T) --name bim-tinyimagenet28-cpu --variants mae bim-4-gentle $(DEPTHS)

# After a refactor: the first ten losses of every recipe, here and at BASE, must be the same bit for bit.
BASE ?= HEAD
loss-compare: $(VENV)/.dev
	$(BIN)/python benchmarks/loss_compare.py --base $(BASE)

# On a machine with a GPU, with that machine's own Python (torch, timm, transformers installed): 8 minutes at most.
bench-gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
