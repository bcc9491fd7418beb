# Two commands for a new user: `make demo` and `make test`. Both create .venv and install by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: demo test lint type bench bench-report clean

demo: $(READY)
	$(BIN)/torchrun --standalone --nproc_per_node=1 -m fastmoco.train --config configs/demo.yaml

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)
	$(BIN)/mypy

# Tables and pictures of the documents from the rows in bench/results.
bench-report: $(READY)
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.figures

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
