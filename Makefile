# Two commands for a new user: `make demo` and `make test`. Both create .venv and install by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

# Tests run in so many processes side by side, each of which computes with one thread.
WORKERS ?= 2
# A file of versions to install, as continuous integration has; without one the newest that fit.
CONSTRAINTS ?=
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test test-avx2 test-slow lint type bench-report clean

demo: $(READY)
	$(BIN)/torchrun --standalone --nproc_per_node=1 -m fastmoco.train --config configs/demo.yaml $(OPTIONS)

test: $(READY)
	$(PYTEST)

# What depends on the processor, as a machine with AVX2 and no more runs it.
test-avx2: export FASTMOCO_CPU = avx2
test-avx2: $(READY)
	$(PYTEST) -m "processor and not slow"

# Every combination of what `make test` covers once of each kind.
test-slow: $(READY)
	$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)
	$(BIN)/mypy

# Tables of the documents from the rows in bench/results.
bench-report: $(READY)
	$(BIN)/python -m bench.pages.tables

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
