# Everything from a fresh clone with nothing but make and Python 3.10 or newer:
#
#     make demo      find the sinks of a bundled conversation
#     make help      all targets
#
# Each target makes the virtual environment that it needs; a second run finds it and goes on at once.

PYTHON ?= python3
# By exactly this version pip finds one build and fetches no other.
TORCH := torch==2.13.0
TL3 := transformer-lens==3.9.*

RESULTS ?= out/experiments
VENV := .venv
VENV_TL3 := .venv-tl3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# Stamps: what is installed into the environments. They are made again when requirements change.
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
CORE_TL3 := $(VENV_TL3)/.installed-core
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test fast test-tl3 lint docs experiments benchmarks clean

help: ## show this
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(CORE) ## find the sinks of a bundled conversation; data and figures in out/demo
	$(BIN)/secondary-sinks demo --out out/demo

test: $(CORE) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

fast: $(CORE) ## run the tests that need no real model, one model family each, in under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --fast

test-tl3: $(CORE_TL3) ## run the tests for TransformerLens 3, in an environment of its own
	$(VENV_TL3)/bin/python -m pytest tests_tl3

lint: $(DEV) ## ruff, mypy and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright

docs: $(DOCS) ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going docs docs/_build/html

experiments: $(CORE) ## the published figures and claims on two models; index in $(RESULTS)
	$(BIN)/python experiments/run_all.py --out $(RESULTS)

benchmarks: $(CORE) ## measure all claims of speed and memory, and write docs/performance.md
	$(BIN)/python benchmarks/performance.py

clean: ## remove what was built, and the environments
	rm -rf $(VENV) $(VENV_TL3) out docs/_build .pytest_cache .hypothesis .mypy_cache .ruff_cache

# An environment is complete when its stamp is there; without it, whatever is there is repaired.
$(CORE): $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e '.[gguf,test]'
	@touch $@

$(DEV): $(CORE)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS): $(CORE)
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

# Not pinned by the constraints, which are those of TransformerLens 4.
$(CORE_TL3): pyproject.toml
	$(PYTHON) -m venv $(VENV_TL3)
	$(VENV_TL3)/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(VENV_TL3)/bin/python -m pip --disable-pip-version-check install --quiet \
		'$(TL3)' -e '.[gguf,test]'
	@touch $@
