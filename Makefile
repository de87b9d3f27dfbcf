# Every target sets up what it needs by itself; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA := data/stdlib

.DEFAULT_GOAL := help
.PHONY: help pretrain test lint bench ops comm

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

# pip prefers a torch that is offered by its own settings (a CPU build, say) as long as its version is the pinned one.
# It does not compile all modules of all packages, which takes longer than the rest; Python compiles those it imports.
$(READY): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

$(DATA)/manifest.json: | $(READY)
	$(BIN)/python launch/prepare_data.py --source stdlib --train-tokenizer 4096 --out $(DATA)

# One process compiles DeepSpeed's operators, before several (ranks, test workers) would race to.
ops: $(READY) ## Compile DeepSpeed's operators (minutes, once)
	$(BIN)/python launch/build_ops.py

comm: $(READY)
	$(BIN)/python launch/build_ops.py comm

# A plain command, so that make runs it without a shell and a signal sent to make reaches it.
pretrain: $(READY) comm $(DATA)/manifest.json ## A short real pretraining run; interrupted, the same command goes on
	$(BIN)/python launch/local.py launch/pretrain.py --config launch/configs/quickstart.yaml --resume auto

# The tests of a file stay with one worker: what they share is made once, and runs of two ranks, which wait for each other
# busily, come one after another. tests/conftest.py says which file is the first. Tests on a GPU have it to themselves.
test: $(READY) ops ## The test suite (MARK=gpu for the tests that need a GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(if $(filter not,$(MARK)),2,0) --dist loadfile --no-loadscope-reorder -m "$(MARK)"
test: MARK ?= not gpu

lint: $(READY) ## Style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## The benchmarks, one script a claim
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done
