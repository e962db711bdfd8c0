# `make demo` and `make test` each do everything on a machine with Python and make alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo few-calls double-well density ood bits test test-all mutations lint docs zoo simulation guidance bench bench-solvers device coverage readme clean

demo: $(VENV)/ready
	$(BIN)/python examples/digits.py $(ARGS)

few-calls: $(VENV)/ready
	$(BIN)/python examples/few_calls.py $(ARGS)

double-well: $(VENV)/ready
	$(BIN)/python examples/double_well.py $(ARGS)

density: $(VENV)/ready
	$(BIN)/python examples/density.py $(ARGS)

ood: $(VENV)/ready
	$(BIN)/python examples/out_of_distribution.py $(ARGS)

bits: $(VENV)/ready
	$(BIN)/python examples/bits_per_dim.py $(ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/ready
	$(BIN)/python -m pytest -n 2

simulation: $(VENV)/ready
	$(BIN)/python examples/simulation_based_inference.py $(ARGS)

guidance: $(VENV)/ready
	$(BIN)/python examples/guidance.py $(ARGS)

mutations: $(VENV)/ready
	$(BIN)/python tests/mutations.py $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build
	$(BIN)/python -m sphinx -q -b doctest docs docs/_build/doctest

zoo: $(VENV)/ready
	$(BIN)/python docs/zoo.py

bench: $(VENV)/ready
	$(BIN)/python benchmarks/overhead.py

bench-solvers: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt k-diffusion
	$(BIN)/python benchmarks/solvers.py $(ARGS)

device: $(VENV)/ready
	$(BIN)/python benchmarks/device.py $(ARGS)

coverage: $(VENV)/ready
	$(BIN)/python benchmarks/coverage.py --write $(ARGS)

readme: $(VENV)/ready
	$(BIN)/python docs/run_readme.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) docs/_build out
