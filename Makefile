# make demo    install into .venv and run the whole chain on a tiny model: pictures in runs/demo/
# make test    install and run the tests; test-slow and test-gpu run the others
#
# PYTHON=python3.12 picks the interpreter; a torch that .venv has already is kept, so GPU users
# install theirs first (or name it: TORCH='torch==2.13.0 --index-url ...').

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed
RUNS := .venv/.runs

.PHONY: demo test test-slow test-gpu check install

demo: $(RUNS)
	$(BIN)/python demo/run.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical -m "not slow and not gpu"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical -m "slow and not gpu"

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

check: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

install: $(INSTALLED)

# what the demo runs with: torch first, on its own, as a dependency could choose another build of it
$(RUNS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	  found=$$($(PYTHON) --version 2> /dev/null || echo missing); \
	  echo "error: urae needs Python 3.11 or later, but $(PYTHON) is $$found;" \
	    "name another: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable .
	@touch $@

$(INSTALLED): $(RUNS)
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@
